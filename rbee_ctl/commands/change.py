"""What would change, what differs, and bringing a fleet to another version: plan, drift, upgrade, drain."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbee_ctl import completion
from rbee_ctl.commands.options import Json, Nodes, Verbose, session
from rbee_ctl.result import OperationResult
from rbee_serve.contract.errors import ExitCode

if TYPE_CHECKING:
    from rbee_ctl.playbook import PlaybookResult

Check = Annotated[bool, typer.Option("--check", help="say what would change and touch nothing")]
Diff = Annotated[bool, typer.Option("--diff", help="with --check: also the lines that would change")]
Deep = Annotated[bool, typer.Option("--deep", help="read every model file again and compare its digest")]


def plan(ctx: typer.Context, node: Nodes = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Show what site.yml would change, and touch nothing. Exit code 0: nothing, 6: something."""
    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    play = s.play("site", limit=node, check=True)
    return _report("plan", play, {host: {"changes": _changes(play, host)} for host in play.hosts}, "plan")


def drift(
    ctx: typer.Context, node: Nodes = None, deep: Deep = False, json: Json = False, verbose: Verbose = False
) -> OperationResult:
    """Show where machines differ: the plan, and what systemd and processes say. Exit code 0: nowhere, 6: somewhere."""
    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    seen = s.play("drift", limit=node, extra_vars={"rbee_drift_deep": deep})
    if any(o.status != "ok" for o in seen.hosts.values()) or seen.error is not None:
        # The plan is of no use while a machine is away; what the others say is.
        return _report("drift", seen, {h: {"drift": o.result.get("drift", [])} for h, o in seen.hosts.items()}, "drift")
    play = s.play("site", limit=node, check=True)
    hosts = {
        host: {"drift": seen.hosts[host].result.get("drift", []) if host in seen.hosts else [], "changes": _changes(play, host)}
        for host in play.hosts
    }
    return _report("drift", play, hosts, "drift")


def _changes(play: PlaybookResult, host: str) -> list[dict[str, Any]]:
    return [dict(change) for change in play.hosts[host].changes]


def diff_needs_check(ctx: typer.Context, *, check: bool, diff: bool) -> None:
    """Refuse --diff by itself: a run that changes machines shows what it did in its narration."""
    if diff and not check:
        raise typer.BadParameter("only together with --check", ctx=ctx, param_hint="--diff")


def checked(command: str, play: PlaybookResult, *, diff: bool) -> OperationResult:
    """Return what a run with --check found, machine by machine; ``diff``: also the lines. Exit code as of the run."""
    hosts = {host: {"changes": [c if diff else c | {"diff": ""} for c in _changes(play, host)]} for host in play.hosts}
    return dataclasses.replace(_report(command, play, hosts, "plan"), exit_code=play.exit_code)


def _report(command: str, play: PlaybookResult, hosts: dict[str, dict[str, Any]], view: str) -> OperationResult:
    from rbee_ctl.commands.fleet import errors_of

    empty: dict[str, Any] = {"drift": [], "changes": []}
    data = {host: {"status": outcome.status, **empty, **hosts.get(host, {})} for host, outcome in play.hosts.items()}
    differs = any(found["drift"] or found["changes"] for found in data.values())
    code = play.exit_code if play.exit_code != ExitCode.OK or not differs else ExitCode.CHANGES
    return OperationResult(
        command,
        data={"hosts": data, "differs": differs},
        view=view,
        errors=errors_of(play),
        exit_code=code,
        partial=any(o.status == "ok" for o in play.hosts.values()),
    )


def upgrade(
    ctx: typer.Context,
    node: Nodes = None,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="machines whose workers are away at the same time")] = 1,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Bring queen and workers to this version while they serve, machine after machine; a failing self test stops the roll.

    Exit code 14: a new runtime makes no token; that machine runs on with the old one, those after it were not begun.
    """
    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    extra = {"rbee_serial": at_once, "rbee_max_unavailable": at_once} if at_once > 1 else None
    return _rolled(s.play("upgrade", limit=node, extra_vars=extra))


def _rolled(play: PlaybookResult) -> OperationResult:
    """Return the result of a roll: which machines run the new version, which were not begun, and why it stopped."""
    from rbee_ctl.commands.fleet import per_host

    codes = {o.error.exit_code for o in play.hosts.values() if o.error is not None}
    stopped = ExitCode.SELF_TEST in codes
    result = per_host("upgrade", play, "upgraded", exit_code=ExitCode.SELF_TEST if stopped else None)
    # A machine reports its version when its workers run it; what one says that was not begun is of its preparation.
    for outcome in result.data["hosts"].values():
        outcome["upgraded"] = outcome["status"] == "ok" and bool(outcome.get("runs"))
    return result


def drain(
    ctx: typer.Context,
    node: Annotated[str, typer.Argument(metavar="NODE", autocompletion=completion.nodes, help="machine of the inventory")],
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Take a machine out of service: no new requests, running ones are handed over or end, then nothing of rbee runs there."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    return per_host("drain", s.play("drain", limit=node), "hosts")
