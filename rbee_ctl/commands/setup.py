"""``rbee-ctl setup``: machines enter, change and leave the inventory. ``config set-ssh`` and its like are the same verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rbee_ctl import completion
from rbee_ctl.commands.change import Check, Diff
from rbee_ctl.commands.options import Json, Verbose, Yes, session
from rbee_ctl.result import OperationResult
from rbee_ctl.session import Session
from rbee_serve.contract.errors import InvalidRequest, NodeExists, NodeNotFound, RbeeError, RequestError, SshKeyNotFound
from rbee_serve.contract.references import NODE_NAME, NODE_NAME_RULE

app = typer.Typer(
    help="Machines of the inventory: add-node, update-node, remove-node, list-nodes, install.", no_args_is_help=True
)

Name = Annotated[
    str,
    typer.Option(
        "--name", "--node", metavar="NODE", autocompletion=completion.nodes, help="name of the machine in the inventory"
    ),
]
Host = Annotated[str | None, typer.Option("--ssh-host", "--host", metavar="ADDRESS", help="address for SSH")]
Port = Annotated[int | None, typer.Option("--ssh-port", "--port", min=1, max=65535, help="port of SSH")]
User = Annotated[str | None, typer.Option("--ssh-user", "--user", metavar="USER", help="user for SSH; needs sudo")]
Key = Annotated[Path | None, typer.Option("--ssh-key", "--key", metavar="FILE", help="private key for SSH")]
InstallPath = Annotated[
    str | None, typer.Option("--install-path", metavar="DIR", help="where runtimes go on the machine; default /opt/rbee")
]
NoProbe = Annotated[bool, typer.Option("--no-probe", help="write it down without trying to reach the machine")]


@app.command("add-node")
def add_node(
    ctx: typer.Context,
    name: Name,
    ssh_host: Host = None,
    ssh_port: Port = None,
    ssh_user: User = None,
    ssh_key: Key = None,
    install_path: InstallPath = None,
    no_probe: NoProbe = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Add a machine to the inventory, once it has been reached by SSH. `setup install` then makes it fit for workers."""
    s = session(ctx, json=json, verbose=verbose)
    variables = _variables(name, ssh_host or name, ssh_port or 22, ssh_user, ssh_key, install_path)
    return _add(s, "setup add-node", name, variables, no_probe)


@app.command("update-node")
def update_node(
    ctx: typer.Context,
    name: Name,
    ssh_host: Host = None,
    ssh_port: Port = None,
    ssh_user: User = None,
    ssh_key: Key = None,
    install_path: InstallPath = None,
    no_probe: NoProbe = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Change how a machine is reached; nothing is written unless it can be reached so."""
    s = session(ctx, json=json, verbose=verbose)
    variables = _variables(name, ssh_host, ssh_port, ssh_user, ssh_key, install_path)
    return _update(s, "setup update-node", name, variables, no_probe)


def set_ssh(
    ctx: typer.Context,
    name: Name,
    ssh_host: Host = None,
    ssh_port: Port = None,
    ssh_user: User = None,
    ssh_key: Key = None,
    install_path: InstallPath = None,
    no_probe: NoProbe = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Say how a machine is reached, whether the inventory has it already or not."""
    s = session(ctx, json=json, verbose=verbose)
    if name in s.inventory.hosts:
        variables = _variables(name, ssh_host, ssh_port, ssh_user, ssh_key, install_path)
        return _update(s, "config set-ssh", name, variables, no_probe)
    variables = _variables(name, ssh_host or name, ssh_port or 22, ssh_user, ssh_key, install_path)
    return _add(s, "config set-ssh", name, variables, no_probe)


@app.command("remove-node")
def remove_node(
    ctx: typer.Context,
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="although workers run there")] = False,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Remove a machine from the inventory. Refused while workers run there, unless --force; nothing is changed on it."""
    from rbee_ctl import inventory_edit, node_facts

    s = session(ctx, json=json, verbose=verbose)
    host = s.inventory.get(name)
    inventory_edit.check_editable(s.settings.inventory_path, f"delete the entries of {name}")
    if not force and (running := _running_workers(s, name)):
        raise InvalidRequest(
            f"node {name} has active workers: {', '.join(running)}",
            hint=f"rbee-ctl hive stop --node {name}, then again; or --force",
            field="name",
            workers=running,
        )
    s.ui.confirm(f"remove {name} ({host.address}) from {s.settings.inventory_path}?", yes=yes)
    inventory_edit.remove_host(s.settings.inventory_path, name)
    node_facts.forget(s.settings.state_path, name)
    s.ui.narrate("ctl", "remove_node", f"{name} is no longer in {s.settings.inventory_path}")
    return OperationResult("setup remove-node", data={"node": name, "inventory": str(s.settings.inventory_path)})


@app.command("list-nodes")
def list_nodes(ctx: typer.Context, json: Json = False) -> OperationResult:
    """List the machines of the inventory (as `hive list`)."""
    from rbee_ctl.commands import hive

    return hive.list_(ctx, json=json)


@app.command()
def install(
    ctx: typer.Context,
    node: Annotated[
        str | None,
        typer.Option("--node", "--hive", "--name", metavar="NODE", autocompletion=completion.nodes, help="default: all machines"),
    ] = None,
    check: Check = False,
    diff: Diff = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Make machines fit for workers (as `hive install`)."""
    from rbee_ctl.commands import hive

    return hive.install(ctx, node=node, check=check, diff=diff, json=json, verbose=verbose)


# --- how ------------------------------------------------------------------------------------------------------------


def _variables(
    name: str, host: str | None, port: int | None, user: str | None, key: Path | None, install_path: str | None
) -> dict[str, Any]:
    """Return the inventory's variables; raises InvalidRequest, SshKeyNotFound before anything is contacted."""
    if not NODE_NAME.fullmatch(name):
        raise InvalidRequest(
            f"node name {name!r}: {NODE_NAME_RULE}",
            hint="rbee-ctl setup add-node --name workstation --ssh-host ADDRESS",
            field="name",
        )
    if key is not None and not (key := key.expanduser().absolute()).is_file():
        raise SshKeyNotFound(f"no SSH key {key}", hint="ssh-keygen -t ed25519, or give the right --ssh-key", path=str(key))
    if install_path is not None and not install_path.startswith("/"):
        raise InvalidRequest(f"--install-path: an absolute path expected, got {install_path!r}", field="install_path")
    found: dict[str, Any] = {
        "ansible_host": host,
        "ansible_port": port,
        "ansible_user": user,
        "ansible_ssh_private_key_file": str(key) if key is not None else None,
        "rbee_install_path": install_path,
    }
    return {k: v for k, v in found.items() if v is not None}


def _add(s: Session, command: str, name: str, variables: dict[str, Any], no_probe: bool) -> OperationResult:
    from rbee_ctl import inventory_edit

    path = s.settings.inventory_path
    inventory_edit.check_editable(path, inventory_edit.by_hand(path, name, variables))
    if name in s.inventory.hosts:
        raise NodeExists(
            f"node {name} is in {path} already",
            hint=f"rbee-ctl setup update-node --name {name} ..., or rbee-ctl setup remove-node --name {name}",
            node=name,
        )
    found: dict[str, Any] = {} if no_probe else _probe(s, name, variables)
    inventory_edit.add_host(path, name, variables)
    s.ui.narrate("ctl", "add_node", f"{name} is in {path}")
    return _written(s, command, name, found, (f"next: rbee-ctl setup install --node {name}",))


def _update(s: Session, command: str, name: str, variables: dict[str, Any], no_probe: bool) -> OperationResult:
    from rbee_ctl import inventory_edit

    if name not in s.inventory.hosts:
        raise NodeNotFound(
            f"node {name} is not in {s.settings.inventory_path}",
            hint=f"rbee-ctl setup add-node --name {name} --ssh-host ADDRESS",
            node=name,
            known=sorted(s.inventory.hosts),
        )
    if not variables:
        raise InvalidRequest("nothing to change", hint=f"rbee-ctl {command} --name {name} --ssh-host ADDRESS", field="name")
    path = s.settings.inventory_path
    inventory_edit.check_editable(path, inventory_edit.by_hand(path, name, variables, None))
    found: dict[str, Any] = {} if no_probe else _probe(s, name, variables)
    changed = inventory_edit.update_host(s.settings.inventory_path, name, variables)
    s.ui.narrate("ctl", "update_node", f"{name} {'is changed' if changed else 'was so already'} in {s.settings.inventory_path}")
    return _written(s, command, name, found | {"changed": changed}, ())


def _probe(s: Session, name: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Reach the machine as it would be written; raises with the unreachable error, nothing written."""
    from rbee_ctl import node_facts
    from rbee_ctl.probing import probe

    known = name in s.inventory.hosts
    try:
        found = dict(probe(s, name, variables))
    except RbeeError:
        if not known:
            node_facts.forget(s.settings.state_path, name)
        raise
    kinds = ", ".join(f"{count} {backend}" for backend, count in found["backends"].items())
    s.ui.narrate("ctl", "ssh_probe", f"{name} answers: {kinds}; rbee {found.get('version') or 'not installed'}")
    return found


def _written(s: Session, command: str, name: str, found: dict[str, Any], messages: tuple[str, ...]) -> OperationResult:
    node: dict[str, Any] = {
        "name": name,
        **{k: found.get(k) for k in ("backends", "devices", "version", "changed") if k in found},
    }
    return OperationResult(command, data={"node": node, "inventory": str(s.settings.inventory_path)}, messages=messages)


def _running_workers(s: Session, name: str) -> list[str]:
    """Return the workers that run on a machine: as the queen hears, or systemd there says; [] if neither can be asked."""
    try:
        with s.queen() as queen:
            return [str(w["id"]) for w in queen.workers(node=name)]
    except RequestError:
        raise
    except RbeeError:
        s.ui.narrate("ctl", "remove_node", "the queen does not answer; asking the machine itself")
    hive = s.play("status", limit=name, silent=True).hosts.get(name)
    units = hive.result.get("hive", {}).get("units", []) if hive is not None else []
    return [f"{name}-{u.get('name')}" for u in units if u.get("active_state") in ("active", "activating", "deactivating")]
