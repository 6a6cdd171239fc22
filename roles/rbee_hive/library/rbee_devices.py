#!/usr/bin/python
"""The devices of a node, as facts."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_devices import devices

DOCUMENTATION = r"""
module: rbee_devices
short_description: Find out what a node can compute on
description:
  - Asks nvidia-smi, rocm-smi, vulkaninfo and /proc. A driver that does not answer within 20 s counts as none.
  - Changes nothing; check mode is the same.
options: {}
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
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    found = devices()
    counts = {}
    for device in found:
        counts[device["backend"]] = counts.get(device["backend"], 0) + 1
    result = {"devices": found, "backends": counts}
    module.exit_json(changed=False, ansible_facts={"rbee_devices": found}, rbee_result=result)


if __name__ == "__main__":
    main()
