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


class EngineChild:
    """The process, from its start on; it waits for its configuration. ``connection``: our end of the socket pair;
    ``told``: the configuration has been sent."""

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair()
        self.told = False
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rbee_serve.worker.engine.child", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def tell(self, data: bytes) -> None:
        """Send the configuration as wire.py packs it. That the process has died already is found out when it is waited for."""
        with contextlib.suppress(OSError):
            self.connection.sendall(data)
        self.told = True

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
