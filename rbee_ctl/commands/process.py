"""``rbee-ctl worker process``: the processes of a machine's workers, whatever the queen hears from them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rbee_ctl import completion
from rbee_ctl.commands.options import Json, Verbose, Yes, session
from rbee_ctl.result import OperationResult

app = typer.Typer(help="Worker processes of a machine: list, get, delete.", no_args_is_help=True)

OneNode = Annotated[
    str | None,
    typer.Option(
        "--node",
        "--hive",
        metavar="NODE",
        autocompletion=completion.nodes,
        help="machine of the inventory; default: the only one",
    ),
]
Pid = Annotated[int, typer.Option("--pid", min=1, help="process id on that machine")]


@app.command("list")
def list_(ctx: typer.Context, node: OneNode = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """List the processes in the cgroups of worker units; nothing else counts, whatever it is called."""
    host, result = _play(ctx, node, {}, "processes", json, verbose)
    return OperationResult("worker process list", data={"node": host, "processes": result["processes"]}, view="processes")


@app.command()
def get(ctx: typer.Context, pid: Pid, node: OneNode = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Show one worker process; any other process is refused."""
    host, result = _play(ctx, node, {"rbee_process_pid": pid}, "process", json, verbose)
    return OperationResult("worker process get", data={"process": {"node": host, **result["process"]}}, view="record")


@app.command()
def delete(
    ctx: typer.Context, pid: Pid, node: OneNode = None, yes: Yes = False, json: Json = False, verbose: Verbose = False
) -> OperationResult:
    """End a worker process with its unit and socket, so that nothing revives it: TERM, after the drain limit KILL."""
    from rbee_ctl.commands.hive import one_node

    s = session(ctx, json=json, verbose=verbose)
    s.ui.confirm(f"end process {pid} on {one_node(s, node).name} with its worker?", yes=yes)
    host, result = _play(ctx, node, {"rbee_process_pid": pid, "rbee_process_delete": True}, "process", json, verbose)
    process = {"node": host, **result["process"], "deleted": result.get("deleted")}
    return OperationResult("worker process delete", data={"process": process}, view="process_deleted")


def _play(
    ctx: typer.Context, node: str | None, variables: dict[str, Any], key: str, json: bool, verbose: bool
) -> tuple[str, dict[str, Any]]:
    from rbee_ctl.commands.fleet import one_host
    from rbee_ctl.commands.hive import one_node

    s = session(ctx, json=json, verbose=verbose)
    host = one_node(s, node).name
    begin = s.play if variables.get("rbee_process_delete") else s.look
    return host, dict(one_host(begin("worker_process", limit=host, extra_vars=variables), host, key))
