"""Fixtures shared by all kinds of tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import leftover_labs

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

#: Modules of tests/acceptance with machines of their own; the others share one deployed fleet.
OWN_MACHINES = {"test_bundle", "test_faults", "test_lab"}
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def pytest_configure(config: pytest.Config) -> None:
    """Register a marker for each number of the specification, so that ``-m S11`` or ``-m N04`` runs what proves it."""
    leftover_labs.begin(config)
    for letter, last, what in (
        ("S", 91, "scenario"),
        ("N", 14, "requirement"),
        ("P", 15, "promise"),
        ("X", 24, "decision"),
        ("E", 46, "expectation"),
    ):
        for number in range(1, last + 1):
            config.addinivalue_line("markers", f"{letter}{number:02d}: {what} {number} of the specification")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave no machine running, also after Ctrl+C."""
    leftover_labs.take_down(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Keep together what shares a fleet or a module where several processes run the tests (``pytest -n 2 --dist loadscope``)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            shared = path.parts[1] == "acceptance" and path.stem not in OWN_MACHINES
            return "fleet" if shared else path.stem

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The demonstration model in the cache; ``make setup`` puts it there."""
    cache = Path(os.environ.get("RBEE_CACHE", Path.home() / ".cache/rbee"))
    path = cache / "models" / MODEL_SHA256[:16] / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.fail(f"demonstration model missing: {path}; run: make setup")
    return path
