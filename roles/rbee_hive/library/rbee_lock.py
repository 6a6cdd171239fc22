#!/usr/bin/python
"""Take and give back the lock of a node."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_lock import ARGUMENTS, check, release, take, taken_over
from ansible.module_utils.rbee_node import NodeError, fail

DOCUMENTATION = r"""
module: rbee_lock
short_description: Keep two controllers from changing one node at the same time
description:
  - Held by one run of ansible-playbook while it changes the node. Another run is refused with C(NODE_LOCKED), which says who,
    from where and since when. Modules that change a node refuse as well while another run holds it.
  - The lock of a run that died does not stay - a run from the same controller sees that the process is gone and takes it over;
    any other one can after an hour without a sign of life. It is in /run, so a reboot forgets it.
  - What the dead run left working on the node is killed then; it is known by the variable C(RBEE_RUN) in its environment, which
    the plays set to C(id).
  - Check mode neither takes nor minds it. Never C(changed) - the lock is no part of a machine's state.
options:
  state:
    description: What it shall be. C(free) refuses while another run holds it and takes nothing.
    type: str
    choices: [held, free, released]
    required: true
  run:
    description: Identity of the run; the action of the same name fills it in.
    type: dict
author: rbee
"""

EXAMPLES = r"""
- name: Nobody else changes this machine now
  rbee_lock:
    state: held
"""

RETURN = r"""
id:
  description: Identity of this run.
  returned: when it is held
  type: str
taken_from:
  description: The run that held it and is dead.
  returned: when there was one
  type: dict
"""


def held(run):
    """Take the lock; returns what the module tells."""
    dead = take(run)
    return {"id": run["id"], "taken_from": dead, "narration": taken_over(dead)}


def main():
    choices = ["held", "free", "released"]
    module = AnsibleModule(
        argument_spec={"state": {"type": "str", "choices": choices, "required": True}, **ARGUMENTS}, supports_check_mode=True
    )
    if module.check_mode:
        module.exit_json(changed=False)
    run = module.params["run"]
    if not run:
        module.fail_json(msg="run is missing: the action plugin rbee_lock fills it in")
    result = {}
    try:
        if module.params["state"] == "held":
            result = held(run)
        elif module.params["state"] == "released":
            release(run)
        else:
            check(run)
    except NodeError as e:
        fail(module, e)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
