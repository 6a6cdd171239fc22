"""The engine's process and the connection to it. Standard library alone: it is started before anything else is imported.

Its imports and the loading of the model then run beside the front's own imports, which take about as long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

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


class EngineChild:
    """The process, from its start on; it waits for its configuration. ``connection``: our end of the socket pair;
    ``told``: the configuration has been sent."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.connection, theirs = socket.socketpair()
        self.told = False
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rbee_serve.worker.engine.child", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
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
        self._begin()

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
