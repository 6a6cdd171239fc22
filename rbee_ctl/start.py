"""Entry of ``rbee-ctl``: an installation without its libraries says what to type, and Ctrl+C is 130 from the first moment."""

from __future__ import annotations


def main() -> int:
    """Run rbee-ctl and return its exit code."""
    try:
        from rbee_ctl.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as e:
        from rbee_serve.extras import say_missing

        return say_missing(e, "ctl")
