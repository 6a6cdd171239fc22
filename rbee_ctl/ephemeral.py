"""What ``infer`` has to start for itself: the queen (SPEC CAP-67); with ``--ephemeral`` all of it is stopped again (S-80)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from rbee_ctl.config import CLIENT_FILE
from rbee_ctl.events import Event, OnEvent, TaskDone
from rbee_serve.contract.errors import ConnectionTimeout, RbeeError

if TYPE_CHECKING:
    from rbee_ctl.playbook import PlaybookResult
    from rbee_ctl.queen_client import QueenClient
    from rbee_ctl.session import Session


class Ephemeral:
    """Owner of what is started within its block. Leaving it stops that in reverse order, however the block ends."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._owned: list[tuple[str, Callable[[], PlaybookResult]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        failed: RbeeError | None = None
        while self._owned:
            what, stop = self._owned[-1]
            with contextlib.suppress(BrokenPipeError):  # it is stopped, whether anybody reads that or not
                self._session.ui.narrate("ctl", "ephemeral", f"stopping {what}, which this command had started")
            try:
                failed = _first_error(stop()) or failed
            except KeyboardInterrupt:
                left = ", ".join(name for name, _ in reversed(self._owned))
                self._session.ui.narrate(
                    "ctl", "ephemeral", f"interrupted; perhaps left running: {left}; next: rbee-ctl hive status"
                )
                raise
            self._owned.pop()
        if failed is not None and error is None:
            raise failed

    def ensure_queen(self, queen: QueenClient) -> None:
        """Start the queen unless one answers, and own it as soon as it was started; raises what its playbook says."""

        def own() -> None:
            if not self._owned:
                self._owned.append(("the queen", lambda: self._session.play("queen_stop")))

        def listen(event: Event) -> None:
            if isinstance(event, TaskDone) and event.changed:
                own()

        if ensure_queen(self._session, queen, listen):
            own()

    def start_worker(self, node: str, request: Mapping[str, Any]) -> PlaybookResult:
        """Run ``worker_start`` on a machine and own what was not there before: the hive, the worker, its instance.

        Owned as soon as the playbook has said which instance it will start, so that a Ctrl+C meanwhile leaves nothing.
        """
        before = self._session.play("status", limit=node, silent=True)
        if (failed := _first_error(before)) is not None:
            raise failed
        hive = before.hosts[node].result.get("hive", {})
        units = {u.get("name"): u for u in hive.get("units", [])}
        if hive.get("target") == "inactive":
            self._owned.append((f"the hive of {node}", lambda: self._session.play("hive_stop", limit=node)))
        seen: set[str] = set()

        def own(name: str) -> None:
            unit = units.get(name)
            if name not in seen and (unit is None or not _up(unit)):
                variables = {"rbee_worker_names": [name], "rbee_worker_remove": unit is None}
                self._owned.append(
                    (f"worker {node}-{name}", lambda: self._session.play("worker_stop", limit=node, extra_vars=variables))
                )
            seen.add(name)

        def listen(event: Event) -> None:
            if isinstance(event, TaskDone) and (name := _planned(event.result)) is not None:
                own(name)

        play = self._session.play("worker_start", limit=node, extra_vars={"rbee_worker_request": dict(request)}, listen=listen)
        name = play.hosts[node].result.get("worker", {}).get("name") if node in play.hosts else None
        if name is not None:
            own(name)
        return play


def _planned(result: Mapping[str, Any]) -> str | None:
    """Return the name of the instance that a preflight has planned, from what its task returned."""
    plan = result.get("plan")
    instance = plan.get("instance") if isinstance(plan, dict) else None
    name = instance.get("name") if isinstance(instance, dict) else None
    return name if isinstance(name, str) else None


def ensure_queen(session: Session, queen: QueenClient, listen: OnEvent | None = None) -> bool:
    """Start the fleet's queen unless one answers; says whether it was started here. ``listen`` gets the playbook's events.

    Raises ConnectionTimeout where no queen answers and it is none of the inventory's, and what its playbook says.
    """
    try:
        queen.get("/health")
    except ConnectionTimeout as e:
        if not _of_the_inventory(session):
            raise
        session.ui.narrate("ctl", "queen", f"{e.message}; starting it")
        play = session.play("queen_start", listen=listen)
        if (failed := _first_error(play)) is not None:
            raise failed from e
        if not any(outcome.changed for outcome in play.hosts.values()):
            raise  # it runs and does not answer: nothing that a start mends
        return True
    return False


def _of_the_inventory(session: Session) -> bool:
    """Say whether the queen that is asked is the one that the inventory's playbooks start."""
    if session.settings.inventory.value is None or (host := session.inventory.queen) is None:
        return False
    deployed = session.settings.queen_url.source == str(session.settings.state_path / CLIENT_FILE)
    return deployed or urlsplit(session.settings.queen).hostname in (host.name, host.address)


def _up(unit: Mapping[str, Any]) -> bool:
    """Say whether a worker ran, was about to, or slept behind its socket."""
    return unit.get("active_state") in ("active", "activating") or unit.get("socket") == "active"


def _first_error(play: PlaybookResult) -> RbeeError | None:
    return play.error or next((o.error for o in play.hosts.values() if o.error is not None), None)
