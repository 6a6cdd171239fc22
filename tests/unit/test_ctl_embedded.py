"""What `serve` owns from which moment on: signals and neighbours that come between two of its steps."""

from __future__ import annotations

import fcntl
import io
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee_ctl import embedded
from rbee_ctl.embedded import Embedded
from rbee_ctl.render import Ui


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embedded:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Embedded(Ui(io.StringIO(), io.StringIO()), tmp_path / "m.gguf", None, None, port=None, slots=1, threads=1)


@pytest.fixture
def sigterm_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_interrupts")
def test_a_child_that_begins_as_a_stop_comes_is_ended_with_the_stack(stack: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    blocked: list[str] = []
    popen = subprocess.Popen

    def interrupted(command: Any, **options: Any) -> subprocess.Popen[bytes]:
        begun.append(popen(["sleep", "7616"], **options))
        blocked.append(Path(f"/proc/{begun[0].pid}/status").read_text().partition("SigBlk:")[2].split()[0])
        # To this thread: pytest-xdist has others, which rbee-ctl has not, and they block nothing.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return begun[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt), stack:
        stack._launch("queen", {})
    assert begun[0].returncode == -signal.SIGTERM
    assert int(blocked[0], 16) & 1 << (signal.SIGTERM - 1) == 0
    assert not stack.folder.exists()


def test_two_that_begin_in_one_moment_each_have_a_folder(stack: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """One makes its folder and has not locked it yet as the other one looks for stale ones."""
    flock, neighbours = fcntl.flock, iter([embedded.remove_stale])

    def late(fd: Any, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            next(neighbours, lambda: None)()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with stack:
        assert stack.folder.is_dir()
        embedded.remove_stale()
        assert (stack.folder / "lock").is_file()
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
