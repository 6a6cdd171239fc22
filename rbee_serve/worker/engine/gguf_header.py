"""Read the header of a GGUF file (GGUF specification v2/v3) without loading the model; needs no llama.cpp.

Only scalars and strings are returned; arrays (the vocabulary) are skipped, so any model takes some ten milliseconds.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from rbee_serve.contract.errors import ModelFileInvalid

MAGIC = b"GGUF"
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_SCALARS = {kind: struct.Struct(fmt) for kind, fmt in _FORMATS.items()}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
#: enum ggml_type and llama_ftype, as far as names are shown to people.
FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S"}
FILE_TYPES |= {12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K"}
FILE_TYPES |= {19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S"}
FILE_TYPES |= {27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 38: "MXFP4"}

Value = int | float | bool | str


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of the file and the types (``enum ggml_type``) that its tensors have."""

    values: dict[str, Value]
    tensor_types: frozenset[int]

    @property
    def architecture(self) -> str:
        """``general.architecture``, or ``unknown``."""
        return str(self.values.get("general.architecture", "unknown"))

    @property
    def block_count(self) -> int:
        """Layers of the model; 0 when the file does not say."""
        return int(self.values.get(f"{self.architecture}.block_count", 0))

    @property
    def quantization(self) -> str:
        """Name of ``general.file_type``: ``Q4_0``, ``Q4_K_M``, ..."""
        return FILE_TYPES.get(int(self.values.get("general.file_type", -1)), "unknown")


class _Reader:
    """A position in a buffer; struct.error or ValueError when it ends too early."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def scalar(self, layout: struct.Struct) -> Value:
        value: Value = layout.unpack_from(self._data, self._at)[0]
        self._at += layout.size
        return value

    def u32(self) -> int:
        return int(self.scalar(_U32))

    def u64(self) -> int:
        return int(self.scalar(_U64))

    def string(self) -> str:
        size = self.u64()
        self.skip(size)
        return self._data[self._at - size : self._at].decode("utf-8", "replace")

    def skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise ValueError("cut")

    def skip_array(self) -> None:
        kind, count = self.u32(), self.u64()
        if kind in _SCALARS:
            self.skip(_SCALARS[kind].size * count)
        elif kind == _STRING:
            data, at, unpack = self._data, self._at, _U64.unpack_from  # 10^5 strings: worth a loop without calls of ours
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
            self._at = at
            self.skip(0)
        elif kind == _ARRAY:
            for _ in range(count):
                self.skip_array()
        else:
            raise ValueError(kind)


def read_gguf(path: Path) -> GgufHeader:
    """Return metadata and tensor types of the file.

    Raises ModelFileInvalid, naming path and reason, when it is missing, unreadable, no GGUF or cut short in its header.
    """
    try:
        with path.open("rb") as f:
            magic = f.read(4)
            if magic != MAGIC:
                raise ModelFileInvalid(
                    f"{path} is not a GGUF model: it begins with {magic!r}, expected {MAGIC!r}", path=str(path)
                )
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Reader(data), path)
    except OSError as e:
        raise ModelFileInvalid(f"cannot read model file {path}: {e.strerror}", path=str(path)) from e
    except (struct.error, KeyError, ValueError, OverflowError) as e:
        raise ModelFileInvalid(f"{path} has a broken or cut GGUF header", path=str(path)) from e


def _parse(reader: _Reader, path: Path) -> GgufHeader:
    reader.skip(4)
    version = reader.u32()
    if version not in (2, 3):
        raise ModelFileInvalid(f"{path} has GGUF version {version}, supported are 2 and 3", path=str(path))
    tensors, pairs = reader.u64(), reader.u64()
    values: dict[str, Value] = {}
    for _ in range(pairs):
        key, kind = reader.string(), reader.u32()
        if kind == _STRING:
            values[key] = reader.string()
        elif kind == _ARRAY:
            reader.skip_array()
        else:
            values[key] = reader.scalar(_SCALARS[kind])
    types = set()
    for _ in range(tensors):
        reader.string()
        reader.skip(8 * reader.u32())  # shape
        types.add(reader.u32())
        reader.skip(8)  # offset
    return GgufHeader(values, frozenset(types))


def read_header(path: Path) -> dict[str, Value]:
    """Return the scalar and string metadata of the file; raises ModelFileInvalid as `read_gguf`."""
    return read_gguf(path).values
