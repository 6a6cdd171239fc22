"""The terminal that ansible-runner gives to Ansible: pexpect's, closed without a pause when nobody is left in it."""

from __future__ import annotations

from typing import Any

import pexpect


class Terminal(pexpect.spawn):  # type: ignore[misc]
    """pexpect waits a tenth of a second at the end before it looks whether the process is dead; ours has been waited for."""

    def close(self, *args: Any, **options: Any) -> None:
        """Close it; ends a process that is left."""
        if not self.closed and not self.isalive():
            self.ptyproc.delayafterclose = 0
        super().close(*args, **options)


def use() -> None:
    """Let ansible-runner, which asks pexpect for ``spawn``, get this one."""
    pexpect.spawn = Terminal
