"""What the engine is told before the settings are read is what they mean, or nothing."""

import dataclasses
from pathlib import Path

import pytest

from rbee_serve.contract.settings import WorkerSettings
from rbee_serve.worker import early
from rbee_serve.worker.engine.spawn import EngineChild
from rbee_serve.worker.main import engine_config

LEAST = 'name = "cpu0"\nhive = "n"\nmodel_id = "m"\nmodel_path = "/models//a.gguf"\n'


def written(folder: Path, more: str = "") -> list[str]:
    """Return the arguments of a worker with these settings."""
    path = folder / "cpu0.toml"
    path.write_text(LEAST + more)
    return ["--config", str(path)]


@pytest.mark.parametrize(
    "more",
    [
        "",
        "slots = 9\ncontext_tokens = 512\nthreads = 2\nprompt_block_tokens = 64\nstream_gap_s = 0.5\ndraft_tokens = 3\n",
        'prefix_store_dir = "/var/cache/rbee/"\nprefix_store_max_bytes = 2097152\n',
        'kv_type = "q8_0"\nmemory_check = false\ncpu_variant = "haswell"\n',
        f'deterministic = true\nmodel_sha256 = "{"0" * 64}"\nidle_timeout_s = 0\nport = 9000\n',
    ],
)
def test_it_is_what_the_settings_mean(tmp_path: Path, more: str) -> None:
    arguments = written(tmp_path, more)
    meant = engine_config(WorkerSettings.load(Path(arguments[1]), {}))
    assert early.configuration(arguments, {"PATH": "/bin"}) == dataclasses.asdict(meant)


@pytest.mark.parametrize(
    "more",
    [
        'backend = "cuda"\n',
        "device = 1\n",
        'slots = "2"\n',
        "slots = 65\n",
        "slots = true\n",
        "stream_gap_s = 1\n",
        "memory_check = 1\n",
        'lora = ["/a.gguf"]\n',
        'kv_type = "f32"\n',
        "model_sha256 = 5\n",
        "no toml",
    ],
)
def test_what_is_unusual_waits_for_the_settings(tmp_path: Path, more: str) -> None:
    assert early.configuration(written(tmp_path, more), {}) is None


def test_so_do_overrides_other_arguments_and_files_that_can_not_be_read(tmp_path: Path) -> None:
    arguments = written(tmp_path)
    assert early.configuration(arguments, {"RBEE_SLOTS": "2"}) is None
    assert early.configuration([*arguments, "--self-test"], {}) is None
    assert early.configuration([], {}) is None
    assert early.configuration(["--config", str(tmp_path / "none.toml")], {}) is None
    assert early.configuration(["--config", str(tmp_path)], {}) is None


def test_an_engine_that_was_told_something_wrong_is_replaced() -> None:
    child = EngineChild()
    try:
        first = child.process
        child.tell(b"")
        child.begin_anew()
        assert first.returncode is not None
        assert child.process.pid != first.pid
        assert not child.told
        assert child.process.poll() is None
    finally:
        child.close()
