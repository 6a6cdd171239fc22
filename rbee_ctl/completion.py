"""Words for the shell's completion (`rbee-ctl --install-completion`): names of machines and declared workers.

Read from the settings and the inventory file alone, in milliseconds; whatever goes wrong completes nothing.
"""

from __future__ import annotations


def nodes(incomplete: str) -> list[str]:
    """Return the machines of the inventory that begin so."""
    return [name for name in _hosts() if name.startswith(incomplete)]


def workers(incomplete: str) -> list[str]:
    """Return the ids of the declared workers that begin so."""
    return [worker for ids in _hosts().values() for worker in ids if worker.startswith(incomplete)]


def _hosts() -> dict[str, list[str]]:
    from rbee_ctl import config, inventory
    from rbee_serve.contract.errors import RbeeError

    try:
        found = inventory.load(config.load().inventory_path).hosts.values()
    except (RbeeError, OSError):
        return {}
    return {h.name: [f"{h.name}-{_instance(w)}" for w in h.workers] for h in found}


def _instance(worker: dict[str, object]) -> str:
    return str(worker.get("name") or f"{worker.get('backend')}{worker.get('device', 0)}")
