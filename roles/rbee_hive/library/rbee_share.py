#!/usr/bin/python
"""Let other machines of the fleet fetch a model from a node."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_node import SANDBOX, NodeError, alone, any_runtime_python, begin, run, show
from ansible.module_utils.rbee_store import READY, CatalogError, find, parse_ref, read

DOCUMENTATION = r"""
module: rbee_share
short_description: Let other machines of the fleet fetch a model from this one
description:
  - Starts a transient unit, run as I(user) in the sandbox of systemd, that gives the model to whoever has the fleet token;
    one that runs already is used again. It ends by itself two minutes after the last byte.
  - Never fails, so that one machine that can not share stops nobody. Without C(port) it says why in C(why_not).
options:
  ref:
    description: The model, a reference or an id.
    type: str
    required: true
  port: {type: int, default: 0, description: TCP port to listen on; 0 is any that is free.}
  user: {type: str, default: rbee, description: Who reads the files.}
  models_dir: {type: path, default: /var/lib/rbee/models, description: Where the models are.}
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Share it
  rbee_share:
    ref: smollm2-135m-instruct
"""

RETURN = r"""
port:
  description: Where the model is shared, 0 if it is not.
  returned: success
  type: int
why_not:
  description: Why it is not shared.
  returned: success
  type: str
"""

SHARE_DIR = "rbee-shares"
#: How long the unit may take to listen, seconds.
START_S = 30


def shared_at(unit, address_file):
    """Return the port of a unit that shares already, else None. That we connect makes it stay a while."""
    if show(unit)[unit]["ActiveState"] != "active":
        return None
    try:
        port = json.loads(address_file.read_text(encoding="utf-8"))["port"]
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except (OSError, ValueError):
        return None
    return port


def begin_sharing(params, model, python, unit, address_file):
    """Start the unit and return its port; raises NodeError."""
    properties = [
        *SANDBOX,
        f"User={params['user']}",
        "LoadCredential=fleet-token:/etc/rbee/credentials/fleet-token",
        f"Description=rbee: shares {model['id']} with the fleet",
    ]
    run("systemctl", "stop", unit)
    begin(
        unit,
        address_file,
        properties,
        python,
        "-m",
        "rbee_serve.models.share",
        f"--model={model['id']}",
        f"--models-dir={params['models_dir']}",
        f"--port={params['port']}",
        f"--address-file={address_file}",
    )
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if (port := shared_at(unit, address_file)) is not None:
            return port
        if show(unit)[unit]["ActiveState"] not in ("active", "activating"):
            break
        time.sleep(0.1)
    _, said, _ = run("journalctl", "--no-pager", "-o", "cat", "-n", "3", "-u", unit)
    raise NodeError("UNIT_START_FAILED", f"{unit} does not share: {' '.join(said.split()) or 'it said nothing'}")


def share(params, check):
    """Return the port; raises NodeError, CatalogError."""
    python = any_runtime_python(params["install_path"])
    entries, _ = read(params["models_dir"], python)
    model = find(entries, parse_ref(params["ref"]))
    if model is None or model["status"] != READY or not python:
        raise NodeError("MODEL_NOT_FOUND", f"{params['ref']} is not here any more")
    key = hashlib.sha256(model["id"].encode()).hexdigest()[:12]
    unit, address_file = f"rbee-share-{key}.service", Path("/run", SHARE_DIR, f"{key}.json")
    if check:
        return 0
    with alone(f"rbee-share-{key}"):  # several machines ask at once
        return shared_at(unit, address_file) or begin_sharing(params, model, python, unit, address_file)


def main():
    module = AnsibleModule(
        argument_spec={
            "ref": {"type": "str", "required": True},
            "port": {"type": "int", "default": 0},
            "user": {"type": "str", "default": "rbee"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, port=share(module.params, module.check_mode), why_not="")
    except (NodeError, CatalogError) as e:
        module.exit_json(changed=False, port=0, why_not=e.message)


if __name__ == "__main__":
    main()
