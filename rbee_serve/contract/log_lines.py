"""A line of the services' logs: JSON for programs, text for people. No I/O.

The fields are ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, the ``correlation_id`` of the request that is being
handled, and whatever else belongs to the record, flat. A line stays one line whatever the values hold, so nobody can forge
a second one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
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


def from_journal(line: str, node: str) -> dict[str, Any]:
    """Return an entry of ``journalctl --output=json`` as one flat object: ``node``, ``unit``, ``pid``, ``time``, ``message``, ...

    What a service of rbee's says is JSON already: its fields stand beside ``node``, ``unit`` and ``pid``.
    """
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        return {"node": node, "message": line}
    message = entry.get("MESSAGE")
    if isinstance(message, list):  # bytes that are no text, or the field is there twice
        text = all(isinstance(m, str) for m in message)
        message = "\n".join(message) if text else bytes(message).decode("utf-8", "replace")
    head = {"node": node, "unit": entry.get("_SYSTEMD_UNIT") or entry.get("UNIT"), "pid": _number(entry.get("_PID"))}
    if isinstance(message, str) and message.startswith('{"time":'):
        try:
            fields: dict[str, Any] = json.loads(message)
            return head | fields
        except ValueError:
            pass
    at = datetime.fromtimestamp((_number(entry.get("__REALTIME_TIMESTAMP")) or 0) / 1e6, UTC)
    said = {"time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "message": message}
    return head | said | {"source": entry.get("SYSLOG_IDENTIFIER"), "priority": _number(entry.get("PRIORITY"))}


def _number(text: object) -> int | None:
    return int(text) if isinstance(text, str) and text.isdigit() else None


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
