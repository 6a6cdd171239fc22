#!/usr/bin/python
"""Refuse a file system that has no room, before anything half is written to it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_node import NodeError, fail

DOCUMENTATION = r"""
module: rbee_room
short_description: Fail with DISK_FULL unless a file system has room
description:
  - Looks at the file system that I(path) is on, or would be on. Changes nothing.
options:
  path:
    description: Folder that is written to; it need not be there yet.
    type: path
    required: true
  needed_bytes:
    description: What has to be free.
    type: int
    required: true
  purpose:
    description: What it is for, as the message says it.
    type: str
    required: true
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Room for a runtime
  rbee_room:
    path: /opt/rbee
    needed_bytes: 200000000
    purpose: a runtime
"""

RETURN = r"""
free_bytes:
  description: What is free.
  returned: success
  type: int
"""


def check(path, needed, purpose):
    """Return what is free; raises NodeError DISK_FULL with both figures."""
    place = next(p for p in (path, *path.parents) if p.is_dir())
    there = shutil.disk_usage(place).free
    if there < needed:
        raise NodeError(
            "DISK_FULL",
            f"no space left for {purpose}: {place} has {there / 1e6:.0f} MB free, about {needed / 1e6:.0f} MB are needed",
            f"make room (on the machine: df -h {place}), then run the command again: it does what is left",
            path=str(place),
            available_bytes=there,
            required_bytes=needed,
        )
    return there


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "needed_bytes": {"type": "int", "required": True},
            "purpose": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    try:
        there = check(Path(module.params["path"]), module.params["needed_bytes"], module.params["purpose"])
    except NodeError as e:
        fail(module, e)
    module.exit_json(changed=False, free_bytes=there)


if __name__ == "__main__":
    main()
