"""``rbee-ctl queen``: start and stop by playbook. A stop takes the whole fleet along unless told otherwise (SPEC X-07)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rbee_ctl.commands.options import Json, Verbose, session
from rbee_ctl.result import OperationResult

app = typer.Typer(help="The queen: start, stop with the fleet or alone, status.", no_args_is_help=True)
daemon = typer.Typer(help="Alias of queen.", no_args_is_help=True)


@daemon.command("start")
@app.command()
def start(ctx: typer.Context, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Start the queen. `hive start` starts the machines."""
    return _run(ctx, "start", "queen_start", json, verbose)


@daemon.command("stop")
@app.command()
def stop(
    ctx: typer.Context,
    cascade: Annotated[bool, typer.Option("--cascade/--no-cascade", help="stop all hives first, or the queen alone")] = True,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Stop the whole fleet: all hives at once, each worker finishes what it has, then the queen."""
    return _run(ctx, "stop", "stop" if cascade else "queen_stop", json, verbose)


def _run(ctx: typer.Context, verb: str, playbook: str, json: bool, verbose: bool) -> OperationResult:
    from rbee_ctl import user_queen
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.errors import ConfigInvalid

    s = session(ctx, json=json, verbose=verbose)
    if s.settings.inventory.value is None and user_queen.unit_path(Path.home()).is_file():
        raise ConfigInvalid(
            "no inventory: there is no fleet whose queen this could be; this user has a queen of their own",
            hint=f"systemctl --user {verb} rbee-queen; for a fleet: rbee-ctl init HOST...",
        )
    return per_host(f"queen {verb}", s.play(playbook), "hosts")


@daemon.command("status")
@app.command()
def status(ctx: typer.Context, json: Json = False) -> OperationResult:
    """Ask the queen how it is; exit code 0 when it answers."""
    s = session(ctx, json=json)
    with s.queen() as queen:
        return OperationResult("queen status", data={"queen": queen.get("/v1/status")["queen"]}, view="record")
