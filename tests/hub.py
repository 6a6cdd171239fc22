"""A model hub on loopback: the endpoints that huggingface_hub's client uses, with real files, and able to misbehave.

    GET /api/models/ORG/REPO[/revision/REV]?blobs=true    files with size and LFS digest
    GET /ORG/REPO/resolve/REV/FILE                        302 to /cdn/..., like the real hub
    GET /cdn/ORG/REPO/FILE                                bytes, with Range

Every request is kept in ``Hub.log``. Usable by hand and from a lab: ``python tests/hub.py --host 10.77.0.1 --root DIR``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "5e0ae4f5d7a54b1c0f3e0b6bb0a3f3a1d2c3b4a5"


@dataclass
class Request:
    """One request as it came in; ``at`` is monotonic seconds."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    at: float


@dataclass
class Behaviour:
    """What goes wrong. Counts say for how many requests for bytes (then all is well again); -1 is for ever."""

    status: int | None = None  # answer of everything
    error_code: str | None = None  # X-Error-Code beside it
    token: str | None = None  # bearer that is asked for
    bytes_per_s: int | None = None
    reset_at: float | None = None  # share of the rest after which the connection is reset
    reset_count: int = 0
    taken: Callable[[], int] | None = None  # how far the client has come: no reset before it has all that was sent
    halfway: Callable[[], None] | None = None  # called when half of the rest has been sent, and then the other half follows
    stall_at: float | None = None  # share after which nothing more comes
    stall_count: int = 0
    corrupt_count: int = 0  # right size, wrong bytes
    ignore_range: bool = False
    held: threading.Event | None = None  # nothing is answered until it is set
    gated: bool = False  # anybody may look, but not download: what the real hub does


@dataclass
class Hub:
    """Serves ``root/ORG/REPO/FILE``. A context manager: inside of it, it listens."""

    root: Path
    host: str = "127.0.0.1"
    port: int = 0
    behaviour: Behaviour = field(default_factory=Behaviour)
    log: list[Request] = field(default_factory=list)
    bytes_sent: int = 0
    digests: dict[str, str] = field(default_factory=dict)  # file name -> what to claim

    @property
    def url(self) -> str:
        """Address of the hub, for HF_ENDPOINT."""
        return f"http://{self.host}:{self.server.server_address[1]}"

    @property
    def downloads(self) -> list[Request]:
        """The requests for bytes, in order."""
        return [r for r in self.log if r.path.startswith("/cdn/")]

    @cached_property
    def server(self) -> ThreadingHTTPServer:
        """The listening server."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer((self.host, self.port), Handler)
        server.daemon_threads = True
        return server

    def __enter__(self) -> Hub:
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def add(self, repo: str, name: str, source: Path) -> str:
        """Put a file into a repository (a link to ``source``); returns its digest."""
        path = self.root / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)
        return self.sha256(path)

    def sha256(self, path: Path) -> str:
        """Return the digest of a file, computed once."""
        if path.name in self.digests:
            return self.digests[path.name]
        key = path.resolve(), path.stat().st_mtime_ns
        if key not in _DIGESTS:
            with path.open("rb") as f:
                _DIGESTS[key] = hashlib.file_digest(f, "sha256").hexdigest()
        return _DIGESTS[key]


_DIGESTS: dict[tuple[Path, int], str] = {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, wrong = self.hub, self.hub.behaviour
        path = unquote(urlsplit(self.path).path)
        auth = self.headers.get("Authorization")
        hub.log.append(Request(self.command, path, self.headers.get("Range"), auth, time.monotonic()))
        if wrong.held:
            wrong.held.wait()
        if wrong.status:
            extra = {"X-Error-Code": wrong.error_code} if wrong.error_code else {}
            return self._answer(wrong.status, {"error": "as told"}, **extra)
        if wrong.token and not path.startswith("/cdn/") and auth != f"Bearer {wrong.token}":
            return self._answer(401, {"error": "gated"}, **{"X-Error-Code": "GatedRepo"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self._model_info(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            file = hub.root / match[1] / match[2]
            if wrong.gated:
                return self._answer(403, {"error": "gated"}, **{"X-Error-Code": "GatedRepo"})
            if not file.is_file():
                return self._answer(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
            return self._answer(
                302,
                None,
                **{
                    "Location": f"{hub.url}/cdn/{match[1]}/{match[2]}",
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Etag": f'"{hub.sha256(file)}"',
                    "X-Linked-Size": str(file.stat().st_size),
                },
            )
        if path.startswith("/cdn/") and (file := hub.root / path.removeprefix("/cdn/")).is_file():
            return self._bytes(file)
        return self._answer(404, {"error": "not found"}, **{"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: Any, **headers: str) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _model_info(self, repo: str) -> None:
        home = self.hub.root / repo
        if not home.is_dir():
            return self._answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        siblings = []
        for path in sorted(p for p in home.rglob("*") if p.is_file()):
            size = path.stat().st_size
            name = path.relative_to(home).as_posix()
            file: dict[str, Any] = {"rfilename": name, "size": size, "blobId": "0" * 40}
            if name.endswith(".gguf"):
                file["lfs"] = {"sha256": self.hub.sha256(path), "size": size, "pointerSize": 134}
            siblings.append(file)
        return self._answer(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": ["gguf"]})

    def _bytes(self, file: Path) -> None:
        wrong = self.hub.behaviour
        size, start = file.stat().st_size, 0
        if not wrong.ignore_range and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(match[1])
            if start >= size:
                return self._answer(416, {"error": "range"}, **{"Content-Range": f"bytes */{size}"})
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        corrupt = _take(wrong, "corrupt_count")
        cut = wrong.reset_at if wrong.reset_at is not None and _take(wrong, "reset_count") else None
        stall = wrong.stall_at if wrong.stall_at is not None and _take(wrong, "stall_count") else None
        share = cut if cut is not None else stall
        end = size if share is None else start + int((size - start) * share)
        if wrong.halfway is not None:
            half = start + (end - start) // 2
            self._send(file, start, half, corrupt=corrupt)
            wrong.halfway()
            start = half
        self._send(file, start, end, corrupt=corrupt)
        if cut is not None and wrong.taken is not None:
            limit = time.monotonic() + 60
            while wrong.taken() < end and time.monotonic() < limit:
                time.sleep(0.005)
        if stall is not None:
            self.connection.recv(1)  # nothing more until the client gives up
        if cut is not None:
            # Linger 0: the close sends RST, as a connection that broke does.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if share is not None:
            self.close_connection = True
        return None

    def _send(self, file: Path, start: int, end: int, *, corrupt: bool) -> None:
        rate = self.hub.behaviour.bytes_per_s
        step = min(1 << 18, max(1024, rate // 20)) if rate else 1 << 18
        began, sent = time.monotonic(), 0
        with file.open("rb") as f:
            f.seek(start)
            while sent < end - start:
                chunk = f.read(min(step, end - start - sent))
                self.wfile.write(bytes(len(chunk)) if corrupt else chunk)
                sent += len(chunk)
                self.hub.bytes_sent += len(chunk)
                if rate:
                    time.sleep(max(0.0, began + sent / rate - time.monotonic()))


def _take(behaviour: Behaviour, name: str) -> bool:
    left = getattr(behaviour, name)
    if left > 0:
        setattr(behaviour, name, left - 1)
    return bool(left)


def main() -> None:
    """Serve a directory until interrupted."""
    parser = argparse.ArgumentParser(description="a model hub for tests")
    parser.add_argument("--root", type=Path, required=True, help="directory with ORG/REPO/FILE.gguf")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bytes-per-s", type=int)
    parser.add_argument("--token", help="bearer token to ask for")
    args = parser.parse_args()
    hub = Hub(args.root, args.host, args.port, Behaviour(bytes_per_s=args.bytes_per_s, token=args.token))
    print(hub.url, flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    main()
