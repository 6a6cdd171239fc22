"""Clients' API keys as they are stored: the SHA-256 of each key and what it may do, never the key itself.

The controller's list (``<state_dir>/secrets/client-keys.json``) and the queen's credential have one format:
``{"version": 1, "keys": [ClientKey, ...]}``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

KEY_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ClientKey(BaseModel):
    """One key. A limit that is None does not limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="by which logs and commands may name it")
    name: str = Field(pattern=KEY_NAME_PATTERN)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created_at: str = Field(default="", max_length=64, description="ISO 8601, or what made the key")
    admin: bool = Field(default=False, description="may run fleet operations, retire workers and see everybody's jobs")
    expires_at: float | None = Field(default=None, gt=0, description="seconds since the epoch")
    models: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(
        default=None, max_length=256, description="model ids that the key may use; `*` at the end stands for any rest"
    )
    requests_per_minute: int | None = Field(default=None, ge=1, le=1_000_000)
    concurrent_requests: int | None = Field(default=None, ge=1, le=100_000)

    def allows(self, model: str) -> bool:
        """Whether the key may use ``model``."""
        if self.models is None:
            return True
        return any(model.startswith(m[:-1]) if m.endswith("*") else model == m for m in self.models)


class ClientKeyFile(BaseModel):
    """The whole list."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    keys: list[ClientKey] = Field(max_length=10_000)
