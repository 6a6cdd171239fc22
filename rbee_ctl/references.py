"""Checks of names before anything is started: models and backends (SPEC S-67, S-68)."""

from __future__ import annotations

import re

from rbee_serve.contract.errors import BackendUnavailable, InvalidBackend, InvalidModelRef

_HUB = re.compile(r"hf:[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._/-]*)?")
_FILE = re.compile(r"file:///[^\0]+\.gguf")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
FORMATS = "hf:org/repo, hf:org/repo:file-or-quantisation, file:///path/model.gguf, or the id of a model in the catalog"


def check_model(reference: str) -> str:
    """Return the reference; raises InvalidModelRef listing the formats."""
    pattern = _HUB if reference.startswith("hf:") else _FILE if reference.startswith("file:") else _ID
    if pattern.fullmatch(reference) is None or ".." in reference.split("/"):
        raise InvalidModelRef(
            f"model {reference!r} is not a model reference; expected: {FORMATS}",
            hint="rbee-ctl worker list shows the models that are served",
            model=reference,
        )
    return reference


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
