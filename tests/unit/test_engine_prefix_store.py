"""Prefixes on disk: what is written comes back, what is wrong goes, the least recently used goes first."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from rbee_serve.worker.engine.prefix_store import PrefixStore

STATE = bytes(range(256)) * 40
LIMIT = 1 << 20


def tokens(first: int, count: int = 200) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.arange(first, first + count, dtype=np.int32)


def stored(folder: Path, *firsts: int, limit: int = LIMIT) -> PrefixStore:
    store = PrefixStore(folder, "class-4", limit)
    for first in firsts:
        store.save(tokens(first), 150, STATE + bytes([first]))
    return store


def test_store_gives_back_what_it_got(tmp_path: Path) -> None:
    folder = tmp_path / "cpu0"
    stored(folder, 1, 2)
    again = PrefixStore(folder, "class-4", LIMIT)
    found = {int(e.tokens[0]): e for e in again.entries}
    assert sorted(found) == [1, 2]
    assert found[2].canonical == 150
    assert found[2].tokens.tolist() == tokens(2).tolist()
    assert again.load(found[2]) == STATE + bytes([2])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("at", [0, 10, 45, 60, 300, 5000, -1])
def test_store_never_loads_a_file_with_one_wrong_byte(tmp_path: Path, at: int) -> None:
    (path,) = (e.path for e in stored(tmp_path, 1).entries)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    again = PrefixStore(tmp_path, "class-4", LIMIT)
    assert [again.load(e) for e in again.entries] in ([], [None])
    assert list(tmp_path.iterdir()) == []
    assert again.entries == []


@pytest.mark.parametrize("size", [0, 7, 50, 400, 5000])
def test_store_removes_a_file_that_was_cut(tmp_path: Path, size: int) -> None:
    (path,) = (e.path for e in stored(tmp_path, 1).entries)
    path.write_bytes(path.read_bytes()[:size])
    assert PrefixStore(tmp_path, "class-4", LIMIT).entries == []
    assert list(tmp_path.iterdir()) == []


def test_store_removes_what_is_of_another_engine_and_what_was_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, 1)
    (tmp_path / "0123.part").write_bytes(b"half")
    (tmp_path / "README").write_text("not ours")
    assert PrefixStore(tmp_path, "class-8", LIMIT).entries == []
    assert [p.name for p in tmp_path.iterdir()] == ["README"]
    assert "of another model, build or number of slots" in capsys.readouterr().err


def test_store_keeps_to_its_limit_and_lets_the_least_recently_used_go(tmp_path: Path) -> None:
    store = stored(tmp_path, 1, 2, 3, limit=25_000)
    for entry in store.entries:
        os.utime(entry.path, (1000 + int(entry.tokens[0]),) * 2)
    (first,) = (e for e in store.entries if e.tokens[0] == 1)
    store.touch(first)
    store.shrink()
    assert {int(e.tokens[0]) for e in store.entries} == {1, 3}
    assert len(list(tmp_path.iterdir())) == 2
    store.save(tokens(9), 0, bytes(30_000))
    assert len(list(tmp_path.iterdir())) == 2, "larger than the limit alone"


def test_store_in_a_folder_that_can_not_be_used_stays_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    store = stored(tmp_path / "file" / "cpu0", 1)
    assert store.entries == []
    assert "can not be used" in capsys.readouterr().err
