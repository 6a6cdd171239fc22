"""What systemd does for a socket unit: hold the socket, start the service at the first connection, wait for its end.

Run as a program it starts a small application that leaves as soon as it is idle, over and over, and prints each exit code.
The application's imports are done once and each start is a fork, so that hundreds of lives take seconds.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
import time

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from rbee_serve.common.http import RequestLimits
from rbee_serve.common.sdnotify import Notifier
from rbee_serve.common.serving import Leave, run

IDLE_S = 0.03
LIMITS = RequestLimits(1_000_000, 32_768, 30.0, 1000)


def serve(port: int) -> int:
    """One life: serve until idle."""
    last = 0.0  # of the idle clock, which runs from the loop's first look on: a start takes as long as the machine makes it
    running = 0

    async def answer(request: Request) -> PlainTextResponse:
        nonlocal last, running
        running += 1
        await asyncio.sleep(float(request.query_params.get("s", 0)))
        running -= 1
        last = time.monotonic()
        return PlainTextResponse(str(os.getpid()))

    def due() -> bool:
        nonlocal last
        last = last or time.monotonic()
        return not running and time.monotonic() - last > IDLE_S

    app = Starlette(routes=[Route("/", answer)])
    leave = Leave(due, lambda: None)
    run(app, host="127.0.0.1", port=port, notifier=Notifier({}), graceful_timeout_s=1, leave=leave, limits=LIMITS)
    return 0


def manage(held: socket.socket) -> None:
    """Start the service whenever somebody waits; returns when stdin is closed."""
    port = held.getsockname()[1]
    while sys.stdin not in (ready := select.select([held, sys.stdin], [], [])[0]):
        assert held in ready
        pid = os.fork()
        if pid == 0:
            # Above what the loop opens; then where systemd puts it, with nothing else of ours inherited.
            os.dup2(held.fileno(), 3)
            os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
            os._exit(serve(port))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        manage(listening)
