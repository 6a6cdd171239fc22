"""The engine's process and the connection to it. Standard library alone: it is begun before the front's own modules are imported.

Its imports and the loading of the model then run beside the front's own imports, which take about as long. ``rbee-worker``
forks it: a second interpreter and what both import would take 60 ms of the start. Whoever has threads, or is no worker, has
it executed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import BinaryIO, NoReturn

#: Turns of the loop in which a compute thread waits for the others before it sleeps. libgomp's own 300,000 are 20 ms on CPUs
#: whose `pause` is slow: whenever something else had a core for a moment (the front, a client, a neighbour) the rest burned
#: theirs, and a step took ten times as long on a busy machine. 1,000 are some 50 us: no loss on a quiet one (2 threads).
_SPIN_COUNT = "1000"


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the engine's environment. What an administrator has set for OpenMP or OpenBLAS stays."""
    # numpy's OpenBLAS would start threads that spin for 0.1 s of a cold start; nothing here multiplies matrices by it.
    mine = {"OPENBLAS_NUM_THREADS": "1"}
    if "OMP_WAIT_POLICY" not in environ:
        mine["GOMP_SPINCOUNT"] = _SPIN_COUNT
    return {**mine, **environ}


class Forked:
    """A process made by fork(2): what is used of Popen's interface. ``stderr``: the reading end of its pipe."""

    def __init__(self, body: Callable[[], object], keep: int) -> None:
        """Run ``body`` in a process of its own, which has none of this one's files but ``keep``, standard output and a
        standard error of its own. This process must have one thread."""
        self.returncode: int | None = None
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _run_and_exit(body, keep, writing)
        os.close(writing)
        self.stderr: BinaryIO | None = open(reading, "rb", buffering=0)  # noqa: SIM115, PTH123 -- kept, as Popen keeps it

    def wait(self) -> int:
        """Wait for the end; return the exit code, less than 0 for a signal's number."""
        if self.returncode is None:
            try:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            except ChildProcessError:  # whoever started us ignores SIGCHLD: nobody learns the code
                self.returncode = 0
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the end has been waited for."""
        if self.returncode is None:
            os.kill(self.pid, number)


def _run_and_exit(body: Callable[[], object], keep: int, stderr: int) -> NoReturn:
    """What the forked process does: nothing of the front's own ever runs in it, whatever happens."""
    code = 1
    try:
        os.dup2(stderr, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 -- no import
            if fd > 2 and fd != keep:
                with contextlib.suppress(OSError):  # the folder's own
                    os.close(fd)
        os.environ.update(environment())
        body()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            if sys.stderr is not None:  # closed when we began
                sys.stderr.flush()
        finally:
            os._exit(code)


class EngineChild:
    """The process, from its start on; it waits for its configuration. ``connection``: our end of the socket pair;
    ``told``: the configuration has been sent."""

    process: subprocess.Popen[bytes] | Forked

    def __init__(self, body: Callable[[socket.socket, int], object] | None = None) -> None:
        """Begin it. ``body(connection, parent's id)`` is what it does where this process may be forked, having one thread."""
        self._begin(body)

    def _begin(self, body: Callable[[socket.socket, int], object] | None) -> None:
        self.connection, theirs = socket.socketpair()
        self.told = False
        parent, fd = os.getpid(), theirs.fileno()
        with theirs:
            if body is not None:
                self.process = Forked(lambda: body(theirs, parent), fd)
                return
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rbee_serve.worker.engine.child", str(fd), str(parent)],
                pass_fds=[fd],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def tell(self, data: bytes) -> None:
        """Send what wire.py packs. That the process has died already is found out when it is waited for."""
        with contextlib.suppress(OSError):
            self.connection.sendall(data)
        self.told = True

    def begin_anew(self) -> None:
        """Take another process instead of this one, which was told something wrong."""
        self.close()
        self._begin(None)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End it and forget it (idempotent): for those who have not given it to a ProcessEngine, or when that has ended."""
        if self.process.returncode is None:
            self.kill()
            self.process.wait()
        self.connection.close()
        if self.process.stderr is not None:
            self.process.stderr.close()
