"""Whether a secret was left in a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def files_with(secrets: Iterable[str], roots: Iterable[Path]) -> set[Path]:
    """Return the files beneath ``roots`` that hold one of the secrets, in their bytes or in their names."""
    wanted = [secret.encode() for secret in secrets]
    found = set()
    for root in roots:
        for folder, _, names in os.walk(root):
            for path in (Path(folder, name) for name in names):
                held = os.fsencode(path)
                with contextlib.suppress(OSError):  # gone meanwhile: another run's
                    held += path.read_bytes() if path.is_file() else b""
                if any(secret in held for secret in wanted):
                    found.add(path)
    return found
