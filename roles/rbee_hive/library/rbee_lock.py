#!/usr/bin/python
"""Take and give back the lock of a node."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_lock import ARGUMENTS, release, take
from ansible.module_utils.rbee_node import NodeError, fail

DOCUMENTATION = r"""
module: rbee_lock
short_description: Keep two controllers from changing one node at the same time
description:
  - Held by one run of ansible-playbook while it changes the node. Another run is refused with C(NODE_LOCKED), which says who,
    from where and since when. Modules that change a node refuse as well while another run holds it.
  - The lock of a run that died does not stay - a run from the same controller sees that the process is gone and takes it over;
    any other one can after 15 minutes without a sign of life. It is in /run, so a reboot forgets it.
  - Check mode neither takes nor minds it. Never C(changed) - the lock is no part of a machine's state.
options:
  state:
    description: What it shall be.
    type: str
    choices: [held, released]
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
taken_from:
  description: The run that held it and is dead.
  returned: when there was one
  type: dict
"""


def main():
    module = AnsibleModule(
        argument_spec={"state": {"type": "str", "choices": ["held", "released"], "required": True}, **ARGUMENTS},
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False)
    if not module.params["run"]:
        module.fail_json(msg="run is missing: the action plugin rbee_lock fills it in")
    try:
        if module.params["state"] == "released":
            release(module.params["run"])
            module.exit_json(changed=False)
        dead = take(module.params["run"])
        said = [f"took over the lock of {dead.get('user')}@{dead.get('host')}, whose run has died"] if dead else []
        module.exit_json(changed=False, taken_from=dead, narration=said)
    except NodeError as e:
        fail(module, e)


if __name__ == "__main__":
    main()
