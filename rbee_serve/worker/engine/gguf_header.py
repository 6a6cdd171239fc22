"""Read the key-value header of a GGUF file (GGUF specification v2/v3) without loading the model.

Only scalars and strings are returned; arrays (the vocabulary) are skipped, not stored, so the header of any model is
read in milliseconds.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from rbee_serve.contract.errors import ModelFileInvalid

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

Value = int | float | bool | str


def _take(f: BinaryIO, fmt: str) -> Value:
    size = struct.calcsize(fmt)
    data = f.read(size)
    if len(data) != size:
        raise EOFError
    value: Value = struct.unpack(fmt, data)[0]
    return value


def _count(f: BinaryIO) -> int:
    return int(_take(f, "<Q"))


def _string(f: BinaryIO) -> str:
    length = _count(f)
    if length > 1 << 26:
        raise EOFError
    data = f.read(length)
    if len(data) != length:
        raise EOFError
    return data.decode("utf-8", "replace")


def _skip_array(f: BinaryIO) -> None:
    kind, count = int(_take(f, "<I")), _count(f)
    if kind in _SCALARS:
        f.seek(struct.calcsize(_SCALARS[kind]) * count, 1)
        return
    for _ in range(count):
        if kind == _STRING:
            f.seek(_count(f), 1)
        elif kind == _ARRAY:
            _skip_array(f)
        else:
            raise ValueError(kind)


def read_header(path: Path) -> dict[str, Value]:
    """Return the scalar and string metadata of the file.

    Raises ModelFileInvalid, naming path and reason, when the file is missing, unreadable, no GGUF or cut short.
    """
    values: dict[str, Value] = {}
    try:
        with path.open("rb", buffering=1 << 20) as f:
            magic = f.read(4)
            if magic != MAGIC:
                raise ModelFileInvalid(
                    f"{path} is not a GGUF model: it begins with {magic!r}, expected {MAGIC!r}", path=str(path)
                )
            version = int(_take(f, "<I"))
            if version not in (2, 3):
                raise ModelFileInvalid(f"{path} has GGUF version {version}, supported are 2 and 3", path=str(path))
            _count(f)  # tensors
            for _ in range(_count(f)):
                key, kind = _string(f), int(_take(f, "<I"))
                if kind == _STRING:
                    values[key] = _string(f)
                elif kind == _ARRAY:
                    _skip_array(f)
                else:
                    values[key] = _take(f, _SCALARS[kind])
    except OSError as e:
        raise ModelFileInvalid(f"cannot read model file {path}: {e.strerror}", path=str(path)) from e
    except (EOFError, KeyError, ValueError) as e:
        raise ModelFileInvalid(f"{path} has a broken or cut GGUF header", path=str(path)) from e
    return values
