"""What a worker's sandbox lets through; runs on a machine as ExecStartPre= of a worker's unit and prints one line."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

#: Process id of another worker, the machine's address, and one that it has of no private network.
neighbour, inside, outside = sys.argv[1:]
own = os.environ["CREDENTIALS_DIRECTORY"]
name = Path(own).name.removeprefix("rbee-worker@").removesuffix(".service")
other = "/run/credentials/rbee-worker@cpu0.service/fleet-token"


def read(path):
    return lambda: Path(path).read_bytes()


def connect(address):
    return lambda: socket.create_connection((address, 22), timeout=2).close()


def write(path):
    return lambda: Path(path, "rbee-probe").write_text("x")


attempts = {
    "own credential": read(f"{own}/fleet-token"),
    "own settings": read(f"/etc/rbee/workers/{name}.toml"),
    "credential at its source": read("/etc/rbee/credentials/fleet-token"),
    "credential of a neighbour": read(other),
    "credential through a neighbour's root": read(f"/proc/{neighbour}/root{other}"),
    "environment of a neighbour": read(f"/proc/{neighbour}/environ"),
    "memory of a neighbour": read(f"/proc/{neighbour}/maps"),
    "signal to a neighbour": lambda: os.kill(int(neighbour), signal.SIGURG),
    "signal to init": lambda: os.kill(1, signal.SIGURG),
    "shadow": read("/etc/shadow"),
    "home of root": lambda: list(Path("/root").iterdir()) and 1 / len(list(Path("/root").iterdir())),
    "device of another": lambda: os.open("/dev/nvidia7", os.O_RDWR),
    "network of the fleet": connect(inside),
    "internet": connect(outside),
    "kernel messages": lambda: os.open("/dev/kmsg", os.O_RDONLY),
    **{f"write to {p}": write(p) for p in ("/etc", "/etc/rbee", "/opt/rbee", "/usr", "/var/lib/rbee/models", "/run", "/root")},
    "namespace": lambda: os.unshare(0x10000000) if hasattr(os, "unshare") else _unshare(),
}


def _unshare():
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


results = {}
for what, attempt in attempts.items():
    try:
        attempt()
        results[what] = "done"
    except (OSError, ZeroDivisionError) as e:
        results[what] = type(e).__name__
print("PROBE " + json.dumps(results))
