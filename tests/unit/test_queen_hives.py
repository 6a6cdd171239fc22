"""Machines of the fleet: declared ones, and those that workers are heard from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_queen_registry import beat

from rbee_serve.contract.errors import ConfigInvalid
from rbee_serve.queen.hives import Hives
from rbee_serve.queen.registry import Registry

CPU0 = {"name": "cpu0", "backend": "cpu", "device": 0, "model": "smollm2", "state": "started"}


def declared(directory: Path, **workers: list[dict[str, Any]]) -> Hives:
    """Return what was read of a declaration with these machines."""
    hives = [{"name": name, "address": "10.0.0.1", "workers": entries} for name, entries in workers.items()]
    path = directory / "fleet.json"
    path.write_text(json.dumps({"version": 1, "hives": hives, "later": "fields are passed over"}), encoding="utf-8")
    found = Hives(path)
    assert found.reload() == len(workers)
    return found


def views(hives: Hives, *beats: Any) -> dict[str, dict[str, Any]]:
    registry = Registry()
    for one in beats:
        registry.beat(one, 0.0)
    return {view["name"]: view for view in hives.views(registry.live(0.0))}


def test_a_declared_machine_is_listed_before_anything_is_heard_of_it(tmp_path: Path) -> None:
    hives = declared(tmp_path, lab1=[CPU0], lab2=[], lab3=[CPU0 | {"state": "stopped"}])

    seen = views(hives)

    assert {name: view["status"] for name, view in seen.items()} == {"lab1": "silent", "lab2": "empty", "lab3": "empty"}
    assert seen["lab1"] == {
        "name": "lab1",
        "declared": True,
        "address": "10.0.0.1",
        "status": "silent",
        "workers": [],
        "declared_workers": [CPU0 | {"id": "lab1-cpu0", "status": None}],
        "models": [],
        "backends": ["cpu"],
        "slots": {"total": 0, "busy": 0},
    }


def test_what_is_heard_and_what_is_declared_come_together(tmp_path: Path) -> None:
    hives = declared(tmp_path, lab1=[CPU0, CPU0 | {"name": "cuda1", "backend": "cuda", "device": 1}], lab2=[CPU0])

    seen = views(
        hives,
        beat("lab1-cpu0"),
        beat("lab2-cpu0", hive_id="lab2", status="dormant", slots_available=0),
        beat("lab9-cpu0", hive_id="lab9"),
    )

    assert {name: (view["declared"], view["status"]) for name, view in seen.items()} == {
        "lab1": (True, "up"),
        "lab2": (True, "asleep"),
        "lab9": (False, "up"),
    }
    assert [(w["id"], w["status"]) for w in seen["lab1"]["declared_workers"]] == [("lab1-cpu0", "idle"), ("lab1-cuda1", None)]
    assert seen["lab1"]["backends"] == ["cpu", "cuda"]
    assert seen["lab9"]["declared_workers"] == []


def test_without_a_declaration_heartbeats_alone_tell() -> None:
    hives = Hives(None)

    assert hives.reload() == 0
    assert [(v["name"], v["declared"], v["address"]) for v in views(hives, beat("lab1-cpu0")).values()] == [("lab1", False, None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "file"),
        ('{"version": 2, "hives": []}', "version"),
        ('{"version": 1, "hives": [{"name": "../x"}]}', "hives.0.name"),
        ('{"version": 1, "hives": [{"name": "a", "workers": [{"name": "cpu0", "backend": "cpu"}]}]}', "hives.0.workers.0.model"),
    ],
)
def test_a_declaration_that_can_not_be_read_is_refused_by_place_and_the_old_one_stays(
    tmp_path: Path, text: str, said: str
) -> None:
    hives = declared(tmp_path, lab1=[CPU0])
    (tmp_path / "fleet.json").write_text(text, encoding="utf-8")

    with pytest.raises(ConfigInvalid, match=rf"fleet\.json is no declaration of a fleet \({said}: "):
        hives.reload()
    assert set(views(hives)) == {"lab1"}
    (tmp_path / "fleet.json").unlink()
    with pytest.raises(ConfigInvalid, match="No such file"):
        hives.reload()
