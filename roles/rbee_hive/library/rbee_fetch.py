#!/usr/bin/python
"""Documentation of the action of the same name; the action runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rbee_fetch
short_description: Fetch a model on the controller
description:
  - Runs C(python -m rbee_serve.models.download) on the controller and prints how far it is through Ansible's own output.
    Several at once of the same model fetch it once; one that is there is left alone.
options:
  ref: {type: str, required: true, description: The model, a reference.}
  models_dir: {type: path, required: true, description: Folder on the controller.}
  sha256: {type: str, description: Digest that the model must have.}
  endpoint: {type: str, description: Address of the hub; by default the public one.}
  token: {type: str, description: "The hub's token; by default HF_TOKEN."}
  token_file: {type: str, description: "File on the controller with the hub's token, where there is neither."}
  tries: {type: str, description: Tries in all.}
  pause_s: {type: str, description: "Pause after the first failed try, seconds; doubled with each."}
  stall_timeout_s: {type: str, description: "Longest time without a byte, seconds."}
  bytes_per_s: {type: str, description: "Rate limit; 0 is none."}
author: rbee
"""

EXAMPLES = r"""
- name: Fetch it here
  rbee_fetch:
    ref: hf:org/repo:Q4_K_M
    models_dir: /var/cache/rbee/hub
"""

RETURN = r"""
model:
  description: Its catalog entry on the controller.
  returned: success
  type: dict
files:
  description: Its files on the controller.
  returned: success
  type: list
  elements: str
"""
