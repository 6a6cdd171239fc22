"""Options that several commands have, spelt the same everywhere. ``--hive`` is an alias of ``--node`` (SPEC X-17)."""

from __future__ import annotations

from typing import Annotated

import typer

from rbee_ctl import completion
from rbee_ctl.session import Session

Json = Annotated[bool, typer.Option("--json", help="print one JSON envelope")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show Ansible's own output")]
Node = Annotated[
    str | None, typer.Option("--node", "--hive", metavar="NODE", autocompletion=completion.nodes, help="machine of the inventory")
]
Nodes = Annotated[
    str | None,
    typer.Option(
        "--node", "--hive", metavar="NODE", autocompletion=completion.nodes, help="machine of the inventory; default: all of them"
    ),
]
SeveralNodes = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        "--hive",
        metavar="NODE",
        autocompletion=completion.nodes,
        help="machine of the inventory, also several: --node a --node b or --node a,b; default: all of them",
    ),
]
Backend = Annotated[str | None, typer.Option("--backend", metavar="NAME", help="cpu, cuda, rocm or vulkan")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
Device = Annotated[int | None, typer.Option("--device", min=0, max=63, help="index of the device within the backend")]


def session(ctx: typer.Context, *, json: bool = False, verbose: bool = False) -> Session:
    """Return this run's session with the command's own flags set."""
    found: Session = ctx.obj
    found.ui.json = json or found.ui.json
    found.ui.verbose = verbose or found.ui.verbose
    return found
