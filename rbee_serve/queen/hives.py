"""The machines of the fleet: those that the inventory declares, and those that live workers run on (SPEC 3.2, CAP-61).

The queen asks no machine. Whether one is there is told by its workers' heartbeats alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rbee_serve.contract.declaration import Declaration, DeclaredHive
from rbee_serve.contract.errors import ConfigInvalid
from rbee_serve.contract.hives import hive_status
from rbee_serve.queen.registry import Worker


class Hives:
    """Declared and seen machines; ``path``: contract.declaration as JSON, None where nobody has told the queen."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._declared: dict[str, DeclaredHive] = {}

    def reload(self) -> int:
        """Read the declaration again and return how many machines it has.

        Raises ConfigInvalid naming file and place; what was known stays then.
        """
        if self._path is not None:
            self._declared = {hive.name: hive for hive in _read(self._path).hives}
        return len(self._declared)

    def views(self, live: list[Worker]) -> list[dict[str, Any]]:
        """Return one object a machine, by name; ``live``: the workers to show."""
        by_hive: dict[str, list[Worker]] = {name: [] for name in self._declared}
        for worker in live:
            by_hive.setdefault(worker.record.hive_id, []).append(worker)
        return [_view(name, self._declared.get(name), workers) for name, workers in sorted(by_hive.items())]


def _read(path: Path) -> Declaration:
    try:
        return Declaration.model_validate_json(path.read_bytes())
    except OSError as e:
        raise ConfigInvalid(f"cannot read the declaration of the fleet {path}: {e.strerror}", path=str(path)) from e
    except ValidationError as e:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'file'}: {p['msg']}" for p in e.errors()[:3])
        raise ConfigInvalid(
            f"{path} is no declaration of a fleet ({problems})",
            hint="ansible-playbook -i INVENTORY site.yml writes it anew",
            path=str(path),
        ) from e


def _view(name: str, declared: DeclaredHive | None, workers: list[Worker]) -> dict[str, Any]:
    states = {w.id: w.state for w in workers}
    wanted = declared.workers if declared is not None else []
    return {
        "name": name,
        "declared": declared is not None,
        "address": declared.address if declared is not None else None,
        "status": hive_status(states.values(), any(w.state == "started" for w in wanted)),
        "workers": list(states),
        "declared_workers": [
            entry.model_dump() | {"id": f"{name}-{entry.name}", "status": states.get(f"{name}-{entry.name}")} for entry in wanted
        ],
        "models": sorted({w.record.model_id for w in workers}),
        "backends": sorted({w.record.backend for w in workers} | {w.backend for w in wanted}),
        "slots": slots(workers),
    }


def slots(workers: list[Worker]) -> dict[str, int]:
    """Return how many slots the workers have, and how many are taken."""
    return {
        "total": sum(w.record.slots_total for w in workers),
        "busy": sum(min(w.busy, w.record.slots_total) for w in workers),
    }
