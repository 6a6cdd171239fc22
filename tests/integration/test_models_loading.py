"""Loading as it is seen from outside, and several quantisations in real workers: SPEC S-30, S-31, S-32, S-48, S-49, P-03."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import events_of, wait_until
from standing_still import children, standing_still
from worker_process import WorkerProcess

from bench.models import random_1b
from rbee_serve.models import gguf
from rbee_serve.worker.engine import child

pytestmark = pytest.mark.integration


def loading(worker: WorkerProcess) -> dict[str, Any] | None:
    """Return /v1/ready once the port answers."""
    try:
        with worker.client() as client:
            return dict(client.get("/v1/ready").json())
    except httpx.ConnectError:
        return None


def is_engine(pid: int) -> bool:
    """Whether a child of the front has become what it is for."""
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() == child.NAME


def read_from_disk(directory: Path, model: Path) -> int:
    """Start a worker to its first token; returns how many bytes its processes had the block device read."""
    directory.mkdir()
    with WorkerProcess(directory, model, {"slots": 1, "context_tokens": 256}) as worker:
        worker.wait_ready()
        read = [Path(f"/proc/{pid}/io").read_text() for pid in (worker.process.pid, worker.engine_pid)]
    return sum(int(match[1]) for text in read if (match := re.search(r"^read_bytes: (\d+)$", text, re.MULTILINE)))


@pytest.mark.P03
def test_a_cold_start_reads_the_file_from_the_disk_and_a_warm_one_does_not(tmp_path: Path, model_path: Path) -> None:
    """What makes a start with a cold page cache the slower one, in bytes and not in seconds. The file is a copy of the test's
    own, beside the original: no process has it mapped, so that the kernel lets go of it, and it lies on a disk. On a machine
    whose memory is full of other files a part of it is gone again by the second start, and of the libraries: hence half."""
    with tempfile.TemporaryDirectory(dir=model_path.parent) as folder:
        model = Path(folder, "cold.gguf")
        shutil.copyfile(model_path, model)
        with model.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = model.stat().st_size
        assert read_from_disk(tmp_path / "cold", model) > 0.9 * size
        assert read_from_disk(tmp_path / "warm", model) < 0.5 * size


@pytest.mark.S48
@pytest.mark.S49
@pytest.mark.P03
def test_progress_is_that_of_the_load_and_stands_still_when_the_engine_does(tmp_path: Path) -> None:
    """A model of 660 MB, so that there is something to see. The engine is let on by hundredths of a second until a part of
    the layers is there, and then stands still: no timer draws the bar."""
    path = random_1b(Path(os.environ.get("RBEE_CACHE", Path.home() / ".cache/rbee")))
    seen: list[dict[str, Any]] = []
    with WorkerProcess(tmp_path, path, {"slots": 1, "context_tokens": 256}) as worker:
        (engine,) = wait_until(lambda: [p for p in children(worker.process.pid) if is_engine(p)], "the engine has begun")
        with standing_still(engine):
            first = wait_until(lambda: loading(worker), "port answers")
        assert (first["ready"], first["state"]) == (False, "loading")
        assert first["progress_url"] == f"{worker.url}/v1/loading/progress"

        def follow() -> None:
            with worker.client() as client, client.stream("GET", first["progress_url"]) as response:
                seen.extend(events_of(response))  # checks [DONE]

        def listen() -> None:
            with worker.client() as client, client.stream("GET", first["progress_url"]) as response:
                for line in response.iter_lines():
                    if match := re.search(r'"layers_loaded": ?(\d+)', line):
                        layers.append(int(match[1]))

        def loaded(client: httpx.Client) -> int:
            """Layers that the front knows of."""
            error = client.post("/v1/inference", json={"prompt": "x"}).json()["error"]
            assert error["code"] == "WORKER_LOADING", error
            return int(error["details"]["layers_loaded"])

        layers: list[int] = []
        threads = [threading.Thread(target=f) for f in (follow, listen)]
        with contextlib.ExitStack() as stopped, worker.client() as client:
            stopped.enter_context(standing_still(engine))
            for thread in threads:
                thread.start()
            wait_until(lambda: layers, "the bar is shown")
            while not 0 < (part := loaded(client)) < 22:
                stopped.close()
                time.sleep(0.01)
                stopped.enter_context(standing_still(engine))
            wait_until(lambda: layers[-1] >= part, "the bar has come so far")
            before, end = loaded(client), time.monotonic() + 1.5
            while time.monotonic() < end:
                assert layers[-1] <= loaded(client) == before, "the bar moves while the engine stands still"
                time.sleep(0.05)
            assert worker.process.poll() is None
        worker.wait_ready()
        for thread in threads:
            thread.join(60)
        with worker.client() as client:
            assert client.get("/v1/ready").json() == {"ready": True, "state": "idle", "model_loaded": True}
    shares = [e["layers_loaded"] for e in seen]
    assert len(set(shares)) >= 2
    assert shares == sorted(shares)
    assert {e["layers_total"] for e in seen if e["stage"] == "loading_to_vram" and e["layers_total"]} == {22}
    assert gguf.facts(path)["layers"] == 22
    assert seen[-1]["stage"] == "ready"


@pytest.mark.S30
def test_vocabulary_and_end_token_of_the_header_are_llama_cpp_s_own(model_path: Path) -> None:
    from rbee_serve.worker.engine.weights import bindings

    ll, facts = bindings(), gguf.facts(model_path)
    params = ll.llama_model_default_params()
    params.vocab_only = True
    model = ll.llama_model_load_from_file(str(model_path).encode(), params)
    assert model
    vocab = ll.llama_model_get_vocab(model)
    assert facts["vocab_size"] == ll.llama_vocab_n_tokens(vocab)
    assert (facts["eos_id"], facts["bos_id"]) == (ll.llama_vocab_eos(vocab), ll.llama_vocab_bos(vocab))
    assert facts["chat_template"].encode() == ll.llama_model_chat_template(model, None)
    ll.llama_model_free(model)


@pytest.mark.S31
@pytest.mark.S32
def test_quantisations_answer_and_their_memory_is_ordered_by_their_size(model_path: Path, tmp_path: Path) -> None:
    """What the catalog reads from a header is what llama.cpp says once it has loaded the file."""
    from rbee_serve.worker.engine.weights import bindings

    ll = bindings()

    taken: list[tuple[int, int]] = []
    for kind in ("Q4_K_M", "Q5_K_M", "Q8_0"):
        path = tmp_path / f"{kind}.gguf"
        params = ll.llama_model_quantize_default_params()
        params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{kind}")
        params.allow_requantize = True
        assert ll.llama_model_quantize(str(model_path).encode(), str(path).encode(), ctypes.byref(params)) == 0
        (tmp_path / kind).mkdir()
        with WorkerProcess(tmp_path / kind, path, {"slots": 1, "context_tokens": 256}) as worker:
            worker.wait_ready()
            assert worker.infer(max_tokens=4)["tokens_generated"] == 4
            info, facts = worker.record()["model_info"], gguf.facts(path)
            for key in ("architecture", "quantization", "layers", "context_trained", "parameters"):
                assert info[key] == facts[key], key
            assert facts["quantization"] == kind
            rollup = Path(f"/proc/{worker.engine_pid}/smaps_rollup").read_text()
            rss = re.search(r"Rss:\s+(\d+)", rollup)
            assert rss is not None
            taken.append((path.stat().st_size, int(rss[1]) * 1024))
            assert worker.stop() == 0
    assert taken == sorted(taken)
    assert [rss for _, rss in taken] == sorted(rss for _, rss in taken)
