"""A database with another writer: what it commits reaches the clients, in order, and nothing stale ever does.

The database is a RelStorage on SQLite. The other writer writes to it directly, at the moments that a test
chooses; threads do their work when the test says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import POSKeyError, ReadConflictError, StorageError
from ZODB.utils import p64

from tests.engines.relstorages import Database
from tests.server.inmemory import Call, MemoryHouse, Peer, in_order
from zeoid import limits
from zeoid.engines.opening import engine_of
from zeoid.engines.polled import PolledEngine
from zeoid.model import MAX_TID, NO_TID, tid_after, tid_before

A, B, C = p64(1), p64(2), p64(3)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "database")
    database.write(A, B, C, data=b"at the start")
    yield database
    database.close()


@pytest.fixture
def house(database: Database, make_house: Callable[..., MemoryHouse]) -> MemoryHouse:
    return make_house({"1": engine_of(database.open())})


@pytest.fixture
def engine(house: MemoryHouse) -> PolledEngine:
    engine = house.hosted.engine
    assert isinstance(engine, PolledEngine)
    return engine


def poll(house: MemoryHouse) -> None:
    house.later(limits.POLL_S)
    house.commit.run_all()


def load(peer: Peer, oid: bytes, tid: bytes = MAX_TID) -> Any:
    call = peer.start("loadBefore", oid, tid)
    assert not call.answered, "it is read in a thread"
    peer.house.beside.run_all()
    peer.read()
    return call.result


def test_what_others_commit_is_told_to_everybody(house: MemoryHouse, database: Database) -> None:
    one, other = house.peer(), house.peer()
    before = one.ask("lastTransaction")
    database.write(A)
    tid = database.write(B)
    assert one.told() == []
    poll(house)
    assert one.told() == other.told() == [(tid_after(before), (A, B)), (tid, (A, B))]
    assert one.ask("lastTransaction") == tid
    assert one.ask("getInvalidations", before) == (tid, (A, B))
    assert load(one, A)[0] == load(other, B)[0] == b"others'"


def test_what_is_not_told_yet_is_not_shown(house: MemoryHouse, database: Database) -> None:
    peer = house.peer()
    before = peer.ask("lastTransaction")
    database.write(A)
    assert load(peer, A) == (b"at the start", before, None)
    assert peer.ask("lastTransaction") == before


def test_a_load_that_is_overtaken_is_done_again(house: MemoryHouse, database: Database) -> None:
    """Its result was right when it was read. By the time it would be sent, its end has been told."""
    peer = house.peer()
    before = peer.ask("lastTransaction")
    call = peer.start("loadBefore", A, tid_after(before))
    house.beside.work()
    tid = database.write(A)
    poll(house)
    house.beside.land()
    peer.read()
    assert not call.answered
    house.beside.run_all()
    peer.read()
    assert call.result == (b"at the start", before, tid)
    assert list(in_order(peer.events))[-3:] == [
        "call invalidateTransaction", "call invalidateTransaction", "reply loadBefore",
    ]  # fmt: skip


def test_a_load_of_another_object_is_not_done_again(house: MemoryHouse, database: Database) -> None:
    peer = house.peer()
    before = peer.ask("lastTransaction")
    call = peer.start("loadBefore", B, MAX_TID)
    house.beside.work()
    database.write(A)
    poll(house)
    house.beside.land()
    peer.read()
    assert call.result == (b"at the start", before, None)


def test_a_bulk_load_that_is_overtaken_is_done_again(house: MemoryHouse, database: Database) -> None:
    """Though others changed one of its objects only."""
    peer = house.peer()
    before = peer.ask("lastTransaction")
    call = peer.start("loadBeforeMany", [A, B], tid_after(before))
    house.beside.work()
    tid = database.write(B)
    poll(house)
    house.beside.land()
    peer.read()
    assert not call.answered
    house.beside.run_all()
    peer.read()
    assert list(call.result) == [(b"at the start", before, None), (b"at the start", before, tid)]
    assert list(in_order(peer.events))[-2:] == ["call invalidateTransaction", "reply loadBeforeMany"]


def test_a_load_that_is_always_overtaken_fails(house: MemoryHouse, database: Database) -> None:
    peer = house.peer()
    call = peer.start("loadBefore", A, MAX_TID)
    for _ in range(2 * limits.READ_TRIES):
        if len(house.beside):
            house.beside.work()
            database.write(A)
            poll(house)
            house.beside.land()
    peer.read()
    with pytest.raises(ReadConflictError):
        _ = call.result


def test_our_commit_takes_its_place_among_those_of_others(house: MemoryHouse, database: Database) -> None:
    writer, reader = house.peer(), house.peer()
    before = writer.ask("lastTransaction")
    writer.begin()
    writer.store(A)
    vote = writer.start("vote", 1)
    house.commit.run_all()
    writer.read()
    assert not vote.result
    # The other one would wait for us now: SQLite has one lock for everything.
    finish = writer.start("tpc_finish", 1)
    house.commit.work()
    later = database.write(A, B)
    poll(house)
    house.commit.run_all()
    writer.read()
    ours = finish.result
    assert before < ours < later
    assert reader.told() == [(ours, (A,)), (tid_after(ours), (A, B)), (later, (A, B))]
    assert writer.told() == [(tid_after(ours), (A, B)), (later, (A, B))]


def test_what_was_committed_before_ours_is_told_before_ours(
    house: MemoryHouse, database: Database, engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other databases than SQLite lock objects only: somebody may be between our vote and our commit."""
    writer, reader = house.peer(), house.peer()
    before = writer.ask("lastTransaction")
    vote, finish, others = engine._writer.tpc_vote, engine._writer.tpc_finish, []

    def overtaken(meta: Any) -> bytes:
        others.append(database.write(B))
        vote(meta)
        tid: bytes = finish(meta)
        return tid

    monkeypatch.setattr(engine._writer, "tpc_vote", lambda meta: None)
    monkeypatch.setattr(engine._writer, "tpc_finish", overtaken)
    ours = writer.commit(A)
    (tid,) = others
    assert before < tid < ours
    first, last = tid_after(before), tid_before(ours)
    assert reader.told() == [(first, (A, B)), (last, (A, B)), (ours, (A,))]
    assert writer.told() == [(first, (A, B)), (last, (A, B))]
    assert list(in_order(writer.events))[-3:] == [
        "call invalidateTransaction", "call invalidateTransaction", "reply tpc_finish",
    ]  # fmt: skip


def test_what_was_committed_after_ours_is_told_after_ours(
    house: MemoryHouse, database: Database, engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the poll tells of both at once."""
    writer, reader = house.peer(), house.peer()
    before = writer.ask("lastTransaction")
    finish, others = engine._writer.tpc_finish, []

    def followed(meta: Any) -> bytes:
        tid: bytes = finish(meta)
        others.append(database.write(A))
        return tid

    monkeypatch.setattr(engine._writer, "tpc_finish", followed)
    ours = writer.commit(A)
    later = [(tid_after(ours), (A,)), (others[0], (A,))]
    assert reader.told() == [(tid_after(before), (A,)), (tid_before(ours), (A,)), (ours, (A,)), *later]
    assert writer.told() == [(tid_after(before), (A,)), (tid_before(ours), (A,)), *later]
    assert load(reader, A) == (b"others'", others[0], None)


def test_a_conflict_is_told_after_what_caused_it(house: MemoryHouse, database: Database) -> None:
    peer = house.peer()
    before = peer.ask("lastTransaction")
    others = database.write(A)
    peer.begin()
    peer.store(A, serial=before)
    vote = peer.start("vote", 1)
    house.commit.run_all()
    peer.read()
    (conflict,) = vote.result
    assert (conflict["oid"], tuple(conflict["serials"])) == (A, (others, before))
    assert list(in_order(peer.events))[-3:] == [
        "call invalidateTransaction", "call invalidateTransaction", "reply vote",
    ]  # fmt: skip
    peer.store(A, b"resolved", serial=others)
    vote = peer.start("vote", 1)
    house.commit.run_all()
    peer.read()
    assert not vote.result
    tid = peer.ask("tpc_finish", 1)
    assert load(peer, A) == (b"resolved", tid, None)


def test_where_it_cant_be_told_what_changed_clients_start_over(
    house: MemoryHouse, database: Database, engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = house.peer()
    before = peer.ask("lastTransaction")
    tid = database.write(A)
    look = engine._watcher.poll_invalidations
    monkeypatch.setattr(engine._watcher, "poll_invalidations", lambda: look() and None)
    poll(house)
    assert peer.dropped
    again = house.peer()
    assert again.ask("getInvalidations", before) is None
    assert again.ask("lastTransaction") == tid
    assert again.ask("getInvalidations", tid) == (tid, ())


def test_clients_start_over_after_a_commit_whose_news_are_lost(
    house: MemoryHouse, database: Database, engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = house.peer(), house.peer()
    before = writer.ask("lastTransaction")
    writer.begin()
    writer.store(A)
    writer.start("vote", 1)
    house.commit.run_all()
    writer.start("tpc_finish", 1)

    def broken() -> Any:
        raise OSError("the database is gone")

    monkeypatch.setattr(engine._watcher, "poll_invalidations", broken)
    house.commit.run_all()
    assert writer.dropped
    assert reader.dropped
    monkeypatch.undo()
    again = house.peer()
    ours = again.ask("lastTransaction")
    assert ours > before
    assert again.ask("getInvalidations", before) is None
    assert load(again, A) == (b"data", ours, None)
    assert not house.fatal
    others = database.write(B)
    poll(house)
    assert again.told()[-1][0] == others
    assert B in again.told()[-1][1]


def test_a_vote_whose_poll_fails_is_refused(
    house: MemoryHouse, database: Database, engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = house.peer()

    def broken() -> Any:
        raise OSError("the database is gone")

    monkeypatch.setattr(engine._watcher, "poll_invalidations", broken)
    with pytest.raises(Exception, match="the database is gone"):
        peer.commit(A)
    monkeypatch.undo()
    assert database.write(A), "the database holds no lock of it"
    poll(house)
    assert peer.commit(A, id=2)


def test_a_commit_that_fails_is_told_and_the_server_goes_on(
    house: MemoryHouse, database: Database, engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been committed nevertheless, so nobody is told that it was not."""
    peer = house.peer()
    after = database.write(B)
    poll(house)
    finish = engine._writer.tpc_finish

    def lost(meta: Any) -> Any:
        finish(meta)
        raise StorageError("the connection to the database was lost")

    monkeypatch.setattr(engine._writer, "tpc_finish", lost)
    id = b"made by a client"
    assert not peer._settled(peer.prepare(A, data=b"ours", id=id)).result
    with pytest.raises(StorageError, match="was lost"):
        peer.ask("tpc_finish", id)
    monkeypatch.undo()
    assert not house.fatal
    with pytest.raises(StorageError, match="not known"):
        peer.ask("outcome", id, after)
    poll(house)
    tid, oids = peer.told()[-1]
    assert oids == (A,)
    assert load(peer, A) == (b"ours", tid, None)
    assert peer.commit(A, id=b"the next one") > tid


def test_a_poll_that_fails_is_logged_once(
    house: MemoryHouse, database: Database, engine: PolledEngine, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    peer = house.peer()

    def broken() -> Any:
        raise OSError("the database is gone")

    monkeypatch.setattr(engine._watcher, "poll_invalidations", broken)
    with caplog.at_level(logging.INFO, "zeoid.server"):
        for _ in range(3):
            poll(house)
        tid = database.write(A)
        monkeypatch.undo()
        poll(house)
    assert [record.message for record in caplog.records if "asked" in record.message] == [
        "storage '1' can't be asked what others commit: the database is gone",
        "storage '1' can be asked again what others commit",
    ]
    assert peer.told()[-1] == (tid, (A,))


def test_one_poll_is_under_way_at_a_time(house: MemoryHouse) -> None:
    house.later(limits.POLL_S)
    house.later(limits.POLL_S)
    house.hosted.look()
    assert len(house.commit) == 1
    house.commit.run_all()
    house.later(limits.POLL_S * 0.9)
    assert not len(house.commit)


def test_an_object_that_is_too_young_makes_the_server_look(
    make_house: Callable[..., MemoryHouse], tmp_path: Path
) -> None:
    """Without history a reader that has gone ahead finds nothing at the tid that was told."""
    database = Database(tmp_path / "without-history", keep_history=False)
    database.write(A)
    house = make_house({"1": engine_of(database.open())})
    poll(house)
    peer = house.peer()
    database.write(A)
    assert load(peer, A) is None
    house.work()
    assert load(peer, A)[0] == b"others'"
    house.close()
    database.close()


def test_a_copy_is_refused_once_others_are_beyond_it(house: MemoryHouse, database: Database) -> None:
    peer = house.peer()
    tid = database.write(A)
    poll(house)
    peer.begin(tid=tid)
    peer.one_way("restorea", B, tid, b"copied", None, 1)
    with pytest.raises(StorageError, match="too old"):
        peer.ask("vote", 1)


def test_everything_is_read_in_threads(house: MemoryHouse, database: Database) -> None:
    """Whatever a database has to be asked for must not hold up the event loop."""
    peer = house.peer()
    tid = peer.ask("lastTransaction")
    asked = [
        ("loadBefore", A, MAX_TID), ("loadSerial", A, tid), ("getTid", A), ("history", A, 1), ("undoInfo",),
        ("undoLog",), ("iterator_start",), ("new_oids", 3),
    ]  # fmt: skip
    calls = peer.calls(*asked)
    assert not any(call.answered for call in calls)
    house.beside.run_all()
    peer.read()
    results = {call.name: call.result for call in calls}
    assert results["loadSerial"] == b"at the start"
    assert results["getTid"] == tid
    assert len(results["new_oids"]) == 3
    number = results["iterator_start"]
    for name, args, last in (
        ("iterator_next", (number,), (tid, " ", b"other", b"written directly", {})),
        ("iterator_record_start", (number, tid), 1),
        ("iterator_record_next", (1,), (A, tid, b"at the start", None)),
        ("iterator_gc", ([number, 1],), None),
    ):
        call = peer.start(name, *args)
        assert not call.answered
        house.beside.run_all()
        peer.read()
        assert call.result == last
    with pytest.raises(POSKeyError):
        load(peer, p64(99))


def test_a_client_that_asks_for_very_much_is_read_later(
    house: MemoryHouse, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = house.peer()
    monkeypatch.setattr(peer.session._reads, "_most", 2)
    calls = [Call("loadBefore", (oid, MAX_TID)) for oid in (A, B, C)]
    peer.send(b"".join(peer.connection.call(call, call.name, call.args) for call in calls))
    assert len(house.beside) == 2
    assert peer.wire.stopped
    house.beside.run()
    assert not peer.wire.stopped
    assert len(house.beside) == 2
    house.beside.run_all()
    peer.read()
    assert [call.result[0] for call in calls] == [b"at the start"] * 3


def test_the_size_is_asked_for_in_a_thread_and_told(house: MemoryHouse, database: Database) -> None:
    peer = house.peer()
    size = peer.ask("get_info")["size"]
    house.later(limits.FOREIGN_INFO_S)
    house.commit.run_all()
    assert not len(house.beside), "nothing has changed"
    database.write(A, data=b"x" * 200_000)
    poll(house)
    house.later(limits.FOREIGN_INFO_S)
    assert len(house.beside) == 1
    house.beside.run_all()
    peer.read()
    assert peer.ask("get_info")["size"] >= size


def test_a_transaction_of_a_client_that_is_gone_is_abandoned(house: MemoryHouse, database: Database) -> None:
    peer = house.peer()
    peer.prepare(A)
    house.commit.run_all()
    peer.disconnect()
    house.commit.run_all()
    assert database.write(A), "the database holds no lock of it"


def test_an_empty_database_is_served(make_house: Callable[..., MemoryHouse], tmp_path: Path) -> None:
    database = Database(tmp_path / "empty")
    house = make_house({"1": engine_of(database.open())})
    writer, reader = house.peer(), house.peer()
    assert writer.ask("lastTransaction") == NO_TID
    tid = writer.commit(A)
    assert reader.told() == [(tid, (A,))]
    assert not reader.dropped
    house.close()
    database.close()


@pytest.mark.parametrize("keep_history", [True, False])
def test_a_transaction_that_writes_nothing_is_no_reason_to_doubt_the_database(
    make_house: Callable[..., MemoryHouse], tmp_path: Path, keep_history: bool
) -> None:
    """Its tid is in no record, so that no view ever shows it."""
    database = Database(tmp_path / "other", keep_history=keep_history)
    serial = database.write(A)
    house = make_house({"1": engine_of(database.open())})
    peer, reader = house.peer(), house.peer()
    peer.begin()
    peer.one_way("checkCurrentSerialInTransaction", A, serial, 1)
    assert not peer.ask("vote", 1)
    tid = peer.ask("tpc_finish", 1)
    assert reader.told() == [(tid, ())]
    assert load(reader, A) == (b"others'", serial, None)
    tid = database.write(A)
    poll(house)
    assert load(reader, A)[:2] == (b"others'", tid)
    assert not reader.dropped
    house.close()
    database.close()


@pytest.mark.parametrize("keep_history", [True, False])
def test_a_deletion_is_read_as_one(
    make_house: Callable[..., MemoryHouse], tmp_path: Path, keep_history: bool
) -> None:
    database = Database(tmp_path / "other", keep_history=keep_history)
    serial = database.write(A, B)
    house = make_house({"1": engine_of(database.open())})
    peer = house.peer()
    assert load(peer, A)
    peer.begin()
    peer.one_way("deleteObject", A, serial, 1)
    peer.ask("vote", 1)
    peer.ask("tpc_finish", 1)
    with pytest.raises(POSKeyError):
        load(peer, A)
    assert load(peer, B) == (b"others'", serial, None)
    house.close()
    database.close()


def test_a_replica_that_lags_behind_our_commit_makes_clients_start_over(
    house: MemoryHouse, database: Database, engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have committed before ours, and it can't tell. It stands in that no view is renewed."""
    writer, reader = house.peer(), house.peer()
    before = reader.ask("lastTransaction")
    assert load(reader, B)
    (idle, _) = engine._readers._idle[0]
    for instance in (engine._watcher, idle):
        last = instance.lastTransaction()
        monkeypatch.setattr(instance, "poll_invalidations", dict)
        monkeypatch.setattr(instance, "lastTransaction", lambda last=last: last)
    writer.begin()
    writer.store(A)
    writer.start("vote", 1)
    house.commit.run_all()
    writer.start("tpc_finish", 1)
    house.commit.run_all()
    assert writer.dropped
    assert reader.dropped
    again = house.peer()
    assert again.ask("getInvalidations", before) is None
    with pytest.raises(ReadConflictError):
        load(again, A)
    poll(house)
    assert not again.dropped, "once is enough"
    monkeypatch.undo()
    poll(house)
    newest = house.peer()
    assert load(newest, A)[0] == b"data"
