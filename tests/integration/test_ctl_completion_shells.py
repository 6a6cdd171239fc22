"""Completion as a person has it: installed from within bash, zsh and fish, then a new shell, real keys on a real terminal."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from tests.unit.queen_stand_in import QueenStandIn, worker

pytestmark = pytest.mark.integration

#: What a terminal is told besides text: colours, cursor, window title.
CONTROLS = re.compile(r"\x1b\[[0-9;?>=]*[a-zA-Z]|\x1b\][^\x07]*\x07|\x1b[=>()][B0]?|\x08|[⏎\r\n]")
Shell = Callable[[], "pexpect.spawn[str]"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A person's home with an inventory, and a queen that hears of a worker nobody declared."""
    workers = "[{backend: cpu, model: 'hf:org/name:Q4_0'}, {backend: cuda, device: 1}]"
    (tmp_path / "inventory.yml").write_text(f"rbee_hives:\n  hosts: {{lab1: {{rbee_workers: {workers}}}, lab2: }}\n")
    (tmp_path / ".zshrc").touch()  # without one zsh asks a new user questions
    # Without them fish begins to read all manuals of the machine, in a process that outlives it.
    (tmp_path / ".local/share/fish/generated_completions").mkdir(parents=True)
    with QueenStandIn().running() as queen:
        queen.workers = [worker("lab2-cpu7", model_id="served")]
        (tmp_path / "queen").write_text(queen.url)
        yield tmp_path


def opener(shell: str, home: Path) -> Shell:
    """Return what opens a window with this shell; its first prompt is there."""
    program = shutil.which(shell)
    assert program is not None, f"{shell} is not installed: make setup"
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    environ = {"HOME": str(home), "PATH": path, "TERM": "xterm", "LANG": "C.UTF-8", "SHELL": program}
    environ |= {"RBEE_INVENTORY": str(home / "inventory.yml"), "RBEE_QUEEN_URL": (home / "queen").read_text()}

    def open_one() -> pexpect.spawn[str]:
        window = pexpect.spawn(program, ["-i"], env=environ, cwd=str(home), encoding="utf-8", timeout=60, dimensions=(40, 160))
        window.sendline("echo rea''dy")
        window.expect("ready")
        return window

    return open_one


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_names_once_it_is_installed(home: Path, shell: str) -> None:
    window = opener(shell, home)
    with window() as first:
        first.sendline("rbee-ctl --install-completion")
        first.expect(f"{shell} completion installed in")

    def typed(text: str, *expected: str, tabs: int = 1) -> None:
        """Type and press Tab, the first one of a new shell; what comes to stand there must say each of these words."""
        with window() as one:
            one.send(f"rbee-ctl {text}")
            shown = ""
            for _ in range(tabs):
                one.send("\t")
            while not all(word in shown for word in expected):
                try:
                    shown += CONTROLS.sub("", one.read_nonblocking(4096, timeout=60))
                except (pexpect.TIMEOUT, pexpect.EOF):
                    pytest.fail(f"{shell}: {text!r} came to {shown!r}, not to {expected}")

    typed("hiv", "hive ")
    typed("worker get lab2", "lab2-cpu7 ")  # from the queen alone
    typed("worker get lab1-", "lab1-cpu0", "lab1-cuda1", tabs=3)  # from the inventory
    typed("infer --model h", "hf:org/name:Q4_0 ")
    typed("infer --model hf:o", "rg/name:Q4_0 ")  # a word that readline takes for two
    typed("infer --model ser", "ved ")
    if shell != "fish":
        typed("infer --model=hf:o", "=hf:org/name:Q4_0 ")
