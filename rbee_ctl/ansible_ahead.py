"""ansible-playbook, begun before rbee-ctl knows what it will say to it: its imports run beside rbee-ctl's own.

Both take about 0.4 s. ``begin`` is called before anything else for verbs that end in a playbook; ``terminal`` hands the process
over when ansible-runner asks for one. It waits (``ansible_playbook.py``) with the environment that is guessed here; where the
one it is given differs in what Ansible reads while it is imported, it starts itself anew. So a wrong guess costs time alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tempfile

    from ptyprocess import PtyProcess

#: Verbs that run a playbook unless they are refused.
VERBS = frozenset(
    {
        *("worker start", "worker stop", "worker spawn", "worker cleanup", "hive start", "hive stop", "hive install"),
        *("queen start", "queen stop", "model download", "model delete", "runtime use", "apply", "plan", "drift", "upgrade"),
        "drain",
    }
)
_WITH_VALUE = ("--config", "--inventory", "-i")
_WAITING = Path(__file__).with_name("ansible_playbook.py")


class Ahead:
    """The process that waits. ``folder``: private, for the run that it will be given."""

    def __init__(self) -> None:
        import socket

        from ptyprocess import PtyProcess

        from rbee_ctl import content
        from rbee_ctl.ansible_environment import environment, of_run

        self.folder = private_folder()
        self._ours, theirs = socket.socketpair()
        try:
            with theirs:
                theirs.set_inheritable(True)
                env = environment() | of_run(Path(self.folder.name)) | _runners_settings()
                self.process: PtyProcess = PtyProcess.spawn(
                    [sys.executable, "-P", str(_WAITING), str(theirs.fileno()), self.folder.name],
                    cwd=str(content.root()),
                    env=env,
                    echo=False,
                    preexec_fn=_ignore_hangup,
                    pass_fds=[theirs.fileno()],
                )
        except BaseException:
            self._ours.close()
            self.folder.cleanup()
            raise

    def become(self, argv: Sequence[str], env: Mapping[str, str], cwd: str) -> PtyProcess:
        """Let it run ``argv``, which is this Python's ansible-playbook; raises OSError when it has ended."""
        import json

        with self._ours:
            self._ours.sendall(json.dumps({"argv": list(argv), "env": dict(env), "cwd": cwd}).encode())
        return self.process

    def kill(self) -> None:
        """End a process that is not needed; its folder stays."""
        self.process.delayafterclose = 0
        self.process.kill(signal.SIGKILL)
        self.process.wait()
        self.process.close()
        self._ours.close()


_waiting: Ahead | None = None


def wanted(arguments: Sequence[str]) -> bool:
    """Say whether ``arguments`` of rbee-ctl most likely end in a playbook."""
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--help", "-h"):
            return False
        if argument in _WITH_VALUE:
            next(rest, None)
        elif not argument.startswith("-"):
            words.append(argument)
    return " ".join(words[:2]) in VERBS or " ".join(words[:1]) in VERBS


def begin(arguments: Sequence[str]) -> None:
    """Start it where it is wanted. Whatever keeps it from starting is told later, by who needs it."""
    global _waiting
    if wanted(arguments):
        with contextlib.suppress(Exception):
            _waiting = Ahead()


def folder() -> tempfile.TemporaryDirectory[str]:
    """Return the folder for the next run: that of the process which waits, or a new one."""
    return private_folder() if _waiting is None else _waiting.folder


def take(program: str) -> Ahead | None:
    """Return the process that waits, once, if ``program`` is the ansible-playbook that it has imported."""
    global _waiting
    found, _waiting = _waiting, None
    if found is not None and Path(program) != Path(sys.executable).with_name("ansible-playbook"):
        found.kill()
        return None
    return found


def end() -> None:
    """End one that nobody has taken."""
    global _waiting
    found, _waiting = _waiting, None
    if found is not None:
        found.kill()
        found.folder.cleanup()


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a new folder (0700) for one run, in memory where possible."""
    import tempfile

    memory = Path("/dev/shm")  # noqa: S108 -- mkdtemp beneath it, 0700
    base = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="rbee-ctl-", dir=base)


def _runners_settings() -> dict[str, str]:
    """Return what ansible-runner will add to the environment and Ansible reads when it is imported."""
    import importlib.util

    runner = importlib.util.find_spec("ansible_runner")
    if runner is None or runner.origin is None:
        raise ModuleNotFoundError("ansible_runner")
    callbacks = Path(runner.origin).parent / "display_callback" / "callback"
    return {
        "ANSIBLE_CALLBACK_PLUGINS": str(callbacks),
        "ANSIBLE_STDOUT_CALLBACK": "awx_display",
        "ANSIBLE_RETRY_FILES_ENABLED": "False",
    }


def _ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
