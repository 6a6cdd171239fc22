"""The servers under test as whole processes on free loopback ports, started with the same model, slots and threads."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rbee_ctl.embedded import free_port

CONTEXT_TOKENS = 2048


def cpu_variant() -> str:
    """Return llama.cpp's CPU variant that a worker picks on this machine."""
    code = "from rbee_serve.worker.engine import libs, weights; print(libs.load_cpu_variant(weights.bindings()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def gpu_arguments(backend: str) -> list[str]:
    """Return what makes llama-server put all weights where the worker has them."""
    return [] if backend == "cpu" else ["-ngl", "999"]


@dataclass(frozen=True)
class Server:
    """A running server: where to ask, how, and its process (for memory)."""

    name: str
    port: int
    path: str
    token: str | None
    pid: int
    began: float  # monotonic seconds, just before its process was made

    def body(self, prompt: str, max_tokens: int) -> dict[str, object]:
        """Return a greedy request that does not end early, in this server's own form."""
        if self.path == "/v1/inference":
            return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        if self.path == "/v1/chat/completions":
            messages = [{"role": "user", "content": prompt}]
            return {"model": "bench", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        return body if self.name == "llama-server" else {**body, "logit_bias": {"2": -100, "0": -100}}

    @property
    def cpu_s(self) -> float:
        """Return the CPU seconds that its process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def pss_mb(self) -> float:
        """Return the resident memory of the whole process tree, MB of 10^6 bytes; what processes share counts once (PSS)."""
        total, todo = 0, [self.pid]
        while todo:
            pid = todo.pop()
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1])
                todo += [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
        return total * 1024 / 1e6


def wait_http(url: str, process: subprocess.Popen[bytes], limit_s: float = 120.0, token: str | None = None) -> None:
    """Return when ``url`` answers 200; raises RuntimeError when the process ends or the time is up."""
    end = time.monotonic() + limit_s
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"server ended with {process.returncode} before it answered {url}")
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=2) as answer:
            if answer.status == 200 and b'"ready":false' not in answer.read().replace(b" ", b""):
                return
        time.sleep(0.02)
    raise RuntimeError(f"{url} did not answer within {limit_s} s")


def _environment() -> dict[str, str]:
    """Return the environment of a server: as an installed runtime's, whose modules are compiled (roles/rbee_hive).

    Where Python may write no bytecode every start would compile rbee's sources, which takes longer than to import them.
    """
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running(name: str, command: list[str], port: int, path: str, ready: str | None, token: str | None = None) -> Iterator[Server]:
    """Run ``command`` for the length of the block; ``ready``: what to ask until it is, None: do not wait."""
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
        try:
            if ready is not None:
                wait_http(f"http://127.0.0.1:{port}{ready}", process, token=token)
            yield Server(name, port, path, token, process.pid, began)
        except RuntimeError as e:
            log.seek(0)
            raise RuntimeError(f"{name}: {e}\n{log.read()[-2000:].decode('utf-8', 'replace')}") from e
        finally:
            process.send_signal(signal.SIGINT if name == "llama_cpp.server" else signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def rbee_worker(model: Path, slots: int, threads: int, *, wait: bool = True, **settings: object) -> Iterator[Server]:
    """Run a worker as its unit would, with a token and without a queen unless ``settings`` name one."""
    port, token = free_port(), str(settings.pop("fleet_token", "")) or secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as folder:
        secret = Path(folder, "fleet-token")
        secret.touch(0o600)
        secret.write_text(token)
        values: dict[str, object] = {
            "name": "cpu0",
            "hive": "bench",
            "port": port,
            "model_id": "bench",
            "model_path": str(model),
            "fleet_token_file": str(secret),
            "slots": slots,
            "threads": threads,
            "context_tokens": CONTEXT_TOKENS,
            **settings,
        }
        lines = [
            f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v) if not isinstance(v, str) else f'{v!r}'}"
            for k, v in values.items()
        ]
        config = Path(folder, "worker.toml")
        config.write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "rbee_serve.worker.main", "--config", str(config)]
        with running("rbee", command, port, "/v1/inference", "/v1/ready" if wait else None, token) as server:
            yield server


@contextlib.contextmanager
def llama_server(binary: Path, model: Path, slots: int, threads: int, *extra: str) -> Iterator[Server]:
    """Run llama.cpp's own server with continuous batching and the same context for each slot."""
    port = free_port()
    command = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads)]
    command += ["-np", str(slots), "-c", str(CONTEXT_TOKENS * slots), "--no-webui", *extra]
    with running("llama-server", command, port, "/v1/completions", "/health") as server:
        yield server


@contextlib.contextmanager
def llama_cpp_server(python: Path, model: Path, threads: int, *, backend: str = "cpu") -> Iterator[Server]:
    """Run ``python -m llama_cpp.server``; interrupt_requests off, or each new request would cut the running one."""
    port = free_port()
    boot = (
        "import ctypes, pathlib, runpy, sys, llama_cpp, llama_cpp.llama_cpp as ll\n"
        "libs = pathlib.Path(llama_cpp.__file__).parent.glob('lib/libggml-cpu-*.so')\n"
        "best = [(s, str(p)) for p in libs if (s := ctypes.CDLL(str(p)).ggml_backend_score()) < 2048]\n"
        "ll._lib.ggml_backend_load.argtypes = [ctypes.c_char_p]\n"
        "[ll._lib.ggml_backend_load(max(best)[1].encode()) for _ in best[:1]]\n"  # a build without variants has none to load
        "sys.argv[0] = 'llama_cpp.server'; runpy.run_module('llama_cpp.server', run_name='__main__')\n"
    )
    command = [str(python), "-c", boot, "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--n_threads",
        str(threads),
        "--n_ctx",
        str(CONTEXT_TOKENS),
        "--interrupt_requests",
        "false",
        "--verbose",
        "false",
    ]
    if backend != "cpu":
        command += ["--n_gpu_layers", "-1"]
    with running("llama_cpp.server", command, port, "/v1/completions", "/v1/models") as server:
        yield server
