"""What all commands share in one run: the user interface, the settings, and how to reach inventory, queen and playbooks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbee_ctl import config
from rbee_ctl.render import Ui

if TYPE_CHECKING:
    from rbee_ctl.inventory import Host, Inventory
    from rbee_ctl.playbook import PlaybookResult
    from rbee_ctl.queen_client import QueenClient


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
    ) -> PlaybookResult:
        """Run a playbook against the inventory and narrate it (``silent``: only with --verbose); remember who answered.

        ``check``: say what would change and touch nothing. ``environ``: added to Ansible's environment.
        """
        from rbee_ctl import audit, node_facts
        from rbee_ctl.playbook import run_playbook

        if not check:
            audit.record(self.settings.state_path, "playbook.start", playbook=name, limit=limit)
        result = run_playbook(
            name,
            inventory=[self.settings.inventory_path, *extra_inventories],
            limit=limit,
            extra_vars=extra_vars,
            on_event=None if silent and not self.ui.verbose else self.ui.narrator(limit or "ansible", name),
            state_dir=self.settings.state_path,
            verbose=self.ui.verbose,
            check=check,
            environ=environ,
        )
        if not check:
            outcome_of = {host: outcome.status for host, outcome in result.hosts.items()}
            audit.record(self.settings.state_path, "playbook.end", playbook=name, status=result.status, hosts=outcome_of)
        for host, outcome in result.hosts.items():
            gone = outcome.error.message if outcome.status == "unreachable" and outcome.error is not None else None
            node_facts.contact(self.settings.state_path, host, gone)
        return result
