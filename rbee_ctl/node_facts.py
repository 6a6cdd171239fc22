"""What rbee-ctl remembers about each machine: last contact, last error, devices. Never part of the user's inventory.

One JSON object a machine in ``<state_dir>/nodes/``, replaced in one step. All of it can be deleted at any time: the next
contact makes it anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rbee_serve.contract.errors import BackendUnavailable, DeviceOutOfRange

Facts = dict[str, Any]
FOLDER = "nodes"


def read(state_dir: Path, name: str) -> Facts:
    """Return what is remembered, {} if nothing."""
    try:
        found = json.loads(_path(state_dir, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def contact(state_dir: Path, name: str, error: str | None) -> None:
    """Remember that the machine answered now, or (``error``) why it did not. A folder that can not be written is passed over."""
    news: Facts = {"last_error": error, "status": "reachable" if error is None else "unreachable"}
    if error is None:
        news["last_contact"] = round(time.time(), 1)
    with contextlib.suppress(OSError):
        _update(state_dir, name, news)


def capabilities(state_dir: Path, name: str, probed: Mapping[str, Any]) -> None:
    """Remember the devices that a probe found, and the version of rbee there."""
    news = {key: probed.get(key) for key in ("devices", "backends", "version", "latency_ms")}
    _update(state_dir, name, news | {"refreshed_at": round(time.time(), 1)})


def forget(state_dir: Path, name: str) -> None:
    """Drop everything about a machine."""
    _path(state_dir, name).unlink(missing_ok=True)


def check_device(state_dir: Path, name: str, backend: str | None, device: int | None) -> None:
    """Refuse what the machine can not have, before it is contacted (SPEC S-39, S-69). Unknown devices refuse nothing.

    Raises BackendUnavailable, DeviceOutOfRange, both with what there is.
    """
    devices = read(state_dir, name).get("devices") or []
    if not devices or backend is None:
        return
    backends = sorted({d["backend"] for d in devices})
    refresh = f"rbee-ctl hive refresh --node {name}"
    if backend not in backends:
        raise BackendUnavailable(
            f"{name} has no {backend} device; available: {', '.join(backends)}",
            hint=f"--backend {backends[0]}; after a change of hardware or driver: {refresh}",
            backend=backend,
            available=backends,
        )
    numbers = sorted(d["device"] for d in devices if d["backend"] == backend)
    if device is not None and device not in numbers:
        raise DeviceOutOfRange(
            f"{name} has no device {device} for {backend}; available: {numbers}",
            hint=f"--device {numbers[0]}; after a change of hardware: {refresh}",
            device=device,
            available=numbers,
        )


def _path(state_dir: Path, name: str) -> Path:
    return state_dir / FOLDER / f"{name}.json"


def _update(state_dir: Path, name: str, news: Facts) -> None:
    path = _path(state_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            json.dump(read(state_dir, name) | {"name": name} | news, f, indent=1)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
