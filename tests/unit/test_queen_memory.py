"""What outlives a restart of the queen: sleeping and retired workers; what a retired worker no longer gets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from test_queen_app import App
from test_queen_placement import fleet
from test_queen_registry import beat

from rbee_serve.contract.api import WorkerState
from rbee_serve.contract.errors import InvalidRequest, ModelNotFound, NoWorkerAvailable
from rbee_serve.queen.memory import FILE_NAME, Memory
from rbee_serve.queen.placement import Wanted, awaited, choose, resolve, worth_waiting_for
from rbee_serve.queen.registry import Registry


def restarted(directory: Path) -> Registry:
    """Return the registry of a queen that has just been started on this state."""
    registry = Registry()
    Memory(registry, directory).load(1000.0)
    registry.on_change = lambda: None  # no loop runs that could write
    return registry


def kept(directory: Path, *beats: object) -> Registry:
    """Return a registry that has taken these beats, with everything on disk."""

    async def run() -> Registry:
        registry = Registry()
        memory = Memory(registry, directory)
        for one in beats:
            registry.beat(one, 0.0)  # type: ignore[arg-type]
        await memory.aclose()
        return registry

    return asyncio.run(run())


@pytest.mark.N03
def test_sleeping_worker_is_known_after_a_restart_and_one_that_beats_is_not_written_down(tmp_path: Path) -> None:
    kept(tmp_path, beat("lab1-cpu0", status="dormant"), beat("lab2-cpu0"))

    registry = restarted(tmp_path)

    assert [(w.id, w.state) for w in registry.live(1000.0)] == [("lab1-cpu0", WorkerState.DORMANT)]
    assert [w.id for w in worth_waiting_for(registry, Wanted(model="smollm2"), 1000.0)] == ["lab1-cpu0"]
    registry.beat(beat("lab1-cpu0", started_at=500.0), 1001.0)  # woken, on a machine whose clock was set back
    assert registry.get("lab1-cpu0", 1001.0).state is WorkerState.IDLE


def test_a_model_whose_worker_has_yet_to_beat_after_a_restart_is_a_matter_of_time_and_an_unknown_one_is_not(
    tmp_path: Path,
) -> None:
    kept(tmp_path, beat("lab1-cpu0", model_id="a", model_ref=None), beat("lab2-cpu0", model_id="b"), beat("lab3-cpu0"))
    registry = restarted(tmp_path)
    registry.beat(beat("lab1-cpu0", model_id="a", model_ref=None), 1001.0)

    for name in ("b", "hf:org/smollm2"):
        with pytest.raises(NoWorkerAvailable, match="restarted") as e:
            choose(registry, Wanted(model=name), 1001.0)
        assert e.value.details["retry_after_s"] == 1
        assert awaited(registry, Wanted(model=name), 1001.0)
    assert [resolve(registry, name, 1001.0) for name in ("a", "b", "smollm2")] == ["a", "b", "smollm2"]
    assert resolve(registry, "hf:org/smollm2", 1001.0) in ("b", "smollm2")
    assert not awaited(registry, Wanted(model="c"), 1001.0)
    assert resolve(registry, None, 1001.0, "lab2-cpu0") == "b", "the one that is meant, not the first"
    assert awaited(registry, Wanted(worker_id="lab2-cpu0"), 1001.0)
    assert not awaited(registry, Wanted(model="b", worker_id="lab9-cpu0"), 1001.0)
    with pytest.raises(ModelNotFound, match="known: a, b, smollm2"):
        choose(registry, Wanted(model="c"), 1001.0)
    with pytest.raises(InvalidRequest, match="several"):
        choose(registry, Wanted(), 1001.0)

    registry.beat(beat("lab2-cpu0", model_id="b"), 1002.0)
    assert choose(registry, Wanted(model="b"), 1002.0).id == "lab2-cpu0"
    registry.beat(beat("lab1-cpu0", model_id="a", model_ref=None, seq=1), 1031.0)  # the third has had its time
    with pytest.raises(ModelNotFound, match=r"known: a, b$"):
        choose(registry, Wanted(model="smollm2"), 1031.0)


def test_the_only_model_of_a_restarted_queen_is_meant_by_who_names_none_until_its_time_is_over(tmp_path: Path) -> None:
    kept(tmp_path, beat("lab1-cpu0"), beat("lab2-cpu0"))
    registry = restarted(tmp_path)

    assert resolve(registry, None, 1001.0) == "smollm2"
    with pytest.raises(NoWorkerAvailable, match="restarted"):
        choose(registry, Wanted(), 1001.0)
    with pytest.raises(NoWorkerAvailable, match="no worker has reported"):
        resolve(registry, None, 1031.0)


def test_worker_that_woke_up_is_struck_off(tmp_path: Path) -> None:
    kept(tmp_path, beat("lab1-cpu0", status="dormant"), beat("lab1-cpu0", started_at=2000.0))

    assert len(restarted(tmp_path)) == 0


def test_damaged_list_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"version": 1, "dorm')

    assert len(restarted(tmp_path)) == 0
    assert (tmp_path / "workers.corrupt").is_file()
    assert not (tmp_path / FILE_NAME).exists()


def test_list_is_replaced_in_one_step(tmp_path: Path) -> None:
    kept(tmp_path, beat("lab1-cpu0", status="dormant"))

    assert json.loads((tmp_path / FILE_NAME).read_text())["dormant"][0]["id"] == "lab1-cpu0"
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_retired_worker_gets_nothing_more_also_after_a_restart_until_a_new_process_comes(tmp_path: Path) -> None:
    async def run() -> None:
        registry = Registry()
        memory = Memory(registry, tmp_path)
        registry.beat(beat(), 0.0)
        registry.retire(registry.get("lab1-cpu0", 0.0))
        assert registry.get("lab1-cpu0", 0.0).state is WorkerState.RETIRING
        with pytest.raises(NoWorkerAvailable, match="retiring"):
            choose(registry, Wanted(), 0.0)
        registry.beat(beat(seq=1), 1.0)
        assert not registry.routable(registry.get("lab1-cpu0", 1.0), 1.0)
        await memory.aclose()

    asyncio.run(run())
    registry = restarted(tmp_path)
    registry.beat(beat(seq=2), 1000.0)
    assert registry.get("lab1-cpu0", 1000.0).state is WorkerState.RETIRING

    registry.beat(beat(started_at=3000.0), 1010.0)
    assert registry.routable(registry.get("lab1-cpu0", 1010.0), 1010.0)


def test_retired_worker_that_goes_to_sleep_is_not_woken() -> None:
    registry = fleet({"worker_id": "lab1-cpu0"})
    registry.retire(registry.get("lab1-cpu0", 0.0))
    registry.beat(beat("lab1-cpu0", seq=1, status="dormant"), 1.0)

    assert len(registry) == 0
    sleeping = fleet({"worker_id": "lab1-cpu0", "status": "dormant"})
    sleeping.retire(sleeping.get("lab1-cpu0", 0.0))
    assert len(sleeping) == 0


def test_retire_and_remove_by_http_also_when_the_worker_cannot_be_told() -> None:
    app = App()
    for name in ("lab1-cpu0", "lab2-cpu0"):
        app.beat(name, hive_id=name[:4], url="http://127.0.0.1:9")

    answer = app.ask("POST", "/v1/workers/lab1-cpu0/retire")
    assert (answer.status_code, answer.json()["status"], answer.json()["available"]) == (200, "retiring", False)
    assert [w["id"] for w in app.ask("GET", "/v1/workers?state=retiring").json()["workers"]] == ["lab1-cpu0"]
    assert app.ask("DELETE", "/v1/workers/lab2-cpu0").status_code == 204
    assert app.ask("GET", "/v1/workers/lab2-cpu0").status_code == 404
    assert app.beat("lab2-cpu0", hive_id="lab2", url="http://127.0.0.1:9", seq=5).json()["message"] == "outdated"
    for method, path in (("POST", "/v1/workers/nobody/retire"), ("DELETE", "/v1/workers/nobody")):
        assert app.ask(method, path).status_code == 404


def test_one_hive_by_name() -> None:
    app = App()
    app.beat("lab1-cpu0")

    hive = app.ask("GET", "/v1/hives/lab1").json()
    assert (hive["name"], [w["id"] for w in hive["workers"]], hive["slots"]) == ("lab1", ["lab1-cpu0"], {"total": 4, "busy": 0})
    missing = app.ask("GET", "/v1/hives/lab9")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "NODE_NOT_FOUND")
