#!/usr/bin/python
"""Documentation of the action of the same name; the action runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rbee_lab
short_description: Run lab.py on the controller and show its progress
description:
  - Runs C(files/lab.py) of this role and prints its progress through Ansible's own output while it runs; making the root
    file system takes a minute and is never silent.
options:
  command:
    description: The verb of lab.py.
    type: str
    required: true
    choices: [up, down, status, reboot]
  arguments:
    description: What comes after the verb.
    type: list
    elements: str
    default: []
  directory:
    description: State of the lab.
    type: path
    required: true
  net:
    description: First three octets of its network.
    type: str
    required: true
  cache:
    description: Place of expensive builds.
    type: path
    required: true
attributes:
  check_mode:
    support: full
    description: C(up), C(down) and C(reboot) become C(status).
author: rbee
"""

EXAMPLES = r"""
- name: Boot three machines
  rbee_lab:
    command: up
    arguments: ["--nodes", "3"]
    directory: /srv/lab
    net: 10.77.0
    cache: /var/cache/rbee
"""

RETURN = r"""
rbee_result:
  description: What lab.py printed.
  type: dict
  returned: success
  sample:
    changed: true
    lab: {network: 10.77.0.0/24, bridge: rbee0, directory: /srv/lab, key: /srv/lab/id}
    nodes: [{name: lab1, state: running, address: 10.77.0.11}]
rbee_error:
  description: Why it failed.
  type: dict
  returned: failure
  sample: {code: MISSING_DEPENDENCY, message: the lab needs root, hint: sudo rbee-ctl lab up, details: {}}
"""
