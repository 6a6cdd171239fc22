"""What ``ansible-inventory`` said last, for as long as nothing that it reads has changed: starting it takes half a second.

One file an inventory in ``<cache>/inventories/`` (0600 in 0700), replaced in one step. It holds when size, times and inode of
every file that Ansible reads for the inventory are the same, and which files those are: the inventory itself (a folder with all
that is in it), ``group_vars`` and ``host_vars`` beside it, ansible.cfg. Never kept: what a program or a plugin answers, which
may change by itself; anything where one of the files holds a vault; and what has been changed within the last two seconds,
since clocks of file systems are coarse. Whatever is wrong with the cache, Ansible is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rbee_ctl import content
from rbee_serve import __version__

FOLDER = "inventories"
#: More files than this are not looked at one by one each time.
FILES_MAX = 1000
#: Seconds that a file must have been left alone before what it says is kept.
SETTLED_S = 2.0
_PLUGIN = re.compile(rb"(?m)^plugin\s*:")
_VAULT = b"$ANSIBLE_VAULT"

#: Path -> what changes when the file does; for a folder, that it is there.
Stamp = dict[str, list[int]]


def stamp(inventory: Path) -> Stamp | None:
    """Return what the answer depends on; None where it depends on more than files, or on too many."""
    found: Stamp = {}
    for path in _files(inventory):
        try:
            seen = path.stat()
        except OSError:
            return None
        if path.is_symlink() and (path == inventory or path.is_dir()):
            return None  # what lies behind it is read as well
        if (path == inventory or inventory in path.parents) and path.is_file() and os.access(path, os.X_OK):
            return None
        times = [] if path.is_dir() else [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]
        found[str(path)] = [seen.st_dev, seen.st_ino, *times]
        if len(found) > FILES_MAX:
            return None
    return found


def read(inventory: Path, now: Stamp) -> dict[str, Any] | None:
    """Return what was kept for this inventory, None when anything differs."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        path = _place(inventory)
        seen = path.stat()
        if seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["by"] == _by() and kept["stamp"] == now and isinstance(kept["said"], dict):
            return dict(kept["said"])
    return None


def keep(inventory: Path, before: Stamp, said: dict[str, Any]) -> None:
    """Keep what Ansible ``said`` when the files were as ``before``, if it may be kept and the cache can be written."""
    with contextlib.suppress(OSError):
        if stamp(inventory) != before or not _settled(before) or not _plain(before):
            return
        path = _place(inventory)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)  # 0600
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as f:
                json.dump({"by": _by(), "stamp": before, "said": said}, f)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _files(inventory: Path) -> Iterator[Path]:
    yield inventory
    if (config := content.ansible_cfg()) is not None:
        yield config
    beside = inventory if inventory.is_dir() else inventory.parent
    for root in [inventory] if inventory.is_dir() else [beside / "group_vars", beside / "host_vars"]:
        if root.is_dir():
            yield from sorted(root.rglob("*"))


def _settled(seen: Stamp) -> bool:
    newest = max((times[-1] for times in seen.values() if len(times) > 2), default=0)
    return time.time_ns() - newest > SETTLED_S * 1e9


def _plain(seen: Stamp) -> bool:
    """Say whether the files are text that says the same whenever it is read, without a vault."""
    for name, times in seen.items():
        if len(times) > 2:
            data = Path(name).read_bytes()
            if _VAULT in data or _PLUGIN.search(data):
                return False
    return True


def _by() -> list[str]:
    return [__version__, sys.prefix]


def _place(inventory: Path) -> Path:
    cache = Path(os.environ.get("RBEE_CACHE") or Path.home() / ".cache/rbee")
    return cache / FOLDER / f"{hashlib.sha256(os.fsencode(inventory.absolute())).hexdigest()[:32]}.json"
