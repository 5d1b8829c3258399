"""The engine that adapts a ZODB storage: transactions, conflicts, and what must not reach the storage."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import (
    ConflictError,
    POSError,
    POSKeyError,
    ReadConflictError,
    StorageError,
    UndoError,
    Unsupported,
)
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.utils import p64

from tests.engines.datafiles import use_small_segments
from zeoid.engines.filestorage import FileStorageEngine
from zeoid.engines.opening import engine_of, open_filestorage, open_memory
from zeoid.engines.storage import StorageEngine
from zeoid.model import (
    MAX_TID,
    NO_TID,
    CheckCurrent,
    Delete,
    Operation,
    Restore,
    Store,
    TransactionInfo,
    Undo,
)
from zeoid.ports import Commit, Prepared

INFO = TransactionInfo(b"user", b"description", {"key": "value"})
A, B, C = p64(1), p64(2), p64(3)


def tid(number: int) -> bytes:
    return bytes(p64(0x03C0_0000_0000_0000 + number))


def prepare(
    engine: StorageEngine, at: bytes, *operations: Operation, info: TransactionInfo = INFO
) -> Prepared:
    return engine.prepare(at if engine.exclusive else None, info, operations)


def write(
    engine: StorageEngine, at: bytes, *operations: Operation, info: TransactionInfo = INFO, id: bytes = b""
) -> None:
    prepared = prepare(engine, at, *operations, info=info)
    assert not prepared.conflicts
    engine.commit([Commit(at, id, prepared)])


def short(prepared: Prepared) -> list[tuple[bytes, bytes, bytes, bytes]]:
    return [(each.oid, each.committed, each.read, each.data) for each in prepared.conflicts]


def exists(engine: StorageEngine, oid: bytes) -> bool:
    try:
        return engine.load_before(oid, MAX_TID) is not None
    except POSKeyError:
        return False


@pytest.fixture(autouse=True, scope="module")
def small_segments() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_small_segments(patch)
        yield


MAKERS: dict[str, Callable[[Path], StorageEngine]] = {
    "FileStorage": lambda folder: open_filestorage(folder / "Data.fs"),
    "MappingStorage": lambda folder: open_memory(),
    "DemoStorage": lambda folder: engine_of(DemoStorage()),
}


@pytest.fixture(params=MAKERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageEngine]:
    engine = MAKERS[request.param](tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def file_engine(tmp_path: Path) -> Iterator[StorageEngine]:
    engine = open_filestorage(tmp_path / "Data.fs")
    yield engine
    engine.close()


# Any storage ----------------------------------------------------------------------------------------------


def test_prepare_and_commit(engine: StorageEngine) -> None:
    prepared = prepare(engine, tid(1), Store(A, NO_TID, b"one"), Store(B, NO_TID, b"two"))
    assert (list(prepared.conflicts), list(prepared.oids), list(prepared.resolved)) == ([], [A, B], [])
    assert not exists(engine, A)
    engine.commit([Commit(tid(1), b"", prepared)])
    assert engine.last_tid() == tid(1)
    assert engine.load_before(A, MAX_TID) == (b"one", tid(1), None)
    assert engine.load_serial(B, tid(1)) == b"two"
    assert engine.current_tid(B) == tid(1)
    assert engine.count() == 2


def test_prepare_and_abandon(engine: StorageEngine) -> None:
    engine.abandon(prepare(engine, tid(1), Store(A, NO_TID, b"one")))
    assert not exists(engine, A)
    assert engine.last_tid() == NO_TID
    write(engine, tid(2), Store(A, NO_TID, b"two"))
    assert engine.load_before(A, MAX_TID) == (b"two", tid(2), None)


def test_a_conflict_leaves_nothing(engine: StorageEngine) -> None:
    write(engine, tid(1), Store(A, NO_TID, b"one"))
    write(engine, tid(2), Store(A, tid(1), b"two"))
    prepared = prepare(engine, tid(3), Store(B, NO_TID, b"new"), Store(A, tid(1), b"mine"))
    assert short(prepared) == [(A, tid(2), tid(1), b"mine")]
    assert not exists(engine, B)
    write(engine, tid(3), Store(A, tid(2), b"three"))  # the lock is free


def test_all_conflicts_are_found_at_once(engine: StorageEngine) -> None:
    write(engine, tid(1), Store(A, NO_TID, b"a"), Store(B, NO_TID, b"b"), Store(C, NO_TID, b"c"))
    stores = [Store(A, NO_TID, b"x"), Store(B, tid(1), b"y"), Store(C, NO_TID, b"z")]
    prepared = prepare(engine, tid(2), *stores)
    assert [conflict.oid for conflict in prepared.conflicts] == [A, C]


def test_a_failure_leaves_nothing(engine: StorageEngine) -> None:
    write(engine, tid(1), Store(A, NO_TID, b"one"))
    with pytest.raises(ReadConflictError):
        prepare(engine, tid(2), Store(B, NO_TID, b"new"), CheckCurrent(A, NO_TID))
    assert not exists(engine, B)
    write(engine, tid(2), Store(B, NO_TID, b"two"))


def test_a_check_that_holds_writes_nothing(engine: StorageEngine) -> None:
    write(engine, tid(1), Store(A, NO_TID, b"one"))
    prepared = prepare(engine, tid(2), CheckCurrent(A, tid(1)), Store(B, NO_TID, b"two"))
    assert list(prepared.oids) == [B]
    engine.commit([Commit(tid(2), b"", prepared)])
    assert engine.current_tid(A) == tid(1)


def test_a_transaction_without_operations(engine: StorageEngine) -> None:
    prepared = prepare(engine, tid(1))
    assert list(prepared.oids) == []
    engine.commit([Commit(tid(1), b"", prepared)])
    assert engine.last_tid() == tid(1)


@pytest.mark.parametrize(
    "operation", [Store(A, NO_TID, b""), Restore(A, b"", None)], ids=["store", "restore"]
)
def test_empty_data_is_refused(engine: StorageEngine, operation: Operation) -> None:
    with pytest.raises(StorageError, match="is empty"):
        prepare(engine, tid(1), operation)
    write(engine, tid(1), Store(A, NO_TID, b"one"))


def test_oids_are_never_given_twice(engine: StorageEngine) -> None:
    given = engine.new_oids(150)
    write(engine, tid(1), *(Store(oid, NO_TID, b"x") for oid in given[::3]))
    engine.abandon(prepare(engine, tid(2), Store(given[1], NO_TID, b"x")))
    more = engine.new_oids(150)
    assert len({*given, *more}) == 300


def test_an_unknown_object(engine: StorageEngine) -> None:
    for read in (
        lambda: engine.load_before(A, MAX_TID),
        lambda: engine.load_serial(A, tid(1)),
        lambda: engine.current_tid(A),
    ):
        with pytest.raises(POSKeyError):
            read()
    assert engine.newest_tid(A) is None


def test_what_a_storage_does_not_have(tmp_path: Path) -> None:
    engine = open_memory()
    for operation in (Restore(A, b"x", None), Delete(A, NO_TID), Undo(b"AAAAAAAAAAA=")):
        with pytest.raises(Unsupported, match="memory has no"):
            prepare(engine, tid(1), operation)
    write(engine, tid(1), Store(A, NO_TID, b"x"))
    assert (engine.supports_undo, engine.undo_log(0, 20), engine.undo_info(0, 20, None)) == (False, [], [])
    assert engine.last_invalidations(10) == []
    engine.close()


def test_an_engine_that_keeps_no_ids_says_so(tmp_path: Path) -> None:
    engine = open_memory()
    write(engine, tid(1), Store(A, NO_TID, b"x"), id=b"id")
    outcomes = engine.outcomes()
    assert (outcomes.floor, list(outcomes.committed)) == (tid(1), [])
    assert engine.checkpoint() == tid(1)
    assert engine.failure == ""
    engine.close()


def test_the_engine_fits_the_storage(tmp_path: Path) -> None:
    for storage, kind in (
        (FileStorage(str(tmp_path / "Data.fs")), FileStorageEngine),
        (MappingStorage(), StorageEngine),
        (DemoStorage(), StorageEngine),
    ):
        engine = engine_of(storage)
        assert type(engine) is kind
        engine.close()


def test_what_a_storage_says_of_itself(tmp_path: Path) -> None:
    engine = open_filestorage(tmp_path / "Data.fs")
    assert engine.name == str(tmp_path / "Data.fs")
    assert (engine.read_only, engine.supports_undo, engine.supports_record_iteration) == (False, True, True)
    assert ("ZODB.interfaces", "IStorageUndoable") in engine.interfaces
    engine.close()


def test_a_storage_with_blobs_promises_what_its_clients_can_do(tmp_path: Path) -> None:
    """Stock clients believe what the interfaces say, and have no way to restore a blob."""
    storage = FileStorage(str(tmp_path / "Data.fs"), blob_dir=str(tmp_path / "blobs"))
    assert IBlobStorage.providedBy(storage)
    engine = engine_of(storage)
    assert [name for _, name in engine.interfaces if "Blob" in name] == ["IBlobStorage"]
    engine.close()


# FileStorage ----------------------------------------------------------------------------------------------


def test_deletion(file_engine: StorageEngine) -> None:
    write(file_engine, tid(1), Store(A, NO_TID, b"one"))
    prepared = prepare(file_engine, tid(2), Delete(A, tid(1)))
    assert list(prepared.oids) == [A]
    file_engine.commit([Commit(tid(2), b"", prepared)])
    assert not exists(file_engine, A)
    assert file_engine.newest_tid(A) == tid(2)
    with pytest.raises(POSKeyError):
        file_engine.current_tid(A)


def test_undo(file_engine: StorageEngine) -> None:
    write(file_engine, tid(1), Store(A, NO_TID, b"one"))
    write(file_engine, tid(2), Store(A, tid(1), b"two"))
    (entry,) = file_engine.undo_log(0, 1)
    prepared = prepare(file_engine, tid(3), Undo(entry["id"]))
    assert (list(prepared.oids), list(prepared.resolved)) == ([A], [A])
    file_engine.commit([Commit(tid(3), b"", prepared)])
    assert file_engine.load_before(A, MAX_TID) == (b"one", tid(3), None)


@pytest.mark.parametrize(
    "id", [b"", b"garbage", b"!", b"AAAAAAAAAAA=", b"\xff\xff", b"A" * 10_000], ids=lambda id: repr(id)[:20]
)
def test_undo_of_what_is_no_transaction(file_engine: StorageEngine, id: bytes) -> None:
    write(file_engine, tid(1), Store(A, NO_TID, b"one"))
    with pytest.raises(UndoError):
        prepare(file_engine, tid(2), Undo(id))
    write(file_engine, tid(2), Store(A, tid(1), b"two"))


def test_restore(file_engine: StorageEngine) -> None:
    write(file_engine, tid(1), Restore(A, b"one", None), Restore(B, b"other", None))
    write(file_engine, tid(5), Restore(A, b"two", None), Restore(B, None, None))
    write(file_engine, tid(7), Restore(A, b"one", tid(1)))
    assert file_engine.load_before(A, MAX_TID) == (b"one", tid(7), None)
    assert file_engine.load_before(A, tid(7)) == (b"two", tid(5), tid(7))
    assert not exists(file_engine, B)


@pytest.mark.parametrize(
    "info",
    [
        TransactionInfo(b"u" * 70_000, b"", {}),
        TransactionInfo(b"", b"d" * 70_000, {}),
        TransactionInfo(b"", b"", {"key": "v" * 70_000}),
    ],
    ids=["user", "description", "extension"],
)
@pytest.mark.parametrize("maker", ["filestorage", "adapter"])
def test_metadata_that_does_not_fit_locks_nobody_out(
    tmp_path: Path, maker: str, info: TransactionInfo
) -> None:
    """FileStorage finds out when it already holds its lock."""
    path = tmp_path / "Data.fs"
    engine = open_filestorage(path) if maker == "filestorage" else StorageEngine(FileStorage(str(path)))
    with pytest.raises(POSError, match=r"too|longer"):
        prepare(engine, tid(1), Store(A, NO_TID, b"one"), info=info)
    assert not engine._storage._commit_lock.locked()
    write(engine, tid(1), Store(A, NO_TID, b"one"))
    engine.close()


@pytest.mark.parametrize("part", ["user", "description"])
def test_metadata_that_just_fits(file_engine: StorageEngine, part: str) -> None:
    longest = {"user": b"", "description": b"", "extension": {}, part: b"x" * 65_535}
    write(file_engine, tid(1), Store(A, NO_TID, b"one"), info=TransactionInfo(**longest))
    (found,) = file_engine.iterate(None, None)
    assert getattr(found, part) == b"x" * 65_535
    longest[part] += b"x"
    with pytest.raises(StorageError, match="longer"):
        prepare(file_engine, tid(2), Store(B, NO_TID, b"two"), info=TransactionInfo(**longest))


def test_metadata_is_kept(file_engine: StorageEngine) -> None:
    write(file_engine, tid(1), Store(A, NO_TID, b"one"), info=INFO)
    write(file_engine, tid(2), Store(A, tid(1), b"two"), info=TransactionInfo(b"", b"", {}, tid(2), "p"))
    found = [(each.tid, each.status, each.user, each.extension) for each in file_engine.iterate(None, None)]
    assert found == [(tid(1), " ", b"user", {"key": "value"}), (tid(2), "p", b"", {})]
    assert file_engine.history(A, 2)[1]["description"] == b"description"


def test_last_invalidations(file_engine: StorageEngine) -> None:
    for number in range(1, 5):
        write(file_engine, tid(number), Store(p64(number), NO_TID, b"x"))
    assert file_engine.last_invalidations(2) == [(tid(3), (p64(3),)), (tid(4), (p64(4),))]
    assert len(file_engine.last_invalidations(100)) == 4
    assert file_engine.last_invalidations(0) == []


def test_transactions_from_and_to(file_engine: StorageEngine) -> None:
    for number in (1, 3, 5, 7):
        write(file_engine, tid(number), Store(p64(number), NO_TID, b"x"))
    for start, stop, expected in (
        (None, None, [1, 3, 5, 7]),
        (tid(3), tid(5), [3, 5]),
        (tid(2), tid(6), [3, 5]),
        (tid(8), None, []),
        (None, tid(0), []),
    ):
        assert [each.tid for each in file_engine.iterate(start, stop)] == [tid(each) for each in expected]


@pytest.mark.parametrize("start", [1, 2, 3, 4, 5])
def test_iteration_while_a_transaction_is_prepared(file_engine: StorageEngine, start: int) -> None:
    for number in (1, 2, 3):
        write(file_engine, tid(number), Store(p64(number), NO_TID, b"x"))
    prepared = prepare(file_engine, tid(4), Store(A, tid(1), b"prepared" * 1000))
    found = [each.tid for each in file_engine.iterate(tid(start), None)]
    assert found == [tid(number) for number in (1, 2, 3) if number >= start]
    file_engine.abandon(prepared)


# Conflicts are found before the storage resolves them -----------------------------------------------------

ran: list[str] = []


def note(what: str) -> object:
    """Called by a pickle of this test's, if anything should load it."""
    ran.append(what)
    return object()


class Planted:
    def __reduce__(self) -> Any:
        return note, ("planted code ran",)


class Counter(MinPO):
    def _p_resolveConflict(self, old: Any, saved: Any, mine: Any) -> Any:
        ran.append("a conflict was resolved")
        return mine


@pytest.fixture
def nothing_ran() -> Iterator[None]:
    ran.clear()
    yield
    assert ran == []


@pytest.mark.usefixtures("nothing_ran")
def test_the_server_resolves_nothing(engine: StorageEngine) -> None:
    write(engine, tid(1), Store(A, NO_TID, zodb_pickle(Counter(1))))
    write(engine, tid(2), Store(A, tid(1), zodb_pickle(Counter(2))))
    mine = zodb_pickle(Counter(3))
    assert short(prepare(engine, tid(3), Store(A, tid(1), mine))) == [(A, tid(2), tid(1), mine)]


def test_the_server_resolves_where_it_is_told_to(engine: StorageEngine) -> None:
    engine.resolve_conflicts()
    assert engine.resolves_conflicts
    write(engine, tid(1), Store(A, NO_TID, zodb_pickle(Counter(1))))
    write(engine, tid(2), Store(A, tid(1), zodb_pickle(Counter(2))))
    ran.clear()
    prepared = prepare(engine, tid(3), Store(A, tid(1), zodb_pickle(Counter(3))))
    assert (list(prepared.conflicts), list(prepared.resolved), ran) == ([], [A], ["a conflict was resolved"])
    engine.commit([Commit(tid(3), b"", prepared)])
    assert b"K\x03" in engine.load_serial(A, tid(3))
    with pytest.raises(ConflictError):
        prepare(engine, tid(4), Store(A, tid(1), b"nothing that can be resolved"))


@pytest.mark.usefixtures("nothing_ran")
@pytest.mark.parametrize("serial", [NO_TID, tid(1), tid(9)], ids=["new", "old", "future"])
@pytest.mark.parametrize("how", ["changed", "deleted", "uncreated"])
def test_what_a_client_stores_is_never_unpickled(
    file_engine: StorageEngine, how: str, serial: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Not for an object that is deleted, either, of which FileStorage says that it has no tid."""
    write(file_engine, tid(1), Store(A, NO_TID, b"one"))
    if how == "changed":
        write(file_engine, tid(2), Store(A, tid(1), b"two"))
    elif how == "deleted":
        write(file_engine, tid(2), Delete(A, tid(1)))
    else:
        write(file_engine, tid(2), Undo(file_engine.undo_log(0, 1)[0]["id"]))
    planted = pickle.dumps(Planted(), 2)
    with caplog.at_level(logging.ERROR):
        prepared = prepare(file_engine, tid(3), Store(A, serial, planted))
    assert short(prepared) == [(A, tid(2), serial, planted)]
    assert caplog.records == []


def test_a_deleted_object_may_be_stored_by_whom_knows_of_the_deletion(file_engine: StorageEngine) -> None:
    write(file_engine, tid(1), Store(A, NO_TID, b"one"))
    write(file_engine, tid(2), Delete(A, tid(1)))
    write(file_engine, tid(3), Store(A, tid(2), b"three"))
    assert file_engine.load_before(A, MAX_TID) == (b"three", tid(3), None)


def test_the_test_would_notice_planted_code() -> None:
    ran.clear()
    pickle.loads(pickle.dumps(Planted(), 2))
    assert ran == ["planted code ran"]
