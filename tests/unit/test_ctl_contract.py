"""What scripts rely on: the envelope's keys, exit codes, what is where on stdout and stderr, start-up time's causes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee_ctl import cli, command_table, events, render, views
from rbee_ctl.render import Ui, narration_line
from rbee_ctl.result import ErrorItem, OperationResult
from rbee_serve.contract.errors import ExitCode, NodeNotFound, RbeeError

KEYS = {"version", "command", "status", "exit_code", "data", "errors"}
ERROR_KEYS = {"code", "message", "hint", "details"}


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("RBEE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def run(*args: str) -> tuple[OperationResult, str, str]:
    out, err = io.StringIO(), io.StringIO()
    ui = Ui(out, err)
    result = cli.run(args, ui)
    ui.finish(result)
    return result, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("args", "command", "status", "exit_code", "code"),
    [
        (["version", "--json"], "version", "success", 0, None),
        (["worker", "list", "--json"], "worker list", "error", 1, "CONFIG_INVALID"),
        (["hive", "status", "--json"], "hive status", "error", 1, "CONFIG_INVALID"),
        (["worker", "list", "--nonsense", "--json"], "worker list", "error", 2, "USAGE"),
        (["infer", "--json"], "infer", "error", 2, "USAGE"),
        (["worker", "start", "--json", "--model", "m"], "worker start", "error", 2, "USAGE"),
        (["nonsense", "--json"], "", "error", 2, "USAGE"),
        (["config", "show", "--json"], "config show", "success", 0, None),
    ],
)
def test_every_end_is_one_envelope(args: list[str], command: str, status: str, exit_code: int, code: str | None) -> None:
    result, out, _ = run(*args)
    envelope = json.loads(out)
    assert set(envelope) == KEYS
    assert envelope["version"] == 1
    assert (envelope["command"], envelope["status"], envelope["exit_code"]) == (command, status, exit_code)
    assert result.exit_code == exit_code
    assert [e["code"] for e in envelope["errors"]] == ([code] if code else [])
    assert all(set(e) == ERROR_KEYS for e in envelope["errors"])


def test_error_of_a_host_names_it() -> None:
    item = ErrorItem.of(NodeNotFound("gone", hint="look", node="x"), "lab1").as_dict()
    assert item == {"code": "NODE_NOT_FOUND", "message": "gone", "hint": "look", "host": "lab1", "details": {"node": "x"}}


def test_mistake_of_ours_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("rbee_ctl.config.load", broken)
    result, out, err = run("worker", "list")
    assert (result.exit_code, out) == (1, "")
    assert "internal error: ZeroDivisionError: oops (test_ctl_contract.py:" in err


def test_usage_error_tells_the_next_command() -> None:
    result, out, err = run("worker", "strat")
    assert (result.exit_code, out) == (2, "")
    assert "try: rbee-ctl worker --help" in err


@pytest.mark.parametrize("alias", [["workers", "list"], ["worker", "spawn", "--hive", "lab1", "--model", "m"]])
def test_aliases_are_known(alias: list[str]) -> None:
    assert run(*alias)[0].errors[0].code == "CONFIG_INVALID"


def test_interrupted_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rbee_ctl.config.load", interrupted)
    result, out, _ = run("worker", "list", "--json")
    assert (result.exit_code, json.loads(out)["errors"][0]["code"]) == (130, "REQUEST_CANCELED")


def test_exit_codes_are_distinct_and_documented() -> None:
    codes = {e.name: int(e) for e in ExitCode}
    assert codes == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "PARTIAL": 3,
        "UNREACHABLE": 4,
        "REFUSED": 5,
        "CHANGES": 6,
        "LOCKED": 7,
        "KEY_REFUSED": 8,
        "HOST_KEY": 9,
        "SUDO_REFUSED": 10,
        "DISK_FULL": 11,
        "PORT_TAKEN": 12,
        "UNIT_MASKED": 13,
        "SELF_TEST": 14,
        "TRY_LATER": 75,
        "CONFIG": 78,
        "INTERRUPTED": 130,
    }


def test_narration_has_the_agreed_form_and_cuts_what_is_too_long() -> None:
    assert narration_line("hv-router", "route_job", "hello") == "[hv-router ] route_job      : hello"
    assert narration_line("a" * 30, "b" * 30, "c") == f"[{'a' * 10}] {'b' * 15}: c"


def test_plain_table_is_aligned_text() -> None:
    table = views.Table(("a", "long name"), (("1", "2"), ("333", "")), "title")
    assert table.plain() == "title\nA    LONG NAME\n1    2\n333\n"


@pytest.mark.parametrize(
    "args", [("--quiet", "hive", "list"), ("hive", "list", "--quiet"), ("hive", "list", "-q"), ("--json", "hive", "list")]
)
def test_flags_of_every_command_may_stand_before_it_and_quiet_after_it(args: tuple[str, ...]) -> None:
    result, out, _ = run(*args)
    assert (result.command, result.exit_code, [e.code for e in result.errors]) == ("hive list", 1, ["CONFIG_INVALID"])
    assert bool(out) == ("--json" in args)


def test_stopping_no_worker_by_name_is_a_mistake_and_id_is_a_name_too() -> None:
    assert run("worker", "stop")[0].exit_code == 2
    assert run("worker", "stop", "--id", "lab1-cpu0")[0].errors[0].code == "CONFIG_INVALID"


def test_an_inventory_that_we_may_not_write_gets_the_lines_to_write_by_hand(tmp_path: Path) -> None:
    (tmp_path / "hosts.ini").write_text("[rbee_hives]\none ansible_connection=local\n")
    result, _, err = run("-i", "hosts.ini", "setup", "add-node", "--name", "ws", "--ssh-host", "192.0.2.30")
    assert result.errors[0].code == "INVENTORY_READ_ONLY"
    assert err.count("ws ansible_host=192.0.2.30") == 1
    result, _, err = run("-i", "hosts.ini", "setup", "update-node", "--name", "one", "--ssh-port", "2222")
    assert "ansible_port=2222" in err


def test_init_after_install_is_found_without_a_word_more(tmp_path: Path) -> None:
    assert run("install")[0].exit_code == 0
    result, _, _ = run("init", "admin@192.0.2.10")
    assert result.exit_code == 0
    assert run("config", "show", "--json")[0].data["settings"]["inventory"]["value"] == str(tmp_path / "inventory.yml")


@pytest.mark.parametrize(
    ("args", "quiet"),
    [
        (("hive", "list"), False),
        (("-q", "hive", "list"), True),
        (("hive", "list", "-q"), True),
        (("worker", "process", "list", "--node", "a", "--quiet"), True),
        (("infer", "--node", "a", "-p", "-q"), False),  # the prompt
        (("infer", "--node", "a", "-q", "-p", "x"), True),
        (("logs", "--node", "a", "-q"), True),
    ],
)
def test_quiet_stands_where_json_and_verbose_do(args: tuple[str, ...], quiet: bool) -> None:
    ui = Ui(io.StringIO(), io.StringIO())
    cli.run(args, ui)
    assert ui.quiet is quiet


def test_every_command_with_json_has_quiet_too() -> None:
    def leaves(command: Any) -> Iterator[Any]:
        below = getattr(command, "commands", None)
        for found in below.values() if below is not None else ():
            yield from leaves(found)
        if below is None:
            yield command

    for name in command_table.TABLE:
        for command in leaves(command_table.load(name)):
            names = {p.name for p in command.params}
            assert "json" not in names or "quiet" in names, command.name


def test_quiet_drops_narration_and_keeps_errors() -> None:
    err = io.StringIO()
    ui = Ui(io.StringIO(), err)
    ui.quiet = True
    ui.narrate("ctl", "x", "y")
    ui.finish(OperationResult("c", exit_code=1, errors=(ErrorItem.of(RbeeError("broken", hint="mend")),)))
    assert err.getvalue() == "error: broken [INTERNAL_ERROR]\n  try: mend\n"


def test_progress_off_a_terminal_is_at_most_one_line_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: now[0])
    err = io.StringIO()
    ui = Ui(io.StringIO(), err)
    for step in range(30):
        ui.progress("cpu0", "load", f"{step}")
        now[0] += 0.1
    assert 3 <= len(err.getvalue().splitlines()) <= 4
    for text in ("copying x: 49 of 50 MB (98 %)", "copying x: 49.5 of 50 MB (99 %)", "copying x: 50 of 50 MB (100 %)"):
        ui.progress("cpu0", "load", text)
    assert [line[-6:] for line in err.getvalue().splitlines()[-2:]] == ["(98 %)", "100 %)"]


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("story.gguf: 25.0 of 100.0 MB, 12.5 MB/s", "━━━━━───────────────  25%"),
        ("cpu0: loading m.gguf: 30 of 30 layers", "━━━━━━━━━━━━━━━━━━━━ 100%"),
        ("[60/120] Building CXX object ggml/src/x.o", "━━━━━━━━━━──────────  50%"),
        ("lab2: 1 of 4 stopped", "━━━━━───────────────  25%"),
        ("checking 10.0.0.1/24 of lab1", ""),
        ("waiting", ""),
    ],
)
def test_progress_on_a_terminal_is_a_bar_in_one_line(text: str, drawn: str) -> None:
    out, err = io.StringIO(), Terminal()
    ui = Ui(out, err)
    ui.progress("lab2", "model_download", text)
    ui.progress("lab2", "model_download", text + " " * 200 + "end")
    ui.note("done")
    shown = err.getvalue()
    assert (drawn in shown) is True
    assert ("%" in shown) is bool(drawn)
    assert "\n" not in shown.partition("done")[0]
    assert "end" not in shown, "longer than the terminal is wide"
    ascii_only = render.bar("1 of 2", fancy=False)
    assert ascii_only == "##########----------  50%"


def test_tasks_are_narrated_without_role_and_only_when_they_did_something() -> None:
    err = io.StringIO()
    listen = Ui(io.StringIO(), err).narrator("lab1", "worker_start")
    listen(events.TaskStarted("rbee_worker : Start | Download it"))
    listen(events.TaskDone("lab1", "x", "skipped"))
    listen(events.TaskStarted("rbee_worker : Start | Start the unit"))
    listen(events.Progress("cpu0: loading"))
    listen(events.TaskDone("lab1", "x", "ok"))
    listen(events.TaskDone("lab2", "x", "unreachable"))
    assert err.getvalue().splitlines() == [
        "[lab1      ] worker_start   : Start | Start the unit",
        "[lab1      ] worker_start   : cpu0: loading",
        "[lab2      ] worker_start   : not reachable",
    ]


def test_the_table_of_commands_is_true() -> None:
    for name, entry in command_table.TABLE.items():
        command = command_table.load(name)
        assert command.hidden is (entry.about is None), name
        assert command.help, name
    with pytest.raises(KeyError):
        command_table.load("fly")


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        (["--help"], {"httpx", "pydantic", "ansible_runner", "yaml", "rich"}),
        (["worker", "list"], {"ansible_runner", "yaml", "ansible", "rich", "pydantic", "rbee_ctl.commands.hive"}),
        (["status"], {"ansible_runner", "rich", "pydantic"}),
    ],
)
def test_heavy_modules_are_imported_only_where_needed(args: list[str], absent: set[str]) -> None:
    """The cause of slowness, not the seconds: those differ from machine to machine."""
    code = (
        "import io, sys\nfrom rbee_ctl import cli\nfrom rbee_ctl.render import Ui\n"
        f"cli.run({args!r}, Ui(io.StringIO(), io.StringIO()))\n"
        f"print(sorted({absent!r} & set(sys.modules)), file=sys.stderr)"
    )
    env = os.environ | {"RBEE_QUEEN_URL": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
