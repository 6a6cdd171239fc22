#!/usr/bin/python
"""The catalog of a node's models."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rbee_gguf import GgufError, facts
from ansible.module_utils.rbee_node import NodeError, any_runtime_python, fail
from ansible.module_utils.rbee_store import READY, CatalogError, default_id, find, now_iso, parse_ref, put, read, remove

DOCUMENTATION = r"""
module: rbee_catalog
short_description: List, find or register the models of a node
description:
  - The catalog is the C(metadata.yaml) beside each model's files. Broken ones are reported under C(problems), never fatal.
options:
  state:
    description: >-
      C(list) returns all, C(get) the one that I(ref) means or fails with MODEL_NOT_FOUND, C(find) the same but null
      instead of failing, C(present) registers the file at I(path).
    type: str
    choices: [list, get, find, present]
    default: list
  ref:
    description: Catalog id, C(hf:org/repo[:file]) or C(file:///path).
    type: str
  id:
    description: For C(present), the model's id; by default its file's stem in lower case.
    type: str
  path:
    description: For C(present), the GGUF file, two directories beneath I(models_dir) (ORG/REPO/FILE).
    type: path
  sha256:
    description: For C(present), the digest that the file must have. Checked once, when it is registered.
    type: str
  models_dir:
    description: Where the models are.
    type: path
    default: /var/lib/rbee/models
  install_path:
    description: Where the runtimes are; one of them reads metadata written as YAML by hand.
    type: path
    default: /opt/rbee
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: List the models
  rbee_catalog:

- name: Register a file that was copied
  rbee_catalog:
    state: present
    id: smollm2-135m-instruct
    ref: hf:HuggingFaceTB/SmolLM2-135M-Instruct-GGUF:SmolLM2-135M-Instruct.Q4_1.gguf
    path: /var/lib/rbee/models/HuggingFaceTB/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct.Q4_1.gguf
    sha256: b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
"""

RETURN = r"""
rbee_result:
  description: C(models) and C(problems) for list; C(model) for the others.
  returned: success
  type: dict
  sample: {model: {id: smollm2-135m-instruct, status: Ready, size_bytes: 98362432}}
"""


def look_up(params, entries, required):
    entry = find(entries, parse_ref(params["ref"]))
    if entry is None and required:
        known = [e["id"] for e in entries]
        raise NodeError(
            "MODEL_NOT_FOUND",
            f"no model {params['ref']!r} in the catalog; it has {', '.join(known) or 'none'}",
            "rbee-ctl model download hf:org/repo:file.gguf",
            known=known,
        )
    return entry


def digest(path):
    sha = hashlib.sha256()
    with Path(path).open("rb") as f:
        while chunk := f.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def home_of(models_dir, path):
    """Return the ORG/REPO directory of a model's file; None for a file elsewhere."""
    parts = Path(path).relative_to(models_dir).parts if Path(path).is_relative_to(models_dir) else ()
    return models_dir.joinpath(*parts[:2]) if len(parts) > 2 else None


def present(params, entries, check):
    """Return (entry, changed). A file of the same path, size and digest that is catalogued as Ready is not read again."""
    path, ref = params["path"], parse_ref(params["ref"])
    wanted_id = params["id"] or default_id(path, {e["id"]: e["reference"] for e in entries}, reference=params["ref"], org=ref.org)
    old = next((e for e in entries if e["id"] == wanted_id), None)
    same = old and (old["status"], old["path"], old["reference"]) == (READY, path, params["ref"])
    if same and params["sha256"] in (None, old.get("sha256")):
        return old, False
    if check:
        return {"id": wanted_id, "reference": params["ref"], "path": path, "status": READY}, True
    try:
        size, header = Path(path).stat().st_size, facts(path)
    except OSError as e:
        raise NodeError("MODEL_FILE_INVALID", f"{path}: {e.strerror}", None, path=path) from None
    except GgufError as e:
        raise NodeError("MODEL_FILE_INVALID", str(e), "give a GGUF file", path=path) from None
    got = digest(path)
    if params["sha256"] and got != params["sha256"]:
        raise NodeError(
            "CHECKSUM_MISMATCH",
            f"SHA-256 of {path} is {got}, expected {params['sha256']}",
            "correct sha256 in rbee_models, or bring the file again",
            got=got,
            expected=params["sha256"],
        )
    entry = {
        "id": wanted_id,
        "reference": params["ref"],
        "provider": ref.kind,
        "name": Path(path).name.removesuffix(".gguf"),
        "path": path,
        "size_bytes": size,
        "added_at": now_iso(),
        "status": READY,
        "sha256": got,
        "metadata": header,
    }
    models_dir = Path(params["models_dir"])
    if (home := home_of(models_dir, path)) is None:
        raise NodeError("INVALID_MODEL_REF", f"{path} is not ORG/REPO/FILE beneath {models_dir}", "move it there", path=path)
    put(models_dir, home, entry)
    if old and (old_home := home_of(models_dir, old["path"])) not in (None, home):
        remove(wanted_id, old_home)  # the id moved to another repository
    # Downloads run as the directory's owner and must be able to write here as well.
    owner = models_dir.stat()
    for made in (home.parent, home, home / "metadata.yaml"):
        os.chown(made, owner.st_uid, owner.st_gid)
    return entry, True


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["list", "get", "find", "present"], "default": "list"},
            "ref": {"type": "str"},
            "id": {"type": "str"},
            "path": {"type": "path"},
            "sha256": {"type": "str"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
        },
        required_if=[("state", "get", ["ref"]), ("state", "find", ["ref"]), ("state", "present", ["ref", "path"])],
        supports_check_mode=True,
    )
    params, changed = module.params, False
    try:
        entries, problems = read(params["models_dir"], any_runtime_python(params["install_path"]))
        if params["state"] == "list":
            result = {"models": entries, "problems": problems}
        elif params["state"] == "present":
            entry, changed = present(params, entries, module.check_mode)
            result = {"model": entry}
        else:
            result = {"model": look_up(params, entries, params["state"] == "get")}
    except (NodeError, CatalogError) as e:
        fail(module, e)
    module.exit_json(changed=changed, rbee_result=result)


if __name__ == "__main__":
    main()
