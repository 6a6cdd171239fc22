"""``rbee-ctl infer`` against a scripted queen: streams, exit codes, retries, cold start, broken streams."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee_ctl import cli, inference
from rbee_ctl.playbook import HostOutcome, PlaybookResult
from rbee_ctl.render import Ui
from rbee_ctl.result import OperationResult
from rbee_ctl.session import Session
from rbee_serve.contract import events
from rbee_serve.contract.errors import AllSlotsBusy, InvalidApiKey, ModelNotFound, UnitStartFailed, WorkerCrashed
from tests.unit.queen_stand_in import STARTED, QueenStandIn, tokens, whole, worker

INVENTORY = """
rbee_hives:
  hosts:
    lab1: {ansible_host: 10.77.0.11, rbee_workers: [{backend: cpu, device: 0, model: m}]}
    lab2: {ansible_host: 10.77.0.12, rbee_workers: [{backend: cpu, device: 0, model: m}, {backend: cuda, device: 0, model: m}]}
"""


@pytest.fixture
def queen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[QueenStandIn]:
    (tmp_path / "inventory.yml").write_text(INVENTORY)
    with QueenStandIn().running() as found:
        settings = {"inventory": "inventory.yml", "state_dir": "state", "queen_url": found.url}
        (tmp_path / "config.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
        for name in [n for n in os.environ if n.startswith("RBEE_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("RBEE_CONFIG", str(tmp_path / "config.toml"))
        monkeypatch.setattr(inference, "BUSY_PAUSES_S", (0.001, 0.002, 0.004))
        monkeypatch.setattr(inference, "LOADING_POLL_S", 0.01)
        yield found


def run(*args: str) -> tuple[OperationResult, str, str]:
    """Return (result, stdout, stderr) of ``rbee-ctl ARGS``."""
    out, err = io.StringIO(), io.StringIO()
    ui = Ui(out, err)
    result = cli.run(args, ui)
    ui.finish(result)
    return result, out.getvalue(), err.getvalue()


def test_stdout_holds_the_tokens_and_nothing_else(queen: QueenStandIn) -> None:
    queen.answers = [whole("Once", " upon", " a", " time")]
    result, out, err = run("infer", "--model", "m", "--prompt", "x", "--max-tokens", "4", "--stop", "a", "--seed", "7")
    assert (result.exit_code, out) == (0, "Once upon a time")
    assert "4 tokens, MAX_TOKENS, 40.0 tokens/s, lab1-cpu0" in err
    body = queen.bodies[0]
    assert body == {
        "model": "m",
        "prompt": "x",
        "max_tokens": 4,
        "temperature": 0.7,
        "seed": 7,
        "stop": ["a"],
        "stream": True,
        "queue_timeout_s": 0,
    }


def test_system_message_makes_it_a_chat(queen: QueenStandIn) -> None:
    queen.answers = [whole("4")]
    run("infer", "--prompt", "2+2?", "--system", "Be brief.")
    assert queen.bodies[0]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert "prompt" not in queen.bodies[0]


def test_json_prints_one_envelope(queen: QueenStandIn) -> None:
    queen.answers = [whole("a", "b")]
    _, out, _ = run("infer", "-p", "x", "--json")
    envelope = json.loads(out)
    assert (envelope["command"], envelope["status"], envelope["data"]["text"]) == ("infer", "success", "ab")
    assert (envelope["data"]["token_ids"], envelope["data"]["seed"]) == ([100, 101], 7)


def test_busy_is_tried_three_times_more_then_three_ways_out_are_named(queen: QueenStandIn) -> None:
    queen.answers = [AllSlotsBusy("all 1 slots are busy", slots_total=1, slots_busy=1)] * 4
    result, out, err = run("infer", "-p", "x", "--model", "m")
    assert (result.exit_code, len(queen.bodies), out) == (1, 4, "")
    assert result.errors[0].code == "ALL_SLOTS_BUSY"
    assert err.count("next try in") == 3
    for way in ("rbee-ctl worker list", "rbee-ctl worker start --node NODE --model m", "without --node"):
        assert way in err
    assert "slots_total: 1" in err


def test_slot_that_frees_early_is_used(queen: QueenStandIn) -> None:
    queen.answers = [AllSlotsBusy("busy"), whole("a")]
    result, out, _ = run("infer", "-p", "x")
    assert (result.exit_code, out) == (0, "a")


def test_default_pauses_are_those_of_the_spec() -> None:
    assert inference.BUSY_PAUSES_S == (1.0, 2.0, 4.0)
    assert inference.LOADING_LIMIT_S == 300


@pytest.mark.parametrize("breaking", ["error event", "connection lost"])
def test_broken_stream_keeps_the_partial_text(queen: QueenStandIn, tmp_path: Path, breaking: str) -> None:
    crash = events.encode(events.error(WorkerCrashed("worker lab1-cpu0 went away")))
    tail = [crash, events.DONE] if breaking == "error event" else [None]
    queen.answers = [[STARTED, *tokens("half", " way"), *tail]]
    result, out, err = run("infer", "-p", "x", "--max-tokens", "9")
    assert (result.exit_code, out) == (1, "half way")
    kept = tmp_path / "state/partial/request-1.txt"
    assert kept.read_text() == "half way"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert str(kept) in err
    assert "2 / 9 tokens" in err


def test_stream_that_breaks_before_the_first_token_leaves_no_file(queen: QueenStandIn, tmp_path: Path) -> None:
    queen.answers = [[STARTED, None]]
    result, _, _ = run("infer", "-p", "x")
    assert (result.exit_code, result.status) == (1, "error")
    assert not (tmp_path / "state/partial").exists()


def test_text_that_looks_like_the_end_is_only_text(queen: QueenStandIn) -> None:
    queen.answers = [whole("[DONE]", "\n\ndata: [DONE]\n\n", "failed:")]
    assert run("infer", "-p", "x")[1] == "[DONE]\n\ndata: [DONE]\n\nfailed:"


def test_wrong_key_says_where_the_key_comes_from(queen: QueenStandIn) -> None:
    queen.answers = [InvalidApiKey("unknown key")]
    result, _, err = run("infer", "-p", "x")
    assert (result.exit_code, result.errors[0].code) == (1, "INVALID_API_KEY")
    assert "rbee-ctl config show" in err


def test_queen_of_somebody_else_that_is_down_is_exit_4(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBEE_QUEEN_URL", "http://127.0.0.1:9")
    result, _, err = run("infer", "-p", "x")
    assert (result.exit_code, result.errors[0].code) == (4, "CONNECTION_TIMEOUT")
    assert "systemctl status rbee-queen" in err


@pytest.mark.parametrize(
    ("args", "code", "exit_code", "says"),
    [
        (["--model", "hf:broken"], "INVALID_MODEL_REF", 5, "hf:org/repo"),
        (["--backend", "quantum"], "INVALID_BACKEND", 5, "cpu, cuda, rocm, vulkan, metal"),
        (["--backend", "metal"], "BACKEND_UNAVAILABLE", 5, "Linux"),
        (["--node", "lab9"], "NODE_NOT_FOUND", 1, "known: lab1, lab2"),
        (["--max-tokens", "0"], "USAGE", 2, "--max-tokens"),
    ],
)
def test_mistakes_are_found_before_the_queen_is_asked(
    queen: QueenStandIn, args: list[str], code: str, exit_code: int, says: str
) -> None:
    result, _, err = run("infer", "-p", "x", *args)
    assert (result.errors[0].code, result.exit_code) == (code, exit_code)
    assert says in err
    assert queen.bodies == []


class Starts:
    """Stands for the playbook: records what was asked, and lets the worker appear."""

    def __init__(self, queen: QueenStandIn, error: UnitStartFailed | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self._queen, self._error = queen, error

    def play(self, _: Session, name: str, *, limit: str, extra_vars: dict[str, Any]) -> PlaybookResult:
        self.calls.append({"name": name, "limit": limit, **extra_vars})
        if self._error is not None:
            return PlaybookResult("failed", 2, {limit: HostOutcome("failed", {}, self._error)})
        started = {"worker_id": f"{limit}-cpu0", "name": "cpu0", "state": "loading", "model_id": "m", "url": "http://x"}
        self._queen.workers = [worker(f"{limit}-cpu0", status="loading")]
        self._queen.on_get = lambda _: self._queen.workers[0].update(status="idle")
        return PlaybookResult("success", 0, {limit: HostOutcome("ok", {"worker": started, "changed": True})})


def test_cold_start_begins_a_worker_and_then_streams(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(queen)
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: starts.play(s, name, **kw))
    queen.answers = [ModelNotFound("model is not served"), whole("hi")]
    result, out, err = run("infer", "--node", "lab1", "--model", "hf:org/repo:m.gguf", "-p", "x", "--device", "0")
    assert (result.exit_code, out) == (0, "hi")
    request = {"backend": "cpu", "device": 0, "model": "hf:org/repo:m.gguf"}
    assert starts.calls == [{"name": "worker_start", "limit": "lab1", "rbee_worker_request": request}]
    assert "[ctl       ] cold_start     : " in err
    assert (queen.bodies[1]["model"], queen.bodies[1]["worker_id"]) == ("m", "lab1-cpu0")


def test_cold_start_that_fails_is_that_failure(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(queen, UnitStartFailed("lab1: rbee-worker@cpu0.service failed", journal=["no such file"]))
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: starts.play(s, name, **kw))
    queen.answers = [ModelNotFound("model is not served")]
    result, _, err = run("infer", "--node", "lab1", "--model", "m", "-p", "x")
    assert (result.exit_code, result.errors[0].code) == (1, "UNIT_START_FAILED")
    assert "| no such file" in err


def test_no_worker_is_started_without_a_node(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(queen)
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: starts.play(s, name, **kw))
    queen.answers = [ModelNotFound("model 'x' is not served; known: m", known=["m"])]
    result, _, _ = run("infer", "--model", "x", "-p", "x")
    assert (result.errors[0].code, starts.calls) == ("INVALID_MODEL_REF", [])
    assert "hf:org/repo" in result.errors[0].message  # SPEC S-67: a word that nobody knows is told the formats
    assert "file:///path/model.gguf" in result.errors[0].message
    queen.answers = [ModelNotFound("model 'hf:org/repo' is not served; known: m", known=["m"])]
    result, _, _ = run("infer", "--model", "hf:org/repo", "-p", "x")
    assert (result.errors[0].code, starts.calls) == ("MODEL_NOT_FOUND", [])


def test_loading_worker_is_waited_for_and_no_second_one_is_started(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(queen)
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: starts.play(s, name, **kw))
    queen.workers = [worker(status="loading")]
    seen: list[str] = []

    def on_get(path: str) -> None:
        if path != "/health":
            seen.append(path)
        if len(seen) == 3:
            queen.workers[0]["status"] = "idle"

    queen.on_get = on_get
    queen.answers = [ModelNotFound("not yet"), whole("hi")]
    result, out, err = run("infer", "--node", "lab1", "--model", "m", "-p", "x")
    assert (result.exit_code, out, starts.calls) == (0, "hi", [])
    assert "lab1-cpu0: loading" in err


def test_backend_chooses_among_the_live_workers(queen: QueenStandIn) -> None:
    queen.workers = [worker("lab2-cuda0", backend="cuda"), worker("lab2-cpu0"), worker("lab1-cpu0", slots_available=3)]
    queen.answers = [whole("a")]
    run("infer", "--backend", "cpu", "-p", "x", "--model", "m")
    assert queen.bodies[0]["worker_id"] == "lab1-cpu0"


def test_node_with_two_backends_needs_the_choice(queen: QueenStandIn) -> None:
    queen.answers = [ModelNotFound("not served")]
    result, _, err = run("infer", "--node", "lab2", "--model", "x", "-p", "x")
    assert result.errors[0].code == "INVALID_BACKEND"
    assert "cpu, cuda" in err


@pytest.mark.parametrize("json_mode", [False, True])
def test_ctrl_c_cancels_at_the_queen_and_keeps_stdout(queen: QueenStandIn, json_mode: bool) -> None:
    hold = threading.Event()
    queen.answers = [[STARTED, *tokens("one", " two"), hold]]
    command = [sys.executable, "-m", "rbee_ctl.cli", "infer", "-p", "x", *(["--json"] if json_mode else [])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if json_mode:
            queen_has_it = threading.Event()
            while not queen.bodies and child.poll() is None:
                queen_has_it.wait(0.02)
            # The tokens lie in the client's socket by now or will before the signal is handled; either is a valid moment.
            first = ""
        else:
            first = child.stdout.read(len("one two"))
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=20)
    finally:
        hold.set()
        child.kill()
        child.wait()
    assert child.returncode == 130, err
    if json_mode:
        envelope = json.loads(out)
        assert (envelope["exit_code"], envelope["errors"][0]["code"]) == (130, "REQUEST_CANCELED")
    else:
        assert first + out == "one two"
        assert queen.cancelled == ["request-1"]
        assert "2 / 20 tokens" in err


class Plays:
    """Stands for the playbooks of an ephemeral run: a machine of which ``hive`` is what it says of itself."""

    def __init__(self, queen: QueenStandIn, hive: dict[str, Any]) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._hive, self._starts = hive, Starts(queen)

    def play(self, session: Session, name: str, **options: Any) -> PlaybookResult:
        self.calls.append((name, options.get("extra_vars") or {}))
        if name == "worker_start":
            return self._starts.play(session, name, limit=options["limit"], extra_vars=options["extra_vars"])
        result = {"hive": self._hive} if name == "status" else {}
        return PlaybookResult("success", 0, {options.get("limit") or "lab1": HostOutcome("ok", result, changed=1)})


@pytest.mark.S80
@pytest.mark.parametrize(
    ("hive", "stopped"),
    [
        ({"target": "inactive", "units": []}, [("worker_stop", True), ("hive_stop", None)]),
        ({"target": "active", "units": [{"name": "cpu0", "active_state": "failed"}]}, [("worker_stop", False)]),
        ({"target": "active", "units": [{"name": "cpu0", "active_state": "inactive", "socket": "active"}]}, []),
        ({"target": "active", "units": [{"name": "cpu0", "active_state": "active"}]}, []),
    ],
)
def test_ephemeral_stops_exactly_what_it_has_started(
    queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch, hive: dict[str, Any], stopped: list[tuple[str, bool | None]]
) -> None:
    plays = Plays(queen, hive)
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: plays.play(s, name, **kw))
    queen.answers = [ModelNotFound("model is not served"), whole("hi")]
    result, out, _ = run("infer", "--node", "lab1", "--model", "m", "-p", "x", "--ephemeral")
    assert (result.exit_code, out) == (0, "hi")
    names = [name for name, _ in plays.calls]
    assert names[:2] == ["status", "worker_start"], "the queen answers: it is not ours to start"
    assert [(name, variables.get("rbee_worker_remove")) for name, variables in plays.calls[2:]] == stopped


@pytest.mark.S80
def test_ephemeral_stops_also_when_the_answer_fails(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    plays = Plays(queen, {"target": "inactive", "units": []})
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: plays.play(s, name, **kw))
    queen.answers = [ModelNotFound("model is not served"), WorkerCrashed("it went away")]
    result, _, _ = run("infer", "--node", "lab1", "--model", "m", "-p", "x", "--ephemeral")
    assert (result.exit_code, result.errors[0].code) == (1, "WORKER_CRASHED")
    assert [name for name, _ in plays.calls[2:]] == ["worker_stop", "hive_stop"]


@pytest.mark.S80
def test_ephemeral_starts_a_queen_that_does_not_answer_and_stops_it(
    queen: QueenStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plays = Plays(queen, {"target": "active", "units": []})
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: plays.play(s, name, **kw))
    monkeypatch.setenv("RBEE_QUEEN_URL", "http://127.0.0.1:9")
    with_queen(tmp_path, "127.0.0.1")
    result, _, _ = run("infer", "--node", "lab1", "--model", "m", "-p", "x", "--ephemeral")
    assert result.exit_code == 4  # the stand-in starts no queen
    assert [name for name, _ in plays.calls] == ["queen_start", "queen_stop"]


def with_queen(folder: Path, address: str) -> None:
    """Add the queen's group to the inventory."""
    text = f"{INVENTORY}rbee_queen: {{hosts: {{boss: {{ansible_host: {address}}}}}}}\n"
    (folder / "inventory.yml").write_text(text)


def test_the_fleets_queen_is_started_when_it_does_not_run_and_stays(
    queen: QueenStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPEC CAP-67: a queen of the inventory is started by its playbook; one that answers, or is somebody else's, is not."""
    plays = Plays(queen, {"target": "active", "units": []})
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: plays.play(s, name, **kw))
    with_queen(tmp_path, "127.0.0.1")
    queen.answers = [whole("hi")]
    assert run("infer", "-p", "x")[0].exit_code == 0
    assert plays.calls == []
    monkeypatch.setenv("RBEE_QUEEN_URL", "http://127.0.0.1:9")
    result, _, err = run("infer", "-p", "x")
    assert (result.exit_code, [name for name, _ in plays.calls]) == (4, ["queen_start"])
    assert "starting it" in err
    with_queen(tmp_path, "10.77.0.11")
    assert run("infer", "-p", "x")[0].exit_code == 4
    assert len(plays.calls) == 1


@pytest.mark.S81
def test_without_ephemeral_nothing_is_stopped(queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    plays = Plays(queen, {"target": "inactive", "units": []})
    monkeypatch.setattr(Session, "play", lambda s, name, **kw: plays.play(s, name, **kw))
    queen.answers = [ModelNotFound("model is not served"), whole("hi")]
    assert run("infer", "--node", "lab1", "--model", "m", "-p", "x")[0].exit_code == 0
    assert [name for name, _ in plays.calls] == ["worker_start"]


@pytest.mark.S89
def test_health_says_of_each_worker_whether_it_is_ready(queen: QueenStandIn) -> None:
    beaten = {"last_heartbeat_age_s": 2.5}
    queen.workers = [worker(**beaten), worker("lab2-cpu0", status="loading", **beaten)]
    result, out, _ = run("workers", "health", "--json")
    assert result.exit_code == 0
    found = {w["id"]: (w["node"], w["ready"], w["state"], w["last_heartbeat_age_s"]) for w in json.loads(out)["data"]["workers"]}
    assert found == {"lab1-cpu0": ("lab1", True, "idle", 2.5), "lab2-cpu0": ("lab2", False, "loading", 2.5)}
    shown = run("workers", "health")[1].splitlines()
    assert len([line for line in shown if "lab1-cpu0" in line or "lab2-cpu0" in line]) == 2


@pytest.mark.S84
def test_installing_for_all_users_is_refused_to_others_than_root(
    queen: QueenStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result, _, err = run("install", "--system")
    assert result.exit_code == 1
    assert "needs root" in err
    assert "sudo rbee-ctl install --system" in err
    assert not (tmp_path / "home").exists()
