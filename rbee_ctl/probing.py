"""Reaching a machine through Ansible: three tries for one that does not answer, one for one that refuses (SPEC S-01..03)."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rbee_ctl import node_facts
from rbee_ctl.queen_client import jittered
from rbee_ctl.session import Session
from rbee_serve.contract.errors import RbeeError

#: Seconds before each try (SPEC 3.8); jitter on top.
PAUSES_S = (0.0, 0.2, 0.4)
#: Longest a try may take to connect, for the message; ansible.cfg sets it.
TRY_TIMEOUT_S = 10

Probe = Mapping[str, Any]


def probe(session: Session, name: str, variables: Mapping[str, Any] | None = None) -> Probe:
    """Return what playbooks/probe.yml finds on the machine; its contact and devices are remembered.

    ``variables`` describe a machine that the inventory does not have yet, or override what it has: nothing is written.
    Raises what became of the last try.
    """
    with tempfile.TemporaryDirectory(prefix="rbee-ctl-") as folder:
        extra: list[Path] = []
        if variables is not None:
            candidate = Path(folder, "candidate.yml")
            candidate.write_text(json.dumps({"rbee_hives": {"hosts": {name: dict(variables)}}}), encoding="utf-8")
            extra.append(candidate)
        for number, pause in enumerate(PAUSES_S, start=1):
            pause = jittered(pause)
            session.ui.narrate(
                "ctl",
                "ssh_probe",
                f"{name}: attempt {number}/{len(PAUSES_S)} (timeout {TRY_TIMEOUT_S}s, delay {pause * 1000:.0f}ms)",
            )
            time.sleep(pause)
            try:
                return _try(session, name, extra)
            except RbeeError as e:
                if not e.retryable or number == len(PAUSES_S):
                    raise
                session.ui.narrate("ctl", "ssh_probe", e.message)
    raise AssertionError("unreachable")


def _try(session: Session, name: str, extra: list[Path]) -> Probe:
    from rbee_ctl.commands.fleet import one_host

    found = one_host(session.play("probe", limit=name, extra_inventories=extra, silent=True), name, "checks")
    node_facts.capabilities(session.settings.state_path, name, found)
    return found
