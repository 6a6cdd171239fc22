#!/usr/bin/python
"""Documentation of the action of the same name; the action runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rbee_model_source
short_description: Say where each machine of a play gets a model from
description:
  - One machine fetches a model from the hub and the others from that one. Which, follows from what the machines of the
    play found in their catalogs, and from what came of the tries so far; if one that fetches fails for a reason of its own,
    it is the next one's turn.
  - Fails for all with the same reason when the hub itself refuses (no such model, no access, a wrong digest), or when three
    machines could not get it with all their tries.
  - Changes nothing on any machine and asks none.
options:
  ref:
    description: The model, a reference or an id. Of a C(file:///) reference each machine has its own file.
    type: str
    required: true
  sha256: {type: str, description: Digest that the model must have.}
  say: {type: list, elements: str, description: "For these roles say where it comes from, and what failed before."}
  claims:
    description: Folder on the controller in which runs note who fetches what, so that a second one joins.
    type: path
author: rbee
"""

EXAMPLES = r"""
- name: Where does it come from?
  rbee_model_source:
    ref: hf:org/repo:Q4_K_M
"""

RETURN = r"""
role:
  description: >-
    C(have), C(get) (from C(source)), C(ask) (whether machines outside of the play have it), C(fetch) (from the hub, for all),
    C(join) (wait until C(source), which fetches it for another run, has it), C(wait) (for the one that fetches).
  returned: success
  type: str
source:
  description: For C(get) the machine that has the model, for C(join) the one that fetches it.
  returned: success
  type: str
passed_by:
  description: Machines that could not fetch it, or do not give it.
  returned: success
  type: list
  elements: str
"""
