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
#: Arrays of integers up to this length keep their values: heads of each layer are told that way.
_KEPT_MAX = 1024
#: ``enum ggml_type`` -> (elements of a block, bytes of a block).
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
#: Arrays within arrays that a header may have; llama.cpp's own files have none.
_DEPTH_MAX = 8
#: Longest chat template that the catalog keeps, characters.
_TEMPLATE_MAX = 32_768
#: GGML_MAX_DIMS.
_DIMENSIONS_MAX = 4


class GgufError(ValueError):
    """The file is no GGUF, is cut off, or of a version that nobody knows."""


@dataclass(frozen=True)
class Header:
    """What stands before the weights.

    ``values``: all key-value pairs, arrays as ``{"length": n}``, short ones of integers with ``"values"`` besides.
    ``parameters``: elements of all tensors. ``matrix_types``: the types (``enum ggml_type``) of those that are multiplied
    with: all of more than one dimension, norms and biases have one.
    ``weight_bytes``: size of all tensors; ``embedding_bytes``: of the token embedding; ``has_output``: there is an output matrix
    besides (where no file of the model has one, the embedding is that as well: it is tied).
    """

    values: dict[str, Any]
    parameters: int
    matrix_types: frozenset[int]
    weight_bytes: int = 0
    embedding_bytes: int = 0
    has_output: bool = False

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
            form = _SCALARS[inner]
            self.skip(form.size * length)
            if 0 < length <= _KEPT_MAX and form.format[-1] not in "fd?":
                start = self.at - form.size * length
                return {"length": length, "values": [v for (v,) in form.iter_unpack(self.data[start : self.at])]}
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
    parameters, types, sizes = 0, set(), {}
    for _ in range(tensors):
        name = cursor.string()
        count, dimensions = 1, cursor.scalar(_U32)
        if dimensions > _DIMENSIONS_MAX:
            raise GgufError(f"a tensor of {dimensions} dimensions, at most {_DIMENSIONS_MAX} are possible")
        for _ in range(dimensions):
            count *= cursor.scalar(_U64)
        kind = cursor.scalar(_U32)
        if dimensions > 1:
            types.add(kind)
        cursor.skip(8)  # offset
        parameters += count
        per_block, block_bytes = BLOCKS.get(kind, (1, 4))
        sizes[name] = -(-count // per_block) * block_bytes
    embedding = sizes.get("token_embd.weight", 0)
    return Header(values, parameters, frozenset(types), sum(sizes.values()), embedding, "output.weight" in sizes)


def facts(*paths: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the catalog keeps of a model, which is one file or all parts of a split one (SPEC S-30).

    ``{"architecture", "name", "parameters", "quantization", "layers", "context_trained", "vocab_size", "eos_id",
    "bos_id", "tokenizer", "has_chat_template", "chat_template", "memory"}``; a value that the header lacks is None.
    ``memory`` is what its use of memory is reckoned from, see memory.py. Raises GgufError, OSError.
    """
    return facts_of([read(p) for p in paths])


def facts_of(headers: list[Header]) -> dict[str, Any]:
    """Return what `facts` does, of headers that have been read already."""
    values = headers[0].values
    arch = values.get("general.architecture")
    tokens = values.get("tokenizer.ggml.tokens")
    vocab = tokens["length"] if isinstance(tokens, dict) else values.get(f"{arch}.vocab_size")
    template = values.get("tokenizer.chat_template")

    def of(key: str) -> Any:
        value = values.get(f"{arch}.{key}")
        return value["values"] if isinstance(value, dict) and "values" in value else value

    return {
        "architecture": arch,
        "name": values.get("general.name"),
        "parameters": sum(h.parameters for h in headers),
        "quantization": _file_type(values),
        "layers": of("block_count"),
        "context_trained": of("context_length"),
        "vocab_size": vocab,
        "eos_id": values.get("tokenizer.ggml.eos_token_id"),
        "bos_id": values.get("tokenizer.ggml.bos_token_id"),
        "tokenizer": values.get("tokenizer.ggml.model"),
        "has_chat_template": template is not None,
        "chat_template": template if isinstance(template, str) and len(template) <= _TEMPLATE_MAX else None,
        "memory": {
            "weight_bytes": sum(h.weight_bytes for h in headers),
            "embedding_bytes": sum(h.embedding_bytes for h in headers),
            "tied": any(h.embedding_bytes for h in headers) and not any(h.has_output for h in headers),
            "matrix_types": sorted(set().union(*(h.matrix_types for h in headers))),
            "embedding_length": of("embedding_length"),
            "feed_forward_length": of("feed_forward_length"),
            "heads": of("attention.head_count"),
            "heads_kv": of("attention.head_count_kv"),
            "key_length": of("attention.key_length"),
            "value_length": of("attention.value_length"),
            "latent": of("attention.key_length_mla") is not None,
            "recurrent": any(k.startswith(f"{arch}.ssm.") or ".wkv." in k for k in values),
        },
    }
