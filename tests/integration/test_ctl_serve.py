"""``rbee-ctl serve`` and what talks to it: real queen, real worker, real model, as a user would run them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fleet import wait_until
from standing_still import children, standing_still

from rbee_serve import process_tree

pytestmark = pytest.mark.integration

CTL = [sys.executable, "-m", "rbee_ctl.cli"]
MODEL = "smollm2-135m-instruct"


def clean_environment(**changes: str) -> dict[str, str]:
    """Return this environment without settings of ours; PYTHONUNBUFFERED would lose a line that a signal breaks off."""
    left_out = ("RBEE_", "OPENAI_", "PYTHONUNBUFFERED")
    return {k: v for k, v in os.environ.items() if not k.startswith(left_out)} | changes


@dataclass
class Stack:
    """A running ``rbee-ctl serve``: ``data`` is what it said when it was ready."""

    process: subprocess.Popen[str]
    data: dict[str, Any]

    @property
    def engine(self) -> int:
        (pid,) = children(self.data["pids"]["worker"])
        return pid

    @property
    def env(self) -> dict[str, str]:
        return clean_environment(RBEE_CONFIG=self.data["config"])

    def ctl(self, *args: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*CTL, *args], capture_output=True, text=True, env=self.env | changes, timeout=120, check=False)


@contextlib.contextmanager
def serving(model: Path, temp: Path, *args: str) -> Iterator[Stack]:
    command = [*CTL, "serve", "--json", "--model-path", str(model), "--model-id", MODEL, *args]
    log = temp / "serve.log"
    with log.open("w") as err:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, text=True, env=clean_environment(TMPDIR=str(temp))
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"serve ended before it was ready:\n{log.read_text()}"
        yield Stack(process, json.loads(line)["data"])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(100)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def stack(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serving(model_path, tmp_path_factory.mktemp("serve"), "--slots", "1") as found:
        yield found


def free_slots(stack: Stack) -> int:
    done = stack.ctl("worker", "list", "--json")
    return int(json.loads(done.stdout)["data"]["workers"][0]["slots_available"])


def test_tokens_come_one_by_one(stack: Stack) -> None:
    """Twice, when some are here, the engine is stopped: the request still runs, the text is not complete, and then goes on."""
    asked = ["infer", "--model", MODEL, "--prompt", "Once upon a time", "--max-tokens", "400", "--temperature", "0"]
    text = b""
    seen: list[int] = []
    with subprocess.Popen([*CTL, *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=stack.env) as child:
        assert child.stdout is not None
        while piece := os.read(child.stdout.fileno(), 4096):
            text += piece
            if len(seen) < 2 and (not seen or len(text) > seen[0]):
                seen.append(len(text))
                with standing_still(stack.engine):
                    wait_until(lambda: free_slots(stack) == 0, "the request is seen to run")
        assert child.stderr is not None
        err = child.stderr.read().decode()
    assert child.returncode == 0, err
    assert 0 < seen[0] < seen[1] < len(text)
    assert "400 tokens, MAX_TOKENS" in err
    # The same request, not streamed by us: stdout held the tokens and nothing else.
    again = stack.ctl(*asked, "--json")
    assert json.loads(again.stdout)["data"]["text"].encode() == text


def test_seed_fixes_the_text_and_is_reported(stack: Stack) -> None:
    first = json.loads(stack.ctl("infer", "-p", "The sea", "-n", "12", "--temperature", "1", "--json").stdout)["data"]
    seed = str(first["seed"])
    second = json.loads(stack.ctl("infer", "-p", "The sea", "-n", "12", "--temperature", "1", "--seed", seed, "--json").stdout)
    assert second["data"]["token_ids"] == first["token_ids"]


def test_ctrl_c_is_130_keeps_stdout_and_frees_the_slot(stack: Stack) -> None:
    command = [*CTL, "infer", "--model", MODEL, "-p", "Once upon a time", "--max-tokens", "2000", "--temperature", "0"]
    wait_until(lambda: free_slots(stack) == 1, "slot free before the test")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=stack.env)
    try:
        assert child.stdout is not None
        begin = child.stdout.read(10)
        with standing_still(stack.engine):
            wait_until(lambda: free_slots(stack) == 0, "slot taken while the stream runs")
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130, err.decode()
    text = (begin + rest).decode()
    assert text.startswith(", ")
    assert "[ctl       ] cancelled      : after " in err.decode()
    assert "error: interrupted after" in err.decode()
    wait_until(lambda: free_slots(stack) == 1, "slot free again")


def test_reader_that_leaves_ends_the_request(stack: Stack) -> None:
    command = [*CTL, "infer", "-p", "Once upon a time", "--max-tokens", "2000", "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=stack.env) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(10)
        child.stdout.close()
        err = child.stderr.read().decode()
    assert child.returncode == 1
    assert "Traceback" not in err
    wait_until(lambda: free_slots(stack) == 1, "slot free again")


def test_busy_worker_is_tried_again_then_given_up(stack: Stack) -> None:
    command = [*CTL, "infer", "-p", "Once upon a time", "--max-tokens", "2000", "--temperature", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=stack.env) as holder:
        try:
            wait_until(lambda: free_slots(stack) == 0, "slot taken")
            with standing_still(stack.engine):
                began = time.monotonic()
                done = stack.ctl("infer", "-p", "x")
                took = time.monotonic() - began
        finally:
            holder.send_signal(signal.SIGINT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("next try in") == 3
    assert "ALL_SLOTS_BUSY" in done.stderr
    assert took >= 3.5  # pauses of 1, 2 and 4 s, each at least halved
    wait_until(lambda: free_slots(stack) == 1, "slot free again")


def test_wrong_key_is_refused(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("rbee-wrong\n")
    for command in (["infer", "-p", "x"], ["worker", "list"], ["status"]):
        done = stack.ctl(*command, RBEE_API_KEY_FILE=str(tmp_path / "key"))
        assert done.returncode == 1
        assert "INVALID_API_KEY" in done.stderr
        assert "rbee-wrong" not in done.stderr


def test_unknown_model_names_the_known_ones(stack: Stack) -> None:
    done = stack.ctl("infer", "--model", "nobody/knows", "-p", "x", "--json")
    error = json.loads(done.stdout)["errors"][0]
    assert (done.returncode, error["code"], error["details"]["known"]) == (5, "INVALID_MODEL_REF", [MODEL])


def test_prompt_that_is_too_long_tells_both_numbers(stack: Stack) -> None:
    done = stack.ctl("infer", "-p", "word " * 6000, "--json")
    error = json.loads(done.stdout)["errors"][0]
    assert (done.returncode, error["code"]) == (1, "PROMPT_TOO_LONG")


def test_status_and_list_show_the_worker(stack: Stack) -> None:
    status = json.loads(stack.ctl("status", "--json").stdout)["data"]
    assert [h["name"] for h in status["hives"]] == ["localhost"]
    assert status["workers"][0]["id"] == "localhost-cpu0"
    assert "localhost-cpu0" in stack.ctl("status").stdout
    shown = json.loads(stack.ctl("worker", "get", "localhost-cpu0", "--json").stdout)["data"]["worker"]
    assert (shown["model_id"], shown["backend"]) == (MODEL, "cpu")
    assert json.loads(stack.ctl("worker", "list", "--node", "elsewhere", "--json").stdout)["data"] == {"workers": []}
    assert stack.ctl("worker", "get", "nobody").returncode == 1


def test_env_makes_the_openai_client_work(stack: Stack) -> None:
    """``eval`` by a real shell, then the official client with nothing but its own variables."""
    script = (
        "from openai import OpenAI\n"
        f"c = OpenAI()\nassert {MODEL!r} in [m.id for m in c.models.list()]\n"
        f"a = c.chat.completions.create(model={MODEL!r}, messages=[dict(role='user', content='Say hello.')], max_tokens=8)\n"
        "print(a.choices[0].message.content)"
    )
    ctl = " ".join(CTL)
    shell = f'eval "$({ctl} env)" && exec {sys.executable} -c "$SCRIPT"'
    done = subprocess.run(
        ["sh", "-c", shell], capture_output=True, text=True, env=stack.env | {"SCRIPT": script}, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_secrets_are_in_private_files_and_no_argv(stack: Stack) -> None:
    folder = Path(stack.data["config"]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    found = [(folder / name).read_text().strip() for name in ("fleet-token", "client-key")]
    for name in ("fleet-token", "client-key", "client-keys"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    for process in process_tree.descendants(stack.process.pid):
        argv = Path(f"/proc/{process.pid}/cmdline").read_text()
        environ = Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
        assert not any(secret in argv + environ for secret in found)
    shown = stack.ctl("config", "show")
    assert found[1] not in shown.stdout
    assert "sha256:" in shown.stdout


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(model_path: Path, tmp_path: Path, how: signal.Signals) -> None:
    with serving(model_path, tmp_path) as stack:
        below = process_tree.descendants(stack.process.pid)
        assert len(below) >= 3  # queen, worker, engine
        stack.process.send_signal(how)
        stack.process.wait(100)
        wait_until(lambda: not any(process_tree.alive(p) for p in below), f"all processes gone after {how.name}")
        if how is signal.SIGKILL:
            # Nobody was left to remove the folder: the next start does.
            assert list(tmp_path.glob("rbee-serve-*"))
            with serving(model_path, tmp_path) as second:
                assert [str(p) for p in tmp_path.glob("rbee-serve-*")] == [str(Path(second.data["config"]).parent)]
        else:
            assert stack.process.returncode == 0
    assert list(tmp_path.glob("rbee-serve-*")) == []


def test_stop_that_comes_while_ready_is_printed_is_an_orderly_end(model_path: Path, tmp_path: Path) -> None:
    """A script may stop it in the very moment it reads the answer: held open here by a pipe that is full."""
    reading, writing = os.pipe()
    room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, b"x" * room)
    command = [*CTL, "serve", "--json", "--model-path", str(model_path), "--model-id", MODEL]
    env = clean_environment(TMPDIR=str(tmp_path), PYTHONUNBUFFERED="")  # without a buffer what was interrupted is gone
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.DEVNULL, env=env) as process:
        os.close(writing)
        try:
            wait_until(lambda: "pipe_write" in Path(f"/proc/{process.pid}/wchan").read_text(), "it waits to print")
            below = process_tree.descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not any(process_tree.alive(p) for p in below), "queen and worker ended")
            with os.fdopen(reading, "rb") as pipe:
                said = pipe.read().lstrip(b"x")
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert said.count(b"queen_url") == len(said.splitlines()) == 1
    assert list(tmp_path.glob("rbee-serve-*")) == []


def test_worker_that_dies_ends_serve_with_its_last_words(model_path: Path, tmp_path: Path) -> None:
    with serving(model_path, tmp_path) as stack:
        os.kill(stack.data["pids"]["worker"], signal.SIGKILL)
        assert stack.process.wait(60) == 1
        assert "the worker was ended by SIGKILL" in (tmp_path / "serve.log").read_text()


def test_file_that_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 100)
    command = [*CTL, "serve", "--json", "--model-path", str(tmp_path / "x.gguf")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(TMPDIR=str(tmp_path)), timeout=60, check=False
    )
    error = json.loads(done.stdout)["errors"][0]
    assert (done.returncode, error["code"]) == (1, "MODEL_FILE_INVALID")
    assert "x.gguf" in str(error)


def test_port_that_is_taken_is_named(stack: Stack, model_path: Path) -> None:
    port = stack.data["queen_url"].rpartition(":")[2]
    done = stack.ctl("serve", "--model-path", str(model_path), "--port", port)
    assert done.returncode == 1
    assert f"port {port} is taken" in done.stderr
