"""Completion knows machines, models and workers, as each shell asks for them; a queen that is slow or away costs nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.queen_stand_in import QueenStandIn, worker

CTL = str(Path(sys.executable).parent / "rbee-ctl")
#: How each shell asks: the variables that its script sets before it runs rbee-ctl.
SHELLS = {
    "bash": lambda words: {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - (not words.endswith(" ")))},
    "zsh": lambda words: {"_TYPER_COMPLETE_ARGS": words},
    "fish": lambda words: {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An inventory, and a queen that hears of a worker that nobody declared."""
    inventory = tmp_path / "inventory.yml"
    workers = "[{backend: cpu, model: declared}, {backend: cuda, device: 1, name: cuda1-b}]"
    inventory.write_text(f"rbee_hives:\n  hosts: {{lab1: {{rbee_workers: {workers}}}, lab2: }}\n")
    with QueenStandIn().running() as queen:
        queen.workers = [worker("lab2-cpu7", model_id="served")]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RBEE_")}
        yield inherited | {"HOME": str(tmp_path), "RBEE_INVENTORY": str(inventory), "RBEE_QUEEN_URL": queen.url}


def complete(shell: str, words: str, environ: dict[str, str]) -> str:
    asked = environ | SHELLS[shell](words) | {"_RBEE_CTL_COMPLETE": f"complete_{shell}"}
    return subprocess.run([CTL], capture_output=True, text=True, env=asked, check=False, timeout=60).stdout


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rbee-ctl hive status --node l", {"lab1", "lab2"}),
        ("rbee-ctl worker get lab", {"lab1-cpu0", "lab1-cuda1-b", "lab2-cpu7"}),
        ("rbee-ctl infer --model ", {"declared", "served"}),
        ("rbee-ctl wor", {"worker"}),
    ],
)
def test_names_are_completed(environ: dict[str, str], shell: str, words: str, expected: set[str]) -> None:
    said = complete(shell, words, environ)
    found = {
        w for w in ("lab1", "lab2", "lab1-cpu0", "lab1-cuda1-b", "lab2-cpu7", "declared", "served", "worker") if w in _words(said)
    }
    assert found == expected, said


def _words(said: str) -> set[str]:
    """The suggestions: a line each in bash and fish (with help behind a tab), quoted in zsh's list."""
    return {part.partition(":")[0] for line in said.splitlines() for part in line.replace('"', "\t").split("\t")}


def test_a_queen_that_does_not_answer_costs_a_moment_and_nothing_else(environ: dict[str, str]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environ["RBEE_QUEEN_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert complete("bash", "rbee-ctl worker get lab", environ).split() == ["lab1-cpu0", "lab1-cuda1-b"]
    environ["RBEE_INVENTORY"] = "/nonexistent"
    assert complete("bash", "rbee-ctl worker get lab", environ).strip() == ""
