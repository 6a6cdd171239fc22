"""Which declared workers a run would start, and whether they fit together: asked before one of them is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import node_modules
import pytest
from ansible.module_utils import rbee_ledger
from ansible.module_utils.rbee_node import NodeError

declared: Any = node_modules.load("library", "rbee_declared")

CPU = {"id": "cpu:0", "backend": "cpu", "device": 0, "name": "Xeon", "memory_free_bytes": 10**12}
ENTRY = {"backend": "cpu", "model": "m", "slots": 2}
MODEL = {"id": "m", "reference": "hf:a/m:m.gguf", "size_bytes": 1_000_000_000, "status": "Ready", "path": "/m/m.gguf"}
SETTINGS = {"model_id": "m", "model_ref": "hf:a/m:m.gguf", "slots": 2, "backend": "cpu", "device": 0, "model_path": "/m/m.gguf"}


def act(entry: dict[str, Any], alive: bool, limit: int | None) -> Any:
    return declared.action(entry, declared.find([MODEL], declared.parse_ref(entry["model"])), SETTINGS, alive, limit)


@pytest.mark.parametrize(
    ("changes", "alive", "expected"),
    [
        ({}, False, "start"),
        ({}, True, None),
        ({"model": "hf:a/m:m.gguf"}, True, None),  # the same model by its reference
        ({"model": "hf:a/m"}, True, None),
        ({"slots": "2"}, True, None),  # as INI files have it
        ({"context_tokens": 4096, "threads": 7, "port": 9000, "settings": {"log_level": "debug"}}, True, None),
        ({"settings": {"slots": 3}}, True, None),  # a key of its own goes before
        ({"model": "other"}, True, "restart"),
        ({"slots": 3}, True, "restart"),
        ({"context_tokens": 8192}, True, "restart"),
        ({"settings": {"kv_type": "q8_0"}}, True, "restart"),
        ({"memory_max": "4G"}, True, "restart"),
        ({"state": "present"}, False, None),
        ({"state": "present"}, True, None),
        ({"state": "present", "slots": 3}, True, "restart"),
        ({"state": "stopped"}, True, "stop"),
        ({"state": "stopped"}, False, None),
        ({"state": "absent"}, True, "stop"),
    ],
)
def test_only_what_would_be_loaded_anew_is_asked_about(changes: dict[str, Any], alive: bool, expected: str | None) -> None:
    assert act({**ENTRY, **changes}, alive, None) == expected


def test_the_limit_that_is_in_force_is_read_from_the_drop_in(tmp_path: Path) -> None:
    assert declared.limit_of("cpu0", tmp_path) is None
    folder = tmp_path / "rbee-worker@cpu0.service.d"
    folder.mkdir()
    (folder / "50-rbee.conf").write_text("[Service]\nMemoryMax=4G\n")
    assert declared.limit_of("cpu0", tmp_path) == 4 << 30
    assert act({**ENTRY, "memory_max": "4G"}, True, 4 << 30) is None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with one model of which a worker needs 1.2 GB; cpu0 runs with it and holds 700 MB of its own."""
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers/cpu0.toml").write_text("".join(f"{k} = {v!r}\n" for k, v in SETTINGS.items()))
    up = {"ActiveState": "active", "MainPID": "7"}
    monkeypatch.setattr(declared, "show", lambda *units: {u: up if u == "rbee-worker@cpu0.service" else {} for u in units})
    monkeypatch.setattr(declared, "devices", lambda: [CPU])
    monkeypatch.setattr(declared, "read", lambda *_: ([MODEL], []))
    monkeypatch.setattr(rbee_ledger, "mapped", lambda: {"/m/m.gguf": 100_000_000, "/m/x.gguf": 50_000_000})
    monkeypatch.setattr(rbee_ledger, "own_bytes", lambda pid: 700_000_000 if pid == 7 else 0)
    monkeypatch.setattr(rbee_ledger, "mem_available", lambda: 1_350_000_000)
    return {
        "declared": [],
        "mem_available_bytes": None,
        "node": "n1",
        "etc_dir": str(tmp_path),
        "models_dir": "/m",
        "install_path": str(tmp_path),
        "unit_dir": str(tmp_path),
    }


def named(name: str, **changes: Any) -> dict[str, Any]:
    return {**ENTRY, "name": name, **changes}


def refused(params: dict[str, Any], *entries: dict[str, Any]) -> NodeError:
    with pytest.raises(NodeError) as e:
        declared.check({**params, "declared": list(entries)})
    return e.value


def test_workers_that_fit_one_by_one_and_not_together_are_refused_by_name(machine: dict[str, Any]) -> None:
    """1350 MB are available, of which 150 MB are mapped by others: there is room for one."""
    running = named("cpu0")
    assert declared.check({**machine, "declared": [running, named("cpu0-b")]}) == ["cpu0-b"]
    assert declared.check({**machine, "declared": [running]}) == []
    error = refused(machine, running, named("cpu0-b"), named("cpu0-c"))
    assert (error.code, error.details["worker"], error.details["available_bytes"]) == ("INSUFFICIENT_RAM", "cpu0-c", 0)
    assert error.message.startswith(
        "worker cpu0-c does not fit here beside cpu0-b, which this run starts as well: m needs 1200 MB"
    )
    assert str(error.hint).endswith("in rbee_workers of n1 (cpu0-c), then: rbee-ctl apply --node n1")
    assert refused({**machine, "mem_available_bytes": 1_199_999_999}, running, named("cpu0-b")).details["worker"] == "cpu0-b"


def test_who_wants_no_check_is_started_and_counts_all_the_same(machine: dict[str, Any]) -> None:
    large = named("cpu0-b", settings={"memory_check": False})
    tight = {**machine, "mem_available_bytes": 1_199_999_999}
    assert declared.check({**tight, "declared": [large]}) == ["cpu0-b"]
    assert refused(tight, large, named("cpu0-c")).details["available_bytes"] == 0


def test_what_a_run_frees_is_there_for_those_that_come_after_it(machine: dict[str, Any]) -> None:
    """Stopping or changing cpu0 gives 700 MB and the 100 MB that it has mapped: 2000 MB, which is still no room for two."""
    leaves, comes = named("cpu0", state="stopped"), named("cpu0-b")
    assert declared.check({**machine, "declared": [leaves, comes]}) == ["cpu0-b"]
    assert refused(machine, leaves, comes, named("cpu0-c")).details["available_bytes"] == 800_000_000
    changed = named("cpu0", slots=4)
    assert declared.check({**machine, "declared": [changed]}) == ["cpu0"]
    assert refused(machine, changed, comes).details["available_bytes"] == 800_000_000


def test_a_device_that_is_not_there_is_refused_first(machine: dict[str, Any]) -> None:
    assert refused(machine, named("cuda0", backend="cuda")).code == "BACKEND_UNAVAILABLE"
    assert declared.check({**machine, "declared": [named("cuda0", backend="cuda", state="absent")]}) == []
    assert declared.check({**machine, "declared": [named("cpu0-b", model="nobody-has-it")]}) == []
