"""Words for the shell's completion (`rbee-ctl --install-completion`): names of machines, models and workers.

Machines come from the inventory, models and workers from there and from the queen, which gets a third of a second to answer.
Whatever goes wrong completes nothing: a person who presses Tab wants no error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rbee_ctl.config import Settings

#: Seconds that the queen gets.
QUEEN_LIMIT_S = 0.3


def nodes(incomplete: str) -> list[str]:
    """Return the machines of the inventory that begin so."""
    return _that_begin(incomplete, [name for name, _ in _declared()])


def workers(incomplete: str) -> list[str]:
    """Return the ids of declared and of live workers that begin so."""
    declared = [f"{node}-{_instance(w)}" for node, found in _declared() for w in found]
    return _that_begin(incomplete, [*declared, *(str(w.get("id")) for w in _live())])


def models(incomplete: str) -> list[str]:
    """Return the ids of declared and of served models that begin so."""
    declared = [str(w["model"]) for _, found in _declared() for w in found if w.get("model")]
    return _that_begin(incomplete, [*declared, *(str(w.get("model_id")) for w in _live())])


def _that_begin(incomplete: str, words: list[str]) -> list[str]:
    return sorted({word for word in words if word.startswith(incomplete)})


def _settings() -> Settings | None:
    from rbee_ctl import config
    from rbee_serve.contract.errors import RbeeError

    try:
        return config.load()
    except (RbeeError, OSError):
        return None


def _declared() -> list[tuple[str, tuple[dict[str, Any], ...]]]:
    """Return machines with their declared workers."""
    from rbee_ctl import inventory
    from rbee_serve.contract.errors import RbeeError

    settings = _settings()
    try:
        return [(h.name, h.workers) for h in inventory.load(settings.inventory_path).hosts.values()] if settings else []
    except (RbeeError, OSError):
        return []


def _live() -> list[dict[str, Any]]:
    """Return what the queen hears of, if it says so at once."""
    from rbee_ctl.queen_client import QueenClient, Timeouts
    from rbee_serve.contract.errors import RbeeError

    settings = _settings()
    hurry = Timeouts(connect_s=QUEEN_LIMIT_S, total_s=QUEEN_LIMIT_S, retry_pauses_s=())
    try:
        if settings is None or settings.queen_url.value is None:
            return []
        with QueenClient(settings.queen, settings.api_key(), hurry, ca_file=settings.queen_ca_file.value) as queen:
            return queen.workers()
    except (RbeeError, OSError):
        return []


def _instance(worker: dict[str, Any]) -> str:
    return str(worker.get("name") or f"{worker.get('backend')}{worker.get('device', 0)}")
