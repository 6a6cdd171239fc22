"""What is said of models that nobody knows, and the check of backends, before anything is started (SPEC S-67, S-68)."""

from __future__ import annotations

from rbee_serve.contract.errors import BackendUnavailable, InvalidBackend, ModelNotFound, RbeeError
from rbee_serve.contract.references import KINDS, invalid


def unknown_model(error: RbeeError, reference: str | None) -> RbeeError:
    """Return what to say of a model that nobody knows: of a word that is no reference, which formats there are (SPEC S-67)."""
    if not isinstance(error, ModelNotFound) or reference is None or reference.startswith(tuple(KINDS)):
        return error
    known = [str(k) for k in error.details.get("known", [])]
    return invalid(reference, f"is no reference and no known model (known: {', '.join(known) or 'none'})", known=known)


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
