#!/usr/bin/python
"""The catalog of a node's models."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from ansible.module_utils.rbee_gguf import GgufError, facts
from ansible.module_utils.rbee_node import NodeError, any_runtime_python, fail, instances, running, show, worker_unit
from ansible.module_utils.rbee_store import (
    DOWNLOADING,
    READY,
    CatalogError,
    choose_files,
    default_id,
    delete,
    digest_of_parts,
    find,
    now_iso,
    parse_ref,
    parts,
    put,
    read,
    remove,
    set_name,
)

DOCUMENTATION = r"""
module: rbee_catalog
short_description: List, find, register or delete the models of a node
description:
  - The catalog is the C(metadata.yaml) beside each model's files. Broken ones are never fatal; C(list) sets them aside as
    C(metadata.yaml.corrupt) and reports them under C(problems) for as long as they are there.
options:
  state:
    description: >-
      C(list) returns all, C(get) the one that I(ref) means or fails with MODEL_NOT_FOUND, C(find) the same but null
      instead of failing, C(present) registers the file at I(path), C(absent) removes files and entry.
    type: str
    choices: [list, get, find, present, absent]
    default: list
  force:
    description: For C(absent), also while a worker uses the model.
    type: bool
    default: false
  provider:
    description: For C(list), only models that came this way.
    type: str
    choices: [hf, https, file]
  ref:
    description: Catalog id, C(hf:org/repo[:file]) or C(file:///path).
    type: str
  id:
    description: For C(present), the model's id; by default its file's stem in lower case.
    type: str
  path:
    description: >-
      For C(present), the GGUF file, two directories beneath I(models_dir) (ORG/REPO/FILE); of a split model any part.
    type: path
  sha256:
    description: >-
      For C(present), the digest that the file must have (of a split model the digest of its parts' digests). Checked once,
      when it is registered.
    type: str
  etc_dir:
    description: Where the instances' settings are.
    type: path
    default: /etc/rbee
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

- name: Delete one
  rbee_catalog:
    state: absent
    ref: smollm2-135m-instruct

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
  description: >-
    C(models) (each with C(used_by), the instances that are set to it), C(problems) and C(disk) for list; C(model) for the
    others; C(model), C(freed_bytes), C(left) (files outside of the models directory) and C(changed) for absent.
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


def users(params, entry):
    """Return the names of the instances that are set to this model."""
    paths = {p["path"] for p in parts(entry)}
    found = instances(params["etc_dir"]).items()
    return sorted(n for n, s in found if s.get("model_id") == entry["id"] or s.get("model_path") in paths)


def active(names):
    """Return those of the instances that run, or that a socket would start."""
    units = [worker_unit(n) for n in names]
    sockets = [u.replace(".service", ".socket") for u in units]
    state = show(*units, *sockets) if units else {}
    return [
        n
        for n, unit, socket in zip(names, units, sockets, strict=True)
        if running(state.get(unit, {})) or running(state.get(socket, {}))
    ]


def absent(params, entries, check):
    """Return the result of a deletion; one that is not there is no change."""
    entry = find(entries, parse_ref(params["ref"]))
    if entry is None:
        return look_up(params, entries, required=True)
    busy = active(users(params, entry))
    if busy and not params["force"]:
        settings = instances(params["etc_dir"])
        ids = [f"{settings[n].get('hive')}-{n}" for n in busy]
        raise NodeError(
            "MODEL_IN_USE",
            f"{entry['id']} is used by {', '.join(busy)}",
            f"rbee-ctl worker stop {' '.join(ids)}; or delete it all the same: --force",
            workers=busy,
        )
    if entry["status"] == DOWNLOADING:
        raise NodeError(
            "MODEL_IN_USE",
            f"{entry['id']} is being downloaded",
            "wait for the download, or end it on the node: systemctl stop 'rbee-download-*'",
            workers=[],
        )
    freed, left = (sum(p["size_bytes"] for p in parts(entry)), []) if check else delete(params["models_dir"], entry)
    return {"model": entry, "freed_bytes": freed, "left": left, "used_by": users(params, entry), "changed": True}


def disk(models_dir):
    """Return size and free bytes of the file system that the models are on."""
    try:
        usage = shutil.disk_usage(models_dir)
    except OSError:
        return None
    return {"total_bytes": usage.total, "free_bytes": usage.free}


def files_of(path, ref):
    """Return all parts of the model that the file at ``path`` belongs to."""
    there = [p.name for p in path.parent.glob("*.gguf") if set_name(p.name) == set_name(path.name)]
    wanted = parse_ref(f"hf:local/model:{path.name}") if ref.kind != "hf" else ref
    wanted.file = path.name
    return [path.with_name(name) for name in choose_files(wanted, there or [path.name])]


def put_in_place(params, entry, old):
    """Write an entry beside its file; ``old`` is what had its id before. Raises NodeError INVALID_MODEL_REF."""
    path = entry["path"]
    models_dir = Path(params["models_dir"])
    if (home := home_of(models_dir, path)) is None:
        raise NodeError("INVALID_MODEL_REF", f"{path} is not ORG/REPO/FILE beneath {models_dir}", "move it there", path=path)
    put(models_dir, home, entry)
    if old and (old_home := home_of(models_dir, old["path"])) not in (None, home):
        remove(entry["id"], old_home)  # the id moved to another repository
    # Downloads run as the directory's owner and must be able to write here as well.
    owner = models_dir.stat()
    for made in (home.parent, home, home / "metadata.yaml"):
        os.chown(made, owner.st_uid, owner.st_gid)


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
    known = next((e for e in entries if e["path"] == path and e["status"] == READY and e["id"] != wanted_id), None)
    if known and known["reference"] == params["ref"] and params["sha256"] in (None, known.get("sha256")):
        put_in_place(params, {**known, "id": wanted_id}, old)
        remove(known["id"], home_of(Path(params["models_dir"]), path))  # one file, one name: it is called otherwise from now on
        return {**known, "id": wanted_id}, True
    try:
        paths = files_of(Path(path), ref)
        header = facts(*paths)
        files = [{"path": str(p), "size_bytes": p.stat().st_size, "sha256": digest(p)} for p in paths]
    except OSError as e:
        raise NodeError("MODEL_FILE_INVALID", f"{path}: {e.strerror}", None, path=path) from None
    except GgufError as e:
        raise NodeError("MODEL_FILE_INVALID", str(e), "give a GGUF file", path=path) from None
    got = digest_of_parts([f["sha256"] for f in files])
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
        "name": set_name(Path(path).name).removesuffix(".gguf"),
        "path": str(paths[0]),
        "size_bytes": sum(f["size_bytes"] for f in files),
        "added_at": now_iso(),
        "status": READY,
        "sha256": got,
        **({"files": files} if len(files) > 1 else {}),
        "metadata": header,
    }
    put_in_place(params, entry, old)
    return entry, True


def report(params, set_aside):
    """Return the result of list, get or find; with ``set_aside`` list moves broken metadata out of the way."""
    aside = set_aside and params["state"] == "list"
    entries, problems = read(params["models_dir"], any_runtime_python(params["install_path"]), set_aside=aside)
    if params["state"] == "list":
        shown = [{**e, "used_by": users(params, e)} for e in entries if params["provider"] in (None, e.get("provider"))]
        return {"models": shown, "problems": problems, "disk": disk(params["models_dir"])}
    entry = look_up(params, entries, params["state"] == "get")
    return {"model": {**entry, "used_by": users(params, entry)} if entry else None}


def main():
    # Not at the top: rbee-ctl reads this machine with the functions above, in its own process (CAP-27).
    from ansible.module_utils.basic import AnsibleModule

    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["list", "get", "find", "present", "absent"], "default": "list"},
            "force": {"type": "bool", "default": False},
            "provider": {"type": "str", "choices": ["hf", "https", "file"]},
            "ref": {"type": "str"},
            "id": {"type": "str"},
            "path": {"type": "path"},
            "sha256": {"type": "str"},
            "etc_dir": {"type": "path", "default": "/etc/rbee"},
            "models_dir": {"type": "path", "default": "/var/lib/rbee/models"},
            "install_path": {"type": "path", "default": "/opt/rbee"},
        },
        required_if=[*((("state", s, ["ref"])) for s in ("get", "find", "absent")), ("state", "present", ["ref", "path"])],
        supports_check_mode=True,
    )
    params, changed = module.params, False
    try:
        if params["state"] in ("present", "absent"):
            entries, _ = read(params["models_dir"], any_runtime_python(params["install_path"]))
            if params["state"] == "present":
                entry, changed = present(params, entries, module.check_mode)
                result = {"model": entry}
            else:
                result = absent(params, entries, module.check_mode)
                changed = result["changed"]
        else:
            result = report(params, set_aside=not module.check_mode)
    except (NodeError, CatalogError) as e:
        fail(module, e)
    module.exit_json(changed=changed, rbee_result=result)


if __name__ == "__main__":
    main()
