"""``rbee-ctl lab``: throw-away machines for trying rbee. Each verb is a playbook of roles/rbee_lab; ``ssh`` becomes ssh."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rbee_ctl.commands.options import Json, Verbose, session
from rbee_ctl.result import OperationResult
from rbee_serve.contract.errors import MissingDependency, NodeNotFound

app = typer.Typer(help="Throw-away systemd machines on this one: up, status, ssh, reboot, down.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="lab1, lab2, ...")]


def directory() -> Path:
    """Return where the lab of this directory keeps its state: ``$RBEE_LAB_DIR``, else ``./.lab``."""
    return Path(os.environ.get("RBEE_LAB_DIR") or ".lab").absolute()


@app.command()
def up(
    ctx: typer.Context,
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, max=50, help="how many machines: lab1 ... labN")] = 2,
    memory: Annotated[
        int | None, typer.Option("--memory", metavar="MIB", min=64, help="memory limit of each; default: none")
    ] = None,
    recreate: Annotated[bool, typer.Option("--recreate", help="make running machines anew")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Boot the machines and write .lab/inventory.yml. The first time makes their root file system (a minute and a half)."""
    _require_root()
    variables: dict[str, Any] = {"rbee_lab_nodes": nodes, "rbee_lab_recreate": recreate}
    if memory is not None:
        variables["rbee_lab_memory_mib"] = memory
    inventory = directory() / "inventory.yml"
    return _play(ctx, "up", variables, json, verbose, (f"next: ansible-playbook -i {_short(inventory)} site.yml",))


@app.command()
def down(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="machines; default: the whole lab")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Remove the machines and everything they left on this one, also after a crash half-way."""
    _require_root()
    return _play(ctx, "down", {"rbee_lab_names": names or []}, json, verbose)


@app.command()
def status(ctx: typer.Context, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Show the machines."""
    return _play(ctx, "status", {}, json, verbose)


@app.command()
def reboot(ctx: typer.Context, name: Name, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Reboot one machine and wait until it answers; its files stay."""
    _require_root()
    return _play(ctx, "reboot", {"rbee_lab_names": [name]}, json, verbose)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False})
def ssh(ctx: typer.Context, name: Name) -> None:
    """Log in to a machine as root, or run the COMMAND that follows its name."""
    place = directory()
    inventory = place / "inventory.yml"
    if not (place / "id").is_file() or not inventory.is_file():
        raise NodeNotFound(f"no lab in {place}", hint="rbee-ctl lab up", node=name)
    from rbee_ctl.inventory import load

    host = load(inventory).get(name)
    program = shutil.which("ssh")
    if program is None:
        raise MissingDependency("ssh is not installed", hint="apt-get install openssh-client")
    options = [f"UserKnownHostsFile={place / 'known_hosts'}", "StrictHostKeyChecking=yes", "IdentitiesOnly=yes", "LogLevel=ERROR"]
    command = [program, "-i", str(place / "id"), *(a for o in options for a in ("-o", o)), f"root@{host.address}"]
    sys.stdout.flush()
    os.execv(program, [*command, "--", *ctx.args] if ctx.args else command)  # noqa: S606 -- no shell; ssh takes our place


def _play(
    ctx: typer.Context, verb: str, variables: dict[str, Any], json: bool, verbose: bool, messages: tuple[str, ...] = ()
) -> OperationResult:
    """Run ``playbooks/lab_<verb>.yml`` on this machine; there is no inventory yet that could be asked for."""
    from rbee_ctl.commands.fleet import one_host
    from rbee_ctl.playbook import run_playbook

    s = session(ctx, json=json, verbose=verbose)
    play = run_playbook(
        f"lab_{verb}",
        inventory=None,
        extra_vars={"rbee_lab_directory": str(directory()), **variables},
        on_event=s.ui.narrator("lab", verb),
        verbose=s.ui.verbose,
    )
    result = one_host(play, "localhost", "nodes")
    return OperationResult(f"lab {verb}", data=dict(result), view="lab", messages=messages)


def _require_root() -> None:
    """Raise MissingDependency with the command to type instead."""
    if os.geteuid() != 0:
        program = Path(sys.argv[0]).absolute()
        raise MissingDependency(
            "the lab needs root: it makes mounts, network namespaces and a bridge",
            hint=f"sudo -E {program} {' '.join(sys.argv[1:])}   (without root: rbee-ctl serve)",
        )


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
