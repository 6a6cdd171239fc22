"""Two callers that begin the same work on a machine in the same moment: one begins it, the other joins (SPEC E-04)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import node_modules
import pytest
from ansible.module_utils import rbee_node
from ansible.module_utils.rbee_node import NodeError

pytestmark = pytest.mark.E04

download = node_modules.load("library", "rbee_download")
runtime = node_modules.load("library", "rbee_runtime")


class Systemd:
    """Units that are begun once: a second systemd-run of the same name fails, as the real one does."""

    def __init__(self, module: ModuleType, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.units: list[str] = []
        self._looked = threading.Barrier(2)
        monkeypatch.setattr(rbee_node, "RUN_DIR", str(run_dir))
        monkeypatch.setattr(module, "show", self._show)
        monkeypatch.setattr(rbee_node, "run", self._run)

    def _show(self, unit: str) -> dict[str, dict[str, str]]:
        state = {unit: {"ActiveState": "active" if unit in self.units else "inactive"}}
        with contextlib.suppress(threading.BrokenBarrierError):
            self._looked.wait(0.5)  # unless a lock keeps the other caller out, both have looked before one begins
        return state

    def _run(self, *argv: str, **_: Any) -> tuple[int, str, str]:
        (unit,) = [a.removeprefix("--unit=") for a in argv if a.startswith("--unit=")]
        if unit in self.units:
            raise NodeError("SSH_COMMAND_FAILED", f"Failed to start transient service unit: Unit {unit} was already loaded")
        self.units.append(unit)
        return 0, "", ""


def both(call: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return [f.result() for f in [pool.submit(call) for _ in range(2)]]


def test_a_download_is_begun_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd = Systemd(download, tmp_path, monkeypatch)
    monkeypatch.setattr(download, "any_runtime_python", lambda _: "/opt/rbee/runtimes/cpu/1/bin/python")
    monkeypatch.setattr(download, "read", lambda *_: ([], []))
    params = {"ref": "hf:org/repo:m.gguf", "sent": [], "roots": [], "tries": 6, "pause_s": 0.1, "stall_timeout_s": 60.0}
    params |= {"bytes_per_s": 0, "user": "rbee", "models_dir": "/var/lib/rbee/models", "install_path": "/opt/rbee"}
    params |= dict.fromkeys(("token_file", "endpoint", "peer", "sha256", "sent_to"))
    one, other = both(lambda: download.work({**params}, False))
    assert sorted((one.pop("joined"), other.pop("joined"))) == [False, True]
    assert one == other
    assert systemd.units == [one["unit"]]


def test_a_runtime_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd = Systemd(runtime, tmp_path, monkeypatch)
    params = {"type": "cpu", "arguments": {"version": "1"}, "install_path": "/opt/rbee", "script": "/tmp/make_runtime.py"}
    one, other = both(lambda: runtime.make(params, False))
    assert sorted((one.pop("joined"), other.pop("joined"))) == [False, True]
    assert one == other
    assert systemd.units == [one["unit"]]


def test_a_dollar_reaches_the_program_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """systemd puts the values of variables into a service's command line, and nothing where there is none."""
    seen: list[str] = []
    monkeypatch.setattr(rbee_node, "run", lambda *argv, **_: seen.extend(argv))
    rbee_node.begin("a.service", tmp_path / "told/a", (), "make", "--cmake-args=-DCMAKE_INSTALL_RPATH=${ORIGIN}")
    assert seen[-2:] == ["make", "--cmake-args=-DCMAKE_INSTALL_RPATH=$${ORIGIN}"]
