"""Outcome of a playbook as the result of a command: data and errors host by host, the exit code of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rbee_ctl.result import ErrorItem, OperationResult
from rbee_serve.contract.errors import MalformedResponse

if TYPE_CHECKING:
    from rbee_ctl.playbook import PlaybookResult


def errors_of(play: PlaybookResult) -> tuple[ErrorItem, ...]:
    """Return one item a failed host, and the failure that belongs to none."""
    found = [ErrorItem.of(o.error, host) for host, o in play.hosts.items() if o.error is not None]
    if play.error is not None:
        found.append(ErrorItem.of(play.error))
    return tuple(found)


def per_host(command: str, play: PlaybookResult, view: str, *, exit_code: int | None = None) -> OperationResult:
    """Return ``{"hosts": {host: {"status": "ok"|"failed"|"unreachable", ...rbee_result}}}``."""
    hosts = {host: {"status": o.status, **o.result} for host, o in play.hosts.items()}
    return OperationResult(
        command,
        data={"hosts": hosts},
        view=view,
        errors=errors_of(play),
        exit_code=play.exit_code if exit_code is None else exit_code,
        partial=any(o.status == "ok" for o in play.hosts.values()),
    )


def one_host(play: PlaybookResult, host: str, key: str) -> Mapping[str, Any]:
    """Return ``rbee_result`` of a verb that runs on one host.

    Raises that host's error with the host in its details, or MalformedResponse without ``key``.
    """
    outcome = play.hosts.get(host)
    if outcome is not None and outcome.error is not None:
        outcome.error.details["host"] = host
        raise outcome.error
    if play.error is not None:
        raise play.error
    result = outcome.result if outcome is not None else {}
    if key not in result:
        raise MalformedResponse(
            f"{host}: the playbook ended without a result ({key!r} expected, got {', '.join(result) or 'nothing'})",
            hint="playbooks and rbee-ctl of different versions? rbee-ctl version",
        )
    return result
