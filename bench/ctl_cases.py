"""Cases about rbee-ctl: reading this machine in its own process against the same as an HTTP job, and whole commands."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import fleets
from bench.engine_cases import Run
from bench.results import Row
from rbee_ctl.render import Ui
from rbee_ctl.session import Session

KEY = "rbee-" + "bench" * 8
#: Operation of a job -> playbook and variables of the same in this process.
READS: dict[str, tuple[dict[str, object], str, dict[str, object]]] = {
    "model_list": ({}, "model_list", {}),
    "model_get": ({"id": "model-7"}, "model_get", {"rbee_model_ref": "model-7"}),
    "worker_binary_list": ({}, "runtime_list", {}),
    "worker_binary_get": ({"worker_type": "cpu"}, "runtime_get", {"rbee_runtime_type": "cpu"}),
}
if Path("/run/systemd/system").is_dir():
    READS["worker_process_list"] = ({}, "worker_process", {})


def _machine(folder: Path) -> None:
    """Make an inventory of this machine with 20 models and a runtime of 1,000 files."""
    for i in range(20):
        home = folder / f"models/org/repo{i}"
        home.mkdir(parents=True)
        (home / "m.gguf").write_bytes(b"GGUF")
        entry = {"id": f"model-{i}", "reference": f"hf:org/repo{i}:m.gguf", "provider": "hf", "name": "m", "metadata": {}}
        entry |= {"path": str(home / "m.gguf"), "size_bytes": 4, "added_at": "2026-01-01", "status": "Ready", "sha256": None}
        (home / "metadata.yaml").write_text(json.dumps({"models": [entry]}))
    runtime = folder / "opt/runtimes/cpu/1"
    for i in range(20):
        (runtime / f"lib/{i}").mkdir(parents=True)
        for j in range(50):
            (runtime / f"lib/{i}/{j}").write_bytes(b"x")
    (runtime / "metadata.yaml").write_text("version: 1\n")
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "rbee_install_path": str(folder / "opt"),
        "rbee_hive_models_dir": str(folder / "models"),
    }
    (folder / "inventory.yml").write_text(json.dumps({"rbee_hives": {"hosts": {"localhost": variables}}}))
    keys = folder / "client-keys"
    keys.touch(0o600)
    key = {"id": "bench", "name": "bench", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "admin": True, "created_at": "now"}
    keys.write_text(json.dumps({"version": 1, "keys": [key]}))
    api_key = folder / "key"
    api_key.touch(0o600)
    api_key.write_text(KEY)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {k: os.environ.get(k) for k in values}
    os.environ |= values
    try:
        yield
    finally:
        for k, v in before.items():
            os.environ.pop(k, None)
            if v is not None:
                os.environ[k] = v


def _job(port: int, operation: str, fields: dict[str, object]) -> float:
    """Run a job at the queen and read its stream to the end; return the seconds."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = json.dumps({"operation": operation, **fields}).encode()
    began = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/v1/jobs", body, headers), timeout=60) as answer:
        path = json.load(answer)["sse_url"]
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers), timeout=60) as answer:
        text = answer.read().decode()
    took = time.perf_counter() - began
    if '"type":"result"' not in text.replace('": "', '":"'):
        raise RuntimeError(f"{operation}: {text[-1000:]}")
    return took


def _here(playbook: str, extra: dict[str, object], times: int) -> float:
    """Do the same in this process, settings and inventory read anew each time; return the median of the seconds."""
    took = []
    for _ in range(times + 1):
        session = Session(Ui(io.StringIO(), io.StringIO()))
        began = time.perf_counter()
        result = session.look(playbook, limit="localhost", extra_vars=extra)
        took.append(time.perf_counter() - began)
        if result.exit_code != 0:
            raise RuntimeError(f"{playbook}: {result.hosts}")
    return statistics.median(took[1:])  # the first one imports


def local(run: Run) -> None:
    """List and get on this machine: in rbee-ctl's process against the same operation as an HTTP job, side by side."""
    with tempfile.TemporaryDirectory(prefix="rbee-bench-ctl-") as name:
        folder = Path(name)
        _machine(folder)
        common = {"RBEE_INVENTORY": str(folder / "inventory.yml"), "RBEE_STATE_DIR": str(folder / "state")}
        ctl_command = f"{sys.executable} -m rbee_ctl.cli"
        settings = {"client_keys_file": str(folder / "client-keys"), "ctl_command": ctl_command}
        with _environment(**common, RBEE_INTEGRATED="off"), fleets.queen(**settings) as http:
            os.environ["RBEE_INTEGRATED"] = "auto"
            for operation, (fields, playbook, extra) in READS.items():
                ours: list[float] = []
                peer: list[float] = []
                for _ in range(run.rounds):
                    ours.append(1 / _here(playbook, extra, 10 if run.quick else 50))
                    peer.append(1 / _job(http.server.port, operation, fields))
                what = f"`{operation}` of this machine, in process"
                run.results.add(Row(f"ctl-local/{operation}", what, "/s", ours, 110, True, peer, "as an HTTP job"))


def _wall(arguments: list[str], times: int) -> float:
    """Return the median wall time of a whole command in ms."""
    command = [str(Path(sys.executable).parent / "rbee-ctl"), *arguments]
    took = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def wall(run: Run) -> None:
    """Whole commands from the shell, interpreter and all: `worker list`, `status`, `--help`."""
    with tempfile.TemporaryDirectory(prefix="rbee-bench-ctl-") as name:
        folder = Path(name)
        _machine(folder)
        keys = {"client_keys_file": str(folder / "client-keys")}
        with fleets.queen(**keys) as queen:
            for i in range(20):
                queen.beat(fleets.heartbeat(f"n{i}", 9000, slots=4, seq=1))
            environ = {
                "RBEE_INVENTORY": str(folder / "inventory.yml"),
                "RBEE_STATE_DIR": str(folder / "state"),
                "RBEE_QUEEN_URL": f"http://127.0.0.1:{queen.server.port}",
                "RBEE_API_KEY_FILE": str(folder / "key"),
            }
            with _environment(**environ):
                for key, words, goal in (("worker-list", "worker list", 400), ("status", "status", 400), ("help", "--help", 300)):
                    took = [_wall(words.split(), 3 if run.quick else 7) for _ in range(run.rounds)]
                    run.results.add(Row(f"ctl-wall/{key}", f"`rbee-ctl {words}`, wall time", "ms", took, goal))


CASES: dict[str, Callable[[Run], None]] = {"ctl-local": local, "ctl-wall": wall}
