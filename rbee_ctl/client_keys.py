"""The clients' keys of a fleet, as the controller keeps them: digests and limits in ``secrets/client-keys.json``.

The first key (``secrets/client-key``, made by site.yml, used by rbee-ctl itself) stands in its own file and is not in the
list. A key is shown once, when it is made; nothing can show it again.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from rbee_serve.contract.errors import ConfigInvalid, InvalidRequest
from rbee_serve.contract.keys import KEY_NAME_PATTERN, ClientKey, ClientKeyFile

FIRST = "first"
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def expiry(text: str, now: datetime.datetime) -> float:
    """Return the moment (seconds since the epoch) that ``30d``, ``12h``, ``2w`` or an ISO date names; InvalidRequest else."""
    if match := re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text):
        return (now + datetime.timedelta(**{_UNITS[match[2]]: int(match[1])})).timestamp()
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(
            f"--expires: 30d, 12h, 2w or a date such as 2027-01-31 expected, got {text!r}", field="expires"
        ) from None
    if moment.tzinfo is None:
        moment = moment.astimezone()
    if moment <= now:
        raise InvalidRequest(f"--expires: {text} is in the past", field="expires")
    return moment.timestamp()


class KeyList:
    """The list in one state folder. Changes are atomic and made under a lock: two operators lose nothing."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "secrets"
        self._path = self._folder / "client-keys.json"

    def all(self) -> list[ClientKey]:
        """Return the first key, if there is one, and the list."""
        return [*self._first(), *self._read().keys]

    def create(
        self,
        name: str,
        *,
        admin: bool = False,
        models: list[str] | None,
        expires_at: float | None,
        requests_per_minute: int | None,
        concurrent_requests: int | None,
        now: datetime.datetime,
    ) -> tuple[str, ClientKey]:
        """Add a key and return it with its record; raises InvalidRequest for a bad or taken name."""
        if not re.fullmatch(KEY_NAME_PATTERN, name):
            raise InvalidRequest(
                f"a key's name is 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit, got {name!r}", field="name"
            )
        secret = f"rbee-{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(secret.encode()).hexdigest()
        with self._changing() as file:
            if name == FIRST or any(k.name == name for k in file.keys):
                raise InvalidRequest(
                    f"a key named {name!r} exists already", hint=f"another name, or: rbee-ctl key revoke {name}", field="name"
                )
            key = ClientKey(
                id=digest[:12],
                name=name,
                sha256=digest,
                admin=admin,
                created_at=now.isoformat(timespec="seconds"),
                expires_at=expires_at,
                models=models,
                requests_per_minute=requests_per_minute,
                concurrent_requests=concurrent_requests,
            )
            file.keys.append(key)
        return secret, key

    def revoke(self, name_or_id: str) -> ClientKey:
        """Remove a key by name or id and return it; raises InvalidRequest naming the known ones."""
        with self._changing() as file:
            for key in file.keys:
                if name_or_id in (key.name, key.id):
                    file.keys.remove(key)
                    return key
            if any(name_or_id in (k.name, k.id) for k in self._first()):
                raise InvalidRequest(
                    "the first key is what rbee-ctl itself uses: it can be replaced, not revoked", hint="rbee-ctl key rotate"
                )
            known = ", ".join(k.name for k in file.keys) or "none"
            raise InvalidRequest(f"no key {name_or_id!r}; known: {known}", hint="rbee-ctl key list", field="name")

    def ensure_first(self) -> bool:
        """Make the first key unless there is one, as site.yml does; says whether it was made."""
        path = self._folder / "client-key"
        with self._locked():
            if path.is_file():
                return False
            _write_private(path, f"rbee-{secrets.token_urlsafe(32)}\n")
        return True

    def for_a_queen_here(self) -> Path:
        """Write all keys as a queen on this machine reads them (``client_keys_file``) and return the file."""
        path = self._folder / "queen-keys"
        with self._locked():  # from the reading on: of two at once the last to write has seen both keys
            text = ClientKeyFile(version=1, keys=self.all()).model_dump_json(indent=2, exclude_none=True) + "\n"
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                _write_private(path, text)
        return path

    def fleet_token(self) -> Path:
        """Make the fleet token unless there is one, as site.yml does, and return its file."""
        path = self._folder / "fleet-token"
        with self._locked():
            if not path.is_file():
                _write_private(path, f"{secrets.token_urlsafe(32)}\n")
        return path

    def rotate(self) -> None:
        """Replace the first key, the one that rbee-ctl uses; raises ConfigInvalid when there is none yet."""
        path = self._folder / "client-key"
        if not path.is_file():
            raise ConfigInvalid(f"there is no {path} to replace", hint="ansible-playbook -i INVENTORY site.yml makes it")
        with self._locked():
            _write_private(path, f"rbee-{secrets.token_urlsafe(32)}\n")

    def _first(self) -> list[ClientKey]:
        try:
            secret = (self._folder / "client-key").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return []
        except OSError as e:
            raise ConfigInvalid(f"cannot read {self._folder / 'client-key'}: {e.strerror}") from e
        digest = hashlib.sha256(secret.encode()).hexdigest()
        return [ClientKey(id=digest[:12], name=FIRST, sha256=digest, admin=True, created_at="site.yml")]

    def _read(self) -> ClientKeyFile:
        try:
            return ClientKeyFile.model_validate_json(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return ClientKeyFile(version=1, keys=[])
        except OSError as e:
            raise ConfigInvalid(f"cannot read {self._path}: {e.strerror}") from e
        except ValidationError as e:
            raise ConfigInvalid(
                f"{self._path} is no list of client keys: {e.errors()[0]['msg']}", hint=f"correct or remove {self._path}"
            ) from e

    @contextmanager
    def _changing(self) -> Iterator[ClientKeyFile]:
        """Give the list under the lock and write what became of it; nothing is written when the block raises."""
        with self._locked():
            file = self._read()
            yield file
            _write_private(self._path, json.dumps(file.model_dump(mode="json", exclude_none=True), indent=2) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._folder / "client-keys.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ConfigInvalid(f"cannot write in {self._folder}: {e.strerror}", hint="rbee-ctl config show") from e
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _write_private(path: Path, text: str) -> None:
    """Replace ``path`` by a file of mode 0600, whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
