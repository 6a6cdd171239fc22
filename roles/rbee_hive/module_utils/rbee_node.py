"""What rbee's modules know about a node: systemd units, instances, runtimes, ports. Standard library only.

Functions that take text parse; the others read the machine, but for ``write_drop_in``, ``alone`` and ``begin``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import time
import tomllib
from pathlib import Path

from ansible.module_utils.rbee_log_lines import as_text

TARGET = "rbee-hive.target"
QUEEN_UNIT = "rbee-queen.service"
RUN_DIR = "/run"
#: Where unit files and drop-ins are that are not a package's.
UNIT_DIR = "/etc/systemd/system"
TEMPLATE = "rbee-worker@.service"
FIRST_PORT = 8001
SHOWN = (
    "Id,LoadState,ActiveState,SubState,Result,NRestarts,MainPID,StatusText,UnitFileState,InvocationID,ExecMainStatus,Job,"
    "ExecMainStartTimestampMonotonic,FragmentPath,DropInPaths,NeedDaemonReload"
)

#: Properties of transient units that touch nothing but what they are given.
SANDBOX = (
    "CapabilityBoundingSet=",
    "LockPersonality=yes",
    "NoNewPrivileges=yes",
    "PrivateDevices=yes",
    "PrivateTmp=yes",
    "ProtectControlGroups=yes",
    "ProtectHome=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectSystem=strict",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces=yes",
    "RestrictSUIDSGID=yes",
    "UMask=0022",
)

NAME = re.compile(r"^(?=.{1,26}$)[a-z]+[0-9]+(-[a-z0-9]+)?$")


class NodeError(Exception):
    """A finding that ends the operation; ``code`` is one of rbee_serve.contract.errors."""

    def __init__(self, code, message, hint=None, **details):
        super().__init__(message)
        self.code, self.message, self.hint, self.details = code, message, hint, details


def fail(module, error):
    """End the module with ``error`` (NodeError or CatalogError) in the agreed form."""
    record = {"code": error.code, "message": error.message, "hint": error.hint, "details": error.details}
    words = f"{error.message} [{error.code}]" + (f"; next: {error.hint}" if error.hint else "")
    module.fail_json(msg=words, rbee_error=record)


def run(*argv, check=False, stdin=None):
    """Run a program in the C locale; returns (exit code, stdout, stderr). 127: not there. Raises NodeError with ``check``."""
    env = {**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", env=env, input=stdin, check=False)
    except OSError as e:
        done = subprocess.CompletedProcess(argv, 127, "", str(e))
    if check and done.returncode != 0:
        raise NodeError(
            "SSH_COMMAND_FAILED",
            f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}",
            exit_code=done.returncode,
        )
    return done.returncode, done.stdout, done.stderr


# --- units ----------------------------------------------------------------------------------------------------------


def parse_show(text):
    """Parse ``systemctl show`` of several units: a list of {property: value}; one block a unit, blank lines between."""
    blocks = []
    for block in text.split("\n\n"):
        pairs = (line.split("=", 1) for line in block.splitlines() if "=" in line)
        if props := dict(pairs):
            blocks.append(props)
    return blocks


def unit_row(props):
    """Return the agreed record of a unit."""
    return {
        "unit": props["Id"],
        "active_state": props.get("ActiveState", ""),
        "sub_state": props.get("SubState", ""),
        "result": props.get("Result", ""),
        "n_restarts": int(props.get("NRestarts") or 0),
        "main_pid": int(props.get("MainPID") or 0),
        "status_text": props.get("StatusText", ""),
        "enabled": props.get("UnitFileState") == "enabled",
    }


def has_no_address(unit):
    """Return whether the unit is a worker's socket by its name alone: only an instance's drop-in gives it an address."""
    named = unit.startswith("rbee-worker@") and unit.endswith(".socket") and "*" not in unit
    return named and not any(os.path.lexists(Path(UNIT_DIR, name)) for name in (unit, f"{unit}.d"))


def show(*units):
    """Return {unit id: properties} of units (globs match what is loaded).

    systemd logs an error whenever it has to load a socket without an address: such ones are looked for among the loaded alone.
    """
    bare = [u for u in units if has_no_address(u)]
    asked = [u.replace(".socket", ".[s]ocket") if u in bare else u for u in units]
    _, out, _ = run("systemctl", "show", "--no-pager", f"--property={SHOWN}", "--", *asked, check=True)
    absent = {**dict.fromkeys(SHOWN.split(","), ""), "LoadState": "bad-setting", "ActiveState": "inactive"}
    return {u: {**absent, "Id": u} for u in bare} | {p["Id"]: p for p in parse_show(out) if p.get("Id")}


def write_drop_in(path, text):
    """Make a unit's drop-in have ``text``; None takes it away, and its folder when nothing else is in it."""
    if text is None:
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
        return
    path.parent.mkdir(mode=0o755, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)
    new.replace(path)


def begin(unit, told, properties, *command, environment=None):
    """Start a transient service of rbee's slice that tells of itself in the file ``told``, in a folder of its own below /run.

    ``properties``: systemd.exec(5) as KEY=VALUE. Raises NodeError when systemd refuses.
    """
    told = Path(told)
    with contextlib.suppress(FileNotFoundError):
        told.unlink()  # of an earlier run: whoever follows would take its end for ours
    kept = (f"RuntimeDirectory={told.parent.name}", "RuntimeDirectoryPreserve=yes")  # read after the end, and by others
    run(
        "systemd-run",
        "--quiet",
        "--collect",
        f"--unit={unit}",
        "--slice=rbee.slice",
        "--service-type=exec",
        *[f"--property={p}" for p in (*properties, *kept)],
        *[f"--setenv={k}={v}" for k, v in (environment or {}).items()],
        "--",
        *[word.replace("$", "$$") for word in command],  # systemd puts variables in where it finds a dollar
        check=True,
    )


def worker_unit(name):
    """Return the service of an instance."""
    return f"rbee-worker@{name}.service"


def socket_unit(name):
    """Return the socket of an instance."""
    return f"rbee-worker@{name}.socket"


def unit_instance(unit):
    """Return the instance name of a worker's unit."""
    return unit.split("@", 1)[1].rsplit(".", 1)[0]


def worker_units(etc_dir):
    """Return {unit id: properties} of all worker services: of every settings file, and whatever else systemd has loaded."""
    named = [worker_unit(n) for n in instances(etc_dir)]
    return {k: v for k, v in show("rbee-worker@*.service", *named).items() if k != TEMPLATE}


def worker_sockets(etc_dir):
    """Return {instance: properties} of the sockets of all instances that have one."""
    named = [socket_unit(n) for n in instances(etc_dir)]
    found = show("rbee-worker@*.socket", *named)
    # A template without an address is no socket: only an instance's drop-in makes it one.
    return {unit_instance(k): v for k, v in found.items() if v["LoadState"] == "loaded" and not k.startswith("rbee-worker@.")}


def listening(props):
    """Return whether a socket waits for connections, or has started its service."""
    return props.get("ActiveState") in ("active", "activating")


def require_hive(props, host_hint):
    """Raise NodeError MISSING_DEPENDENCY unless the target's unit file is there."""
    if props.get("LoadState") in (None, "not-found"):
        raise NodeError("MISSING_DEPENDENCY", f"rbee is not installed here: systemd does not know {TARGET}", host_hint)


def refuse_masked(props):
    """Raise NodeError UNIT_MASKED for a unit that the administrator has masked: that is not ours to undo."""
    if props.get("LoadState") == "masked":
        unit = props["Id"]
        raise NodeError(
            "UNIT_MASKED", f"{unit} is masked: its administrator has forbidden to start it", f"systemctl unmask {unit}", unit=unit
        )


def journal(unit, lines=12, own=False):
    """Return the last lines of a unit's journal as text, oldest first, without times; with ``own`` not systemd's about it."""
    which = [f"_SYSTEMD_UNIT={unit}"] if own else ["--unit", unit]
    run("journalctl", "--sync")  # what it said right before its end may be on the way still; for root alone
    _, out, _ = run("journalctl", "--no-pager", "--quiet", "--output=cat", f"--lines={lines}", *which)
    return [as_words(line) for line in out.splitlines() if line.strip()]


def as_words(line):
    """Return one line of a service's log as text: the services write JSON into the journal."""
    if not line.startswith('{"time":'):
        return line
    try:
        return as_text(json.loads(line))
    except (ValueError, AttributeError):
        return line


def running(props):
    """Return whether anything of the unit still runs or is about to."""
    return props.get("ActiveState") in ("active", "activating", "deactivating", "reloading") or int(props.get("MainPID") or 0) > 0


def up(props):
    """Return whether the unit runs or is coming up; one that crashed and waits for its restart is not."""
    return running(props) and props.get("SubState") != "auto-restart"


def killed(unit, pid):
    """Return the record of a worker that systemd had to kill (SPEC E-42)."""
    return {"name": unit_instance(unit), "pid": int(pid), "signal": "SIGKILL", "reason": "it did not end in time after SIGTERM"}


def start_failure(unit, props):
    """Return the NodeError for a unit that did not come up (SPEC S-46, S-51)."""
    status, result = props.get("ExecMainStatus", ""), props.get("Result", "")
    # A socket has no process: what systemd says about it is all there is.
    own = journal(unit, lines=1, own=True) or [line for line in journal(unit) if "Failed to" in line][:1]
    reason = {
        "oom-kill": "the kernel killed it: out of memory",
        "timeout": "it did not become ready in time",
        "watchdog": "its watchdog fired: it hung",
        "start-limit-hit": "it failed too often in a row",
    }.get(result, f"result {result}, exit status {status}")
    if status == "203":
        reason = "its program is not there (203/EXEC)"
    code = "WORKER_BINARY_NOT_FOUND" if status == "203" else "UNIT_START_FAILED"
    # The worker itself gives up loading after load_timeout_s and says how far it came; systemd only if that fails as well.
    if result == "timeout" or any("model not loaded after" in line for line in own):
        code = "LOADING_TIMEOUT"
    # The worker looks for itself before it loads (engine/room.py).
    if short := next((line for line in reversed(own) if "out of memory, nothing was loaded" in line), None):
        code = "VRAM_EXHAUSTED" if " memory of " in short else "INSUFFICIENT_RAM"
    # llama.cpp met a device that fails (engine/failures.py, SPEC E-40); an abort() of it is told by its last words.
    fails = re.compile(r"failed while the model was being loaded|\b(CUDA|ROCm) error: (?!out of memory)")
    if any(fails.search(line) for line in own):
        code = "CUDA_DEVICE_FAILED"
    return NodeError(
        code,
        f"{unit} did not start: {reason}" + (f": {own[-1]}" if own else ""),
        f"journalctl -u {unit} -n 50",
        unit=unit,
        result=result,
        exit_status=status,
        active_state=props.get("ActiveState"),
        journal=journal(unit),
    )


def wait_until(units, reached, timeout_s, interval_s=0.2):
    """Poll until ``reached(properties)`` holds for every unit; returns {unit: properties}, complete or not after the limit."""
    end = time.monotonic() + timeout_s
    while True:
        props = show(*units) if units else {}
        if all(reached(p) for p in props.values()) or time.monotonic() > end:
            return props
        time.sleep(interval_s)


@contextlib.contextmanager
def alone(name):
    """Hold the lock ``name`` of this machine: of callers in the same moment one looks and begins, the others find it begun."""
    with Path(RUN_DIR, f"{name}.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def settled(props):
    """Return whether a start is over: up, down, failed for good, or down for the second time and about to be tried again."""
    if int(props.get("Job") or 0):
        return False
    looping = props.get("SubState") == "auto-restart" and int(props.get("NRestarts") or 0) >= 1
    return looping or props.get("ActiveState") in ("active", "failed", "inactive")


# --- files ----------------------------------------------------------------------------------------------------------


def instances(etc_dir):
    """Return {name: settings} of ``<etc_dir>/workers/*.toml``; settings is {} for a file that is no TOML."""
    found = {}
    for path in sorted(Path(etc_dir, "workers").glob("*.toml")):
        if NAME.match(path.stem):
            found[path.stem] = read_toml(path)
    return found


def read_toml(path):
    """Return a TOML file's values; {} when it is missing or broken."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def runtimes(install_path, kind):
    """Return the paths of the installed runtimes of a type, newest first: those whose metadata file, written last, is there."""
    complete = Path(install_path, "runtimes", kind).glob("*/metadata.yaml")
    usable = [p for p in complete if p.parent.name != "current" and os.access(p.parent / "bin" / "python", os.X_OK)]
    return [str(p.parent) for p in sorted(usable, key=lambda p: p.stat().st_mtime, reverse=True)]


def current_of(root):
    """Return the directory that is current of a type: what the link leads to, else the newest; None if there is none."""
    link = root / "current"
    if link.is_symlink() and (link / "metadata.yaml").is_file():
        return root / link.readlink()
    there = complete(root)
    return max(there, key=lambda p: (p / "metadata.yaml").stat().st_mtime) if there else None


def complete(root):
    """Return the directories of all whole runtimes of a type."""
    return sorted(p.parent for p in root.glob("*/metadata.yaml") if p.parent.name != "current")


def any_runtime_python(install_path):
    """Return the interpreter of some worker runtime; None if there is none."""
    for kind in ("cpu", "cuda", "rocm", "vulkan"):
        for path in runtimes(install_path, kind):
            return f"{path}/bin/python"
    return None


# --- ports --------------------------------------------------------------------------------------------------------


def parse_listening(text):
    """Return the TCP ports in state LISTEN of /proc/net/tcp or tcp6."""
    rows = (line.split() for line in text.splitlines()[1:])
    return {int(row[1].rsplit(":", 1)[1], 16) for row in rows if len(row) > 3 and row[3] == "0A"}


def port_owner(port):
    """Return ``"name (process N)"`` of whoever listens on a TCP port; None if nobody does."""
    inodes = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines()[1:]]
        except OSError:
            continue
        inodes |= {r[9] for r in rows if len(r) > 9 and r[3] == "0A" and int(r[1].rsplit(":", 1)[1], 16) == port}
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(fd.readlink()) in wanted for fd in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text(encoding='utf-8').strip()} (process {process.name})"
        except OSError:
            continue
    return "another program"


def refuse_foreign_port(name, port):
    """Raise NodeError PORT_TAKEN when a program listens on the port of a worker that does not run itself."""
    if owner := port_owner(port):
        raise NodeError(
            "PORT_TAKEN",
            f"port {port} of worker {name} is taken by {owner}",
            f"stop that program, or give the worker another port in rbee_workers ({name}: port: {port + 1000})",
            port=port,
            owner=owner,
        )


def listening_ports():
    """Return all TCP ports that something listens on."""
    ports = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            ports |= parse_listening(Path(path).read_text(encoding="ascii"))
        except OSError:
            continue
    return ports
