"""Logging of the services: one line a record on stderr, which systemd turns into the journal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

from rbee_serve.common.http import correlation_id


class _LineFormatter(logging.Formatter):
    """``level logger: message key=value ... [correlation id]`` on one line, whatever the values hold."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{record.levelname.lower()} {record.name}: {super().format(record)}"
        if ident := correlation_id():
            text += f" [{ident}]"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def setup_logging(level: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send all logging to stderr from ``level`` on; ``RBEE_LOG`` overrides it (SPEC CAP-13)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter("%(message)s"))
    logging.basicConfig(level=environ.get("RBEE_LOG", level).upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
