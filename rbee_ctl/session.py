"""What all commands share in one run: the user interface, the settings, and how to reach inventory, queen and playbooks."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbee_ctl import config
from rbee_ctl.render import Ui

if TYPE_CHECKING:
    from rbee_ctl.events import Event, OnEvent
    from rbee_ctl.inventory import Host, Inventory
    from rbee_ctl.playbook import PlaybookResult
    from rbee_ctl.queen_client import QueenClient

#: Playbooks whose hosts are names alone: that they "answer" says nothing about machines.
_CONTACT_NOBODY = ("declaration",)


class Session:
    """One invocation of rbee-ctl. Nothing is read before it is asked for."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui

    @functools.cached_property
    def settings(self) -> config.Settings:
        """Return the settings; raises ConfigInvalid."""
        return config.load()

    @functools.cached_property
    def inventory(self) -> Inventory:
        """Return the inventory; raises ConfigInvalid when there is none."""
        from rbee_ctl.inventory import load

        return load(self.settings.inventory_path)

    def known_node(self, name: str | None) -> Host | None:
        """Return the host, or None when none was named; raises NodeNotFound before anything is started."""
        return None if name is None else self.inventory.get(name)

    def one_node(self, name: str | None) -> str:
        """Return the host that is meant: the named one, or the only one there is; raises NodeNotFound, InvalidRequest."""
        if name is not None:
            return self.inventory.get(name).name
        names = [h.name for h in self.inventory.hives]
        if len(names) != 1:
            from rbee_serve.contract.errors import InvalidRequest

            raise InvalidRequest(
                f"which machine? {self.inventory.path} has {', '.join(names) or 'none'}",
                hint=f"add --node {names[0]}" if names else "rbee-ctl hive list",
                field="node",
                known=names,
            )
        return names[0]

    def queen(self) -> QueenClient:
        """Return a client for the queen; close it."""
        from rbee_ctl.queen_client import QueenClient

        return QueenClient(self.settings.queen, self.settings.api_key(), ca_file=self.settings.queen_ca_file.value)

    def live_workers(self, queen: QueenClient, *, node: str | None, **filters: str | None) -> list[dict[str, Any]]:
        """Return the records of live workers; raises NodeNotFound for a machine that neither inventory nor queen knows."""
        found = queen.workers(node=node, **filters)
        if found or node is None:
            return found
        from rbee_serve.contract.hives import refuse_unknown_node

        has_inventory = self.settings.inventory.value is not None
        if has_inventory and node in self.inventory.hosts:
            return found
        hives = queen.get("/v1/hives").get("hives", [])
        if has_inventory and node not in {hive.get("name") for hive in hives}:
            self.inventory.get(node)
        refuse_unknown_node(node, hives)
        return found

    def look(self, name: str, *, limit: str | None = None, extra_vars: Mapping[str, Any] | None = None) -> PlaybookResult:
        """Answer a verb that only reads: in this process where all its machines are this one (CAP-27), else by playbook."""
        hosts = [self.inventory.get(limit)] if limit is not None else self.inventory.hives
        if not any(h.is_here for h in hosts):
            return self.play(name, limit=limit, extra_vars=extra_vars)
        from rbee_ctl import integrated, node_facts

        off = self.settings.integrated.value == "off"
        why = "integrated is off" if off else integrated.obstacle(name, hosts, extra_vars or {})
        if why is not None:
            return self.play(name, limit=limit, extra_vars=extra_vars, mode=f"local: by Ansible, not in this process: {why}")
        self.ui.narrate("ctl", "mode", "integrated: read in this process, without HTTP and without Ansible")
        result = integrated.look(name, hosts, extra_vars or {})
        for host in result.hosts:
            node_facts.contact(self.settings.state_path, host, None)
        return result

    def say_remembered(self) -> None:
        """Name the mode of a verb that contacts no machine, to programs that follow (jobs)."""
        if self.ui.events:
            self.ui.narrate("ctl", "mode", "integrated: from the inventory and what is remembered; no machine is contacted")

    def _pause(self, node: str, number: int, tries: int) -> None:
        from rbee_ctl.probing import PAUSES_S
        from rbee_ctl.queen_client import jittered

        pause = jittered(PAUSES_S[min(number, len(PAUSES_S) - 1)])
        self.ui.narrate("ctl", "retry", f"{node} does not answer: attempt {number + 1}/{tries} (delay {pause * 1000:.0f}ms)")
        time.sleep(pause)

    def _mode(self, limit: str | None) -> str:
        """Say how a playbook reaches its machines."""
        if self.settings.inventory.value is None:
            return "local: by Ansible on this machine"
        hosts = [h for h in self.inventory.hosts.values() if limit in (None, h.name)]
        here = bool(hosts) and all(h.is_here for h in hosts)
        return "local: by Ansible on this machine" if here else "remote: by Ansible over SSH"

    def play(
        self,
        name: str,
        *,
        limit: str | None = None,
        extra_vars: Mapping[str, Any] | None = None,
        extra_inventories: Sequence[Path] = (),
        silent: bool = False,
        check: bool = False,
        environ: Mapping[str, str] | None = None,
        mode: str | None = None,
        tries: int = 1,
        listen: OnEvent | None = None,
    ) -> PlaybookResult:
        """Run a playbook against the inventory and narrate it (``silent``: only with --verbose); remember who answered.

        ``check``: say what would change and touch nothing. ``environ``: added to Ansible's environment.
        ``mode``: how the machines are reached, where there was a choice. ``tries``: how often one machine (``limit``) that
        does not answer is tried, as long as nothing was changed there (SPEC S-20). ``listen`` gets every event, too.
        """
        from rbee_ctl import audit, node_facts
        from rbee_ctl.playbook import run_playbook

        if mode is not None or self.ui.events:
            self.ui.narrate("ctl", "mode", mode or self._mode(limit))
        if not check:
            audit.record(self.settings.state_path, "playbook.start", playbook=name, limit=limit)
        for number in range(1, tries + 1):
            result = run_playbook(
                name,
                inventory=[self.settings.inventory_path, *extra_inventories],
                limit=limit,
                extra_vars=extra_vars,
                on_event=_both(listen, None if silent and not self.ui.verbose else self.ui.narrator(limit or "ansible", name)),
                state_dir=self.settings.state_path,
                verbose=self.ui.verbose,
                check=check,
                environ=environ,
            )
            if number == tries or limit is None or not result.never_reached:
                break
            self._pause(limit, number, tries)
        if not check:
            outcome_of = {host: outcome.status for host, outcome in result.hosts.items()}
            audit.record(self.settings.state_path, "playbook.end", playbook=name, status=result.status, hosts=outcome_of)
        if name in _CONTACT_NOBODY:
            return result
        for host, outcome in result.hosts.items():
            gone = outcome.error.message if outcome.status == "unreachable" and outcome.error is not None else None
            node_facts.contact(self.settings.state_path, host, gone)
        return result


def _both(first: OnEvent | None, second: OnEvent | None) -> OnEvent | None:
    """Return what tells both."""
    if first is None or second is None:
        return first or second

    def tell(event: Event) -> None:
        first(event)
        second(event)

    return tell
