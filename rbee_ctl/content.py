"""Where playbooks, roles and units are: the checkout that this package runs from, or the data inside the wheel."""

from __future__ import annotations

import functools
from pathlib import Path

from rbee_serve.contract.errors import MissingDependency

_PACKAGE = Path(__file__).resolve().parent
_REINSTALL = "pip install --force-reinstall 'rbee[ctl]'"


@functools.cache
def root() -> Path:
    """Return the folder that holds ``playbooks/`` and ``ansible.cfg``; raises MissingDependency when there is none."""
    for candidate in (_PACKAGE.parent, _PACKAGE / "content"):
        if (candidate / "playbooks").is_dir():
            return candidate
    raise MissingDependency(
        f"no playbooks beside {_PACKAGE}: this installation of rbee is incomplete",
        hint="pip install --force-reinstall 'rbee[ctl]'",
    )


def find_playbook(name: str) -> Path | None:
    """Return the playbook of that verb (``site``, ``start``, ``worker_start``, ...), or None."""
    for candidate in (root() / "playbooks" / f"{name}.yml", root() / f"{name}.yml"):
        if candidate.is_file():
            return candidate
    return None


def playbook(name: str) -> Path:
    """Return the playbook of that verb; raises MissingDependency naming the place."""
    if (found := find_playbook(name)) is None:
        raise MissingDependency(
            f"no playbook {name}.yml in {root() / 'playbooks'}", hint="pip install --force-reinstall 'rbee[ctl]'"
        )
    return found


def ansible_cfg() -> Path | None:
    """Return the ansible.cfg that belongs to the playbooks."""
    path = root() / "ansible.cfg"
    return path if path.is_file() else None
