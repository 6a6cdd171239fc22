"""Facts from the header of a GGUF file (versions 2 and 3), without loading it. Standard library only: nodes use it too,
like store.py, and the engine process before it has loaded anything.

The ``gguf`` package's reader builds a Python object for each of the vocabulary's strings, which takes seconds; this one
walks over them in some ten milliseconds.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
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

_SCALARS = {
    kind: struct.Struct(form)
    for kind, form in {
        0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
    }.items()
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
#: Arrays within arrays that a header may have; llama.cpp's own files have none.
_DEPTH_MAX = 8
#: GGML_MAX_DIMS.
_DIMENSIONS_MAX = 4


class GgufError(ValueError):
    """The file is no GGUF, is cut off, or of a version that nobody knows."""


@dataclass(frozen=True)
class Header:
    """What stands before the weights.

    ``values``: all key-value pairs, arrays as ``{"length": n}``. ``parameters``: elements of all tensors.
    ``tensor_types``: the types (``enum ggml_type``) that its tensors have.
    """

    values: dict[str, Any]
    parameters: int
    tensor_types: frozenset[int]

    @property
    def architecture(self) -> str:
        """``general.architecture``, or ``unknown``."""
        return str(self.values.get("general.architecture", "unknown"))

    @property
    def block_count(self) -> int:
        """Layers of the model; 0 when the file does not say."""
        layers = self.values.get(f"{self.architecture}.block_count", 0)
        return layers if isinstance(layers, int) else 0

    @property
    def quantization(self) -> str:
        """Name of ``general.file_type``: ``Q4_0``, ``Q4_K_M``, ..., or ``unknown``."""
        return _file_type(self.values) or "unknown"


def _file_type(values: dict[str, Any]) -> str | None:
    number = values.get("general.file_type")
    return FILE_TYPES.get(number) if isinstance(number, int) else None


class _Cursor:
    """Position in the mapped file; every read is bounds-checked, so lengths in a broken header cannot hurt."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def scalar(self, form: struct.Struct) -> Any:
        at = self.at
        self.skip(form.size)
        return form.unpack_from(self.data, at)[0]

    def skip(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise GgufError(f"cut off: {size} bytes wanted at {self.at}, the file has {len(self.data)}")
        self.at += size

    def string(self) -> str:
        size = self.scalar(_U64)
        self.skip(size)
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value; of an array only its length: ``{"length": n}``."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY or depth > _DEPTH_MAX:
            raise GgufError(f"unknown value type {kind} at {self.at}")
        inner, length = self.scalar(_U32), self.scalar(_U64)
        if inner in _SCALARS:
            self.skip(_SCALARS[inner].size * length)
        elif inner == _STRING:
            self._skip_strings(length)
        else:
            for _ in range(length):
                self.value(inner, depth + 1)
        return {"length": length}

    def _skip_strings(self, count: int) -> None:
        data, at, last, unpack = self.data, self.at, len(self.data) - 8, _U64.unpack_from
        for _ in range(count):  # 10^5 of them: worth a loop without calls of ours
            if at > last:
                break
            at += 8 + unpack(data, at)[0]
        else:
            self.skip(at - self.at)
            return
        raise GgufError(f"cut off: a string wanted at {at}, the file has {len(data)}")


def read(path: str | os.PathLike[str]) -> Header:
    """Return the header of the file.

    Raises GgufError, naming path and reason; OSError when the file cannot be opened.
    """
    with Path(path).open("rb") as f:
        magic = f.read(4)
        if magic != MAGIC:
            raise GgufError(f"{path}: not a GGUF file (begins with {magic!r}, expected {MAGIC!r})")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _walk(_Cursor(data, len(MAGIC)))
            except GgufError as e:
                raise GgufError(f"{path}: {e}") from None


def _walk(cursor: _Cursor) -> Header:
    version = cursor.scalar(_U32)
    if version not in (2, 3):
        raise GgufError(f"GGUF version {version}, known are 2 and 3")
    tensors, pairs = cursor.scalar(_U64), cursor.scalar(_U64)
    values = {}
    for _ in range(pairs):
        key = cursor.string()
        values[key] = cursor.value(cursor.scalar(_U32))
    parameters, types = 0, set()
    for _ in range(tensors):
        cursor.string()
        count, dimensions = 1, cursor.scalar(_U32)
        if dimensions > _DIMENSIONS_MAX:
            raise GgufError(f"a tensor of {dimensions} dimensions, at most {_DIMENSIONS_MAX} are possible")
        for _ in range(dimensions):
            count *= cursor.scalar(_U64)
        types.add(cursor.scalar(_U32))
        cursor.skip(8)  # offset
        parameters += count
    return Header(values, parameters, frozenset(types))


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the catalog keeps of a model file (SPEC S-30).

    ``{"architecture", "name", "parameters", "quantization", "layers", "context_trained", "vocab_size", "eos_id",
    "bos_id", "has_chat_template"}``; a value that the header lacks is None. Raises GgufError, OSError.
    """
    header = read(path)
    values = header.values
    arch = values.get("general.architecture")
    tokens = values.get("tokenizer.ggml.tokens")
    return {
        "architecture": arch,
        "name": values.get("general.name"),
        "parameters": header.parameters,
        "quantization": _file_type(values),
        "layers": values.get(f"{arch}.block_count"),
        "context_trained": values.get(f"{arch}.context_length"),
        "vocab_size": tokens["length"] if isinstance(tokens, dict) else values.get(f"{arch}.vocab_size"),
        "eos_id": values.get("tokenizer.ggml.eos_token_id"),
        "bos_id": values.get("tokenizer.ggml.bos_token_id"),
        "has_chat_template": "tokenizer.chat_template" in values,
    }
