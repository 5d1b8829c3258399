"""A thread that is interrupted in the middle of a call takes nothing with it that others need.

Every place at which Python lets an exception in is tried, one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import signal
import threading
from functools import partial
from types import FrameType
from typing import Any

import pytest

from tests.client.interruptions import ExpectedInterruption, Interrupted, Interruption
from tests.client.scenes import DEADLINE_S, Task
from tests.client.test_channel import PROMPT_S, Ends
from zeoid.errors import Disconnected, TimedOut
from zeoid.testing import Call


class Answers:
    """Answers every call that comes, until the channel is closed.

    Calls named "held" are answered with the next one named "release" or "deliver", in one segment, before it.
    """

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self.held = threading.Event()
        self.others: list[Task] = []
        self._task = Task(self._run)

    def _run(self) -> None:
        peer = self._ends.peer
        held: list[Call] = []
        waiting: list[Call] = []
        with contextlib.suppress(AssertionError, OSError):
            while True:
                call = waiting.pop(0) if waiting else peer.expect()
                if call.name == "held":
                    held.append(call)
                    self.held.set()
                    continue
                if call.name == "deliver":
                    # Its thread reads. Another one waits behind it, and is answered first.
                    self.others.append(self._ends.call("held"))
                    while (other := peer.expect()).name != "held":
                        waiting.append(other)
                    held.append(other)
                parts = []
                if call.name in ("deliver", "release"):
                    for other in held:
                        parts += [peer.reply(other, "held"), peer.call("info", {})]
                    held.clear()
                peer.send(*parts, peer.reply(call, call.name))

    def join(self) -> None:
        self._task.result()


def check(ends: Ends, others: list[Task], where: str) -> None:
    """Whoever waits is answered, or told of the end, and the channel is either good or dead."""
    try:
        assert ends.channel.call("release", (), PROMPT_S) == "release", where
    except TimedOut:
        raise AssertionError(f"interrupted {where}: the channel is neither dead nor alive") from None
    except Disconnected:
        pass
    for other in others:
        outcome = other.outcome(PROMPT_S)
        assert outcome == "held" or type(outcome) is Disconnected, (where, outcome)


def interrupt_everywhere(function: Any, kind: type[BaseException], others_wait: bool, after: bool) -> int:
    for place in itertools.count(1):
        ends = Ends().listen()
        answers = Answers(ends)
        others = []
        if others_wait and not after:
            others.append(ends.call("held"))
            assert answers.held.wait(DEADLINE_S)
        interrupted = Interrupted(place, partial(function, ends), kind)
        interrupted.join(PROMPT_S)
        if others_wait and after:
            others.append(ends.call("held"))
        check(ends, [*others, *answers.others], interrupted.where)
        ends.close()
        answers.join()
        if not interrupted.where:
            return place - 1
        if kind is Interruption or "Channel._deliver" not in interrupted.where:
            # An Exception during a delivery is taken for its fault, and the call fails as those of others.
            assert isinstance(interrupted.outcome, kind), interrupted.where
    raise AssertionError


def call(ends: Ends) -> Any:
    return ends.channel.call("ping", (), PROMPT_S)


def deliver(ends: Ends) -> Any:
    return ends.channel.call("deliver", (), PROMPT_S)


def drain(ends: Ends) -> Any:
    ends.peer.send(ends.peer.call("info", {}))
    ends.channel.drain()


def call_all(ends: Ends) -> Any:
    return ends.channel.call_all("ping", [(), ()], PROMPT_S, lambda context, value: value, [1, 2])


def send(ends: Ends) -> Any:
    return ends.channel.send(ends.channel.encode_one_way("ping", ()), PROMPT_S)


@pytest.mark.parametrize("kind", [Interruption, ExpectedInterruption])
@pytest.mark.parametrize("function", [call, call_all, send, deliver, drain])
@pytest.mark.parametrize("others_wait", [True, False], ids=["others wait", "alone"])
def test_a_call_that_is_interrupted(function: Any, kind: type[BaseException], others_wait: bool) -> None:
    assert interrupt_everywhere(function, kind, others_wait, after=False) > 1


@pytest.mark.parametrize("function", [call, call_all, send, drain])
def test_those_that_come_after_an_interrupted_call(function: Any) -> None:
    assert interrupt_everywhere(function, Interruption, True, after=True) > 1


class Alarm(Exception):
    """What a signal handler of an application raises."""


@pytest.mark.parametrize("kind", [Alarm, TimeoutError, KeyboardInterrupt])
def test_a_signal_while_a_thread_waits_for_its_reply(kind: type[BaseException]) -> None:
    """The handler's exception is raised by the call, whatever it is. Who waits behind is told at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise kind("enough")

    ends = Ends().listen()
    others: list[Task] = []

    def when_it_reads() -> None:
        ends.peer.expect("main")
        ends.peer.send(ends.peer.call("info", {}))
        assert ends.arrived.wait(DEADLINE_S)
        assert ends.called[-1][2] == threading.main_thread().ident
        others.append(ends.call("other"))
        ends.peer.expect("other")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        signalling = Task(when_it_reads)
        with pytest.raises(kind, match="enough"):
            ends.channel.call("main", (), DEADLINE_S)
        signalling.result()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert isinstance(others[0].outcome(PROMPT_S), Disconnected)
    assert not ends.channel.alive
    assert ends.peer.expect_end() == []
    ends.close()


def throw(task: Task) -> None:
    """Have its thread raise an Alarm as soon as it runs again."""
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(task.thread), ctypes.py_object(Alarm))
    assert raised == 1


def test_an_exception_that_another_thread_throws_at_the_reader() -> None:
    """It arrives with the next byte: here, half a message, which nobody must take for the whole."""
    ends = Ends().listen()
    reader, call = ends.reader()
    other = ends.call("other")
    other_call = ends.peer.expect("other")
    throw(reader)
    stream = ends.peer.reply(call, "mine") + ends.peer.reply(other_call, "other")
    ends.peer.send(stream[:5])
    assert isinstance(reader.outcome(PROMPT_S), Alarm)
    assert isinstance(other.outcome(PROMPT_S), Disconnected)
    assert not ends.channel.alive
    ends.close()


def test_an_exception_that_another_thread_throws_at_one_that_waits_for_the_reader() -> None:
    """It held nothing that others need: they go on."""
    ends = Ends().listen()
    reader, call = ends.reader()
    other = ends.call("other")
    other_call = ends.peer.expect("other")
    assert other.is_held_up()
    throw(other)
    ends.peer.answer(other_call, "too late")
    assert isinstance(other.outcome(PROMPT_S), Alarm)
    ends.peer.answer(call, "mine")
    assert reader.result() == "mine"
    assert ends.channel.alive
    ends.close()
