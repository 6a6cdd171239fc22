"""Secrets: what is taken, what is refused, and that messages name the file and never its content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rbee_serve.common.credentials import ClientKeys, fingerprint, is_loopback, load_secret, require_auth_for_bind, same
from rbee_serve.contract.errors import ConfigInvalid

SECRET = "tops3cret-value"


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [SECRET, SECRET + "\n", SECRET + "\r\n"])
def test_secret_is_one_line_without_its_end(tmp_path: Path, content: str) -> None:
    assert load_secret(write(tmp_path / "t", content.encode()), "fleet-token", {}) == SECRET


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_private_modes_are_taken(tmp_path: Path, mode: int) -> None:
    assert load_secret(write(tmp_path / "t", SECRET.encode(), mode), "fleet-token", {}) == SECRET


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601, 0o666])
def test_secret_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "t", SECRET.encode(), mode)

    with pytest.raises(ConfigInvalid) as e:
        load_secret(path, "fleet-token", {})

    assert str(path) in e.value.message
    assert f"{mode:04o}" in e.value.message
    assert e.value.hint == f"chmod 600 {path}"
    assert SECRET not in e.value.message


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"  \n", b"\t", b"one\ntwo\n", b"one\n\n", b" padded\n", b"padded \n", b"\xff\xfe", b"a\x0cb"]
)
def test_secret_of_another_form_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "t", content)

    with pytest.raises(ConfigInvalid, match=str(path)):
        load_secret(path, "fleet-token", {})


def test_missing_secret_file_is_refused_and_none_asked_for_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=f"{tmp_path}/nowhere: No such file"):
        load_secret(tmp_path / "nowhere", "fleet-token", {})
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigInvalid, match="Is a directory"):
        load_secret(tmp_path, "fleet-token", {})
    assert load_secret(None, "fleet-token", {}) is None
    assert load_secret(None, "fleet-token", {"CREDENTIALS_DIRECTORY": str(tmp_path)}) is None


def test_credential_of_systemd_is_taken_with_the_mode_it_has(tmp_path: Path) -> None:
    write(tmp_path / "fleet-token", SECRET.encode() + b"\n", 0o440)

    assert load_secret(None, "fleet-token", {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == SECRET


def test_client_key_is_found_by_its_digest(tmp_path: Path) -> None:
    keys = [
        {"id": f"k{i}", "name": f"n{i}", "sha256": hashlib.sha256(f"key-{i}".encode()).hexdigest(), "created_at": "2026-01-01"}
        for i in range(3)
    ]
    loaded = ClientKeys.load(write(tmp_path / "k", json.dumps({"version": 1, "keys": keys}).encode()), {})

    found = loaded.find("key-1")
    assert found is not None
    assert (found.id, found.name) == ("k1", "n1")
    assert loaded.find("key-9") is None
    assert loaded.find(found.sha256) is None, "the stored digest must not work as a key"
    assert len(loaded) == 3


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "keys": []}',
        '{"version": 1}',
        '{"version": 1, "keys": [{"id": "a", "name": "b"}]}',
        '{"version": 1, "keys": [{"id": "a", "name": "b", "sha256": "abc"}]}',
        '{"version": 1, "keys": 5}',
    ],
)
def test_broken_key_file_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "k", content.encode())

    with pytest.raises(ConfigInvalid, match=str(path)):
        ClientKeys.load(path, {})


def test_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="0644"):
        ClientKeys.load(write(tmp_path / "k", b'{"version": 1, "keys": []}', 0o644), {})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(h, False) for h in ("0.0.0.0", "::", "10.0.0.1", "192.168.1.2", "example.org", "")],  # noqa: S104
)
def test_only_loopback_may_be_open(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    require_auth_for_bind(host, True, "a key")
    if loopback:
        require_auth_for_bind(host, False, "a key")
    else:
        with pytest.raises(ConfigInvalid, match="refusing to listen"):
            require_auth_for_bind(host, False, "a key")


def test_fingerprint_and_comparison() -> None:
    assert fingerprint("abc") == hashlib.sha256(b"abc").hexdigest()[:6]
    assert same("abc", "abc")
    assert not same("abc", "abd")
    assert not same("", "abc")
