"""The controller's audit log (SPEC E-30): what operators did to the fleet, in ``<state_dir>/audit.jsonl``.

The queen keeps a log of the same form on its own machine; ``contract.audit`` says what a line is.
"""

from __future__ import annotations

import datetime
import fcntl
import getpass
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rbee_serve.contract.audit import Chain, ChainBrokenError
from rbee_serve.contract.errors import AuditBroken, ConfigInvalid

FILE = "audit.jsonl"
_TAIL_BYTES = 65_536


def record(state_dir: Path, event: str, **facts: Any) -> None:
    """Append one event under a lock: several operators keep one chain. Raises ConfigInvalid when it can not be written."""
    path = state_dir / FILE
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "rb+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - _TAIL_BYTES))
            *lines, torn = f.read().split(b"\n")
            f.truncate(size - len(torn))  # what a kill cut off
            f.seek(0, os.SEEK_END)
            try:
                chain = Chain.after(lines[-1].decode()) if lines else Chain()
            except ValueError as e:
                raise ConfigInvalid(f"the audit log {path} ends in a foreign line", hint="rbee-ctl audit verify") from e
            known = {k: v for k, v in facts.items() if v is not None}
            f.write(chain.seal(event, at, {"operator": _operator(), **known}).encode() + b"\n")
    except OSError as e:
        raise ConfigInvalid(f"cannot write the audit log {path}: {e.strerror}", hint="rbee-ctl config show") from e


def _operator() -> str:
    """Return who types: the person behind sudo, else the account."""
    if name := os.environ.get("SUDO_USER"):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def verify(paths: Sequence[Path]) -> int:
    """Follow the chain through ``paths`` (oldest first) and return the number of lines.

    Raises AuditBroken naming file and line, ConfigInvalid for a file that can not be read.
    """
    chain, count = Chain(), 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "not a text file"
            raise ConfigInvalid(f"cannot read the audit log {path}: {reason}", hint="rbee-ctl audit verify FILE...") from e
        try:
            count += chain.check(text.splitlines(), str(path))
        except ChainBrokenError as e:
            raise AuditBroken(
                f"the audit log is not whole: {e}", hint=f"compare with a backup: sed -n {e.number}p {path}", line=e.number
            ) from e
    return count
