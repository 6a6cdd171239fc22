"""Reaching a machine through Ansible: three tries for one that does not answer, one for one that refuses (SPEC S-01..03)."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rbee_ctl import node_facts
from rbee_ctl.queen_client import jittered
from rbee_ctl.session import Session
from rbee_serve.contract.errors import PlaybookFailed, RbeeError, SshCommandFailed

#: Seconds before each try (SPEC 3.8); jitter on top.
PAUSES_S = (0.0, 0.2, 0.4)
#: Longest that a try may take to connect, seconds (SPEC 3.8); ``$RBEE_SSH_TIMEOUT_S`` overrides it.
TRY_TIMEOUT_S = 10

Probe = Mapping[str, Any]


def probe(session: Session, name: str, variables: Mapping[str, Any] | None = None) -> Probe:
    """Return what playbooks/probe.yml finds on the machine; its contact and devices are remembered.

    ``variables`` describe a machine that the inventory does not have yet, or override what it has: nothing is written.
    Raises what became of the last try.
    """
    with tempfile.TemporaryDirectory(prefix="rbee-ctl-") as folder:
        # A connection of its own: one that is kept open from an earlier verb would let a wrong key or user pass.
        host = {"ansible_control_path": f"{folder}/%%C", **(variables or {})}
        candidate = Path(folder, "candidate.yml")
        candidate.write_text(json.dumps({"rbee_hives": {"hosts": {name: host}}}), encoding="utf-8")
        timeout_s = int(os.environ.get("RBEE_SSH_TIMEOUT_S") or TRY_TIMEOUT_S)
        for number, pause in enumerate(PAUSES_S, start=1):
            pause = jittered(pause)
            session.ui.narrate(
                "ctl",
                "ssh_probe",
                f"{name}: attempt {number}/{len(PAUSES_S)} (timeout {timeout_s}s, delay {pause * 1000:.0f}ms)",
            )
            time.sleep(pause)
            try:
                return _try(session, name, candidate, timeout_s)
            except RbeeError as e:
                _blame_key_mode(e, session, name, variables)
                if not e.retryable or number == len(PAUSES_S):
                    raise
                session.ui.narrate("ctl", "ssh_probe", e.message)
    raise AssertionError("unreachable")


def _blame_key_mode(error: RbeeError, session: Session, name: str, variables: Mapping[str, Any] | None) -> None:
    """Say chmod where ssh refused a key for being readable by others: Ansible passes on ssh's last line alone."""
    host = session.inventory.hosts.get(name)
    known = {**(host.variables if host is not None else {}), **(variables or {})}
    key = Path(str(known.get("ansible_ssh_private_key_file") or "")).expanduser()
    if error.details.get("ssh_class") == "auth" and key.is_file() and key.stat().st_mode & 0o077:
        error.hint = f"others can read the key, so ssh does not use it: chmod 600 {key}"


def _try(session: Session, name: str, candidate: Path, timeout_s: int) -> Probe:
    from rbee_ctl.commands.fleet import one_host

    # As in ansible.cfg, but the connection ends with the probe.
    ssh_args = (
        f"-o ControlMaster=auto -o ControlPersist=2s -o ConnectTimeout={timeout_s} -o ServerAliveInterval=2 "
        "-o ServerAliveCountMax=2 -o PreferredAuthentications=publickey"
    )
    environ = {"ANSIBLE_SSH_ARGS": ssh_args}
    play = session.play("probe", limit=name, extra_inventories=[candidate], silent=True, environ=environ)
    try:
        found = one_host(play, name, "checks")
    except PlaybookFailed as e:
        raise SshCommandFailed(
            f"{e.message}: SSH works, a command there does not",
            hint="the machine needs /usr/bin/python3, and the user root or passwordless sudo",
            ssh_class="command",
        ) from e
    node_facts.capabilities(session.settings.state_path, name, found)
    return found
