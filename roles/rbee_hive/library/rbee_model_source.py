#!/usr/bin/python
"""Documentation of the action of the same name; the action runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rbee_model_source
short_description: Say where each machine of a play gets a model from
description:
  - One machine fetches a model from the hub and the others from that one. Which, follows from what the machines of the
    play found in their catalogs. Changes nothing and asks no machine.
options:
  ref:
    description: The model, a reference or an id.
    type: str
    required: true
  sha256: {type: str, description: Digest that the model must have.}
  say: {type: bool, default: false, description: Say where it comes from.}
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
    C(have), C(get) (from C(source)), C(ask) (whether a machine outside of the play has it), C(fetch) (from the hub, for all),
    C(wait) (for the one that fetches).
  returned: success
  type: str
source:
  description: For C(get), the machine that has the model.
  returned: success
  type: str
"""
