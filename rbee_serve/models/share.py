"""Let other machines of the fleet fetch one model from this one: ``python -m rbee_serve.models.share --model ID ...``.

Runs as user rbee in a transient unit for as long as somebody fetches, and ends ``--idle-s`` seconds after the last byte.
Asks for the fleet token. Answers ``GET /v1/model`` (what peer.py reads) and ``GET /v1/model/files/N`` with Range. Prints
nothing but errors; ``--address-file`` gets ``{"port": N}`` when it listens. Standard library only.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import re
import select
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rbee_serve.models import store

_CHUNK = 1 << 20
#: A machine that takes no byte for this long has gone.
_PEER_TIMEOUT_S = 60.0


def described(entry: store.Entry, models_dir: Path) -> dict[str, Any]:
    """Return what a peer needs to know of a model; raises ValueError for one that is not Ready below ``models_dir``."""
    if entry["status"] != store.READY:
        raise ValueError(f"{entry['id']} is {entry['status']}: {entry.get('problem', 'not complete')}")
    files = []
    for part in store.parts(entry):
        path = Path(part["path"])
        if not path.is_relative_to(models_dir) or len(path.relative_to(models_dir).parts) < 3 or not part.get("sha256"):
            raise ValueError(f"{path} is not ORG/REPO/FILE with a digest beneath {models_dir}")
        name = "/".join(path.relative_to(models_dir).parts[2:])
        files.append({"name": name, "size_bytes": part["size_bytes"], "sha256": part["sha256"]})
    source = (entry.get("metadata") or {}).get("source_url")
    return {"id": entry["id"], "reference": entry["reference"], "source_url": source, "files": files}


class Share(ThreadingHTTPServer):
    """Serves one model until nobody has asked for a while."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], entry: store.Entry, models_dir: Path, token: str) -> None:
        super().__init__(address, _Handler)
        self.paths = [Path(p["path"]) for p in store.parts(entry)]
        self.described = described(entry, models_dir)
        self.token = token
        self._lock = threading.Lock()
        self._busy, self._moved_at = 0, time.monotonic()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count who is connected."""
        with self._lock:
            self._busy += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Count who has gone."""
        super().shutdown_request(request)
        with self._lock:
            self._busy, self._moved_at = self._busy - 1, time.monotonic()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say who broke off, without a traceback: they come again."""
        print(f"{client_address[0]}: {sys.exc_info()[1]}", file=sys.stderr, flush=True)

    def idle_s(self) -> float:
        """Return for how long nobody has been connected, seconds."""
        with self._lock:
            return 0.0 if self._busy else time.monotonic() - self._moved_at

    def run(self, idle_limit_s: float) -> None:
        """Serve until nobody has been connected for ``idle_limit_s``."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        while (idle := self.idle_s()) < idle_limit_s:
            time.sleep(max(0.05, min(1.0, idle_limit_s - idle)))
        self.shutdown()
        thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Share
    protocol_version = "HTTP/1.1"
    timeout = _PEER_TIMEOUT_S

    def log_message(self, *_: Any) -> None:
        pass

    def end_headers(self) -> None:
        """Say that the connection ends with the answer, or a client would ask once more over it."""
        self.send_header("Connection", "close")
        super().end_headers()

    def do_GET(self) -> None:
        self.close_connection = True
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            return self._answer(401, {"error": "the fleet token is asked for"})
        if self.path == "/v1/model":
            return self._answer(200, self.server.described)
        match = re.fullmatch(r"/v1/model/files/(\d{1,4})", self.path)
        if match is None or int(match[1]) >= len(self.server.paths):
            return self._answer(404, {"error": "not found"})
        return self._bytes(self.server.paths[int(match[1])])

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _bytes(self, path: Path) -> None:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match else 0
            if start >= size and match:
                return self._answer(416, {"error": "range"})
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.send_header("Content-Length", str(size - start))
            self.end_headers()
            while start < size:
                sent = os.sendfile(self.connection.fileno(), f.fileno(), start, _CHUNK) if self._writable() else 0
                if sent == 0:
                    raise ConnectionError(f"takes no more bytes at {start} of {size}")
                start += sent
        return None

    def _writable(self) -> bool:
        """Wait until the peer takes more; a socket with a timeout does not block in sendfile."""
        return bool(select.select([], [self.connection], [], _PEER_TIMEOUT_S)[1])


def token_from(environ: Mapping[str, str]) -> str:
    """Return the fleet token: the credential of the unit, or the file that RBEE_FLEET_TOKEN_FILE names; raises OSError."""
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        return Path(directory, "fleet-token").read_text(encoding="utf-8").strip()
    return Path(environ.get("RBEE_FLEET_TOKEN_FILE", "/etc/rbee/credentials/fleet-token")).read_text(encoding="utf-8").strip()


def main(argv: list[str] | None = None) -> int:
    """Share a model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m rbee_serve.models.share", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="its id in the catalog")
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--host", default="")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--address-file", type=Path, required=True)
    parser.add_argument("--idle-s", type=float, default=120.0)
    args = parser.parse_args(argv)
    entries, _ = store.read(args.models_dir)
    entry = next((e for e in entries if e["id"] == args.model), None)
    try:
        if entry is None:
            raise ValueError(f"no model {args.model!r} in {args.models_dir}")
        if not (token := token_from(os.environ)):
            raise ValueError("the fleet token is empty")
        share = Share((args.host, args.port), entry, args.models_dir, token)
    except (OSError, ValueError) as e:
        print(f"rbee share: {e}", file=sys.stderr)
        return 1
    part = args.address_file.with_suffix(".new")
    part.write_text(json.dumps({"port": share.server_address[1]}), encoding="utf-8")
    part.replace(args.address_file)
    share.run(args.idle_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
