#!/usr/bin/python
"""The devices of a node, as facts."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_devices import devices
from ansible.module_utils.rbee_node import NodeError, fail
from ansible.module_utils.rbee_plan import check_device

DOCUMENTATION = r"""
module: rbee_devices
short_description: Find out what a node can compute on
description:
  - Asks nvidia-smi, rocm-smi, vulkaninfo and /proc. A driver that does not answer within 20 s counts as none.
  - Changes nothing; check mode is the same.
  - With I(declared) it fails, naming what is there, when one of these workers needs a device that this machine
    does not have, and returns nothing.
options:
  declared:
    description: Workers, each with C(backend) and C(device).
    type: list
    elements: dict
author: rbee
"""

EXAMPLES = r"""
- name: Find the devices
  rbee_devices:
"""

RETURN = r"""
ansible_facts:
  description: The devices; accelerators first, the CPU last. Memory in bytes, null where the driver does not tell.
  returned: always
  type: dict
  sample:
    rbee_devices:
      - {id: "cpu:0", backend: cpu, device: 0, name: "Intel(R) Xeon(R)", cores: 2, memory_bytes: 25769803776}
rbee_result:
  description: The same under the key C(devices), with C(backends) and how many devices each has.
  returned: always
  type: dict
"""


def main():
    module = AnsibleModule(argument_spec={"declared": {"type": "list", "elements": "dict"}}, supports_check_mode=True)
    found = devices()
    try:
        for worker in module.params["declared"] or []:
            check_device({"backend": worker["backend"], "device": int(worker.get("device", 0))}, found)
    except NodeError as e:
        fail(module, e)
    counts = {}
    for device in found:
        counts[device["backend"]] = counts.get(device["backend"], 0) + 1
    result = {"devices": found, "backends": counts}
    if module.params["declared"] is not None:
        module.exit_json(changed=False)
    module.exit_json(changed=False, ansible_facts={"rbee_devices": found}, rbee_result=result)


if __name__ == "__main__":
    main()
