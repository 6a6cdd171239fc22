"""A line of the services' logs: JSON for programs, text for people. No I/O.

The fields are ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, the ``correlation_id`` of the request that is being
handled, and whatever else belongs to the record, flat. A line stays one line whatever the values hold, so nobody can forge
a second one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

#: What every line begins with; a field of the record by one of these names gets a ``_`` behind it.
HEAD = ("time", "level", "logger", "message")

_PLAIN = re.compile(r"[^\s\"=\[\]]+")


def as_json(fields: Mapping[str, Any]) -> str:
    """Return the line as JSON; what JSON has no word for is told as text."""
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"), default=str)


def as_text(fields: Mapping[str, Any]) -> str:
    """Return ``level logger: message key=value ... [correlation id]``, without the time."""
    ident = fields.get("correlation_id")
    rest = {k: v for k, v in fields.items() if k not in (*HEAD, "correlation_id", "exception")}
    extras = "".join(f" {name}={_value(value)}" for name, value in rest.items())
    line = f"{fields.get('level')} {fields.get('logger')}: {fields.get('message')}{extras}{f' [{ident}]' if ident else ''}"
    if (exception := fields.get("exception")) is not None:
        line += f"\n{exception}"
    return _one_line(line)


def readable(line: str) -> str:
    """Return a line of ``journalctl`` with the JSON in it as text; any other line as it is."""
    at = line.find(': {"time":')
    if at < 0:
        return line
    try:
        fields = json.loads(line[at + 2 :])
        return f"{line[:at]}: {as_text(fields)}"
    except (ValueError, AttributeError):
        return line


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
