"""Exceptions from outside (Ctrl-C, an alarm, a time-out of gevent's), at a place of the test's choice.

Python lets them in when a function of its own begins and when a C function has returned. The profiler's
events mark the same places, and an exception raised there is the same to the interrupted code.
Must not know what is interrupted, but the names of the modules to choose the places in.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import zeoid.client

PLACES = os.path.dirname(zeoid.client.__file__)


class Interruption(BaseException):
    """What no code expects."""


class ExpectedInterruption(Exception):
    """What code that catches every Exception might swallow."""


def at_place(place: int, function: Callable[[], Any], action: Callable[[str], None]) -> tuple[Any, str]:
    """Call *function*, and *action* at the place of this number in Zeoid's client, in the same thread.

    What came of it, value or exception, and where the place is: empty if there are not so many.
    """
    count = 0
    where = ""

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count, where
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(PLACES):
            return
        count += 1
        if count == place:
            what = "in" if event == "call" else f"after {getattr(arg, '__name__', arg)} in"
            where = f"{what} " + " < ".join(_callers(frame))
            action(where)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        outcome = function()
    except BaseException as problem:
        outcome = problem
    finally:
        sys.setprofile(before)
    return outcome, where


def interrupt(
    place: int, function: Callable[[], Any], kind: type[BaseException] = Interruption
) -> tuple[Any, str]:
    """Call *function* and raise *kind* at the place; as `at_place`."""

    def throw(where: str) -> None:
        raise kind(where)

    return at_place(place, function, throw)


def _callers(frame: FrameType | None) -> Iterator[str]:
    """Where *frame* is, who called it there, and so on, as long as it is Zeoid's client."""
    while frame is not None and frame.f_code.co_filename.startswith(PLACES):
        yield f"{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back


class Interrupted:
    """The same in a thread of its own."""

    def __init__(self, place: int, function: Callable[[], Any], kind: type[BaseException]) -> None:
        self.outcome: Any = None
        self.where = ""
        self._thread = threading.Thread(target=self._run, args=(place, function, kind), daemon=True)
        self._thread.start()

    def _run(self, place: int, function: Callable[[], Any], kind: type[BaseException]) -> None:
        self.outcome, self.where = interrupt(place, function, kind)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"interrupted {self.where}, it did not return"
