"""Servers to compare with that are Python packages: installed once into an environment of their own in the cache."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def environment(cache: Path, name: str, packages: list[str], *, borrow: bool) -> Path:
    """Return the Python of an environment with ``packages``; with ``borrow`` ours is looked at after its own."""
    folder = cache / "bench" / f"peer-{name}"
    python = folder / "bin/python"
    done = folder / ".complete"
    if not done.is_file():
        print(f"installing {' '.join(packages)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        done.touch()
    if borrow:
        site = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def litellm(cache: Path) -> Path:
    """Return the program ``litellm``, the proxy."""
    return environment(cache, "litellm", ["litellm[proxy]"], borrow=False).with_name("litellm")


def python_with_llama_cpp_server(cache: Path) -> Path:
    """Return a Python that runs ``llama_cpp.server`` with the very llama-cpp-python that the worker uses."""
    packages = ["fastapi", "uvicorn", "sse-starlette", "starlette-context", "pydantic-settings", "PyYAML"]
    return environment(cache, "llama-cpp-server", packages, borrow=True)
