"""The queen as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fleet import Fleet, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def fleet(tmp_path: Path, model_path: Path) -> Fleet:
    return Fleet(tmp_path, model_path)


def rbee_queen(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rbee_serve.queen.main", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def append(fleet: Fleet, line: str) -> Path:
    with fleet.queen.config.open("a", encoding="utf-8") as f:
        f.write(line + "\n")
    return fleet.queen.config


def test_good_settings_pass_the_check(fleet: Fleet) -> None:
    done = rbee_queen("--config", fleet.queen.config, "--check-config")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{fleet.queen.config}: ok\n", "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prot = 8080", "prot: Extra inputs are not permitted"),
        ('stall_timeout_s = "soon"', "stall_timeout_s"),
        ("request_timeout_s = 0", "request_timeout_s: Input should be greater than 0 (got 0)"),
        ("port = [", "not valid TOML"),
    ],
)
@pytest.mark.parametrize("check", [[], ["--check-config"]])
def test_wrong_settings_end_with_78_and_name_the_key(fleet: Fleet, line: str, said: str, check: list[str]) -> None:
    done = rbee_queen("--config", append(fleet, line), *check)

    assert done.returncode == 78
    assert said in done.stderr
    assert str(fleet.queen.config) in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_settings_file_ends_with_78(tmp_path: Path) -> None:
    done = rbee_queen("--config", tmp_path / "none.toml")

    assert done.returncode == 78
    assert "No such file or directory" in done.stderr


@pytest.mark.parametrize("secret", ["client-keys", "fleet-token"])
def test_secret_that_others_can_read_ends_with_78(fleet: Fleet, secret: str) -> None:
    path = fleet.directory / secret
    path.chmod(0o644)

    done = rbee_queen("--config", fleet.queen.config)

    assert done.returncode == 78
    assert f"{path} can be read by others (mode 0644), expected 0600" in done.stderr
    assert fleet.token not in done.stderr


@pytest.mark.parametrize(
    ("without", "said"), [("client_keys_file", "without client keys"), ("fleet_token_file", "without a fleet token")]
)
def test_network_address_without_keys_ends_with_78(fleet: Fleet, without: str, said: str) -> None:
    lines = fleet.queen.config.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(without)]
    fleet.queen.config.write_text("\n".join([*kept, 'host = "0.0.0.0"']), encoding="utf-8")

    done = rbee_queen("--config", fleet.queen.config)

    assert done.returncode == 78
    assert "refusing to listen on 0.0.0.0" in done.stderr
    assert said in done.stderr


def test_taken_port_ends_with_78_and_names_the_address(fleet: Fleet) -> None:
    fleet.start_queen()
    try:
        done = rbee_queen("--config", fleet.queen.config)
    finally:
        assert fleet.queen.stop() == 0

    assert done.returncode == 78
    assert f"127.0.0.1:{fleet.queen.port}" in done.stderr


def test_loopback_without_keys_is_open(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, Path("unused"))
    fleet.queen.config.write_text(f"port = {fleet.queen.port}\n", encoding="utf-8")
    fleet.start_queen()
    try:
        answer = httpx.get(f"{fleet.queen.url}/v1/workers", trust_env=False)
    finally:
        assert fleet.queen.stop() == 0

    assert (answer.status_code, answer.json()) == (200, {"workers": []})


def test_secrets_stay_out_of_log_and_command_line(fleet: Fleet) -> None:
    fleet.start_queen()
    try:
        command = Path(f"/proc/{fleet.queen.pid}/cmdline").read_bytes()
        with fleet.client() as client:
            assert client.get("/v1/status").status_code == 200
        refused = httpx.get(f"{fleet.queen.url}/v1/status", headers={"Authorization": "Bearer not-the-key"}, trust_env=False)
    finally:
        assert fleet.queen.stop() == 0

    assert refused.status_code == 401
    assert all(secret not in fleet.queen.log for secret in (fleet.key, fleet.token, "not-the-key"))
    assert fleet.key.encode() not in command
    assert fleet.token.encode() not in command


def test_keys_and_token_change_on_sighup_and_what_can_not_be_taken_changes_nothing(fleet: Fleet) -> None:
    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{fleet.queen.url}/v1/workers", headers=headers, trust_env=False).status_code

    def beat(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.post(f"{fleet.queen.url}/v1/worker-heartbeat", json={}, headers=headers, trust_env=False).status_code

    keys, new = fleet.directory / "client-keys", "another-key"
    fleet.start_queen()
    try:
        assert (status(fleet.key), status(new), beat(fleet.token)) == (200, 401, 400)
        keys.write_text("{", encoding="utf-8")
        fleet.queen.signal(signal.SIGHUP)
        wait_until(lambda: "secrets not reloaded" in fleet.queen.log, "the refusal in the log")
        assert status(fleet.key) == 200

        digest = hashlib.sha256(new.encode()).hexdigest()
        keys.write_text(json.dumps({"version": 1, "keys": [{"id": "k2", "name": "new", "sha256": digest}]}), encoding="utf-8")
        (fleet.directory / "fleet-token").write_text("another-token\n", encoding="utf-8")
        fleet.queen.signal(signal.SIGHUP)
        wait_until(lambda: status(new) == 200, "the new key opens")

        assert (status(fleet.key), beat(fleet.token), beat("another-token")) == (401, 401, 400)
    finally:
        assert fleet.queen.stop() == 0
