"""Looking at the machine that rbee-ctl itself runs on, in this process: no HTTP, no Ansible (SPEC CAP-27).

List and get verbs whose machines are all ``ansible_connection: local`` are answered by the very functions that Ansible
runs on a node: ``report`` of the modules in ``roles/rbee_hive/library``. What those need root for, or what the inventory
says in a template, is left to the playbook. ``integrated = "off"`` in the settings, or ``RBEE_INTEGRATED=off``, leaves
everything to it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rbee_ctl import content
from rbee_ctl.events import TaskDone
from rbee_ctl.inventory import HIVE_GROUP, Host
from rbee_ctl.playbook import HostOutcome, PlaybookResult, Status, task_error

ETC_DIR = Path("/etc/rbee")

Params = dict[str, Any]
Variables = Mapping[str, Any]


def _paths(host: Host) -> Params:
    """Return where things are on the machine, as the role's defaults say."""
    install = host.variables.get("rbee_hive_install_path") or host.install_path
    models = host.variables.get("rbee_hive_models_dir") or "/var/lib/rbee/models"
    return {"etc_dir": str(ETC_DIR), "install_path": str(install), "models_dir": str(models)}


def _catalog(state: str) -> Callable[[Params, Variables], dict[str, Any]]:
    def read(paths: Params, extra: Variables) -> dict[str, Any]:
        params = {**paths, "state": state, "ref": extra.get("rbee_model_ref"), "provider": extra.get("rbee_model_provider")}
        found: dict[str, Any] = _module("rbee_catalog").report(params, set_aside=os.geteuid() == 0)
        return found

    return read


def _runtime(state: str) -> Callable[[Params, Variables], dict[str, Any]]:
    def read(paths: Params, extra: Variables) -> dict[str, Any]:
        params = {**paths, "state": state, "type": extra.get("rbee_runtime_type"), "version": extra.get("rbee_runtime_version")}
        found: dict[str, Any] = _module("rbee_runtime").report(params)
        return found

    return read


def _processes(paths: Params, extra: Variables) -> dict[str, Any]:
    found: dict[str, Any] = _module("rbee_processes").report({**paths, "pid": extra.get("rbee_process_pid")})
    return {**found, "deleted": False}


#: Playbook -> what it does on a machine, without changing anything there.
READERS: dict[str, Callable[[Params, Variables], dict[str, Any]]] = {
    "model_list": _catalog("list"),
    "model_get": _catalog("get"),
    "runtime_list": _runtime("list"),
    "runtime_get": _runtime("get"),
    "worker_process": _processes,
}


@functools.cache
def _module(name: str) -> ModuleType:
    """Load one of the role's modules, with its module_utils where Ansible has them."""
    import ansible.module_utils

    role = content.root() / "roles/rbee_hive"
    if str(role / "module_utils") not in ansible.module_utils.__path__:
        ansible.module_utils.__path__.append(str(role / "module_utils"))
    spec = importlib.util.spec_from_file_location(f"rbee_integrated_{name}", role / "library" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)  # never: the file is part of the package
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def obstacle(playbook: str, hosts: Sequence[Host], extra: Variables) -> str | None:
    """Return why these machines can not be read in this process; None when they can."""
    if playbook not in READERS or not hosts or not all(h.is_here and HIVE_GROUP in h.groups for h in hosts):
        return "not all of it is on this machine"
    if extra.get("rbee_process_delete"):
        return "it changes something"
    for host in hosts:
        for key, value in _paths(host).items():
            if "{{" in value:
                return f"{key} is a template"
            folder = Path(value)
            looked_at = (folder / "workers", folder) if folder == ETC_DIR else (folder,)
            for path in looked_at:
                try:
                    readable = not path.exists() or os.access(path, os.R_OK | os.X_OK)
                except PermissionError:
                    readable = False
                if not readable:
                    return f"this user may not read {path}"
    return None


def look(playbook: str, hosts: Sequence[Host], extra: Variables) -> PlaybookResult:
    """Return what the playbook would, for machines without an ``obstacle``."""
    outcomes = {host.name: _look_at(playbook, host, extra) for host in hosts}
    bad = [o for o in outcomes.values() if o.error is not None]
    status: Status = "success" if not bad else "partial" if len(bad) < len(outcomes) else "failed"
    return PlaybookResult(status, 2 if bad else 0, outcomes)


def _look_at(playbook: str, host: Host, extra: Variables) -> HostOutcome:
    try:
        return HostOutcome("ok", READERS[playbook](_paths(host), extra))
    except Exception as e:
        if not hasattr(e, "code"):  # NodeError and CatalogError have it; anything else is a mistake of ours
            raise
        told = {"code": e.code, "message": getattr(e, "message", str(e)), "hint": getattr(e, "hint", None)}
        told["details"] = getattr(e, "details", {})
        failed = TaskDone(host.name, playbook, "failed", result={"rbee_error": told})
        return HostOutcome("failed", {}, task_error(host.name, failed))
