"""Entry of ``rbee-ctl``: an installation without its libraries says what to type, and a stop is 130 from the first moment."""

from __future__ import annotations

import atexit
import os
import signal
import sys

from rbee_ctl import ansible_ahead


def main() -> int:
    """Run rbee-ctl and return its exit code; the process ends with it as soon as the exit handlers have run."""
    status: list[int] = []
    atexit.register(_leave, status)  # the first one registered is the last one called
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # imports alone take long enough for one to come
        code = _run()
    except KeyboardInterrupt:
        code = 130
    status.append(code)
    return code


def _run() -> int:
    try:
        ansible_ahead.begin(sys.argv[1:])
        from rbee_ctl.cli import main as run

        return run()
    except ModuleNotFoundError as e:
        from rbee_serve.extras import say_missing

        return say_missing(e, "ctl")
    finally:
        ansible_ahead.end()


def _leave(status: list[int]) -> None:
    """End without taking all modules and their objects apart, which takes the interpreter 0.07 s."""
    if status:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # the interpreter says what is wrong with them
            return
        os._exit(status[0])
