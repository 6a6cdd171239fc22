"""Send files of a model from the controller to a node, piece by piece; see library/rbee_send.py."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from pathlib import Path

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

#: Left free for the catalog and for rounding of the file system.
RESERVE_BYTES = 1 << 20
#: Sizes of a piece; it grows until one takes about a second, so that there is a line a second and little time between pieces.
PIECE_MIN, PIECE_MAX = 1 << 20, 64 << 20
PIECE_S = 0.7
#: How long a broken connection is tried again, seconds.
LOST_S = 120.0
#: What the program on the node ends with.
BUSY, MOVED, WRITE_FAILED = 75, 76, 77

#: The shell that runs PROGRAM as $1, who owns the folder: root writes nothing there, so that a link which somebody plants
#: leads nobody further than its owner could go anyway.
AS_OWNER = """
cd / && PATH=$PATH:/usr/sbin:/sbin python=/usr/bin/python3 owner=$1 && shift
[ -x "$python" ] || python=python3
[ "$(id -un)" = "$owner" ] && exec "$python" -I -S -c "$@"
exec runuser -u "$owner" -- "$python" -I -S -c "$@"
"""

#: What runs on the node, under whichever Python 3 it has:
#:
#: look DEST NAME...                  make the folder; print {"free", "files": [[size, size of the partial]...]}, -1: not there
#: digest PATH                        print the SHA-256 of a file
#: begin LOCK PARTIAL SEEN DIGEST     if the partial has SEEN bytes still, keep them if that is their digest, else none; print
#:                                    how many. SEEN -1 only tries the lock
#: append LOCK PARTIAL OFFSET COUNT S write COUNT bytes of standard input behind the OFFSET bytes that the partial has; print its
#:                                    size. It ends after S seconds without a byte: the node is not told of a line that is cut
#: drop PATH                          remove a file
#:
#: LOCK is the partial of a model's first file, whose lock the downloader holds too.
PROGRAM = f"""
import fcntl, hashlib, json, os, select, stat, sys

def end(code, said):
    print(said)
    sys.exit(code)

def opened(path, flags):
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(path + " is no file")
    return fd

def hold(path, flags):
    while True:
        fd = opened(path, flags)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            end({BUSY}, "")
        try:
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # renamed or removed by whoever held it

def digest(file):
    sha = hashlib.sha256()
    for piece in iter(lambda: file.read(1 << 20), b""):
        sha.update(piece)
    return sha.hexdigest()

def size(path):
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1

def look(dest, *names):
    os.makedirs(dest, 0o755, exist_ok=True)
    room = os.statvfs(dest)
    files = [[size(os.path.join(dest, n)), size(os.path.join(dest, n + ".partial"))] for n in names]
    print(json.dumps({{"free": room.f_bavail * room.f_frsize, "files": files}}))

def begin(lock, partial, seen, expected):
    try:
        held = hold(lock, 0 if int(seen) < 0 else os.O_CREAT)
    except FileNotFoundError:
        end({MOVED}, -1)
    if int(seen) < 0:
        end({MOVED}, -1)
    with open(opened(partial, os.O_CREAT), "r+b") as file:
        now = os.fstat(file.fileno()).st_size
        if now != int(seen):
            end({MOVED}, now)
        if now and (not expected or digest(file) != expected):
            now = file.truncate(0)
    print(now)

def append(lock, partial, offset, count, silence):
    held = hold(lock, os.O_CREAT)
    fd = opened(partial, os.O_APPEND)
    now = os.fstat(fd).st_size
    if now != int(offset):
        end({MOVED}, now)
    left = int(count)
    while left and select.select([0], [], [], float(silence))[0]:
        data = os.read(0, min(left, 1 << 16))
        if not data:
            break
        left -= len(data)
        while data:
            data = data[os.write(fd, data):]
    print(os.fstat(fd).st_size)

os.umask(0o022)
try:
    {{
        "look": look,
        "begin": begin,
        "append": append,
        "digest": lambda path: print(digest(open(path, "rb"))),
        "drop": lambda path: os.path.lexists(path) and os.unlink(path),
    }}[sys.argv[1]](*sys.argv[2:])
except OSError as e:
    sys.stderr.write(str(e))
    sys.exit({WRITE_FAILED})
"""


class SendError(Exception):
    """What ends it, as ``rbee_error``."""

    def __init__(self, code, message, hint, **details):
        super().__init__(message)
        self.record = {"code": code, "message": message, "hint": hint, "details": details}


def whole_set(path):
    """Return all parts of the split model that the file belongs to, or the file alone; raises SendError."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    parts = [path.with_name(f"{match[1]}-{n:05}-of-{match[2]}.gguf") for n in range(1, int(match[2]) + 1)] if match else [path]
    if lacking := [p.name for p in parts if not p.is_file()]:
        words = f"{path.parent} on the controller has no {', '.join(lacking)}"
        raise SendError("MODEL_FILE_INVALID", words, "bring all parts of the model, or correct src", path=str(path))
    return parts


def digest(path, count=-1):
    """Return the SHA-256 of a file, or of its first ``count`` bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as f:
        while count and (piece := f.read(min(1 << 20, count) if count > 0 else 1 << 20)):
            sha.update(piece)
            count -= len(piece) if count > 0 else 0
    return sha.hexdigest()


class ActionModule(ActionBase):
    """The action ``rbee_send``."""

    _requires_connection = True
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("files", "dest", "owner", "sha256", "bytes_per_s", "silence_s", "wait_s"))

    def run(self, tmp=None, task_vars=None):
        """Return what was sent; see the documentation in library/rbee_send.py."""
        super().run(tmp, task_vars)
        spec = {
            "files": {"type": "list", "elements": "str", "required": True},
            "dest": {"type": "str", "required": True},
            "owner": {"type": "str", "default": "rbee"},
            "sha256": {"type": "str"},
            "bytes_per_s": {"type": "int", "default": 0},
            "silence_s": {"type": "float", "default": 60.0},
            "wait_s": {"type": "float", "default": 900.0},
        }
        _, args = self.validate_argument_spec(spec)
        if self._task.check_mode:
            return {"changed": True, "skipped": True}
        self._args, self._host = args, task_vars["inventory_hostname"]
        try:
            files = [Path(self._find_needle("files", name)) for name in args["files"]]
            return self._send(whole_set(files[0]) if len(files) == 1 else files)
        except SendError as e:
            words = f"{e.record['message']} [{e.record['code']}]; next: {e.record['hint']}"
            return {"failed": True, "changed": False, "msg": words, "rbee_error": e.record}

    def _send(self, files):
        self._lock = f"{self._args['dest']}/{files[0].name}.partial"
        sizes = {f: f.stat().st_size for f in files}
        self._expected = digests = self._digests(files)
        free, there = self._look(files)
        lacking = [f for f in files if there[f][0] != sizes[f] or not self._same(f)]
        begun = {f: there[f][1] for f in lacking if 0 < there[f][1] <= sizes[f]}
        missing = sum(sizes[f] - begun.get(f, 0) for f in lacking)
        if free < missing + RESERVE_BYTES:
            raise self._no_space(missing, free, files[0].name)
        sent, self._before, self._total = 0, 0, sum(sizes.values())
        self._said = time.monotonic(), None
        for file in files:
            if file in lacking:
                sent += self._file(file, sizes[file], there[file][1])
            self._before += sizes[file]
        told = [{"name": f.name, "size_bytes": sizes[f], "sha256": digests[f]} for f in files]
        return {"changed": sent > 0, "sent_bytes": sent, "files": told}

    def _digests(self, files):
        """Return the digest of each file; raises SendError when they are not the model that was asked for.

        That of one file is what was asked for, and is not read here: the node reads what has come.
        """
        known = self._args["sha256"]
        if known and len(files) == 1:
            return {files[0]: known}
        digests = {f: digest(f) for f in files}
        # Of a split model it is the digest of its parts' digests.
        if known and (got := hashlib.sha256("\n".join(digests.values()).encode()).hexdigest()) != known:
            words = f"SHA-256 of {files[0]} and its other parts is {got}, expected {known}"
            raise SendError("CHECKSUM_MISMATCH", words, "correct sha256 in rbee_models, or bring the files again", got=got)
        return digests

    def _same(self, file):
        """Return whether the node's file of that name, which has the right size, is that file."""
        display.display(f"rbee: {self._host}: a file {file.name} of that size is there; comparing")
        path = f"{self._args['dest']}/{file.name}"
        code, out, err = self._node("digest", path)
        if code != 0:
            raise SendError("DOWNLOAD_FAILED", err, f"let {self._args['owner']} read it, or remove it", path=path)
        return out.strip() == self._expected[file]

    def _look(self, files):
        """Return the free bytes there, and of each file (its size, that of its partial); -1: not there."""
        code, out, err = self._node("look", self._args["dest"], *(f.name for f in files))
        if code != 0:
            hint = f"let {self._args['owner']} own the folder, or correct rbee_hive_models_dir"
            raise SendError("DOWNLOAD_FAILED", f"{self._args['dest']}: {err}", hint, path=self._args["dest"])
        said = json.loads(out)
        return said["free"], {f: tuple(found) for f, found in zip(files, said["files"], strict=True)}

    def _file(self, file, size, seen):
        """Send what is missing of one file; returns the number of bytes."""
        partial = f"{self._args['dest']}/{file.name}.partial"
        sent, offset, piece = 0, self._begin(file, partial, size, seen), PIECE_MIN
        if rate := self._args["bytes_per_s"]:
            piece = max(1, min(piece, rate // 2))
        with file.open("rb") as f:
            while offset < size:
                began = time.monotonic()
                f.seek(offset)
                now = self._piece(partial, offset, f.read(min(piece, size - offset)), size)
                if now is None:  # somebody else is at it, or an earlier try whose line was cut
                    offset = self._begin(file, partial, size)
                    continue
                sent, offset = sent + now - offset, now
                took = time.monotonic() - began
                if rate:
                    time.sleep(max(0.0, piece / rate - took))
                elif took < PIECE_S:
                    piece = min(2 * piece, PIECE_MAX)
                elif took > 2 * PIECE_S:
                    piece = max(piece // 2, PIECE_MIN)
                self._say(file.name, offset, last=offset == size)
        return sent

    def _begin(self, file, partial, size, seen=None):
        """Return from which byte on the file lacks, with what is there compared; its size, if somebody else has brought it.

        ``seen``: size of the partial when it was looked at; None looks, once nobody else is at work.
        """
        while True:
            if seen is None:
                self._wait(file, partial)
                final, seen = self._look([file])[1][file]
                if final == size and self._same(file):
                    return size
            keep = digest(file, seen) if 0 < seen <= size else ""
            code, out, err = self._node("begin", self._lock, partial, str(max(seen, 0)), keep)
            if code == 0:
                if offset := int(out):
                    display.display(f"rbee: {self._host}: resuming {file.name} from {100 * offset // max(size, 1)} %")
                return offset
            if code not in (BUSY, MOVED):
                raise self._failed(partial, err, size)
            seen = None

    def _wait(self, file, partial):
        """Return when nobody holds the lock; raises SendError when nothing has come for long."""
        last, since = None, time.monotonic()
        while self._node("begin", self._lock, partial, "-1", "")[0] == BUSY:
            if last is None:
                display.display(f"rbee: {self._host}: another download of {file.name} is running; waiting for it")
            _, there = self._look(list(self._expected))
            if there != last:
                last, since = there, time.monotonic()
            elif time.monotonic() - since > self._args["wait_s"]:
                words = f"another download holds {self._lock} and has brought nothing for {self._args['wait_s']:.0f} s"
                hint = f"see who it is on {self._host} (fuser -v {self._lock}), end it, and repeat the command"
                raise SendError("DOWNLOAD_TIMEOUT", words, hint, path=self._lock)
            time.sleep(1.0)

    def _piece(self, partial, offset, data, size):
        """Append one piece; returns the size of the file then, None if what is there has to be looked at again."""
        words = (partial, str(offset), str(len(data)), str(self._args["silence_s"]))
        code, out, err = self._node("append", self._lock, *words, data=data)
        if code in (0, MOVED) and offset <= int(out) <= offset + len(data):  # also what came of a try whose line was cut
            return int(out)
        if code in (BUSY, MOVED):
            return None
        raise self._failed(partial, err, size - offset)

    def _node(self, *words, data=None):
        """Run PROGRAM on the node, as the owner; returns (exit code, output, errors)."""
        return self._shell(AS_OWNER, self._args["owner"], PROGRAM, *words, data=data)

    def _shell(self, script, *arguments, data=None):
        """Run a script on the node; returns (exit code, output, errors). A connection that breaks is tried again."""
        command = " ".join(shlex.quote(w) for w in ("sh", "-c", script, "rbee-send", *arguments))
        data = data or b"\n"  # without any input ssh takes a terminal, and errors come as output
        lost = None
        while True:
            try:
                answer = self._low_level_execute_command(command, sudoable=True, in_data=data)
            except AnsibleConnectionFailure as e:
                answer = {"rc": 255, "stdout": "", "stderr": str(e)}
            if answer["rc"] != 255:
                return answer["rc"], answer["stdout"], " ".join(answer["stderr"].split())[-300:]
            now = time.monotonic()
            if lost is None:
                lost = now
                display.display(f"rbee: {self._host}: connection lost; trying again, what has come is kept")
            elif now - lost > LOST_S:
                raise AnsibleConnectionFailure(f"no connection for {now - lost:.0f} s: {answer['stderr'].strip()}")
            time.sleep(1.0)

    def _say(self, name, offset, *, last):
        now, done = time.monotonic(), self._before + offset
        at, earlier = self._said
        if now - at >= 0.5 or last:
            rate = "" if earlier is None else f", {(done - earlier) / 1e6 / max(now - at, 1e-3):.1f} MB/s"
            words = (
                f"copying {name}: {done / 1e6:.1f} of {self._total / 1e6:.1f} MB ({100 * done // max(self._total, 1)} %){rate}"
            )
            display.display(f"rbee: {self._host}: {words}")
            self._said = now, done

    def _failed(self, partial, err, missing):
        """Return the error; on a full disk what was sent is removed, for it is of no use there."""
        if "no space left" not in err.lower() and "quota" not in err.lower():
            return SendError(
                "DOWNLOAD_FAILED", f"{partial}: {err}", "repeat the command: it goes on where it stopped", path=partial
            )
        self._node("drop", partial)
        return self._no_space(missing, self._look([])[0], Path(partial).stem)

    def _no_space(self, missing, free, name):
        lacking = max(0, missing + RESERVE_BYTES - free)
        return SendError(
            "INSUFFICIENT_DISK",
            f"{name} needs {missing / 1e6:.1f} MB more in {self._args['dest']}, {free / 1e6:.1f} MB are free",
            f"free {lacking / 1e6:.1f} MB ('rbee-ctl model list', 'rbee-ctl model delete ID') or choose a smaller quantisation",
            required_bytes=missing,
            available_bytes=free,
            to_free_bytes=lacking,
        )
