"""Runtimes of a node: which is current, who uses it, switching over and back, deleting (SPEC OP-03 to OP-05)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import node_modules
import pytest
from ansible.module_utils.rbee_node import NodeError

runtime = node_modules.load("library", "rbee_runtime")


class Node:
    """A node's folders, and a systemd in which a unit comes up unless its runtime is a broken one."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install, self.etc = base / "opt", base / "etc"
        (self.etc / "workers").mkdir(parents=True)
        self.broken: set[str] = set()
        self.fails: set[str] = set()  # workers that do not come up on runtime 2
        self.breaks: set[str] = set()  # runtimes that no worker comes up on again once it has left them
        self.running: set[str] = set()
        self.restarted: list[str] = []
        monkeypatch.setattr(runtime, "show", lambda *units: {u: self._state(u) for u in units})
        monkeypatch.setattr(runtime, "run", self._run)
        monkeypatch.setattr(runtime, "wait_until", lambda units, *_: {u: self._state(u) for u in units})
        monkeypatch.setattr(runtime, "start_failure", lambda unit, _: NodeError("UNIT_START_FAILED", f"{unit} did not start"))
        monkeypatch.setattr(runtime.time, "sleep", lambda _: None)

    def _state(self, unit: str) -> dict[str, str]:
        name = unit.split("@")[1].removesuffix(".service")
        failing = name in self.fails and self.link(name).name == "2"
        up = name in self.running and self.link(name).name not in self.broken and not failing
        return {"Id": unit, "ActiveState": "active" if up else "failed" if name in self.running else "inactive"}

    def _run(self, *argv: str, **_: Any) -> tuple[int, str, str]:
        if "restart" in argv:
            self.restarted.append(argv[-1])
            self.broken |= self.breaks
        return 0, "", ""

    def add(self, version: str, kind: str = "cpu") -> Path:
        home = self.install / "runtimes" / kind / version
        (home / "bin").mkdir(parents=True)
        (home / "lib.so").write_bytes(bytes(1000))
        (home / "metadata.yaml").write_text(json.dumps({"version": version, "python": "3.11"}))
        return home

    def worker(self, name: str, home: Path, *, up: bool = True) -> None:
        (self.etc / "workers" / f"{name}.toml").write_text(f'backend = "{home.parent.name}"\n')
        (self.etc / "workers" / f"{name}.runtime").symlink_to(home)
        self.running |= {name} if up else set()

    def link(self, name: str) -> Path:
        return (self.etc / "workers" / f"{name}.runtime").readlink()

    def params(self, state: str, **more: Any) -> dict[str, Any]:
        base = {"state": state, "type": "cpu", "version": None, "force": False, "timeout_s": 1.0}
        return {**base, "etc_dir": str(self.etc), "install_path": str(self.install), **more}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


def test_what_is_whole_is_found_by_type_and_version(node: Node) -> None:
    one = node.add("1")
    (node.install / "runtimes/cpu/half/bin").mkdir(parents=True)
    assert runtime.find(node.params("get")) == one
    assert runtime.find(node.params("get", type="cpu-llm-worker", version="1")) == one
    for wanted in ({"version": "half"}, {"type": "cuda"}):
        with pytest.raises(NodeError) as e:
            runtime.find(node.params("get", **wanted))
        assert e.value.code == "WORKER_BINARY_NOT_FOUND"
    with pytest.raises(NodeError, match="no worker type"):
        runtime.find(node.params("get", type="tpu"))


def test_a_record_tells_size_users_and_what_the_metadata_says(node: Node) -> None:
    home = node.add("1")
    node.worker("cpu0", home)
    (home / "metadata.yaml").write_text("worker_type: cpu-llm-worker\nversion: '1'\npython: '3.11'\n")  # as the role writes it
    record = runtime.record(node.params("get"), home)
    assert (record["id"], record["python"], record["used_by"], record["current"]) == ("cpu/1", "3.11", ["cpu0"], True)
    assert 1000 < record["size_bytes"] < 2000


def test_a_record_tells_what_its_build_was_compiled_from(node: Node) -> None:
    home = node.add("1")
    assert runtime.record(node.params("get"), home)["build"] is None  # somebody else's wheel
    info = home / "lib/python3.11/site-packages/llama_cpp_python-0.3.36.dist-info"
    info.mkdir(parents=True)
    (info / "rbee-build.json").write_text('{"backend": "cpu", "source_sha256": "ab"}')
    assert runtime.record(node.params("get"), home)["build"] == {"backend": "cpu", "source_sha256": "ab"}


def test_a_switch_moves_what_runs_and_what_does_not_and_is_kept(node: Node) -> None:
    old, new = node.add("1"), node.add("2")
    node.worker("cpu0", old)
    node.worker("cpu0-b", old, up=False)
    runtime.point(node.install / "runtimes/cpu/current", old)
    assert runtime.use(node.params("used", version="2"), True)["changed"] is True  # check mode
    assert node.link("cpu0") == old
    done = runtime.use(node.params("used", version="2"), False)
    assert (done["previous"], done["moved"], done["changed"]) == ("1", ["cpu0", "cpu0-b"], True)
    assert (node.link("cpu0"), node.link("cpu0-b")) == (new, new)
    assert node.restarted == ["rbee-worker@cpu0.service"]
    assert runtime.current_of(new.parent) == new
    assert runtime.use(node.params("used", version="2"), False)["changed"] is False
    back = runtime.use(node.params("used", version="1"), False)
    assert (back["previous"], node.link("cpu0"), runtime.current_of(old.parent)) == ("2", old, old)


def test_a_runtime_that_does_not_come_up_is_left_again_by_all(node: Node) -> None:
    old, new = node.add("1"), node.add("2")
    for name in ("cpu0", "cpu0-b"):
        node.worker(name, old)
    runtime.point(node.install / "runtimes/cpu/current", old)
    node.broken = {"2"}
    with pytest.raises(NodeError) as e:
        runtime.use(node.params("used", version="2"), False)
    assert e.value.code == "UNIT_START_FAILED"
    assert "runs 1 again" in e.value.message
    assert (node.link("cpu0"), node.link("cpu0-b"), runtime.current_of(new.parent)) == (old, old, old)
    assert node.restarted == ["rbee-worker@cpu0.service"] * 2


def test_one_that_does_not_come_back_keeps_no_other_on_the_new_runtime(node: Node) -> None:
    old, new, older = node.add("1"), node.add("2"), node.add("0")
    for name in ("cpu0", "cpu0-b", "cpu0-c"):
        node.worker(name, older if name == "cpu0" else old)
    node.worker("cpu0-d", old)
    runtime.point(node.install / "runtimes/cpu/current", old)
    node.fails, node.breaks = {"cpu0-c"}, {"0"}
    with pytest.raises(NodeError, match=r"^rbee-worker@cpu0-c\.service did not start") as e:
        runtime.use(node.params("used", version="2"), False)
    assert "; all of cpu0-b, cpu0-c runs 1 again; cpu0 did not come back on 0 either: rbee-worker@cpu0." in e.value.message
    assert [node.link(name) for name in ("cpu0", "cpu0-b", "cpu0-c", "cpu0-d")] == [older, old, old, old]
    assert runtime.current_of(new.parent) == old


def test_one_that_is_used_or_current_is_not_deleted(node: Node) -> None:
    old, new = node.add("1"), node.add("2")
    node.worker("cpu0", old)
    runtime.point(node.install / "runtimes/cpu/current", new)
    for version in ("1", "2"):
        with pytest.raises(NodeError) as e:
            runtime.absent(node.params("absent", version=version), False)
        assert e.value.code == "WORKER_BINARY_IN_USE"
    with pytest.raises(NodeError, match="several cpu runtimes: 1, 2"):
        runtime.absent(node.params("absent"), False)
    third = node.add("3")
    gone = runtime.absent(node.params("absent", version="3"), False)
    assert gone["freed_bytes"] > 1000
    assert not third.exists()
    assert runtime.absent(node.params("absent", version="1", force=True), False)["changed"] is True
    assert not old.exists()


def test_without_a_link_the_newest_is_current_and_a_virgin_machine_has_what_a_deployment_would_bring(node: Node) -> None:
    with pytest.raises(NodeError):
        runtime.current(node.params("current", fallback=""), False)
    root = node.install / "runtimes" / "cpu"
    assert runtime.current(node.params("current", fallback="9"), True) == str(root / "9")
    home = node.add("1")
    assert runtime.current(node.params("current", fallback=""), False) == str(home)
    assert runtime.current(node.params("current", fallback="9"), True) == str(root / "9")
    assert runtime.current(node.params("current", fallback="9"), False) == str(home)


def test_a_choice_outlasts_its_own_release_and_not_the_next_one(node: Node) -> None:
    """SPEC OP-05: site.yml of the release that a machine has leaves what `runtime use` chose; another release brings its own."""
    first = node.add("1")
    hive = node.etc / "hive.toml"

    def site(version: str) -> bool:
        changed = runtime.deploy(node.params("deployed", version=version), False)["changed"]
        hive.write_text(f'runtime_version = "{version}"\n')
        return bool(changed)

    assert site("1") is True
    node.worker("cpu0", first)
    assert site("1") is False
    node.add("built")
    assert runtime.use(node.params("used", version="built"), False)["moved"] == ["cpu0"]
    assert site("1") is False
    assert runtime.current(node.params("current", fallback="1"), True).endswith("/built")
    node.add("2")
    assert runtime.current(node.params("current", fallback="2"), True).endswith("/2")
    assert site("2") is True
    assert runtime.current(node.params("current", fallback="2"), False).endswith("/2")
    assert site("1") is True  # an older release, deployed again
    assert runtime.current_of(first.parent) == first


def test_a_deployment_of_what_is_not_whole_is_refused(node: Node) -> None:
    with pytest.raises(NodeError) as e:
        runtime.deploy(node.params("deployed", version="7"), False)
    assert e.value.code == "WORKER_BINARY_NOT_FOUND"


def test_the_newest_wheel_of_a_folder_is_the_one_with_the_highest_version() -> None:
    newest = node_modules.load("filter_plugins", "rbee_wheels").rbee_newest_wheel
    names = ["llama_cpp_python-0.3.9-py3-none-any.whl", "llama_cpp_python-0.3.10-py3-none-any.whl", "llama_cpp_python-x.whl"]
    folder = [f"/w/{name}" for name in names]
    assert newest(folder) == newest(reversed(folder)) == f"/w/{names[1]}"
    assert newest(folder[2:]) == folder[2]
    assert newest([]) == ""
