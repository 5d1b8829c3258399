"""Blobs in transactions of the engine: whose a staged file is, and when it goes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from ZODB.FileStorage.FileStorage import FileStorageQuotaError
from ZODB.POSException import POSKeyError, StorageError

from tests.engines.blobfiles import contents, staged_files
from tests.engines.crashes import record_file_operations
from tests.engines.datafiles import (
    BLOB_RECORD,
    INFO,
    A,
    B,
    C,
    Database,
    databases,
    record,
    use_no_keeper,
    use_small_segments,
)
from zeoid.model import NO_TID, AttachBlob, Delete, Restore, Store
from zeoid.testing.disk import FaultyDisk


@pytest.fixture
def blob_dir(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def disk(tmp_path: Path) -> FaultyDisk:
    return FaultyDisk(tmp_path)


@pytest.fixture
def database(
    tmp_path: Path, blob_dir: Path, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Database]:
    use_small_segments(monkeypatch, 64 * 1024)
    use_no_keeper(monkeypatch)
    record_file_operations(monkeypatch, disk)
    opening = databases()
    start = next(opening)
    yield start(tmp_path / "Data.fs", disk, blob_dir)
    next(opening, None)


def test_a_committed_blob_is_found_by_object_and_transaction(database: Database, blob_dir: Path) -> None:
    first = database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"), (B, b"b"))
    assert database.blob(A, first) == b"one"
    assert database.blob(A, second) == b"two"
    assert database.blob(B, second) == b"b"
    assert database.blob(B, first) is None
    with pytest.raises(POSKeyError):
        database.engine.open_blob(C, first)
    database.engine.checkpoint()
    assert staged_files(blob_dir) == []
    assert contents(blob_dir) == [b"b", b"one", b"two"]


def test_abandoning_leaves_nothing(database: Database, blob_dir: Path) -> None:
    prepared = database.prepare(*database.blob_operations((A, b"one"), (B, b"two")))
    assert len(staged_files(blob_dir)) == 2
    database.engine.abandon(prepared)
    assert staged_files(blob_dir) == []
    assert contents(blob_dir) == []
    assert not list(blob_dir.rglob("0x01"))
    assert not list(blob_dir.rglob("0x02"))


def test_a_conflict_leaves_the_blob_to_the_next_round(database: Database, blob_dir: Path) -> None:
    """Of another object, too: what the client resolves comes with the same blob, and another tid."""
    before = database.store(B)
    database.store(B, data=b"newer")
    operations = [*database.blob_operations((A, b"content")), Store(B, before, record(b"mine"))]
    prepared = database.engine.prepare(None, INFO, operations)
    assert [conflict.oid for conflict in prepared.conflicts] == [B]
    assert len(staged_files(blob_dir)) == 1
    again = database.prepare(*operations[:2], Store(B, database.serial(B), record(b"merged")))
    (at,) = database.commit(again)
    assert database.blob(A, at) == b"content"


@pytest.mark.parametrize("why", ["room", "quota"])
def test_a_vote_that_fails_late_gives_the_blobs_back(
    database: Database, disk: FaultyDisk, blob_dir: Path, why: str
) -> None:
    operations = database.blob_operations((A, b"content"))
    problem: type[Exception] = StorageError
    if why == "room":
        database.appender._reserved = (None, 0)

        def full(name: str, path: str) -> None:
            if name == "reserve":
                raise OSError(errno.ENOSPC, "full")

        disk.on_operation = full
    else:
        database.storage._quota = 10
        problem = FileStorageQuotaError
    with pytest.raises(problem):
        database.prepare(*operations)
    disk.on_operation, database.storage._quota = None, None
    assert len(staged_files(blob_dir)) == 1
    (at,) = database.commit(database.prepare(*operations))
    assert database.blob(A, at) == b"content"


def test_of_two_blobs_for_an_object_the_last_one_counts(database: Database, blob_dir: Path) -> None:
    operations = database.blob_operations((A, b"first"), (A, b"last"))
    at = database.write(*operations)
    assert database.blob(A, at) == b"last"
    assert len(staged_files(blob_dir)) == 1  # until the checkpoint
    database.engine.checkpoint()
    assert staged_files(blob_dir) == []


def test_a_deletion_drops_the_blob_that_was_stored_before_it(database: Database, blob_dir: Path) -> None:
    before = database.store_blobs((A, b"one"))
    operations = database.blob_operations((A, b"two"))
    at = database.write(*operations, Delete(A, before))
    assert database.blob(A, at) is None
    assert database.data(A) is None
    assert database.blob(A, before) == b"one"  # until a pack
    database.engine.checkpoint()
    assert staged_files(blob_dir) == []


@pytest.mark.parametrize("last", ["nothing", "deletion", "end"])
def test_a_blob_without_a_record_is_refused(database: Database, blob_dir: Path, last: str) -> None:
    before = database.store(A)
    blob = database.stage(b"content")
    records = {"nothing": [], "deletion": [Delete(A, before)], "end": [Restore(A, None, None)]}[last]
    with pytest.raises(StorageError, match="no record"):
        database.prepare(*records, AttachBlob(A, blob))
    assert len(staged_files(blob_dir)) == 1
    database.engine.discard_blobs([blob, blob])
    assert staged_files(blob_dir) == []


def test_a_restored_record_can_have_a_blob(database: Database) -> None:
    blob = database.stage(b"content")
    at = database.write(Restore(A, BLOB_RECORD, None), AttachBlob(A, blob))
    assert database.blob(A, at) == b"content"


def test_the_order_of_record_and_blob_does_not_matter(database: Database) -> None:
    at = database.write(AttachBlob(A, database.stage(b"content")), Store(A, NO_TID, BLOB_RECORD))
    assert database.blob(A, at) == b"content"


def test_a_file_of_a_client_that_shares_the_directory(database: Database, blob_dir: Path) -> None:
    folder = Path(database.appender.blobs._layout.directory(A))
    folder.mkdir(parents=True)
    (folder / "x.tmp-").write_bytes(b"theirs")
    blob = database.engine.take_shared_blob(A, "x.tmp-")
    at = database.write(Store(A, NO_TID, BLOB_RECORD), AttachBlob(A, blob))
    assert database.blob(A, at) == b"theirs"
    database.engine.checkpoint()
    assert contents(blob_dir) == [b"theirs"]
    assert list(folder.iterdir()) == [folder / f"0x{at.hex()}.blob"]


def test_a_transaction_without_blobs_does_nothing_for_them(database: Database, disk: FaultyDisk) -> None:
    database.store(A)
    done: list[tuple[str, str]] = []
    disk.on_operation = lambda name, path: done.append((name, path))
    database.store(A)
    disk.on_operation = None
    assert [name for name, _ in done] == ["pwrite", "sync", "pwrite"]


def test_a_blob_costs_one_link_and_no_sync_after_the_vote(database: Database, disk: FaultyDisk) -> None:
    prepared = database.prepare(*database.blob_operations((A, b"content")))
    done: list[str] = []
    disk.on_operation = lambda name, path: done.append(name)
    database.commit(prepared)
    disk.on_operation = None
    assert done == ["pwrite", "sync", "link", "pwrite"]
