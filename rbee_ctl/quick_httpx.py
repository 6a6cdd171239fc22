"""httpx without its command line.

`import httpx` imports that too, and with it rich, pygments and click, unless it is not there: they take as long as all the
rest of a short command.
"""

from __future__ import annotations

import sys

_absent = sys.modules.setdefault("httpx._main", None) is None  # type: ignore[arg-type]
import httpx  # noqa: E402

if _absent:
    del sys.modules["httpx._main"]

__all__ = ["httpx"]
