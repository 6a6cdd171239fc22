"""The bundle: one tar file from which a fleet without internet is installed. Format, writing and checking; no fleet here.

    manifest.json    what is in it: files with size and SHA-256, models, what the wheels are for
    SHA256SUMS       for ``sha256sum -c``; also of manifest.json
    README.txt       the first commands on a machine that has nothing
    controller/      wheels of rbee-ctl and all that it needs
    nodes/           the archive of wheels that nodes install from (roles/rbee_wheels)
    models/SHA16/    model files, by the first 16 digits of the model's digest

Every byte follows from the contents: no times, owners or names of the machine that made it, members in the order of the
manifest. So two bundles of the same contents are equal, and whatever differs from what would be written is damage:
``read`` finds a flipped byte anywhere, a missing and an extra file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rbee_serve.contract.errors import BundleInvalid

FORMAT = 1
MANIFEST, SUMS, README = "manifest.json", "SHA256SUMS", "README.txt"
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_CHUNK = 1 << 20
_LONGEST_NAME = 250  # most file systems take 255
_LARGEST_MANIFEST = 16 << 20

OnBytes = Callable[[str, int, int], None]

_README = """An rbee bundle: everything that a fleet without internet is installed from.

On the machine that is to control the fleet (Linux on {machine}, Python {python} with venv):

    tar -xf {name} controller
    python3 -m venv ~/rbee
    ~/rbee/bin/pip install --no-index --find-links controller 'rbee[ctl]'
    ~/rbee/bin/rbee-ctl bundle verify {name}
    ~/rbee/bin/rbee-ctl bundle install {name} --inventory my.yml

The last one verifies, lays wheels and models where site.yml looks for them, and deploys the fleet of the inventory.
By hand: tar -xf {name} && sha256sum -c SHA256SUMS
"""


@dataclass(frozen=True)
class Source:
    """A file that goes in, under ``name``."""

    name: str
    path: Path


@dataclass
class Contents:
    """What a manifest says."""

    files: dict[str, tuple[int, str]]  # name -> size, SHA-256
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(size for size, _ in self.files.values())

    def manifest(self) -> bytes:
        """Return manifest.json."""
        files = [{"name": n, "size_bytes": size, "sha256": sha} for n, (size, sha) in sorted(self.files.items())]
        text = json.dumps({"format": FORMAT, **self.facts, "files": files}, indent=1, sort_keys=True, ensure_ascii=True)
        return (text + "\n").encode()

    def sums(self) -> bytes:
        """Return SHA256SUMS."""
        rows = {n: sha for n, (_, sha) in self.files.items()} | {MANIFEST: hashlib.sha256(self.manifest()).hexdigest()}
        return "".join(f"{sha}  {name}\n" for name, sha in sorted(rows.items())).encode()


def readme(name: str, facts: dict[str, Any]) -> bytes:
    """Return README.txt."""
    return _README.format(name=name, machine=facts["machine"], python=facts["python"]).encode()


def _silent(name: str, done: int, total: int) -> None:
    """Say nothing."""


def write(target: Path, sources: Iterable[Source], facts: dict[str, Any], on_bytes: OnBytes = _silent) -> Contents:
    """Write a bundle and return what is in it; nothing is left at ``target`` by a failure.

    Raises BundleInvalid where another run writes to it or a source changes meanwhile, OSError.
    """
    by_name = {s.name: s.path for s in sorted(sources, key=lambda s: s.name)}
    if long := [n for n in by_name if len(n.encode()) > _LONGEST_NAME]:
        raise BundleInvalid(f"names are too long for a bundle: {', '.join(long)}", hint="rename these model files")
    contents = Contents({}, facts)
    text = readme("rbee-bundle.tar", facts)
    contents.files[README] = len(text), hashlib.sha256(text).hexdigest()
    total = sum(p.stat().st_size for p in by_name.values())
    done = 0
    for name, path in by_name.items():
        contents.files[name] = path.stat().st_size, _digest(path)
        done += contents.files[name][0]
        on_bytes("reading", done, total)
    part = target.with_name(target.name + ".partial")
    with part.open("ab") as out:
        if not _alone(out, part):
            raise BundleInvalid(f"another run is writing {target}", hint="wait for it, or name another file")
        try:
            out.truncate(0)
            out.seek(0)
            for name, data in ((MANIFEST, contents.manifest()), (SUMS, contents.sums()), (README, text)):
                out.write(_header(name, len(data)) + data + bytes(-len(data) % _BLOCK))
            done = 0
            for name, path in by_name.items():
                size = contents.files[name][0]
                out.write(_header(name, size))
                if _copy(path, out) != contents.files[name]:
                    raise BundleInvalid(f"{path} has changed while the bundle was written", hint="repeat the command")
                out.write(bytes(-size % _BLOCK))
                done += size
                on_bytes("writing", done, total)
            end = out.tell() + 2 * _BLOCK
            out.write(bytes(2 * _BLOCK + -end % _RECORD))
            out.flush()
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    return contents


def _alone(out: IO[bytes], path: Path) -> bool:
    """Whether nobody else writes the file, and it has not become somebody's bundle since it was opened."""
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return path.exists() and path.stat().st_ino == os.fstat(out.fileno()).st_ino


def _copy(path: Path, out: IO[bytes]) -> tuple[int, str]:
    """Copy a file and return the size and SHA-256 of what was copied."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def read(path: Path, into: Path | None = None, on_bytes: OnBytes = _silent) -> Contents:
    """Check a whole bundle and return what is in it; with ``into`` its files are written below that folder on the way.

    Raises BundleInvalid naming the first file that is wrong, OSError.
    """
    with path.open("rb") as f:
        bundle = _Reader(path, f)
        contents = bundle.begin()
        done = 0
        for name, (size, sha256) in sorted(contents.files.items(), key=lambda item: (item[0] != README, item[0])):
            bundle.member(name, size, contents)
            target = into / name if into else None
            if target:
                target.parent.mkdir(parents=True, exist_ok=True)
            got = bundle.body(name, size, target)
            if got != sha256:
                raise bundle.error(f"{name} is damaged: its SHA-256 is {got}, the manifest says {sha256}", name)
            done += size
            on_bytes("verifying", done, contents.size_bytes)
        bundle.end(contents)
    return contents


class _Reader:
    """Reads a bundle from its start, block by block, and accepts nothing that ``write`` would not have written."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file

    def error(self, message: str, name: str | None = None) -> BundleInvalid:
        """Return what is wrong."""
        details = {"bundle": str(self._path), **({"file": name} if name else {})}
        return BundleInvalid(f"{self._path}: {message}", hint="bring the file again, or rbee-ctl bundle create", **details)

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise self.error("it ends too early: it was not copied whole")
        return data

    def _name(self) -> str | None:
        """Read a header; return its member's name, None at the end of the archive."""
        self._raw = self._take(_BLOCK)
        if not any(self._raw):
            return None
        info, name = self._info(), None
        if info.type == tarfile.GNUTYPE_LONGNAME:  # a name of more than 100 bytes comes first, as a member of its own
            if not 0 < info.size <= _LONGEST_NAME + 1:
                raise self.error(f"damaged at byte {self._file.tell() - _BLOCK}: a name of {info.size} bytes")
            name = self._take(info.size)
            before = self._raw + name + self._take(-info.size % _BLOCK)
            self._raw = self._take(_BLOCK)
            info = self._info()
            self._raw = before + self._raw
        self._size = info.size
        return info.name if name is None else name.rstrip(b"\0").decode(errors="replace")

    def _info(self) -> tarfile.TarInfo:
        try:
            return tarfile.TarInfo.frombuf(self._raw, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeError) as e:
            raise self.error(f"damaged at byte {self._file.tell() - _BLOCK}: {e}") from None

    def begin(self) -> Contents:
        """Read manifest and sums."""
        if self._name() != MANIFEST or self._size > _LARGEST_MANIFEST:
            raise self.error(f"is no bundle of rbee: it does not begin with {MANIFEST}")
        self._canonical(MANIFEST, self._size)
        raw = self._take(self._size)
        self._padding(self._size)
        contents = self._parsed(raw)
        sums = contents.sums()
        if self._name() != SUMS:
            raise self.error(f"{SUMS} is missing", SUMS)
        self._canonical(SUMS, len(sums))
        if self._take(len(sums)) != sums:
            raise self.error(f"{SUMS} and {MANIFEST} contradict each other: one of them is damaged", SUMS)
        self._padding(len(sums))
        return contents

    def _parsed(self, raw: bytes) -> Contents:
        try:
            data = json.loads(raw)
            files = {str(f["name"]): (int(f["size_bytes"]), str(f["sha256"])) for f in data.pop("files")}
            version = data.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise self.error(f"{MANIFEST} is damaged: {e}", MANIFEST) from None
        if version != FORMAT:
            raise self.error(f"format {version}, this rbee-ctl reads {FORMAT}", MANIFEST)
        if bad := [n for n in files if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts or n in (MANIFEST, SUMS)]:
            raise self.error(f"{MANIFEST} names {bad[0]!r}, which leads out of the bundle", MANIFEST)
        contents = Contents(files, data)
        if README not in files or contents.manifest() != raw:
            raise self.error(f"{MANIFEST} is damaged", MANIFEST)
        return contents

    def member(self, name: str, size: int, contents: Contents) -> None:
        """Expect this member's header."""
        found = self._name()
        if found != name:
            words = (
                f"{name} is missing" if found is None or found in contents.files else f"{found} is not in its list of contents"
            )
            raise self.error(words, name if found is None or found in contents.files else found)
        if self._size != size:
            raise self.error(f"{name} has {self._size} bytes, the manifest says {size}", name)
        self._canonical(name, size)

    def body(self, name: str, size: int, target: Path | None) -> str:
        """Return the SHA-256 of the member's bytes, which are written to ``target`` if there is one."""
        digest, left = hashlib.sha256(), size
        out = target.open("wb") if target else None
        try:
            while left:
                data = self._take(min(_CHUNK, left))
                digest.update(data)
                left -= len(data)
                if out:
                    out.write(data)
        finally:
            if out:
                out.close()
        self._padding(size)
        return digest.hexdigest()

    def end(self, contents: Contents) -> None:
        """Expect the end of the archive and nothing behind it."""
        if (extra := self._name()) is not None:
            words = "is in it twice" if extra in contents.files else "is not in its list of contents"
            raise self.error(f"{extra} {words}", extra)
        rest = self._file.read(2 * _RECORD)
        if any(rest) or len(rest) != _BLOCK + -(self._file.tell() - len(rest) + _BLOCK) % _RECORD:
            raise self.error("something is behind its end, or its end is missing")

    def _canonical(self, name: str, size: int) -> None:
        if self._raw != _header(name, size):
            raise self.error(f"the header of {name} is not what rbee writes: damaged, or packed by another program", name)

    def _padding(self, size: int) -> None:
        if any(self._take(-size % _BLOCK)):
            raise self.error(f"damaged at byte {self._file.tell()}")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid = size, 0o644, 0, 0, 0
    info.uname = info.gname = "root"
    return info.tobuf(tarfile.GNU_FORMAT)


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def models_of(contents: Contents) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Return each model with the names of its files."""
    for model in contents.facts.get("models", []):
        yield model, [str(name) for name in model["files"]]
