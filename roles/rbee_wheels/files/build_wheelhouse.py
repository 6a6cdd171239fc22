#!/usr/bin/env python3
"""Collect every wheel that a node needs into one archive, once per content; print a JSON object about it.

    build_wheelhouse.py --plan          {"version", "archive", "present"}; builds and writes nothing
    build_wheelhouse.py                 the same, after building what is not there
    build_wheelhouse.py --controller D  the same, with the wheels of rbee-ctl in folder D, for a bundle
    build_wheelhouse.py --ctl           the same with the archive that rbee-ctl needs, "ctl_archive"

The archive holds the wheel of this checkout (or of the installation that this file is part of), the llama-cpp-python wheel,
all they need in the exact versions of requirements/constraints.txt, and requirements-{queen,worker}.txt. Its version,
``<rbee version>-<8 hex digits>``, follows from the inputs (source files, constraints, Python, llama wheel), so that it is
known before anything is built and the same inputs always mean the same runtime. Standard library only.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).parent))
import build_llama_wheel as llama

SOURCES = ("rbee_serve", "rbee_ctl")
FILES = ("pyproject.toml", "README.md", "LICENSE", "requirements/constraints.txt")
RUNTIMES = ("queen", "worker")
#: What no node needs has an archive of its own: rbee-ctl with Ansible, for a queen that runs jobs.
CTL_RUNTIMES = ("ctl",)
#: Archives kept in the cache, 40 MB each.
KEEP = 8


def installed(source: Path) -> metadata.Distribution | None:
    """Return rbee as installed for this interpreter when ``source`` is no checkout but the data inside that installation."""
    if (source / "pyproject.toml").is_file():
        return None
    try:
        return metadata.distribution("rbee")
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{source} is no checkout of rbee, and {sys.executable} has no rbee installed") from None


def installed_files(rbee: metadata.Distribution) -> list[metadata.PackagePath]:
    """Return the files of the wheel that rbee was installed from: no scripts, nothing that pip or Python added."""
    added = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}
    found = [f for f in rbee.files or [] if ".." not in f.parts and "__pycache__" not in f.parts and f.name not in added]
    return sorted(found)


def source_files(source: Path) -> list[tuple[str, Path]]:
    """Return all files that decide what rbee's own wheel is, and their names."""
    if (rbee := installed(source)) is not None:
        return [(str(f), Path(str(f.locate()))) for f in installed_files(rbee)]
    paths = [source / f for f in FILES]
    for package in SOURCES:
        paths += sorted(p for p in (source / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [(str(p.relative_to(source)), p) for p in paths]


def input_key(source: Path) -> str:
    """Digest of everything that decides what the wheels are."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {llama.cache_key()}".encode())
    for name, path in source_files(source):
        digest.update(f"\n{name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sources_key(files: Iterable[tuple[str, bytes]]) -> str:
    """Digest of rbee's sources alone: equal on machines that differ in everything else."""
    digest = hashlib.sha256()
    for name, data in files:
        digest.update(f"\n{name}\n{len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def wheel_key(wheel: Path) -> str:
    """Return the ``sources_key`` of an rbee that is installed from this wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(PurePosixPath(n) for n in archive.namelist() if not n.endswith(("/", ".dist-info/RECORD")))
        return sources_key((str(name), archive.read(str(name))) for name in names)


def controller_wheels(source: Path, archive: Path, python: str, folder: Path) -> str:
    """Put the wheels of rbee-ctl and all that it needs into ``folder``; returns the ``wheel_key`` of rbee's own."""
    with tempfile.TemporaryDirectory(prefix=".wheelhouse-", dir=archive.parent) as scratch:
        with tarfile.open(archive) as tar:
            own = next(m for m in tar.getmembers() if m.name.startswith("rbee-"))
            tar.extract(own, scratch, filter="data")
        rbee = Path(scratch, own.name)
        limits = ("--constraint", str(source / "requirements/constraints.txt"))
        pip(python, "download", "--quiet", "--only-binary", ":all:", *limits, "--dest", str(folder), f"{rbee}[ctl]")
        return wheel_key(rbee)


def repack(rbee: metadata.Distribution, folder: Path) -> Path:
    """Write the wheel that rbee was installed from into ``folder`` again."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"rbee-{rbee.version}-py3-none-any.whl"
    rows = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in installed_files(rbee):
            data = Path(str(file.locate())).read_bytes()
            sha = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{file},sha256={sha},{len(data)}\n")
            archive.writestr(zipfile.ZipInfo(str(file), (1980, 1, 1, 0, 0, 0)), data)
        record = f"rbee-{rbee.version}.dist-info/RECORD"
        archive.writestr(zipfile.ZipInfo(record, (1980, 1, 1, 0, 0, 0)), "".join(rows) + f"{record},,\n")
    return wheel


def rbee_version(source: Path) -> str:
    """Return the version in pyproject.toml, or of the installation."""
    if (rbee := installed(source)) is not None:
        return rbee.version
    match = re.search(r'^version = "([^"]+)"', (source / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SystemExit(f"{source}/pyproject.toml has no version")
    return match[1]


def pip(python: str, *arguments: str) -> None:
    """Run pip; on failure its last lines are the message."""
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise SystemExit(f"pip {' '.join(arguments)}\n{tail}")


def requirements(wheels: Path, resolved: Path) -> str:
    """Return exact requirements for the wheels in ``resolved``, all of which are moved to ``wheels``."""
    lines = []
    for wheel in sorted(resolved.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        lines.append(f"{name}=={version}\n")
        wheel.replace(wheels / wheel.name)
    return "".join(sorted(lines))


def build(source: Path, cache: Path, archive: Path, python: str, runtimes: tuple[str, ...]) -> None:
    """Build ``archive`` and put it into place in one step."""
    command = [python, str(Path(llama.__file__)), "--cache", str(cache), "--python", python]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    llama_wheel = Path(done.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory(prefix=".wheelhouse-", dir=archive.parent) as scratch:
        built, wheels = Path(scratch, "built"), Path(scratch, "wheels")
        wheels.mkdir()
        if (distribution := installed(source)) is not None:
            rbee = repack(distribution, built)
        else:
            pip(python, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(source))
            rbee = next(built.glob("rbee-*.whl"))
        for runtime in runtimes:
            resolved = Path(scratch, runtime)
            links = ("--find-links", str(built), "--find-links", str(llama_wheel.parent), "--find-links", str(wheels))
            limits = ("--constraint", str(source / "requirements/constraints.txt"))
            # The platform's own wheels: the nodes are of the same kind (the role checks it), and nothing is compiled there.
            ready_made = ("--only-binary", ":all:", *links, *limits)
            pip(python, "download", "--quiet", *ready_made, "--dest", str(resolved), f"{rbee}[{runtime}]")
            (wheels / f"requirements-{runtime}.txt").write_text(requirements(wheels, resolved), encoding="utf-8")
        part = Path(scratch, "wheelhouse.tar")
        with tarfile.open(part, "w") as tar:
            for path in sorted(wheels.iterdir()):
                tar.add(path, arcname=path.name, filter=_anonymous)
        part.replace(archive)
    _forget_old(archive)


def _forget_old(newest: Path) -> None:
    """Keep the last few archives: each change of the sources makes one."""
    archives = sorted(newest.parent.glob("*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in archives[KEEP:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".lock").unlink(missing_ok=True)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = "root"
    member.mode = 0o644
    return member


def main() -> None:
    """Parse, plan, build when asked and needed, print JSON."""
    default_cache = os.environ.get("RBEE_CACHE") or str(Path.home() / ".cache/rbee")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).resolve().parents[3], help="checkout of rbee")
    parser.add_argument("--cache", type=Path, default=Path(default_cache), help="cache directory")
    parser.add_argument("--python", default=sys.executable, help="interpreter with pip, of the nodes' Python version")
    parser.add_argument("--ctl", action="store_true", help="the archive for rbee-ctl instead")
    parser.add_argument("--plan", action="store_true", help="build and write nothing")
    parser.add_argument("--controller", type=Path, metavar="DIR", help="put the wheels of rbee-ctl into this folder too")
    options = parser.parse_args()
    key = input_key(options.source)
    cache = options.cache.expanduser()
    main_archive, ctl_archive = (cache / "wheelhouses" / f"{key[:16]}{suffix}.tar" for suffix in ("", "-ctl"))
    archive, runtimes = (ctl_archive, CTL_RUNTIMES) if options.ctl else (main_archive, RUNTIMES)
    present = archive.is_file()
    if not present and not options.plan:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with archive.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not archive.is_file():
                build(options.source, cache, archive, options.python, runtimes)
    sources = [sources_key((name, path.read_bytes()) for name, path in source_files(options.source))]
    if options.controller:
        sources.append(controller_wheels(options.source, archive, options.python, options.controller))
    result = {
        "version": f"{rbee_version(options.source)}-{key[:8]}",
        "rbee_version": rbee_version(options.source),
        "archive": str(main_archive),
        "ctl_archive": str(ctl_archive),
        "present": present,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        # Which rbee-ctl may use this archive: one of the same sources and the same build of llama.cpp, on whatever machine.
        "sources": sources,
        "build": hashlib.sha256("\n".join((llama.VERSION, llama.CMAKE_HOOK, *llama.CMAKE_ARGS)).encode()).hexdigest()[:16],
        # What a runtime that is built on a node is built from and with.
        "llama": {"version": llama.VERSION, "cmake_args": " ".join(llama.CMAKE_ARGS), "cmake_hook": llama.CMAKE_HOOK},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
