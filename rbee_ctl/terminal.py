"""The terminal that ansible-runner gives to Ansible: pexpect's, with an Ansible that was begun ahead where there is one, and
closed without a pause when nobody is left in it."""

from __future__ import annotations

import os
from typing import Any

import pexpect
from ptyprocess import PtyProcess

from rbee_ctl import ansible_ahead


class Terminal(pexpect.spawn):  # type: ignore[misc]
    """pexpect waits a tenth of a second at the end before it looks whether the process is dead; ours has been waited for."""

    def _spawnpty(self, args: list[str | bytes], **options: Any) -> PtyProcess:
        argv = [os.fsdecode(arg) for arg in args]
        if (ahead := ansible_ahead.take(argv[0])) is not None:
            try:
                return ahead.become(argv, options["env"], options["cwd"])
            except OSError:  # it has ended: whatever the reason is, it will be told by a new one
                ahead.kill()
        return super()._spawnpty(args, **options)

    def close(self, *args: Any, **options: Any) -> None:
        """Close it; ends a process that is left."""
        if not self.closed and not self.isalive():
            self.ptyproc.delayafterclose = 0
        super().close(*args, **options)


def use() -> None:
    """Let ansible-runner, which asks pexpect for ``spawn``, get this one."""
    pexpect.spawn = Terminal
