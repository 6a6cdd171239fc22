"""Logging of the services: one line a record on stderr, which systemd turns into the journal."""

from __future__ import annotations

import contextvars
import json
import logging
import os
import re
import sys
from collections.abc import Mapping

from rbee_serve.contract.errors import ConfigInvalid

#: Id of the request that is being handled; every record carries it (SPEC E-27).
correlation: contextvars.ContextVar[str | None] = contextvars.ContextVar("correlation_id", default=None)

LEVELS = ("debug", "info", "warning", "error", "critical")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r"[^\s\"=\[\]]+")
#: syslog priorities: `journalctl -p warning` works.
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class LineFormatter(logging.Formatter):
    """``level logger: message key=value ... [correlation id]`` on one line, whatever the values hold."""

    def __init__(self, *, journal: bool) -> None:
        """``journal``: begin lines with the priority that journald reads, since it has the time itself."""
        super().__init__("%(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        head = f"<{_PRIORITY.get(record.levelno, 6)}>" if self._journal else self.formatTime(record) + " "
        extras = "".join(f" {k}={_value(v)}" for k, v in vars(record).items() if k not in _STANDARD)
        # formatMessage and the traceback may have newlines: one record stays one line, so nobody can forge a second.
        first, *rest = super().format(record).split("\n", 1)
        ident = correlation.get()
        text = f"{record.levelname.lower()} {record.name}: {first}{extras}{f' [{ident}]' if ident else ''}"
        return head + _one_line(text + "".join("\n" + r for r in rest))


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_journal(environ: Mapping[str, str]) -> bool:
    """Whether stderr is the journal's stream (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        stat = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def setup_logging(level: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send all logging to stderr from ``level`` on; ``RBEE_LOG`` overrides it (SPEC CAP-13).

    Raises ConfigInvalid for a level that does not exist.
    """
    wanted = environ.get("RBEE_LOG") or level
    if wanted.lower() not in LEVELS:
        raise ConfigInvalid(f"RBEE_LOG: got {wanted!r}, expected one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(journal=_is_journal(environ)))
    logging.basicConfig(level=wanted.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "uvicorn", "sse_starlette", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
