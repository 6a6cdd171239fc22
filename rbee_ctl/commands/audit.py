"""``rbee-ctl audit``: who did what, and whether the log is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rbee_ctl.commands.options import Json, Verbose, session
from rbee_ctl.result import OperationResult

app = typer.Typer(help="Audit log: verify, fetch the queen's.", no_args_is_help=True)


@app.command()
def verify(
    ctx: typer.Context,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE...", help="logs, oldest first; default: this controller's")
    ] = None,
    json: Json = False,
) -> OperationResult:
    """Follow the chain of hashes; a line that was changed, removed or put in is named."""
    from rbee_ctl.audit import FILE
    from rbee_ctl.audit import verify as follow

    s = session(ctx, json=json)
    paths = files or [s.settings.state_path / FILE]
    count = follow(paths)
    names = [str(p) for p in paths]
    return OperationResult(
        "audit verify", data={"files": names, "lines": count}, messages=(f"{', '.join(names)}: {count} lines, whole",)
    )


@app.command()
def fetch(ctx: typer.Context, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Copy the queen's log to this controller and verify it."""
    from rbee_ctl.audit import verify as follow
    from rbee_ctl.commands.fleet import errors_of

    s = session(ctx, json=json, verbose=verbose)
    target = s.settings.state_path / "audit-queen"
    play = s.play("audit_fetch", extra_vars={"rbee_queen_audit_dir": str(target)})
    if errors := errors_of(play):
        return OperationResult("audit fetch", errors=errors, exit_code=play.exit_code)
    # audit.jsonl.2, audit.jsonl.1, audit.jsonl: the highest number is the oldest.
    paths = sorted(target.glob("audit.jsonl*"), key=lambda p: -int(p.suffix[1:]) if p.suffix[1:].isdigit() else 0)
    count = follow(paths)
    return OperationResult(
        "audit fetch", data={"files": [str(p) for p in paths], "lines": count}, messages=(f"{target}: {count} lines, whole",)
    )
