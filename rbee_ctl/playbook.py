"""Run a playbook and say what came of it, host by host. The only module that knows ansible-runner.

ansible-runner is kept on a short lead: it gets a private folder (0700, in memory where possible) that is removed in any
case, an environment of named variables only, and extra variables through a file; nothing secret reaches argv or stays.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rbee_ctl import ansible_ahead, content
from rbee_ctl.ansible_environment import environment, of_run
from rbee_ctl.events import Event, OnEvent, Output, Stats, StillRunning, TaskDone, TaskStarted, translate
from rbee_serve import process_tree
from rbee_serve.contract.errors import (
    BY_CODE,
    DiskFull,
    ExitCode,
    MissingDependency,
    NodeUnreachable,
    PlaybookFailed,
    RbeeError,
    SshAuthFailed,
    SshHostKeyRefused,
    SshTimeout,
    SudoRefused,
)

#: Exit codes of errors after which nothing was begun on a host. Several of them together are UNREACHABLE.
_NO_CONNECTION = (ExitCode.UNREACHABLE, ExitCode.KEY_REFUSED, ExitCode.HOST_KEY)

HostStatus = Literal["ok", "failed", "unreachable"]
Status = Literal["success", "partial", "failed", "unreachable", "canceled"]

#: What ansible-runner itself adds and needs. ANSIBLE_HOST_KEY_CHECKING is not among them: it would switch checking off.
_RUNNERS_OWN = (
    "ANSIBLE_CALLBACK_PLUGINS",
    "ANSIBLE_STDOUT_CALLBACK",
    "ANSIBLE_RETRY_FILES_ENABLED",
    "AWX_ISOLATED_DATA_DIR",
    "RUNNER_OMIT_EVENTS",
    "RUNNER_ONLY_FAILED_EVENTS",
)
#: Seconds between two looks at whether the user has cancelled.
_POLL_S = 0.2
#: Seconds that Ansible gets to end by itself after Ctrl+C; a second Ctrl+C ends the wait.
_GRACE_S = 3.0


@dataclass(frozen=True)
class HostOutcome:
    """What happened on one host. ``result`` is the playbook's ``rbee_result``; ``error`` is set unless status is ok."""

    status: HostStatus
    result: dict[str, Any] = field(default_factory=dict)
    error: RbeeError | None = None
    changed: int = 0
    #: What each changed task says about it: task, what, diff (text, may be empty).
    changes: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class PlaybookResult:
    """Outcome of a run. ``rc`` is ansible-playbook's own, for information; ``exit_code`` is what rbee-ctl ends with."""

    status: Status
    rc: int
    hosts: dict[str, HostOutcome]
    error: RbeeError | None = None  # a failure that belongs to no host: syntax, inventory, no hosts matched

    @property
    def never_reached(self) -> bool:
        """Whether no machine answered and nothing was changed: worth another try."""
        outcomes = self.hosts.values()
        return bool(outcomes) and all(
            o.status == "unreachable" and o.error is not None and o.error.retryable and not o.changed for o in outcomes
        )

    @property
    def exit_code(self) -> int:
        """0 all done, 3 some hosts failed, 4 (8, 9) hosts not reached and nothing else wrong, 1 (or the one error's own) else."""
        if self.status == "canceled":
            return ExitCode.INTERRUPTED
        errors = [o.error for o in self.hosts.values() if o.error is not None]
        if self.error is not None:
            errors.append(self.error)
        if not errors:
            return ExitCode.OK
        if all(isinstance(e, NodeUnreachable) and e.exit_code in _NO_CONNECTION for e in errors):
            alike = {e.exit_code for e in errors}
            return alike.pop() if len(alike) == 1 else ExitCode.UNREACHABLE
        if self.status == "partial":
            return ExitCode.PARTIAL
        codes = {e.exit_code for e in errors}
        only = codes.pop() if len(codes) == 1 else ExitCode.FAILED
        return ExitCode.FAILED if only == ExitCode.CONFIG else only


def run_playbook(
    name: str,
    *,
    inventory: Path | Sequence[Path] | None,
    limit: str | None = None,
    extra_vars: Mapping[str, Any] | None = None,
    on_event: OnEvent | None = None,
    state_dir: Path | None = None,
    verbose: bool = False,
    check: bool = False,
    environ: Mapping[str, str] | None = None,
) -> PlaybookResult:
    """Run ``playbooks/<name>.yml`` to its end.

    ``on_event`` gets our events as they happen, in the calling thread; ``inventory`` None is for playbooks that need
    none (localhost); of several, later ones add to and override earlier ones. ``check`` touches nothing.
    Raises MissingDependency when Ansible or the playbook is not there. On Ctrl+C or SIGTERM the whole
    process tree is ended, the private folder removed and KeyboardInterrupt raised.
    """
    path = content.playbook(name)
    collector = _Collector(on_event)
    with _cancellation() as cancellation:  # to the end of the cleanup: a second Ctrl+C leaves no folder behind either
        with ansible_ahead.folder() as folder:
            private = Path(folder)
            env = environment(state_dir=state_dir) | dict(environ or {})
            runner = _prepare(private, path, inventory, limit, extra_vars, env, verbose, check)
            runner.event_handler = collector.handle
            runner.cancel_callback = _polled(collector, cancellation)
            try:
                runner.run()
            finally:
                cancellation.sweep()
        if cancellation.requested:
            raise KeyboardInterrupt
        return collector.conclude(runner.rc if isinstance(runner.rc, int) else 1, path)


def _polled(collector: _Collector, cancellation: _Cancellation) -> Callable[[], bool]:
    """Return what the runner calls every ``_POLL_S``: it says whether to end."""

    def poll() -> bool:
        collector.tick()
        return cancellation.check()

    return poll


def _prepare(
    private: Path,
    playbook: Path,
    inventory: Path | Sequence[Path] | None,
    limit: str | None,
    extra_vars: Mapping[str, Any] | None,
    env: dict[str, str],
    verbose: bool,
    check: bool,
) -> Any:
    """Return an ansible-runner Runner that is ready to run."""
    try:
        import ansible_runner

        from rbee_ctl import terminal
    except ImportError as e:
        raise MissingDependency("ansible-runner is not installed", hint="pip install 'rbee[ctl]'") from e
    terminal.use()
    variables = None
    if extra_vars:
        variables = private / "extra-vars.json"
        variables.touch(mode=0o600)
        variables.write_text(json.dumps(dict(extra_vars)), encoding="utf-8")
    env = env | of_run(private)  # Ansible's own scratch files: rendered templates, copied secrets
    config = ansible_runner.RunnerConfig(
        private_data_dir=str(private),
        playbook=str(playbook),
        inventory=_inventories(inventory),
        limit=limit,
        extravars=str(variables) if variables is not None else None,
        envvars=env,
        project_dir=str(content.root()),
        quiet=True,
        suppress_env_files=True,
        verbosity=1 if verbose else None,
        cmdline="--check --diff" if check else None,
    )
    config.prepare()
    # prepare() starts from os.environ; only what is named above goes on.
    config.env = {k: v for k, v in config.env.items() if k in env or k in _RUNNERS_OWN}
    config.pexpect_timeout = _POLL_S
    config.suppress_output_file = True
    return ansible_runner.Runner(config)


def _inventories(inventory: Path | Sequence[Path] | None) -> str | list[str]:
    if inventory is None:
        return "localhost,"
    return str(inventory) if isinstance(inventory, Path) else [str(path) for path in inventory]


class _Cancellation:
    """Turns SIGINT and SIGTERM into an orderly end of the child and all its descendants."""

    def __init__(self) -> None:
        self.requested = 0
        self._since = 0.0
        self._seen: set[process_tree.Process] = set()

    def request(self, *_: object) -> None:
        """Note the signal; the runner's loop acts on it within ``_POLL_S``."""
        self.requested += 1

    def check(self) -> bool:
        """Return True when the runner is to kill its child; called by its loop."""
        if not self.requested:
            return False
        # Ansible's forks have sessions of their own and are re-parented when it dies: remember them while it lives.
        self._seen.update(process_tree.descendants(os.getpid()))
        if not self._since:
            self._since = time.monotonic()
            process_tree.kill(self._direct(), signal.SIGINT)
            return False
        return self.requested > 1 or time.monotonic() - self._since > _GRACE_S

    def sweep(self) -> None:
        """Kill whatever a cancelled run left and wait until it is gone: it may still write into the private folder."""
        process_tree.kill(self._seen)
        limit = time.monotonic() + _GRACE_S
        while any(process_tree.alive(p) for p in self._seen) and time.monotonic() < limit:
            time.sleep(0.02)

    def _direct(self) -> list[process_tree.Process]:
        return process_tree.children(os.getpid())


@contextlib.contextmanager
def _cancellation() -> Iterator[_Cancellation]:
    """Raise KeyboardInterrupt at the end of the block when a signal has come, also in its last moment."""
    cancellation = _Cancellation()
    before = {s: signal.signal(s, cancellation.request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancellation
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    if cancellation.requested:
        raise KeyboardInterrupt


class _Collector:
    """Gathers what the events say about each host."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self._on_event = on_event
        self._results: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, TaskDone] = {}
        self._unreachable: dict[str, TaskDone] = {}
        self._seen: dict[str, None] = {}
        self._changes: dict[str, list[Mapping[str, str]]] = {}
        self._stats: Stats | None = None
        self._output: list[str] = []
        self._task, self._task_at, self._event_at = "Ansible starts", time.monotonic(), time.monotonic()

    def tick(self) -> None:
        """Say that a task still runs when nothing has come for a second (SPEC N-05)."""
        now = time.monotonic()
        if now - self._event_at >= 1.0:
            self._event_at = now
            self._tell(StillRunning(self._task, now - self._task_at))

    def handle(self, raw: dict[str, Any]) -> bool:
        """Take one of ansible-runner's events; False: it is not to be written to disk."""
        for event in translate(raw):
            self._event_at = time.monotonic()
            if isinstance(event, TaskStarted):
                self._task, self._task_at = event.task, self._event_at
            if isinstance(event, TaskDone):
                self._task_done(event)
            elif isinstance(event, Stats):
                self._stats = event
            elif isinstance(event, Output):
                self._output = [*self._output, *event.text.splitlines()][-40:]
            self._tell(event)
        return False

    def _tell(self, event: Event) -> None:
        """Tell who listens. That nobody reads that any more ends no run: machines are left as it leaves them at its end."""
        if self._on_event is not None:
            with contextlib.suppress(BrokenPipeError):
                self._on_event(event)

    def _task_done(self, event: TaskDone) -> None:
        self._seen[event.host] = None
        if event.status == "unreachable":
            self._unreachable[event.host] = event
        elif event.status == "failed" and not event.ignored:
            self._failed[event.host] = event
        if event.status == "ok" and event.changed:
            self._changes.setdefault(event.host, []).extend(changes_of(event))
        for holder in (event.result, event.result.get("ansible_facts") or {}):
            if isinstance(holder, dict) and isinstance(holder.get("rbee_result"), dict):
                self._results[event.host] = holder["rbee_result"]

    def conclude(self, rc: int, path: Path) -> PlaybookResult:
        """Return the outcome of the run."""
        hosts = {host: self._outcome(host) for host in self._seen}
        bad = [o for o in hosts.values() if o.status != "ok"]
        error: RbeeError | None = None
        if not bad and (rc != 0 or not hosts):
            error = self._general_failure(rc, path)
        status: Status = "success"
        if error is not None:
            status = "failed"
        elif bad and len(bad) < len(hosts):
            status = "partial"
        elif bad:
            status = "unreachable" if all(o.status == "unreachable" for o in bad) else "failed"
        return PlaybookResult(status, rc, hosts, error)

    def _outcome(self, host: str) -> HostOutcome:
        result = self._results.get(host, {})
        changed = self._stats.changed.get(host, 0) if self._stats else 0
        # A failed task inside a rescued block is no failure: Ansible's own account decides where there is one.
        failed = host in self._failed if self._stats is None else self._stats.failures.get(host, 0) > 0
        if host in self._unreachable and (self._stats is None or self._stats.unreachable.get(host, 0) > 0):
            error = unreachable(host, _message(self._unreachable[host].result))
            return HostOutcome("unreachable", result, error, changed)
        if failed:
            return HostOutcome("failed", result, task_error(host, self._failed.get(host)), changed)
        return HostOutcome("ok", result, None, changed, tuple(self._changes.get(host, ())))

    def _general_failure(self, rc: int, path: Path) -> RbeeError:
        tail = "\n".join(line for line in self._output if line.strip())[-1500:]
        if rc == 0:
            return PlaybookFailed(f"{path.name}: no host matched", hint="rbee-ctl hive list", output=tail)
        return PlaybookFailed(
            f"{path.name}: ansible-playbook ended with exit code {rc}; its last words:\n{tail}",
            hint=f"ansible-playbook --syntax-check {path}",
            ansible_exit=rc,
        )


def changes_of(event: TaskDone) -> list[dict[str, str]]:
    """Return what a changed task changed: one entry, or one for each changed item of a loop; with the diff as text."""
    items = event.result.get("results")
    changed = [i for i in items if isinstance(i, dict) and i.get("changed")] if isinstance(items, list) else [event.result]
    task = event.task.rpartition(" : ")[2]
    found = []
    for item in changed:
        diffs = item.get("diff") or []
        diffs = [d for d in (diffs if isinstance(diffs, list) else [diffs]) if isinstance(d, dict)]
        # Of a file that is copied in check mode the diff's headers are all there is: before, its place; after, its source.
        headers = [d.get(key) for key in ("before_header", "after_header") for d in diffs]
        names = [item.get("dest"), item.get("path"), *headers, item.get("name"), item.get("_ansible_item_label")]
        what = next((str(n) for n in names if n), "")
        found.append({"task": task, "what": what, "diff": "".join(_diff_text(d) for d in diffs)})
    return found


def _diff_text(diff: Mapping[str, Any]) -> str:
    """Return one of Ansible's diffs as unified text; secrets never come here (no_log)."""
    if "prepared" in diff:
        return str(diff["prepared"])
    sides = [diff.get(side, "") for side in ("before", "after")]
    before, after = (s if isinstance(s, str) else json.dumps(s, indent=1, sort_keys=True, default=str) for s in sides)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1)
    return "".join(f"{line}\n" for line in lines)


def _message(result: Mapping[str, Any]) -> str:
    text = str(result.get("msg") or result.get("stderr") or result.get("module_stderr") or "no message")
    return " ".join(text.split())[:600]


def _line_with(result: Mapping[str, Any], *phrases: str) -> str | None:
    """Return the line of a failed task's output that has one of ``phrases`` (lower case), however much stands around it."""
    for key in ("msg", "stderr", "module_stderr", "module_stdout", "stdout"):
        for line in str(result.get(key) or "").splitlines():
            if any(phrase in line.lower() for phrase in phrases):
                return " ".join(line.split())[-300:]
    return None


#: What Ansible says around ssh's own words.
_SSH_PREFIX = re.compile(
    r"^(Task failed: )?(Data could not be sent to remote host \S+ Make sure this host can be reached over ssh: |"
    r"Failed to connect to the host via ssh: )?(mux_client_\S+: read from master failed: \S+ \S+ )?"
)


def unreachable(host: str, message: str) -> NodeUnreachable:
    """Classify what ssh said (SPEC 3.7, OP-23); ``details["ssh_class"]``: host-key, auth, timeout or connection."""
    message = _SSH_PREFIX.sub("", message)
    said = message.lower()
    if "host key verification failed" in said or "remote host identification has changed" in said:
        return SshHostKeyRefused(
            f"{host}: its SSH host key is unknown or has changed: {message}",
            hint="if the machine is the right one: ssh-keygen -R ADDRESS && ssh-keyscan ADDRESS >> ~/.ssh/known_hosts",
            ssh_class="host-key",
        )
    if "unprotected private key file" in said or "bad permissions" in said:
        return SshAuthFailed(
            f"{host}: SSH refused to use the key (permission denied): others can read its file: {message}",
            hint="chmod 600 KEYFILE",
            ssh_class="auth",
        )
    if "permission denied" in said or "too many authentication failures" in said:
        return SshAuthFailed(
            f"{host}: SSH refused the key: {message}",
            hint="check ansible_user and ansible_ssh_private_key_file in the inventory",
            ssh_class="auth",
        )
    hint = f"check that {host} is up and its address is right: rbee-ctl hive list"
    if "timed out" in said or "timeout" in said:
        return SshTimeout(f"{host}: SSH did not answer in time: {message}", hint=hint, ssh_class="timeout")
    return NodeUnreachable(f"{host}: not reachable: {message}", hint=hint, ssh_class="connection")


#: What Ansible and sudo say when there is no way to become root.
_SUDO = (
    "missing sudo password",
    "incorrect sudo password",
    "a password is required",
    "a terminal is required",
    "not in the sudoers",
    "may not run sudo",
    "not allowed to execute",
    "premature end of stream waiting for become",
    "timeout (12s) waiting for privilege escalation",
)


def task_error(host: str, failed: TaskDone | None) -> RbeeError:
    """Return the error of a failed task: the one that our modules describe in ``rbee_error``, else the task's message."""
    if failed is None:
        return PlaybookFailed(f"{host}: failed", hint="run the command again with --verbose")
    told = _told(failed.result)
    if told is not None:
        cls = BY_CODE.get(str(told.get("code")), PlaybookFailed)
        details = {str(k): v for k, v in (told.get("details") or {}).items() if k not in ("hint", "message")}
        hint = told.get("hint")
        return cls(f"{host}: {told.get('message', 'failed')}", hint=str(hint) if hint else None, **details)
    if said := _line_with(failed.result, *_SUDO):
        return SudoRefused(
            f"{host}: sudo refused: {said}",
            hint=f"let the SSH user of {host} use sudo without a password (NOPASSWD: ALL in /etc/sudoers.d/), "
            "or give the password: ansible-playbook ... --ask-become-pass",
            task=failed.task,
        )
    if said := _line_with(failed.result, "no space left on device", "errno 28", "not enough space on device"):
        return DiskFull(
            f"{host}: no space left, in task '{failed.task}': {said}",
            hint=f"make room on {host} (ssh {host} df -h), then run the command again: it does what is left",
            task=failed.task,
        )
    return PlaybookFailed(
        f"{host}: task '{failed.task}': {_message(failed.result)}",
        hint="run the command again with --verbose to see Ansible's output",
        task=failed.task,
    )


def _told(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find ``rbee_error`` in a result or in the first failed item of a loop."""
    if isinstance(told := result.get("rbee_error"), dict):
        return told
    items = result.get("results")
    for item in items if isinstance(items, list) else []:
        if isinstance(item, dict) and item.get("failed") and isinstance(item.get("rbee_error"), dict):
            return dict(item["rbee_error"])
    return None
