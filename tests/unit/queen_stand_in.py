"""A queen that answers from a script, for tests of the command line alone: real HTTP on loopback, nothing behind it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rbee_serve.contract import events
from rbee_serve.contract.errors import RbeeError

Step = bytes | threading.Event | None  # bytes are sent, an event is waited for, None drops the connection


class QueenStandIn:
    """``workers`` are listed; each ``POST /v1/inference`` takes the next of ``answers``: an error, or a list of steps."""

    def __init__(self) -> None:
        self.workers: list[dict[str, Any]] = []
        self.hives: list[dict[str, Any]] = []
        self.answers: list[RbeeError | list[Step]] = []
        self.bodies: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.url = ""
        self.on_get: Callable[[str], None] = lambda path: None

    @contextlib.contextmanager
    def running(self) -> Iterator[QueenStandIn]:
        """Serve on a free port."""
        queen = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _json(self, status: int, body: Any) -> None:
                raw = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                queen.on_get(self.path)
                if self.path.startswith("/v1/workers/"):
                    found = [w for w in queen.workers if w["id"] == self.path.rpartition("/")[2]]
                    missing = {"error": {"code": "WORKER_NOT_FOUND", "message": "no such worker", "details": {}}}
                    self._json(200 if found else 404, found[0] if found else missing)
                elif self.path.startswith("/v1/status"):
                    self._json(200, {"queen": {"version": "0"}, "hives": queen.hives, "workers": queen.workers, "models": []})
                elif self.path.startswith("/v1/hives"):
                    self._json(200, {"hives": queen.hives})
                else:
                    node = parse_qs(urlsplit(self.path).query).get("node", [None])[0]
                    self._json(200, {"workers": [w for w in queen.workers if node in (None, w.get("hive_id"))]})

            def do_DELETE(self) -> None:
                queen.cancelled.append(self.path.rpartition("/")[2])
                self.send_response(204)
                self.end_headers()

            def do_POST(self) -> None:
                queen.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = queen.answers.pop(0)
                if isinstance(answer, RbeeError):
                    self._json(answer.status, answer.envelope())
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("X-Request-Id", "request-1")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                for step in answer:
                    if step is None:
                        return
                    if isinstance(step, threading.Event):
                        step.wait(20)
                    else:
                        with contextlib.suppress(OSError):
                            self.wfile.write(step)
                            self.wfile.flush()

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


STARTED = events.encode(events.started("request-1", "m", seed=7, prompt_tokens=3, cached_tokens=0, worker_id="lab1-cpu0"))


def tokens(*texts: str, first: int = 0) -> list[Step]:
    """Return one frame a token; ids are 100 more than the index."""
    return [events.encode(events.token(text, i, 100 + i)) for i, text in enumerate(texts, first)]


def whole(*texts: str) -> list[Step]:
    """Return a stream from its first to its last event."""
    end = events.encode(events.end(len(texts), "MAX_TOKENS", prompt_ms=5, decode_ms=100, prompt_tokens=3))
    return [STARTED, *tokens(*texts), end, events.DONE]


def worker(name: str = "lab1-cpu0", **changes: Any) -> dict[str, Any]:
    """Return a live worker's record."""
    record = {
        "id": name,
        "hive_id": name.partition("-")[0],
        "model_id": "m",
        "model_ref": "hf:org/repo:m.gguf",
        "backend": "cpu",
        "device": 0,
        "status": "idle",
        "slots_available": 1,
        "slots_total": 1,
        "url": "http://10.77.0.11:8001",
    }
    return record | changes
