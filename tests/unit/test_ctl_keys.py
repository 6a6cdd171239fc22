"""The controller's list of client keys: nothing lost between two operators, nothing shown twice, clear refusals."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import io
import multiprocessing
import os
from pathlib import Path

import pytest

from rbee_ctl import cli, client_keys
from rbee_ctl.client_keys import KeyList, expiry
from rbee_ctl.render import Ui
from rbee_serve.common.credentials import ClientKeys
from rbee_serve.contract.errors import ConfigInvalid, InvalidRequest

NOW = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)
FREE = {"models": None, "expires_at": None, "requests_per_minute": None, "concurrent_requests": None}


def create(state: Path, name: str) -> str:
    return KeyList(state).create(name, **FREE, now=NOW)[0]  # type: ignore[arg-type]


def test_a_new_key_is_stored_as_digest_alone_and_the_queen_finds_it(tmp_path: Path) -> None:
    secret = create(tmp_path, "laptop")
    path = tmp_path / "secrets/client-keys.json"

    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    found = ClientKeys.load(path, {}).find(secret)
    assert found is not None
    assert (found.name, found.created_at) == ("laptop", "2026-11-21T12:00:00+00:00")


def test_the_first_key_is_listed_but_can_only_be_rotated(tmp_path: Path) -> None:
    keys = KeyList(tmp_path)
    with pytest.raises(ConfigInvalid, match="client-key to replace"):
        keys.rotate()
    (tmp_path / "secrets").mkdir(exist_ok=True)
    (tmp_path / "secrets/client-key").write_text("rbee-one\n")

    (first,) = keys.all()
    assert (first.name, first.sha256) == ("first", hashlib.sha256(b"rbee-one").hexdigest())
    with pytest.raises(InvalidRequest, match="replaced, not revoked"):
        keys.revoke("first")
    with pytest.raises(InvalidRequest, match="exists already"):
        create(tmp_path, "first")
    keys.rotate()

    assert (tmp_path / "secrets/client-key").read_text() != "rbee-one\n"
    assert keys.all()[0].sha256 != first.sha256


@pytest.mark.parametrize("by", ["name", "id"])
def test_revoked_by_name_or_id(tmp_path: Path, by: str) -> None:
    create(tmp_path, "laptop")
    create(tmp_path, "phone")
    keys = KeyList(tmp_path)
    wanted = keys.all()[0]

    assert keys.revoke(str(getattr(wanted, by))) == wanted
    assert [k.name for k in keys.all()] == ["phone"]
    with pytest.raises(InvalidRequest, match="known: phone"):
        keys.revoke("laptop")


@pytest.mark.parametrize("name", ["", "a b", "-x", "a/b", "x" * 65, "ä", "a\nb"])
def test_bad_names_are_refused_and_change_nothing(tmp_path: Path, name: str) -> None:
    create(tmp_path, "laptop")
    before = (tmp_path / "secrets/client-keys.json").read_bytes()

    with pytest.raises(InvalidRequest, match="name"):
        create(tmp_path, name)

    assert (tmp_path / "secrets/client-keys.json").read_bytes() == before


def test_a_key_without_a_fleet_is_shown_and_brought_to_the_user_s_own_queen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in os.environ if n.startswith("RBEE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RBEE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    out, err = io.StringIO(), io.StringIO()
    ui = Ui(out, err)
    result = cli.run(["key", "create", "laptop"], ui)
    ui.finish(result)
    assert (result.exit_code, result.data["delivered"]) == (0, False)
    assert result.data["key"]["secret"] in out.getvalue()
    assert "systemctl --user reload rbee-queen" in err.getvalue()
    assert ClientKeys.load(tmp_path / "state/secrets/queen-keys", {}).find(result.data["key"]["secret"]) is not None

    # Taken away without anybody to tell: the queen that has it would go on taking it, so that is no success.
    done = cli.run(["key", "revoke", "laptop", "--yes"], ui)
    assert (done.exit_code, done.data["delivered"]) == (1, False)
    assert "key deliver" in str(done.errors[0].hint)
    unit = tmp_path / ".config/systemd/user/rbee-queen.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    assert cli.run(["key", "deliver"], ui).exit_code == 0


def test_five_operators_at_once_lose_no_key(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("spawn").Process(target=create, args=(tmp_path, f"k{i}")) for i in range(5)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()

    assert [p.exitcode for p in processes] == [0] * 5
    assert sorted(k.name for k in KeyList(tmp_path).all()) == [f"k{i}" for i in range(5)]


def test_a_queen_here_gets_the_keys_of_two_that_are_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the reading and the writing of one list nobody can change the other."""
    create(tmp_path, "laptop")
    write, held = client_keys._write_private, []

    def written(path: Path, text: str) -> None:
        with (tmp_path / "secrets/client-keys.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(path.name)
        write(path, text)

    monkeypatch.setattr(client_keys, "_write_private", written)
    KeyList(tmp_path).for_a_queen_here()
    assert held == ["queen-keys"]


def test_a_broken_list_is_named_and_kept(tmp_path: Path) -> None:
    create(tmp_path, "laptop")
    path = tmp_path / "secrets/client-keys.json"
    path.write_text("{")

    with pytest.raises(ConfigInvalid, match=str(path)):
        create(tmp_path, "phone")

    assert path.read_text() == "{"


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("12h", 43_200),
        ("30d", 2_592_000),
        ("2w", 1_209_600),
        ("2026-11-22T12:00:00+00:00", 86_400),
        ("2026-11-21T14:00+01:00", 3600),
    ],
)
def test_expiry(text: str, after: int) -> None:
    assert expiry(text, NOW) == NOW.timestamp() + after


@pytest.mark.parametrize("text", ["", "0d", "5", "d", "soon", "2026-13-01", "2020-01-01", "99999999d", "-3d", "1.5d"])
def test_what_is_no_expiry(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--expires"):
        expiry(text, NOW)
