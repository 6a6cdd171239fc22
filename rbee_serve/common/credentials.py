"""Secrets of the services: where they come from, what is refused, how clients' keys are looked up."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from rbee_serve.contract.errors import ConfigInvalid
from rbee_serve.contract.keys import ClientKey, ClientKeyFile


def fingerprint(secret: str) -> str:
    """Return six hex digits by which a log may name a secret (SPEC E-24)."""
    return hashlib.sha256(secret.encode()).hexdigest()[:6]


def credential_path(path: Path | None, name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return ``path``, else the credential ``name`` that systemd delivers, else None."""
    if path is not None:
        return path
    directory = environ.get("CREDENTIALS_DIRECTORY")
    candidate = Path(directory, name) if directory else None
    return candidate if candidate is not None and candidate.exists() else None


def refreshed(name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the copy of a credential that a reload has laid into the runtime directory, None when there was no reload.

    systemd delivers credentials once, at the start. The units' ExecReload= therefore lays fresh copies there; a restart
    empties the directory.
    """
    directory = environ.get("RUNTIME_DIRECTORY")
    path = Path(directory, name) if directory else None
    return path if path is not None and path.is_file() else None


def check_private(path: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigInvalid unless nobody but its owner may read the file. systemd's credentials are private by their
    directory."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    delivered = bool(directory) and path.parent == Path(directory or "/")
    try:
        mode = path.stat().st_mode
    except OSError as e:
        raise ConfigInvalid(f"cannot read secret file {path}: {e.strerror}", path=str(path)) from e
    if not delivered and stat.S_IMODE(mode) & 0o077:
        raise ConfigInvalid(
            f"{path} can be read by others (mode {stat.S_IMODE(mode):04o}), expected 0600",
            hint=f"chmod 600 {path}",
            path=str(path),
        )


def _read_private(path: Path, environ: Mapping[str, str]) -> str:
    check_private(path, environ)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigInvalid(f"cannot read secret file {path}: {e.strerror}", path=str(path)) from e
    except UnicodeDecodeError as e:
        raise ConfigInvalid(f"secret file {path} is not text", path=str(path)) from e


def load_secret(path: Path | None, name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the one-line secret in ``path`` (or in systemd's credential ``name``), None when neither is given.

    Raises ConfigInvalid for a file that is missing, unreadable, readable by others, empty or of several lines.
    """
    found = credential_path(path, name, environ)
    if found is None:
        return None
    text = _read_private(found, environ).removesuffix("\n").removesuffix("\r")
    if not text.strip() or text != text.strip() or len(text.splitlines()) != 1:
        raise ConfigInvalid(f"secret file {found} must hold one line that is neither empty nor padded", path=str(found))
    return text


class ClientKeys:
    """Client keys by the SHA-256 of the key (contract.keys). ``reload`` replaces them while requests run."""

    def __init__(self, keys: Sequence[ClientKey], path: Path | None = None) -> None:
        self._keys, self._path = tuple(keys), path

    @classmethod
    def load(cls, path: Path, environ: Mapping[str, str] = os.environ) -> ClientKeys:
        """Read the file; raises ConfigInvalid naming it and what is wrong."""
        return cls(_read_keys(path, environ), path)

    def reload(
        self, path: Path | None = None, environ: Mapping[str, str] = os.environ, *, check: Callable[[int], None] = lambda _: None
    ) -> int:
        """Read the file (or ``path`` in its place) again and return the number of keys; ``check`` may refuse that number.

        Raises ConfigInvalid, and the keys stay as they were.
        """
        source = path or self._path
        if source is not None:
            keys = tuple(_read_keys(source, environ))
            check(len(keys))
            self._keys = keys
        return len(self._keys)

    def find(self, token: str) -> ClientKey | None:
        """Return whose key ``token`` is. All stored digests are compared, so the time tells nothing."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def __len__(self) -> int:
        return len(self._keys)


def _read_keys(path: Path, environ: Mapping[str, str]) -> list[ClientKey]:
    try:
        keys = ClientKeyFile.model_validate_json(_read_private(path, environ)).keys
    except ValidationError as e:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'file'}: {p['msg']}" for p in e.errors()[:3])
        raise ConfigInvalid(
            f'{path} is no list of client keys ({problems}), expected {{"version": 1, "keys": [...]}}',
            hint="ansible-playbook -i INVENTORY site.yml writes it anew",
            path=str(path),
        ) from e
    return keys


def same(token: str, secret: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(token.encode(), secret.encode())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_auth_for_bind(host: str, has_keys: bool, what: str) -> None:
    """Refuse to listen on the network without keys (SPEC E-19)."""
    if not has_keys and not is_loopback(host):
        raise ConfigInvalid(
            f"refusing to listen on {host} without {what}: anybody on the network could use this machine",
            hint=f"give {what}, or listen on 127.0.0.1",
            host=host,
        )
