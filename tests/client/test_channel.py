"""A channel: whose reply is whose, who reads, what ends it, and that nobody waits for ever.

The peer is a script at the other end of a pair of sockets, so every order of events is the test's choice.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from transaction.interfaces import TransientError
from ZODB.POSException import POSKeyError, StorageError

from tests.client.scenes import DEADLINE_S, OID, OTHER, T1, T2, Held, Task
from tests.peers import wait_until
from tests.wire.samples import peak_bytes
from zeoid import limits
from zeoid.client.channel import Channel
from zeoid.errors import Disconnected, FrameTooLarge, PeerError, ServerError, TimedOut, UnsendableValue
from zeoid.testing import Call, ScriptedConnection
from zeoid.wire.codec import codec_for

SHORT_S = 0.1
#: Prompt: long before any deadline that a call was given.
PROMPT_S = 5.0
MEGABYTE = 1024 * 1024


class Ends:
    """A channel, its peer, and what came of the peer's calls."""

    def __init__(self, coding: str | None = None, offer: str = "Z5") -> None:
        ours, theirs = socket.socketpair()
        #: Another handle on the channel's socket, as the other process has after a fork.
        self.inherited = ours.dup()
        self.raw = theirs
        self.peer = ScriptedConnection(theirs)
        self.channel = Channel(ours, coding=coding, peer="the peer")
        #: (name, args, thread) of each call by the peer.
        self.called: list[tuple[str, Any, int]] = []
        self.arrived = threading.Event()
        self.deaths: list[BaseException] = []
        shaking = Task(self.channel.shake_hands, DEADLINE_S)
        self.peer.offer(offer)
        shaking.result()

    def listen(self) -> Ends:
        for name, args in self.channel.listen(self._on_call, self.deaths.append):
            self._on_call(name, args)
        return self

    def _on_call(self, name: str, args: Any) -> None:
        self.called.append((name, args, threading.get_ident()))
        self.arrived.set()

    def call(self, name: str = "ping", *args: Any, timeout_s: float = DEADLINE_S) -> Task:
        """Call from another thread."""
        return Task(self.channel.call, name, args, timeout_s)

    def make_reader(self, task: Task) -> None:
        """Wait until the thread of *task* reads the socket: it delivers what is sent to it now."""
        self.arrived.clear()
        self.peer.send(self.peer.call("info", {}))
        assert self.arrived.wait(DEADLINE_S)
        assert self.called[-1][2] == task.thread

    def reader(self, timeout_s: float = DEADLINE_S) -> tuple[Task, Call]:
        """A thread that waits for a reply and reads the socket, and its call."""
        task = self.call("reader", timeout_s=timeout_s)
        call = self.peer.expect("reader")
        self.make_reader(task)
        return task, call

    def background(self) -> Task:
        """The background's turn, in which it reads."""
        self.channel.attend(0.0)  # the first turn after a message was sent passes
        task = Task(self.channel.attend, DEADLINE_S)
        self.arrived.clear()
        self.peer.send(self.peer.call("info", {}))
        assert self.arrived.wait(DEADLINE_S)
        assert self.called[-1][2] == task.thread
        return task

    def close(self) -> None:
        self.channel.close()
        self.peer.close()
        self.inherited.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends().listen()
    yield ends
    ends.close()


@pytest.fixture
def strangers() -> Iterator[tuple[Channel, ScriptedConnection, socket.socket]]:
    """A channel that has not shaken hands."""
    ours, theirs = socket.socketpair()
    channel, peer = Channel(ours, peer="the peer"), ScriptedConnection(theirs)
    yield channel, peer, theirs
    channel.close()
    peer.close()


# The handshake ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offer", ["M5", "Z5"])
@pytest.mark.parametrize(("coding", "answer"), [(None, "M5"), ("M5", "M5"), ("Z5", "Z5")])
def test_the_coding_is_the_clients_choice(offer: str, coding: str | None, answer: str) -> None:
    ends = Ends(coding, offer).listen()
    with contextlib.closing(ends):
        assert ends.peer.protocol == ends.channel.protocol == answer
        assert ends.channel.offered == offer
        task = ends.call("loadBefore", OID, T1)
        call = ends.peer.expect()
        assert (call.name, call.args, call.one_way) == ("loadBefore", (OID, T1), False)
        ends.peer.answer(call, (b"data", T1, None))
        assert task.result() == (b"data", T1, None)


def test_a_server_that_makes_no_offer(strangers: Any) -> None:
    channel, peer, _ = strangers
    with pytest.raises(TimedOut, match=r"no offer from the peer within 0\.1 s"):
        channel.shake_hands(SHORT_S)
    assert not channel.alive
    assert peer.expect_end() == []


def test_a_server_that_closes_instead_of_offering(strangers: Any) -> None:
    channel, peer, _ = strangers
    peer.close()
    with pytest.raises(Disconnected, match="the peer closed the connection"):
        channel.shake_hands(DEADLINE_S)
    assert not channel.alive


@pytest.mark.parametrize(
    "first",
    [b"\0\0\0\2Z4", b"\0\0\0\2X5", b"\0\0\0\3Z55", b"\0\0\0\0", b"HTTP/1.1 400 Bad\r\n\r\n", b"\xff" * 8],
    ids=repr,
)
def test_a_server_that_speaks_another_protocol(strangers: Any, first: bytes) -> None:
    channel, peer, _ = strangers
    peer.send(first)
    with pytest.raises(PeerError):
        channel.shake_hands(DEADLINE_S)
    assert not channel.alive
    assert peer.expect_end() == []


def test_an_offer_that_comes_byte_by_byte(strangers: Any) -> None:
    channel, _, raw = strangers
    shaking = Task(channel.shake_hands, DEADLINE_S)
    for byte in b"\0\0\0\2Z5":
        raw.send(bytes([byte]))
    shaking.result()
    assert channel.protocol == "M5"


# Calls ------------------------------------------------------------------------------------------------


def test_what_the_peer_answers_is_what_the_caller_gets(ends: Ends) -> None:
    tasks = [ends.call("echo", value) for value in (None, 1, b"\0" * 70_000, "ä", (1, (2, 3)), {"a": b"b"})]
    for _ in tasks:
        call = ends.peer.expect("echo")
        ends.peer.answer(call, call.args[0])
    assert [task.result() for task in tasks] == [None, 1, b"\0" * 70_000, "ä", (1, (2, 3)), {"a": b"b"}]


def test_an_error_is_raised_where_it_belongs_and_nowhere_else(ends: Ends) -> None:
    failing, other = ends.call("fails"), None
    call = ends.peer.expect("fails")
    other = ends.call("works")
    works = ends.peer.expect("works")
    ends.peer.send(ends.peer.fault(call, POSKeyError(OID)), ends.peer.reply(works, 1))
    with pytest.raises(POSKeyError) as failure:
        failing.result()
    assert failure.value.args == (OID,)
    assert other.result() == 1
    assert ends.channel.alive


def test_an_unknown_error_is_told_as_a_storage_error(ends: Ends) -> None:
    task = ends.call()
    ends.peer.send(ends.peer.fault(ends.peer.expect(), LookupError("on the moon")))
    with pytest.raises(ServerError, match=r"builtins\.LookupError: on the moon") as failure:
        task.result()
    assert isinstance(failure.value, StorageError)


def test_one_way_messages_go_before_the_call_that_follows(ends: Ends) -> None:
    message = ends.channel.encode_one_way("first", (1,))
    task = Task(ends.channel.call, "second", (2,), DEADLINE_S, before=message)
    first, second = ends.peer.expect("first"), ends.peer.expect("second")
    assert (first.one_way, second.one_way) == (True, False)
    ends.peer.answer(second, None)
    task.result()
    ends.channel.send(ends.channel.encode_one_way("third", ()), DEADLINE_S)
    assert ends.peer.expect("third").one_way


def test_a_value_that_cannot_be_sent_leaves_the_channel_as_it_was(ends: Ends) -> None:
    with pytest.raises(UnsendableValue):
        ends.channel.call("ping", (object(),), DEADLINE_S)
    with pytest.raises(UnsendableValue):
        ends.channel.encode_one_way("ping", (object(),))
    task = ends.call()
    ends.peer.answer(ends.peer.expect(), "still here")
    assert task.result() == "still here"


def test_a_hook_sees_replies_and_calls_in_the_order_of_the_stream() -> None:
    ends = Ends()
    seen: list[Any] = []
    ends.channel.listen(lambda name, args: seen.append(args[0]), ends.deaths.append)
    with contextlib.closing(ends):

        def hook(context: Any, value: Any) -> str:
            seen.append(value)
            return f"hooked {value}"

        tasks = [Task(ends.channel.call, f"c{n}", (), DEADLINE_S, hook=hook) for n in range(3)]
        calls = sorted((ends.peer.expect() for _ in tasks), key=lambda call: call.name)
        parts = []
        for number, call in enumerate(calls):
            parts += [ends.peer.call("info", f"before {number}"), ends.peer.reply(call, number)]
        ends.peer.send(*parts, ends.peer.call("info", "last"))
        assert [task.result() for task in tasks] == ["hooked 0", "hooked 1", "hooked 2"]
        assert seen == ["before 0", 0, "before 1", 1, "before 2", 2, "last"]


def test_what_the_peer_called_before_anybody_listened_comes_first() -> None:
    ends = Ends()
    with contextlib.closing(ends):
        task = ends.call()
        call = ends.peer.expect()
        ends.peer.send(ends.peer.call("one"), ends.peer.reply(call, 0), ends.peer.call("two"))
        task.result()
        assert ends.called == []
        ends.listen()
        assert [name for name, _, _ in ends.called] == ["one", "two"]
        ends.peer.send(ends.peer.call("three"))
        ends.channel.drain()
        assert [name for name, _, _ in ends.called] == ["one", "two", "three"]


def test_many_calls_in_one_write(ends: Ends) -> None:
    hooked: list[Any] = []

    def hook(context: Any, value: Any) -> int:
        hooked.append((context, value))
        return int(value) + 100

    task = Task(ends.channel.call_all, "double", [(n,) for n in range(4)], DEADLINE_S, hook, [0, 1, 2, 3])
    calls = [ends.peer.expect("double") for _ in range(4)]
    assert [call.args for call in calls] == [(0,), (1,), (2,), (3,)]
    ends.peer.send(
        ends.peer.reply(calls[2], 4),
        ends.peer.fault(calls[1], POSKeyError(OID)),
        ends.peer.reply(calls[3], 6),
        ends.peer.reply(calls[0], 0),
    )
    first, second, third, fourth = task.result()
    assert (first, third, fourth) == (100, 104, 106)
    assert isinstance(second, POSKeyError)
    assert hooked == [(2, 4), (3, 6), (0, 0)]


def test_many_calls_and_the_peer_goes_after_the_first_reply(ends: Ends) -> None:
    calls = [(1,), (2,)]
    task = Task(ends.channel.call_all, "double", calls, DEADLINE_S, lambda context, value: value, [0, 1])
    call = ends.peer.expect("double")
    ends.peer.answer(call, 2)
    ends.peer.close()
    with pytest.raises(Disconnected):
        task.result()


# Several threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_every_thread_gets_its_own_replies_in_whatever_order_they_come(ends: Ends, seed: int) -> None:
    choose = random.Random(seed)
    threads, rounds = 6, 12

    def work(number: int) -> bool:
        return all(
            ends.channel.call("echo", (number, n), DEADLINE_S) == (number, n) for n in range(rounds)
        )  # fmt: skip

    tasks = [Task(work, number) for number in range(threads)]
    waiting: list[Call] = []
    active = threads
    while active:
        # Every thread that is not done has called, or is about to.
        for _ in range(choose.randint(max(1, len(waiting)), active) - len(waiting)):
            waiting.append(ends.peer.expect("echo"))
        choose.shuffle(waiting)
        answered = waiting[: choose.randint(1, len(waiting))]
        del waiting[: len(answered)]
        active -= sum(call.args[1] == rounds - 1 for call in answered)
        stream = b"".join(ends.peer.reply(call, call.args) for call in answered)
        cut = choose.randint(1, len(stream) - 1)
        ends.peer.send(stream[:cut])
        ends.peer.send(stream[cut:])
    assert all(task.result() for task in tasks)


def test_a_reader_that_has_its_reply_hands_its_role_on(ends: Ends) -> None:
    first, first_call = ends.reader()
    others = [ends.call("other", n) for n in range(3)]
    calls = [ends.peer.expect("other") for _ in others]
    ends.peer.answer(first_call, "first")
    assert first.result() == "first"
    # The replies come one by one, each when the thread before is gone: somebody must be reading.
    for call in calls:
        ends.peer.answer(call, call.args[0])
        assert others[call.args[0]].result() == call.args[0]


def test_a_reader_that_gives_up_hands_its_role_on(ends: Ends) -> None:
    hurried, call = ends.reader(timeout_s=SHORT_S)
    patient = ends.call("patient")
    patient_call = ends.peer.expect("patient")
    with pytest.raises(TimedOut, match=r"no reply from the peer within 0\.1 s") as failure:
        hurried.result()
    assert isinstance(failure.value, StorageError)
    assert isinstance(failure.value, TransientError)
    ends.peer.send(ends.peer.reply(call, "too late"), ends.peer.reply(patient_call, "in time"))
    assert patient.result() == "in time"
    assert ends.channel.alive


def test_a_thread_that_waits_for_another_to_read_gives_up_in_time(ends: Ends) -> None:
    reader, call = ends.reader()
    hurried = ends.call("hurried", timeout_s=SHORT_S)
    late = ends.peer.expect("hurried")
    with pytest.raises(TimedOut):
        hurried.result()
    ends.peer.send(ends.peer.reply(late, "too late"), ends.peer.reply(call, "done"))
    assert reader.result() == "done"


def test_a_reply_that_comes_too_late_is_dropped(ends: Ends) -> None:
    hooked: list[Any] = []
    hurried = Task(ends.channel.call, "hurried", (), SHORT_S, hook=lambda *what: hooked.append(what))
    late = ends.peer.expect("hurried")
    assert isinstance(hurried.outcome(), TimedOut)
    task = ends.call("next")
    call = ends.peer.expect("next")
    ends.peer.send(ends.peer.reply(late, "too late"), ends.peer.reply(call, "mine"))
    assert task.result() == "mine"
    assert hooked == []


def test_a_reply_that_came_while_its_thread_was_not_yet_waiting(ends: Ends) -> None:
    """Another thread may read a reply before the caller has begun to wait for it."""
    for number in range(200):
        reader = ends.call("a")
        other = ends.call("b")
        calls = [ends.peer.expect(), ends.peer.expect()]
        if number % 2:
            calls.reverse()
        ends.peer.send(*(ends.peer.reply(call, call.name) for call in calls))
        assert (reader.result(), other.result()) == ("a", "b")


# The background ---------------------------------------------------------------------------------------


def test_the_background_delivers_what_comes_while_nobody_calls(ends: Ends) -> None:
    background = ends.background()
    # It goes on reading until a thread has had its reply.
    task = ends.call()
    ends.peer.answer(ends.peer.expect(), "mine")
    assert task.result() == "mine"
    background.result()


def test_the_background_leaves_the_socket_to_threads_that_call(ends: Ends) -> None:
    task = ends.call()
    ends.peer.answer(ends.peer.expect(), None)
    task.result()
    ends.peer.send(ends.peer.call("info", {}))
    ends.channel.attend(0.0)
    assert ends.called == [], "there was a call since the last time"
    ends.channel.attend(0.0)
    assert len(ends.called) == 1


def test_the_background_does_not_read_while_another_thread_does(ends: Ends) -> None:
    reader, call = ends.reader()
    ends.channel.attend(DEADLINE_S)
    ends.channel.attend(DEADLINE_S)
    ends.channel.drain()
    ends.peer.answer(call, "mine")
    assert reader.result() == "mine"


def test_the_background_hands_over_to_those_that_still_wait(ends: Ends) -> None:
    background = ends.background()
    first, second = ends.call("first"), ends.call("second")
    calls = {call.name: call for call in (ends.peer.expect(), ends.peer.expect())}
    ends.peer.answer(calls["first"], 1)
    assert first.result() == 1
    background.result()
    ends.peer.answer(calls["second"], 2)
    assert second.result() == 2


def test_a_turn_of_the_background_ends(ends: Ends) -> None:
    ends.channel.attend(0.01)
    ends.channel.attend(0.01)
    assert ends.channel.alive


def test_draining_delivers_all_that_has_arrived_and_waits_for_nothing(ends: Ends) -> None:
    ends.channel.drain()
    ends.peer.send(*(ends.peer.call("info", n) for n in range(3)))
    ends.peer.send(ends.peer.call("info", 3))
    ends.channel.drain()
    assert [args[0] for _, args, _ in ends.called] == [0, 1, 2, 3]


def test_a_heartbeat_is_sent_after_a_silence_only(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEARTBEAT_S", 3600.0)
    ends.channel.beat()
    ends.raw.setblocking(False)
    with pytest.raises(BlockingIOError):
        ends.raw.recv(100)
    monkeypatch.setattr(limits, "HEARTBEAT_S", 0.0)
    ends.channel.beat()
    assert codec_for(b"M5").decode(ends.raw.recv(100)[4:]) == (-1, 0, ".reply", None)
    # It is no call: the background reads all the same.
    ends.channel.attend(0.0)
    ends.peer.send(ends.peer.call("info", {}))
    ends.channel.beat()
    ends.channel.attend(0.0)
    assert len(ends.called) == 1


# What ends a channel ----------------------------------------------------------------------------------


def garbage() -> Iterator[Any]:
    codec = codec_for(b"M5")

    def framed(payload: bytes) -> bytes:
        return len(payload).to_bytes(4, "big") + payload

    def message(*parts: Any) -> bytes:
        # Whether the codec frames by itself or not does not matter here.
        data = codec.encode(*parts)
        return data if len(data) == 4 + int.from_bytes(data[:4], "big") else framed(data)

    yield pytest.param(b"\xff\xff\xff\xff", id="a length beyond the limit")
    yield pytest.param(framed(b""), id="an empty message")
    yield pytest.param(framed(b"\xc1"), id="no msgpack")
    yield pytest.param(framed(b"\x01\x02"), id="two values")
    yield pytest.param(framed(b"\x91" * 1000 + b"\xc0"), id="a deep one")
    yield pytest.param(message(7, 0, ".reply", None), id="a reply to nothing")
    yield pytest.param(message(-2, 0, ".reply", None), id="a reply to less than nothing")
    yield pytest.param(message(0, 0, "info", ({},)), id="a call that wants a reply")


@pytest.mark.parametrize("sent", list(garbage()))
def test_what_breaks_the_protocol_ends_the_channel(ends: Ends, sent: bytes) -> None:
    tasks = [ends.call() for _ in range(2)]
    for _ in tasks:
        ends.peer.expect("ping")
    ends.peer.send(sent)
    for task in tasks:
        with pytest.raises(Disconnected, match="the connection to the peer was lost: ") as failure:
            task.result(PROMPT_S)
        assert isinstance(failure.value.__cause__, PeerError)
    assert not ends.channel.alive
    (death,) = ends.deaths
    assert isinstance(death, PeerError)
    assert ends.peer.expect_end() == []


def test_messages_before_what_breaks_the_protocol_reveal_nothing_later(ends: Ends) -> None:
    """A reply in the same segment either arrives or its call fails; the call behind it fails."""
    first, second = ends.call("first"), ends.call("second")
    calls = {call.name: call for call in (ends.peer.expect(), ends.peer.expect())}
    ends.peer.send(ends.peer.reply(calls["first"], 1), b"\xff\xff\xff\xff")
    outcome = first.outcome(PROMPT_S)
    assert outcome == 1 or isinstance(outcome, Disconnected)
    assert isinstance(second.outcome(PROMPT_S), Disconnected)


def test_a_huge_length_is_refused_before_anything_of_the_message_is_there(ends: Ends) -> None:
    def receive() -> None:
        task = ends.call()
        ends.peer.expect()
        ends.peer.send((limits.FRAME_BYTES + 1).to_bytes(4, "big"), b"x" * 1000)
        task.outcome(PROMPT_S)

    assert peak_bytes(receive) < MEGABYTE
    assert not ends.channel.alive
    assert isinstance(ends.deaths[0], FrameTooLarge)


@pytest.mark.parametrize("end", ["close", "reset"])
def test_the_end_in_the_middle_of_a_message(ends: Ends, end: str) -> None:
    task = ends.call()
    call = ends.peer.expect()
    ends.peer.send(ends.peer.reply(call, b"x" * 1000)[:500])
    getattr(ends.peer, end)()
    with pytest.raises(Disconnected):
        task.result(PROMPT_S)
    assert len(ends.deaths) == 1


def test_everybody_is_told_of_the_end(ends: Ends) -> None:
    tasks = [ends.call(str(number)) for number in range(20)]
    for _ in tasks:
        ends.peer.expect()
    ends.peer.close()
    assert all(type(task.outcome(PROMPT_S)) is Disconnected for task in tasks)
    assert len(ends.deaths) == 1
    with pytest.raises(Disconnected):
        ends.channel.call("ping", (), DEADLINE_S)
    with pytest.raises(Disconnected):
        ends.channel.send(b"", DEADLINE_S)
    ends.channel.drain()
    ends.channel.attend(DEADLINE_S)
    ends.channel.beat()


def test_closing_wakes_everybody(ends: Ends) -> None:
    tasks = [ends.call(str(number)) for number in range(20)]
    for _ in tasks:
        ends.peer.expect()
    ends.channel.close()
    ends.channel.close()
    for task in tasks:
        with pytest.raises(Disconnected, match="the storage was closed"):
            task.result(PROMPT_S)
    assert len(ends.deaths) == 1
    assert ends.peer.expect_end() == []


def test_the_deadline_of_one_call_is_not_that_of_others(ends: Ends) -> None:
    """A channel that is given up because a call took too long: to others it is a lost connection."""
    task = ends.call()
    ends.peer.expect("ping")
    ends.channel.close(TimedOut("the vote took too long"))
    outcome = task.outcome(PROMPT_S)
    assert type(outcome) is Disconnected
    assert str(outcome) == "the vote took too long"


def test_closing_while_the_background_reads(ends: Ends) -> None:
    background = ends.background()
    ends.channel.close()
    background.result(PROMPT_S)
    assert ends.peer.expect_end() == []


@pytest.mark.parametrize("seed", range(10))
def test_calls_that_race_the_end(ends: Ends, seed: int) -> None:
    choose = random.Random(seed)
    started = threading.Barrier(9)

    def call_until_it_ends() -> BaseException:
        started.wait(DEADLINE_S)
        try:
            while True:
                ends.channel.call("ping", (), DEADLINE_S)
        except BaseException as problem:
            return problem

    tasks = [Task(call_until_it_ends) for _ in range(8)]
    started.wait(DEADLINE_S)
    for _ in range(choose.randint(0, 40)):
        ends.peer.answer(ends.peer.expect(), None)
    (ends.channel.close if seed % 2 else ends.peer.close)()
    assert {type(task.result(PROMPT_S)) for task in tasks} == {Disconnected}


def test_a_hook_that_fails_ends_the_channel(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    """What a reply did not do to the cache can't be made up for: everything is verified anew."""

    def hook(context: Any, value: Any) -> None:
        raise RuntimeError("no room")

    other = ends.call("other")
    ends.peer.expect("other")
    task = Task(ends.channel.call, "hooked", (), DEADLINE_S, hook=hook)
    ends.peer.answer(ends.peer.expect("hooked"), 1)
    assert isinstance(other.outcome(PROMPT_S), Disconnected)
    with pytest.raises(RuntimeError, match="no room"):
        task.result(PROMPT_S)
    assert not ends.channel.alive
    assert "a fault while its messages were applied" in caplog.text


def test_a_listener_that_fails_ends_the_channel(caplog: pytest.LogCaptureFixture) -> None:
    ends = Ends()

    def fail(name: str, args: Any) -> None:
        raise RuntimeError("no room")

    ends.channel.listen(fail, ends.deaths.append)
    with contextlib.closing(ends):
        task = ends.call()
        call = ends.peer.expect()
        ends.peer.send(ends.peer.call("info", {}), ends.peer.reply(call, 1))
        with pytest.raises(Disconnected, match="no room"):
            task.result(PROMPT_S)
        assert "a fault while its messages were applied" in caplog.text


def test_a_peer_that_does_not_read_is_given_up(ends: Ends) -> None:
    """Within the deadline, and for everybody: half a message has been sent."""
    waiting = ends.call("waiting")
    ends.peer.expect("waiting")
    with pytest.raises(TimedOut, match="the peer does not read what it is sent"):
        ends.channel.call("large", (b"x" * 10 * MEGABYTE,), SHORT_S)
    assert not ends.channel.alive
    assert isinstance(waiting.outcome(PROMPT_S), Disconnected)
    assert len(ends.deaths) == 1


def test_whoever_waits_to_send_while_the_peer_does_not_read(ends: Ends) -> None:
    large = ends.call("large", b"x" * 10 * MEGABYTE, timeout_s=1.0)
    ends.raw.recv(1)  # the first byte is there: that thread is sending, and can't go on
    small = [ends.call("small", timeout_s=SHORT_S), ends.call("small"), ends.call("small")]
    assert all(isinstance(task.outcome(PROMPT_S), Disconnected) for task in (large, *small))
    assert isinstance(small[0].outcome(), TimedOut)
    assert type(small[1].outcome()) is type(small[2].outcome()) is Disconnected
    assert not ends.channel.alive


def test_a_peer_that_goes_while_it_is_sent_something(ends: Ends) -> None:
    large = ends.call("large", b"x" * 10 * MEGABYTE)
    ends.raw.recv(1)
    ends.peer.close()
    outcome = large.outcome(PROMPT_S)
    assert isinstance(outcome, Disconnected)
    assert not isinstance(outcome, TimedOut)


def test_a_large_message_that_goes_out_in_pieces(ends: Ends) -> None:
    data = random.Random(1).randbytes(3 * MEGABYTE)
    task = ends.call("large", data)
    call = ends.peer.expect("large", timeout_s=DEADLINE_S)
    assert call.args == (data,)
    answering = Task(ends.peer.answer, call, data)
    assert task.result() == data
    answering.result()


def test_no_file_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        ends = Ends().listen()
        task = ends.call()
        call = ends.peer.expect()
        match number % 3:
            case 0:
                ends.peer.answer(call, None)
            case 1:
                ends.peer.close()
            case 2:
                ends.channel.close()
        task.outcome(PROMPT_S)
        ends.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_belongs_to_the_parent_process_is_left_in_peace(ends: Ends) -> None:
    """Abandoning closes this process's handle: no byte is sent, and the connection stays open for others."""
    ends.channel.abandon()
    assert not ends.channel.alive
    with pytest.raises(Disconnected, match="belongs to the parent process"):
        ends.channel.call("ping", (), DEADLINE_S)
    ends.inherited.sendall(b"the parent's")
    assert ends.raw.recv(100) == b"the parent's"
    ends.raw.sendall(b"the server's")
    assert ends.inherited.recv(100) == b"the server's"


def test_delivery_is_one_thread_at_a_time_and_in_order() -> None:
    """While a call by the peer is delivered, the replies behind it wait, whoever they are for."""
    ends = Ends()
    held = Held()
    delivered: list[Any] = []

    def on_call(name: str, args: Any) -> None:
        held.stop_here()
        delivered.append(args)

    ends.channel.listen(on_call, ends.deaths.append)
    with contextlib.closing(ends):
        first, second = ends.call("first"), ends.call("second")
        calls = {call.name: call for call in (ends.peer.expect(), ends.peer.expect())}
        ends.peer.send(
            ends.peer.call("invalidateTransaction", T2, [OID, OTHER]),
            ends.peer.reply(calls["second"], 2),
            ends.peer.reply(calls["first"], 1),
        )
        held.wait_for_entry()
        assert first.is_held_up()
        assert second.is_held_up()
        assert delivered == []
        held.let_go()
        assert (first.result(), second.result()) == (1, 2)
        assert len(delivered) == 1


def test_a_thread_that_comes_just_as_the_role_is_passed_on(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take the role before it is given to one that waits. Then that one goes on waiting: two threads
    that read one stream would mix it up."""
    latecomers: list[Task] = []
    still_waiting: list[int] = []
    pass_on = Channel._pass_on

    def delayed(channel: Channel) -> None:
        if not latecomers:
            latecomers.append(ends.call("latecomer"))
            ends.peer.expect("latecomer")
            ends.make_reader(latecomers[0])
        pass_on(channel)
        still_waiting.append(len(channel._waiting))

    monkeypatch.setattr(Channel, "_pass_on", delayed)
    first, call = ends.reader()
    waiting = ends.call("waiting")
    waiting_call = ends.peer.expect("waiting")
    wait_until(lambda: bool(ends.channel._waiting), "a thread that waits for another to read")
    ends.peer.answer(call, 1)
    assert first.result() == 1
    assert still_waiting == [1]
    ends.peer.answer(waiting_call, 2)
    assert waiting.result() == 2
    ends.channel.close()
    assert isinstance(latecomers[0].outcome(), Disconnected)
