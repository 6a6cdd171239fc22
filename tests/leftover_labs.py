"""Labs of a test run that was broken off: taken down by the process that was started, whatever became of the others.

Fixtures take their labs down, but with ``pytest -n`` Ctrl+C ends the processes that run the tests within seconds. Each Lab is
noted in a folder that these inherit; at its end the first process takes down, one by one, those that are still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "RBEE_TEST_LABS"
LAB_PY = Path(__file__).resolve().parents[1] / "roles/rbee_lab/files/lab.py"


def note(directory: Path, net: str) -> Path | None:
    """Note a lab that may be booted from now on; returns what is to be removed when it is down. None outside of a run."""
    if (folder := os.environ.get(VARIABLE)) is None:
        return None
    fd, name = tempfile.mkstemp(dir=folder, suffix=".json")
    with os.fdopen(fd, "w") as f:
        json.dump({"directory": str(directory), "net": net}, f)
    return Path(name)


def begin(config: pytest.Config) -> None:
    """Make the folder, in the process that was started; from then on SIGTERM ends it as Ctrl+C does."""
    if hasattr(config, "workerinput"):
        return
    config.stash[_FOLDER] = folder = Path(tempfile.mkdtemp(prefix="rbee-test-labs-"))
    os.environ[VARIABLE] = str(folder)
    signal.signal(signal.SIGTERM, _interrupt)


def take_down(config: pytest.Config) -> None:
    """Take down what is left. Another Ctrl+C does not stop that."""
    folder = config.stash.get(_FOLDER, None)
    if folder is None:
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for noted in sorted(folder.glob("*.json")):
            with contextlib.suppress(ValueError):  # broken off while it was noted: nothing was booted yet
                _down(**json.loads(noted.read_text()))
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        signal.signal(signal.SIGINT, before)


_FOLDER = pytest.StashKey[Path]()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _down(directory: str, net: str) -> None:
    if not Path(directory).is_dir():
        return
    sys.stderr.write(f"taking down the lab in {directory}, which a test has left\n")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RBEE_LAB")}
    environ |= {"RBEE_LAB_DIR": directory, "RBEE_LAB_NET": net}
    done = subprocess.run(
        [sys.executable, str(LAB_PY), "down"], env=environ, capture_output=True, text=True, check=False, start_new_session=True
    )
    if done.returncode != 0:
        sys.stderr.write(f"{done.stderr}\nRBEE_LAB_DIR={directory} RBEE_LAB_NET={net} {LAB_PY} down\n")
