"""Blobs of storages that keep them by themselves: a file is handed over once, when no conflict is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ZODB.blob import BlobStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError, StorageError, Unsupported

from tests.engines.datafiles import BLOB_RECORD, INFO, A, B, record, tid
from zeoid.engines.opening import open_memory
from zeoid.engines.storage import StorageEngine
from zeoid.model import NO_TID, AttachBlob, Conflict, Operation, Restore, StagedBlob, Store, TransactionInfo
from zeoid.ports import Commit, Prepared

MAKERS: dict[str, Callable[[Path], object]] = {
    "FileStorage": lambda folder: FileStorage(str(folder / "Data.fs"), blob_dir=str(folder / "blobs")),
    "BlobStorage": lambda folder: BlobStorage(str(folder / "blobs"), MappingStorage("memory")),
}


@pytest.fixture(params=sorted(MAKERS))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageEngine]:
    engine = StorageEngine(MAKERS[request.param](tmp_path))
    yield engine
    engine.close()


def staged(engine: StorageEngine) -> list[str]:
    return os.listdir(engine._storage.temporaryDirectory())


def stage(engine: StorageEngine, content: bytes) -> StagedBlob:
    file = engine.stage_blob()
    file.write(content)
    return file.complete()


def prepare(
    engine: StorageEngine, number: int, *operations: Operation, info: TransactionInfo = INFO
) -> Prepared:
    return engine.prepare(tid(number), info, operations)


def commit(engine: StorageEngine, number: int, *operations: Operation) -> None:
    prepared = prepare(engine, number, *operations)
    assert not prepared.conflicts
    engine.commit([Commit(tid(number), b"", prepared)])


def content(engine: StorageEngine, oid: bytes, number: int) -> bytes:
    with engine.open_blob(oid, tid(number)) as file:
        return file.read()


def test_a_blob_is_stored_with_its_record(engine: StorageEngine) -> None:
    commit(engine, 1, Store(A, NO_TID, BLOB_RECORD), AttachBlob(A, stage(engine, b"one")))
    commit(engine, 2, AttachBlob(A, stage(engine, b"two")), Store(A, tid(1), BLOB_RECORD))
    assert content(engine, A, 1) == b"one"
    assert content(engine, A, 2) == b"two"
    assert staged(engine) == []
    with pytest.raises(POSKeyError):
        engine.open_blob(B, tid(1))


def test_a_conflict_leaves_the_blob_to_the_next_round(engine: StorageEngine) -> None:
    commit(engine, 1, Store(B, NO_TID, record(b"one")))
    commit(engine, 2, Store(B, tid(1), record(b"two")))
    blob = [Store(A, NO_TID, BLOB_RECORD), AttachBlob(A, stage(engine, b"content"))]
    prepared = prepare(engine, 3, *blob, Store(B, tid(1), record(b"mine")))
    assert list(prepared.conflicts) == [Conflict(B, tid(2), tid(1), record(b"mine"))]
    assert len(staged(engine)) == 1
    commit(engine, 4, *blob, Store(B, tid(2), record(b"merged")))
    assert content(engine, A, 4) == b"content"
    with pytest.raises(POSKeyError):
        engine.open_blob(A, tid(3))


def test_of_two_blobs_the_last_one_counts_and_the_other_goes(engine: StorageEngine) -> None:
    first, last = stage(engine, b"first"), stage(engine, b"last")
    commit(engine, 1, Store(A, NO_TID, BLOB_RECORD), AttachBlob(A, first), AttachBlob(A, last))
    assert content(engine, A, 1) == b"last"
    assert staged(engine) == []


def test_a_blob_without_a_record_is_refused(engine: StorageEngine) -> None:
    blob = stage(engine, b"content")
    with pytest.raises(StorageError, match="no record"):
        prepare(engine, 1, AttachBlob(A, blob))
    assert len(staged(engine)) == 1
    engine.discard_blobs([blob, blob])
    assert staged(engine) == []
    commit(engine, 2, Store(A, NO_TID, BLOB_RECORD))  # it does not hold the storage


def test_what_is_abandoned_is_gone(engine: StorageEngine) -> None:
    prepared = prepare(engine, 1, Store(A, NO_TID, BLOB_RECORD), AttachBlob(A, stage(engine, b"content")))
    engine.abandon(prepared)
    with pytest.raises(POSKeyError):
        engine.open_blob(A, tid(1))
    assert staged(engine) == []


def test_a_record_can_be_restored_with_its_blob(tmp_path: Path) -> None:
    engine = StorageEngine(MAKERS["FileStorage"](tmp_path))
    commit(engine, 1, Restore(A, BLOB_RECORD, None), AttachBlob(A, stage(engine, b"content")))
    assert content(engine, A, 1) == b"content"
    engine.close()


def test_a_storage_without_blobs_takes_none() -> None:
    engine = open_memory()
    for call in (
        engine.stage_blob,
        lambda: engine.open_blob(A, tid(1)),
        lambda: engine.take_shared_blob(A, "x.tmp"),
    ):
        with pytest.raises(Unsupported):
            call()
    engine.close()


def test_no_directory_is_shared_with_clients(engine: StorageEngine) -> None:
    with pytest.raises(Unsupported, match="shares no blob directory"):
        engine.take_shared_blob(A, "x.tmp")
