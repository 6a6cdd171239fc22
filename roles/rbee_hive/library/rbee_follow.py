#!/usr/bin/python
"""Documentation of the action of the same name; the action runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rbee_follow
short_description: Show how a unit on a node is getting on, until it is done
description:
  - Looks once a second and prints lines that begin with C(rbee:) through Ansible's own output, so that a long task is never
    silent. A connection that breaks is tried again; the unit does not depend on it.
options:
  unit:
    description: The unit.
    type: str
    required: true
  progress_file:
    description: >-
      File of JSON lines that the unit writes. The action then ends with its last line: C(complete) gives C(rbee_result),
      C(failed) fails with C(rbee_error). Without it, the unit's status text is shown until the unit is up or down.
    type: path
  joined:
    description: Whether another run has begun it, which is said first.
    type: bool
    default: false
  label:
    description: What to put before status texts.
    type: str
    default: ''
  timeout_s:
    description: Longest time to follow, seconds; the unit is not stopped then.
    type: float
    default: 86400
  interval_s:
    description: Time between two looks, seconds.
    type: float
    default: 1
  lost_timeout_s:
    description: How long a broken connection is tried again, seconds.
    type: float
    default: 120
author: rbee
"""

EXAMPLES = r"""
- name: Show how the model loads
  rbee_follow:
    unit: rbee-worker@cpu0.service
    label: cpu0
"""

RETURN = r"""
rbee_result:
  description: From the progress file.
  returned: sometimes
  type: dict
active_state:
  description: What the unit is at the end.
  returned: always
  type: str
"""
