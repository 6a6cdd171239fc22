"""The header reader against llama.cpp's own reader and against broken files."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_serve.contract.errors import ModelFileInvalid
from rbee_serve.models import catalog, gguf


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def test_facts_equal_those_of_the_reference_reader(model_path: Path) -> None:
    reader = GGUFReader(model_path)
    facts = gguf.facts(model_path)
    assert facts["architecture"] == reader.fields["general.architecture"].contents()
    assert facts["layers"] == reader.fields["llama.block_count"].contents()
    assert facts["context_trained"] == reader.fields["llama.context_length"].contents()
    assert facts["vocab_size"] == len(reader.fields["tokenizer.ggml.tokens"].data)
    assert facts["eos_id"] == reader.fields["tokenizer.ggml.eos_token_id"].contents()
    assert facts["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
    assert facts["quantization"] == "Q4_1"
    assert facts["tokenizer"] == reader.fields["tokenizer.ggml.model"].contents()
    assert facts["has_chat_template"] is True


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"PK\x03\x04 a zip", "not a GGUF file"),
        (b"", "not a GGUF file"),
        (b"GGUF", "cut off"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("key") + struct.pack("<I", 99), "unknown value type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63), "cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 2**62), "cut off"),
    ],
)
def test_what_is_no_gguf_is_refused_with_path_and_reason(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(gguf.GgufError, match=expected) as e:
        gguf.facts(path)
    assert str(path) in str(e.value)
    with pytest.raises(ModelFileInvalid):
        catalog.ready({"id": "x", "path": str(path), "size_bytes": 1}, ["0" * 64])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_header_hangs_or_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + tail)
    with suppress(gguf.GgufError):
        header = gguf.read(path)
        assert isinstance(header.values, dict)
        assert header.parameters >= 0
