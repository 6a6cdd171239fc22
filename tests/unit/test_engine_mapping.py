"""Pages of a model file that were copied do not stay in the engine's memory, and can still be read."""

import mmap
import os
from pathlib import Path

from rbee_serve.worker.engine.mapping import let_go, regions


def resident(path: Path) -> int:
    """Return how many bytes of the file this process has in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def flags(path: Path) -> list[str]:
    """Return the kernel's flags of this process's mapping of the file (VmFlags)."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(str(path)))
    return next(line for line in lines if line.startswith("VmFlags:")).split()[1:]


def test_pages_go_and_come_back_as_they_were(tmp_path: Path) -> None:
    file, other = tmp_path / "m.gguf", tmp_path / "other"
    content = os.urandom(1 << 20)
    file.write_bytes(content)
    other.write_bytes(content)
    with file.open("rb") as f, other.open("rb") as g:
        ours, theirs = (mmap.mmap(x.fileno(), 0, access=mmap.ACCESS_READ) for x in (f, g))
    assert ours[:] == theirs[:] == content
    assert resident(file.resolve()) == resident(other.resolve()) == 1 << 20
    link = tmp_path / "link"
    link.symlink_to(file)
    assert let_go([link]) == 1 << 20
    assert "nh" in flags(file.resolve()), "a read would bring back all that the page cache holds as one"
    assert (resident(file.resolve()), resident(other.resolve())) == (0, 1 << 20)
    assert ours[:] == content


def test_files_that_are_not_mapped_or_gone_are_none(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x" * 4096)
    assert let_go([file]) == 0
    assert let_go([tmp_path / "gone"]) == 0


def test_a_file_is_known_by_device_and_inode(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    stat = file.stat()
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
    maps = (
        f"7f0000000000-7f0000002000 r--s 00000000 {device} {stat.st_ino}    /a name with spaces (deleted)\n"
        f"7f0000003000-7f0000004000 r--s 00000000 {device} {stat.st_ino + 1} {file}\n"
        "7f0000005000-7f0000006000 rw-p 00000000 00:00 0 \n"
        f"7f0000007000-7f0000008000 r--s 00000000 00:7e {stat.st_ino} /var/lib/rbee/{file.name}\n"  # as btrfs shows it
        f"7f0000009000-7f000000a000 r--s 00000000 00:7e {stat.st_ino} /var/lib/rbee/another\n"
    )
    assert regions([file], maps) == [(0x7F0000000000, 0x2000), (0x7F0000007000, 0x1000)]
