"""``rbee-ctl init`` and ``install``: the first inventory, and rbee-ctl with its queen at home on this machine."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from rbee_ctl.commands.change import Check, Diff, checked, diff_needs_check
from rbee_ctl.commands.options import Json, Nodes, Verbose, session
from rbee_ctl.result import OperationResult

_HOST = re.compile(
    r"(?:(?P<user>[A-Za-z_][A-Za-z0-9_.-]*)@)?(?P<name>[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?)(?::(?P<port>\d{1,5}))?"
)
_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")

_HEAD = """\
---
# The machines of this fleet: keep this file under git, edit it by hand or with `rbee-ctl setup`.
#   rbee-ctl hive check --node NODE     can it be reached, is it fit
#   rbee-ctl apply --check              what would change on the machines
#   rbee-ctl apply                      make it so; the same as: ANSIBLE_CONFIG={config} ansible-playbook -i {path} {site}
# Secrets never stand here: they are made on this machine, in the state folder (rbee-ctl config show).
all:
  vars:
    # SSH with a key, and sudo without a password (or ansible_become_password from a vault).
    {user}
    # rbee_install_path: /opt/rbee         # where runtimes go on the machines

  children:
    # The one machine that clients talk to.
    rbee_queen:
      hosts:
        {queen}:

    # The machines with workers.
    rbee_hives:
      # vars:
      #   # Models that every hive shall have; or leave it out and use: rbee-ctl model download hf:ORG/REPO:FILE
      #   rbee_models:
      #     - id: my-model
      #       reference: hf:ORG/REPO:FILE.gguf
      #       src: /path/to/FILE.gguf
      #       sha256: ...
      hosts:
"""
_ENTRY = """\
        {name}:
          ansible_host: {address}
{more}          # rbee_workers:
          #   - {{backend: cpu, device: 0, model: MODEL_ID}}     # cpu, cuda, rocm, vulkan; never falls back to another one
"""


def init(
    ctx: typer.Context,
    hosts: Annotated[list[str], typer.Argument(metavar="HOST...", help="[USER@]NAME-OR-ADDRESS[:PORT]; the first has the queen")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="the inventory to write")] = Path(
        "inventory.yml"
    ),
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,
    json: Json = False,
) -> OperationResult:
    """Write a commented starter inventory for these machines."""
    from rbee_ctl import content
    from rbee_serve.contract.errors import InvalidRequest

    s = session(ctx, json=json)
    path = output.expanduser().absolute()
    if path.exists() and not force:
        raise InvalidRequest(
            f"{path} is there already", hint="rbee-ctl setup add-node --name NAME --ssh-host ADDRESS, or --force"
        )
    names: list[str] = []
    entries: list[str] = []
    users = set()
    for number, word in enumerate(hosts, start=1):
        match = _HOST.fullmatch(word)
        if match is None or not 1 <= int(match["port"] or 22) <= 65535:
            raise InvalidRequest(
                f"{word!r}: [USER@]NAME-OR-ADDRESS[:PORT] expected", hint="rbee-ctl init admin@192.0.2.10 admin@gpu1"
            )
        name = f"node{number}" if _ADDRESS.fullmatch(match["name"]) else match["name"].partition(".")[0]
        if name in names:
            raise InvalidRequest(f"{word!r}: a machine called {name} was named before", hint="give each machine once")
        more = f"          ansible_port: {match['port']}\n" if match["port"] else ""
        if match["user"]:
            users.add(match["user"])
            more += f"          ansible_user: {match['user']}\n"
        names.append(name)
        entries.append(_ENTRY.format(name=name, address=match["name"], more=more))
    if len(users) == 1 and all("@" in word for word in hosts):
        user = f"ansible_user: {users.pop()}"
        entries = [re.sub(r" +ansible_user: .*\n", "", entry) for entry in entries]
    else:
        user = "# ansible_user: admin"
    site = content.root() / "site.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        _HEAD.format(path=path, site=site, config=content.ansible_cfg(), user=user, queen=names[0]) + "\n".join(entries),
        encoding="utf-8",
    )
    messages = [f"{path}: {', '.join(names)}"]
    config = Path(os.environ.get("HOME") or Path.home()) / ".config/rbee/config.toml"
    if s.settings.inventory.value is None and s.settings.file in (None, config.absolute()):
        config.parent.mkdir(parents=True, exist_ok=True)
        before = config.read_text(encoding="utf-8") if config.is_file() else ""
        config.write_text(f'inventory = "{path}"\n{before}', encoding="utf-8")
        messages.append(f"{config}: names it")
    else:
        messages.append(f"to use it: export RBEE_INVENTORY={path}")
    messages.append(f"next: rbee-ctl hive check --node {names[0]}; then: rbee-ctl apply")
    return OperationResult("init", data={"inventory": str(path), "nodes": names, "site": str(site)}, messages=tuple(messages))


def apply(
    ctx: typer.Context,
    node: Nodes = None,
    check: Check = False,
    diff: Diff = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Make the fleet what the inventory says: site.yml. A second run changes nothing."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    diff_needs_check(ctx, check=check, diff=diff)
    play = s.play("site", limit=node, check=check)
    if check:
        return checked("apply", play, diff=diff)
    hosts = {host: {"status": o.status, "changed": o.changed > 0, **o.result} for host, o in play.hosts.items()}
    result = per_host("apply", play, "hosts")
    return dataclasses.replace(result, data={"hosts": hosts})


def install(
    ctx: typer.Context,
    system: Annotated[
        bool, typer.Option("--system", help="for all users: /usr/local/bin, /etc/rbee, /var/lib/rbee; needs root")
    ] = False,
    json: Json = False,
) -> OperationResult:
    """Put rbee-ctl, its settings and folders where they belong on this machine; safe to repeat. Machines: `setup install`."""
    from rbee_ctl import user_queen
    from rbee_serve.contract.errors import InvalidRequest
    from rbee_serve.extras import has, how_to_install

    s = session(ctx, json=json)
    home = Path(os.environ.get("HOME") or Path.home())
    if system and os.geteuid() != 0:
        raise InvalidRequest(
            "--system needs root: it writes to /usr/local/bin, /etc/rbee and /var/lib/rbee", hint="sudo rbee-ctl install --system"
        )
    if system:
        bin_dir, config, data = Path("/usr/local/bin"), Path("/etc/rbee/config.toml"), Path("/var/lib/rbee/models")
        state = Path("/var/lib/rbee/state")
    else:
        bin_dir, config = home / ".local/bin", home / ".config/rbee/config.toml"
        data, state = home / ".local/share/rbee/models", home / ".local/state/rbee"
    done: list[str] = []
    start: list[str] = []
    for folder, mode in ((bin_dir, 0o755), (config.parent, 0o755), (data, 0o755), (state, 0o700)):
        if not folder.is_dir():
            folder.mkdir(parents=True, mode=mode)
            done.append(f"{folder}: made")
    for program in ("rbee-ctl", "rbee-queen"):
        source, link = Path(sys.executable).parent / program, bin_dir / program
        if not source.is_file() or source == link or (link.is_symlink() and link.resolve() == source.resolve()):
            continue
        if link.exists() and not link.is_symlink():
            raise InvalidRequest(f"{link} is there and is no link", hint=f"rm {link}, then again")
        link.unlink(missing_ok=True)
        link.symlink_to(source)
        done.append(f"{link}: leads to {source}")
    if not config.exists():
        config.write_text(_CONFIG.format(home=config.parent, state=state), encoding="utf-8")
        done.append(f"{config}: written")
    if not system and not has("queen"):
        start.append(f"a queen on this machine needs more: {how_to_install('queen')}, then rbee-ctl install")
    elif not system:
        done += user_queen.set_up(home, bin_dir, state)
        start.append("its queen, if you want one here: systemctl --user enable --now rbee-queen")
    s.ui.narrate("ctl", "install", f"{len(done)} changes")
    where = str(bin_dir)
    messages = [*done, *start]
    if where not in os.environ.get("PATH", "").split(":"):
        messages.append(f"{where} is not on PATH: export PATH={where}:$PATH")
    messages.append("next: rbee-ctl init HOST... (your machines), or rbee-ctl serve (try it here)")
    return OperationResult(
        "install", data={"changed": done, "bin": where, "config": str(config), "models": str(data)}, messages=tuple(messages)
    )


_CONFIG = """\
# Settings of rbee-ctl; `rbee-ctl config show` tells where each value comes from.
# inventory = "{home}/inventory.yml"     # your machines: rbee-ctl init HOST...
state_dir = "{state}"
# queen_url = "http://QUEEN:8080"        # by default what site.yml wrote into state_dir/client.toml
# api_key_file = "{state}/secrets/client-key"
"""
