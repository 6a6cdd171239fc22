"""Settings of rbee-ctl: precedence, sources, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee_ctl import config
from rbee_serve.contract.errors import ConfigInvalid


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_precedence_named_then_lab_then_user(home: Path) -> None:
    user = write(home / ".config/rbee/config.toml", 'queen_url = "http://user:1"\n')
    assert config.load({"HOME": str(home)}).queen_url == config.Setting("http://user:1", str(user))
    lab = write(home / "work/.lab/config.toml", 'queen_url = "http://lab:1"\n')
    assert config.load({"HOME": str(home)}).queen_url == config.Setting("http://lab:1", str(lab))
    named = write(home / "named.toml", 'queen_url = "http://named:1"\n')
    assert config.load({"HOME": str(home), "RBEE_CONFIG": str(named)}).queen_url == config.Setting("http://named:1", str(named))
    over = config.load({"HOME": str(home), "RBEE_CONFIG": str(named), "RBEE_QUEEN_URL": "http://env:1/"})
    assert over.queen_url == config.Setting("http://env:1/", "environment RBEE_QUEEN_URL")
    assert over.queen == "http://env:1"


def test_client_file_of_the_state_folder_fills_what_nobody_set(home: Path) -> None:
    write(home / "work/.lab/config.toml", 'state_dir = "state"\n')
    client = write(home / "work/.lab/state/client.toml", 'queen_url = "http://lab1:8080"\napi_key_file = "secrets/client-key"\n')
    write(home / "work/.lab/state/secrets/client-key", "secret\n")
    found = config.load({"HOME": str(home)})
    assert found.queen_url == config.Setting("http://lab1:8080", str(client))
    assert found.api_key() == "secret"
    assert found.state_path == home / "work/.lab/state"


def test_defaults(home: Path) -> None:
    found = config.load({"HOME": str(home)})
    assert found.file is None
    assert found.state_dir == config.Setting(str(home / ".local/state/rbee"), "default")
    assert found.api_key() is None
    with pytest.raises(ConfigInvalid, match="queen's address is not known"):
        _ = found.queen
    with pytest.raises(ConfigInvalid, match="no inventory is set"):
        _ = found.inventory_path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('inventroy = "x"\n', "unknown key 'inventroy'; known: inventory, state_dir"),
        ("queen_url = 7\n", "queen_url: text expected, got 7"),
        ("queen_url = \n", "not valid TOML"),
    ],
)
def test_mistake_in_the_file_is_named(home: Path, text: str, says: str) -> None:
    path = write(home / "c.toml", text)
    with pytest.raises(ConfigInvalid, match=says) as caught:
        config.load({"HOME": str(home), "RBEE_CONFIG": str(path)})
    assert str(path) in caught.value.message


def test_named_file_that_is_missing_is_an_error(home: Path) -> None:
    with pytest.raises(ConfigInvalid, match="cannot read settings file"):
        config.load({"HOME": str(home), "RBEE_CONFIG": str(home / "nowhere.toml")})


def test_queen_url_without_scheme_is_refused(home: Path) -> None:
    with pytest.raises(ConfigInvalid, match="http:// or https:// expected, got 'lab1:8080'"):
        _ = config.load({"HOME": str(home), "RBEE_QUEEN_URL": "lab1:8080"}).queen


def test_key_file_that_can_not_be_read_names_its_source(home: Path) -> None:
    with pytest.raises(ConfigInvalid, match="environment RBEE_API_KEY_FILE"):
        config.load({"HOME": str(home), "RBEE_API_KEY_FILE": str(home / "none")}).api_key()
