"""Settings: defaults of SPEC 3.8, overrides, refusals by name; timeouts nest."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee_serve.contract.errors import ConfigInvalid, ExitCode
from rbee_serve.contract.settings import QueenSettings, WorkerSettings

MINIMAL = {"name": "cpu0", "hive": "workstation", "model_id": "m", "model_path": "/m.gguf"}


def worker(**values: object) -> WorkerSettings:
    return WorkerSettings.from_values({**MINIMAL, **values}, {}, origin="test")


def test_worker_defaults_are_those_of_the_spec() -> None:
    s = worker()

    assert (s.port, s.heartbeat_interval_s, s.idle_timeout_s, s.drain_timeout_s) == (8001, 10, 300, 30)
    assert (s.load_timeout_s, s.stall_timeout_s, s.max_tokens_limit, s.body_max_bytes) == (300, 60, 2048, 1 << 20)
    assert s.ping_interval_s <= 15


def test_queen_defaults_are_those_of_the_spec() -> None:
    s = QueenSettings()

    assert (s.port, s.stale_after_s, s.forget_after_s) == (8080, 30, 120)
    assert (s.connect_timeout_s, s.stall_timeout_s, s.request_timeout_s) == (5, 60, 300)


def test_worker_id_holds_the_node_so_that_equal_instances_of_two_nodes_differ() -> None:
    assert worker().worker_id == "workstation-cpu0"
    assert worker(hive="blep").worker_id == "blep-cpu0"


def test_environment_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "queen.toml"
    path.write_text("port = 9000\n")

    assert QueenSettings.load(path, {}).port == 9000
    assert QueenSettings.load(path, {"RBEE_PORT": "9001"}).port == 9001


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prot": 9000}, "prot"),
        ({"port": "high"}, "port"),
        ({"port": 80}, "port"),
        ({"backend": "quantum"}, "backend"),
        ({"slots": 0}, "slots"),
        ({"name": "Cuda 1"}, "name"),
        ({"model_sha256": "abc"}, "model_sha256"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        worker(**values)

    assert named in caught.value.message
    assert caught.value.exit_code is ExitCode.CONFIG


def test_a_missing_or_broken_file_is_refused_with_its_path(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("port = = 1")

    for path in (tmp_path / "absent.toml", broken):
        with pytest.raises(ConfigInvalid, match=str(path)):
            QueenSettings.load(path, {})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        worker().port = 1  # type: ignore[misc]
