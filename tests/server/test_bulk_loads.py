"""Many loads with one message: each as true as a single one, and nobody else has to wait for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ReadConflictError
from ZODB.utils import p64

from tests.server.inmemory import MemoryHouse, ParallelEngine, Peer, in_order
from zeoid import limits
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ServerError
from zeoid.model import MAX_TID, Revision, tid_after

A, B, C, UNKNOWN = (p64(number) for number in (1, 2, 3, 99))
codings = pytest.mark.parametrize("coding", ["M5", "Z5"])


class CountingEngine(StorageEngine):
    """Counts the loads, and fails those of one object on demand."""

    def __init__(self, *, inline: bool = True) -> None:
        super().__init__(MappingStorage("counting"), inline=inline)
        self.loads = 0
        self.failing = b""

    def load_before(self, oid: bytes, tid: bytes) -> Revision | None:
        self.loads += 1
        if oid == self.failing:
            raise OSError("the disk is gone")
        return super().load_before(oid, tid)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def house(engine: CountingEngine) -> Iterator[MemoryHouse]:
    house = MemoryHouse({"1": engine})
    yield house
    house.close()


@codings
def test_they_are_answered_in_order(house: MemoryHouse, engine: CountingEngine, coding: str) -> None:
    peer = house.peer(coding=coding)
    first = peer.commit(A, B, data=b"one")
    second = peer.commit(B, C, data=b"two")
    oids = [C, UNKNOWN, A, B, A]
    house.hosted.counts.loads = engine.loads = 0
    assert list(peer.ask("loadBeforeMany", oids, MAX_TID)) == [
        (b"two", second, None), None, (b"one", first, None), (b"two", second, None), (b"one", first, None)
    ]  # fmt: skip
    assert (house.hosted.counts.loads, engine.loads) == (5, 5)
    assert list(peer.ask("loadBeforeMany", oids, second)) == [
        None, None, (b"one", first, None), (b"one", first, second), (b"one", first, None)
    ]  # fmt: skip
    assert list(peer.ask("loadBeforeMany", [], MAX_TID)) == []


def test_a_reply_ends_where_it_would_become_too_large(
    house: MemoryHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BULK_LOAD_BYTES", 2500)
    peer = house.peer()
    tid = peer.commit(A, B, C, data=bytes(1000))
    oids = [A, B, UNKNOWN, C, A, B]
    assert len(peer.ask("loadBeforeMany", oids, MAX_TID)) == 4
    peer.commit(A, data=bytes(100_000))
    replies = peer.ask("loadBeforeMany", oids, MAX_TID)
    assert [len(data) for data, _, _ in replies] == [100_000]
    assert list(peer.ask("loadBeforeMany", [UNKNOWN, B, A], tid)) == [None] * 3


@pytest.mark.parametrize(
    "oids",
    [None, 7, A, "12345678", {A: B}, [A, None], [A, b"short"], [[A]], [A] * (limits.BULK_LOAD_OIDS + 1)],
    ids=lambda oids: repr(oids)[:20],
)
@codings
def test_what_is_no_bulk_load_is_refused_and_harms_nobody(
    house: MemoryHouse, engine: CountingEngine, coding: str, oids: Any
) -> None:
    peer = house.peer(coding=coding)
    peer.commit(A)
    engine.loads = 0
    with pytest.raises(TypeError, match="oids must be up to 100 oids"):
        peer.ask("loadBeforeMany", oids, MAX_TID)
    with pytest.raises(TypeError, match="tid must be tid"):
        peer.ask("loadBeforeMany", [A], None)
    with pytest.raises(TypeError, match="takes"):
        peer.ask("loadBeforeMany", [A])
    assert engine.loads == 0
    assert len(peer.ask("loadBeforeMany", [A] * limits.BULK_LOAD_OIDS, MAX_TID)) == limits.BULK_LOAD_OIDS


def test_before_register_there_is_nothing_to_load(house: MemoryHouse, engine: CountingEngine) -> None:
    with pytest.raises(TypeError, match="before register"):
        Peer(house).ask("loadBeforeMany", [A], MAX_TID)
    assert engine.loads == 0


def test_one_that_fails_is_answered_with_the_fault(house: MemoryHouse, engine: CountingEngine) -> None:
    peer = house.peer()
    peer.commit(A, B)
    engine.failing = B
    with pytest.raises(ServerError, match="the disk is gone"):
        peer.ask("loadBeforeMany", [A, B], MAX_TID)
    assert len(peer.ask("loadBeforeMany", [A], MAX_TID)) == 1


# What may be seen -------------------------------------------------------------------------------------


def test_nothing_is_in_a_reply_before_its_invalidation(make_house: Callable[..., MemoryHouse]) -> None:
    """A transaction that is in the storage, and not announced yet, is not there for a bulk load either."""
    house = make_house({"1": ParallelEngine()})
    writer, reader = house.peer(), house.peer()
    first = writer.commit(A, B, data=b"one")
    writer.begin()
    writer.store(A, b"two")
    writer.store(C, b"two")
    vote = writer.start("vote", 1)
    house.beside.run_all()
    writer.read()
    assert not vote.result
    writer.start("tpc_finish", 1)
    house.commit.work()  # the engine has it, and nobody was told
    assert house.hosted.engine.load_before(C, MAX_TID) is not None
    expected = [(b"one", first, None), (b"one", first, None), None]
    assert list(reader.ask("loadBeforeMany", [A, B, C], MAX_TID)) == expected
    assert list(reader.ask("loadBeforeMany", [A, B, C], tid_after(first))) == expected
    house.commit.land()
    reader.read()
    ((told, _),) = reader.told()[-1:]
    assert list(reader.ask("loadBeforeMany", [A, B], MAX_TID)) == [(b"two", told, None), expected[1]]
    assert list(reader.ask("loadBeforeMany", [A, C], told)) == [(b"one", first, told), None]


# Whose turn it is -------------------------------------------------------------------------------------


def full(oid: bytes) -> tuple[Any, ...]:
    """As much as one message may ask for."""
    return "loadBeforeMany", [oid] * limits.BULK_LOAD_OIDS, MAX_TID


def test_between_two_of_them_others_are_served(house: MemoryHouse, engine: CountingEngine) -> None:
    """One segment asks for a lot. What comes meanwhile on other connections is answered in between."""
    greedy, other = house.peer(), house.peer()
    tid = greedy.commit(A)
    engine.loads = 0
    calls = greedy.calls(full(A), full(A), ("ping",), full(A), ("lastTransaction",))
    for answered in ([True, False, False, False, False], [True, True, False, False, False]):
        assert [call.answered for call in calls] == answered
        assert engine.loads == answered.count(True) * limits.BULK_LOAD_OIDS
        assert greedy.wire.stopped, "what more it has to say can wait"
        assert other.ask("loadBefore", A, MAX_TID)[1] == tid
        engine.loads -= 1
        assert len(greedy.wire.callbacks) == 1
        greedy.wire.turn()
        greedy.read()
    assert [call.answered for call in calls] == [True, True, True, True, False]
    greedy.wire.turn()
    greedy.read()
    assert calls[-1].result == tid
    assert greedy.wire.callbacks == []
    assert not greedy.wire.stopped


def test_between_many_calls_others_are_served(house: MemoryHouse) -> None:
    """Whoever sends thousands of calls in one segment does not keep the loop for all of them."""
    greedy, other = house.peer(), house.peer()
    tid = greedy.commit(A)
    calls = greedy.calls(*[("ping",)] * (2 * limits.CALLS_PER_TURN + 10))
    for answered in (limits.CALLS_PER_TURN, 2 * limits.CALLS_PER_TURN):
        assert [call.answered for call in calls].count(True) == answered
        assert greedy.wire.stopped
        assert other.ask("loadBefore", A, MAX_TID)[1] == tid
        greedy.wire.turn()
        greedy.read()
    assert all(call.answered for call in calls)
    assert greedy.wire.callbacks == []
    assert not greedy.wire.stopped


def test_small_ones_are_answered_together(house: MemoryHouse) -> None:
    """As long as they are not more than one may be."""
    peer = house.peer()
    peer.commit(A)
    few = "loadBeforeMany", [A] * (limits.BULK_LOAD_OIDS // 4), MAX_TID
    calls = peer.calls(*[few] * 6)
    assert [call.answered for call in calls] == [True] * 4 + [False] * 2
    peer.wire.turn()
    peer.read()
    assert all(call.answered for call in calls)
    assert not peer.wire.stopped
    assert all(call.answered for call in peer.calls(full(A))), "a new segment, a new turn"
    assert peer.wire.callbacks == []


def test_calls_keep_their_order_while_it_is_not_its_turn(house: MemoryHouse) -> None:
    """What was read before the reading stopped waits behind what came first."""
    peer = house.peer()
    tid = peer.commit(A)
    peer.calls(full(A), full(A), full(A))
    load = peer.start("loadBefore", A, MAX_TID)  # it came in the meantime, and is a turn, too
    for _ in range(2):
        assert not load.answered
        peer.wire.turn()
        peer.read()
    assert load.result == (b"data", tid, None)
    assert list(in_order(peer.events))[-4:] == ["reply loadBeforeMany"] * 3 + ["reply loadBefore"]


def test_an_invalidation_between_two_of_them(house: MemoryHouse) -> None:
    """It stands in the stream before the reply that knows of it, and after the one that does not."""
    greedy, writer = house.peer(), house.peer()
    first = writer.commit(A)
    before, after = greedy.calls(full(A), full(A))
    second = writer.commit(A)
    assert greedy.told()[-1][0] == second
    greedy.wire.turn()
    greedy.read()
    assert {start for _, start, _ in before.result} == {first}
    assert {start for _, start, _ in after.result} == {second}
    assert list(in_order(greedy.events))[-3:] == [
        "reply loadBeforeMany", "call invalidateTransaction", "reply loadBeforeMany",
    ]  # fmt: skip


def test_who_does_not_read_gets_no_more_of_them(house: MemoryHouse, engine: CountingEngine) -> None:
    peer = house.peer()
    peer.commit(A)
    engine.loads = 0
    peer.calls(full(A), full(A))
    peer.session.pause()
    peer.wire.turn()
    assert engine.loads == limits.BULK_LOAD_OIDS
    peer.session.resume()
    assert engine.loads == 2 * limits.BULK_LOAD_OIDS


def test_a_connection_that_ends_before_its_next_turn(house: MemoryHouse, engine: CountingEngine) -> None:
    for end in (lambda peer: peer.disconnect(), lambda peer: peer.session.drop("enough")):
        peer = house.peer()
        peer.calls(full(A), full(A))
        loads = engine.loads
        end(peer)
        peer.wire.turn()
        assert engine.loads == loads
        assert peer.wire.stopped


# Storages that are asked in threads -------------------------------------------------------------------


@pytest.fixture
def distant(make_house: Callable[..., MemoryHouse]) -> MemoryHouse:
    """It has A, B and C; a house whose storage may have to wait."""
    return make_house({"1": CountingEngine(inline=False)})


def committed(house: MemoryHouse, peer: Peer, *oids: bytes, data: bytes = b"data") -> bytes:
    call = peer.prepare(*oids, data=data)
    house.commit.run_all()
    peer.read()
    assert not call.result
    finish = peer.start("tpc_finish", 1)
    house.commit.run_all()
    peer.read()
    tid: bytes = finish.result
    return tid


def test_a_storage_that_may_have_to_wait_is_asked_in_a_thread(distant: MemoryHouse) -> None:
    peer = distant.peer()
    tid = committed(distant, peer, A, B)
    call = peer.start("loadBeforeMany", [A, UNKNOWN, B], MAX_TID)
    assert not call.answered
    assert len(distant.beside) == 1, "one thread reads them all"
    distant.beside.run_all()
    peer.read()
    assert list(call.result) == [(b"data", tid, None), None, (b"data", tid, None)]
    assert peer.wire.callbacks == []


@pytest.mark.parametrize("written", [A, B, C])
def test_what_is_overtaken_is_read_again(distant: MemoryHouse, written: bytes) -> None:
    """Its result was right when it was read. By the time it would be sent, an end has been told."""
    peer, writer = distant.peer(), distant.peer()
    first = committed(distant, writer, A, B, C, data=b"one")
    call = peer.start("loadBeforeMany", [A, B], tid_after(first))
    distant.beside.work()
    second = committed(distant, writer, written, data=b"two")
    distant.beside.land()
    peer.read()
    assert call.answered is (written == C)
    distant.beside.run_all()
    peer.read()
    assert list(call.result) == [
        (b"one", first, second if written == oid else None) for oid in (A, B)
    ]  # fmt: skip
    if written != C:
        assert list(in_order(peer.events))[-2:] == ["call invalidateTransaction", "reply loadBeforeMany"]


def test_one_that_is_always_overtaken_fails(distant: MemoryHouse) -> None:
    peer, writer = distant.peer(), distant.peer()
    committed(distant, writer, A, B)
    call = peer.start("loadBeforeMany", [A, B], MAX_TID)
    for tries in range(limits.READ_TRIES):
        assert len(distant.beside) == 1, tries
        distant.beside.work()
        committed(distant, writer, B)
        distant.beside.land()
    peer.read()
    with pytest.raises(ReadConflictError) as caught:
        _ = call.result
    assert caught.value.oid == B


def test_when_it_is_not_known_any_more_what_was_written(make_house: Callable[..., MemoryHouse]) -> None:
    distant = make_house({"1": CountingEngine(inline=False)}, invalidation_log_transactions=1)
    peer, writer = distant.peer(), distant.peer()
    tid = committed(distant, writer, A, B)
    call = peer.start("loadBeforeMany", [A, B], MAX_TID)
    distant.beside.work()
    for _ in range(2):
        committed(distant, writer, C)
    distant.beside.land()
    peer.read()
    assert not call.answered
    distant.beside.run_all()
    peer.read()
    assert list(call.result) == [(b"data", tid, None)] * 2


def test_each_object_counts_for_how_much_is_under_way(
    distant: MemoryHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their replies are kept until they are written. More requests stay where they are meanwhile."""
    peer = distant.peer()
    most = limits.READS_PER_CONNECTION // limits.BULK_LOAD_OIDS
    calls = peer.calls(*[full(A)] * most, ("lastTransaction",))
    assert len(distant.beside) == most
    assert peer.wire.stopped
    assert not calls[-1].answered
    distant.beside.run()
    peer.read()
    assert calls[-1].answered
    assert not peer.wire.stopped
    distant.beside.run_all()
    peer.read()
    assert all(call.answered for call in calls)


def test_a_database_is_looked_at_when_something_is_not_there(
    distant: MemoryHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client asks for what it can know from another only: others have written more than was told of."""
    looks: list[None] = []
    monkeypatch.setattr(distant.hosted, "look", lambda: looks.append(None))
    peer = distant.peer()
    committed(distant, peer, A)
    for oids, looked in (([A, A], 0), ([A, UNKNOWN], 1), ([UNKNOWN], 2)):
        peer.start("loadBeforeMany", oids, MAX_TID)
        distant.beside.run_all()
        assert len(looks) == looked
