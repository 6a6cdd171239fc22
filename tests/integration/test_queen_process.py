"""The queen as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import json
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fleet import Fleet, events_of, wait_until

from rbee_ctl import audit

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


@pytest.mark.E21
@pytest.mark.parametrize("secret", ["client-keys", "fleet-token"])
def test_secret_that_others_can_read_ends_with_78(fleet: Fleet, secret: str) -> None:
    path = fleet.directory / secret
    path.chmod(0o644)

    done = rbee_queen("--config", fleet.queen.config)

    assert done.returncode == 78
    assert f"{path} can be read by others (mode 0644), expected 0600" in done.stderr
    assert fleet.token not in done.stderr


@pytest.mark.E19
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


@pytest.mark.E19
def test_loopback_without_keys_is_open(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, Path("unused"))
    fleet.queen.config.write_text(f"port = {fleet.queen.port}\n", encoding="utf-8")
    fleet.start_queen()
    try:
        answer = httpx.get(f"{fleet.queen.url}/v1/workers", timeout=60, trust_env=False)
    finally:
        assert fleet.queen.stop() == 0

    assert (answer.status_code, answer.json()) == (200, {"workers": []})


@pytest.mark.E24
def test_secrets_stay_out_of_log_and_command_line(fleet: Fleet) -> None:
    fleet.start_queen()
    try:
        command = Path(f"/proc/{fleet.queen.pid}/cmdline").read_bytes()
        with fleet.client() as client:
            assert client.get("/v1/status").status_code == 200
        refused = httpx.get(
            f"{fleet.queen.url}/v1/status", headers={"Authorization": "Bearer not-the-key"}, timeout=60, trust_env=False
        )
    finally:
        assert fleet.queen.stop() == 0

    assert refused.status_code == 401
    assert all(secret not in fleet.queen.log for secret in (fleet.key, fleet.token, "not-the-key"))
    assert fleet.key.encode() not in command
    assert fleet.token.encode() not in command


@pytest.mark.E23
def test_keys_and_token_change_on_sighup_and_what_can_not_be_taken_changes_nothing(fleet: Fleet) -> None:
    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{fleet.queen.url}/v1/workers", headers=headers, timeout=60, trust_env=False).status_code

    def beat(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.post(
            f"{fleet.queen.url}/v1/worker-heartbeat", json={}, headers=headers, timeout=60, trust_env=False
        ).status_code

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


def certificate(directory: Path) -> tuple[Path, Path]:
    """Write a certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rbee")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain, private = directory / "tls.pem", directory / "tls.key"
    chain.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.touch(0o600)
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, private


def test_with_a_certificate_the_queen_speaks_https_alone_and_workers_find_it(tmp_path: Path, model_path: Path) -> None:
    chain, private = certificate(tmp_path)
    fleet = Fleet(tmp_path, model_path, queen_settings={"tls_cert_file": str(chain), "tls_key_file": str(private)})
    url = fleet.queen.url.replace("http:", "https:")
    trusted = ssl.create_default_context(cafile=str(chain))
    fleet.queen.start()
    try:
        with httpx.Client(verify=trusted, timeout=60, trust_env=False) as client:

            def answers() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return client.get(f"{url}/health").status_code == 200
                return False

            wait_until(answers, f"https answers\n{fleet.queen.log}")
            assert client.get(f"{url}/v1/workers").status_code == 401
            fleet.add_worker("lab1", queen_url=url, queen_ca_file=str(chain))
            headers = {"Authorization": f"Bearer {fleet.key}"}
            wait_until(lambda: client.get(f"{url}/v1/workers", headers=headers).json()["workers"], "the worker beats by https")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{fleet.queen.url}/health", timeout=60, trust_env=False)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health", timeout=60, trust_env=False)
    finally:
        for worker in fleet.workers.values():
            worker.kill()
        assert fleet.queen.stop() == 0


@pytest.mark.parametrize(("lines", "said"), [(1, "tls_key_file is not set"), (2, "cannot use the TLS certificate")])
def test_a_certificate_that_can_not_be_used_ends_with_78(fleet: Fleet, lines: int, said: str) -> None:
    junk = fleet.directory / "junk.pem"
    junk.write_text("no certificate", encoding="utf-8")
    junk.chmod(0o600)
    append(fleet, "\n".join([f'tls_cert_file = "{junk}"', f'tls_key_file = "{junk}"'][:lines]))

    done = rbee_queen("--config", fleet.queen.config)

    assert done.returncode == 78
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_head_without_end_is_cut_off_in_size_and_in_time(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, Path("unused"), queen_settings={"headers_max_bytes": 2048, "receive_timeout_s": 2.0})
    fleet.start_queen()
    try:
        with socket.create_connection(("127.0.0.1", fleet.queen.port), timeout=60) as large:
            large.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: ")
            with contextlib.suppress(ConnectionError):
                for _ in range(64):
                    large.sendall(b"x" * 1024)
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = large.recv(4096)
        with socket.create_connection(("127.0.0.1", fleet.queen.port), timeout=60) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\n")
            assert slow.recv(4096) == b"", "the connection is closed"
        with fleet.client() as client:
            assert [client.get("/health").status_code for _ in range(3)] == [200] * 3
    finally:
        assert fleet.queen.stop() == 0

    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


def test_shutdown_over_http_ends_workers_and_queen_in_good_order(tmp_path: Path, model_path: Path) -> None:
    settings = {"audit_file": str(tmp_path / "audit.jsonl"), "drain_timeout_s": 60.0}
    fleet = Fleet(tmp_path, model_path, queen_settings=settings)
    fleet.start_queen()
    try:
        for hive in ("lab1", "lab2"):
            fleet.add_worker(hive)
        fleet.wait_ready()
        fleet.workers["lab2-cpu0"].kill()
        request = {"prompt": "Once", "max_tokens": 40, "node": "lab1"}
        with fleet.client() as client, client.stream("POST", "/v1/inference", json=request) as running:
            events = events_of(running)
            assert next(events)["type"] == "started"
            answer = client.post("/v1/shutdown")
            rest = list(events)
        ends = [s.process.wait(100) for s in (fleet.workers["lab1-cpu0"], fleet.queen) if s.process is not None]
    finally:
        fleet.close()

    assert (answer.status_code, answer.json()["workers"]) == (202, {"lab1-cpu0": "told", "lab2-cpu0": "not reached"})
    assert rest[-1]["type"] == "end", "what was running is answered to its end"
    assert ends == [0, 0]
    assert '"event":"queen.shutdown"' in (tmp_path / "audit.jsonl").read_text(encoding="utf-8").replace(": ", ":")


@pytest.mark.E30
def test_the_audit_log_tells_who_asked_and_holds_no_secret_and_no_prompt(tmp_path: Path, model_path: Path) -> None:
    fleet = Fleet(tmp_path, model_path, queen_settings={"audit_file": str(tmp_path / "audit.jsonl")})
    fleet.start_queen()
    try:
        fleet.add_worker("lab1")
        with fleet.client() as client:
            wait_until(lambda: client.get("/v1/workers", params={"state": "idle"}).json()["workers"], "the worker is idle")
            body = {"prompt": "a very private prompt", "max_tokens": 3, "stream": False}
            assert client.post("/v1/inference", json=body).status_code == 200
        httpx.get(f"{fleet.queen.url}/v1/status", headers={"Authorization": "Bearer not-the-key"}, timeout=60, trust_env=False)
    finally:
        for worker in fleet.workers.values():
            worker.kill()
        assert fleet.queen.stop() == 0

    text = (tmp_path / "audit.jsonl").read_text(encoding="utf-8")
    events = {e["event"]: e for e in map(json.loads, text.splitlines())}
    assert events.keys() >= {
        "queen.start",
        "worker.registered",
        "inference.start",
        "inference.assign",
        "inference.end",
        "auth.refused",
        "queen.stop",
    }
    assert (events["inference.assign"]["worker"], events["inference.assign"]["tokens_so_far"]) == ("lab1-cpu0", 0)
    end = events["inference.end"]
    assert (end["key"], end["worker"], end["outcome"], end["tokens_out"]) == ("test", "lab1-cpu0", "MAX_TOKENS", 3)
    assert all(secret not in text for secret in (fleet.key, fleet.token, "not-the-key", "private prompt"))
    assert audit.verify([tmp_path / "audit.jsonl"]) == len(text.splitlines())
