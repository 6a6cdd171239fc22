"""The audit log of a service: appended line by line, rotated by size, continued after a restart (SPEC E-30)."""

from __future__ import annotations

import datetime
import logging
import os
from pathlib import Path
from typing import Any, TextIO

from rbee_serve.contract.audit import Chain
from rbee_serve.contract.errors import ConfigInvalid

logger = logging.getLogger(__name__)

#: The last line is looked for in so many bytes at the end of the file.
_TAIL_BYTES = 65_536


class AuditLog:
    """Append-only. A disk that is full costs lines, which the chain then shows, and never a request."""

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        """Open or continue ``path``; a line that a crash cut off is set aside as an event of its own.

        ``max_bytes``: size at which the file is renamed to ``path.1`` (``.1`` to ``.2``, ...); ``keep`` of those stay. Raises
        ConfigInvalid when the file can not be written.
        """
        self._path, self._max_bytes, self._keep = path, max_bytes, keep
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._chain, torn = self._read_end()
            self._file = self._open()
        except OSError as e:
            reason = f"cannot write the audit log {path}: {e.strerror}"
            raise ConfigInvalid(reason, hint="see audit_file in docs/settings.md") from e
        if torn:
            self.write("audit.torn", lost_bytes=torn)

    def write(self, event: str, **facts: Any) -> None:
        """Append one event; facts that are None are left out. Nothing secret and no prompt belongs here."""
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        before = self._chain
        chain = Chain(before.seq, before.last)
        line = chain.seal(event, at, {k: v for k, v in facts.items() if v is not None})
        try:
            if self._file.tell() + len(line) > self._max_bytes and self._file.tell():
                self._rotate()
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as e:
            logger.error("the audit log can not be written", extra={"path": str(self._path), "reason": e.strerror})
            return
        self._chain = chain

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> TextIO:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return os.fdopen(descriptor, "a", encoding="utf-8")

    def _rotate(self) -> None:
        self._file.close()
        try:
            for n in range(self._keep - 1, 0, -1):
                older = self._path.with_name(f"{self._path.name}.{n}")
                if older.exists():
                    older.replace(self._path.with_name(f"{self._path.name}.{n + 1}"))
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        finally:
            self._file = self._open()

    def _read_end(self) -> tuple[Chain, int]:
        """Return where the chain stands, and how many bytes of an unfinished last line were cut off."""
        for path in (self._path, self._path.with_name(f"{self._path.name}.1")):
            if not path.exists():
                continue
            with path.open("rb+") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(max(0, size - _TAIL_BYTES))
                *lines, rest = f.read().split(b"\n")
                if rest:
                    f.truncate(size - len(rest))
            if lines:
                try:
                    return Chain.after(lines[-1].decode()), len(rest)
                except ValueError:
                    # Not ours to mend: `rbee-ctl audit verify` names the line, and what comes from now on is a new chain.
                    logger.error("the audit log ends in a line that is none of its own", extra={"path": str(path)})
                    return Chain(), len(rest)
            if rest:
                return Chain(), len(rest)
        return Chain(), 0
