"""The engine for databases that others write to, on RelStorage with SQLite and another writer beside it."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.interfaces import IMVCCStorage, IStorageCurrentRecordIteration
from ZODB.POSException import ConflictError, POSKeyError, ReadConflictError, StorageError, Unsupported
from ZODB.tests.ConflictResolution import PCounter
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.utils import p64

from tests.engines.relstorages import Database
from zeoid.engines.opening import engine_of
from zeoid.engines.polled import PolledEngine
from zeoid.model import (
    MAX_TID,
    NO_TID,
    CheckCurrent,
    Operation,
    Restore,
    Store,
    TransactionInfo,
    Undo,
    tid_after,
)
from zeoid.ports import Commit, News

INFO = TransactionInfo(b"user", b"description", {"key": "value"})
A, B, C = p64(1), p64(2), p64(3)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "database")
    yield database
    database.close()


@pytest.fixture
def engine(database: Database) -> Iterator[PolledEngine]:
    engine = engine_of(database.open())
    assert isinstance(engine, PolledEngine)
    yield engine
    engine.close()


def write(engine: PolledEngine, *operations: Operation, info: TransactionInfo = INFO) -> bytes:
    prepared = engine.prepare(None, info, operations)
    assert not prepared.conflicts
    (tid,) = engine.commit([Commit(b"", b"", prepared)]) or ()
    return tid


def store(engine: PolledEngine, oid: bytes, data: bytes = b"ours") -> bytes:
    revision = None
    with contextlib.suppress(POSKeyError):
        revision = engine.load_before(oid, MAX_TID)
    tid = write(engine, Store(oid, NO_TID if revision is None else revision[1], data))
    engine.poll()
    return tid


def test_the_database_gives_the_tids(engine: PolledEngine, database: Database) -> None:
    first = store(engine, A)
    others = database.write(B)
    second = store(engine, A, b"more")
    assert first < others < second == engine.last_tid()
    assert engine.load_before(A, second) == (b"ours", first, second)
    assert engine.load_before(A, MAX_TID) == (b"more", second, None)
    assert engine.load_serial(A, first) == b"ours"
    assert engine.current_tid(A) == second
    assert [entry["tid"] for entry in engine.history(A, 5)] == [second, first]


def test_a_poll_tells_what_was_committed_once(engine: PolledEngine, database: Database) -> None:
    store(engine, A)
    assert engine.poll() is None
    database.write(A)
    last = database.write(B, C)
    assert engine.poll() == News(last, [A, B, C])
    assert engine.poll() is None


def test_an_empty_database_that_fills_has_nothing_that_could_be_stale(
    engine: PolledEngine, database: Database
) -> None:
    """RelStorage says that everything may have changed."""
    assert engine.last_tid() == NO_TID
    tid = database.write(A)
    assert engine.poll() == News(tid, [])


def test_what_was_there_at_the_start_is_no_news(database: Database) -> None:
    tid = database.write(A)
    engine = engine_of(database.open())
    assert (engine.last_tid(), engine.poll()) == (tid, None)
    assert engine.load_before(A, MAX_TID) == (b"others'", tid, None)
    engine.close()


def test_what_was_told_is_read(engine: PolledEngine, database: Database) -> None:
    """A reader that was used before has an older view: it must not be read with any more."""
    store(engine, A)
    engine.load_before(A, MAX_TID)
    tid = database.write(A)
    assert engine.poll() == News(tid, [A])
    assert engine.load_before(A, tid_after(tid)) == (b"others'", tid, None)
    assert engine.current_tid(A) == tid


def test_an_old_state_is_read_though_the_view_is_newer(engine: PolledEngine, database: Database) -> None:
    first = store(engine, A)
    tid = database.write(A)
    engine.poll()
    assert engine.load_before(A, tid_after(first)) == (b"ours", first, tid)
    assert engine.load_before(A, first) is None


def test_a_database_that_goes_back_is_not_read(
    engine: PolledEngine, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that lags, after a switch: it stands in that a reader does not get its view renewed."""
    store(engine, A)
    engine.load_before(A, MAX_TID)
    (reader, _) = engine._readers._idle[0]
    monkeypatch.setattr(reader, "poll_invalidations", dict)
    last = reader.lastTransaction()
    monkeypatch.setattr(reader, "lastTransaction", lambda: last)
    database.write(A)
    engine.poll()
    with pytest.raises(ReadConflictError, match="older state"):
        engine.load_before(A, MAX_TID)
    monkeypatch.undo()
    assert engine.load_before(A, MAX_TID)[0] == b"others'"  # type: ignore[index]


def test_what_cant_be_told_is_said_once(
    engine: PolledEngine, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(engine, A)
    monkeypatch.setattr(engine._watcher, "poll_invalidations", lambda: None)
    assert engine.poll() is None, "it can't be told what changed, but nothing did"
    monkeypatch.undo()
    tid = database.write(A)
    poll = engine._watcher.poll_invalidations
    monkeypatch.setattr(engine._watcher, "poll_invalidations", lambda: poll() and None)
    assert engine.poll() == News(tid, None)
    assert engine.poll() is None


def test_readers_give_up_views_that_are_old(engine: PolledEngine, database: Database) -> None:
    """A database can't clean away what somebody might still read."""
    store(engine, A)
    engine.load_before(A, MAX_TID)
    (reader, _) = engine._readers._idle[0]
    assert reader._load_connection
    database.write(A)
    engine.poll()
    assert not reader._load_connection.active


def test_a_conflict_with_what_others_wrote_goes_to_the_client(
    engine: PolledEngine, database: Database
) -> None:
    mine = store(engine, A)
    others = database.write(A)
    (conflict,) = engine.prepare(None, INFO, [Store(A, mine, b"late")]).conflicts
    assert (conflict.oid, conflict.committed, conflict.read, conflict.data) == (A, others, mine, b"late")
    assert engine.poll() == News(others, [A])
    assert store(engine, B) > others, "nothing is left of it"


def test_a_conflict_that_only_the_database_finds_goes_to_the_client(
    engine: PolledEngine, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is committed after we have looked; and nobody runs the application's code over it."""
    mine = store(engine, A, zodb_pickle(PCounter()))
    vote = engine._writer.tpc_vote
    others = []

    def overtaken(meta: Any) -> Any:
        others.append(database.write(A, data=zodb_pickle(PCounter())))
        return vote(meta)

    monkeypatch.setattr(engine._writer, "tpc_vote", overtaken)
    monkeypatch.setattr(PCounter, "_p_resolveConflict", None)
    data = zodb_pickle(PCounter())
    (conflict,) = engine.prepare(None, INFO, [Store(A, mine, data)]).conflicts
    monkeypatch.undo()
    assert (conflict.oid, conflict.committed, conflict.read, conflict.data) == (A, others[0], mine, data)
    assert store(engine, B) > others[0], "nothing is left of it"


class Trap:
    """Unpickled, it tells."""

    def __reduce__(self) -> Any:
        return sys.intern, ("sprung",)


def test_no_record_is_unpickled_over_a_conflict(
    engine: PolledEngine, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = store(engine, A)
    vote = engine._writer.tpc_vote
    monkeypatch.setattr(engine._writer, "tpc_vote", lambda meta: (database.write(A), vote(meta)))
    trap, sprung = pickle.dumps(Trap(), 3), []  # what ZODB reads
    monkeypatch.setattr(sys, "intern", sprung.append)
    assert engine.prepare(None, INFO, [Store(A, mine, trap)]).conflicts
    assert "sprung" not in sprung


def test_a_check_against_what_others_wrote_fails(engine: PolledEngine, database: Database) -> None:
    mine = store(engine, A)
    database.write(A)
    with pytest.raises(ReadConflictError):
        engine.prepare(None, INFO, [CheckCurrent(A, mine), Store(B, NO_TID, b"depends on it")])
    assert store(engine, B)


def test_an_abandoned_transaction_leaves_nothing(engine: PolledEngine, database: Database) -> None:
    engine.abandon(engine.prepare(None, INFO, [Store(A, NO_TID, b"never")]))
    with pytest.raises(POSKeyError):
        engine.load_before(A, MAX_TID)
    assert database.write(A), "no lock of the database is left either"


def test_a_copied_transaction_keeps_its_tid(engine: PolledEngine, database: Database) -> None:
    tid = tid_after(tid_after(store(engine, A)))
    copied = TransactionInfo(b"user", b"", {}, tid, "p")
    assert write(engine, Restore(B, b"copied", None), info=copied) == tid
    assert engine.poll() == News(tid, [B])
    assert engine.load_before(B, MAX_TID) == (b"copied", tid, None)


def test_a_copy_that_others_have_overtaken_is_refused(engine: PolledEngine, database: Database) -> None:
    store(engine, A)
    others = database.write(A)
    copied = TransactionInfo(b"user", b"", {}, others, " ")
    with pytest.raises(StorageError):
        engine.prepare(None, copied, [Restore(B, b"copied", None)])
    earlier = TransactionInfo(b"user", b"", {}, p64(int.from_bytes(others, "big") - 1), " ")
    with pytest.raises(StorageError, match="too old"):
        engine.prepare(None, earlier, [Restore(B, b"copied", None)])
    assert engine.poll() == News(others, [A]), "what was seen under way is told"
    assert store(engine, B) > others


def test_a_copy_that_others_overtake_while_it_waits_for_the_lock_is_refused(
    engine: PolledEngine, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tid = tid_after(store(engine, A))
    begin, others = engine._writer.tpc_begin, []

    def waited(*args: Any) -> None:
        others.append(database.write(B))
        begin(*args)

    monkeypatch.setattr(engine._writer, "tpc_begin", waited)
    with pytest.raises(StorageError, match="too old"):
        engine.prepare(None, TransactionInfo(b"", b"", {}, tid), [Restore(C, b"copied", None)])
    monkeypatch.undo()
    assert engine.poll() == News(others[0], [B])
    assert store(engine, C) > others[0], "nothing is left of it"


def test_an_iterator_gives_its_instance_back(
    engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tid = store(engine, A)
    released = []
    release = type(engine._storage).release
    monkeypatch.setattr(
        type(engine._storage), "release", lambda self: (released.append(self), release(self))
    )
    iterator = engine.iterate(None, None)
    assert next(iterator).tid == tid
    assert not released
    assert not list(iterator)
    assert len(released) == 1


def test_a_record_is_restored_with_a_tid_only(engine: PolledEngine) -> None:
    with pytest.raises(Unsupported):
        engine.prepare(None, INFO, [Restore(A, b"copied", None)])


def test_undo(engine: PolledEngine) -> None:
    first = store(engine, A, b"one")
    second = store(engine, A, b"two")
    (entry,) = engine.undo_log(0, 1)
    assert [entry["id"] for entry in engine.undo_info(0, 1, None)] == [entry["id"]]
    prepared = engine.prepare(None, INFO, [Undo(entry["id"])])
    assert prepared.oids == prepared.resolved == [A]
    (third,) = engine.commit([Commit(b"", b"", prepared)]) or ()
    assert engine.poll() == News(third, [A])
    assert engine.load_before(A, MAX_TID) == (b"one", third, None)
    assert first < second < third


def test_an_object_whose_creation_was_undone_is_not_there(engine: PolledEngine) -> None:
    tid = store(engine, A)
    write(engine, Undo(engine.undo_log(0, 1)[0]["id"]))
    engine.poll()
    for before in (tid_after(engine.last_tid()), MAX_TID):
        with pytest.raises(POSKeyError):
            engine.load_before(A, before)
    assert engine.load_before(A, tid_after(tid))[0] == b"ours"  # type: ignore[index]
    assert engine.newest_tid(A) is None


def test_iteration_and_pack(engine: PolledEngine, database: Database) -> None:
    first, second = store(engine, A, b"one"), database.write(A)
    iterator = engine.iterate(None, None)
    assert next(iterator).tid == first
    assert [(record.oid, record.data) for record in next(iterator)] == [(A, b"others'")]
    assert list(iterator) == []
    assert [each.tid for each in engine.iterate(second, second)] == [second]
    iterator = engine.iterate(None, None)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]


def test_oids_are_never_the_same(engine: PolledEngine, database: Database) -> None:
    mine = engine.new_oids(40)
    others = [database.other.new_oid() for _ in range(40)]
    assert len({*mine, *others}) == 80


def test_clients_are_no_instances(engine: PolledEngine) -> None:
    names = {name for _, name in engine.interfaces}
    assert {"IStorage", "IStorageUndoable", "IStorageIteration"} <= names
    assert not {IMVCCStorage.__name__, IStorageCurrentRecordIteration.__name__, "IRelStorage"} & names
    assert not engine.supports_record_iteration


def test_a_conflict_resolved_here_takes_in_what_others_wrote(database: Database, tmp_path: Path) -> None:
    engine = engine_of(database.open())
    assert isinstance(engine, PolledEngine)
    engine.resolve_conflicts()
    counter = PCounter()
    counter.inc()
    mine = store(engine, A, zodb_pickle(counter))
    counter.inc()
    database.write(A, data=zodb_pickle(counter))
    prepared = engine.prepare(None, INFO, [Store(A, mine, zodb_pickle(counter))])
    assert (prepared.conflicts, prepared.resolved) == ((), [A])
    engine.commit([Commit(b"", b"", prepared)])
    engine.close()


def test_without_history_an_overwritten_state_is_gone(tmp_path: Path) -> None:
    database = Database(tmp_path / "database", keep_history=False)
    engine = engine_of(database.open())
    assert isinstance(engine, PolledEngine)
    assert not engine.supports_undo
    assert engine.undo_log(0, 10) == engine.undo_info(0, 10, None) == []
    first = store(engine, A)
    assert engine.load_before(A, tid_after(first)) == (b"ours", first, None)
    tid = database.write(A)
    engine.poll()
    assert engine.load_before(A, tid_after(first)) is None
    assert engine.load_before(A, tid_after(tid)) == (b"others'", tid, None)
    engine.close()
    database.close()


def test_conflicts_without_serials_are_errors(
    engine: PolledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(meta: Any) -> Any:
        raise ConflictError("a deadlock")

    monkeypatch.setattr(engine._writer, "tpc_vote", fail)
    with pytest.raises(ConflictError, match="a deadlock"):
        engine.prepare(None, INFO, [Store(A, NO_TID, b"data")])
    monkeypatch.undo()
    assert store(engine, A)
