#!/usr/bin/env python3
"""Collect every wheel that a node needs into one archive, once per content; print a JSON object about it.

    build_wheelhouse.py --plan          {"version", "archive", "present"}; builds and writes nothing
    build_wheelhouse.py                 the same, after building what is not there
    build_wheelhouse.py --controller D  the same, with the wheels of rbee-ctl in folder D, for a bundle
    build_wheelhouse.py --ctl           the same with the archive that rbee-ctl needs, "ctl_archive"

The archive holds the wheel of this checkout (or of the installation or the Ansible collection that this file is part of), the
llama-cpp-python wheel, all they need in the exact versions of requirements/constraints.txt, and requirements-{queen,worker}.txt.
Its version, ``<rbee version>-<8 hex digits>``, follows from the inputs (rbee's files, constraints, Python, llama wheel), so that
it is known before anything is built and the same inputs always mean the same runtime. Standard library only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import build_llama_wheel as llama

RUNTIMES = ("queen", "worker")
#: What no node needs has an archive of its own: rbee-ctl with Ansible, for a queen that runs jobs.
CTL_RUNTIMES = ("ctl",)
#: Archives kept in the cache, 40 MB each.
KEEP = 8
#: An archive that was asked for within so many seconds may be needed by a run that still goes on.
IN_USE_S = 4 * 3600


def installed(source: Path) -> metadata.Distribution | None:
    """Return rbee as installed for this interpreter when ``source`` is the data inside that installation."""
    if (source / "pyproject.toml").is_file() or shipped(source):
        return None
    try:
        return metadata.distribution("rbee")
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{source} is no checkout of rbee, and {sys.executable} has no rbee installed") from None


def shipped(source: Path) -> Path | None:
    """Return the wheel that lies in ``source`` when that is the Ansible collection."""
    return None if (source / "pyproject.toml").is_file() else next(source.glob("wheel/rbee-*.whl"), None)


def installed_files(rbee: metadata.Distribution) -> list[metadata.PackagePath]:
    """Return the files of the wheel that rbee was installed from: no scripts, nothing that pip or Python added."""
    added = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}
    found = [f for f in rbee.files or [] if ".." not in f.parts and "__pycache__" not in f.parts and f.name not in added]
    return sorted(found)


def checkout_files(source: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of the wheel that this checkout makes, under the names that they have there (pyproject.toml says which)."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    for origin, name in [*((p, p) for p in wheel["packages"]), *wheel["force-include"].items()]:
        top = source / origin
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            within = path.relative_to(top).parts
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in within):
                yield "/".join((name, *within)), path


def files(source: Path) -> dict[str, bytes]:
    """Return what rbee's own wheel holds but for its metadata: the same for a checkout, its wheel, and what is made of that."""
    if (wheel := shipped(source)) is not None:
        found = wheel_files(wheel)
    elif (rbee := installed(source)) is not None:
        found = {str(f): Path(str(f.locate())).read_bytes() for f in installed_files(rbee)}
    else:
        found = {name: path.read_bytes() for name, path in checkout_files(source)}
    return {name: data for name, data in found.items() if ".dist-info/" not in name}


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """Return a wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}


def sources_key(source: Path) -> str:
    """Digest of rbee alone: equal on machines that differ in everything else. Its version is a file of it, its needs are too."""
    digest = hashlib.sha256()
    for name, data in sorted(files(source).items()):
        digest.update(f"\n{name}\n{len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def input_key(sources: str) -> str:
    """Digest of everything that decides what the wheels are."""
    return hashlib.sha256(f"{sys.version_info[:2]} {llama.cache_key()} {sources}".encode()).hexdigest()


def constraints(source: Path) -> Path:
    """Return the exact versions of everything."""
    return source / "requirements/constraints.txt"


def controller_wheels(source: Path, archive: Path, python: str, folder: Path) -> None:
    """Put the wheels of rbee-ctl and all that it needs into ``folder``."""
    with tempfile.TemporaryDirectory(prefix=".wheelhouse-", dir=archive.parent) as scratch:
        with tarfile.open(archive) as tar:
            own = next(m for m in tar.getmembers() if m.name.startswith("rbee-"))
            rbee = Path(scratch, own.name)
            # Debian 12's Python has no extraction filters.
            with tar.extractfile(own) as wheel, rbee.open("wb") as copy:
                shutil.copyfileobj(wheel, copy)
        limits = ("--constraint", str(constraints(source)))
        pip(python, "download", "--quiet", "--only-binary", ":all:", *limits, "--dest", str(folder), f"{rbee}[ctl]")


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
    """Return the version in pyproject.toml, or of the wheel or installation."""
    if (wheel := shipped(source)) is not None:
        return wheel.name.split("-")[1]
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
        if (ready := shipped(source)) is not None:
            built.mkdir()
            rbee = Path(shutil.copy(ready, built))
        elif (distribution := installed(source)) is not None:
            rbee = repack(distribution, built)
        else:
            pip(python, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(source))
            rbee = next(built.glob("rbee-*.whl"))
        for runtime in runtimes:
            resolved = Path(scratch, runtime)
            links = ("--find-links", str(built), "--find-links", str(llama_wheel.parent), "--find-links", str(wheels))
            limits = ("--constraint", str(constraints(source)))
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
    """Keep the archives that were used last, and what another checkout's run may be sending: each change of sources makes one."""
    archives = sorted(newest.parent.glob("*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in archives[KEEP:]:
        if time.time() - old.stat().st_mtime < IN_USE_S:
            continue
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
    sources = sources_key(options.source)
    key = input_key(sources)
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
    if not options.plan:
        for used in (main_archive, ctl_archive):
            with contextlib.suppress(OSError):  # not there, or somebody else's
                os.utime(used)
    if options.controller:
        controller_wheels(options.source, archive, options.python, options.controller)
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
