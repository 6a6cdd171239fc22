"""Settings of rbee-ctl: which inventory, which state folder, which queen, which key; each value knows its source.

File: ``$RBEE_CONFIG``, else ``./.lab/config.toml`` (a lab that is up), else ``~/.config/rbee/config.toml``, else
``/etc/rbee/config.toml``. ``RBEE_INVENTORY``, ``RBEE_STATE_DIR``, ``RBEE_QUEEN_URL`` and ``RBEE_API_KEY_FILE`` override
it, ``RBEE_QUEEN_CA_FILE`` names the certificates to trust for an https queen; what is about the queen comes from
``<state_dir>/client.toml``, written by ``site.yml``, where nothing names it. ``integrated`` (``RBEE_INTEGRATED``) is ``auto``
or ``off``: whether this machine is read in rbee-ctl's own process (``rbee_ctl.integrated``).
Relative paths count from the file that holds them.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rbee_serve.contract.errors import ConfigInvalid

KEYS = ("inventory", "state_dir", "queen_url", "queen_ca_file", "api_key_file", "integrated")
_PATHS = frozenset({"inventory", "state_dir", "queen_ca_file", "api_key_file"})
CLIENT_FILE = "client.toml"
#: Values of ``integrated``, the default first.
INTEGRATED = ("auto", "off")


@dataclass(frozen=True)
class Setting:
    """A value and where it came from: ``default``, ``environment RBEE_X`` or a file's path."""

    value: str | None
    source: str


@dataclass(frozen=True)
class Settings:
    """All settings; ``file`` is the configuration file in force."""

    file: Path | None
    inventory: Setting
    state_dir: Setting
    queen_url: Setting
    queen_ca_file: Setting
    api_key_file: Setting
    integrated: Setting

    @property
    def inventory_path(self) -> Path:
        """Return the inventory; raises ConfigInvalid when none is set or it is not there."""
        if self.inventory.value is None:
            raise ConfigInvalid(
                "no inventory is set: rbee-ctl does not know your machines",
                hint='write inventory = "/path/to/inventory.yml" into ~/.config/rbee/config.toml, or set RBEE_INVENTORY',
            )
        path = Path(self.inventory.value)
        if not path.exists():
            raise ConfigInvalid(f"inventory {path} does not exist (set by {self.inventory.source})", hint="rbee-ctl config show")
        return path

    @property
    def state_path(self) -> Path:
        """Return the folder for ``client.toml``, secrets and partial answers."""
        return Path(self.state_dir.value or "")

    @property
    def queen(self) -> str:
        """Return the queen's base URL without a trailing slash; raises ConfigInvalid when nothing names it."""
        if self.queen_url.value is None:
            raise ConfigInvalid(
                f"the queen's address is not known: no queen_url in the settings and no {self.state_path / CLIENT_FILE}",
                hint="deploy the fleet (ansible-playbook -i INVENTORY site.yml), or try rbee here: rbee-ctl serve",
            )
        if not self.queen_url.value.startswith(("http://", "https://")):
            raise ConfigInvalid(
                f"queen_url: http:// or https:// expected, got {self.queen_url.value!r} (set by {self.queen_url.source})",
                hint="rbee-ctl config show",
            )
        return self.queen_url.value.rstrip("/")

    def api_key(self) -> str | None:
        """Return the client key, or None when none is set; raises ConfigInvalid when its file can not be read."""
        if self.api_key_file.value is None:
            return None
        try:
            return Path(self.api_key_file.value).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "not a text file"
            raise ConfigInvalid(
                f"cannot read the API key {self.api_key_file.value}: {reason} (set by {self.api_key_file.source})",
                hint="rbee-ctl config show",
            ) from e


def candidates(environ: Mapping[str, str]) -> list[Path]:
    """Return the places of the configuration file, first wins."""
    if given := environ.get("RBEE_CONFIG"):
        return [Path(given).expanduser()]
    home = Path(environ.get("HOME") or Path.home())
    return [Path(".lab/config.toml"), home / ".config/rbee/config.toml", Path("/etc/rbee/config.toml")]


def _read(path: Path, allowed: tuple[str, ...]) -> dict[str, str]:
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigInvalid(
            f"cannot read settings file {path}: {e.strerror}", hint="check $RBEE_CONFIG and the file's mode"
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigInvalid(f"{path} is not valid TOML: {e}", hint=f"correct {path}") from e
    for key, value in values.items():
        if key not in allowed:
            raise ConfigInvalid(f"{path}: unknown key {key!r}; known: {', '.join(allowed)}", hint=f"correct {path}", key=key)
        if not isinstance(value, str) or not value:
            raise ConfigInvalid(f"{path}: {key}: text expected, got {value!r}", hint=f"correct {path}", key=key)
    base = path.resolve().parent
    return {k: str(base / Path(v).expanduser()) if k in _PATHS else v for k, v in values.items()}


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Resolve all settings; raises ConfigInvalid for a file that can not be read or has an unknown key."""
    places = candidates(environ)
    file = next((p for p in places if p.is_file()), places[0] if environ.get("RBEE_CONFIG") else None)
    found: dict[str, Setting] = {}
    if file is not None:
        file = file.absolute()
        found = {key: Setting(value, str(file)) for key, value in _read(file, KEYS).items()}
    for key in KEYS:
        name = f"RBEE_{key.upper()}"
        if value := environ.get(name):
            found[key] = Setting(str(Path(value).expanduser().absolute()) if key in _PATHS else value, f"environment {name}")
    if "state_dir" not in found:
        home = Path(environ.get("HOME") or Path.home())
        found["state_dir"] = Setting(str(home / ".local/state/rbee"), "default")
    client = Path(found["state_dir"].value or "") / CLIENT_FILE
    if client.is_file():
        for key, value in _read(client, ("queen_url", "queen_ca_file", "api_key_file")).items():
            found.setdefault(key, Setting(value, str(client)))
    mode = found.setdefault("integrated", Setting(INTEGRATED[0], "default"))
    if mode.value not in INTEGRATED:
        raise ConfigInvalid(
            f"integrated: {' or '.join(INTEGRATED)} expected, got {mode.value!r} (set by {mode.source})",
            hint="rbee-ctl config show",
            key="integrated",
        )
    unset = Setting(None, "not set")
    return Settings(file, **{key: found.get(key, unset) for key in KEYS})
