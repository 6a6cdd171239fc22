"""ansible-playbook that imports first and is told later what to do: run by path, see ``ansible_ahead``.

Arguments: the descriptor of a socket on which ``{"argv", "env", "cwd"}`` will come, as JSON up to its end; the private folder of
the run, which is removed when nothing comes because rbee-ctl was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import sys
from typing import Any

#: What comes into the environment after the imports, and what Ansible does not read while it is imported.
_LATE = ("RBEE_", "RUNNER_", "AWX_ISOLATED_DATA_DIR")


def _imported(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if not name.startswith(_LATE)}


def _told(descriptor: int) -> dict[str, Any] | None:
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as data:
        text = data.read()
    return json.loads(text) if text else None


def _leave(status: list[int]) -> None:
    """End at once, as the last of all exit handlers: taking Ansible's objects apart takes the interpreter 0.15 s."""
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


def main() -> None:
    """Import Ansible, wait, run."""
    status: list[int] = []
    atexit.register(_leave, status)  # the first one registered is the last one called
    descriptor, folder = int(sys.argv[1]), sys.argv[2]
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as name:  # noqa: PTH123 -- no import
        name.write("ansible-playbook")  # what ps shows
    # What fails here fails again below, where somebody listens.
    with contextlib.suppress(Exception, SystemExit):
        import ansible.cli.playbook
    told = _told(descriptor)
    if told is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    argv, env = told["argv"], told["env"]
    os.chdir(told["cwd"])
    if _imported(env) != _imported(dict(os.environ)) or "ansible.cli.playbook" not in sys.modules:
        os.execve(argv[0], argv, env)  # noqa: S606 -- ansible-playbook itself, as ansible-runner would have
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    try:
        ansible.cli.playbook.main()
    except SystemExit as e:
        if not isinstance(e.code, int):
            raise
        status.append(e.code)


if __name__ == "__main__":
    main()
