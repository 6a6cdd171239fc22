"""Hosts of an OpenSSH client configuration, as inventory variables (OP-24)."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rbee_serve.contract.errors import ConfigInvalid

_TAKEN = {
    "hostname": "ansible_host",
    "port": "ansible_port",
    "user": "ansible_user",
    "identityfile": "ansible_ssh_private_key_file",
}


def hosts(path: Path) -> dict[str, dict[str, Any]]:
    """Return {name: variables}; patterns are skipped, the first value of an option wins as in ssh. Raises ConfigInvalid."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise ConfigInvalid(f"cannot read {path}: {reason}", hint="rbee-ctl hive import-ssh --ssh-config FILE") from e
    found: dict[str, dict[str, Any]] = {}
    current: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line.replace("=", " ", 1), comments=True)
        except ValueError as e:
            raise ConfigInvalid(f"{path}, line {number}: {e}", hint=f"correct {path}") from e
        if not words:
            continue
        keyword = words[0].lower()
        if keyword == "host":
            current = [w for w in words[1:] if not any(c in w for c in "*?!")]
            for name in current:
                found.setdefault(name, {})
        elif keyword == "match":
            current = []
        elif keyword in _TAKEN and len(words) > 1:
            value: Any = words[1]
            if keyword == "port":
                if not value.isdigit():
                    raise ConfigInvalid(f"{path}, line {number}: port {value!r} is no number", hint=f"correct {path}")
                value = int(value)
            for name in current:
                found[name].setdefault(_TAKEN[keyword], value)
    return found
