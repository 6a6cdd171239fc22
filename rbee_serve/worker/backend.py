"""This worker as the APIs see it (common.apis.streams.Backend)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request

from rbee_serve.common.apis.streams import ApiName, Embeddings, Model, Stream
from rbee_serve.common.http import correlation_id, while_connected
from rbee_serve.contract.api import WORKER_HEADER, InferenceRequest
from rbee_serve.contract.errors import ModelNotFound, RbeeError, from_envelope
from rbee_serve.contract.events import Event
from rbee_serve.worker.generation import Generation
from rbee_serve.worker.inference import InferenceApi, new_request_id
from rbee_serve.worker.state import Worker, model_info
from rbee_serve.worker.text_api import rendered


class WorkerStream:
    """One generation of this worker's engine."""

    def __init__(self, api: InferenceApi, generation: Generation, model: str, correlation_id: str | None) -> None:
        self.id = generation.id
        self.error: RbeeError | None = None
        self.generation = generation
        self._api, self._model, self._correlation_id = api, model, correlation_id

    @property
    def model(self) -> str:
        """Id of the model that answers."""
        return self._model

    async def events(self) -> AsyncGenerator[Sequence[tuple[str, Event]], None]:
        """Yield the events, each with no payload."""
        async with aclosing(self._api.events(self.generation, self._correlation_id)) as found:
            async for batch in found:
                if batch[-1]["type"] == "error":
                    self.error = from_envelope({"error": batch[-1]}, fallback="the generation failed")
                yield [("", event) for event in batch]

    async def aclose(self) -> None:
        """Free the slot. Idempotent."""
        await self.generation.aclose()


class WorkerBackend:
    """Generates here."""

    def __init__(self, worker: Worker, inference: InferenceApi) -> None:
        self._worker, self._inference = worker, inference

    @property
    def ping_interval_s(self) -> float:
        """Pause between comment pings on a silent stream."""
        return self._worker.settings.ping_interval_s

    @property
    def request_timeout_s(self) -> float | None:
        """Longest time for a request that names none."""
        return None

    async def open(self, http: Request, request: InferenceRequest, api: ApiName) -> Stream:
        """Open a generation; raises ModelNotFound and what ``InferenceApi.open`` raises."""
        if request.model is not None:
            self.model(request.model)
        generation = await self._inference.open(http, request, new_request_id())
        return WorkerStream(self._inference, generation, self._worker.settings.model_id, correlation_id())

    async def embed(self, http: Request, model: str, inputs: Sequence[str | Sequence[int]], api: ApiName) -> Embeddings:
        """Let the engine make vectors beside its streams; raises what it raises."""
        mine = self.model(model)
        self._worker.admit()
        with self._worker.at_work():
            found = await while_connected(http, self._worker.engine.embed(inputs))
        self._worker.metrics.tokens_in.inc(sum(found.tokens))
        return Embeddings(mine.id, found.vectors, sum(found.tokens), {WORKER_HEADER: self._worker.settings.worker_id})

    async def count(self, http: Request, request: InferenceRequest) -> int:
        """Render the prompt and count its tokens."""
        return (await while_connected(http, rendered(self._worker, request)))[1]

    def headers(self, stream: Stream) -> dict[str, str]:
        """Return the headers that go with an answer."""
        return self._inference.headers(stream.generation) if isinstance(stream, WorkerStream) else {}

    def models(self, http: Request | None = None) -> list[Model]:
        """Return the one model."""
        s, info = self._worker.settings, self._worker.engine.info
        facts = model_info(info, s.model_sha256) if info else {}
        context = info.context_tokens if info else None
        return [
            Model(
                s.model_id,
                s.model_ref,
                int(self._worker.started_at),
                context,
                facts,
                loaded=info is not None,
                device_bytes=info.device_memory_bytes if info else 0,
            )
        ]

    def model(self, name: str) -> Model:
        """Return the model if that is its id or reference."""
        (mine,) = self.models()
        if name not in (mine.id, mine.ref):
            raise ModelNotFound(f"model {name!r} is not served; known: {mine.id}", model=name, known=[mine.id])
        return mine

    def fits(self, model: str) -> int:
        """Return what this worker can hold and allows."""
        limit, info = self._worker.settings.max_tokens_limit, self._worker.engine.info
        return min(limit, info.context_tokens) if info else limit
