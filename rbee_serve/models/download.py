"""Bring a model onto this machine: ``python -m rbee_serve.models.download --ref hf:org/repo:file --models-dir DIR``.

Runs on the node as user rbee in a transient unit, so it survives whoever asked for it. Progress goes to a file of JSON
lines (progress.py); the last one is ``complete`` with the catalog entry or ``failed`` with the error. Exit code 0 or 1.

A file is collected in ``NAME.gguf.partial``, whose lock the downloader holds while it lives, and takes its name only
when size and SHA-256 are right. What a broken download left is used by the next one (Range).
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

from rbee_serve.contract.errors import (
    ChecksumMismatch,
    DownloadFailed,
    DownloadTimeout,
    InsufficientDisk,
    InvalidModelRef,
    ModelFileInvalid,
    ModelNotFound,
    RbeeError,
)
from rbee_serve.models import store
from rbee_serve.models.catalog import Catalog, digest, parse_ref, ready
from rbee_serve.models.hub import Hub, RemoteFile, TransientError
from rbee_serve.models.progress import Meter, Progress
from rbee_serve.models.store import Entry, ModelRef

#: Left free for the catalog and for rounding of the file system.
_DISK_RESERVE_BYTES = 1 << 20

_T = TypeVar("_T")


class _WrongDigestError(TransientError):
    """The file is whole and its digest is wrong; what there was of it is gone."""


@dataclass(frozen=True)
class Options:
    """Limits of a download; defaults are SPEC 3.8's."""

    endpoint: str | None = None
    token: str | None = None
    tries: int = 6
    pause_s: float = 0.1  # doubled with each try, times 0.5 to 1.5
    stall_timeout_s: float = 60.0
    roots: tuple[Path, ...] = ()  # besides the models directory: where file:/// references may point


class Download:
    """One download into ``models_dir``. ``run`` may be called once."""

    def __init__(self, ref: str, models_dir: Path, options: Options, progress: Progress) -> None:
        self._ref = parse_ref(ref)
        self._catalog = Catalog(models_dir)
        self._options, self._progress = options, progress

    def run(self) -> tuple[Entry, bool]:
        """Return the entry, Ready, and whether anything had to be fetched. Raises RbeeError."""
        if (entry := self._catalog.find(self._ref)) and entry["status"] == store.READY:
            return entry, False  # no traffic at all (SPEC CAP-44)
        if self._ref.kind == "id":
            known = [e["id"] for e in self._catalog.list()[0]]
            raise ModelNotFound(
                f"no model {self._ref.text!r} in the catalog, and only hf: references can be downloaded",
                hint="write hf:org/repo:file.gguf",
                known=known,
            )
        if self._ref.kind == "file":
            return register(self._ref, self._catalog, self._options.roots), False
        hub = Hub(self._options.endpoint, self._options.token, stall_timeout_s=self._options.stall_timeout_s)
        try:
            return self._from_hub(hub)
        finally:
            hub.close()

    def _from_hub(self, hub: Hub) -> tuple[Entry, bool]:
        tries = Tries(self._options, self._progress)
        self._progress.line("resolving", f"looking up {self._ref.text}")
        remote = tries.run(lambda: hub.resolve(self._ref))
        home = self._catalog.models_dir / self._ref.org / self._ref.repo
        path = home / remote.name
        old = self._catalog.find(parse_ref(f"hf:{self._ref.repo_id}:{remote.name}"))
        if old and old["status"] == store.READY:
            return old, False
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(store.partial_path(path)):
            # Whoever held the lock may have finished the very same file.
            old = self._catalog.find(parse_ref(f"hf:{self._ref.repo_id}:{remote.name}"))
            if old and old["status"] == store.READY:
                store.partial_path(path).unlink(missing_ok=True)
                return old, False
            if old and old.get("sha256") != remote.sha256:
                os.truncate(store.partial_path(path), 0)  # the hub has another version by now
            return self._fetch(hub, remote, path, home, tries), True

    def _fetch(self, hub: Hub, remote: RemoteFile, path: Path, home: Path, tries: Tries) -> Entry:
        partial = store.partial_path(path)
        try:
            check_disk(path.parent, remote.size_bytes - partial.stat().st_size, remote.name)
        except InsufficientDisk:
            if partial.stat().st_size == 0:
                partial.unlink()
            raise
        entry = self._catalog.new_entry(self._ref, remote.name, path, size_bytes=remote.size_bytes, sha256=remote.sha256)
        self._catalog.put(entry, home)
        try:
            sha256 = tries.run(lambda: self._attempt(hub, remote, partial))
            partial.chmod(0o644)
            partial.replace(path)
            entry = ready(entry, sha256, source_url=remote.url)
        except BaseException as e:
            if isinstance(e, InsufficientDisk | ChecksumMismatch):
                partial.unlink(missing_ok=True)
            if isinstance(e, ModelFileInvalid):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # a full disk may refuse this as well; the reader then says "interrupted"
                self._catalog.put({**entry, "status": store.FAILED, "problem": str(e) or type(e).__name__}, home)
            raise
        self._catalog.put(entry, home)
        return entry

    def _attempt(self, hub: Hub, remote: RemoteFile, partial: Path) -> str:
        """Fetch what is missing and verify the whole; returns the digest."""
        with partial.open("r+b", buffering=0) as f:
            offset = f.seek(0, os.SEEK_END)
            if offset > remote.size_bytes:
                offset = f.truncate(0)
            if offset < remote.size_bytes:
                try:
                    with hub.stream(remote, offset) as (start, chunks):
                        self._receive(f, start, chunks, remote)
                except TransientError as e:
                    if e.restart:
                        f.truncate(0)
                    raise
                except OSError as e:
                    if e.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise _no_space(partial.parent, remote.size_bytes - offset, remote.name) from e
                    raise DownloadFailed(f"{partial}: {e.strerror}", path=str(partial)) from e
            os.fsync(f.fileno())
        meter = Meter(self._progress, "verifying", remote.name, remote.size_bytes)
        sha256 = digest(partial, meter.at)
        if remote.sha256 and sha256 != remote.sha256:
            os.truncate(partial, 0)
            raise _WrongDigestError(f"SHA-256 of {remote.name} is {sha256}, the hub says {remote.sha256}")
        return sha256

    def _receive(self, f: FileIO, start: int, chunks: Iterator[bytes], remote: RemoteFile) -> None:
        f.truncate(start)
        done = f.seek(start)
        meter = Meter(self._progress, "downloading", remote.name, remote.size_bytes, done)
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[f.write(view) or 0 :]
            done += len(chunk)
            if done > remote.size_bytes:
                f.truncate(0)
                raise TransientError(f"more than the {remote.size_bytes} bytes that {remote.name} has")
            meter.at(done)
        if done < remote.size_bytes:
            raise TransientError(f"the connection ended at {done} of {remote.size_bytes} bytes")

    @contextmanager
    def _lock(self, partial: Path) -> Iterator[None]:
        """Hold the partial file's lock, waiting for another downloader of the same model."""
        while True:
            with partial.open("a+b") as f:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._progress.line("waiting", f"another download of {partial.name} is running; waiting for it")
                    fcntl.flock(f, fcntl.LOCK_EX)
                # The other one may have renamed or removed the file that we now hold the lock of.
                try:
                    current = os.path.samestat(os.fstat(f.fileno()), partial.stat())
                except FileNotFoundError:
                    current = False
                if current:
                    yield
                    return


class Tries:
    """The tries of one download: six in all, whatever fails in them, with growing pauses between (SPEC 3.8)."""

    def __init__(self, options: Options, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._number = 1

    def run(self, attempt: Callable[[], _T]) -> _T:
        """Return what ``attempt`` returns; tries again after a TransientError until the tries are used up.

        Raises DownloadTimeout, ChecksumMismatch or DownloadFailed by what went wrong last, and what ``attempt`` raises.
        """
        while True:
            try:
                return attempt()
            except TransientError as e:
                total = self._options.tries
                if self._number >= total:
                    raise _final(e, total) from e
                pause = self._options.pause_s * 2 ** (self._number - 1) * random.uniform(0.5, 1.5)  # noqa: S311
                self._number += 1
                self._progress.line(
                    "retrying",
                    f"{e}; attempt {self._number}/{total} in {pause:.1f} s",
                    attempt=self._number,
                    attempts=total,
                    pause_s=round(pause, 3),
                )
                time.sleep(pause)


def _final(e: TransientError, tries: int) -> DownloadFailed:
    """Return what a download fails with when its last try failed with ``e``."""
    message = f"{e} (try {tries} of {tries}, the last)"
    if isinstance(e, _WrongDigestError):
        return ChecksumMismatch(message, hint="the hub's copy is damaged: try later, or another quantisation", tries=tries)
    kind = DownloadTimeout if e.stalled else DownloadFailed
    return kind(message, hint="repeat the command: it goes on where it stopped", tries=tries)


def check_disk(directory: Path, needed_bytes: int, name: str) -> None:
    """Raise InsufficientDisk unless ``needed_bytes`` more fit (SPEC S-40)."""
    if shutil.disk_usage(directory).free < needed_bytes + _DISK_RESERVE_BYTES:
        raise _no_space(directory, needed_bytes, name)


def _no_space(directory: Path, needed_bytes: int, name: str) -> InsufficientDisk:
    free = shutil.disk_usage(directory).free
    missing = max(0, needed_bytes + _DISK_RESERVE_BYTES - free)
    return InsufficientDisk(
        f"{name} needs {needed_bytes / 1e6:.1f} MB more in {directory}, {free / 1e6:.1f} MB are free",
        hint=f"free {missing / 1e6:.1f} MB ('rbee-ctl model list', 'rbee-ctl model delete ID') or choose a smaller quantisation",
        required_bytes=needed_bytes,
        available_bytes=free,
        to_free_bytes=missing,
    )


def register(ref: ModelRef, catalog: Catalog, roots: tuple[Path, ...]) -> Entry:
    """Catalog a file that is already on this machine: beneath the models directory or one of ``roots``.

    Raises InvalidModelRef (outside of them), ModelFileInvalid (missing, no GGUF).
    """
    path = Path(ref.path)
    allowed = [catalog.models_dir, *roots]
    try:
        real = path.resolve(strict=True)
    except OSError as e:
        raise ModelFileInvalid(f"{path}: {e.strerror}", hint="give the path of a file on the node", path=str(path)) from None
    if not any(real.is_relative_to(root.resolve()) for root in allowed):
        raise InvalidModelRef(
            f"{path} lies outside the directories that models may be in: {', '.join(map(str, allowed))}",
            hint=f"move it beneath {catalog.models_dir}",
            roots=[str(r) for r in allowed],
        )
    entry = catalog.new_entry(ref, path.name, path, size_bytes=path.stat().st_size, sha256=None)
    entry = ready(entry, digest(path))
    catalog.put(entry, catalog.models_dir / "local" / entry["id"])
    return entry


def token_from(environ: Mapping[str, str]) -> str | None:
    """Return the hub token: the credential ``hf-token`` of the unit, else ``HF_TOKEN``; None for neither."""
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        path = Path(directory) / "hf-token"
        if path.is_file() and (token := path.read_text(encoding="utf-8").strip()):
            return token
    return environ.get("HF_TOKEN", "").strip() or None


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the token comes from the credential or the environment, never from here."""
    parser = argparse.ArgumentParser(prog="python -m rbee_serve.models.download", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ref", required=True, help="hf:org/repo[:file or quantisation], or file:///path.gguf")
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--root", type=Path, action="append", default=[], help="another directory that file:/// may point into")
    parser.add_argument("--progress-file", type=Path)
    parser.add_argument("--endpoint", help="address of the hub; default: $HF_ENDPOINT, else the public one")
    parser.add_argument("--tries", type=int, default=Options.tries)
    parser.add_argument("--pause-s", type=float, default=Options.pause_s)
    parser.add_argument("--stall-timeout-s", type=float, default=Options.stall_timeout_s)
    args = parser.parse_args(argv)
    options = Options(args.endpoint, token_from(os.environ), args.tries, args.pause_s, args.stall_timeout_s, tuple(args.root))
    progress = Progress(args.progress_file)
    try:
        entry, downloaded = Download(args.ref, args.models_dir, options, progress).run()
    except RbeeError as e:
        progress.line("failed", e.message, **e.envelope()["error"])
        return 1
    except Exception as e:
        message = f"{type(e).__name__}: {e}"
        progress.line("failed", message, code=DownloadFailed.code, message=message, details={})
        raise
    else:
        words = "downloaded" if downloaded else "already there"
        human = f"{entry['id']} {words}: {entry['path']} ({entry['size_bytes'] / 1e6:.1f} MB)"
        progress.line("complete", human, local_path=entry["path"], downloaded=downloaded, model=entry)
        return 0
    finally:
        progress.close()


if __name__ == "__main__":
    sys.exit(main())
