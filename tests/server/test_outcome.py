"""What became of a transaction whose client lost its connection: asked in every state, on any connection.

Whatever was answered must be true for ever: a transaction that was said not to be committed must never be.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError, ReadOnlyError, StorageError, StorageTransactionError
from ZODB.utils import p64

from tests.server.assertions import nothing_is_locked, refuses
from tests.server.inmemory import Call, MemoryHouse, ParallelEngine, Peer
from zeoid import limits
from zeoid.engines.opening import open_filestorage
from zeoid.model import MAX_TID, NO_TID

A, B = p64(1), p64(2)
ID, OTHER = b"made by a client", b"another"
BEGIN = (b"user", b"description", {}, None, " ")


@pytest.fixture
def engine() -> ParallelEngine:
    return ParallelEngine()


@pytest.fixture
def house(make_house: Callable[..., MemoryHouse], engine: ParallelEngine) -> MemoryHouse:
    return make_house({"1": engine})


def prepare(peer: Peer, oid: bytes = A, id: bytes = ID) -> Call:
    return peer.start("tpc_prepare", id, *written(peer, oid))


def written(peer: Peer, oid: bytes) -> tuple[Any, ...]:
    """The rest of the message that prepares a transaction of one object."""
    return BEGIN, [(0, oid, peer.serial(oid), b"data", None)]


def commit(peer: Peer, oid: bytes = A, id: bytes = ID) -> bytes:
    assert len(peer.ask("tpc_prepare", id, *written(peer, oid))) == 0
    tid: bytes = peer.ask("tpc_finish", id)
    return tid


def outcome(peer: Peer, id: bytes = ID, after: bytes = NO_TID) -> Any:
    return peer.ask("outcome", id, after)


def is_refused_for_ever(house: MemoryHouse, engine: ParallelEngine) -> None:
    """After the answer no: nothing of it is there, or held, and whoever comes with its id gets an error."""
    nothing_is_locked(house.hosted)
    assert engine.batches == []
    for _ in range(2):
        peer = house.peer()
        with pytest.raises(StorageTransactionError, match="begun before, or is over"):
            peer.ask("tpc_prepare", ID, BEGIN, [(0, A, NO_TID, b"late", None)])
        with pytest.raises(StorageTransactionError):
            peer.ask("tpc_finish", ID)
        peer.one_way("storea", A, NO_TID, b"late", ID)
        with pytest.raises(StorageTransactionError):
            peer.ask("vote", ID)
        with pytest.raises(POSKeyError):
            peer.ask("loadBefore", A, MAX_TID)
        assert outcome(peer) is None
    assert commit(house.peer(), A, OTHER)


# In every state -------------------------------------------------------------------------------------------


def test_one_that_is_committed(house: MemoryHouse) -> None:
    client, other = house.peer(), house.peer()
    tid = commit(client)
    assert outcome(client) == outcome(other) == tid
    client.disconnect()
    assert outcome(house.peer()) == tid
    with pytest.raises(StorageTransactionError, match="begun before, or is over"):
        prepare(house.peer()).result  # noqa: B018 - it raises
    assert outcome(other) == tid


def test_one_that_nobody_has_heard_of(house: MemoryHouse, engine: ParallelEngine) -> None:
    """Its first message may still be on its way."""
    assert outcome(house.peer()) is None
    is_refused_for_ever(house, engine)


@pytest.mark.parametrize("lost", [False, True], ids=["connected", "connection lost"])
def test_one_that_is_being_stored(house: MemoryHouse, engine: ParallelEngine, lost: bool) -> None:
    client, asker = house.peer(), house.peer()
    client.ask("tpc_operate", ID, BEGIN, [(0, A, NO_TID, b"data", None)])
    if lost:
        client.disconnect()
    assert outcome(asker) is None
    if not lost:
        with pytest.raises(StorageTransactionError):
            client.ask("vote", ID)
    is_refused_for_ever(house, engine)


@pytest.mark.parametrize("lost", [False, True], ids=["connected", "connection lost"])
def test_one_that_waits(house: MemoryHouse, engine: ParallelEngine, lost: bool) -> None:
    holder, client, asker = house.peer(), house.peer(), house.peer()
    assert holder.prepare(A).result == ()
    vote = prepare(client)
    if lost:
        client.disconnect()
    assert outcome(asker) is None
    if not lost:
        client.read()
        with pytest.raises(StorageTransactionError, match="aborted"):
            _ = vote.result
    holder.ask("tpc_abort", 1)
    is_refused_for_ever(house, engine)


@pytest.mark.parametrize("lost", [False, True], ids=["connected", "connection lost"])
def test_one_that_the_engine_prepares(
    house: MemoryHouse, engine: ParallelEngine, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """The answer does not wait for the engine, but what it prepares is forgotten."""
    monkeypatch.setattr(limits, "PREPARE_INLINE_OPERATIONS", 0)
    client, asker = house.peer(), house.peer()
    vote = prepare(client)
    house.beside.work()
    if lost:
        client.disconnect()
    assert outcome(asker) is None
    client.read()
    assert vote.answered is not lost
    house.beside.land()
    assert engine.abandoned == 1
    is_refused_for_ever(house, engine)


@pytest.mark.parametrize("lost", [False, True], ids=["connected", "connection lost"])
def test_one_whose_conflicts_are_being_resolved(house: MemoryHouse, lost: bool) -> None:
    client, asker = house.peer(), house.peer()
    tid = commit(asker, A, OTHER)
    assert client.ask("tpc_prepare", ID, BEGIN, [(0, A, NO_TID, b"mine", None)])
    if lost:
        client.disconnect()
    assert outcome(asker) is None
    nothing_is_locked(house.hosted)
    if not lost:
        with pytest.raises(StorageTransactionError):
            client.ask("tpc_prepare", ID, None, [(0, A, tid, b"both", None)])
    assert asker.ask("loadBefore", A, MAX_TID) == (b"data", tid, None)


@pytest.mark.parametrize("lost", [False, True], ids=["connected", "connection lost"])
def test_one_that_is_prepared(house: MemoryHouse, engine: ParallelEngine, lost: bool) -> None:
    """The finish that is on its way comes too late, and whoever waited gets on."""
    client, asker, waiter = house.peer(), house.peer(), house.peer()
    assert prepare(client).result == ()
    waiting = waiter.prepare(A)
    if lost:
        client.disconnect()
    assert outcome(asker) is None
    waiter.read()
    assert waiting.result == ()
    waiter.ask("tpc_abort", 1)
    if not lost:
        with pytest.raises(StorageTransactionError):
            client.ask("tpc_finish", ID)
    is_refused_for_ever(house, engine)


@pytest.mark.parametrize("lost", [False, True], ids=["connected", "connection lost"])
@pytest.mark.parametrize("behind", [False, True], ids=["at the disk", "behind another"])
def test_one_that_is_on_its_way_to_the_disk(house: MemoryHouse, lost: bool, behind: bool) -> None:
    """It can't be given up any more: the answer comes when it is committed, to all who asked."""
    client, askers, reader = house.peer(), [house.peer() for _ in range(3)], house.peer()
    if behind:
        prepare(reader, B, OTHER)
        reader.start("tpc_finish", OTHER)
    assert prepare(client).result == ()
    finish = client.start("tpc_finish", ID)
    if lost:
        client.disconnect()
    questions = [asker.start("outcome", ID, NO_TID) for asker in askers]
    assert not any(question.answered for question in questions)
    askers[0].disconnect()
    house.work()
    assert askers[0].wire.writes == []
    tid = reader.told()[-1][0]
    for asker, question in zip(askers[1:], questions[1:], strict=True):
        asker.read()
        assert question.result == tid
        # On this connection, too, it is told of the commit before anything reveals it.
        names = [event.name for event in asker.events]
        assert names.index("invalidateTransaction") < names.index("outcome")
    if not lost:
        client.read()
        assert finish.result == tid
    assert outcome(reader) == tid
    nothing_is_locked(house.hosted)


def test_one_that_was_aborted(house: MemoryHouse, engine: ParallelEngine) -> None:
    client = house.peer()
    prepare(client)
    client.ask("tpc_abort", ID)
    assert outcome(client) is None
    is_refused_for_ever(house, engine)


def test_a_disk_that_fails_leaves_the_question_without_an_answer(
    house: MemoryHouse, engine: ParallelEngine
) -> None:
    client, asker = house.peer(), house.peer()
    prepare(client)
    client.start("tpc_finish", ID)
    question = asker.start("outcome", ID, NO_TID)
    engine.failing = "commit"
    house.work()
    asker.read()
    assert not question.answered
    assert len(house.fatal) == 1


# Ids ------------------------------------------------------------------------------------------------------


def test_one_id_is_one_transaction(house: MemoryHouse) -> None:
    """A second client with the same id, by mistake or because it tries again too early, does not get in."""
    client, again = house.peer(), house.peer()
    assert prepare(client).result == ()
    with pytest.raises(StorageTransactionError, match="begun before"):
        prepare(again, B).result  # noqa: B018 - it raises
    tid = client.ask("tpc_finish", ID)
    assert outcome(again) == tid


def test_ids_that_are_numbers_are_their_connections_own(house: MemoryHouse) -> None:
    """As stock clients make them; they may be used again and again."""
    peers = [house.peer(), house.peer()]
    tids = [peer.commit(A, id=1) for peer in peers * 2]
    assert tids == sorted(set(tids))


@pytest.mark.parametrize("id", [7, None, "text", b"", b"x" * 65], ids=repr)
def test_a_question_for_what_is_no_client_made_id(house: MemoryHouse, id: Any) -> None:
    refuses(house.peer().start("outcome", id, NO_TID), "outcome: transaction must be")


def test_a_question_without_a_tid(house: MemoryHouse) -> None:
    refuses(house.peer().start("outcome", ID, None), "outcome: after must be")


def test_who_only_reads_must_not_ask(house: MemoryHouse) -> None:
    """The question decides."""
    with pytest.raises(ReadOnlyError):
        Peer(house).register(read_only=True).ask("outcome", ID, NO_TID)
    assert commit(house.peer())


# What is remembered ---------------------------------------------------------------------------------------


def test_what_is_not_remembered_is_not_known(
    make_house: Callable[..., MemoryHouse], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer "no" would be a lie for one that was committed long ago. Who began later gets an answer."""
    monkeypatch.setattr(limits, "OUTCOMES", 3)
    house = make_house({"1": ParallelEngine()})
    client, asker = house.peer(), house.peer()
    tids = [commit(client, A, b"id %d" % number) for number in range(5)]
    for number in (2, 3, 4):
        assert outcome(asker, b"id %d" % number) == tids[number]
    for id in (b"id 0", b"id 1", b"never begun"):
        for after in (NO_TID, tids[0]):
            with pytest.raises(StorageError, match="not known any more"):
                outcome(asker, id, after)
    assert outcome(asker, b"never begun", tids[1]) is None
    assert commit(client, A, b"id 0 again") > tids[-1]


# After a restart ------------------------------------------------------------------------------------------


@pytest.fixture
def restart(make_house: Callable[..., MemoryHouse], tmp_path: Path) -> Callable[[], MemoryHouse]:
    """A server on the same data file, after the one before has stopped."""
    houses: list[MemoryHouse] = []

    def restart() -> MemoryHouse:
        for house in houses:
            house.close()
        houses.append(make_house({"1": open_filestorage(tmp_path / "Data.fs")}))
        return houses[-1]

    return restart


def test_the_outcome_is_known_after_a_restart(restart: Callable[[], MemoryHouse]) -> None:
    ids = [b"x", ID, b"y" * 64, os.urandom(16)]
    client = restart().peer()
    tids = [commit(client, p64(number), id) for number, id in enumerate(ids)]
    assert prepare(client, A, OTHER).result == ()
    for _ in range(2):
        house = restart()
        asker = house.peer()
        assert [outcome(asker, id) for id in ids] == tids
        assert outcome(asker, OTHER) is None
        with pytest.raises(StorageTransactionError, match="is over"):
            prepare(asker, A, ID).result  # noqa: B018 - it raises
        nothing_is_locked(house.hosted)


def test_what_was_large_is_known_after_a_restart(restart: Callable[[], MemoryHouse]) -> None:
    """It goes to the data file directly, without a copy in the journal."""
    client = restart().peer()
    large = [(0, p64(number), NO_TID, b"x" * 1_000_000, None) for number in range(4)]
    client.ask("tpc_prepare", ID, BEGIN, large)
    tid = client.ask("tpc_finish", ID)
    asker = restart().peer()
    assert outcome(asker) == tid
    assert len(asker.ask("loadBefore", p64(3), MAX_TID)[0]) == 1_000_000


def test_who_asks_after_a_stock_server_was_used_is_told_what_is_not_known(
    restart: Callable[[], MemoryHouse], tmp_path: Path
) -> None:
    """That one knew nothing of ids: a transaction that began before may or may not be one of its own."""
    first = commit(restart().peer(), A, b"ours")
    restart().close()
    storage = FileStorage(str(tmp_path / "Data.fs"))
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    storage.store(B, NO_TID, b"data", "", meta)
    storage.tpc_vote(meta)
    last = storage.tpc_finish(meta)
    storage.close()
    peer = restart().peer()
    for after in (NO_TID, first):
        with pytest.raises(StorageError, match="not known any more"):
            outcome(peer, ID, after)
    assert outcome(peer, b"ours") == first
    assert outcome(peer, OTHER, last) is None


def test_who_asks_after_the_journal_was_lost_is_told_what_is_not_known(
    restart: Callable[[], MemoryHouse], tmp_path: Path
) -> None:
    tid = commit(restart().peer())
    restart().close()
    (tmp_path / "Data.fs.journal").rename(tmp_path / "away")
    peer = restart().peer()
    with pytest.raises(StorageError, match="not known any more"):
        outcome(peer, ID, NO_TID)
    assert outcome(peer, OTHER, tid) is None
