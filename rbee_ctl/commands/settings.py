"""``rbee-ctl config``: the settings of rbee-ctl, where each comes from, and whether they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rbee_ctl.commands import setup
from rbee_ctl.commands.options import Json, Verbose, session
from rbee_ctl.result import ErrorItem, OperationResult
from rbee_serve.contract.errors import RbeeError

if TYPE_CHECKING:
    from rbee_ctl.session import Session

app = typer.Typer(help="Settings of rbee-ctl: show, check.", no_args_is_help=True)
app.command("set-ssh")(setup.set_ssh)
app.command("list-nodes")(setup.list_nodes)
app.command("remove-node")(setup.remove_node)

_KEYS = ("inventory", "state_dir", "queen_url", "queen_ca_file", "api_key_file", "integrated")


@app.command()
def show(ctx: typer.Context, json: Json = False) -> OperationResult:
    """Show each setting and where it comes from. The key is shown by the first digits of its SHA-256."""
    s = session(ctx, json=json)
    found = s.settings
    shown = {key: {"value": getattr(found, key).value, "source": getattr(found, key).source} for key in _KEYS}
    errors: tuple[ErrorItem, ...] = ()
    try:
        key = found.api_key()
        digest = f"sha256:{hashlib.sha256(key.encode()).hexdigest()[:6]}..." if key else None
        shown["api_key"] = {"value": digest, "source": found.api_key_file.value or "not set"}
    except RbeeError as e:
        errors = (ErrorItem.of(e),)
    return OperationResult(
        "config show",
        data={"file": str(found.file) if found.file else None, "settings": shown},
        view="settings",
        errors=errors,
        exit_code=1 if errors else 0,
        partial=True,
    )


@app.command()
def check(ctx: typer.Context, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Check settings, inventory and key, and that the queen answers. Exit code 1: something is wrong."""
    s = session(ctx, json=json, verbose=verbose)
    checks: list[dict[str, Any]] = []
    for name, look in _CHECKS.items():
        if name != "declaration" or checks[-1]["ok"]:  # without an inventory nothing is declared
            checks.append(_outcome(name, look, s))
    wrong = [c for c in checks if not c["ok"] and c["required"]]
    return OperationResult(
        "config check", data={"node": "settings", "checks": checks}, view="checks", exit_code=1 if wrong else 0
    )


def _outcome(name: str, look: Callable[[Session], str], s: Session) -> dict[str, Any]:
    required = name not in _NOT_YET
    try:
        return {"name": name, "ok": True, "required": required, "got": look(s)}
    except RbeeError as e:
        return {"name": name, "ok": False, "required": required, "got": e.message, "hint": e.hint, "code": e.code}


def _file(s: Session) -> str:
    return str(s.settings.file or "no file: defaults and environment")


def _inventory(s: Session) -> str:
    return f"{s.settings.inventory_path}: {len(s.inventory.hives)} machines with workers, {len(s.inventory.hosts)} in all"


def _declaration(s: Session) -> str:
    """Names and values that no role knows; playbooks/declaration.yml asks no machine."""
    from rbee_ctl.commands.fleet import errors_of
    from rbee_serve.contract.errors import ConfigInvalid

    _ = s.settings.inventory_path
    play = s.play("declaration", silent=True)
    for item in errors_of(play):
        raise ConfigInvalid(item.message, hint=f"correct {s.settings.inventory_path}; docs/settings.md has every key")
    return f"{len(play.hosts)} machines declare what the roles know"


def _key(s: Session) -> str:
    from rbee_serve.contract.errors import ConfigInvalid

    key, path = s.settings.api_key(), s.settings.api_key_file.value
    if not key or path is None:
        raise ConfigInvalid("no key: a queen that asks for one will refuse", hint="rbee-ctl apply makes the first one")
    if Path(path).stat().st_mode & 0o077:
        raise ConfigInvalid(f"others can read {path}", hint=f"chmod 600 {path}")
    return path


def _queen(s: Session) -> str:
    with s.queen() as queen:
        return f"{queen.base_url}: version {queen.get('/v1/status')['queen'].get('version')}"


_CHECKS: dict[str, Callable[[Session], str]] = {
    "file": _file,
    "inventory": _inventory,
    "declaration": _declaration,
    "key": _key,
    "queen": _queen,
}
#: What a controller on which nothing was deployed yet does not have.
_NOT_YET = frozenset({"key", "queen"})
