"""What a command returns. Commands never print: ``render`` turns the result into tables or into the JSON envelope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rbee_serve.contract.errors import ExitCode, RbeeError

#: Version of the envelope that ``--json`` prints. Keys are added without a new number, never removed or renamed.
ENVELOPE_VERSION = 1


@dataclass(frozen=True)
class ErrorItem:
    """One failure, of the whole command or of one host."""

    code: str
    message: str
    hint: str | None = None
    host: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: RbeeError, host: str | None = None) -> ErrorItem:
        """Return the item for ``error``; an error that names its host in the details keeps it."""
        named = error.details.get("host")
        where = named if host is None and isinstance(named, str) else host
        return cls(error.code, error.message, error.hint, where, dict(error.details))

    def as_dict(self) -> dict[str, Any]:
        """Return ``{"code", "message", "hint", "host"?, "details"}``."""
        shown: dict[str, Any] = {"code": self.code, "message": self.message, "hint": self.hint}
        if self.host is not None:
            shown["host"] = self.host
        return {**shown, "details": dict(self.details)}


@dataclass(frozen=True)
class OperationResult:
    """What a command did.

    ``data`` is the JSON-able payload, ``messages`` are lines for a person (not part of the envelope), ``view`` names the
    function of ``views`` that shows ``data`` to a person. ``partial``: something was done in spite of the errors.
    ``answered``: the command's own lines are all there is to say.
    """

    command: str
    data: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[str, ...] = ()
    exit_code: int = ExitCode.OK
    errors: tuple[ErrorItem, ...] = ()
    view: str | None = None
    partial: bool = False
    answered: bool = False

    @property
    def status(self) -> str:
        """``success``, ``partial`` or ``error``."""
        if not self.errors:
            return "success"
        return "partial" if self.partial else "error"

    def envelope(self) -> dict[str, Any]:
        """Return the versioned envelope."""
        return {
            "version": ENVELOPE_VERSION,
            "command": self.command,
            "status": self.status,
            "exit_code": int(self.exit_code),
            "data": dict(self.data),
            "errors": [e.as_dict() for e in self.errors],
        }


def exit_code_of(error: RbeeError) -> int:
    """Return the CLI's exit code for an error; 78 belongs to the services alone."""
    return ExitCode.FAILED if error.exit_code == ExitCode.CONFIG else int(error.exit_code)


def failure(command: str, error: RbeeError) -> OperationResult:
    """Return the result of a command that ended in ``error``."""
    return OperationResult(command, exit_code=exit_code_of(error), errors=(ErrorItem.of(error),))
