"""Programs as somebody runs them who has no checkout of rbee: another folder, nothing of this one in the environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def run_outside(
    folder: Path, *arguments: str, bin_dir: Path, timeout: float = 120, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in ``folder`` with ``bin_dir`` first on PATH and ``environ`` added; no setting of rbee, Ansible or Python."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RBEE_", "ANSIBLE_", "PYTHON"))}
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        cwd=folder,
        env=inherited | {"PATH": f"{bin_dir}:{inherited['PATH']}"} | environ,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
