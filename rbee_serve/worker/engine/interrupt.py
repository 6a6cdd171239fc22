"""Ending a call to llama.cpp in the middle, from the thread that hears of it.

llama.cpp asks an abort callback before each operation of a graph. One in Python would take the interpreter's lock a thousand
times a step (9 % of the decoding speed); C's ``strlen`` on two bytes of ours answers 0 until the first of them is set.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

#: strlen's address: a function of a pointer whose answer, 0 or 1, llama.cpp reads as a boolean.
CALLBACK = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value


class Interrupt:
    """One call at a time is watched, in the name of the request that it works for."""

    def __init__(self) -> None:
        self._flag = (ctypes.c_char * 2)()
        self._lock = threading.Lock()
        self._watched: str | None = None
        self._cancelled: set[str] = set()  # heard of, but not yet by the loop

    @property
    def data(self) -> int:
        """The address that the callback is given."""
        return ctypes.addressof(self._flag)

    def watch(self, request_id: str) -> None:
        """The call that is about to be made ends when this request is, or was already, cancelled."""
        with self._lock:
            self._watched = request_id
            self._flag[0] = b"x" if request_id in self._cancelled else b"\0"

    def rest(self) -> None:
        """The call has ended, one way or the other."""
        with self._lock:
            self._watched, self._flag[0] = None, b"\0"

    def cancel(self, request_id: str, tell: Callable[[], None]) -> None:
        """End the watched call if it is this request's, and those that would still be made for it.

        ``tell`` lets the loop know: before the call ends, so that it finds the reason, and not before it can be `heard`.
        """
        with self._lock:
            tell()
            self._cancelled.add(request_id)
            if request_id == self._watched:
                self._flag[0] = b"x"

    def cancel_watched(self) -> None:
        """End the watched call, whoever's it is."""
        with self._lock:
            if self._watched is not None:
                self._flag[0] = b"x"

    def heard(self, request_id: str) -> None:
        """The loop knows of the cancellation now."""
        with self._lock:
            self._cancelled.discard(request_id)
