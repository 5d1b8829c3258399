"""Transactions side by side: their locks, the batches they are committed in, and which thread does what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ZODB.POSException import ConflictError, POSKeyError, ReadConflictError, StorageError
from ZODB.utils import p64

from tests.server.assertions import nothing_is_locked
from tests.server.inmemory import Call, MemoryHouse, ParallelEngine, Peer, in_order
from zeoid import limits
from zeoid.model import MAX_TID, NO_TID
from zeoid.wire.connection import ServerConnection

A, B, C, D = (p64(number) for number in range(1, 5))


@pytest.fixture
def engine() -> ParallelEngine:
    return ParallelEngine()


@pytest.fixture
def house(make_house: Callable[..., MemoryHouse], engine: ParallelEngine) -> MemoryHouse:
    return make_house({"1": engine})


def finishing(house: MemoryHouse, *oids: bytes) -> list[tuple[Peer, Call]]:
    """Clients each of which has asked to finish a transaction that wrote one of *oids*."""
    peers = [house.peer(name=f"writer of {oid.hex()}") for oid in oids]
    for peer, oid in zip(peers, oids, strict=True):
        assert peer.prepare(oid).result == ()
    return [(peer, peer.start("tpc_finish", 1)) for peer in peers]


# Locks ----------------------------------------------------------------------------------------------------


def test_transactions_of_different_objects_do_not_wait_for_each_other(house: MemoryHouse) -> None:
    peers = {oid: house.peer() for oid in (A, B, C)}
    for oid, peer in peers.items():
        assert peer.prepare(oid).result == ()
    assert house.hosted.status()["active_txns"] == 3
    tids = [peers[oid].ask("tpc_finish", 1) for oid in (C, A, B)]
    assert tids == sorted(set(tids))  # in the order of the finishes, not of the votes
    assert house.peer().ask("lastTransaction") == tids[-1]
    nothing_is_locked(house.hosted)


def test_nor_do_those_of_one_connection(house: MemoryHouse) -> None:
    peer, reader = house.peer(), house.peer()
    assert peer.prepare(A, id=1).result == peer.prepare(B, id="b").result == ()
    second = peer.ask("tpc_finish", "b")
    first = peer.ask("tpc_finish", 1)
    assert reader.told() == [(second, (B,)), (first, (A,))]


def test_one_transaction_of_a_connection_is_aborted_and_the_other_goes_on(house: MemoryHouse) -> None:
    peer, waiter = house.peer(), house.peer()
    peer.prepare(A, id=1)
    peer.prepare(B, id=2)
    vote = waiter.prepare(A)
    peer.ask("tpc_abort", 1)
    waiter.read()
    assert vote.result == ()
    assert peer.ask("tpc_finish", 2)
    with pytest.raises(POSKeyError):
        peer.ask("loadBefore", A, MAX_TID)


def test_a_vote_waits_for_one_that_holds_some_of_its_objects(house: MemoryHouse) -> None:
    holder, waiter, third = house.peer(), house.peer(), house.peer()
    assert holder.prepare(A, B).result == ()
    vote = waiter.prepare(B, C)
    behind = third.prepare(C)  # which nobody holds yet, but somebody came before
    assert not vote.answered
    assert not behind.answered
    assert house.hosted.status()["waiting"] == 2
    assert third.ask("ping") is None
    holder.ask("tpc_abort", 1)
    waiter.read()
    assert vote.result == ()
    waiter.ask("tpc_abort", 1)
    third.read()
    assert behind.result == ()


def test_the_one_that_waited_meets_what_was_committed(house: MemoryHouse) -> None:
    holder, waiter = house.peer(), house.peer()
    assert holder.prepare(A, data=b"first").result == ()
    vote = waiter.prepare(A, data=b"second")
    tid = holder.ask("tpc_finish", 1)
    waiter.read()
    assert vote.result == ({"oid": A, "serials": (tid, NO_TID), "data": b"second"},)


def test_who_only_depends_on_an_object_shares_it(house: MemoryHouse) -> None:
    writer = house.peer()
    serial = writer.commit(A)
    readers = [house.peer(), house.peer()]
    for oid, reader in zip((B, C), readers, strict=True):
        reader.begin()
        reader.one_way("checkCurrentSerialInTransaction", A, serial, 1)
        reader.store(oid)
        assert reader.ask("vote", 1) == ()
    vote = writer.prepare(A)
    assert not vote.answered
    readers[0].ask("tpc_finish", 1)
    writer.read()
    assert not vote.answered
    readers[1].ask("tpc_abort", 1)
    writer.read()
    assert vote.result == ()


def test_who_depends_on_an_object_waits_for_its_writer(house: MemoryHouse) -> None:
    writer, reader = house.peer(), house.peer()
    serial = writer.commit(A)
    assert writer.prepare(A).result == ()
    reader.begin()
    reader.one_way("checkCurrentSerialInTransaction", A, serial, 1)
    vote = reader.start("vote", 1)
    assert not vote.answered
    writer.ask("tpc_finish", 1)
    house.work()
    reader.read()
    with pytest.raises(ReadConflictError):
        _ = vote.result
    nothing_is_locked(house.hosted)


def test_a_vote_does_not_wait_for_ever(house: MemoryHouse) -> None:
    """Whoever holds its object is at the disk, which has no deadline."""
    (holder, finish), _ = finishing(house, A, B)
    waiter = house.peer()
    vote = waiter.prepare(A)
    house.later(limits.VOTE_WAIT_S - 1)
    assert not vote.answered
    house.later(2)
    waiter.read()
    with pytest.raises(ConflictError, match="waited 300 s"):
        _ = vote.result
    house.work()
    holder.read()
    assert finish.answered


# Batches --------------------------------------------------------------------------------------------------


def test_what_is_finished_while_the_disk_is_busy_is_one_batch(
    house: MemoryHouse, engine: ParallelEngine
) -> None:
    reader = house.peer()
    (first_peer, first), *others = finishing(house, A, B, C, D)
    assert len(house.commit) == 1
    house.commit.run()
    first_peer.read()
    assert [first.result] == engine.batches[0]
    assert not any(finish.answered for _, finish in others)
    house.commit.run()
    for peer, _ in others:
        peer.read()
    tids = [finish.result for _, finish in others]
    assert engine.batches == [[first.result], tids]
    assert [first.result, *tids] == sorted({first.result, *tids})
    assert reader.told() == list(zip([first.result, *tids], [(A,), (B,), (C,), (D,)], strict=True))
    assert len(house.commit) == 0
    nothing_is_locked(house.hosted)


def test_all_of_a_batch_is_written_to_a_client_at_once(house: MemoryHouse) -> None:
    """Replies and invalidations in the order of the tids, whoever it is."""
    reader = house.peer()
    _, *others = finishing(house, A, B, C, D)
    house.commit.run()
    for peer in (reader, *(peer for peer, _ in others)):
        peer.read()
        peer.events.clear()
    house.commit.run()
    for place, (peer, finish) in enumerate(others):
        assert len(peer.wire.writes) == 1
        peer.read()
        expected = ["call invalidateTransaction"] * 3
        expected[place] = "reply tpc_finish"
        assert list(in_order(peer.events)) == expected
        assert finish.answered
    assert len(reader.wire.writes) == 1
    assert len(reader.told()) == 3


def test_a_client_that_breaks_down_in_a_batch_keeps_nobody_from_their_part(house: MemoryHouse) -> None:
    readers = [house.peer() for _ in range(5)]
    _, *others = finishing(house, A, B, C)
    house.commit.run()
    readers[0].wire.problem = ConnectionResetError("reset by peer")
    readers[2].wire.on_write = readers[2].disconnect
    house.commit.run()
    for peer, finish in others:
        peer.read()
        assert finish.answered
    for reader in (readers[1], readers[3], readers[4]):
        assert len(reader.told()) == 3
    assert {readers[0].session, readers[2].session} & house.hosted.clients == set()


def test_the_next_batch_goes_to_the_disk_before_the_replies_to_the_last(house: MemoryHouse) -> None:
    (peer, _), *_ = finishing(house, A, B)
    house.commit.work()
    assert len(house.commit) == 0
    at_the_reply = []
    peer.wire.on_write = lambda: at_the_reply.append(len(house.commit))
    house.commit.land()
    assert at_the_reply == [1]


@pytest.mark.parametrize(
    ("bound", "value", "sizes"),
    [("BATCH_TRANSACTIONS", 2, [1, 2, 2]), ("BATCH_BYTES", 3000, [1, 2, 2]), ("BATCH_BYTES", 1, [1] * 5)],
)
def test_a_batch_has_bounds(
    house: MemoryHouse, engine: ParallelEngine, monkeypatch: pytest.MonkeyPatch, bound: str, value: int,
    sizes: list[int],
) -> None:  # fmt: skip
    """A transaction that is larger than a batch may be is one of its own."""
    monkeypatch.setattr(limits, bound, value)
    peer, _ = house.peer(), house.peer()
    for number in range(5):
        assert peer.prepare(p64(number), data=b"x" * 1000, id=number).result == ()
    finishes = [peer.start("tpc_finish", number) for number in range(5)]
    house.work()
    peer.read()
    assert [len(batch) for batch in engine.batches] == sizes
    tids = [finish.result for finish in finishes]
    assert tids == sorted(tids) == [tid for batch in engine.batches for tid in batch]


def test_it_is_too_late_to_abort_what_is_on_its_way_to_the_disk(house: MemoryHouse) -> None:
    (first_peer, first), (second_peer, second) = finishing(house, A, B)
    first_peer.ask("tpc_abort", 1)
    second_peer.ask("tpc_abort", 1)  # which has not gone there yet, but the answer might be on its way
    house.work()
    first_peer.read()
    second_peer.read()
    assert first.result < second.result
    assert first_peer.told() == [(second.result, (B,))]


def test_an_engine_that_fails_to_commit_stops_the_server(house: MemoryHouse, engine: ParallelEngine) -> None:
    """Neither those of the batch nor those that gather get an answer, and nobody is told of anything."""
    reader, holder = house.peer(), house.peer()
    assert holder.prepare(D).result == ()
    finishes = finishing(house, A, B, C)
    house.commit.run()
    before = [reader.told(), house.hosted.visible.tid]
    late = finishing(house, p64(8))
    engine.failing = "commit"
    house.commit.run()
    (reason,) = house.fatal
    assert reason.startswith("storage '1' failed to commit: OSError(28,")
    engine.failing = ""
    for peer, finish in [*finishes[1:], *late]:
        peer.read()
        assert not finish.answered
    assert [reader.told(), house.hosted.visible.tid] == before
    for peer in (holder, *(peer for peer, _ in finishes)):
        peer.disconnect()
    assert len(house.commit) == 0
    assert len(engine.batches) == 1
    assert engine.abandoned == 0


# Which thread ---------------------------------------------------------------------------------------------


def test_the_only_client_waits_for_no_thread(house: MemoryHouse, engine: ParallelEngine) -> None:
    only = house.peer()
    assert only.prepare(A).result == ()
    finish = only.start("tpc_finish", 1)
    assert len(house.commit) == 0
    assert engine.batches == [[finish.result]]


def test_with_a_second_client_the_disk_holds_up_nobody(house: MemoryHouse, engine: ParallelEngine) -> None:
    writer, other = house.peer(), house.peer()
    assert writer.prepare(A).result == ()
    finish = writer.start("tpc_finish", 1)
    assert not finish.answered
    assert other.ask("ping") is None
    assert engine.batches == []
    house.commit.run()
    writer.read()
    assert finish.answered


def test_the_disk_of_one_storage_holds_up_no_client_of_another(
    make_house: Callable[..., MemoryHouse],
) -> None:
    house = make_house({"lions": ParallelEngine(), "tigers": ParallelEngine()})
    lion, tiger = Peer(house).register("lions"), Peer(house).register("tigers")
    assert lion.prepare(A).result == ()
    finish = lion.start("tpc_finish", 1)
    assert not finish.answered
    tiger.disconnect()
    house.commit.run()
    lion.read()
    assert finish.answered


def test_the_only_client_that_is_left_waits_for_what_is_at_the_disk(
    house: MemoryHouse, engine: ParallelEngine
) -> None:
    writer, other = house.peer(), house.peer()
    assert writer.prepare(A, id=1).result == writer.prepare(B, id=2).result == ()
    first = writer.start("tpc_finish", 1)
    other.disconnect()
    second = writer.start("tpc_finish", 2)
    assert not second.answered
    house.commit.work()
    assert len(engine.batches) == 1
    assert not second.answered
    house.commit.land()
    writer.read()
    assert (first.result, second.result) == (engine.batches[0][0], engine.batches[1][0])


@pytest.mark.parametrize(("more", "beside"), [(0, 0), (1, 1)])
def test_a_large_transaction_is_prepared_in_a_thread(house: MemoryHouse, more: int, beside: int) -> None:
    peer, other = house.peer(), house.peer()
    count = limits.PREPARE_INLINE_OPERATIONS + more
    vote = peer.prepare(*(p64(number) for number in range(1, count + 1)))
    assert len(house.beside) == beside
    assert vote.answered is not bool(beside)
    assert other.commit(p64(100_000))
    waiting = other.prepare(A)
    assert not waiting.answered
    house.beside.run_all()
    peer.read()
    assert vote.result == ()
    tid = peer.ask("tpc_finish", 1)
    assert len(other.told()[-1][1]) == count
    assert peer.ask("getTid", p64(count)) == tid


def test_a_large_transaction_fails_in_its_thread(
    house: MemoryHouse, engine: ParallelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PREPARE_INLINE_OPERATIONS", 1)
    peer = house.peer()
    engine.failing = "prepare"
    vote = peer.prepare(A, B)
    assert not vote.answered
    assert house.hosted.busy
    house.beside.run()
    peer.read()
    with pytest.raises(StorageError, match="No space left"):
        _ = vote.result
    nothing_is_locked(house.hosted)
    assert house.fatal == []
    engine.failing = ""
    assert peer.commit(A)


def test_a_large_transaction_is_given_up_while_it_is_prepared(
    house: MemoryHouse, engine: ParallelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is told to forget it, and its objects stay locked until then."""
    monkeypatch.setattr(limits, "PREPARE_INLINE_OPERATIONS", 1)
    peer, other = house.peer(), house.peer()
    peer.prepare(A, B)
    house.beside.work()
    peer.ask("tpc_abort", 1)
    vote = other.prepare(A)
    assert (vote.answered, engine.abandoned) == (False, 0)
    house.beside.land()
    other.read()
    assert (vote.result, engine.abandoned) == ((), 1)


# Announcements --------------------------------------------------------------------------------------------


def test_what_many_are_told_is_encoded_once_for_each_coding(
    house: MemoryHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = [Peer(house, coding=coding).register() for coding in ("M5", "Z5") * 5]
    writer = house.peer()
    assert writer.prepare(A, B).result == ()
    encoded = []
    call = ServerConnection.call

    def counting(self: ServerConnection, name: str, *args: Any) -> bytes:
        encoded.append((self.protocol, name))
        return call(self, name, *args)

    monkeypatch.setattr(ServerConnection, "call", counting)
    tid = writer.ask("tpc_finish", 1)
    assert sorted(encoded) == [("M5", "invalidateTransaction"), ("Z5", "invalidateTransaction")]
    for reader in readers:
        assert reader.told() == [(tid, (A, B))]
