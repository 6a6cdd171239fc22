"""An installation of the wheel without the libraries that a program needs: says what to type. Standard library alone.

One wheel has three homes, and each has an extra of its own: ``ctl``, ``queen``, ``worker`` (pyproject.toml).
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: A library of each extra that no other one has.
_PROBES = {"ctl": "ansible_runner", "queen": "prometheus_client", "worker": "llama_cpp"}


def has(extra: str) -> bool:
    """Say whether the libraries of an extra are installed."""
    return importlib.util.find_spec(_PROBES[extra]) is not None


def how_to_install(*extras: str) -> str:
    """Return the command that adds ``extras`` to this very installation, from where it came, and loses none that is there."""
    wanted = ",".join(e for e in _PROBES if e in extras or (e != "worker" and has(e)))
    source = f"{_source()}[{wanted}]"
    prefix = Path(sys.prefix)
    if "pipx" in prefix.parts:
        return f"pipx install --force {shlex.quote(source)}"
    return f"{shlex.quote(str(prefix / 'bin/python'))} -m pip install {shlex.quote(source)}"


def say_missing(error: ModuleNotFoundError, extra: str) -> int:
    """Tell on stderr what is missing and what to type, and return the exit code; raises ``error`` for a module of our own."""
    if (error.name or "rbee").startswith("rbee"):
        raise error
    sys.stderr.write(f"error: {error.name} is not installed [MISSING_DEPENDENCY]\n  try: {how_to_install(extra)}\n")
    return 1


def _source() -> str:
    """Return what pip was given: a wheel's or a checkout's path, else the name of the package."""
    from importlib import metadata

    try:
        told = json.loads(metadata.distribution("rbee").read_text("direct_url.json") or "{}")
        url = urlsplit(str(told.get("url", "")))
    except (metadata.PackageNotFoundError, ValueError):
        return "rbee"
    # Also where that file is gone: on the public index the name may be somebody else's.
    return unquote(url.path) if url.scheme == "file" else "rbee"
