"""One inference as the command line runs it: cold start, busy retries, the stream, Ctrl+C and broken streams."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rbee_ctl.queen_client import InferenceStream, QueenClient, jittered
from rbee_ctl.references import unknown_model
from rbee_ctl.result import ErrorItem, OperationResult, exit_code_of
from rbee_ctl.session import Session
from rbee_serve.contract.errors import (
    AllSlotsBusy,
    ExitCode,
    LoadingTimeout,
    ModelNotFound,
    NoWorkerAvailable,
    RbeeError,
    WorkerLoading,
    WorkerNotFound,
    from_envelope,
)

if TYPE_CHECKING:
    from rbee_ctl.ephemeral import Ephemeral

#: Seconds between tries while every slot is taken (SPEC 3.8).
BUSY_PAUSES_S = (1.0, 2.0, 4.0)
#: Longest wait for a worker that loads its model (SPEC 3.8), and between two looks at it.
LOADING_LIMIT_S = 300.0
LOADING_POLL_S = 0.25

_ROUTABLE = frozenset({"idle", "busy"})
#: A worker in one of these states will take requests without our help.
_COMING = _ROUTABLE | {"loading"}


@dataclass
class Answer:
    """What has come so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    started: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """Return the payload of the result."""
        return {
            "text": "".join(self.text),
            "request_id": self.started.get("request_id"),
            "model": self.started.get("model"),
            "worker_id": self.started.get("worker_id"),
            "seed": self.started.get("seed"),
            "prompt_tokens": self.started.get("prompt_tokens"),
            "tokens_out": len(self.token_ids),
            "token_ids": self.token_ids,
            "stop_reason": self.end.get("stop_reason"),
            "prompt_time_ms": self.end.get("prompt_time_ms"),
            "decode_time_ms": self.end.get("decode_time_ms"),
        }


class Inference:
    """``body`` is the request for ``POST /v1/inference``; ``backend`` narrows the choice of worker and of cold start."""

    def __init__(
        self,
        session: Session,
        queen: QueenClient,
        body: dict[str, Any],
        *,
        backend: str | None = None,
        ephemeral: Ephemeral | None = None,
    ) -> None:
        """``ephemeral`` owns the worker that a cold start makes."""
        self._session, self._ui, self._queen = session, session.ui, queen
        self._body, self._backend = body, backend
        self._answer = Answer()
        self._ephemeral = ephemeral

    def run(self) -> OperationResult:
        """Run it; raises RbeeError for whatever fails before the first token."""
        self._narrow_to_backend()
        try:
            return self._try()
        except (ModelNotFound, NoWorkerAvailable, WorkerLoading) as e:
            self._bring_up(e)
        return self._try()

    # --- before the stream ------------------------------------------------------------------------------------------

    def _narrow_to_backend(self) -> None:
        """Choose a worker by backend: the queen's own choice knows no such filter."""
        if self._backend is None or "worker_id" in self._body:
            return
        fitting = self._live(backend=self._backend)
        ready = [w for w in fitting if w.get("status") in _ROUTABLE]
        if ready:
            self._body["worker_id"] = max(ready, key=lambda w: w.get("slots_available", 0))["id"]
        elif not fitting and "node" not in self._body:
            raise NoWorkerAvailable(
                f"no live worker has backend {self._backend}" + (f" and model {self._model}" if self._model else ""),
                hint=f"rbee-ctl worker start --node NODE --backend {self._backend} --model {self._model or 'MODEL'}",
            )

    @property
    def _model(self) -> str | None:
        model = self._body.get("model")
        return str(model) if model is not None else None

    def _live(self, *, backend: str | None) -> list[dict[str, Any]]:
        """Return the live workers that fit the request, in whatever state."""
        device = self._body.get("device")
        return [
            w
            for w in self._queen.workers(node=self._body.get("node"))
            if (backend is None or w.get("backend") == backend)
            and (device is None or w.get("device") == device)
            and (self._model is None or serves(w, self._model))
        ]

    def _bring_up(self, refusal: RbeeError) -> None:
        """Make a worker for the request exist, or raise ``refusal`` when that is not ours to do."""
        if "worker_id" in self._body:
            raise refusal
        coming = [w for w in self._live(backend=self._backend) if w.get("status") in _COMING]
        if coming:
            self._wait_until_ready(coming[0]["id"])
            return
        node, model = self._body.get("node"), self._model
        if node is None or model is None or self._session.settings.inventory.value is None:
            raise unknown_model(refusal, model)
        self._ui.narrate("ctl", "cold_start", f"no worker serves {model} on {node}; starting one")
        worker = self._start(node, model)
        self._wait_until_ready(worker["worker_id"])
        # From here on the model goes by the id that the node's catalog gave it.
        self._body["model"] = worker.get("model_id") or model
        self._body["worker_id"] = worker["worker_id"]

    def _start(self, node: str, model: str) -> dict[str, Any]:
        from rbee_ctl import node_facts
        from rbee_ctl.commands.fleet import one_host
        from rbee_ctl.commands.worker import start_request

        host = self._session.inventory.get(node)
        backend, device = host.backend(self._backend), self._body.get("device")
        node_facts.check_device(self._session.settings.state_path, node, backend, device)
        request = start_request(model, backend, device)
        if self._ephemeral is not None:
            play = self._ephemeral.start_worker(node, request)
        else:
            play = self._session.play("worker_start", limit=node, extra_vars={"rbee_worker_request": request})
        try:
            worker = one_host(play, node, "worker")["worker"]
        except ModelNotFound as e:
            raise unknown_model(e, model) from e
        self._ui.narrate(node, "worker_start", f"{worker.get('name')} is {worker.get('state')} at {worker.get('url')}")
        return dict(worker)

    def _wait_until_ready(self, worker_id: str) -> None:
        """Wait until the queen can route to the worker; raises LoadingTimeout with the last state seen."""
        limit = time.monotonic() + LOADING_LIMIT_S
        said, state = None, "not reported yet"
        while time.monotonic() < limit:
            try:
                state = str(self._queen.get(f"/v1/workers/{worker_id}").get("status"))
            except WorkerNotFound:
                state = "not reported yet"
            if state in _ROUTABLE:
                return
            if state == "failed":
                break
            if state != said:
                self._ui.narrate("queen", "wait_worker", f"{worker_id}: {state}")
                said = state
            time.sleep(LOADING_POLL_S)
        raise LoadingTimeout(
            f"worker {worker_id} is not ready: {state}",
            hint="rbee-ctl hive status; on the node: journalctl -u 'rbee-worker@*' -n 50",
            worker_id=worker_id,
        )

    # --- the stream -------------------------------------------------------------------------------------------------

    def _try(self) -> OperationResult:
        pauses = iter(BUSY_PAUSES_S)
        while True:
            try:
                return self._stream()
            except AllSlotsBusy as e:
                if (pause := next(pauses, None)) is None:
                    raise self._still_busy(e) from e
                pause = jittered(pause)
                self._ui.narrate("queen", "busy", f"{e.message}; next try in {pause:.1f} s")
                time.sleep(pause)

    def _still_busy(self, error: AllSlotsBusy) -> AllSlotsBusy:
        model, node = self._model or "MODEL", self._body.get("node") or "NODE"
        tries = len(BUSY_PAUSES_S)
        return AllSlotsBusy(
            f"{error.message}; still so after {tries} retries",
            hint="\n    ".join(
                [
                    "one of",
                    "rbee-ctl worker list                      (who is busy; try again when a slot is free)",
                    f"rbee-ctl worker start --node {node} --model {model} --name NAME   (one worker more)",
                    "rbee-ctl infer without --node, --device, --backend and --worker-id   (let the queen choose among all)",
                ]
            ),
            **error.details,
        )

    def _stream(self) -> OperationResult:
        """Read one stream to its end. A busy fleet says so at once: the waiting is done here, where a person sees it (S-53)."""
        stream: InferenceStream | None = None
        try:
            with self._queen.infer({**self._body, "stream": True, "queue_timeout_s": 0}) as stream:
                self._answer.started["request_id"] = stream.request_id
                self._read(stream.events())
        except KeyboardInterrupt:
            return self._cancelled(stream)
        except BrokenPipeError:  # nobody reads our stdout any more: the tokens are of no use
            self._cancel(stream)
            raise
        except RbeeError as e:
            if stream is None:
                raise  # refused: nothing has begun
            return self._broken(e)
        self._ui.end_of_tokens()
        self._say_done()
        return OperationResult("infer", data=self._answer.data())

    def _read(self, events: Iterator[dict[str, Any]]) -> None:
        answer = self._answer
        for event in events:
            kind = event.get("type")
            if kind == "token":
                answer.text.append(event["t"])
                answer.token_ids.append(event["id"])
                if not self._ui.json:
                    self._ui.token(event["t"])
            elif kind == "started":
                answer.started.update(event)
            elif kind == "end":
                answer.end = event
            elif kind == "error":
                raise from_envelope({"error": event}, fallback="the stream ended in an error")
            elif kind == "narration":
                self._ui.narrate(str(event.get("actor", "queen")), str(event.get("action", "")), str(event.get("human", "")))
            elif kind == "resumed":
                text = f"{event.get('worker_id')} goes on from token {event.get('i')} ({event.get('mode')})"
                self._ui.narrate("queen", "resumed", text)

    def _say_done(self) -> None:
        end, out = self._answer.end, len(self._answer.token_ids)
        seconds = float(end.get("decode_time_ms") or 0) / 1000
        speed = f", {out / seconds:.1f} tokens/s" if seconds > 0 else ""
        where = self._answer.started.get("worker_id")
        self._ui.narrate("ctl", "done", f"{out} tokens, {end.get('stop_reason')}{speed}, {where}")

    def _cancelled(self, stream: InferenceStream | None) -> OperationResult:
        self._ui.end_of_tokens()
        self._cancel(stream)
        self._ui.narrate("ctl", "cancelled", f"after {self._progress()}")
        item = ErrorItem("REQUEST_CANCELED", f"interrupted after {self._progress()}")
        return OperationResult(
            "infer", data=self._answer.data(), exit_code=ExitCode.INTERRUPTED, errors=(item,), partial=bool(self._answer.text)
        )

    def _cancel(self, stream: InferenceStream | None) -> None:
        if stream is not None and stream.request_id is not None:
            self._queen.cancel(stream.request_id)

    def _progress(self) -> str:
        return f"{len(self._answer.token_ids)} / {self._body['max_tokens']} tokens"

    def _broken(self, error: RbeeError) -> OperationResult:
        """The stream broke off after it began: keep what has come and say where."""
        self._ui.end_of_tokens()
        details: dict[str, Any] = {k: v for k, v in error.details.items() if k not in ("type", "tokens_out")}
        messages: tuple[str, ...] = ()
        if self._answer.text:
            place = self._save()
            details["partial_text_file"] = place
            messages = (f"partial text ({self._progress()}) kept in {place}",)
        item = ErrorItem(
            error.code, f"{error.message}; {self._progress()}", error.hint or "rbee-ctl worker list", details=details
        )
        return OperationResult(
            "infer",
            data=self._answer.data(),
            messages=messages,
            exit_code=exit_code_of(error),
            errors=(item,),
            partial=bool(self._answer.text),
        )

    def _save(self) -> str:
        folder = self._session.settings.state_path / "partial"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{self._answer.started.get('request_id') or int(time.time())}.txt"
        path.touch(mode=0o600)
        path.write_text("".join(self._answer.text), encoding="utf-8")
        return str(path)


def serves(worker: dict[str, Any], model: str) -> bool:
    """Say whether the worker serves the model: by id, or by its reference with or without ``hf:`` and file."""
    if model == worker.get("model_id"):
        return True
    ref = worker.get("model_ref")
    if not isinstance(ref, str):
        return False
    return any(name == ref or (name.startswith("hf:") and ref.startswith(name + ":")) for name in (model, f"hf:{model}"))
