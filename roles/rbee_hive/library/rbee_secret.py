#!/usr/bin/python
"""Documentation of the action of the same name; the action runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rbee_secret
short_description: Write a secret into a file on a node
description:
  - Sends it over the standard input of a shell on the node, so that it is in no temporary file, here or there, and in no
    argument. The file is readable by its owner alone. Without I(keep) it never counts as a change - what is
    written is gone after its use.
options:
  content: {type: str, required: true, description: The secret.}
  dest: {type: path, required: true, description: "File on the node, in a folder in memory; with I(keep) in one of root's."}
  keep:
    description: It stays. Counts as a change when it differs from what is there, which is replaced at once or not at all.
    type: bool
    default: false
author: rbee
"""

EXAMPLES = r"""
- name: Hand it over
  rbee_secret:
    content: "{{ token }}"
    dest: /run/token
  no_log: true
"""

RETURN = r"""
written:
  description: Whether it is there now; not in check mode.
  returned: success
  type: bool
"""
