#!/usr/bin/python
"""Make one worker instance what it is declared to be."""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import shutil
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_lock import ARGUMENTS, check
from ansible.module_utils.rbee_node import (
    NodeError,
    fail,
    listening,
    refuse_foreign_port,
    refuse_masked,
    run,
    running,
    settled,
    show,
    socket_unit,
    start_failure,
    wait_until,
    worker_unit,
    write_drop_in,
)

DOCUMENTATION = r"""
module: rbee_instance
short_description: Make one worker instance what it is declared to be
description:
  - Settings file, link to the runtime, running or not, in one step. An instance that runs with other settings or another
    runtime than it should (its files are newer than its process) is drained and restarted. Drop-ins and whether it is
    enabled are M(rbee_worker_unit)'s.
  - A new runtime has to load the model and make one token (C(rbee-worker --self-test)) before the instance is switched over.
    When that fails, or when the instance does not come up or does not find its queen again, the old files are put back and
    the old worker runs on.
  - Interrupted at any point, the next call does what is left.
options:
  name:
    description: Instance.
    type: str
    required: true
  state:
    description: See C(rbee_worker_instances) of the role rbee_worker.
    type: str
    choices: [started, stopped, present, absent]
    required: true
  settings:
    description: Text of the settings file.
    type: str
  runtime:
    description: Folder of the runtime.
    type: path
  apply:
    description: Restart what runs with other settings. Without it, files alone are written.
    type: bool
    default: true
  files_changed:
    description: Its drop-ins have changed just now.
    type: bool
    default: false
  drop_ins_before:
    description: What C(rbee_worker_unit) found in their place, put back when the instance does not come up with them.
    type: dict
    default: {}
  disrupt:
    description: >-
      Without it, an instance that would have to be restarted is left untouched and C(deferred) is true, so that the caller can do
      those one after the other.
    type: bool
    default: true
  timeout_s:
    description: Longest time for each of draining, self test and start, seconds.
    type: float
    default: 330
  rejoin_s:
    description: How long a restarted worker may take to be known to its queen again, seconds. 0 does not look.
    type: float
    default: 30
  etc_dir:
    description: Where the instances' settings are.
    type: path
    default: /etc/rbee
  run:
    description: Identity of the run; the action of the same name fills it in.
    type: dict
author: rbee
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
"""

EXAMPLES = r"""
- name: Make it so
  rbee_instance:
    name: cpu0
    state: started
    settings: "{{ lookup('ansible.builtin.template', 'worker.toml.j2') }}"
    runtime: /opt/rbee/runtimes/cpu/0.1.0
"""

RETURN = r"""
did:
  description: What was done, or in check mode would be.
  returned: success
  type: list
  elements: str
  sample: [settings, restarted]
deferred:
  description: A restart is needed and was not done.
  returned: success
  type: bool
"""

SYSTEM = "/etc/systemd/system"
#: Where prefix_store_dir leads for units with an account that exists only while they run.
CACHE = "/var/cache/private/rbee-worker"


class Instance:
    """What is there of an instance now."""

    def __init__(self, name, etc_dir):
        self.name, self.unit, self.socket = name, worker_unit(name), socket_unit(name)
        workers = Path(etc_dir, "workers")
        self.toml, self.link = workers / f"{name}.toml", workers / f"{name}.runtime"
        self.etc_dir = etc_dir
        self.look()

    def look(self):
        """Read everything anew."""
        self.settings = self.toml.read_text(encoding="utf-8") if self.toml.is_file() else None
        self.runtime = str(self.link.readlink()) if self.link.is_symlink() else None
        units = show(self.unit, self.socket)
        self.props = units[self.unit]
        self.socket_props = units[self.socket]

    @property
    def listening(self):
        """Whether systemd holds its port."""
        return listening(self.socket_props)

    @property
    def outdated(self):
        """Whether it runs with older files than are there: a restart was due and did not happen."""
        ticks = int(self.props.get("ExecMainStartTimestampMonotonic") or 0)
        if not running(self.props) or not ticks:
            return False
        began = time.time() - (time.monotonic() - ticks / 1e6)
        drop_ins = [p for p in self.props.get("DropInPaths", "").split() if f"rbee-worker@{self.name}." in p]
        files = [self.toml, self.link, self.props.get("FragmentPath") or self.toml, *drop_ins]
        with contextlib.suppress(OSError):
            return any(os.lstat(f).st_mtime > began for f in files)
        return False

    def leftovers(self):
        """Return every file and folder that belongs to this instance alone."""
        places = [self.toml, self.link]
        places += [Path(SYSTEM, f"rbee-worker@{self.name}.{kind}.d") for kind in ("service", "socket")]
        places += sorted(Path(SYSTEM).glob(f"*.wants/rbee-worker@{self.name}.*"))
        credentials = Path(self.etc_dir, "credentials", "workers")
        places += [credentials / self.name, *sorted(credentials.glob(f"{self.name}.*")), Path(CACHE, self.name)]
        return [p for p in places if p.is_symlink() or p.exists()]

    def stop(self, timeout_s):
        """Drain and stop; the socket first, or the next connection would start it again."""
        units = [*([self.socket] if self.listening else []), self.unit]
        run("systemctl", "stop", *units, check=True)
        now = wait_until([self.unit], lambda p: not running(p), timeout_s)
        if running(now[self.unit]):
            raise NodeError("PLAYBOOK_FAILED", f"{self.unit} still runs after {timeout_s:g} s", f"systemctl status {self.unit}")

    def start(self, timeout_s):
        """Start and wait until it is ready; raises NodeError UNIT_START_FAILED."""
        run("systemctl", "reset-failed", self.unit, self.socket)
        code, _, said = run("systemctl", "restart", "--no-block", self.unit)  # and the socket that it requires
        if code != 0:
            raise NodeError("UNIT_START_FAILED", f"{self.unit} did not start: {said.strip()}", f"journalctl -u {self.unit} -n 50")
        now = wait_until([self.unit], settled, timeout_s)[self.unit]
        if now["ActiveState"] != "active":
            raise start_failure(self.unit, now)

    def write(self, settings, runtime):
        """Put settings and link into place, each in one step."""
        temporary = self.toml.with_name(f".{self.name}.toml.new")
        temporary.write_text(settings, encoding="utf-8")
        os.chown(temporary, 0, grp.getgrnam("rbee").gr_gid)
        temporary.chmod(0o640)
        temporary.replace(self.toml)
        link = self.link.with_name(f".{self.name}.runtime.new")
        link.unlink(missing_ok=True)
        link.symlink_to(runtime)
        link.replace(self.link)


def put_back(drop_ins):
    """Give the unit the drop-ins that it had: {path: text, or None where there was none}."""
    for name, text in drop_ins.items():
        write_drop_in(Path(name), text)
    if drop_ins:
        run("systemctl", "daemon-reload", check=True)


@contextlib.contextmanager
def candidate(settings):
    """Yield the path of a file with these settings that root and rbee can read, and nobody else."""
    with tempfile.TemporaryDirectory(prefix="rbee-check-", dir="/run") as folder:
        path = Path(folder, "candidate.toml")
        path.write_text(settings, encoding="utf-8")
        for place, mode in ((Path(folder), 0o750), (path, 0o640)):
            os.chown(place, 0, grp.getgrnam("rbee").gr_gid)
            place.chmod(mode)
        yield path


def validate(name, settings, runtime, etc_dir):
    """Raise NodeError for settings that the runtime itself refuses, or a runtime that is not there."""
    program = f"{runtime}/bin/rbee-worker"
    if not os.access(program, os.X_OK):
        raise NodeError(
            "WORKER_BINARY_NOT_FOUND",
            f"no runtime for worker {name}, expected {program}",
            "ansible-playbook site.yml",
            expected_path=program,
        )
    with candidate(settings) as path:
        token = f"RBEE_FLEET_TOKEN_FILE={etc_dir}/credentials/fleet-token"
        code, _, said = run("/usr/bin/env", token, program, "--check-config", "--config", str(path))
    if code != 0:
        words = " ".join(said.replace(f"{path}: ", "").removeprefix("rbee-worker: ").split())[-600:]
        raise NodeError("CONFIG_INVALID", f"settings of worker {name}: {words}", "correct its entry in rbee_workers")


def self_test(name, settings, runtime, timeout_s):
    """Return what ``rbee-worker --self-test`` says, run as the worker's own user; raises NodeError SELF_TEST_FAILED."""
    with candidate(settings) as path:
        argv = ["runuser", "-u", "rbee", "--", "/usr/bin/env", "-i", "PATH=/usr/bin:/bin", "HOME=/", f"{runtime}/bin/rbee-worker"]
        code, out, said = run("timeout", f"{timeout_s:g}", *argv, "--self-test", "--config", str(path))
    if code == 0:
        return json.loads(out.splitlines()[-1])
    lines = [line for line in said.splitlines() if line.strip()]
    reason = (
        "it did not end in time"
        if code == 124
        else " ".join(lines[-1].removeprefix("rbee-worker: ").split())
        if lines
        else f"exit {code}"
    )
    raise NodeError(
        "SELF_TEST_FAILED",
        f"runtime {runtime} makes no token for worker {name}: {reason}; the worker runs on with the old one",
        f"runuser -u rbee -- {runtime}/bin/rbee-worker --self-test --config /etc/rbee/workers/{name}.toml",
        runtime=str(runtime),
        exit_status=code,
        journal=lines[-12:],
    )


def rejoin(settings, etc_dir, limit_s):
    """Wait until the queen has taken note of the worker as it is now; raises NodeError UNIT_START_FAILED."""
    if not settings.get("queen_url") or not limit_s:
        return
    host = settings.get("host", "127.0.0.1")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 -- compared, not bound
    request = urllib.request.Request(f"http://{host}:{settings['port']}/v1/info")
    with contextlib.suppress(OSError):
        request.add_header(
            "Authorization", "Bearer " + Path(etc_dir, "credentials/fleet-token").read_text(encoding="utf-8").strip()
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end, seen = time.monotonic() + limit_s, "no answer"
    while time.monotonic() < end:
        try:
            with opener.open(request, timeout=5) as answer:
                seen = json.loads(answer.read())
            if seen.get("registered", True):  # a worker from before this was told
                return
        except (OSError, ValueError, urllib.error.URLError) as e:
            seen = str(e)
        time.sleep(0.1)
    raise NodeError(
        "UNIT_START_FAILED",
        f"worker {settings['name']} runs, but the queen at {settings['queen_url']} has not taken it up within {limit_s:g} s",
        f"journalctl -u {worker_unit(settings['name'])} -n 50; systemctl status rbee-queen on the queen's machine",
        seen=str(seen)[:200],
    )


def present(params, check_mode):
    """Return (what was done, diff, deferred)."""
    there = Instance(params["name"], params["etc_dir"])
    wanted = {"settings": params["settings"], "runtime": params["runtime"]}
    settings = tomllib.loads(params["settings"])
    alive = running(there.props) or there.listening
    enable = params["state"] != "stopped"
    files = [k for k, v in wanted.items() if v != getattr(there, k)]
    restart = alive and params["apply"] and enable and (bool(files) or params["files_changed"] or there.outdated)
    start = params["state"] == "started" and not alive
    stop = params["state"] == "stopped" and alive
    did = [*files]
    did += ["restarted"] if restart else ["started"] if start else ["stopped"] if stop else []
    diff = {
        "before_header": str(there.toml),
        "after_header": str(there.toml),
        "before": f"{there.settings or ''}# runtime: {there.runtime}\n",
        "after": f"{wanted['settings']}# runtime: {wanted['runtime']}\n",
    }
    if enable:
        refuse_masked(there.props)
    if start and not check_mode:
        refuse_foreign_port(there.name, settings["port"])
    if check_mode or (restart and not params["disrupt"]):
        return did, diff, restart and not check_mode
    if files:
        validate(there.name, params["settings"], params["runtime"], params["etc_dir"])
    old = (there.settings, there.runtime)
    limit = params["timeout_s"]
    if restart or stop:
        there.stop(limit)
    try:
        if restart and there.runtime and there.runtime != params["runtime"]:
            self_test(there.name, params["settings"], params["runtime"], limit)
        if files:
            there.write(params["settings"], params["runtime"])
        if restart or start:
            there.start(limit)
        if restart:
            rejoin(settings, params["etc_dir"], params["rejoin_s"])
    except (NodeError, OSError) as e:
        if restart and all(old):
            there.write(*old)
            with contextlib.suppress(NodeError, OSError):
                put_back(params["drop_ins_before"])
            with contextlib.suppress(NodeError):  # the first failure is the one to tell
                there.start(limit)
            if getattr(e, "code", None) == "SELF_TEST_FAILED":
                take_back(there, params)
        raise
    return did, diff, False


def take_back(there, params):
    """Give the machine's other workers that have the new runtime already the one that ``there`` runs on with."""
    for toml in sorted(there.toml.parent.glob("*.toml")):
        other = Instance(toml.stem, params["etc_dir"])
        if other.name == there.name or other.runtime != params["runtime"]:
            continue
        with contextlib.suppress(NodeError, OSError):  # the self test is the failure to tell; status shows a worker that is down
            validate(other.name, other.settings, there.runtime, params["etc_dir"])
            alive = running(other.props) or other.listening
            if alive:
                other.stop(params["timeout_s"])
            other.write(other.settings, there.runtime)
            if alive:
                other.start(params["timeout_s"])
                rejoin(tomllib.loads(other.settings), params["etc_dir"], params["rejoin_s"])


def absent(params, check_mode):
    """Return (what was done, diff, False)."""
    there = Instance(params["name"], params["etc_dir"])
    alive = running(there.props) or there.listening
    enabled = [
        u for u, p in ((there.unit, there.props), (there.socket, there.socket_props)) if p.get("UnitFileState") == "enabled"
    ]
    leftovers = there.leftovers()
    did = [*(["stopped"] if alive else []), *map(str, leftovers)]
    diff = {"before": "".join(f"{p}\n" for p in leftovers), "after": ""}
    if check_mode or not (did or enabled):
        return did, diff, False
    if alive:
        there.stop(params["timeout_s"])
    if enabled:
        run("systemctl", "disable", "--quiet", *enabled, check=True)
    for path in there.leftovers():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    run("systemctl", "daemon-reload", check=True)
    run("systemctl", "reset-failed", there.unit, there.socket)
    return did, diff, False


def main():
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped", "present", "absent"], "required": True},
            "settings": {"type": "str"},
            "runtime": {"type": "path"},
            "apply": {"type": "bool", "default": True},
            "files_changed": {"type": "bool", "default": False},
            "drop_ins_before": {"type": "dict", "default": {}},
            "disrupt": {"type": "bool", "default": True},
            "timeout_s": {"type": "float", "default": 330.0},
            "rejoin_s": {"type": "float", "default": 30.0},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            **ARGUMENTS,
        },
        required_if=[("state", s, ("settings", "runtime")) for s in ("started", "stopped", "present")],
        supports_check_mode=True,
    )
    try:
        if not module.check_mode:
            check(module.params["run"])
        act = absent if module.params["state"] == "absent" else present
        did, diff, deferred = act(module.params, module.check_mode)
    except NodeError as e:
        fail(module, e)
    except OSError as e:
        code = "DISK_FULL" if e.errno == errno.ENOSPC else "PLAYBOOK_FAILED"
        fail(module, NodeError(code, f"worker {module.params['name']}: {e.strerror or e}: {e.filename}", "df -h / /run"))
    changed = bool(did) and not deferred
    module.exit_json(changed=changed, did=did, deferred=deferred, **({"diff": diff} if changed else {}))


if __name__ == "__main__":
    main()
