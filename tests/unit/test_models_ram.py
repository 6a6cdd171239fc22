"""What is free for another model: read from what a kernel would tell, of either version of control groups."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rbee_serve.models import ram

MB = 1 << 20
GROUP = "rbee.slice/rbee-worker@cpu0.service"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """1000 MiB available, and a control group for cpu0 in version 2."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {1000 << 10} kB\nHugePages_Total: 0\n")
    (tmp_path / "proc/self/cgroup").write_text(f"0::/{GROUP}\n")
    (tmp_path / "workers").mkdir()
    return tmp_path


def group(machine: Path, path: str, **files: str) -> None:
    folder = machine / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


def room(machine: Path, model: str = "/m/a.gguf") -> int:
    return ram.room(model, machine / "proc", machine / "cgroup", machine / "workers")


def test_without_limits_the_machine_s_memory_counts(machine: Path) -> None:
    group(machine, GROUP, memory_max="max\n", memory_stat="anon 5\n")
    assert room(machine) == 1000 * MB


def test_the_tightest_limit_counts_that_the_unit_is_under_less_what_is_used(machine: Path) -> None:
    group(machine, GROUP, memory_max=f"{900 * MB}\n", memory_stat=f"anon {100 * MB}\nfile {700 * MB}\nshmem {50 * MB}\n")
    assert room(machine) == 750 * MB, "page cache makes room"
    group(machine, "rbee.slice", memory_max=f"{800 * MB}\n", memory_stat=f"anon {400 * MB}\nshmem 0\n")
    assert room(machine) == 400 * MB
    group(machine, "rbee.slice", memory_max=f"{300 * MB}\n")
    assert room(machine) == 0


def test_version_1_control_groups_are_read_as_well(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text(f"5:cpu,memory:/{GROUP}\n0::/{GROUP}\n")
    group(machine, f"memory/{GROUP}", memory_limit_in_bytes=f"{600 * MB}\n", memory_stat=f"total_rss {200 * MB}\n")
    group(machine, "memory/rbee.slice", memory_limit_in_bytes=f"{1 << 62}\n", memory_stat="total_rss 1\n")
    assert room(machine) == 400 * MB


def test_what_other_workers_have_mapped_is_not_free_unless_it_is_the_same_file(machine: Path) -> None:
    group(machine, GROUP, memory_stat=f"anon 1\nfile_mapped {5 * MB}\n")
    group(machine, "rbee.slice/rbee-worker@cpu0-b.service", memory_stat=f"anon 1\nfile_mapped {300 * MB}\n")
    assert room(machine) == 700 * MB
    (machine / "workers/cpu0-b.toml").write_text('# x\nname = "cpu0-b"\nmodel_path = "/m/a.gguf"\n')
    assert room(machine) == 1000 * MB
    assert room(machine, "/m/b.gguf") == 700 * MB


def test_a_mapped_model_is_found_and_other_files_are_not(tmp_path: Path) -> None:
    """By a process of its own that maps two files and touches the half of each."""
    program = (
        "import mmap, sys\n"
        "files = [open(p, 'rb') for p in sys.argv[1:]]\n"
        "maps = [mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) for f in files]\n"
        "sum(m[i] for m in maps for i in range(0, len(m) // 2, 4096))\n"
        "print('there', flush=True); sys.stdin.read()"
    )
    model, other = tmp_path / "a model.gguf", tmp_path / "other.bin"
    for path in (model, other):
        path.write_bytes(b"x" * 8 * MB)
    assert str(model) not in ram.mapped()
    command = [sys.executable, "-c", program, str(model), str(other)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        found = ram.mapped()
        assert 4 * MB <= found[str(model)] <= 8 * MB
        assert str(other) not in found
        assert 0 < ram.own_bytes(process.pid) < 100 * MB
        process.communicate("")
    assert ram.own_bytes(process.pid) == 0
    assert str(model) not in ram.mapped()
