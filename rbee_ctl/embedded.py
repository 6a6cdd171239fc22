"""Queen and one worker as child processes on loopback: the same programs that systemd runs, without systemd.

Everything lives in one temporary folder (0700). The children get SIGTERM when this process dies, however it dies, and
are killed with all their descendants when they do not end in time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from rbee_ctl.render import Ui
from rbee_serve import process_tree
from rbee_serve.contract.errors import (
    ConfigInvalid,
    ConnectionTimeout,
    ExitCode,
    LoadingTimeout,
    ModelFileInvalid,
    RbeeError,
    UnitStartFailed,
    WorkerCrashed,
    WorkerNotFound,
)

HOST = "127.0.0.1"
HIVE = "localhost"
INSTANCE = "cpu0"
_PREFIX = "rbee-serve-"
#: Seconds: until the model is loaded (SPEC 3.8); for a running stream after Ctrl+C; until a child is killed.
LOAD_LIMIT_S = 300.0
DRAIN_S = 2.0
STOP_LIMIT_S = 10.0
_POLL_S = 0.1
#: Ports below it are those of well-known services.
_LOWEST_PORT = 10_000


def free_port() -> int:
    """Return a port of loopback that is free now, and that the kernel gives to nobody by itself.

    A port of its ephemeral range could be taken by any outgoing connection before our server listens on it.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    ports = range(_LOWEST_PORT, lowest)
    for port in secrets.SystemRandom().sample(ports, min(len(ports), 200)):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind((HOST, port))
            return port
    with socket.socket() as s:  # an ephemeral range that leaves nothing below it, or a very full machine
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def model_name(path: Path) -> str:
    """Return an id made from a file's name: lower case, characters that ids may have."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-.") or "model"


class _Child:
    """One server process in a session of its own: the terminal's Ctrl+C does not reach it, we end it in order."""

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str], blocked: set[int]) -> None:
        """``blocked``: the signals that it begins with as blocked ones."""
        self.name, self.log = name, log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                preexec_fn=_die_with_parent(os.getpid(), blocked),  # safe: this process has one thread
            )

    def tail(self, lines: int = 15) -> list[str]:
        """Return the last lines of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]

    def stop(self) -> None:
        """End it and everything below it: ask, wait, kill."""
        below = process_tree.descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        process_tree.kill(below)
        self.process.wait()


@contextlib.contextmanager
def _undisturbed() -> Iterator[set[int]]:
    """Let Ctrl+C and SIGTERM wait until the block has ended; yields the signals that were blocked before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        yield {int(s) for s in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent(parent: int, blocked: set[int]) -> Callable[[], None]:
    """Return a hook for the child that makes the kernel end it with us (also after ``kill -9``) and gives it its signals."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    pr_set_pdeathsig = 1

    def hook() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:  # died in between
            os._exit(1)

    return hook


class Embedded:
    """The pair of processes. ``start``, then ``wait``; leaving the block ends and removes everything."""

    def __init__(
        self,
        ui: Ui,
        model_path: Path,
        model_id: str | None,
        model_sha256: str | None,
        *,
        port: int | None,
        slots: int,
        threads: int,
    ) -> None:
        self._ui = ui
        self._model_path, self._sha256 = model_path, model_sha256
        self.model_id = model_id or model_name(model_path)
        self._port, self._slots, self._threads = port, slots, threads
        self._children: list[_Child] = []
        self._stack = contextlib.ExitStack()
        self.folder = Path()
        self.queen_url = ""

    def __enter__(self) -> Self:
        remove_stale()
        while not self._has_folder():
            self._stack.close()
        self._stack.callback(self._stop_children)
        return self

    def _has_folder(self) -> bool:
        """Make the folder and lock it; False when another one, which begins in this moment, took it for a stale one."""
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        # The lock goes with the process: a folder that nobody has locked was left by one that was killed.
        lock = self._stack.enter_context((self.folder / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        return os.fstat(lock.fileno()).st_nlink > 0

    def __exit__(self, *_: object) -> None:
        # A second Ctrl+C must not leave a half-ended stack behind.
        before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._stack.close()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _stop_children(self) -> None:
        for child in reversed(self._children):  # the worker first: its last word still reaches the queen
            child.stop()

    # --- start ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start both and wait until the queen routes to the worker; raises what keeps them from it."""
        self._write_secrets()
        queen_port = self._port or free_port()
        _require_free(queen_port)
        self.queen_url = f"http://{HOST}:{queen_port}"
        worker_port = free_port()
        queen = {
            "host": HOST,
            "port": queen_port,
            "log_level": "info",
            "log_format": "text",
            "fleet_token_file": str(self.folder / "fleet-token"),
            "client_keys_file": str(self.folder / "client-keys"),
        }
        worker: dict[str, Any] = {
            "name": INSTANCE,
            "hive": HIVE,
            "host": HOST,
            "port": worker_port,
            "backend": "cpu",
            "device": 0,
            "model_id": self.model_id,
            "model_path": str(self._model_path),
            "slots": self._slots,
            "threads": self._threads,
            "queen_url": self.queen_url,
            "log_format": "text",
            "fleet_token_file": str(self.folder / "fleet-token"),
            "drain_timeout_s": DRAIN_S,
        }
        if self._sha256:
            worker["model_sha256"] = self._sha256
        self._write(
            "config.toml", {"state_dir": str(self.folder), "queen_url": self.queen_url, "api_key_file": str(self._key_file)}
        )
        self._ui.narrate("ctl", "start", f"queen on {self.queen_url}")
        self._launch("queen", queen)
        self._until(self._queen_answers, "queen", 30.0)
        self._ui.narrate("ctl", "start", f"worker {INSTANCE} with {self._model_path.name}")
        self._launch("worker", worker)
        self._until(lambda: self._worker_ready(worker_port), "worker", LOAD_LIMIT_S)

    @property
    def _key_file(self) -> Path:
        return self.folder / "client-key"

    def _write_secrets(self) -> None:
        key = f"rbee-{secrets.token_urlsafe(32)}"
        record = {
            "id": "embedded",
            "name": "rbee-ctl-serve",
            "admin": True,
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        texts = {
            "fleet-token": secrets.token_urlsafe(32),
            "client-key": key,
            "client-keys": json.dumps({"version": 1, "keys": [record]}),
        }
        for name, text in texts.items():
            path = self.folder / name
            path.touch(mode=0o600)
            path.write_text(text + "\n", encoding="utf-8")

    def _write(self, name: str, values: dict[str, Any]) -> Path:
        path = self.folder / name
        # Strings of JSON are strings of TOML, and so are its numbers.
        path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()), encoding="utf-8")
        return path

    def _launch(self, name: str, settings: dict[str, Any]) -> None:
        config = self._write(f"{name}.toml", settings)
        # RBEE_* would override the files just written, for both programs alike.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RBEE_", "NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_"))}
        command = [sys.executable, "-m", f"rbee_serve.{name}.main", "--config", str(config)]
        with _undisturbed() as blocked:  # between its beginning and its entry here nobody would end it
            self._children.append(_Child(name, command, self.folder / f"{name}.log", env, blocked))

    # --- wait -------------------------------------------------------------------------------------------------------

    def _until(self, ready: Callable[[], bool], name: str, limit_s: float) -> None:
        limit = time.monotonic() + limit_s
        while not ready():
            self._check_children()
            if time.monotonic() > limit:
                raise LoadingTimeout(f"the {name} was not ready within {limit_s:.0f} s", journal=self._children[-1].tail())
            time.sleep(_POLL_S)

    def _check_children(self) -> None:
        for child in self._children:
            if (code := child.process.poll()) is not None:
                raise self._death(child, code)

    def _death(self, child: _Child, code: int) -> RbeeError:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        cls: type[RbeeError] = WorkerCrashed if child.name == "worker" else UnitStartFailed
        if code == ExitCode.CONFIG:
            cls = ModelFileInvalid if child.name == "worker" else ConfigInvalid
        return cls(
            f"the {child.name} {how}",
            hint="rbee-ctl serve --verbose shows the whole log",
            journal=child.tail(500 if self._ui.verbose else 15),
        )

    def _queen_answers(self) -> bool:
        with socket.socket() as s:
            s.settimeout(1)
            return s.connect_ex((HOST, int(self.queen_url.rpartition(":")[2]))) == 0

    def _worker_ready(self, port: int) -> bool:
        from rbee_ctl.queen_client import QueenClient, Timeouts

        key = self._key_file.read_text(encoding="utf-8").strip()
        with QueenClient(self.queen_url, key, Timeouts(retry_pauses_s=())) as queen:
            try:
                record = queen.get(f"/v1/workers/{HIVE}-{INSTANCE}")
            except (WorkerNotFound, ConnectionTimeout):
                return False
        if record.get("status") in ("idle", "busy"):
            return True
        self._show_loading(port)
        return False

    def _show_loading(self, port: int) -> None:
        """Follow the worker's own account of loading until it ends; the queen hears of the end by heartbeat."""
        import httpx

        with contextlib.suppress(httpx.HTTPError, ValueError):
            for event in self._loading_events(port):
                text = str(event.get("stage"))
                if event.get("layers_total"):
                    text += f": {event.get('layers_loaded')} of {event['layers_total']} layers"
                self._ui.progress(INSTANCE, "load_model", text)

    def _loading_events(self, port: int) -> Iterator[dict[str, Any]]:
        import httpx

        from rbee_serve.contract.events import SseParser

        headers = {"Authorization": f"Bearer {(self.folder / 'fleet-token').read_text(encoding='utf-8').strip()}"}
        url = f"http://{HOST}:{port}/v1/loading/progress"
        parser = SseParser()
        with (
            httpx.Client(trust_env=False, timeout=30) as http,
            http.stream("GET", url, headers=headers) as response,
        ):
            for chunk in response.iter_raw():
                for payload in parser.feed(chunk):
                    if payload == "[DONE]":
                        return
                    yield json.loads(payload)

    def describe(self) -> dict[str, Any]:
        """Return where everything is; the key itself stays in its file."""
        return {
            "queen_url": self.queen_url,
            "openai_base_url": f"{self.queen_url}/v1",
            "api_key_file": str(self._key_file),
            "config": str(self.folder / "config.toml"),
            "model": self.model_id,
            "pids": {child.name: child.process.pid for child in self._children},
            "logs": {child.name: str(child.log) for child in self._children},
        }

    def wait(self) -> None:
        """Return never, but by KeyboardInterrupt; raises when a child ends by itself."""
        while True:
            self._check_children()
            time.sleep(_POLL_S)


def _require_free(port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closing connection is no obstacle
        try:
            s.bind((HOST, port))
        except OSError as e:
            raise UnitStartFailed(
                f"port {port} is taken ({e.strerror})", hint="rbee-ctl serve (without --port: a free one)"
            ) from e


def remove_stale() -> None:
    """Remove folders of stacks that were killed: ours, and locked by nobody."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
