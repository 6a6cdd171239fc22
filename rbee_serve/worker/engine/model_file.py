"""The model file before llama.cpp sees it: its header and a digest."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from rbee_serve.contract.errors import ModelFileInvalid
from rbee_serve.contract.split_models import set_of
from rbee_serve.models import gguf

#: Between a file's two ends this many pieces are looked at; and their length, bytes.
_PIECES, _PIECE = 32, 1 << 15


def read_header(path: Path) -> gguf.Header:
    """Return the header of a GGUF file; of a split model that of its first part, with the matrices of all.

    Raises ModelFileInvalid, naming path and reason, when a file is missing, unreadable, no GGUF or cut short in its header.
    """
    first = _read(path)
    others = [_read(part) for part in other_parts(path, first)]
    types = first.matrix_types.union(*(other.matrix_types for other in others))
    return dataclasses.replace(first, matrix_types=types)


def _read(path: Path) -> gguf.Header:
    try:
        return gguf.read(path)
    except OSError as e:
        raise ModelFileInvalid(f"cannot read model file {path}: {e.strerror}", path=str(path)) from e
    except gguf.GgufError as e:
        raise ModelFileInvalid(str(e), path=str(path)) from e


def other_parts(path: Path, header: gguf.Header) -> list[Path]:
    """Return the other files of the model whose first part this is by its name and its header; none where they differ."""
    first, *others = set_of(path.name)
    if path.name != first or header.values.get("split.count") != 1 + len(others):
        return []
    return [path.with_name(name) for name in others]


def fingerprint(path: Path) -> str:
    """Digest of size, both ends of the file and pieces between: cheap for any size, differs between models and quantisations."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        digest.update(f.read(1 << 20))
        for n in range(_PIECES):
            f.seek(size * n // _PIECES)
            digest.update(f.read(_PIECE))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()
