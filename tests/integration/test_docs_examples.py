"""The examples of docs/http_api.md, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import Fleet

pytestmark = pytest.mark.integration

PAGE = Path(__file__).resolve().parents[2] / "docs/http_api.md"
MODEL = "smollm2-135m-instruct"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if found == kind]


def sessions() -> list[list[tuple[str, str]]]:
    """Return the commands of each console block with what they are said to print; a session's commands share one shell."""
    found = []
    for block in blocks("console"):
        session: list[tuple[str, str]] = []
        for line in block.splitlines():
            if line.startswith("$ "):
                session.append((line[2:], ""))
            elif line.startswith(">   ") and not session[-1][1]:
                session[-1] = (f"{session[-1][0]}\n{line[4:]}", "")
            else:
                session[-1] = (session[-1][0], f"{session[-1][1]}{line}\n")
        found.append(session)
    return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), model_path)
    try:
        fleet.start_queen()
        fleet.add_worker("lab1", model_id=MODEL)
        fleet.wait_ready()
        yield fleet
    finally:
        fleet.close()


def test_the_page_has_examples_of_each_kind() -> None:
    assert len(blocks("python")) >= 1
    assert len(sessions()) >= 5
    assert {kind for kind, _ in BLOCK.findall(PAGE.read_text(encoding="utf-8"))} == {"python", "console"}


@pytest.mark.parametrize("session", sessions(), ids=lambda s: s[0][0].split('"')[1].rpartition("/v1/")[2][:20] or "first")
def test_commands_print_what_the_page_says(fleet: Fleet, session: list[tuple[str, str]]) -> None:
    names = {"QUEEN": fleet.queen.url, "KEY": fleet.key, "WORKER": fleet.workers["lab1-cpu0"].url, "TOKEN": fleet.token}
    end = "-- the next command --"
    script = "".join(f"{command}\necho\necho '{end}'\n" for command, _ in session)
    done = subprocess.run(
        ["bash", "-euc", script],
        env={**os.environ, **names, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    for (command, said), printed in zip(session, done.stdout.split(end), strict=False):
        pattern = re.escape(said.strip()).replace(re.escape("..."), ".*?")
        assert re.fullmatch(pattern, printed.strip(), re.DOTALL), f"{command}\n{printed}"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(fleet: Fleet, code: str) -> None:
    assert "http://queen:8080" in code
    here = f"KEY, MODEL = {fleet.key!r}, {MODEL!r}\n" + code.replace("http://queen:8080", fleet.queen.url)
    done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
