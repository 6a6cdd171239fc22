"""Completion knows machines and workers, through the shell's own way in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rbee-ctl hive status --node l", ["lab1", "lab2"]),
        ("rbee-ctl worker get lab1", ["lab1-cpu0", "lab1-cuda1-b"]),
    ],
)
def test_names_are_completed(tmp_path: Path, words: str, expected: list[str]) -> None:
    inventory = tmp_path / "inventory.yml"
    workers = "[{backend: cpu}, {backend: cuda, device: 1, name: cuda1-b}]"
    inventory.write_text(f"rbee_hives:\n  hosts: {{lab1: {{rbee_workers: {workers}}}, lab2: }}\n")
    environ = os.environ | {"HOME": str(tmp_path), "RBEE_INVENTORY": str(inventory), "COMP_WORDS": words}
    environ |= {"_RBEE_CTL_COMPLETE": "complete_bash", "COMP_CWORD": str(len(words.split()) - 1)}
    code = "from rbee_ctl.cli import app; app(prog_name='rbee-ctl')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False, timeout=30)
    assert done.stdout.split() == expected, done.stderr
