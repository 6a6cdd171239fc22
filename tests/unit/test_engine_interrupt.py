"""What llama.cpp's abort callback answers, asked as llama.cpp asks it: by address, with a pointer."""

from __future__ import annotations

import ctypes
import threading

from rbee_serve.worker.engine.interrupt import CALLBACK, Interrupt


def nobody() -> None:
    """Nobody has to be told."""


callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(CALLBACK)  # type: ignore[arg-type]


def test_interrupt_ends_the_call_of_the_cancelled_request_alone() -> None:
    one = Interrupt()
    assert not callback(one.data)
    one.watch("a")
    one.cancel("b", nobody)
    assert not callback(one.data)
    one.cancel("a", nobody)
    assert callback(one.data)
    one.rest()
    assert not callback(one.data), "the next call is somebody else's"


def test_interrupt_that_comes_before_the_call_is_not_lost() -> None:
    one = Interrupt()
    one.cancel("a", nobody)
    assert not callback(one.data)
    one.watch("a")
    assert callback(one.data)
    one.rest()
    one.heard("a")
    one.watch("a")
    assert not callback(one.data), "a request of that name again"


def test_interrupt_of_whoever_runs_spares_calls_that_are_not_watched() -> None:
    one = Interrupt()
    one.cancel_watched()
    assert not callback(one.data)
    one.watch("a")
    one.cancel_watched()
    assert callback(one.data)


def test_interrupt_that_the_loop_hears_of_at_once_leaves_nothing() -> None:
    """The loop may have the message before `cancel` has returned: what it then says must come after, not before."""
    one, told = Interrupt(), threading.Event()
    loop = threading.Thread(target=lambda: (told.wait(60), one.heard("a")))
    loop.start()
    one.cancel("a", told.set)
    loop.join(60)
    one.watch("a")
    assert not callback(one.data), "a request of that name again"
