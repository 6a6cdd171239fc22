"""The fleet as the APIs see it (common.apis.streams.Backend)."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

from starlette.requests import Request

from rbee_serve.common.apis.streams import ApiName, Embeddings, Model, Stream
from rbee_serve.common.http import correlation_id
from rbee_serve.contract.api import WORKER_HEADER, InferenceRequest, WorkerState
from rbee_serve.contract.errors import MalformedResponse, ModelNotFound
from rbee_serve.queen import relay
from rbee_serve.queen.forward import ask
from rbee_serve.queen.native_api import stream_headers
from rbee_serve.queen.placement import known_models, serves
from rbee_serve.queen.registry import Worker
from rbee_serve.queen.state import Queen, caller

#: Largest max_tokens that workers accept by default (SPEC 3.8).
_MAX_TOKENS_LIMIT = 2048


class FleetBackend:
    """Generates wherever the queen places it."""

    def __init__(self, queen: Queen) -> None:
        self._queen = queen

    @property
    def ping_interval_s(self) -> float:
        """Pause between comment pings on a silent stream."""
        return self._queen.settings.ping_interval_s

    @property
    def request_timeout_s(self) -> float | None:
        """Longest time for a request that names none."""
        return self._queen.settings.request_timeout_s

    async def open(self, http: Request, request: InferenceRequest, api: ApiName) -> Stream:
        """Open a stream at a worker; raises what ``Queen.open_stream`` raises."""
        return await self._queen.open_stream(http, request, api, correlation_id())

    async def embed(self, http: Request, model: str, inputs: Sequence[str | Sequence[int]], api: ApiName) -> Embeddings:
        """Ask a worker of the model; raises what ``forward.ask`` raises."""
        body = {"model": model, "input": list(inputs), "encoding_format": "base64"}
        answer, worker = await ask(self._queen, http, model, "/v1/embeddings", body)
        try:
            vectors = [await _unpacked(one["embedding"]) for one in answer["data"]]
            return Embeddings(answer["model"], vectors, answer["usage"]["prompt_tokens"], {WORKER_HEADER: worker.id})
        except (KeyError, TypeError, ValueError) as e:
            raise MalformedResponse(f"worker {worker.id} sent embeddings that cannot be read", worker_id=worker.id) from e

    async def count(self, http: Request, request: InferenceRequest) -> int:
        """Ask a worker of the model to render the messages."""
        body = request.model_dump(mode="json", include={"messages", "tools", "tool_choice"}, exclude_none=True)
        answer, worker = await ask(self._queen, http, request.model or "", "/v1/apply-template", body)
        count = answer.get("count")
        if not isinstance(count, int):
            raise MalformedResponse(f"worker {worker.id} sent a count that cannot be read", worker_id=worker.id)
        return count

    def headers(self, stream: Stream) -> dict[str, str]:
        """Return the headers by which the queen says what it did."""
        return stream_headers(stream) if isinstance(stream, relay.Stream) else {}

    def models(self, http: Request | None = None) -> list[Model]:
        """Return the models that live workers serve, by id: those that the request's key may use."""
        workers, key = self._live(), caller(http) if http is not None else None
        names = [name for name in known_models(workers) if key is None or key.allows(name)]
        return [_model([w for w in workers if w.record.model_id == name]) for name in names]

    def model(self, name: str) -> Model:
        """Return one model by its id or reference."""
        workers = self._live()
        for worker in workers:
            if serves(worker, name):
                return _model([w for w in workers if w.record.model_id == worker.record.model_id])
        known = known_models(workers)
        raise ModelNotFound(f"model {name!r} is not served; known: {', '.join(known) or 'none'}", model=name, known=known)

    def fits(self, model: str) -> int:
        """Return what every worker of the model can hold."""
        contexts = [w.record.context_tokens for w in self._queen.registry if serves(w, model)]
        return min([c for c in contexts if c] + [_MAX_TOKENS_LIMIT])

    def _live(self) -> list[Worker]:
        return self._queen.registry.live(self._queen.clock())


async def _unpacked(vector: str) -> bytes:
    """Return a vector's bytes, and let others have a turn: there may be thousands."""
    await asyncio.sleep(0)
    return base64.b64decode(vector, validate=True)


def _model(workers: list[Worker]) -> Model:
    """Return what ``workers``, all of one model, have in common."""
    first = workers[0].record
    contexts = [w.record.context_tokens for w in workers if w.record.context_tokens]
    return Model(
        id=first.model_id,
        ref=first.model_ref,
        created=min(int(w.record.started_at) for w in workers),
        context_tokens=min(contexts, default=None),
        info=next((w.record.model_info for w in workers if w.record.model_info), {}),
        device_bytes=sum(w.record.vram_bytes or 0 for w in workers),
        loaded=any(w.record.status in (WorkerState.IDLE, WorkerState.BUSY, WorkerState.DRAINING) for w in workers),
    )
