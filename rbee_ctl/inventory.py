"""The inventory as far as rbee-ctl needs it before anything is started: hosts, addresses, backends.

A static YAML file is read directly, which takes milliseconds; ``ansible-inventory`` (half a second) is asked only for
what that can not answer: directories, INI files, scripts, host ranges, ``host_vars`` and ``group_vars``; its answer is kept
(``inventory_cache``) until a file changes.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rbee_serve import process_tree
from rbee_serve.contract.errors import ConfigInvalid, InvalidBackend, NodeNotFound

QUEEN_GROUP = "rbee_queen"
HIVE_GROUP = "rbee_hives"

_Vars = dict[str, Any]
#: Names of what may be a secret.
_SECRET = re.compile(r"(?i)pass|secret|token|_key$|credential")


def _secret(name: str, value: Any) -> bool:
    """Say whether it may be one: not where it lies (``..._file``), and not a number of tokens (``context_tokens``)."""
    number = name.endswith("tokens") and isinstance(value, int | float)
    return bool(_SECRET.search(name)) and not name.endswith("_file") and not number


def _without_secrets(variables: _Vars) -> _Vars:
    """Return variables without what may be a secret, however deep it is nested."""
    return {str(k): _shown(v) for k, v in variables.items() if v is not None and not _secret(str(k), v)}


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_secrets(value)
    return [_shown(v) for v in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Host:
    """One machine. ``workers`` are the declared ones, as written in ``rbee_workers``."""

    name: str
    address: str
    groups: frozenset[str]
    workers: tuple[dict[str, Any], ...] = ()
    variables: dict[str, Any] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        """Whether it is the machine that rbee-ctl runs on."""
        return self.variables.get("ansible_connection") == "local"

    @property
    def install_path(self) -> str:
        """Where runtimes go on the machine."""
        return str(self.variables.get("rbee_install_path") or "/opt/rbee")

    def shown(self) -> dict[str, Any]:
        """Return the variables without anything that may be a secret: by its name, or because a vault holds it."""
        return _without_secrets(self.variables)

    @property
    def started(self) -> set[str]:
        """Names of the declared workers that are to run, or to sleep behind their sockets."""
        return {
            str(w.get("name") or f"{w.get('backend')}{w.get('device', 0)}")
            for w in self.workers
            if w.get("state", "started") == "started"
        }

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that the declared workers use; every machine has a CPU, so one that declares nothing has that."""
        return tuple(sorted({str(w["backend"]) for w in self.workers if "backend" in w})) or ("cpu",)

    def backend(self, wanted: str | None) -> str:
        """Return ``wanted``, or the one backend of this host; raises InvalidBackend where the choice is the user's."""
        if wanted is not None:
            return wanted
        if len(self.backends) > 1:
            raise InvalidBackend(
                f"node {self.name} has several backends: {', '.join(self.backends)}",
                hint=f"add --backend {self.backends[-1]}",
                backends=list(self.backends),
            )
        return self.backends[0]


@dataclass(frozen=True)
class Inventory:
    """All hosts, in the order of the file."""

    path: Path
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def hives(self) -> list[Host]:
        """Hosts of group ``rbee_hives``."""
        return [h for h in self.hosts.values() if HIVE_GROUP in h.groups]

    @property
    def queen(self) -> Host | None:
        """The host of group ``rbee_queen``."""
        return next((h for h in self.hosts.values() if QUEEN_GROUP in h.groups), None)

    def get(self, name: str) -> Host:
        """Return a host; raises NodeNotFound naming the known ones and how to add it."""
        if (host := self.hosts.get(name)) is not None:
            return host
        known = sorted(self.hosts)
        near = difflib.get_close_matches(name, known, n=1)
        raise NodeNotFound(
            f"node {name!r} is not in {self.path}; known: {', '.join(known) or 'none'}",
            hint=(f"did you mean {near[0]}? " if near else "")
            + f"to add it: rbee-ctl setup add-node --name {name} --ssh-host ADDRESS",
            node=name,
            known=known,
        )

    def split_worker_id(self, worker_id: str) -> tuple[str, str]:
        """Return (host, instance) of ``<host>-<instance>``; raises NodeNotFound when no host fits."""
        for name in sorted(self.hosts, key=len, reverse=True):
            if worker_id.startswith(f"{name}-") and len(worker_id) > len(name) + 1:
                return name, worker_id[len(name) + 1 :]
        raise NodeNotFound(
            f"worker {worker_id!r} names no node of {self.path}; a worker's id is NODE-NAME; "
            f"known nodes: {', '.join(sorted(self.hosts)) or 'none'}",
            hint="rbee-ctl worker list",
            known=sorted(self.hosts),
        )


def load(path: Path) -> Inventory:
    """Read the inventory; raises ConfigInvalid when neither we nor Ansible can."""
    data = _read_static(path)
    if data is None:
        return _ask_ansible(path)
    hosts: dict[str, Host] = {}
    for name, groups, variables in _merge(data):
        hosts[name] = _host(name, groups, variables)
    return Inventory(path, hosts)


def _host(name: str, groups: set[str], variables: dict[str, Any]) -> Host:
    declared = variables.get("rbee_workers")
    workers = tuple(dict(w) for w in declared if isinstance(w, dict)) if isinstance(declared, list) else ()
    return Host(name, str(variables.get("ansible_host", name)), frozenset(groups), workers, dict(variables))


def _read_static(path: Path) -> dict[str, Any] | None:
    """Return the parsed YAML, or None where only Ansible knows the answer."""
    if path.is_dir() or path.suffix not in (".yml", ".yaml") or os.access(path, os.X_OK):
        return None
    if any((path.parent / folder).is_dir() for folder in ("group_vars", "host_vars")):
        return None
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """SafeLoader that passes over Ansible's own tags (``!vault``, ``!unsafe``): their values are never needed here."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506 -- a SafeLoader
    except OSError as e:
        raise ConfigInvalid(f"cannot read inventory {path}: {e.strerror}", hint="rbee-ctl config show") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigInvalid(f"inventory {path} is not valid YAML: {e}", hint=f"correct {path}") from e
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigInvalid(f"inventory {path}: groups expected at the top, got {type(data).__name__}", hint=f"correct {path}")
    if any("[" in name for _, host_names, _ in _groups(data) for name in host_names):
        return None  # a range (node[1:4])
    return data


def _groups(
    data: dict[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]]:
    """Yield (path of groups, hosts, group variables), outer groups first."""
    for name, body in data.items():
        body = body if isinstance(body, dict) else {}
        path = (*above, str(name))
        hosts = body.get("hosts")
        hosts = hosts if isinstance(hosts, dict) else {}
        variables = body.get("vars")
        yield path, {str(h): v for h, v in hosts.items()}, variables if isinstance(variables, dict) else {}
        if isinstance(children := body.get("children"), dict):
            yield from _groups(children, path)


def _merge(data: dict[str, Any]) -> Iterator[tuple[str, set[str], dict[str, Any]]]:
    """Yield (host, groups, variables) with Ansible's precedence: all, outer group, inner group, host."""
    groups = list(_groups(data))
    variables: dict[str, dict[str, Any]] = {}
    parents: dict[str, set[str]] = {}
    for path, _, own in groups:
        variables.setdefault(path[-1], {}).update(own)
        parents.setdefault(path[-1], set()).update(path[:-1])

    def ancestry(group: str) -> list[str]:
        found: list[str] = []
        for parent in sorted(parents.get(group, ())):
            found += [g for g in ancestry(parent) if g not in found]
        return [*found, group]

    members: dict[str, list[str]] = {}
    own_vars: dict[str, dict[str, Any]] = {}
    for path, hosts, _ in groups:
        for host, host_vars in hosts.items():
            lineage = members.setdefault(host, [])
            lineage += [g for g in ancestry(path[-1]) if g not in lineage]
            own_vars.setdefault(host, {}).update(host_vars if isinstance(host_vars, dict) else {})
    for host, lineage in members.items():
        merged = dict(variables.get("all", {}))
        for group in lineage:
            if group != "all":
                merged.update(variables.get(group, {}))
        yield host, set(lineage), merged | own_vars[host]


def _ask_ansible(path: Path) -> Inventory:
    """Return what ``ansible-inventory`` says, which knows every kind of inventory: now, or before with the same files."""
    from rbee_ctl import inventory_cache

    seen = inventory_cache.stamp(path)
    said = inventory_cache.read(path, seen) if seen is not None else None
    if said is None:
        said = _said_by_ansible(path)
        if seen is not None:
            inventory_cache.keep(path, seen, said)
    return Inventory(path, {name: _host(name, set(groups), variables) for name, (groups, variables) in said.items()})


def _run(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; whatever ends us first, Ctrl+C or its time, ends it too, with the programs below it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            out, err = process.communicate(timeout=60)
        except BaseException:
            below = process_tree.descendants(process.pid)
            process.kill()
            process_tree.kill(below)
            process.wait()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def _said_by_ansible(path: Path) -> dict[str, list[Any]]:
    """Ask ``ansible-inventory``; returns {host: [groups, variables without secrets]}. Raises ConfigInvalid."""
    from rbee_ctl.ansible_environment import environment

    command = ["ansible-inventory", "-i", str(path), "--list"]
    try:
        done = _run(command, environment())
        data = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError) as e:
        raise ConfigInvalid(f"ansible-inventory can not read {path}: {e}", hint=" ".join(command)) from e
    if not isinstance(data, dict):
        raise ConfigInvalid(f"ansible-inventory can not read {path}: {done.stderr.strip()[-600:]}", hint=" ".join(command))
    variables = data.get("_meta", {}).get("hostvars", {})
    members: dict[str, set[str]] = {}

    def descend(group: str, above: frozenset[str]) -> None:
        body = data.get(group, {})
        lineage = above | {group}
        for host in body.get("hosts", []):
            members.setdefault(host, set()).update(lineage)
        for child in body.get("children", []):
            if child not in lineage:
                descend(child, lineage)

    descend("all", frozenset())
    return {host: [sorted(groups), _without_secrets(variables.get(host, {}))] for host, groups in members.items()}
