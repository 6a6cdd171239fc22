"""Audit log: continued over restarts and rotations, and whatever is done to it afterwards shows."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from rbee_ctl.audit import record, verify
from rbee_serve.common.audit import AuditLog
from rbee_serve.contract.errors import AuditBroken, ConfigInvalid

EVENTS = 6


def filled(folder: Path) -> Path:
    log = AuditLog(folder / "audit.jsonl", max_bytes=1_000_000, keep=3)
    for n in range(EVENTS):
        log.write("inference.end", request=f"r{n}", worker=None, text="ü\n")
    log.close()
    return folder / "audit.jsonl"


def test_lines_are_json_with_time_and_without_what_is_none(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in filled(tmp_path).read_text().splitlines()]

    assert [line["seq"] for line in lines] == list(range(1, EVENTS + 1))
    assert lines[2]["request"] == "r2"
    assert "worker" not in lines[2]
    assert lines[2]["at"].endswith("+00:00")
    assert verify([tmp_path / "audit.jsonl"]) == EVENTS


@pytest.mark.E30
@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda lines: [lines[0].replace("r0", "r9"), *lines[1:]], 1),
        (lambda lines: [*lines[:2], *lines[3:]], 3),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4),
        (lambda lines: [*lines[:3], "{}", *lines[3:]], 4),
        (lambda lines: [*lines[:3], "no json", *lines[3:]], 4),
        (lambda lines: [*lines[:3], "[]", *lines[3:]], 4),
    ],
)
def test_what_was_changed_removed_swapped_or_put_in_is_named(
    tmp_path: Path, harm: Callable[[list[str]], list[str]], line: int
) -> None:
    path = filled(tmp_path)
    path.write_text("\n".join(harm(path.read_text().splitlines())) + "\n")

    with pytest.raises(AuditBroken, match=f"line {line}") as e:
        verify([path])

    assert e.value.details["line"] == line


def test_a_changed_line_with_its_hash_made_anew_breaks_the_next_one(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_text().splitlines()
    with closing(AuditLog(tmp_path / "other.jsonl", max_bytes=1_000_000, keep=1)) as fresh:
        for n in range(3):
            fresh.write("forged", n=n)
    forged = (tmp_path / "other.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines[:2], forged[2], *lines[3:]]) + "\n")

    with pytest.raises(AuditBroken, match="line 3"):
        verify([path])


@pytest.mark.E30
def test_a_restart_goes_on_and_a_torn_line_is_told(tmp_path: Path) -> None:
    path = filled(tmp_path)
    with path.open("a") as f:
        f.write('{"seq": 7, "at"')

    with closing(AuditLog(path, max_bytes=1_000_000, keep=3)) as log:
        log.write("queen.start")

    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert events[-2:] == ["audit.torn", "queen.start"]
    assert verify([path]) == EVENTS + 2


@pytest.mark.E30
def test_rotated_parts_are_one_chain_and_the_oldest_go(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=4096, keep=2)
    for n in range(100):
        log.write("x", n=n)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(p.stat().st_size <= 4096 for p in tmp_path.iterdir())
    parts = [tmp_path / "audit.jsonl.2", tmp_path / "audit.jsonl.1", path]
    assert verify(parts) > 30
    with pytest.raises(AuditBroken, match="missing"):
        verify([parts[0], parts[2]])
    log.close()
    with closing(AuditLog(path, max_bytes=4096, keep=2)) as log:
        log.write("again")
    verify(parts)


def test_a_place_that_can_not_be_written_is_a_configuration_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigInvalid, match="audit log"):
        AuditLog(tmp_path / "file" / "audit.jsonl", max_bytes=4096, keep=1)


def several(folder: Path, name: str) -> None:
    for n in range(10):
        record(folder, "playbook.start", playbook=name, n=n)


def test_several_operators_keep_one_chain(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("spawn").Process(target=several, args=(tmp_path, f"p{i}")) for i in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()

    assert [p.exitcode for p in processes] == [0] * 4
    assert verify([tmp_path / "audit.jsonl"]) == 40
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600
