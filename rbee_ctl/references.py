"""Checks of names before anything is started: models and backends (SPEC S-67, S-68)."""

from __future__ import annotations

import re

from rbee_serve.contract.errors import BackendUnavailable, InvalidBackend, InvalidModelRef, ModelNotFound, RbeeError

_HUB = re.compile(r"hf:[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._/+-]*)?")
_HTTPS = re.compile(r"https://[A-Za-z0-9.-]+(:[0-9]+)?/[^\s#@]+\.gguf(\?[^\s#]*)?#sha256=[0-9a-f]{64}")
_FILE = re.compile(r"file:///[^\0]+\.gguf")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_KINDS = {"hf:": _HUB, "https:": _HTTPS, "file:": _FILE}
FORMATS = (
    "hf:org/repo, hf:org/repo:file-or-quantisation, https://host/file.gguf#sha256=DIGEST, file:///path/model.gguf, "
    "or the id of a model in the catalog"
)


def check_model(reference: str) -> str:
    """Return the reference; raises InvalidModelRef listing the formats."""
    pattern = next((p for prefix, p in _KINDS.items() if reference.startswith(prefix)), _ID)
    if pattern.fullmatch(reference) is None or ".." in reference.split("/"):
        raise _invalid(reference, "is not a model reference")
    return reference


def unknown_model(error: RbeeError, reference: str | None) -> RbeeError:
    """Return what to say of a model that nobody knows: of a word that is no reference, which formats there are (SPEC S-67)."""
    if not isinstance(error, ModelNotFound) or reference is None or reference.startswith(tuple(_KINDS)):
        return error
    known = [str(k) for k in error.details.get("known", [])]
    return _invalid(reference, f"is no reference and no known model (known: {', '.join(known) or 'none'})", known=known)


def _invalid(reference: str, why: str, **details: list[str]) -> InvalidModelRef:
    return InvalidModelRef(
        f"model {reference!r} {why}; expected: {FORMATS}",
        hint="rbee-ctl model list shows what the machines have",
        model=reference,
        **details,
    )


def check_backend(backend: str | None) -> str | None:
    """Return the backend; raises InvalidBackend listing the names, BackendUnavailable for one that no node can have."""
    if backend is None:
        return None
    from rbee_serve.contract.settings import BACKEND_NAMES  # brings pydantic: only where a backend was named

    if backend not in BACKEND_NAMES:
        raise InvalidBackend(
            f"backend {backend!r} does not exist; known: {', '.join(BACKEND_NAMES)}",
            hint="rbee-ctl worker list shows the backends in use",
            backend=backend,
            known=list(BACKEND_NAMES),
        )
    if backend == "metal":
        raise BackendUnavailable(
            "backend metal: no managed node can have it (nodes run Linux with systemd)",
            hint="use --backend cpu, cuda, rocm or vulkan",
            backend=backend,
        )
    return backend
