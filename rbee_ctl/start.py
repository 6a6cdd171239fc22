"""Entry of ``rbee-ctl``: an installation without its libraries says what to type, and Ctrl+C is 130 from the first moment."""

from __future__ import annotations

import sys


def main() -> int:
    """Run rbee-ctl and return its exit code."""
    try:
        from rbee_ctl.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as e:
        if (e.name or "rbee").startswith("rbee"):
            raise
        sys.stderr.write(f"error: {e.name} is not installed [MISSING_DEPENDENCY]\n  try: pipx install 'FILE.whl[ctl]'\n")
        return 1
