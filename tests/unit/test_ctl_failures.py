"""Failures as people meet them: exit code, error code and the next command to type (SPEC P-13, S-67 to S-69, S-85)."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rbee_ctl import cli, node_facts
from rbee_ctl import queen_client as client_module
from rbee_ctl.render import Ui

INVENTORY = """
all:
  children:
    rbee_hives:
      hosts:
        ws: {ansible_host: 192.0.2.1, rbee_workers: [{backend: cpu, model: m}]}
        two: {ansible_host: 192.0.2.2, rbee_workers: [{backend: cpu, model: m}, {backend: cuda, model: m}]}
"""
DEVICES = [{"id": f"cuda:{n}", "backend": "cuda", "device": n} for n in (0, 1)] + [{"id": "cpu:0", "backend": "cpu", "device": 0}]


def envelope(code: str, message: str = "it failed", **details: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "details": details, "correlation_id": "c"}}


def answers(status: int, body: Any) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(status, json=body) if isinstance(body, dict) else httpx.Response(status, text=body)


def silent(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectTimeout("timed out", request=request)


START = ["worker", "start", "--model", "m"]
INFER = ["infer", "--prompt", "Hi"]

#: what is typed, what the queen does (None: it must not be asked), exit code, error code, words of the hint
CASES: list[tuple[list[str], Any, int, str, str]] = [
    (["worker", "strat"], None, 2, "USAGE", "rbee-ctl worker --help"),
    (["infer"], None, 2, "USAGE", "rbee-ctl infer --help"),
    ([*START], None, 2, "USAGE", "rbee-ctl worker start --help"),
    ([*START, "--node", "ghost"], None, 1, "NODE_NOT_FOUND", "setup add-node --name ghost"),
    ([*START, "--node", "ws", "--backend", "quantum"], None, 5, "INVALID_BACKEND", "worker list"),
    ([*START, "--node", "ws", "--backend", "metal"], None, 5, "BACKEND_UNAVAILABLE", "--backend cpu"),
    ([*START, "--node", "ws", "--backend", "rocm"], None, 5, "BACKEND_UNAVAILABLE", "hive refresh --node ws"),
    ([*START, "--node", "ws", "--backend", "cuda", "--device", "5"], None, 5, "DEVICE_OUT_OF_RANGE", "--device 0"),
    ([*START, "--node", "two"], None, 5, "INVALID_BACKEND", "--backend"),
    (["worker", "start", "--node", "ws", "--model", "hf:invalid-format"], None, 5, "INVALID_MODEL_REF", "model list"),
    ([*INFER, "--model", "invalid format"], None, 5, "INVALID_MODEL_REF", "model list"),
    ([*INFER, "--node", "ghost"], None, 1, "NODE_NOT_FOUND", "add-node"),
    (["worker", "stop", "nonsense"], None, 1, "NODE_NOT_FOUND", "worker list"),
    (["worker", "stop", "ws-cpu0", "two-cpu0"], None, 1, "INVALID_REQUEST", "worker stop"),
    (["worker", "retire", "ws-cpu0"], None, 2, "CONFIRMATION_REQUIRED", "--yes"),
    (["setup", "remove-node", "--name", "ghost"], None, 1, "NODE_NOT_FOUND", "add-node"),
    (["setup", "add-node", "--name", "ws", "--ssh-host", "x"], None, 1, "NODE_EXISTS", "update-node"),
    (["setup", "add-node", "--name", "no/good", "--ssh-host", "x"], None, 1, "INVALID_REQUEST", "add-node"),
    (["setup", "add-node", "--name", "n", "--ssh-key", "/nonexistent"], None, 1, "SSH_KEY_NOT_FOUND", "ssh-keygen"),
    (["setup", "update-node", "--name", "ws"], None, 1, "INVALID_REQUEST", "--ssh-host"),
    (["hive", "import-ssh", "--ssh-config", "/nonexistent"], None, 1, "CONFIG_INVALID", "--ssh-config"),
    (["hive", "get"], None, 1, "INVALID_REQUEST", "--node"),
    (["worker", "list"], silent, 4, "CONNECTION_TIMEOUT", "systemctl status rbee-queen"),
    (["status"], silent, 4, "CONNECTION_TIMEOUT", "systemctl status rbee-queen"),
    (["worker", "list"], answers(200, "<html>failed: [DONE]\n\x1b[31m</html>"), 1, "MALFORMED_RESPONSE", "config show"),
    (["worker", "list"], answers(401, envelope("INVALID_API_KEY")), 1, "INVALID_API_KEY", "api_key_file"),
    (["worker", "list"], answers(401, envelope("MISSING_API_KEY")), 1, "MISSING_API_KEY", "api_key_file"),
    (["worker", "get", "ghost"], answers(404, envelope("WORKER_NOT_FOUND")), 1, "WORKER_NOT_FOUND", ""),
    (["worker", "list"], answers(500, envelope("FUTURE_CODE")), 1, "INTERNAL_ERROR", ""),
    (INFER, answers(507, envelope("VRAM_EXHAUSTED", required_mb=4000, available_mb=2000)), 5, "VRAM_EXHAUSTED", ""),
    (INFER, answers(408, envelope("REQUEST_TIMEOUT")), 1, "REQUEST_TIMEOUT", ""),
    (INFER, answers(403, envelope("MODEL_ACCESS_DENIED")), 1, "MODEL_ACCESS_DENIED", ""),
    (INFER, answers(502, "no envelope"), 1, "MALFORMED_RESPONSE", "rbee queen?"),
]


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [n for n in os.environ if n.startswith("RBEE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inventory.yml").write_text(INVENTORY)
    monkeypatch.setenv("RBEE_INVENTORY", str(tmp_path / "inventory.yml"))
    monkeypatch.setenv("RBEE_QUEEN_URL", "http://queen.invalid:8080")
    node_facts.capabilities(tmp_path / ".local/state/rbee", "ws", {"devices": DEVICES})
    return tmp_path


@pytest.mark.S18
@pytest.mark.S67
@pytest.mark.parametrize(
    ("args", "queen", "exit_code", "code", "hint"), CASES, ids=[" ".join(c[0]) + f" -> {c[3]}" for c in CASES]
)
def test_failure(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], queen: Any, exit_code: int, code: str, hint: str
) -> None:
    real = httpx.Client

    def client(**settings: Any) -> httpx.Client:
        settings.pop("verify", None)

        def answer(request: httpx.Request) -> httpx.Response:
            assert queen is not None, f"the queen was asked: {request.url}"
            found: httpx.Response = queen(request)
            return found

        return real(transport=httpx.MockTransport(answer), **settings)

    monkeypatch.setattr(client_module.httpx, "Client", client)
    monkeypatch.setattr("rbee_ctl.playbook.run_playbook", lambda *_, **__: pytest.fail("a playbook was started"))
    before = (fleet / "inventory.yml").read_bytes()
    out, err = io.StringIO(), io.StringIO()
    ui = Ui(out, err)
    result = cli.run(args, ui)
    ui.finish(result)
    assert (result.exit_code, [e.code for e in result.errors]) == (exit_code, [code]), err.getvalue()
    assert f"[{code}]" in err.getvalue()
    assert hint in (result.errors[0].hint or ""), result.errors[0].hint
    assert (fleet / "inventory.yml").read_bytes() == before
    shown = json.loads(json.dumps(result.envelope(), default=str))
    assert (shown["version"], shown["exit_code"], shown["errors"][0]["code"]) == (1, exit_code, code)


@pytest.mark.S85
def test_the_first_settings_file_wins_and_is_named(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RBEE_QUEEN_URL", "RBEE_INVENTORY"):
        monkeypatch.delenv(name)
    user = fleet / ".config/rbee/config.toml"
    user.parent.mkdir(parents=True)
    user.write_text('queen_url = "http://user:1"\n')
    own = fleet / "own.toml"
    own.write_text('queen_url = "http://own:1"\n')

    def shown() -> dict[str, Any]:
        out = io.StringIO()
        ui = Ui(out, io.StringIO())
        ui.finish(cli.run(["config", "show", "--json"], ui))
        found: dict[str, Any] = json.loads(out.getvalue())["data"]["settings"]["queen_url"]
        return found

    assert shown() == {"value": "http://user:1", "source": str(user)}
    monkeypatch.setenv("RBEE_CONFIG", str(own))
    assert shown() == {"value": "http://own:1", "source": str(own)}


@pytest.mark.parametrize("arguments", [["version"], ["version", "--json"], ["config", "show"]])
def test_an_answer_that_can_not_be_written_is_told_in_one_line(arguments: list[str]) -> None:
    """A full disk behind ``>``: no traceback, and no success."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("rbee-ctl")), *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: the answer can not be written to standard output: No space left on device"]
