"""Races that have lost data elsewhere: on the server, one step at a time, in every order that matters.

The clock, the threads and the network are the test's. What a client was told is read from the bytes that the
server wrote to it, in their order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.POSException import ConflictError, POSKeyError, StorageError, StorageTransactionError, UndoError
from ZODB.utils import p64

from tests.server.assertions import nothing_is_locked
from tests.server.inmemory import NOON, Call, MemoryHouse, ParallelEngine, Peer, in_order
from zeoid import limits
from zeoid.engines.opening import open_filestorage, open_memory
from zeoid.model import MAX_TID, NO_TID

A, B, C = p64(1), p64(2), p64(3)


@pytest.fixture
def houses() -> Iterator[Callable[..., MemoryHouse]]:
    made = []

    def make(**engines: Any) -> MemoryHouse:
        made.append(MemoryHouse({name.strip("_"): engine for name, engine in engines.items()}))
        return made[-1]

    yield make
    for house in made:
        house.close()


@pytest.fixture
def house(houses: Callable[..., MemoryHouse], tmp_path: Path) -> MemoryHouse:
    return houses(_1=open_filestorage(tmp_path / "Data.fs"))


@pytest.fixture(params=["one at a time", "many at once"])
def either_house(request: pytest.FixtureRequest, houses: Callable[..., MemoryHouse]) -> MemoryHouse:
    """An engine that prepares one transaction at a time, and one that prepares many."""
    return houses(_1=open_memory() if request.param == "one at a time" else ParallelEngine())


def finish_in_a_thread(house: MemoryHouse, writer: Peer, *oids: bytes) -> Call:
    """A commit whose finish is up to the test: where there are other clients, it goes to a thread."""
    house.peer(name="idle")
    assert writer.prepare(*oids).result == ()
    return writer.start("tpc_finish", 1)


# Broadcasts -----------------------------------------------------------------------------------------------


def break_by_raising(peer: Peer) -> None:
    peer.wire.problem = ConnectionResetError("reset by peer")


def break_by_leaving(peer: Peer) -> None:
    peer.wire.on_write = peer.disconnect


def break_by_being_dropped(peer: Peer) -> None:
    peer.wire.on_write = lambda: peer.session.drop("it does not read what it is sent")


@pytest.mark.parametrize("break_it", [break_by_raising, break_by_leaving, break_by_being_dropped])
@pytest.mark.parametrize("holds", ["nothing", "a transaction", "a place in the queue"])
def test_a_client_breaks_down_while_a_commit_is_broadcast(
    house: MemoryHouse, break_it: Callable[[Peer], None], holds: str
) -> None:
    """Whoever comes after it in the broadcast hears of the commit all the same, and so does the writer."""
    peers = [house.peer(name=f"peer {number}") for number in range(8)]
    writer = house.peer()
    assert writer.prepare(A).result == ()
    for broken in peers[::2]:
        if holds == "a transaction":
            broken.begin()
            broken.store(B)
        elif holds == "a place in the queue":
            broken.prepare(B)
        break_it(broken)
    tid = writer.ask("tpc_finish", 1)
    for peer in peers[1::2]:
        assert peer.told() == [(tid, (A,))]
    assert house.hosted.clients == {writer.session, *(peer.session for peer in peers[1::2])}
    assert house.hosted.transactions.active == 0
    assert house.hosted.visible.tid == tid
    assert peers[1].commit(C) > tid


def test_the_writer_breaks_down_while_its_commit_is_broadcast(house: MemoryHouse) -> None:
    """It will never know, but the commit is durable: the others must hear of it, and the next one gets on."""
    writer, reader, waiter = house.peer(), house.peer(), house.peer()
    assert writer.prepare(A).result == ()
    vote = waiter.prepare(A, B)
    break_by_raising(writer)
    writer.start("tpc_finish", 1)
    house.commit.run_all()
    (told,) = reader.told()
    assert told == (house.hosted.visible.tid, (A,))
    waiter.read()
    assert [conflict["oid"] for conflict in vote.result] == [A]
    waiter.store(A)
    assert waiter.ask("vote", 1) == ()
    assert waiter.ask("tpc_finish", 1) > told[0]


@pytest.mark.parametrize("seed", range(5))
def test_workers_that_reconnect_all_the_time_miss_nothing(house: MemoryHouse, seed: int) -> None:
    """64 workers leave and come back, some of them in the middle of a broadcast: each of them hears of every
    commit after the tid that it was given when it came, in order, and of none before it."""
    rng = random.Random(seed)
    commits: list[bytes] = []
    workers: list[tuple[Peer, int]] = []

    def come() -> None:
        peer = Peer(house)
        last = peer.ask("register", "1", False)
        assert last == (commits[-1] if commits else NO_TID)
        workers.append((peer, len(commits)))

    for _ in range(64):
        come()
    for _ in range(30):
        leaving = rng.sample(workers, 20)
        for peer, _ in leaving[:10]:
            rng.choice([break_by_raising, break_by_leaving])(peer)
        writer = next(peer for peer, _ in workers if (peer, _) not in leaving)
        commits.append(writer.commit(p64(rng.randrange(5))))
        for peer, came in workers:
            if (peer, came) in leaving[:10]:
                continue
            own = {event.value for event in peer.events if event.name == "tpc_finish"}
            expected = [tid for tid in commits[came:] if tid not in own]
            assert [tid for tid, _ in peer.told()] == expected
        for peer, came in leaving:
            peer.disconnect()
            workers.remove((peer, came))
            come()
    assert len(house.hosted.clients) == 64


# What is told before what ---------------------------------------------------------------------------------

#: What reveals the newest transaction, if anything does: each takes a peer and gives back the tids it saw.
REVEALING: dict[str, Callable[[Peer], list[bytes]]] = {
    "load": lambda peer: [revision[1] for revision in [peer.ask("loadBefore", A, MAX_TID)] if revision],
    "end of a revision": lambda peer: [
        revision[2] for revision in [peer.ask("loadBefore", A, MAX_TID)] if revision and revision[2]
    ],
    "getTid": lambda peer: [peer.ask("getTid", A)],
    "lastTransaction": lambda peer: [peer.ask("lastTransaction")],
    "getInvalidations": lambda peer: [peer.ask("getInvalidations", NO_TID)[0]],
    "record_iternext": lambda peer: [peer.ask("record_iternext", A)[1]],
    "server_status": lambda peer: [bytes.fromhex(peer.ask("server_status")["last-transaction"])],
}


@pytest.fixture
def writer(house: MemoryHouse) -> Peer:
    """One that has written A before there was anybody else."""
    writer = house.peer()
    writer.commit(A, data=b"old")
    return writer


@pytest.mark.parametrize("how", REVEALING)
def test_nobody_reads_what_was_not_told(house: MemoryHouse, writer: Peer, how: str) -> None:
    """The engine has finished a transaction in a thread, but the loop has not come to publish it: no reader
    may see it. Then it is published, and the invalidation stands before the reply that shows it."""
    reader = house.peer()
    old = house.hosted.visible.tid
    before = REVEALING[how](reader)
    finish = finish_in_a_thread(house, writer, A)
    assert REVEALING[how](reader) == before
    house.commit.work()
    assert house.hosted.engine.last_tid() > old
    assert REVEALING[how](reader) == before
    assert reader.told() == []
    house.commit.land()
    after = REVEALING[how](reader)
    writer.read()
    tid = finish.result
    assert reader.told() == [(tid, (A,))]
    if how != "end of a revision":
        assert after == [tid]
    told_at = [event.name for event in reader.events].index("invalidateTransaction")
    for event in reader.events[:told_at]:
        assert tid not in _tids_in(event.value)


def _tids_in(value: Any) -> set[bytes]:
    if isinstance(value, bytes):
        return {value}
    if isinstance(value, dict):
        return _tids_in(tuple(value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_tids_in, value))
    return set()


#: The same for what is computed in a thread, and may be handed over much later.
SLOW: dict[str, tuple[Any, ...]] = {
    "history": ("history", A, 10),
    "undoLog": ("undoLog", 0, -10),
    "undoInfo": ("undoInfo", 0, -10, None),
}


@pytest.mark.parametrize("how", SLOW)
def test_a_reply_from_a_thread_shows_nothing_that_was_not_told(
    house: MemoryHouse, writer: Peer, how: str
) -> None:
    """It is computed after the engine has finished and before the publication: it must not see that. If it is
    handed over after the publication, it shows the past, which is no harm."""
    reader = house.peer()
    finish = finish_in_a_thread(house, writer, A)
    house.commit.work()
    early = reader.start(*SLOW[how])
    house.slow.work()
    house.commit.land()
    house.slow.land()
    late = reader.start(*SLOW[how])
    house.slow.run()
    writer.read()
    reader.read()
    assert finish.answered
    assert (len(early.result), len(late.result)) == (1, 2)
    assert list(in_order(reader.events)) == [
        "reply register", "call invalidateTransaction", f"reply {how}", f"reply {how}",
    ]  # fmt: skip


def test_an_iterator_shows_nothing_that_was_not_told(house: MemoryHouse, writer: Peer) -> None:
    reader = house.peer()
    finish_in_a_thread(house, writer, A)
    house.commit.work()
    start = reader.start("iterator_start", None, None)
    house.slow.run()
    reader.read()
    house.commit.land()
    number = start.result
    assert reader.ask("iterator_next", number) is not None
    assert reader.ask("iterator_next", number) is None


def test_who_registers_during_a_commit_is_told_of_it_exactly_once(house: MemoryHouse, writer: Peer) -> None:
    """Before the publication it gets the tid before, and then the invalidation; after it, the new tid."""
    old = house.hosted.visible.tid
    finish = finish_in_a_thread(house, writer, A)
    early = Peer(house)
    assert early.ask("register", "1", False) == old
    house.commit.work()
    between = Peer(house)
    assert between.ask("register", "1", False) == old
    assert between.ask("getInvalidations", old) == (old, ())
    house.commit.land()
    late = Peer(house)
    writer.read()
    tid = finish.result
    assert late.ask("register", "1", False) == tid
    assert early.told() == between.told() == [(tid, (A,))]
    assert late.told() == []


def test_finish_and_what_follows_in_one_segment(houses: Callable[..., MemoryHouse]) -> None:
    """All replies of a segment are written together at its end. Others hear of the commit before that, and
    their own replies cannot overtake it."""
    house = houses(_1=open_memory())
    writer, reader = house.peer(), house.peer()
    assert writer.prepare(A).result == ()
    finish, load, last = writer.calls(("tpc_finish", 1), ("loadBefore", A, MAX_TID), ("lastTransaction",))
    assert load.result[1] == last.result == finish.result
    assert reader.ask("lastTransaction") == finish.result
    assert list(in_order(reader.events))[-2:] == ["call invalidateTransaction", "reply lastTransaction"]


def test_finish_in_a_thread_and_what_follows_in_one_segment(house: MemoryHouse, writer: Peer) -> None:
    """The commit goes to the disk; what is asked meanwhile is answered, and shows nothing of it."""
    reader = house.peer()
    old = house.hosted.visible.tid
    assert writer.prepare(A).result == ()
    finish, load, last = writer.calls(("tpc_finish", 1), ("loadBefore", A, MAX_TID), ("lastTransaction",))
    assert (finish.answered, load.result[1], last.result) == (False, old, old)
    house.commit.run()
    assert reader.ask("lastTransaction") == writer.ask("lastTransaction") == finish.result > old
    assert list(in_order(reader.events))[-2:] == ["call invalidateTransaction", "reply lastTransaction"]
    assert list(in_order(writer.events))[-2:] == ["reply tpc_finish", "reply lastTransaction"]


STEPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.sampled_from([A, B, C])), max_size=60)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.booleans())
def test_what_a_client_sees_never_goes_back(steps: list[tuple[int, int, bytes]], exclusive: bool) -> None:
    """Commits, loads and slow requests in any order, and finishes that stay in their thread for any time.

    Each client's stream is then read from the beginning: nothing may show a tid that was not told before, and
    a revision that is said to be current must be the newest of those that were told.
    """
    house = MemoryHouse({"1": open_memory() if exclusive else ParallelEngine()})
    peers = [house.peer(name=f"peer {number}") for number in range(3)]
    peers[0].commit(A, B, C)
    for what, who, oid in steps:
        peer = peers[who]
        if what <= 2:
            peer.start("loadBefore", oid, MAX_TID)
        elif what == 3:
            peer.start("lastTransaction")
        elif what == 4:
            peer.start("getTid", oid)
        elif what == 5:
            _try_to_commit(peer, oid)
        elif what == 6 and not house.hosted.packing:
            house.hosted.pack_begins()
        elif what == 7 and house.hosted.packing:
            house.hosted.pack_ended()
        elif what == 8 and len(house.commit):
            house.commit.work()
        elif what == 9:
            while house.commit._begun:
                house.commit.land()
    house.commit.run_all()
    for peer in peers:
        _check_stream(peer)
    house.close()


def _try_to_commit(peer: Peer, oid: bytes) -> None:
    """Vote, or finish what was voted on."""
    transaction = peer.session.hosted.transactions.find(peer.session, 1)
    if transaction is None:
        peer.prepare(oid)
    elif transaction.state.value == "prepared":
        peer.start("tpc_finish", 1)


def _check_stream(peer: Peer) -> None:
    """Read the stream as a client does that keeps what it is told, and only that."""
    peer.read()
    wrote = {
        tid: tuple(joined[at : at + 8] for at in range(0, len(joined), 8))
        for tid, joined in peer.house.hosted.invalidations._entries
    }
    told = NO_TID
    current: dict[bytes, bytes] = {}
    for event in peer.events:
        match event.kind, event.name:
            case "call", "invalidateTransaction":
                tid, oids = event.value
                assert tid > told
                assert oids == wrote[tid]
                told = tid
                current.update(dict.fromkeys(oids, tid))
            case "reply", "tpc_finish":
                assert event.value > told
                told = event.value
                current.update(dict.fromkeys(wrote[told], told))
            case "reply", "lastTransaction":
                assert event.value == told
            case "reply", "getTid":
                assert event.value == current[event.args[0]]
            case "reply", "loadBefore":
                assert event.value == (b"data", current[event.args[0]], None)
            case "error", name:
                assert name == "vote"


# Transactions that only create ----------------------------------------------------------------------------


def test_objects_that_are_only_created_are_told_of(house: MemoryHouse) -> None:
    """A client may have asked for one of them before it existed; and its view must not stand still."""
    reader = house.peer()
    with pytest.raises(POSKeyError):
        reader.ask("loadBefore", C, MAX_TID)
    tid = house.peer().commit(C)
    assert reader.told() == [(tid, (C,))]
    assert reader.ask("loadBefore", C, MAX_TID) == (b"data", tid, None)
    assert reader.ask("getInvalidations", NO_TID) == (tid, (C,))


def test_a_transaction_that_writes_nothing_is_told_of(house: MemoryHouse) -> None:
    reader, writer = house.peer(), house.peer()
    tid = writer.commit()
    assert reader.told() == [(tid, ())]
    assert reader.ask("lastTransaction") == tid == house.hosted.engine.last_tid()


# Several storages -----------------------------------------------------------------------------------------


@pytest.fixture
def zoo(houses: Callable[..., MemoryHouse]) -> MemoryHouse:
    """Two storages in one server."""
    return houses(lions=open_memory(), tigers=open_memory())


def test_what_is_told_of_two_storages_does_not_mix(zoo: MemoryHouse) -> None:
    """The same oids and the same transaction ids, at the same time."""
    lions, tigers = (
        [Peer(zoo).register(name) for _ in range(3)] for name in ("lions", "tigers")
    )  # fmt: skip
    assert lions[0].prepare(A, data=b"lion").result == ()
    assert tigers[0].prepare(A, B, data=b"tiger").result == ()
    lion = lions[0].ask("tpc_finish", 1)
    assert tigers[1].told() == []
    tiger = tigers[0].ask("tpc_finish", 1)
    for peer in lions[1:]:
        assert peer.told() == [(lion, (A,))]
        assert peer.ask("loadBefore", A, MAX_TID) == (b"lion", lion, None)
        assert peer.ask("getInvalidations", NO_TID) == (lion, (A,))
    for peer in tigers[1:]:
        assert peer.told() == [(tiger, (A, B))]
        assert peer.ask("loadBefore", A, MAX_TID) == (b"tiger", tiger, None)


def test_the_lock_of_one_storage_is_not_that_of_another(zoo: MemoryHouse) -> None:
    lion, tiger = Peer(zoo).register("lions"), Peer(zoo).register("tigers")
    assert lion.prepare(A).result == ()
    assert tiger.commit(A)
    zoo.storages["lions"].pack_begins()
    assert tiger.commit(A)
    lion.start("tpc_finish", 1)
    assert tiger.commit(A)
    assert len(zoo.commit) == 1
    zoo.commit.run_all()


def test_a_deadline_in_one_storage_concerns_nobody_in_another(zoo: MemoryHouse) -> None:
    lion, tiger = Peer(zoo).register("lions"), Peer(zoo).register("tigers")
    assert lion.prepare(A).result == ()
    zoo.later(limits.TRANSACTION_TIMEOUT_S / 2)
    assert tiger.prepare(A).result == ()
    zoo.later(limits.TRANSACTION_TIMEOUT_S / 2)
    assert (lion.dropped, tiger.dropped) == (True, False)
    assert tiger.ask("tpc_finish", 1)


def test_a_client_at_the_edge_of_what_is_remembered(houses: Callable[..., MemoryHouse]) -> None:
    """It has seen exactly the oldest transaction that the server still knows, or the one before it, or less:
    it gets all that it missed, or is told that nobody knows, but never a part."""
    house = MemoryHouse(invalidation_log_transactions=3)
    peer = house.peer()
    tids = [peer.commit(oid) for oid in (A, B, C, A, B)]
    assert peer.ask("getInvalidations", tids[2]) == (tids[4], (B, A))
    assert peer.ask("getInvalidations", tids[1]) == (tids[4], (B, A, C))
    assert peer.ask("getInvalidations", tids[0]) is None
    house.close()


# Who holds the lock, or waits for it, leaves --------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_the_holder_leaves_between_vote_and_finish(either_house: MemoryHouse, packing: bool) -> None:
    """Nothing of its transaction is ever told or seen, and those who wait get on."""
    house = either_house
    holder, waiter, reader = house.peer(), house.peer(), house.peer()
    assert holder.prepare(A, C, data=b"never").result == ()
    if packing:
        house.hosted.pack_begins()
    vote = waiter.prepare(A)
    holder.disconnect()
    house.work()
    waiter.read()
    assert vote.result == ()
    tid = waiter.ask("tpc_finish", 1)
    assert reader.told() == [(tid, (A,))]
    assert reader.ask("loadBefore", A, MAX_TID) == (b"data", tid, None)
    with pytest.raises(POSKeyError):
        reader.ask("loadBefore", C, MAX_TID)


def test_the_holder_leaves_while_the_engine_prepares(
    either_house: MemoryHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = either_house
    holder, waiter, reader = house.peer(), house.peer(), house.peer()
    house.hosted.pack_begins()  # the one engine prepares in its thread then ...
    monkeypatch.setattr(limits, "PREPARE_INLINE_OPERATIONS", 0)  # ... and the other in another
    thread = house.commit if house.hosted.engine.exclusive else house.beside
    holder.prepare(A)
    vote = waiter.prepare(A)
    thread.work()
    holder.disconnect()
    assert not vote.answered
    thread.land()
    house.work()
    waiter.read()
    assert vote.result == ()
    assert reader.told() == []
    assert house.hosted.transactions.active == 1


def test_the_holder_leaves_while_the_engine_finishes(house: MemoryHouse) -> None:
    """It is too late to give up: the transaction is committed, and everybody hears of it."""
    holder, reader = house.peer(), house.peer()
    finish_in_a_thread(house, holder, A)
    holder.disconnect()
    assert reader.told() == []
    house.commit.run_all()
    assert reader.told() == [(house.hosted.visible.tid, (A,))]
    nothing_is_locked(house.hosted)
    assert reader.commit(B)


def test_the_holder_leaves_while_it_resolves_conflicts(house: MemoryHouse, writer: Peer) -> None:
    holder, waiter = house.peer(), house.peer()
    holder.begin()
    holder.store(A, serial=NO_TID)
    assert holder.ask("vote", 1)
    vote = waiter.prepare(A)
    assert not vote.answered
    holder.disconnect()
    waiter.read()
    assert vote.result == ()


@pytest.mark.parametrize("leaving", [0, 1, 2, 3])
def test_one_that_waits_leaves_and_the_others_keep_their_order(house: MemoryHouse, leaving: int) -> None:
    holder = house.peer()
    assert holder.prepare(A).result == ()
    waiters = [house.peer() for _ in range(4)]
    votes = [waiter.prepare(A, data=b"%d" % number) for number, waiter in enumerate(waiters)]
    waiters[leaving].disconnect()
    holder.disconnect()
    committed = []
    for number, (waiter, vote) in enumerate(zip(waiters, votes, strict=True)):
        if number == leaving:
            continue
        waiter.read()
        if not committed:
            assert vote.result == ()
            committed.append(waiter.ask("tpc_finish", 1))
        else:
            assert [conflict["oid"] for conflict in vote.result] == [A]
            waiter.ask("tpc_abort", 1)
    assert house.hosted.transactions.active == house.hosted.transactions.waiting == 0


def test_all_leave_at_once(house: MemoryHouse) -> None:
    peers = [house.peer() for _ in range(20)]
    for peer in peers:
        peer.prepare(A, id=1)
        peer.prepare(B, id=2)
    for peer in peers:
        peer.disconnect()
    nothing_is_locked(house.hosted)
    assert house.peer().commit(A)


def test_a_client_that_comes_back_does_not_find_its_transaction(house: MemoryHouse) -> None:
    """Half of it may be lost with the connection: it must fail, whatever id the client goes on with."""
    client, reader = house.peer(), house.peer()
    assert client.prepare(A).result == ()
    client.disconnect()
    again = house.peer()
    with pytest.raises(StorageTransactionError):
        again.ask("tpc_finish", 1)
    again.store(B)
    with pytest.raises(StorageTransactionError, match="before tpc_begin"):
        again.ask("vote", 1)
    assert reader.told() == []
    assert again.commit(A)


def test_a_conflict_frees_the_lock(house: MemoryHouse, writer: Peer) -> None:
    peer, waiter = house.peer(), house.peer()
    peer.begin()
    peer.store(A, serial=NO_TID)
    assert peer.ask("vote", 1)
    vote = waiter.prepare(A)
    assert not vote.answered
    peer.ask("tpc_abort", 1)
    waiter.read()
    assert vote.result == ()


# Errors that cannot be told at once -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "error"),
    [
        ("storea", (A, NO_TID, "no bytes", 1), TypeError),
        ("storea", (A, b"short", b"data", 1), TypeError),
        ("restorea", (A, NO_TID, b"", None, 1), StorageError),
        ("deleteObject", (C, NO_TID, 1), POSKeyError),
        ("checkCurrentSerialInTransaction", (C, p64(5), 1), Exception),
        ("undoa", (b"?", 1), UndoError),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("position", ["first", "last"])
def test_an_error_in_a_one_way_call_fails_the_vote(
    house: MemoryHouse, name: str, args: tuple[Any, ...], error: type[Exception], position: str
) -> None:
    """The vote says what was wrong; it is not left without an answer, and nothing stays locked."""
    peer, waiter = house.peer(), house.peer()
    peer.begin()
    if position == "last":
        peer.store(A)
    peer.one_way(name, *args)
    if position == "first":
        peer.store(A)
    with pytest.raises(error):
        peer.ask("vote", 1)
    nothing_is_locked(house.hosted)
    with pytest.raises(POSKeyError):
        peer.ask("loadBefore", A, MAX_TID)
    assert waiter.commit(A)
    assert peer.commit(B)


def test_an_error_in_a_one_way_begin_does_not_leave_the_vote_waiting(house: MemoryHouse) -> None:
    """There is no transaction that could fail, so the connection does, and the client knows."""
    peer, waiter = house.peer(), house.peer()
    peer.one_way("tpc_begin", 1, b"user", None, {}, None, " ")
    assert peer.dropped
    assert waiter.commit(A)


def test_a_begin_that_is_refused_fails_the_vote(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin(tid=MAX_TID)
    peer.store(A)
    with pytest.raises(TypeError, match="no transaction can have this tid"):
        peer.ask("vote", 1)
    assert house.hosted.transactions.active == 0


def test_an_engine_that_fails_to_begin_locks_nobody_out(house: MemoryHouse) -> None:
    """The user's name is too long for a data file, which shows when the locks are held."""
    peer = house.peer()
    peer.one_way("tpc_begin", 1, b"u" * 70_000, b"", {}, None, " ")
    peer.store(A)
    with pytest.raises(StorageError, match="the user of the transaction is longer than 65,535 bytes"):
        peer.ask("vote", 1)
    nothing_is_locked(house.hosted)
    assert house.peer().commit(A)


# Oids -----------------------------------------------------------------------------------------------------


def test_oids_of_aborted_transactions_are_not_given_again(house: MemoryHouse) -> None:
    """Neither to the same client nor to others, whether the transaction was aborted, lost or never begun."""
    given: list[bytes] = []
    for fate in ("commit", "abort", "abort after the vote", "leave", "nothing") * 3:
        peer = house.peer()
        oids = peer.ask("new_oids", 10)
        given += oids
        peer.begin()
        peer.store(oids[0])
        if fate in ("commit", "abort after the vote"):
            peer.ask("vote", 1)
        if fate == "commit":
            peer.ask("tpc_finish", 1)
        elif fate == "leave":
            peer.disconnect()
        else:
            peer.ask("tpc_abort", 1)
    assert len(given) == len(set(given)) == 150


def test_oids_of_copied_objects_are_not_given_again(house: MemoryHouse) -> None:
    peer = house.peer()
    tid = p64(0x03C0_0000_0000_0000)
    peer.begin(tid=tid)
    peer.one_way("restorea", p64(5000), tid, b"copied", None, 1)
    peer.ask("vote", 1)
    peer.ask("tpc_finish", 1)
    assert min(peer.ask("new_oids", 100)) > p64(5000)


# A client that never gives up -----------------------------------------------------------------------------


def test_the_ninth_round_with_conflicts_is_answered_with_the_conflict(house: MemoryHouse) -> None:
    """A stock client tries nine times to resolve, and then finishes, whatever the last answer was: that must
    not commit what is in conflict, nor anything at all."""
    writer, reader, stubborn = house.peer(), house.peer(), house.peer()
    tid = writer.commit(A, data=b"theirs")
    stubborn.begin()
    stubborn.store(B, b"new")
    stubborn.store(A, b"mine", serial=NO_TID)
    for _ in range(8):
        (conflict,) = stubborn.ask("vote", 1)
        assert conflict["serials"] == (tid, NO_TID)
        stubborn.store(A, b"mine", serial=NO_TID)
    with pytest.raises(ConflictError):
        stubborn.ask("vote", 1)
    with pytest.raises(StorageTransactionError):
        stubborn.ask("tpc_finish", 1)
    assert reader.told() == [(tid, (A,))]
    assert reader.ask("loadBefore", A, MAX_TID) == (b"theirs", tid, None)
    with pytest.raises(POSKeyError):
        reader.ask("loadBefore", B, MAX_TID)
    assert house.hosted.transactions.active == 0
    assert stubborn.commit(A, data=b"mine") > tid


# Bounded output -------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_gets_no_more_work_done(house: MemoryHouse) -> None:
    """It has sent a thousand requests in one segment, and their answers would take a gigabyte: they are made
    as it reads them. Others are served meanwhile, and its invalidations keep their place."""
    writer, reader = house.peer(), house.peer()
    old = writer.commit(A, data=b"x" * 1_000_000)
    reader.read()
    reader.events.clear()
    reader.wire.on_write = reader.session.pause
    calls = reader.calls(*[("loadBefore", A, MAX_TID)] * 1000)
    assert sum(len(call.value[0]) for call in calls if call.answered) < 3_000_000
    early = [call for call in calls if call.answered]
    assert early
    tid = writer.commit(A, data=b"new")
    reader.session.resume()
    while reader.wire.callbacks:  # it is the turn of others now and then
        reader.wire.turn()
    reader.read()
    assert [call.result[1] for call in calls] == [old] * len(early) + [tid] * (1000 - len(early))
    told_at = list(in_order(reader.events)).index("call invalidateTransaction")
    assert told_at == len(early)


def test_the_time_of_day_goes_back(house: MemoryHouse) -> None:
    """Each commit is later than the one before it all the same, for everybody."""
    writer, reader = house.peer(), house.peer()
    tids = []
    for seconds in (0.0, -3600.0, 10.0, -NOON / 2, 0.0):
        house.clock.now_s += seconds
        tids.append(writer.commit(A))
    assert tids == sorted(set(tids))
    assert [tid for tid, _ in reader.told()] == tids
