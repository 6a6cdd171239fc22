"""Blocks, wire format, GGUF header and what is read from llama.cpp's log: pure parts of the engine."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_serve.contract.api import StopReason
from rbee_serve.contract.errors import BackendUnavailable, ModelFileInvalid
from rbee_serve.worker.engine import libs, scheduler
from rbee_serve.worker.engine.blocks import KERNEL_ROWS, Blocks
from rbee_serve.worker.engine.memory import oom_kills
from rbee_serve.worker.engine.model_file import fingerprint, read_header
from rbee_serve.worker.engine.wire import Unpacker, pack

sizes = st.integers(32, 600)


def calls(blocks: Blocks, start: int, prompt: int, total: int) -> list[tuple[int, int]]:
    done, made = start, []
    while done < total:
        end = blocks.end(done, prompt, total)
        made.append((done, end))
        done = end
    return made


@given(sizes, st.booleans(), st.integers(1, 3000), st.integers(0, 300))
def test_blocks_cover_everything_within_capacity(block: int, two_kernels: bool, prompt: int, replay: int) -> None:
    blocks = Blocks(block, two_kernels)
    made = calls(blocks, 0, prompt, prompt + replay)
    assert all(a < b for a, b in made)
    assert made[0][0] == 0
    assert made[-1][1] == prompt + replay
    assert all(b - a <= blocks.capacity for a, b in made)
    assert all(not a < prompt < b for a, b in made), "prompt and replayed tokens in one call"


@given(st.integers(KERNEL_ROWS, 600), st.integers(1, 3000), st.integers(0, 300), st.integers(0, 3000), st.integers(0, 3000))
def test_blocks_keep_each_position_to_its_kernel(block: int, prompt: int, replay: int, common: int, canonical: int) -> None:
    """Cold or after any reuse: a long prompt only in calls of 64 and more, a short one and replayed tokens never."""
    blocks = Blocks(block, two_kernels=True)
    start = blocks.reusable(min(common, prompt), prompt, evaluated_as_prompt=canonical)
    assert 0 <= start <= canonical
    for a, b in calls(blocks, start, prompt, prompt + replay):
        assert (b - a >= KERNEL_ROWS) == (a < prompt and prompt >= KERNEL_ROWS), (a, b)


@given(sizes, st.integers(1, 3000), st.integers(0, 3000))
def test_blocks_always_leave_one_token_to_evaluate(block: int, prompt: int, common: int) -> None:
    for two_kernels in (True, False):
        assert Blocks(block, two_kernels).reusable(min(common, prompt), prompt, evaluated_as_prompt=3000) < prompt


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=40)), max_size=5), st.integers(1, 50))
def test_wire_gives_back_what_was_packed(messages: list[dict[str, str]], step: int) -> None:
    data = b"".join(map(pack, messages))
    unpacker = Unpacker()
    assert [m for at in range(0, len(data), step) for m in unpacker.feed(data[at : at + step])] == messages


def test_stop_reasons_are_those_of_the_contract() -> None:
    names = {scheduler.EOS, scheduler.MAX_TOKENS, scheduler.STOP_SEQUENCE, scheduler.CANCELLED, scheduler.ERROR}
    assert names == {r.value for r in StopReason}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(version: int = 3) -> bytes:
    """A small file: three values, a string array, one Q4_0 tensor's entry."""
    pairs = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    pairs += text("tokenizer.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bé")
    pairs += text("llama.block_count") + struct.pack("<II", 4, 30)
    pairs += text("general.file_type") + struct.pack("<II", 4, 2)
    norm = text("blk.0.norm") + struct.pack("<IQIQ", 1, 32, 0, 0)
    matrix = text("blk.0.w") + struct.pack("<IQQIQ", 2, 32, 32, 2, 128)
    return b"GGUF" + struct.pack("<IQQ", version, 2, 4) + pairs + norm + matrix


def test_gguf_header_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf())
    header = read_header(tmp_path / "m.gguf")
    assert (header.architecture, header.block_count, header.quantization) == ("llama", 30, "Q4_0")
    assert header.matrix_types == {2}, "a norm is not multiplied with"
    assert header.values["tokenizer.tokens"] == {"length": 2}


def test_gguf_header_of_a_split_model_has_the_matrices_of_all_parts(tmp_path: Path) -> None:
    """The first part may have no tensors at all; what the others hold decides whether streams are continued exactly."""
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    pairs = text("split.count") + struct.pack("<IH", 2, 2)
    first.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pairs)
    with pytest.raises(ModelFileInvalid, match=r"m-00002-of-00002\.gguf"):
        read_header(first)
    second.write_bytes(gguf())
    assert read_header(first).matrix_types == {2}


def test_fingerprint_sees_what_differs_in_the_middle_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(bytes(8 << 20))
    other.write_bytes(bytes(4 << 20) + b"x" * (1 << 20) + bytes(3 << 20))
    assert fingerprint(one) != fingerprint(other)


def test_gguf_header_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole, path = gguf(), tmp_path / "m.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileInvalid, match=r"m\.gguf"):
            read_header(path)


@given(st.binary(max_size=200), st.integers(4, 60))
def test_gguf_header_of_garbage_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int) -> None:
    """No other error than ModelFileInvalid, no endless loop, whatever stands in the file."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    path.write_bytes(gguf()[:at] + junk)
    with contextlib.suppress(ModelFileInvalid):
        read_header(path)


def test_gguf_header_refuses_another_version(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf(version=1))
    with pytest.raises(ModelFileInvalid, match="version 1, known are 2 and 3"):
        read_header(tmp_path / "m.gguf")


LOG = """load_tensors: offloaded {n}/31 layers to GPU
load_tensors:   CPU_Mapped model buffer size =    28.69 MiB
load_tensors:        CUDA0 model buffer size =    92.10 MiB
llama_kv_cache:      CUDA0 KV buffer size =    45.00 MiB
sched_reserve:      CUDA0 compute buffer size =    14.50 MiB
sched_reserve:  CUDA_Host compute buffer size =     1.00 MiB
"""


def fed(log_text: str) -> libs.LoadLog:
    log = libs.LoadLog()
    for line in log_text.splitlines(keepends=True):
        log.feed(2, line[:20].encode())
        log.feed(5, line[20:].encode())
    return log


def test_log_says_where_the_weights_are() -> None:
    log = fed(LOG.format(n=31))
    log.check_placed("cuda", "CUDA0")
    assert log.weight_devices() == ["CPU", "CUDA0"]
    assert log.device_bytes() == int((92.10 + 45 + 14.5) * (1 << 20))


@pytest.mark.parametrize(
    ("backend", "device", "log"),
    [
        ("cuda", "CUDA0", LOG.format(n=17)),
        ("cuda", "CUDA1", LOG.format(n=31)),
        ("cuda", "CUDA0", "load_tensors: CPU_Mapped model buffer size = 92.10 MiB\n"),
        ("cpu", "CPU", LOG.format(n=31)),
    ],
    ids=["partly", "other device", "on the CPU", "on a GPU"],
)
def test_log_of_another_place_is_refused(backend: str, device: str, log: str) -> None:
    with pytest.raises(BackendUnavailable):
        fed(log).check_placed(backend, device)


def test_log_keeps_errors_for_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    log = libs.LoadLog()
    log.feed(3, b"a warning\n")
    log.feed(4, b"tensor 'x' is not within ")
    log.feed(5, b"the file bounds\n")
    assert log.reason == "tensor 'x' is not within the file bounds"
    assert "file bounds" in capsys.readouterr().err


def test_cpu_limit_is_within_the_affinity() -> None:
    assert 1 <= libs.cpu_limit() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("table", "file"),
    [
        ("0::/rbee.slice/w.service\n", "rbee.slice/w.service/memory.events"),
        ("5:memory:/w\n0::/w\n", "memory/w/memory.oom_control"),
    ],
)
def test_kernel_kills_for_want_of_memory_are_counted_in_both_hierarchies(tmp_path: Path, table: str, file: str) -> None:
    assert oom_kills(table, tmp_path) == 0
    counter = tmp_path / file
    counter.parent.mkdir(parents=True)
    counter.write_text("oom_kill_disable 0\noom 3\noom_kill 2\n")
    assert oom_kills(table, tmp_path) == 2
