#!/usr/bin/python
"""Documentation of the action of the same name; the action runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rbee_send
short_description: Send the files of a model from the controller to a node
description:
  - Sends them over the connection that Ansible has, piece by piece into C(NAME.partial), and prints a line a second. What an
    earlier run left there is kept if it is the same, also a file that has its name already - its digest decides, not its
    size; a connection that breaks is tried again for two minutes and goes on
    where it broke. Looks for room before the first byte; a disk that fills up ends it and what was sent is removed.
  - The files get their names, and the model its entry, from M(rbee_download) with C(sent), which reads and checks them on
    the node.
options:
  files:
    description: Files on the controller. Of one part of a split model, all parts.
    type: list
    elements: str
    required: true
  dest: {type: str, required: true, description: Folder on the node.}
  owner: {type: str, default: rbee, description: "Who owns what is made there, and makes it: root writes nothing."}
  sha256: {type: str, description: "Digest of the model; without it, and of several files, the controller reads them for theirs."}
  bytes_per_s: {type: int, default: 0, description: "Rate limit; 0 is none."}
  silence_s: {type: float, default: 60, description: "After how long without a byte the node takes the line for cut, seconds."}
  wait_s: {type: float, default: 900, description: "Longest wait for another download that brings nothing, seconds."}
author: rbee
"""

EXAMPLES = r"""
- name: Send it
  rbee_send:
    files: [files/small-Q4_0.gguf]
    dest: /var/lib/rbee/models/local/small
"""

RETURN = r"""
files:
  description: What rbee_download takes as C(sent).
  returned: success
  type: list
  elements: dict
  sample: [{name: small-Q4_0.gguf, size_bytes: 123, sha256: DIGEST}]
sent_bytes:
  description: What went over the connection.
  returned: success
  type: int
"""
