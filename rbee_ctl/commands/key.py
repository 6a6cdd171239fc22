"""``rbee-ctl key``: who may use the queen, and how much."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from rbee_ctl.commands.options import Json, Verbose, session
from rbee_ctl.result import OperationResult
from rbee_ctl.session import Session

app = typer.Typer(help="API keys of clients: create, list, revoke, rotate, deliver.", no_args_is_help=True)


def _delivered(s: Session, command: str, data: dict[str, Any], *messages: str, view: str | None = None) -> OperationResult:
    """Bring the list to the queen; what was done on the controller stays when that fails, and the result says so."""
    from rbee_ctl import audit, user_queen
    from rbee_ctl.commands.fleet import errors_of
    from rbee_ctl.result import ErrorItem
    from rbee_serve.contract.errors import ConfigInvalid, ExitCode

    audit.record(s.settings.state_path, command.replace(" ", "."), **{k: v["name"] for k, v in data.items()})
    if s.settings.inventory.value is None:  # a queen of this user's, if any: rbee-ctl install
        from rbee_ctl.client_keys import KeyList

        if command != "key create" and not user_queen.unit_path(Path.home()).is_file():
            # Done here alone: a queen that was deployed would go on taking the key.
            error = ConfigInvalid("no inventory says which queen is to know", hint="rbee-ctl -i INVENTORY key deliver")
            item = ErrorItem.of(error)
            return OperationResult(
                command,
                data=data | {"delivered": False},
                view=view,
                messages=messages,
                errors=(item,),
                exit_code=ExitCode.FAILED,
                partial=True,
            )
        place = KeyList(s.settings.state_path).for_a_queen_here()
        hint = f"{place} has it; next: systemctl --user reload rbee-queen, or with an inventory: rbee-ctl key deliver"
        return OperationResult(command, data=data | {"delivered": False}, view=view, messages=(*messages, hint))
    play = s.play("keys")
    note = () if play.exit_code == 0 else ("the queen does not know it yet; next: rbee-ctl key deliver",)
    return OperationResult(
        command,
        data=data | {"delivered": play.exit_code == 0},
        view=view,
        messages=(*messages, *note),
        errors=errors_of(play),
        exit_code=play.exit_code,
        partial=True,
    )


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="who or what uses it, e.g. laptop")],
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="ID", help="may use this model alone; repeatable, `smol*` works")
    ] = None,
    expires: Annotated[str | None, typer.Option("--expires", metavar="WHEN", help="30d, 12h, 2w or a date")] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", min=1, max=1_000_000, help="requests a minute")] = None,
    concurrent: Annotated[int | None, typer.Option("--concurrent", min=1, max=100_000, help="requests at once")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="may also run fleet operations and retire workers")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Make a key, print it (this once) and bring it to the queen; running streams go on."""
    from rbee_ctl.client_keys import KeyList, expiry

    s = session(ctx, json=json, verbose=verbose)
    now = datetime.datetime.now(datetime.UTC)
    secret, key = KeyList(s.settings.state_path).create(
        name,
        admin=admin,
        models=model or None,
        expires_at=expiry(expires, now) if expires is not None else None,
        requests_per_minute=rpm,
        concurrent_requests=concurrent,
        now=now,
    )
    shown = key.model_dump(mode="json", exclude={"sha256"})
    return _delivered(s, "key create", {"key": shown | {"secret": secret}}, view="key_created")


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> OperationResult:
    """List the keys of this controller: names and limits, never the keys."""
    from rbee_ctl.client_keys import KeyList

    s = session(ctx, json=json)
    keys = [k.model_dump(mode="json", exclude={"sha256"}) for k in KeyList(s.settings.state_path).all()]
    return OperationResult("key list", data={"keys": keys}, view="keys")


@app.command()
def revoke(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="name or id")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Take a key away; requests that run go on, new ones get 401."""
    from rbee_ctl.client_keys import KeyList

    s = session(ctx, json=json, verbose=verbose)
    s.ui.confirm(f"revoke the key {name!r}?", yes=yes)
    key = KeyList(s.settings.state_path).revoke(name)
    return _delivered(s, "key revoke", {"key": {"id": key.id, "name": key.name}}, f"key {key.name} revoked")


@app.command()
def rotate(
    ctx: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Replace the first key, the one that rbee-ctl itself uses; whoever else uses it must get the new one."""
    from rbee_ctl.client_keys import KeyList

    s = session(ctx, json=json, verbose=verbose)
    s.ui.confirm("replace the first key? Clients that use it get 401 until they have the new one.", yes=yes)
    KeyList(s.settings.state_path).rotate()
    return _delivered(s, "key rotate", {}, 'the first key is new; for your tools: eval "$(rbee-ctl env)"')


@app.command()
def deliver(ctx: typer.Context, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Bring the keys of this controller to the queen once more."""
    s = session(ctx, json=json, verbose=verbose)
    return _delivered(s, "key deliver", {}, "keys delivered")
