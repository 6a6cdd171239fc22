"""Facts from the header of a GGUF file, without loading it. Standard library only (also used on the nodes, like store.py).

The ``gguf`` package's reader builds a Python object for each of the vocabulary's strings, which takes seconds; this one
walks over them.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"

#: llama.cpp's ``enum llama_ftype`` (general.file_type) -> name.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class GgufError(ValueError):
    """The file is no GGUF, is cut off, or of a version that nobody knows."""


class _Cursor:
    """Position in the mapped file; every read is bounds-checked, so lengths in a broken header cannot hurt."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, form: str) -> Any:
        size = struct.calcsize(form)
        self.need(size)
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def need(self, size: int) -> None:
        if size < 0 or self.at + size > len(self.data):
            raise GgufError(f"cut off: {size} bytes wanted at {self.at}, the file has {len(self.data)}")

    def string(self) -> str:
        size = self.scalar("<Q")
        self.need(size)
        text = self.data[self.at : self.at + size].decode("utf-8", "replace")
        self.at += size
        return text

    def skip_string(self) -> None:
        size = self.scalar("<Q")
        self.need(size)
        self.at += size

    def value(self, kind: int) -> Any:
        """Read a value; of an array only its length: ``{"length": n}``."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise GgufError(f"unknown value type {kind} at {self.at}")
        inner, length = self.scalar("<I"), self.scalar("<Q")
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner]) * length
            self.need(size)
            self.at += size
        else:
            for _ in range(length):
                self.skip_string() if inner == _STRING else self.value(inner)
        return {"length": length}


def header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """Return all key-value pairs (arrays as ``{"length": n}``) and the number of parameters of all tensors.

    Raises GgufError; OSError when the file cannot be opened.
    """
    with Path(path).open("rb") as f:
        if f.read(4) != MAGIC:
            f.seek(0)
            raise GgufError(f"{path}: not a GGUF file (begins with {f.read(4)!r}, expected {MAGIC!r})")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.at = 4
            try:
                return _walk(cursor)
            except GgufError as e:
                raise GgufError(f"{path}: {e}") from None


def _walk(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise GgufError(f"GGUF version {version}, known are 2 and 3")
    tensors, pairs = cursor.scalar("<Q"), cursor.scalar("<Q")
    values = {}
    for _ in range(pairs):
        key = cursor.string()
        values[key] = cursor.value(cursor.scalar("<I"))
    parameters = 0
    for _ in range(tensors):
        cursor.skip_string()
        count = 1
        for _ in range(cursor.scalar("<I")):
            count *= cursor.scalar("<Q")
        cursor.scalar("<I")  # type
        cursor.scalar("<Q")  # offset
        parameters += count
    return values, parameters


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the catalog keeps of a model file (SPEC S-30).

    ``{"architecture", "name", "parameters", "quantization", "layers", "context_trained", "vocab_size", "eos_id",
    "bos_id", "has_chat_template"}``; a value that the header lacks is None. Raises GgufError, OSError.
    """
    values, parameters = header(path)
    arch = values.get("general.architecture")
    tokens = values.get("tokenizer.ggml.tokens")
    return {
        "architecture": arch,
        "name": values.get("general.name"),
        "parameters": parameters,
        "quantization": FILE_TYPES.get(values.get("general.file_type", -1)),
        "layers": values.get(f"{arch}.block_count"),
        "context_trained": values.get(f"{arch}.context_length"),
        "vocab_size": tokens["length"] if isinstance(tokens, dict) else values.get(f"{arch}.vocab_size"),
        "eos_id": values.get("tokenizer.ggml.eos_token_id"),
        "bos_id": values.get("tokenizer.ggml.bos_token_id"),
        "has_chat_template": "tokenizer.chat_template" in values,
    }
