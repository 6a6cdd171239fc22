#!/usr/bin/python
"""Begin to bring a model onto a node."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_node import SANDBOX, NodeError, alone, any_runtime_python, begin, fail, show
from ansible.module_utils.rbee_store import READY, CatalogError, find, parse_ref, read

DOCUMENTATION = r"""
module: rbee_download
short_description: Begin to download a model
description:
  - Starts a transient unit, run as I(user) in the sandbox of systemd, that downloads the model with the runtime's
    C(python -m rbee_serve.models.download); returns at once. The unit goes on when the connection to the node is lost.
  - A model that is catalogued as Ready is left alone, without traffic. A download of it that runs already is joined.
  - The action C(rbee_follow) shows the progress and gives the result.
options:
  ref:
    description: C(hf:org/repo[:file or quantisation]), C(https://host/file.gguf#sha256=...), C(file:///path) or a catalog id.
    type: str
    required: true
  token_file:
    description: File on the node with the hub's token; becomes the unit's credential and is removed.
    type: path
  endpoint:
    description: Address of the hub; by default the public one.
    type: str
  peer:
    description: Address of a machine of the fleet that shares the model (module rbee_share); the hub is not asked then.
    type: str
  sha256: {type: str, description: Digest that the model must have.}
  sent:
    description: Files that the action C(rbee_send) has laid into I(sent_to); nothing is fetched, they are checked and catalogued.
    type: list
    elements: dict
    default: []
  sent_to: {type: path, description: The folder of the files that were sent.}
  user: {type: str, default: rbee, description: Who downloads and owns the files.}
  tries: {type: int, default: 6, description: Tries in all.}
  pause_s: {type: float, default: 0.1, description: "Pause after the first failed try, seconds; doubled with each."}
  stall_timeout_s: {type: float, default: 60, description: "Longest time without a byte, seconds."}
  bytes_per_s: {type: int, default: 0, description: "Rate limit; 0 is none."}
  roots:
    description: Directories besides I(models_dir) that C(file:///) may point into.
    type: list
    elements: path
    default: []
  models_dir: {type: path, default: /var/lib/rbee/models, description: Where the models are.}
  install_path: {type: path, default: /opt/rbee, description: Where the runtimes are.}
  install_hint:
    description: Command that installs rbee on this node.
    type: str
    default: ansible-playbook site.yml
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Begin the download
  rbee_download:
    ref: hf:HuggingFaceTB/SmolLM2-135M-Instruct-GGUF:Q4_1
"""

RETURN = r"""
unit:
  description: The transient unit; null when the model is there already.
  returned: success
  type: str
progress_file:
  description: Its progress, JSON lines.
  returned: success
  type: str
joined:
  description: Whether another run has begun this download.
  returned: sometimes
  type: bool
rbee_result:
  description: Only when the model is there already.
  returned: sometimes
  type: dict
  sample: {model: {id: smollm2-135m-instruct.q4_1, status: Ready}, downloaded: false}
"""


PROGRESS_DIR = "rbee-downloads"


def begin_download(params, python, unit, progress_file):
    """Start the transient unit that downloads."""
    properties = [
        *SANDBOX,
        f"User={params['user']}",
        f"ReadWritePaths={params['models_dir']}",
        f"Description=rbee: download of {params['ref']}",
    ]
    if params["token_file"]:
        properties.append(f"LoadCredential=hf-token:{params['token_file']}")
    if params["peer"]:
        properties.append("LoadCredential=fleet-token:/etc/rbee/credentials/fleet-token")
    environment = {"HF_HOME": f"/run/{PROGRESS_DIR}/home", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    arguments = {
        "--ref": params["ref"],
        "--models-dir": params["models_dir"],
        "--progress-file": progress_file,
        "--tries": params["tries"],
        "--pause-s": params["pause_s"],
        "--stall-timeout-s": params["stall_timeout_s"],
        "--bytes-per-s": params["bytes_per_s"],
        "--endpoint": params["endpoint"] or None,
        "--sha256": params["sha256"] or None,
        "--peer": params["peer"] or None,
        "--home": params["sent_to"] or None,
    }
    sent = [f"{f['name']}:{f['size_bytes']}:{f.get('sha256') or ''}" for f in params["sent"]]
    begin(
        unit,
        progress_file,
        properties,
        python,
        "-m",
        "rbee_serve.models.download",
        *[str(x) for pair in arguments.items() if pair[1] is not None for x in pair],
        *[str(x) for root in params["roots"] for x in ("--root", root)],
        *[x for told in sent for x in ("--sent", told)],
        environment=environment,
    )


def work(params, check):
    python = any_runtime_python(params["install_path"])
    ref = parse_ref(params["ref"])
    entries, _ = read(params["models_dir"], python)
    entry = find(entries, ref)
    if entry and entry["status"] == READY and params["sha256"] in (None, "", entry.get("sha256")) and not params["sent"]:
        return {"changed": False, "unit": None, "progress_file": None, "rbee_result": {"model": entry, "downloaded": False}}
    if entry and ref.kind == "id":
        params["ref"] = entry["reference"]  # a download that broke, asked for by its id
    elif ref.kind == "id" and not params["peer"] and not params["sent"]:
        raise NodeError(
            "MODEL_NOT_FOUND",
            f"no model {ref.text!r} in the catalog, and only hf: and https:// references can be downloaded",
            "rbee-ctl model download hf:org/repo:file.gguf",
            known=[e["id"] for e in entries],
        )
    unit = f"rbee-download-{hashlib.sha256(params['ref'].encode()).hexdigest()[:12]}.service"
    progress_file = f"/run/{PROGRESS_DIR}/{unit.removesuffix('.service')}.jsonl"
    if not python and not check:
        expected = f"{params['install_path']}/runtimes/cpu/VERSION/bin/python"
        raise NodeError(
            "WORKER_BINARY_NOT_FOUND",
            f"no runtime on this machine to download with, expected {expected}",
            params["install_hint"],
            expected_path=expected,
        )
    joined = False
    if not check:
        with alone(unit):  # a second caller in the same moment joins the first (SPEC E-04)
            joined = show(unit)[unit]["ActiveState"] in ("active", "activating")
            if not joined:
                begin_download(params, python, unit, progress_file)
    return {"changed": True, "unit": unit, "progress_file": progress_file, "joined": joined}


def main():
    module = AnsibleModule(
        argument_spec={
            "ref": {"type": "str", "required": True},
            "token_file": {"type": "path", "no_log": False},
            "endpoint": {"type": "str"},
            "peer": {"type": "str"},
            "sha256": {"type": "str"},
            "sent": {"type": "list", "elements": "dict", "default": []},
            "sent_to": {"type": "path"},
            "user": {"type": "str", "default": "rbee"},
            "tries": {"type": "int", "default": 6},
            "pause_s": {"type": "float", "default": 0.1},
            "stall_timeout_s": {"type": "float", "default": 60.0},
            "bytes_per_s": {"type": "int", "default": 0},
            "roots": {"type": "list", "elements": "path", "default": []},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
            "install_hint": {"type": "str", "default": "ansible-playbook site.yml"},
        },
        supports_check_mode=True,
    )
    try:
        result = work(module.params, module.check_mode)
    except (NodeError, CatalogError) as e:
        fail(module, e)
    finally:
        if module.params["token_file"] and not module.check_mode:
            with contextlib.suppress(FileNotFoundError):
                Path(module.params["token_file"]).unlink()
    module.exit_json(**result)


if __name__ == "__main__":
    main()
