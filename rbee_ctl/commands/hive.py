"""``rbee-ctl hive``: the machines. Each verb is a playbook; ``list`` and ``get`` only read inventory and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbee_ctl import completion
from rbee_ctl.commands.change import Check, Diff, checked, diff_needs_check
from rbee_ctl.commands.options import Json, Nodes, Verbose, Yes, session
from rbee_ctl.result import OperationResult
from rbee_ctl.session import Session

if TYPE_CHECKING:
    from rbee_ctl.inventory import Host

#: Seconds that the queen gets to tell of heartbeats.
QUEEN_LIMIT_S = 1.0

app = typer.Typer(help="Machines of the fleet: install, start, stop, status, check, list, get, ...", no_args_is_help=True)

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
    return per_host(f"hive {verb}", s.play(f"hive_{verb}", tries=3, limit=node), "hosts")


@app.command()
def status(ctx: typer.Context, node: Nodes = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Ask systemd on the machines. Exit code 0: all active, 3: one is stopped, 4: one can not be reached."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_ctl.queen_client import workers_at_once
    from rbee_serve.contract.errors import ExitCode

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    play = s.play("status", limit=node)
    beats = {w["id"]: w.get("last_heartbeat_age_s") for w in workers_at_once(s.settings, QUEEN_LIMIT_S)}
    for host, outcome in play.hosts.items():
        for unit in outcome.result.get("hive", {}).get("units", []):
            unit["heartbeat_age_s"] = beats.get(f"{host}-{unit.get('name')}")
    stopped = any(o.result.get("hive", {}).get("target", "active") != "active" for o in play.hosts.values() if o.status == "ok")
    code = play.exit_code if play.exit_code != ExitCode.OK or not stopped else ExitCode.PARTIAL
    return per_host("hive status", play, "hive_status", exit_code=code)


@app.command("list")
def list_(ctx: typer.Context, json: Json = False) -> OperationResult:
    """List the machines of the inventory, with what is remembered of each: last contact, devices. Contacts none."""
    from rbee_ctl import node_facts

    s = session(ctx, json=json)
    s.say_remembered()
    queen, state = s.inventory.queen, s.settings.state_path
    found = []
    for h in s.inventory.hives:
        facts = node_facts.read(state, h.name)
        found.append(
            {
                "name": h.name,
                "address": h.address,
                "status": facts.get("status", "unknown"),
                "last_contact": facts.get("last_contact"),
                "last_error": facts.get("last_error"),
                "install_path": h.install_path,
                "backends": sorted(facts.get("backends") or h.backends),
                "workers": [str(w.get("name") or f"{w.get('backend')}{w.get('device', 0)}") for w in h.workers],
                "queen": queen is not None and queen.name == h.name,
            }
        )
    return OperationResult("hive list", data={"hives": found}, view="hives")


@app.command()
def get(ctx: typer.Context, node: OneNode = None, json: Json = False) -> OperationResult:
    """Show one machine: its variables (no secrets) and what is remembered of it."""
    from rbee_ctl import node_facts

    s = session(ctx, json=json)
    s.say_remembered()
    host = one_node(s, node)
    hive = {
        "name": host.name,
        "address": host.address,
        "groups": sorted(host.groups - {"all"}),
        "install_path": host.install_path,
        "variables": host.shown(),
        "status": "unknown",
        "last_contact": None,
        "devices": None,
        "backends": None,
        **{k: v for k, v in node_facts.read(s.settings.state_path, host.name).items() if k != "name"},
    }
    return OperationResult("hive get", data={"hive": hive}, view="hive")


def one_node(s: Session, node: str | None) -> Host:
    """Return the machine; the only one there is where none was named. Raises NodeNotFound, InvalidRequest."""
    from rbee_serve.contract.errors import InvalidRequest

    if node is not None:
        return s.inventory.get(node)
    hives = s.inventory.hives
    if len(hives) != 1:
        raise InvalidRequest(
            f"which machine? The inventory has {', '.join(h.name for h in hives) or 'none'}", hint="add --node NODE", field="node"
        )
    return hives[0]


@app.command("refresh-capabilities", hidden=True)
@app.command()
def refresh(ctx: typer.Context, node: Nodes = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Ask machines for their devices and remember the answer; what was known of one that does not answer is kept."""
    from rbee_ctl import node_facts
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    play = s.play("probe", limit=node)
    for host, outcome in play.hosts.items():
        if outcome.status == "ok":
            node_facts.capabilities(s.settings.state_path, host, outcome.result)
    return per_host("hive refresh", play, "capabilities")


@app.command("ssh-test")
def ssh_test(ctx: typer.Context, node: OneNode = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Reach a machine by SSH through Ansible; a failure is of class timeout, auth, host-key, connection or command."""
    from rbee_ctl.probing import probe

    s = session(ctx, json=json, verbose=verbose)
    host = one_node(s, node)
    found = probe(s, host.name)
    return OperationResult(
        "hive ssh-test", data={"node": host.name, "ok": True, "latency_ms": found.get("latency_ms")}, view="ssh_tested"
    )


@app.command()
def check(ctx: typer.Context, node: OneNode = None, json: Json = False, verbose: Verbose = False) -> OperationResult:
    """Check a machine by name: SSH, privileges, systemd, Python, memory, disk, runtime, version. Exit code 5: it is not fit."""
    from rbee_ctl.probing import probe
    from rbee_ctl.result import ErrorItem, exit_code_of
    from rbee_serve import __version__
    from rbee_serve.contract.errors import ExitCode, NodeUnreachable

    s = session(ctx, json=json, verbose=verbose)
    host = one_node(s, node)
    try:
        checks: list[dict[str, Any]] = [{"name": "ssh", "ok": True, "required": True, "got": "answers"}]
        checks += probe(s, host.name)["checks"]
    except NodeUnreachable as e:
        failed = {"name": "ssh", "ok": False, "required": True, "got": str(e.details.get("ssh_class", "failed"))}
        found = {"node": host.name, "checks": [failed | {"expected": "answers", "hint": e.hint}]}
        item = ErrorItem.of(e, host.name)
        return OperationResult("hive check", data=found, view="checks", errors=(item,), exit_code=exit_code_of(e), partial=True)
    for c in checks:
        if c["name"] == "version" and c["ok"] and c["got"] != __version__:
            c |= {"ok": False, "expected": __version__, "hint": f"rbee-ctl setup install --node {host.name}"}
    fit = all(c["ok"] for c in checks if c["required"])
    data = {"node": host.name, "fit": fit, "checks": checks}
    return OperationResult("hive check", data=data, view="checks", exit_code=ExitCode.OK if fit else ExitCode.REFUSED)


@app.command()
def install(
    ctx: typer.Context,
    node: Nodes = None,
    check: Check = False,
    diff: Diff = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Make machines fit for workers: user, directories, runtimes, units, credentials. A second run changes nothing."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    diff_needs_check(ctx, check=check, diff=diff)
    play = s.play("install", tries=3, limit=node, check=check)
    return checked("hive install", play, diff=diff) if check else per_host("hive install", play, "hosts")


@app.command("import-ssh")
def import_ssh(
    ctx: typer.Context,
    ssh_config: Annotated[Path, typer.Option("--ssh-config", metavar="FILE", help="OpenSSH client configuration")] = Path(
        "~/.ssh/config"
    ),
    json: Json = False,
) -> OperationResult:
    """Take over the hosts of ~/.ssh/config. Wildcards, hosts that are there already and unfit names are passed over."""
    from rbee_ctl import inventory_edit
    from rbee_ctl import ssh_config as parser
    from rbee_serve.contract.references import NODE_NAME, NODE_NAME_RULE

    s = session(ctx, json=json)
    path = s.settings.inventory_path
    known = set(s.inventory.hosts)
    found = parser.hosts(ssh_config.expanduser())
    lines = [inventory_edit.by_hand(path, name, variables) for name, variables in found.items() if name not in known]
    inventory_edit.check_editable(path, "\n".join(lines))
    new, there, refused = [], [], []
    for name, variables in found.items():
        if name in known:
            there.append(name)
        elif not NODE_NAME.fullmatch(name):
            s.ui.narrate("ctl", "import_ssh", f"{name} is passed over: {NODE_NAME_RULE}")
            refused.append(name)
        else:
            inventory_edit.add_host(path, name, variables)
            s.ui.narrate("ctl", "import_ssh", f"{name}: {variables.get('ansible_host', name)}")
            new.append(name)
    data = {"imported": new, "already_there": there, "refused": refused, "inventory": str(path)}
    return OperationResult("hive import-ssh", data=data, view="imported")


@app.command()
def uninstall(
    ctx: typer.Context,
    node: Annotated[
        str, typer.Option("--node", "--hive", metavar="NODE", autocompletion=completion.nodes, help="machine of the inventory")
    ],
    purge: Annotated[bool, typer.Option("--purge", help="remove the models too")] = False,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Take rbee off a machine: workers, units, runtimes, settings, user. Models stay, unless --purge."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    s.ui.confirm(f"Take rbee off {node}{', with its models' if purge else ''}?", yes=yes)
    return per_host("hive uninstall", s.play("uninstall", limit=node, extra_vars={"rbee_purge": purge}), "removed")
