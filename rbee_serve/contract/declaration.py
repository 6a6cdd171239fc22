"""What the inventory declares, as ``site.yml`` tells it to the queen: machines and the workers that they shall have.

``{"version": 1, "hives": [{"name", "address", "workers": [{"name", "backend", "device", "model", "state"}]}]}``
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rbee_serve.contract.api import TolerantMessage
from rbee_serve.contract.settings import HiveName, InstanceName


class DeclaredWorker(TolerantMessage):
    """One entry of ``rbee_workers``. ``state``: the wanted one."""

    name: InstanceName
    backend: str
    device: int = Field(0, ge=0)
    model: str
    state: Literal["started", "stopped", "present", "absent"] = "started"


class DeclaredHive(TolerantMessage):
    """One machine of the group ``rbee_hives``."""

    name: HiveName
    address: str | None = None
    workers: list[DeclaredWorker] = Field(default_factory=list)


class Declaration(TolerantMessage):
    """The whole fleet."""

    version: Literal[1]
    hives: list[DeclaredHive]
