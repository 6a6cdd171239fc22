"""``rbee-ctl logs``: the journal of a machine's units. The one command that runs ssh itself: Ansible can not stream."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rbee_ctl import completion
from rbee_ctl.commands.options import session
from rbee_ctl.result import OperationResult

if TYPE_CHECKING:
    from rbee_ctl.inventory import Host


def logs(
    ctx: typer.Context,
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            "--hive",
            metavar="NODE",
            autocompletion=completion.nodes,
            help="machine of the inventory; default: the only one",
        ),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option("--worker", metavar="NAME", autocompletion=completion.workers, help="this worker alone (cpu0, or its id)"),
    ] = None,
    queen: Annotated[bool, typer.Option("--queen", help="the queen alone")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until Ctrl+C")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=100_000, help="how many of the last lines first")] = 50,
    raw: Annotated[bool, typer.Option("--raw", help="the journal's lines as they are, also where the message is JSON")] = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON object a line; an envelope only where something fails")] = False,
) -> OperationResult:
    """Show the journal of rbee's units on a machine."""
    from rbee_ctl.commands.hive import one_node
    from rbee_serve.contract.errors import ExitCode, NodeUnreachable, SshCommandFailed
    from rbee_serve.contract.log_lines import readable

    s = session(ctx, json=json)
    json = s.ui.json
    host = one_node(s, node)
    units = ["rbee-*"]
    if worker is not None:
        units = [f"rbee-worker@{worker.removeprefix(f'{host.name}-')}.service"]
    elif queen:
        units = ["rbee-queen.service"]
    command = journal_command(host, units, follow=follow, lines=lines, json=json)
    sys.stdout.flush()
    # stdin stays open as long as this process lives: its end is what ends journalctl over there, also after kill -9.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    try:
        code = _shown(child, _json_line(host.name) if json else str if raw else readable)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if child.stdin is not None:
            child.stdin.close()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        return OperationResult("logs", exit_code=ExitCode.INTERRUPTED, answered=True)
    if code == 255:
        raise NodeUnreachable(
            f"{host.name}: ssh ended with 255; its words stand above", hint=f"rbee-ctl hive ssh-test --node {host.name}"
        )
    if code != 0:
        raise SshCommandFailed(
            f"{host.name}: journalctl ended with {code}; its words stand above",
            hint="the user needs root, passwordless sudo or the group systemd-journal there",
        )
    return OperationResult("logs", answered=True)


def _shown(child: subprocess.Popen[str], shown: Callable[[str], str]) -> int:
    """Print each line of the child as ``shown`` and return its exit code."""
    for line in child.stdout or ():
        sys.stdout.write(shown(line.rstrip("\n")) + "\n")
        sys.stdout.flush()
    return child.wait()


def _json_line(node: str) -> Callable[[str], str]:
    from rbee_serve.contract.log_lines import as_json, from_journal

    return lambda line: as_json(from_journal(line, node))


def journal_command(host: Host, units: list[str], *, follow: bool, lines: int, json: bool = False) -> list[str]:
    """Return the command that shows the journal of ``units``: over ssh as the inventory says, or here."""
    form = ["--output=json", "--all"] if json else ["--output=short-iso"]
    journal = ["journalctl", "--no-pager", *form, f"--lines={lines}", *(a for u in units for a in ("--unit", u))]
    script = shlex.join(journal)
    if follow:
        # With the connection gone journalctl would live on until its next line: whoever waits for our end stops it.
        script = f"{script} --follow <&- & p=$!; cat >/dev/null; kill $p 2>/dev/null; wait $p 2>/dev/null; exit 0"
    variables = host.variables
    user = variables.get("ansible_user") or variables.get("ansible_ssh_user")
    if variables.get("ansible_connection") == "local":
        return ["sh", "-c", script] if os.geteuid() == 0 else ["sudo", "-n", "sh", "-c", script]
    options = ["BatchMode=yes", "ConnectTimeout=10", "ControlMaster=no", "ControlPath=none", "LogLevel=ERROR"]
    command = ["ssh", *(a for o in options for a in ("-o", o))]
    if port := variables.get("ansible_port"):
        command += ["-p", str(port)]
    if key := variables.get("ansible_ssh_private_key_file"):
        command += ["-i", str(Path(str(key)).expanduser())]
    if user:
        command += ["-l", str(user)]
    for name in ("ansible_ssh_common_args", "ansible_ssh_extra_args"):
        command += shlex.split(str(variables.get(name) or ""))
    root = "" if user == "root" else "sudo -n "
    return [*command, "--", host.address, f"{root}sh -c {shlex.quote(script)}"]
