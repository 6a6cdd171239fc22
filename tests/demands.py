"""What a test demands of the machine it runs on: without it a developer's run leaves the test out, and CI fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """End a test that can not run here, for ``reason``: with CI=true it has failed, else it is skipped."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true and {reason}")
    pytest.skip(reason)


def demand_root(purpose: str) -> None:
    """Leave off unless the tests run as root, which ``purpose`` needs."""
    if os.geteuid() != 0:
        lacking(f"{purpose} needs root")


@contextmanager
def small_file_system(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a real file system of this size in ``folder``, which is made, and take it away again."""
    demand_root("mounting a small file system")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
