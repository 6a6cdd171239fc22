"""What names a model, the forms of a reference (SPEC S-67), and what may name a machine (SPEC 3.8)."""

from __future__ import annotations

import re

from rbee_serve.contract.errors import InvalidModelRef

#: DNS-safe: the name is part of workers' ids and of addresses.
NODE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
NODE_NAME_RULE = "letters, digits, dots and hyphens expected, 63 at most, a letter or digit first and last"

_HUB = re.compile(r"hf:[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._/+-]*)?")
_HTTPS = re.compile(r"https://[A-Za-z0-9.-]+(:[0-9]+)?/[^\s#@]+\.gguf(\?[^\s#]*)?#sha256=[0-9a-f]{64}")
_FILE = re.compile(r"file:///[^\0]+\.gguf")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
KINDS = {"hf:": _HUB, "https:": _HTTPS, "file:": _FILE}
FORMATS = (
    "hf:org/repo, hf:org/repo:file-or-quantisation, https://host/file.gguf#sha256=DIGEST, file:///path/model.gguf, "
    "or the id of a model in the catalog"
)


def check_model(reference: str) -> str:
    """Return the reference; raises InvalidModelRef listing the formats."""
    pattern = next((p for prefix, p in KINDS.items() if reference.startswith(prefix)), _ID)
    if pattern.fullmatch(reference) is None or ".." in reference.split("/"):
        raise invalid(reference, "is not a model reference")
    return reference


def invalid(reference: str, why: str, **details: list[str]) -> InvalidModelRef:
    """Return the error of a reference that is none, with all the formats."""
    return InvalidModelRef(
        f"model {reference!r} {why}; expected: {FORMATS}",
        hint="rbee-ctl model list shows what the machines have",
        model=reference,
        **details,
    )
