"""Prompt prefixes on disk: written when the engine ends, offered again to the next process. Knows no llama.cpp.

A file belongs to one instance and one fingerprint (model, build, instruction set, KV type, slots): llama.cpp checks
nothing of that itself, and bytes of another model would be read as if they were right. So what does not fit, or is not
whole, is removed and never loaded. The files hold the prompts' token ids in plain: mode 0600 in a folder of mode 0700.

Layout: magic, SHA-256 of all that follows, length of the header, header (JSON), token ids (int32), llama.cpp's state.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import orjson

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"RBEEKV1\n"
_DIGEST = 32
_LENGTH = struct.Struct("<I")
_FIXED = len(_MAGIC) + _DIGEST + _LENGTH.size
_HEADER_MAX = 4096
_SUFFIX = ".prefix"


class _Unusable(Exception):
    """A file that must go; the text says why."""


@dataclass(frozen=True)
class StoredPrefix:
    """One file: the tokens whose state it holds, how many of them were evaluated as part of a long prompt (blocks.py),
    when it was last used (seconds since the epoch) and its size in bytes."""

    path: Path
    tokens: NDArray[np.int32]
    canonical: int
    used: float
    size: int


class PrefixStore:
    """The files of one instance, at most ``limit_bytes`` together; least recently used go first."""

    def __init__(self, folder: Path, fingerprint: str, limit_bytes: int) -> None:
        """Read the headers of what is there. A folder that can not be used is told on stderr and leaves the store empty."""
        self._folder, self._fingerprint, self._limit = folder, fingerprint, limit_bytes
        self.entries: list[StoredPrefix] = []
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in sorted(folder.iterdir()):
                if path.suffix == ".part":
                    _remove_left(path)
                elif path.suffix == _SUFFIX:
                    self._take(path)
        except OSError as e:
            _say(f"{folder} can not be used: {e.strerror}")

    def _take(self, path: Path) -> None:
        try:
            self.entries.append(self._look(path))
        except (_Unusable, OSError, ValueError) as e:
            self._remove(path, str(e))

    def _look(self, path: Path) -> StoredPrefix:
        """Read all but the state; its digest is checked when it is loaded."""
        with path.open("rb") as f:
            start = f.read(_FIXED)
            if len(start) < _FIXED or not start.startswith(_MAGIC):
                raise _Unusable("it is no prefix file of this version")
            (length,) = _LENGTH.unpack_from(start, len(_MAGIC) + _DIGEST)
            if length > _HEADER_MAX:
                raise _Unusable("its header is too long")
            header = orjson.loads(f.read(length))
            if not isinstance(header, dict) or header.get("fingerprint") != self._fingerprint:
                raise _Unusable("it is of another model, build or number of slots")
            figures = [header.get(name) for name in ("tokens", "state_bytes", "canonical")]
            count, state, canonical = (value if isinstance(value, int) else -1 for value in figures)
            stat = os.fstat(f.fileno())
            if count < 1 or state < 1 or not 0 <= canonical <= count or stat.st_size != _FIXED + length + 4 * count + state:
                raise _Unusable("its length is not what its header says")
            tokens = np.frombuffer(f.read(4 * count), np.int32)
        return StoredPrefix(path, tokens, canonical, stat.st_mtime, stat.st_size)

    def load(self, entry: StoredPrefix) -> memoryview | None:
        """Return the state after checking every byte, and note the use; None, and the file gone, when it is not whole.

        The file is mapped and not read into memory: states are as large as a slot's part of the cache.
        """
        try:
            with entry.path.open("rb") as f:
                data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
            if hashlib.sha256(data[len(_MAGIC) + _DIGEST :]).digest() != data[len(_MAGIC) : len(_MAGIC) + _DIGEST]:
                raise _Unusable("its digest is wrong")
            os.utime(entry.path)
        except (_Unusable, OSError, ValueError) as e:  # ValueError: it is empty
            self.drop(entry, str(e))
            return None
        (length,) = _LENGTH.unpack_from(data, len(_MAGIC) + _DIGEST)
        return data[_FIXED + length + 4 * len(entry.tokens) :]

    def drop(self, entry: StoredPrefix, reason: str) -> None:
        """Remove a file that is not to be offered again."""
        self.entries = [e for e in self.entries if e is not entry]
        self._remove(entry.path, reason)

    def save(self, tokens: NDArray[np.int32], canonical: int, state: bytes | memoryview) -> None:
        """Write one file, whole or not at all. Failing is told on stderr: the store is a help, not a duty."""
        header = orjson.dumps(
            {"fingerprint": self._fingerprint, "tokens": len(tokens), "canonical": canonical, "state_bytes": len(state)}
        )
        rest = (_LENGTH.pack(len(header)), header, np.ascontiguousarray(tokens, np.int32).tobytes(), state)
        size = len(_MAGIC) + _DIGEST + sum(map(len, rest))
        if size > self._limit:
            return
        digest = hashlib.sha256()
        for piece in rest:
            digest.update(piece)
        name = hashlib.sha256(self._fingerprint.encode() + rest[2]).hexdigest()[:32]
        path = self._folder / f"{name}{_SUFFIX}"
        try:
            part, f = self._new_part(name)
        except OSError as e:
            _say(f"{path}: {e.strerror}")
            return
        try:
            # After a crash of the machine a renamed file may be empty; its digest then tells, so no fsync is waited for.
            with f:
                for piece in (_MAGIC, digest.digest(), *rest):
                    f.write(piece)
                f.flush()
                part.replace(path)
            self._take(path)
        except OSError as e:
            _say(f"{path}: {e.strerror}")
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _new_part(self, name: str) -> tuple[Path, BinaryIO]:
        """Return a file to write to, of a name of its own and locked: another process of the instance may be writing the same
        prefix at this moment, or be removing what a dead one has left."""
        while True:
            part = self._folder / f"{name}.{secrets.token_hex(4)}.part"
            f = open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: PTH123, SIM115 -- mode at creation
            fcntl.flock(f, fcntl.LOCK_EX)
            if part.exists():
                return part, f
            f.close()  # taken for left behind before it was locked

    def touch(self, entry: StoredPrefix) -> None:
        """Note a use."""
        with contextlib.suppress(OSError):
            os.utime(entry.path)

    def shrink(self) -> None:
        """Remove the least recently used until the rest is within the limit."""
        room = self._limit
        kept: list[StoredPrefix] = []
        for entry in sorted(self._unique(), key=lambda e: _mtime(e), reverse=True):
            room -= entry.size
            if room < 0:
                with contextlib.suppress(OSError):
                    entry.path.unlink(missing_ok=True)
            else:
                kept.append(entry)
        self.entries = kept

    def _unique(self) -> list[StoredPrefix]:
        return list({e.path: e for e in self.entries}.values())

    @staticmethod
    def _remove(path: Path, reason: str) -> None:
        _say(f"{path} is removed: {reason}")
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _remove_left(part: Path) -> None:
    """Remove what a process that was killed has left of a file; what another one is writing now stays."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), part.open("rb") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink(missing_ok=True)


def _mtime(entry: StoredPrefix) -> float:
    try:
        return entry.path.stat().st_mtime
    except OSError:
        return entry.used


def _say(text: str) -> None:
    print(f"prefix store: {text}", file=sys.stderr, flush=True)
