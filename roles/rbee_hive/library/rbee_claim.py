#!/usr/bin/python
"""Note on one machine of a fleet who is about to fetch a model, so that of runs in the same moment one asks the hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_node import RUN_DIR, NodeError, alone, fail

DOCUMENTATION = r"""
module: rbee_claim
short_description: Note who is about to fetch a model for the fleet
description:
  - Runs of different users, and jobs of the queen, know nothing of each other; what they share are the machines. All of them
    ask the same one before they begin a download. The first one's note holds until it is taken back, or a minute, by when the
    catalog of the machine that fetches tells it.
  - A note is no lock. Whoever meets one joins the download on the machine that is named, and begins it there if it has not begun.
options:
  ref: {type: str, required: true, description: The model.}
  machine: {type: str, required: true, description: Who shall fetch it.}
  state:
    description: C(present) makes the note unless there is another one, C(absent) takes the own one back.
    type: str
    choices: [present, absent]
    default: present
  passed_by:
    description: Machines that can not fetch it; a note that names one of them is worth nothing.
    type: list
    elements: str
    default: []
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Is somebody else at it?
  rbee_claim:
    ref: hf:org/repo:Q4_K_M
    machine: lab2
  delegate_to: lab1
"""

RETURN = r"""
claimed:
  description: The machine that fetches it for somebody else already; null, and it is I(machine)'s turn.
  returned: success
  type: str
"""

#: Longest time between the note and the download's own entry in the catalog, seconds.
VALID_S = 60.0


def path_of(ref):
    """Return the note's file."""
    return Path(RUN_DIR, f"rbee-fetching-{hashlib.sha256(ref.encode()).hexdigest()[:12]}.json")


def read(path):
    """Return a note that holds, else {}."""
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(path.read_text(encoding="utf-8"))
        if 0 <= time.monotonic() - note["at"] < VALID_S:
            return note
    return {}


def work(params, check):
    """Return the machine of a note that was made before, or None."""
    path = path_of(params["ref"])
    with contextlib.nullcontext() if check else alone(path.name):
        note = read(path)
        mine = note.get("machine") == params["machine"]
        if params["state"] == "absent":
            if mine and not check:
                path.unlink(missing_ok=True)
            return None
        if note and not mine and note["machine"] not in params["passed_by"]:
            return note["machine"]
        if not check:
            part = path.with_suffix(".part")
            part.write_text(json.dumps({"machine": params["machine"], "at": time.monotonic()}), encoding="utf-8")
            part.replace(path)
    return None


def main():
    module = AnsibleModule(
        argument_spec={
            "ref": {"type": "str", "required": True},
            "machine": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "passed_by": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        claimed = work(module.params, module.check_mode)
    except (NodeError, OSError) as e:
        fail(module, e if isinstance(e, NodeError) else NodeError("DOWNLOAD_FAILED", f"{RUN_DIR}: {e}"))
    module.exit_json(changed=False, claimed=claimed)


if __name__ == "__main__":
    main()
