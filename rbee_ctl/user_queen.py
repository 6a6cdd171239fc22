"""A queen on the account of the user who runs rbee-ctl: settings, keys and a unit of the user's, by `rbee-ctl install`.

What is there already and was not written by us stays as it is. The keys' list is written anew each time: `rbee-ctl install`
after `rbee-ctl key create` brings a new key to it.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from rbee_ctl.client_keys import KeyList
from rbee_ctl.config import CLIENT_FILE

PORT = 8080
_UNIT = """\
# The queen on this user's account, written by `rbee-ctl install`.
[Unit]
Description=rbee queen of this user
After=network-online.target

[Service]
Type=notify
FileDescriptorStoreMax=1
ExecStart={program} --config {settings}
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartPreventExitStatus=78

[Install]
WantedBy=default.target
"""
_SETTINGS = """\
# The queen of this user, written by `rbee-ctl install`; docs/settings.md lists the keys.
host = "127.0.0.1"
port = {port}
state_dir = {state}
client_keys_file = {keys}
fleet_token_file = {token}
# Fleet jobs over HTTP run this program, with the inventory that it finds (rbee-ctl config show).
ctl_command = {ctl}
"""
#: What an earlier version wrote: a queen without keys that runs no jobs.
_BARE = '# The queen of this user; docs/settings.md lists the keys.\nhost = "127.0.0.1"\n'
_PROGRAM = re.compile(r"(?m)^ExecStart=.*$")


def unit_path(home: Path) -> Path:
    """Return where the user's unit is."""
    return home / ".config/systemd/user/rbee-queen.service"


def set_up(home: Path, bin_dir: Path, state_dir: Path) -> list[str]:
    """Write what is missing and return what that was, for a person; [] the second time."""
    settings, keys = home / ".config/rbee/queen.toml", KeyList(state_dir)
    done = ["the first client key: made"] if keys.ensure_first() else []
    values = {
        "state": state_dir / "queen",
        "keys": keys.for_a_queen_here(),
        "token": keys.fleet_token(),
        "ctl": shlex.quote(str(bin_dir / "rbee-ctl")),
    }
    if not settings.is_file() or settings.read_text(encoding="utf-8") == _BARE:
        (state_dir / "queen").mkdir(mode=0o700, exist_ok=True)
        text = _SETTINGS.format(port=PORT, **{k: json.dumps(str(v)) for k, v in values.items()})
        done += _write(settings, text, "settings of the queen")
    unit = _UNIT.format(program=bin_dir / "rbee-queen", settings=settings)
    if _is_ours_and_old(unit_path(home), unit):
        done += _write(unit_path(home), unit, "a unit of this user")
    client = state_dir / CLIENT_FILE
    if not client.is_file():
        text = f'queen_url = "http://127.0.0.1:{PORT}"\napi_key_file = {json.dumps(str(state_dir / "secrets/client-key"))}\n'
        done += _write(
            client, f"# Written by `rbee-ctl install`: the queen of this user. site.yml replaces it.\n{text}", "names it"
        )
        client.chmod(0o600)
    return done


def _is_ours_and_old(path: Path, unit: str) -> bool:
    """Say whether the unit is missing, or was written for another installation and is otherwise as we write it."""
    if not path.is_file():
        return True
    there = path.read_text(encoding="utf-8")
    return there != unit and _PROGRAM.sub("", there) == _PROGRAM.sub("", unit)


def _write(path: Path, text: str, what: str) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return [f"{path}: {what}"]
