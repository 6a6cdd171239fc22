"""The model file's pages after loading: those that were copied need not stay in this process's memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_MADV_DONTNEED, _MADV_NOHUGEPAGE = 4, 15


def regions(paths: Iterable[Path], maps: str) -> list[tuple[int, int]]:
    """Return (address, bytes) of where ``maps`` (/proc/self/maps) shows these files, whatever they are called there."""
    files: set[tuple[str | int, ...]] = set()
    for path in paths:
        stat = path.stat()
        files.add((os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino))
        files.add((stat.st_ino, path.resolve().name))  # btrfs and overlayfs show another device there than stat tells
    found = []
    for line in maps.splitlines():
        span, _, _, device, inode, *name = line.split(maxsplit=5)
        major, minor = (int(part, 16) for part in device.split(":"))
        named = (int(inode), name[0].rpartition("/")[2]) if name else ()
        if (major, minor, int(inode)) in files or named in files:
            start, end = (int(part, 16) for part in span.split("-"))
            found.append((start, end - start))
    return found


def let_go(paths: Iterable[Path]) -> int:
    """Take the files' pages out of this process; return how many bytes of mappings that concerns.

    They stay in the page cache, and what is read of them again comes back from there: only that it counts as memory of this
    process ends. It comes back without the rest of the 2 MB that the page cache may hold as one (15 MB for the norms of a 135 M
    model). Files that are mapped no longer, or have gone, are none.
    """
    try:
        found = regions(paths, Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, length in found:
        madvise(start, length, _MADV_DONTNEED)
        madvise(start, length, _MADV_NOHUGEPAGE)
    return sum(length for _, length in found)
