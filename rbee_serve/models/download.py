"""Bring a model onto this machine: ``python -m rbee_serve.models.download --ref hf:org/repo:file --models-dir DIR``.

Runs on the node as user rbee in a transient unit, so it survives whoever asked for it. Progress goes to a file of JSON
lines (progress.py); the last one is ``complete`` with the catalog entry or ``failed`` with the error. Exit code 0 or 1.

A file is collected in ``NAME.gguf.partial``, whose lock the downloader holds while it lives, and takes its name only
when size and SHA-256 are right. What a broken download left is used by the next one (Range).

With ``--peer`` the bytes come from another machine of the fleet that has the model (share.py) instead of the hub. With
``--sent`` they have come already, into the partial files: the controller sent them (action rbee_send), and they are checked
and catalogued here like any others.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import functools
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, TypeVar

from rbee_serve.contract.errors import (
    ChecksumMismatch,
    DownloadFailed,
    DownloadTimeout,
    InsufficientDisk,
    InvalidModelRef,
    ModelAccessDenied,
    ModelFileInvalid,
    ModelNotFound,
    RbeeError,
)
from rbee_serve.models import share, store
from rbee_serve.models.catalog import Catalog, choose_files, digest, parse_ref, readable, ready
from rbee_serve.models.hub import Hub, RemoteFile, Source, TransientError
from rbee_serve.models.peer import Peer
from rbee_serve.models.progress import Meter, Progress
from rbee_serve.models.store import Entry, ModelRef

#: Pause between two looks at a download that another process runs.
_JOIN_INTERVAL_S = 0.2
#: Left free for the catalog and for rounding of the file system.
_DISK_RESERVE_BYTES = 1 << 20

_T = TypeVar("_T")


class _WrongDigestError(TransientError):
    """The file is whole and its digest is wrong; what there was of it is gone."""

    def __init__(self, message: str, file: str) -> None:
        super().__init__(message)
        self.file = file


@dataclass(frozen=True)
class Options:
    """Limits of a download; defaults are SPEC 3.8's.

    ``tries``: in all, the first included, so that five pauses lie between them: 100, 200, 400, 800, 1600 ms, each times
    0.5 to 1.5. The series ends at ``pause_max_s`` for whoever asks for more tries.
    """

    endpoint: str | None = None
    token: str | None = None
    tries: int = 6
    pause_s: float = 0.1
    pause_max_s: float = 3.2
    stall_timeout_s: float = 60.0
    bytes_per_s: int = 0  # 0: as fast as it goes
    roots: tuple[Path, ...] = ()  # besides the models directory: where file:/// references may point
    sha256: str | None = None  # digest that the model must have, whatever its source says
    peer: str | None = None  # address of a machine that shares the model
    peer_token: str | None = None
    sent: tuple[RemoteFile, ...] = ()  # what the controller has laid into ``home``
    home: Path | None = None


class Sent(Source):
    """Files that are here already, as partial ones; there is nowhere to ask for more of them."""

    def __init__(self, files: tuple[RemoteFile, ...]) -> None:
        super().__init__(stall_timeout_s=1.0)
        self._files = files

    def resolve(self, ref: ModelRef) -> list[RemoteFile]:
        """Return the files that were sent."""
        return list(self._files)

    @contextmanager
    def stream(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Raise DownloadFailed: what is missing has not been sent."""
        words = f"{file.name} has come as {offset} of {file.size_bytes} bytes"
        raise DownloadFailed(words, hint="repeat the command: it goes on where it stopped")
        yield 0, iter(())


def sent_file(text: str) -> RemoteFile:
    """Parse ``NAME:SIZE:SHA256`` of --sent; the digest may be empty. Raises ValueError."""
    name, size, digest = text.rsplit(":", 2)
    if "/" in name or not name.endswith(".gguf"):
        raise ValueError(f"{name!r} is no name of a model file")
    return RemoteFile(name, int(size), digest or None, "file:controller")


class Download:
    """One download into ``models_dir``. ``run`` may be called once."""

    def __init__(self, ref: str, models_dir: Path, options: Options, progress: Progress) -> None:
        self._ref = parse_ref(ref)
        self._catalog = Catalog(models_dir)
        self._options, self._progress = options, progress

    def run(self) -> tuple[Entry, bool]:
        """Return the entry, Ready, and whether anything had to be fetched. Raises RbeeError."""
        if (entry := self._catalog.find(self._ref)) and self._usable(entry):
            return entry, False  # no traffic at all (SPEC CAP-44)
        if self._options.sent:
            with closing(Sent(self._options.sent)) as sent:
                return self._fetched(sent)
        if self._options.peer:
            return self._from_peer(self._options.peer)
        if self._ref.kind == "id":
            known = [e["id"] for e in self._catalog.list()[0]]
            raise ModelNotFound(
                f"no model {self._ref.text!r} in the catalog, and only hf: and https:// references can be downloaded",
                hint="write hf:org/repo:file.gguf",
                known=known,
            )
        if self._ref.kind == "file":
            return register(self._ref, self._catalog, self._options.roots, self._progress, self._options.sha256), False
        stall = self._options.stall_timeout_s
        hub = self._ref.kind == "hf"
        source = Hub(self._options.endpoint, self._options.token, stall_timeout_s=stall) if hub else Source(stall_timeout_s=stall)
        with closing(source):
            return self._fetched(source)

    def _usable(self, entry: Entry | None) -> bool:
        """Return whether the model is here and has the digest that was asked for, if one was."""
        return entry is not None and entry["status"] == store.READY and self._options.sha256 in (None, entry.get("sha256"))

    def _from_peer(self, url: str) -> tuple[Entry, bool]:
        """Fetch from a machine that has it; its exact reference is what the model is catalogued under."""
        try:
            with closing(Peer(url, self._options.peer_token, stall_timeout_s=self._options.stall_timeout_s)) as peer:
                self._progress.line("resolving", f"asking {url} for {self._ref.text}")
                self._ref = parse_ref(Tries(self._options, self._progress).run(peer.reference))
                if self._ref.kind not in ("hf", "https"):
                    words = f"{url} has {self._ref.text}, which is not from a hub: its path means nothing here"
                    raise InvalidModelRef(words, hint="declare it in rbee_models with src: it is copied then")
                return self._fetched(peer)
        except (DownloadFailed, ModelNotFound, ModelAccessDenied) as e:
            if "path" in e.details:  # this machine could not write it down
                raise
            # The other machine's fault: a third one may give it.
            hint = "let the machines reach each other (rbee_model_share_port), or repeat with --via controller"
            if isinstance(e, ModelAccessDenied):
                hint = e.hint or hint
            raise type(e)(e.message, hint=hint, **{**e.details, "peer": url}) from e

    def _expected(self, remotes: list[RemoteFile]) -> None:
        """Raise ChecksumMismatch before any byte when the source offers another file than the one that was asked for."""
        told = [r.sha256 for r in remotes if r.sha256]
        if self._options.sha256 and len(told) == len(remotes) and store.digest_of_parts(told) != self._options.sha256:
            raise _other_file(self._ref.text, store.digest_of_parts(told), self._options.sha256)

    def _fetched(self, source: Source) -> tuple[Entry, bool]:
        tries = Tries(self._options, self._progress)
        self._progress.line("resolving", f"looking up {self._ref.text}")
        remotes = tries.run(lambda: source.resolve(self._ref))
        self._expected(remotes)
        home = self._options.home or self._catalog.models_dir / self._ref.org / self._ref.repo
        first = home / remotes[0].name
        reference = self._ref.text
        if self._ref.kind == "hf" and not self._options.sent:
            reference = f"hf:{self._ref.repo_id}:{store.set_name(remotes[0].name)}"
        old = self._catalog.find(parse_ref(reference))
        if old and self._usable(old):
            return old, False
        first.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(store.partial_path(first), sum(r.size_bytes for r in remotes)):
            # Whoever held the lock may have finished the very same model.
            old = self._catalog.find(parse_ref(reference))
            if old and self._usable(old):
                store.partial_path(first).unlink(missing_ok=True)
                return old, False
            parts = [{"path": str(home / r.name), "size_bytes": r.size_bytes, "sha256": r.sha256} for r in remotes]
            if old and not self._options.sent:
                before = {p["path"]: p.get("sha256") for p in store.parts(old)}
                for part in parts:
                    if before.get(part["path"]) != part["sha256"]:  # the hub has another version by now
                        with suppress(FileNotFoundError):
                            os.truncate(store.partial_path(Path(str(part["path"]))), 0)
            entry = self._catalog.new_entry(self._ref, reference, parts)
            return _Transfer(source, remotes, home, entry, self._catalog, tries, self._progress, self._options).run(), True

    @contextmanager
    def _lock(self, partial: Path, total: int) -> Iterator[None]:
        """Hold the partial file's lock; while another downloader of the same model has it, show how far that one is."""
        while True:
            with partial.open("a+b") as f:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._progress.line("waiting", f"another download of {partial.name} is running; waiting for it")
                    with Meter(self._progress, "downloading", f"{partial.name} (by another)", total) as meter:
                        while not _try_lock(f):
                            meter.at(_size(partial))
                            time.sleep(_JOIN_INTERVAL_S)
                # The other one may have renamed or removed the file that we now hold the lock of.
                try:
                    current = os.path.samestat(os.fstat(f.fileno()), partial.stat())
                except FileNotFoundError:
                    current = False
                if current:
                    yield
                    return


def _try_lock(f: IO[bytes]) -> bool:
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class _Transfer:
    """The files of one model, from ``source`` into ``home``; the caller holds the lock."""

    def __init__(
        self,
        source: Source,
        remotes: list[RemoteFile],
        home: Path,
        entry: Entry,
        catalog: Catalog,
        tries: Tries,
        progress: Progress,
        options: Options,
    ) -> None:
        self._source, self._remotes, self._home, self._entry = source, remotes, home, entry
        self._catalog, self._tries, self._progress = catalog, tries, progress
        self._total = sum(r.size_bytes for r in remotes)
        self._pace, self._sha256 = Pace(options.bytes_per_s), options.sha256

    def run(self) -> Entry:
        """Return the entry, Ready. Raises RbeeError."""
        finals = [self._home / r.name for r in self._remotes]
        partials = [store.partial_path(p) for p in finals]
        for partial in partials:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
        there = [self._there(f, r) for f, r in zip(finals, self._remotes, strict=True)]
        have = [r.size_bytes if t else _size(p) for p, r, t in zip(partials, self._remotes, there, strict=True)]
        try:
            check_disk(self._home, self._total - sum(have), self._entry["name"])
        except InsufficientDisk:
            if sum(have) == 0:
                self._drop(partials)
            raise
        self._catalog.put(self._entry, self._home)
        try:
            digests = []
            for number, (remote, partial) in enumerate(zip(self._remotes, partials, strict=True)):
                before = sum(r.size_bytes for r in self._remotes[:number])
                fetch = functools.partial(self._attempt, remote, partial, before)
                digests.append(there[number] or self._tries.run(fetch))
            if self._sha256 and store.digest_of_parts(digests) != self._sha256:
                raise _other_file(self._entry["reference"], store.digest_of_parts(digests), self._sha256)
            readable([f if t else p for f, p, t in zip(finals, partials, there, strict=True)], finals[0])
            # The first one last: its lock is what says that somebody is at work.
            for partial, final, whole in reversed(list(zip(partials, finals, there, strict=True))):
                if whole:
                    partial.unlink(missing_ok=True)
                else:
                    partial.chmod(0o644)
                    partial.replace(final)
            entry = ready(self._entry, digests, source_url=self._remotes[0].origin or self._remotes[0].url)
        except BaseException as e:
            if isinstance(e, InsufficientDisk) or (isinstance(e, ChecksumMismatch) and "file" not in e.details):
                self._drop(partials)
            elif isinstance(e, ChecksumMismatch):  # of one file: the other parts of a split model are as good as before
                self._drop([p for p in partials if _size(p) == 0])
            if isinstance(e, ModelFileInvalid):
                self._drop([f if t else p for f, p, t in zip(finals, partials, there, strict=True)])
            with suppress(OSError):  # a full disk may refuse this as well; the reader then says "interrupted"
                failed = {**self._entry, "status": store.FAILED, "problem": str(e) or type(e).__name__}
                self._catalog.put(failed, self._home)
            raise
        self._catalog.put(entry, self._home)
        return entry

    def _there(self, final: Path, remote: RemoteFile) -> str | None:
        """Return the digest of a file that has its name already and is right: a crash came before its entry was written."""
        if remote.sha256 is None or _size(final) != remote.size_bytes:
            return None
        with Meter(self._progress, "verifying", remote.name, remote.size_bytes) as meter:
            if digest(final, meter.at) == remote.sha256:
                return remote.sha256
        return None  # of another version: it stays, for whoever has it open or starts, until its successor is whole

    @staticmethod
    def _drop(paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def _attempt(self, remote: RemoteFile, partial: Path, before: int) -> str:
        """Fetch what is missing of one file and verify the whole of it; returns the digest."""
        with partial.open("r+b", buffering=0) as f:
            offset = f.seek(0, os.SEEK_END)
            if offset > remote.size_bytes:
                offset = f.truncate(0)
            if offset < remote.size_bytes:
                if offset:
                    share = 100 * offset // remote.size_bytes
                    words = f"resuming {remote.name} from {share} % ({offset / 1e6:.1f} MB are here)"
                    self._progress.line("resuming", words, bytes_downloaded=before + offset, bytes_total=self._total)
                try:
                    with self._source.stream(remote, offset) as (start, chunks):
                        self._receive(f, start, chunks, remote, before)
                except TransientError as e:
                    if e.restart:
                        f.truncate(0)
                    raise
                except OSError as e:
                    if e.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise _no_space(partial.parent, remote.size_bytes - offset, remote.name) from e
                    raise DownloadFailed(f"{partial}: {e.strerror}", path=str(partial)) from e
            os.fsync(f.fileno())
        with Meter(self._progress, "verifying", remote.name, remote.size_bytes) as meter:
            sha256 = digest(partial, meter.at)
        if remote.sha256 and sha256 != remote.sha256:
            os.truncate(partial, 0)
            raise _WrongDigestError(f"SHA-256 of {remote.name} is {sha256}, expected {remote.sha256}", remote.name)
        return sha256

    def _receive(self, f: FileIO, start: int, chunks: Iterator[bytes], remote: RemoteFile, before: int) -> None:
        f.truncate(start)
        done = f.seek(start)
        self._pace.begin()
        with Meter(self._progress, "downloading", remote.name, self._total, before + done) as meter:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[f.write(view) or 0 :]
                done += len(chunk)
                if done > remote.size_bytes:
                    f.truncate(0)
                    raise TransientError(f"more than the {remote.size_bytes} bytes that {remote.name} has")
                meter.at(before + done)
                self._pace.wait(len(chunk))
        if done < remote.size_bytes:
            raise TransientError(f"the connection ended at {done} of {remote.size_bytes} bytes")


class Pace:
    """Keeps a transfer at or below a rate, in bytes a second; 0 is no limit (SPEC E-16)."""

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._began, self._passed = 0.0, 0

    def begin(self) -> None:
        """Count from now on: what was missed while nothing came is not made up for."""
        self._began, self._passed = time.monotonic(), 0

    def wait(self, count: int) -> None:
        """Let ``count`` more bytes pass."""
        self._passed += count
        if self._rate:
            time.sleep(max(0.0, self._began + self._passed / self._rate - time.monotonic()))


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
                step = min(self._options.pause_s * 2 ** (self._number - 1), self._options.pause_max_s)
                pause = step * random.uniform(0.5, 1.5)  # noqa: S311
                self._number += 1
                self._progress.line(
                    "retrying",
                    f"{e}; attempt {self._number}/{total} in {pause:.1f} s",
                    attempt=self._number,
                    attempts=total,
                    pause_s=round(pause, 3),
                )
                self._sleep(pause)

    def _sleep(self, pause_s: float) -> None:
        """Wait, saying so once a second (N-05)."""
        end = time.monotonic() + pause_s
        while (left := end - time.monotonic()) > 1.0:
            time.sleep(1.0)
            words = f"attempt {self._number}/{self._options.tries} in {left - 1.0:.1f} s"
            self._progress.line("retrying", words, attempt=self._number, attempts=self._options.tries)
        time.sleep(max(0.0, left))


def _final(e: TransientError, tries: int) -> DownloadFailed:
    """Return what a download fails with when its last try failed with ``e``."""
    message = f"{e} (try {tries} of {tries}, the last)"
    if isinstance(e, _WrongDigestError):
        hint = "the copy there is damaged: try later, or another quantisation"
        return ChecksumMismatch(message, hint=hint, tries=tries, file=e.file)
    kind = DownloadTimeout if e.stalled else DownloadFailed
    return kind(message, hint="repeat the command: it goes on where it stopped", tries=tries)


def _other_file(what: str, got: str, expected: str) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"SHA-256 of {what} is {got}, expected {expected}",
        hint="correct sha256 in rbee_models, or name another file",
        got=got,
        expected=expected,
    )


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


def register(ref: ModelRef, catalog: Catalog, roots: tuple[Path, ...], progress: Progress, sha256: str | None = None) -> Entry:
    """Catalog a file that is already on this machine: beneath the models directory or one of ``roots``.

    Raises InvalidModelRef (outside of them), ModelFileInvalid (missing, no GGUF), ChecksumMismatch (another than ``sha256``).
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
    found = [p for p in sorted(path.parent.glob("*.gguf")) if store.set_name(p.name) == store.set_name(path.name)]
    names = choose_files(ModelRef(ref.text, "hf", "local", path.parent.name, path.name), [p.name for p in found])
    paths = [path.with_name(n) for n in names]
    entry = catalog.new_entry(ref, ref.text, [{"path": str(p), "size_bytes": p.stat().st_size, "sha256": None} for p in paths])
    digests = []
    for path in paths:
        with Meter(progress, "verifying", path.name, path.stat().st_size) as meter:
            digests.append(digest(path, meter.at))
    entry = ready(entry, digests)
    if sha256 is not None and entry["sha256"] != sha256:
        raise _other_file(ref.text, entry["sha256"], sha256)
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
    """Run from the command line; the token comes from the credential, standard input or the environment, never from here."""
    parser = argparse.ArgumentParser(prog="python -m rbee_serve.models.download", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ref", required=True, help="hf:org/repo[:file or quantisation], or file:///path.gguf")
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--root", type=Path, action="append", default=[], help="another directory that file:/// may point into")
    parser.add_argument("--progress-file", type=Path)
    parser.add_argument("--endpoint", help="address of the hub; default: $HF_ENDPOINT, else the public one")
    parser.add_argument("--token-stdin", action="store_true", help="the hub's token comes over standard input")
    parser.add_argument("--tries", type=int, default=Options.tries)
    parser.add_argument("--pause-s", type=float, default=Options.pause_s)
    parser.add_argument("--stall-timeout-s", type=float, default=Options.stall_timeout_s)
    parser.add_argument("--bytes-per-s", type=int, default=0, help="rate limit; 0: none")
    parser.add_argument("--sha256", help="digest that the model must have")
    parser.add_argument("--sent", type=sent_file, action="append", default=[], metavar="NAME:SIZE:SHA256", help="is here already")
    parser.add_argument("--home", type=Path, help="folder of the files that were sent, ORG/REPO beneath the models directory")
    parser.add_argument("--peer", metavar="URL", help="fetch from this machine of the fleet, which shares the model")
    args = parser.parse_args(argv)
    options = Options(
        endpoint=args.endpoint,
        token=sys.stdin.read().strip() if args.token_stdin else token_from(os.environ),
        tries=1 if args.sent else args.tries,  # nothing gets better by looking again
        pause_s=args.pause_s,
        stall_timeout_s=args.stall_timeout_s,
        bytes_per_s=args.bytes_per_s,
        roots=tuple(args.root),
        sha256=args.sha256,
        peer=args.peer,
        peer_token=share.token_from(os.environ) if args.peer else None,
        sent=tuple(args.sent),
        home=args.home,
    )
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
