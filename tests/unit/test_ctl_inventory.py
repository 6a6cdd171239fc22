"""The inventory as rbee-ctl reads it: hosts, groups, merged variables, and the names it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rbee_ctl import inventory, references
from rbee_serve.contract.errors import BackendUnavailable, ConfigInvalid, InvalidBackend, InvalidModelRef, NodeNotFound
from rbee_serve.contract.references import check_model

TEXT = """
all:
  vars:
    ansible_user: root
  children:
    rbee_hives:
      vars:
        rbee_workers: [{backend: cpu, device: 0, model: m}]
      hosts:
        lab1: {ansible_host: 10.77.0.11}
        lab2:
        lab-2-big:
          ansible_host: 10.77.0.13
          ansible_become_password: !vault |
            $ANSIBLE_VAULT;1.1;AES256
            3131
          rbee_workers: [{backend: cpu, device: 0}, {backend: cuda, device: 1, name: cuda1-b}]
    rbee_queen:
      hosts:
        lab1:
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "inventory.yml"
    found.write_text(TEXT)
    return found


def test_static_file_is_read_without_ansible(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ansible-inventory was started"))
    found = inventory.load(path)
    assert [h.name for h in found.hives] == ["lab1", "lab2", "lab-2-big"]
    assert [h.address for h in found.hives] == ["10.77.0.11", "lab2", "10.77.0.13"]
    assert found.queen is not None
    assert found.queen.name == "lab1"
    assert found.get("lab1").backends == ("cpu",)
    assert found.get("lab-2-big").backends == ("cpu", "cuda")


def test_where_a_secret_lies_and_how_many_tokens_are_no_secrets(path: Path) -> None:
    shown = "rbee_hub_token_file: ~/hub-token, context_tokens: 4096"
    path.write_text(path.read_text().replace("lab2:", f"lab2: {{{shown}, api_tokens: [hidden-1], rbee_hub_token: hidden-2}}"))
    found = inventory.load(path).get("lab2").shown()
    assert (found["rbee_hub_token_file"], found["context_tokens"]) == ("~/hub-token", 4096)
    assert "hidden" not in str(found)


def test_nothing_that_may_be_a_secret_is_shown_however_deep_it_lies(path: Path) -> None:
    secrets = "{user: u, db_password: hidden-1, list: [{api_token: hidden-2, port: 1}]}"
    path.write_text(path.read_text().replace("lab2:", f"lab2: {{app: {secrets}, become_pass: hidden-3}}"))
    shown = inventory.load(path).get("lab2").shown()
    assert shown["app"] == {"user": "u", "list": [{"port": 1}]}
    assert "hidden" not in json.dumps(shown)


def test_static_reading_agrees_with_ansible(path: Path) -> None:
    text = path.read_text().replace("!vault |", "|")  # ansible-inventory would ask for the vault's password
    path.write_text(text)
    command = [str(Path(sys.executable).parent / "ansible-inventory"), "-i", str(path), "--list"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = inventory.load(path)
    assert set(found.hosts) == set(told["_meta"]["hostvars"])
    for name, variables in told["_meta"]["hostvars"].items():
        assert found.hosts[name].address == variables.get("ansible_host", name)
        assert list(found.hosts[name].workers) == variables["rbee_workers"]


def test_what_only_ansible_knows_is_asked_of_ansible(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yml"
    path.write_text("rbee_hives: {hosts: {'node[1:3]': {ansible_user: root}}}\n")
    (tmp_path / "host_vars").mkdir()
    (tmp_path / "host_vars/node2.yml").write_text("ansible_host: 192.0.2.2\nrbee_workers: [{backend: cuda, device: 0}]\n")
    found = inventory.load(path)
    assert [h.name for h in found.hives] == ["node1", "node2", "node3"]
    assert (found.get("node2").address, found.get("node2").backends) == ("192.0.2.2", ("cuda",))


def test_unknown_node_names_the_known_ones_and_how_to_add_it(path: Path) -> None:
    with pytest.raises(NodeNotFound) as caught:
        inventory.load(path).get("lab11")
    assert "known: lab-2-big, lab1, lab2" in caught.value.message
    assert "did you mean lab1?" in (caught.value.hint or "")
    assert "rbee-ctl setup add-node --name lab11" in (caught.value.hint or "")


def test_worker_id_is_split_at_the_longest_host(path: Path) -> None:
    found = inventory.load(path)
    assert found.split_worker_id("lab-2-big-cuda1-b") == ("lab-2-big", "cuda1-b")
    assert found.split_worker_id("lab2-cpu0") == ("lab2", "cpu0")
    with pytest.raises(NodeNotFound, match="names no node"):
        found.split_worker_id("lab9-cpu0")


def test_backend_of_a_node_with_one_needs_no_choice(path: Path) -> None:
    found = inventory.load(path)
    assert found.get("lab1").backend(None) == "cpu"
    assert found.get("lab-2-big").backend("cuda") == "cuda"
    with pytest.raises(InvalidBackend, match="cpu, cuda"):
        found.get("lab-2-big").backend(None)


@pytest.mark.parametrize("text", ["a: [\n", "- a\n- b\n"])
def test_broken_inventory_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "inventory.yml").write_text(text)
    with pytest.raises(ConfigInvalid, match=r"inventory\.yml"):
        inventory.load(tmp_path / "inventory.yml")


@pytest.mark.parametrize(
    "ref", ["hf:org/repo", "hf:org/repo:a/b.Q4_K_M.gguf", "file:///m/x.gguf", "smollm2-135m-instruct", "a/b"]
)
def test_model_reference_accepted(ref: str) -> None:
    assert check_model(ref) == ref


@pytest.mark.parametrize(
    "ref", ["", "hf:", "hf:org", "hf:a/b/c", "file://x.gguf", "file:///x.bin", "a b", "../x", "a/../b", "-x"]
)
def test_model_reference_refused_with_the_formats(ref: str) -> None:
    with pytest.raises(InvalidModelRef, match="hf:org/repo"):
        check_model(ref)


def test_backend_names() -> None:
    assert references.check_backend("cuda") == "cuda"
    assert references.check_backend(None) is None
    with pytest.raises(InvalidBackend, match="cpu, cuda, rocm, vulkan, metal"):
        references.check_backend("quantum")
    with pytest.raises(BackendUnavailable):
        references.check_backend("metal")
