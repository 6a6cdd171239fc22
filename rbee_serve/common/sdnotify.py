"""The notify protocol of systemd (sd_notify(3)) in one class, one method a message. Without systemd all do nothing.

Own code because the packages for it either have no wheel or bring a C library for one datagram.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

logger = logging.getLogger(__name__)

#: What is said once must arrive; what is repeated (progress, watchdog) may be dropped.
_MUST_ARRIVE_S = 5.0
#: Name of the sockets in the manager's store.
KEPT = "listen"


class Notifier:
    """Sends state to the service manager; times are in seconds."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Read and remove the variables, so that children do not inherit them."""
        address = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = not pid or pid == str(os.getpid())
        #: Time within which the watchdog must be fed; None: there is none.
        self.watchdog_s: float | None = int(usec) / 1e6 if usec.isdigit() and ours else None

    @property
    def available(self) -> bool:
        """Whether a service manager listens."""
        return bool(self._address)

    def _send(self, *lines: str, wait_s: float = 0.0, hand: socket.socket | None = None) -> None:
        """Send one datagram; ``wait_s``: how long to wait for room in the manager's queue (10 datagrams on many kernels).

        ``hand``: a socket that goes along.
        """
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.settimeout(wait_s)
            try:
                s.connect(self._address)
                message = "\n".join(lines).encode()
                if hand is None:
                    s.send(message)
                else:
                    socket.send_fds(s, [message], [hand.fileno()])
            except OSError as e:
                if wait_s:
                    logger.warning("the service manager did not take a message", extra={"notice": lines[0], "reason": str(e)})
                # Else nothing is lost: the manager restarts or its queue is full, and the next message says the same.

    def ready(self, status: str) -> None:
        """Start-up is over."""
        self._send("READY=1", f"STATUS={_line(status)}", wait_s=_MUST_ARRIVE_S)

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={_line(text)}", wait_s=_MUST_ARRIVE_S)

    def stopping(self, status: str) -> None:
        """Shutdown has begun."""
        self._send("STOPPING=1", f"STATUS={_line(status)}", wait_s=_MUST_ARRIVE_S)

    def extend_timeout(self, seconds: float, status: str) -> None:
        """Ask for ``seconds`` from now for starting up or for ending."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", f"STATUS={_line(status)}")

    def keep(self, listener: socket.socket) -> None:
        """Let the manager hold a socket while the service restarts: it hands it to the next process, nobody is refused meanwhile.

        The unit must say ``FileDescriptorStoreMax=``; a stop closes the socket.
        """
        self._send("FDSTORE=1", f"FDNAME={KEPT}", wait_s=_MUST_ARRIVE_S, hand=listener)

    def forget(self) -> None:
        """Take back what ``keep`` gave away, in this process or the one before."""
        self._send("FDSTOREREMOVE=1", f"FDNAME={KEPT}", wait_s=_MUST_ARRIVE_S)

    def watchdog(self) -> None:
        """Still alive."""
        self._send("WATCHDOG=1")


def _line(text: str) -> str:
    return " ".join(text.split())


def listen_sockets(environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """Return the sockets that systemd hands over (sd_listen_fds(3)), and remove the variables."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "0")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=3 + i) for i in range(int(count))]
    for s in sockets:
        s.set_inheritable(False)  # a child that held it would hold the port when this process is gone
    return sockets
