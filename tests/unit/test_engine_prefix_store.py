"""Prefixes on disk: what is written comes back, what is wrong goes, the least recently used goes first."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
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


@pytest.mark.parametrize("value", [None, "x", 1.5, [], -1, 1 << 70])
@pytest.mark.parametrize("name", ["tokens", "state_bytes", "canonical"])
def test_store_removes_a_file_whose_header_says_nonsense(tmp_path: Path, name: str, value: object) -> None:
    """Whatever stands there: an engine that did not start for it would not start the next time either."""
    (path,) = (e.path for e in stored(tmp_path, 1).entries)
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, 40)
    header = json.dumps(json.loads(data[44 : 44 + length]) | {name: value}).encode()
    path.write_bytes(data[:40] + struct.pack("<I", len(header)) + header + data[44 + length :])
    assert PrefixStore(tmp_path, "class-4", LIMIT).entries == []
    assert list(tmp_path.iterdir()) == []


def test_store_on_a_disk_that_is_full_keeps_what_it_had_and_leaves_no_part(tmp_path: Path) -> None:
    """The kernel refuses to write on in the middle of a file, as on a full disk: here for a limit on the size of files."""
    stored(tmp_path, 1)
    program = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from rbee_serve.worker.engine.prefix_store import PrefixStore
        store = PrefixStore(Path(sys.argv[1]), "class-4", 1 << 20)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        store.save(np.arange(200, dtype=np.int32), 150, bytes(100_000))
        assert [int(e.tokens[0]) for e in store.entries] == [1]
        assert store.load(store.entries[0]) is not None
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stderr
    assert [p.suffix for p in tmp_path.iterdir()] == [".prefix"]


def test_store_of_two_processes_writes_whole_files_and_spares_what_the_other_writes(tmp_path: Path) -> None:
    """One writes on while the other comes, looks, writes the same prefix and goes."""
    program = """
        import sys
        from pathlib import Path
        import numpy as np
        from rbee_serve.worker.engine.prefix_store import PrefixStore

        store = PrefixStore(Path(sys.argv[1]), "class-4", 1 << 24)
        for n in range(40):
            store.save(np.arange(1, 201, dtype=np.int32), 150, bytes([int(sys.argv[2])]) * 1_000_000)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    writers = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True) for n in (7, 8)]
    seen = 0
    while any(w.poll() is None for w in writers):
        store = PrefixStore(tmp_path, "class-4", LIMIT)
        for entry in store.entries:
            state = store.load(entry)
            assert state is not None, "a file that was not whole"
            assert bytes(state[:1]) * 1_000_000 == state
            seen += 1
    said = [w.communicate(timeout=60)[1] for w in writers]
    assert said == ["", ""]
    assert [w.returncode for w in writers] == [0, 0]
    assert [p.suffix for p in tmp_path.iterdir()] == [".prefix"]
    assert seen
