"""The model file before llama.cpp sees it: its header and a digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rbee_serve.contract.errors import ModelFileInvalid
from rbee_serve.models import gguf


def read_header(path: Path) -> gguf.Header:
    """Return the header of a GGUF file.

    Raises ModelFileInvalid, naming path and reason, when it is missing, unreadable, no GGUF or cut short in its header.
    """
    try:
        return gguf.read(path)
    except OSError as e:
        raise ModelFileInvalid(f"cannot read model file {path}: {e.strerror}", path=str(path)) from e
    except gguf.GgufError as e:
        raise ModelFileInvalid(str(e), path=str(path)) from e


def fingerprint(path: Path) -> str:
    """Digest of size and both ends of the file: cheap for any size, differs between models and quantisations."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        digest.update(f.read(1 << 20))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()
