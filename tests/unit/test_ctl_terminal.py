"""The terminal that Ansible runs in."""

from __future__ import annotations

import pexpect

from rbee_ctl.terminal import Terminal


def test_a_terminal_is_closed_without_a_pause_when_its_program_has_ended_and_ends_one_that_has_not() -> None:
    ended = Terminal("/bin/sh", ["-c", "exit 3"])
    ended.expect(pexpect.EOF)
    ended.close()
    assert ended.exitstatus == 3
    assert ended.ptyproc.delayafterclose == 0
    living = Terminal("/bin/sleep", ["600"])
    living.close()
    assert not living.isalive()
    living.close()  # twice is none too many
