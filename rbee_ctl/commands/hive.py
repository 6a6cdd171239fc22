"""``rbee-ctl hive``: the machines. Each verb is a playbook; ``list`` only reads the inventory."""

from __future__ import annotations

import typer

from rbee_ctl.commands.options import Json, Nodes, Verbose, session
from rbee_ctl.result import OperationResult

app = typer.Typer(help="Machines of the fleet: start, stop, status, list.", no_args_is_help=True)


@app.command()
def start(ctx: typer.Context, node: Nodes = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Start the hives: rbee-hive.target and the workers enabled under it."""
    return _run(ctx, "start", node, json, verbose)


@app.command()
def stop(ctx: typer.Context, node: Nodes = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Stop the hives: every worker finishes what it has, then nothing of rbee runs there."""
    return _run(ctx, "stop", node, json, verbose)


def _run(ctx: typer.Context, verb: str, node: str | None, json: bool, verbose: bool) -> OperationResult:
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    return per_host(f"hive {verb}", s.play(verb, limit=node), "hosts")


@app.command()
def status(ctx: typer.Context, node: Nodes = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Ask systemd on the machines. Exit code 0: all active, 3: one is stopped, 4: one can not be reached."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.errors import ExitCode

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    play = s.play("status", limit=node)
    stopped = any(o.result.get("hive", {}).get("target", "active") != "active" for o in play.hosts.values() if o.status == "ok")
    code = play.exit_code if play.exit_code != ExitCode.OK or not stopped else ExitCode.PARTIAL
    return per_host("hive status", play, "hive_status", exit_code=code)


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> OperationResult:
    """List the machines of the inventory."""
    s = session(ctx, json=json)
    queen = s.inventory.queen
    found = [
        {
            "name": h.name,
            "address": h.address,
            "backends": list(h.backends),
            "workers": [str(w.get("name") or f"{w.get('backend')}{w.get('device', 0)}") for w in h.workers],
            "queen": queen is not None and queen.name == h.name,
        }
        for h in s.inventory.hives
    ]
    return OperationResult("hive list", data={"hives": found}, view="hives")
