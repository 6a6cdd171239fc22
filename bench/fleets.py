"""A queen with workers behind it, real or standing in, for the queen's cases."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.servers import Server, rbee_worker, running
from rbee_ctl.embedded import free_port


@dataclass
class QueenUp:
    """A running queen: as a target for the client, and its fleet's token."""

    server: Server
    token: str

    def beat(self, beat: bytes) -> None:
        """Send one heartbeat over a connection of its own."""
        url = f"http://127.0.0.1:{self.server.port}/v1/worker-heartbeat"
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, beat, headers), timeout=10) as answer:
            answer.read()


def heartbeat(hive: str, port: int, *, slots: int, seq: int, pid: int = 1) -> bytes:
    """Return a heartbeat as a worker sends it."""
    record = {
        "id": f"{hive}-cpu0",
        "hive_id": hive,
        "name": "cpu0",
        "url": f"http://127.0.0.1:{port}",
        "model_id": "bench",
        "backend": "cpu",
        "device": 0,
        "port": port,
        "pid": pid,
        "status": "idle",
        "slots_total": slots,
        "slots_available": slots,
        "implementation": "bench",
        "version": "0",
        "started_at": 1.0,
        "context_tokens": 4096,
    }
    return json.dumps({"worker": record, "timestamp": time.time(), "seq": seq}).encode()


@contextlib.contextmanager
def queen(**settings: object) -> Iterator[QueenUp]:
    """Run a queen without client keys, on loopback."""
    port, token = free_port(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="rbee-bench-queen-") as folder:
        secret = Path(folder, "fleet-token")
        secret.touch(0o600)
        secret.write_text(token)
        config = Path(folder, "queen.toml")
        values = {"port": port, "fleet_token_file": str(secret), "log_level": "warning", **settings}
        config.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items()) + "\n")
        command = [sys.executable, "-m", "rbee_serve.queen.main", "--config", str(config)]
        with running("queen", command, port, "/v1/inference", "/health") as server:
            yield QueenUp(server, token)


@contextlib.contextmanager
def litellm_proxy(program: Path, back_end: int) -> Iterator[Server]:
    """Run LiteLLM's proxy in one process before a back end that speaks OpenAI, without keys, data base and telemetry."""
    port = free_port()
    where = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{back_end}/v1", "api_key": "none"}
    with tempfile.TemporaryDirectory(prefix="rbee-bench-litellm-") as folder:
        config = Path(folder, "config.yaml")  # JSON is YAML
        models = [{"model_name": "bench", "litellm_params": where}]
        open_ = {"dangerously_permit_weak_or_unset_master_key": True}  # as the queen runs here: without keys
        config.write_text(json.dumps({"model_list": models, "litellm_settings": {"telemetry": False}, "general_settings": open_}))
        command = ["env", "LITELLM_LOCAL_MODEL_COST_MAP=True", "LITELLM_LOG=ERROR", str(program), "--config", str(config)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        with running("litellm", command, port, "/v1/chat/completions", "/health/liveliness") as server:
            yield server


@contextlib.contextmanager
def stand_in() -> Iterator[Server]:
    """Run the worker that computes nothing."""
    port = free_port()
    with subprocess.Popen([sys.executable, "-m", "bench.stand_in_worker", str(port)]) as process:
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.02)
            yield Server("rbee", port, "/v1/inference", None, process.pid, time.monotonic())
        finally:
            process.terminate()


@contextlib.contextmanager
def fleet(model: Path, workers: int, *, threads: int, slots: int) -> Iterator[tuple[QueenUp, dict[str, Server]]]:
    """Run a queen and real workers ``n1-cpu0``, ``n2-cpu0``, ... that have reported."""
    with contextlib.ExitStack() as stack:
        up = stack.enter_context(queen())
        url, token = f"http://127.0.0.1:{up.server.port}", up.token
        found = {
            f"n{i}-cpu0": stack.enter_context(
                rbee_worker(model, slots, threads, hive=f"n{i}", queen_url=url, fleet_token=token, heartbeat_interval_s=1.0)
            )
            for i in range(1, workers + 1)
        }
        while _idle(url) < workers:
            time.sleep(0.05)
        yield up, found


def _idle(url: str) -> int:
    with urllib.request.urlopen(f"{url}/v1/workers", timeout=10) as answer:
        return sum(w["status"] == "idle" for w in json.load(answer)["workers"])
