"""Changing the user's inventory moves nothing but the lines that were meant (SPEC P-07)."""

from __future__ import annotations

import difflib
import multiprocessing
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_ctl import inventory_edit as edit
from rbee_serve.contract.errors import InventoryReadOnly, NodeExists, NodeNotFound

TEXT = """\
# the fleet of the house; keep the order
all:
  vars:
    ansible_user: &me "admin"      # quoted on purpose
    colours: [red,   green]        # odd spacing
  children:
    rbee_queen:
      hosts:
        blep:

    web:
      hosts:
        shop: {ansible_host: 198.51.100.7, tier: 'front'}
    rbee_hives:
      vars: &defaults
        rbee_worker_address: "{{ ansible_host }}"
      hosts:
        blep:
          ansible_host: 192.0.2.10   # the old one
          ansible_become_password: !vault |
            $ANSIBLE_VAULT;1.1;AES256
            # 6231 looks like a comment
            3131
          rbee_workers:
            - {backend: cpu, device: 0, model: m}
            # the second one is for later
        # a machine that sleeps
        nap:
          <<: *defaults
          owner: *me

# end of file
"""
NODE = {"ansible_host": "192.0.2.30", "ansible_port": 22, "ansible_user": "ops", "rbee_install_path": "/opt/rbee"}


def changes(old: str, new: str) -> list[str]:
    """Lines that differ, as in a diff without context."""
    found = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    return [line for line in found if line[0] in "+-" and not line.startswith(("+++", "---"))]


def test_adding_touches_the_new_lines_alone() -> None:
    assert changes(TEXT, edit.added(TEXT, "workstation", NODE)) == [
        "+        workstation:",
        "+          ansible_host: 192.0.2.30",
        "+          ansible_port: 22",
        "+          ansible_user: ops",
        "+          rbee_install_path: /opt/rbee",
    ]


def test_add_and_remove_give_back_the_same_bytes() -> None:
    assert edit.removed(edit.added(TEXT, "workstation", NODE), "workstation") == TEXT


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"ansible_host": "192.0.2.99"},
            ["-          ansible_host: 192.0.2.10   # the old one", "+          ansible_host: 192.0.2.99   # the old one"],
        ),
        ({"ansible_host": "192.0.2.10"}, []),
        ({"ansible_port": 2222}, ["+          ansible_port: 2222"]),
        (
            {"rbee_workers": [{"backend": "cpu", "device": 1}]},
            ["-            - {backend: cpu, device: 0, model: m}", "+            - {backend: cpu, device: 1}"],
        ),
        ({"ansible_host": None}, ["-          ansible_host: 192.0.2.10   # the old one"]),
    ],
)
def test_updating_touches_the_changed_line_alone(variables: dict[str, object], expected: list[str]) -> None:
    assert changes(TEXT, edit.updated(TEXT, "blep", variables)) == expected


def test_one_line_mappings_are_edited_in_their_line() -> None:
    new = edit.updated(TEXT, "shop", {"ansible_host": "198.51.100.8", "ansible_port": 2200})
    assert changes(TEXT, new)[1] == "+        shop: {ansible_host: 198.51.100.8, tier: 'front', ansible_port: 2200}"


def test_removing_takes_the_host_out_of_every_group() -> None:
    new = edit.removed(TEXT, "blep")
    found = yaml.load(new.replace("!vault ", ""), Loader=yaml.SafeLoader)["all"]["children"]
    assert found["rbee_queen"]["hosts"] is None
    assert list(found["rbee_hives"]["hosts"]) == ["nap"]
    assert not [line for line in changes(TEXT, new) if line.startswith("+")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "---\n",
        "# nothing yet\n",
        "all:\n",
        "all:\n  children:\n",
        "all:\n  children: {}\n",
        "all:\n  hosts:\n    other:\n",
        "rbee_hives:\n  hosts:\n",
        "rbee_hives:\n  hosts: {}  # none yet\n",
        "rbee_hives:\n  hosts: {one: {ansible_host: 1.2.3.4}}\n",
        "rbee_hives:\n    hosts:\n        one:\n            ansible_host: 1.2.3.4",
        "rbee_hives:\r\n  hosts:\r\n    one:\r\n",
        "all: {children: {rbee_hives: {hosts: {one: }}}}\n",
    ],
)
def test_every_shape_of_file_takes_a_host(text: str) -> None:
    new = edit.added(text, "two", NODE)
    assert "two" in new
    again = edit.removed(new, "two")
    assert edit.added(again, "two", NODE) == new
    assert ("\r\n" in text) == ("\r\n" in new)
    assert new.count("\n") == new.count("\r\n") or "\r\n" not in text


def test_what_is_there_twice_or_not_at_all_is_refused() -> None:
    with pytest.raises(NodeExists, match="blep") as e:
        edit.added(TEXT, "blep", NODE)
    assert "update-node" in (e.value.hint or "")
    for change in (edit.removed, lambda text, name: edit.updated(text, name, {"a": 1})):
        with pytest.raises(NodeNotFound):
            change(TEXT, "ghost")


# --- any file -------------------------------------------------------------------------------------------------------

_COMMENTS = st.sampled_from(["", "# note", "# a: b", "#"])
_VALUES = st.sampled_from(
    ['"quoted # not a comment"', "'single'", "plain text", "[1,  2]", "{a: 1}", "yes", "0o17", "~", "'{{ x }}'"]
)
_BLOCKS = st.sampled_from(
    ["|\n{p}  line one\n{p}  # line two", ">-\n{p}  folded\n{p}  text", "!vault |\n{p}  $ANSIBLE_VAULT;1.1;AES256\n{p}  6161"]
)


@st.composite
def inventories(draw: st.DrawFn) -> str:
    """A YAML inventory of some hand: comments anywhere, anchors, vaults, odd spacing, one-line hosts, foreign groups."""
    step = draw(st.sampled_from([2, 3, 4]))
    lines = ["# head", "all:"]

    def note(depth: int) -> None:
        if comment := draw(_COMMENTS):
            lines.append(" " * draw(st.sampled_from([0, step * depth])) + comment)
        if draw(st.booleans()):
            lines.append("")

    lines += [" " * step + "vars:", " " * (2 * step) + "anchored: &anchor {k: v}", " " * step + "children:"]
    for group in ["other", "rbee_hives", "rbee_queen"]:
        note(2)
        lines.append(" " * (2 * step) + f"{group}:")
        lines.append(" " * (3 * step) + "hosts:")
        for number in range(draw(st.integers(1, 3))):
            note(4)
            name = f"{group.removeprefix('rbee_')}{number}"
            kind = draw(st.sampled_from(["none", "flow", "block"]))
            if kind == "none":
                lines.append(" " * (4 * step) + f"{name}:" + draw(st.sampled_from(["", "   # sleeps"])))
            elif kind == "flow":
                lines.append(" " * (4 * step) + f"{name}: {{ansible_host: 10.0.0.{number},  tier: 'x'}}  # one line")
            else:
                lines.append(" " * (4 * step) + f"{name}:")
                pad = " " * (5 * step)
                for variable in range(draw(st.integers(1, 3))):
                    if draw(st.booleans()):
                        lines.append(f"{pad}v{variable}:  {draw(_VALUES)}{draw(st.sampled_from(['', '  # why']))}")
                    else:
                        lines += f"{pad}v{variable}: {draw(_BLOCKS)}".replace("{p}", pad).split("\n")
                if draw(st.booleans()):
                    lines.append(f"{pad}other: *anchor")
    note(0)
    return "\n".join(lines) + "\n"


@settings(max_examples=120, deadline=None)
@pytest.mark.P07
@given(text=inventories(), data=st.data())
@pytest.mark.N07
def test_any_inventory_keeps_all_that_was_not_meant(text: str, data: st.DataObject) -> None:
    new = edit.added(text, "workstation", NODE)
    assert [c for c in changes(text, new) if c.startswith("-")] == []
    assert len(changes(text, new)) == 5
    assert edit.removed(new, "workstation") == text
    changed = edit.updated(new, "workstation", {"ansible_port": 2222, "labels": {"rack": "a b"}})
    assert [c[0] + c[1:].strip() for c in changes(new, changed)] == [
        "-ansible_port: 22",
        "+ansible_port: 2222",
        "+labels:",
        "+rack: a b",
    ]
    host = data.draw(st.sampled_from(["other0", "hives0", "queen0"]))
    gone = edit.removed(text, host)
    assert [c for c in changes(text, gone) if c.startswith("+")] == []
    updated = edit.updated(text, host, {"ansible_host": "10.9.9.9"})
    assert yaml.compose(updated) is not None
    assert sum(c.startswith("-") for c in changes(text, updated)) <= 1


# --- the file itself ------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "inventory.yml"
    found.write_text(TEXT)
    found.chmod(0o640)
    return found


def names_in(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


def _add(path: Path, number: int) -> None:
    edit.add_host(path, f"node{number}", {"ansible_host": f"192.0.2.{number}"})


@pytest.mark.N07
def test_five_parallel_adds_keep_all(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(path, n)) for n in range(5)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(30)
        assert w.exitcode == 0
    for n in range(5):
        assert f"node{n}:\n          ansible_host: 192.0.2.{n}\n" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names_in(path.parent) == ["inventory.yml"]


@pytest.mark.N07
def test_kill_while_writing_leaves_the_old_or_the_new_file(path: Path) -> None:
    """The process is killed in the middle of the write: the file is whole, and the next edit clears what was left."""
    script = textwrap.dedent(
        f"""
        import os, pathlib, sys
        from rbee_ctl import inventory_edit as edit
        write = os.fsync
        def hang(fd):
            print("written", flush=True)
            sys.stdin.read()
        os.fsync = hang
        edit.add_host(pathlib.Path({str(path)!r}), "node1", {{"ansible_host": "192.0.2.1"}})
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    assert len(names_in(path.parent)) == 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.communicate()
    assert path.read_text() == TEXT
    began = time.monotonic()
    _add(path, 2)
    assert time.monotonic() - began < 10  # the lock died with its holder
    assert "node2" in path.read_text()
    assert names_in(path.parent) == ["inventory.yml"]


@pytest.mark.parametrize(
    ("name", "text", "mode", "why", "by_hand"),
    [
        ("hosts.ini", "[rbee_hives]\n", 0o644, "INI", "[rbee_hives]\nws ansible_host=192.0.2.30"),
        ("hosts", "[rbee_hives]\n", 0o644, "INI", "[rbee_hives]\nws ansible_host=192.0.2.30"),
        ("fleet.py", "#!/usr/bin/python3\n", 0o755, "dynamic", "ws ansible_host=192.0.2.30"),
        ("broken.yml", "all: [\n", 0o644, "not valid YAML", "rbee_hives:\n  hosts:\n    ws:\n      ansible_host: 192.0.2.30"),
        ("list.yml", "- a\n", 0o644, "groups are expected", "ws:"),
        ("kept.yml", "rbee_hives:\n  hosts:\n", 0o444, "read-only|not writable", "ws:"),
        ("alias.yml", "a: &a {x: {y: 1}}\nrbee_hives:\n  hosts: *a\n", 0o644, "alias", "ws:"),
    ],
)
def test_files_that_are_not_ours_to_change_say_what_to_write(
    tmp_path: Path, name: str, text: str, mode: int, why: str, by_hand: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(InventoryReadOnly, match=why) as e:
        edit.add_host(path, "ws", {"ansible_host": "192.0.2.30"})
    assert by_hand in e.value.message
    assert path.read_text() == text


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yml"
    link.symlink_to(path)
    _add(link, 1)
    assert link.is_symlink()
    assert "node1" in path.read_text()
