"""Entry of ``rbee-ctl``: an installation without its libraries says what to type, and Ctrl+C is 130 from the first moment."""

from __future__ import annotations

import sys

from rbee_ctl import ansible_ahead


def main() -> int:
    """Run rbee-ctl and return its exit code."""
    try:
        ansible_ahead.begin(sys.argv[1:])
        from rbee_ctl.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as e:
        from rbee_serve.extras import say_missing

        return say_missing(e, "ctl")
    finally:
        ansible_ahead.end()
