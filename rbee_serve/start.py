"""Entries of ``rbee-queen`` and ``rbee-worker``: an installation without their libraries says what to type."""

from __future__ import annotations


def queen() -> int:
    """Run the queen."""
    try:
        from rbee_serve.queen.main import main

        return main()
    except ModuleNotFoundError as e:
        from rbee_serve.extras import say_missing

        return say_missing(e, "queen")


def worker() -> int:
    """Run a worker."""
    try:
        from rbee_serve.worker.main import main

        return main()
    except ModuleNotFoundError as e:
        from rbee_serve.extras import say_missing

        return say_missing(e, "worker")
