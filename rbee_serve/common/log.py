"""Logging of the services: one line a record on stderr, which systemd turns into the journal (SPEC E-27)."""

from __future__ import annotations

import contextvars
import datetime
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from rbee_serve.contract.errors import ConfigInvalid
from rbee_serve.contract.log_lines import HEAD, as_json, as_text
from rbee_serve.contract.settings import LogFormat

#: Id of the request that is being handled; every record carries it (SPEC E-27).
correlation: contextvars.ContextVar[str | None] = contextvars.ContextVar("correlation_id", default=None)

LEVELS = ("debug", "info", "warning", "error", "critical")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: syslog priorities: `journalctl -p warning` works.
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class LineFormatter(logging.Formatter):
    """A record as one line, whatever its values hold: JSON, or text for people (contract.log_lines)."""

    def __init__(self, *, journal: bool, text: bool = False) -> None:
        """``journal``: begin lines with the priority that journald reads; it has the time itself, so a text needs none."""
        super().__init__()
        self._journal, self._text = journal, text

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        head = f"<{_PRIORITY.get(record.levelno, 6)}>" if self._journal else ""
        fields = self._fields(record)
        if not self._text:
            return head + as_json(fields)
        return (head or f"{fields['time']} ") + as_text(fields)

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (ident := correlation.get()) is not None:
            fields["correlation_id"] = ident
        for name, value in vars(record).items():
            if name not in _STANDARD:
                fields[f"{name}_" if name in HEAD else name] = value
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


def _is_journal(environ: Mapping[str, str]) -> bool:
    """Whether stderr is the journal's stream (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        stat = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def setup_logging(level: str, form: LogFormat = "auto", environ: Mapping[str, str] = os.environ) -> None:
    """Send all logging to stderr from ``level`` on; ``RBEE_LOG`` overrides it (SPEC CAP-13).

    ``form`` auto: text on a terminal, JSON everywhere else. Raises ConfigInvalid for a level that does not exist.
    """
    wanted = environ.get("RBEE_LOG") or level
    if wanted.lower() not in LEVELS:
        raise ConfigInvalid(f"RBEE_LOG: got {wanted!r}, expected one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler.setFormatter(LineFormatter(journal=_is_journal(environ), text=text))
    logging.basicConfig(level=wanted.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "uvicorn", "sse_starlette", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
