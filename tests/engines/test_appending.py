"""Writing to a data file: what is written when, what fails before it is too late, what a failure means."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage.FileStorage import FileStorageQuotaError
from ZODB.POSException import ReadOnlyError, StorageError
from ZODB.utils import p64, u64

from tests.engines.crashes import record_file_operations
from tests.engines.datafiles import (
    INFO,
    ROOT,
    A,
    B,
    C,
    D,
    Database,
    contents_of,
    databases,
    in_file,
    in_stock_storage,
    record,
    tid,
    use_no_keeper,
    use_small_segments,
)
from tests.engines.journals import Quick
from zeoid import limits
from zeoid.engines.journal import Base, Batch
from zeoid.engines.opening import open_filestorage
from zeoid.engines.storage import undone_tid
from zeoid.model import NO_TID, Delete, Store, TransactionInfo, Undo
from zeoid.testing.disk import FaultyDisk

Start = Callable[..., Database]
LARGE = limits.BATCH_BYTES + 1


class Watched(Quick):
    """A disk that tells what is done to the data file and to the journal, before it is done."""

    def __init__(self) -> None:
        self.database: Database | None = None
        self.done: list[tuple[str, str]] = []
        self.watch: Callable[[str, str], None] | None = None

    def _note(self, name: str, fd: int) -> None:
        if self.database is None:
            return
        file = self.database.storage._file
        where = "data file" if not file.closed and fd == file.fileno() else "journal"
        self.done.append((name, where))
        if self.watch is not None:
            self.watch(name, where)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        self._note("write", fd)
        super().pwrite(fd, data, offset)

    def sync(self, fd: int) -> None:
        self._note("sync", fd)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_segments(monkeypatch, 64 * 1024)


@pytest.fixture
def no_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    use_no_keeper(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "var").mkdir()
    return tmp_path / "var" / "Data.fs"


@pytest.fixture
def start() -> Iterator[Callable[..., Database]]:
    yield from databases()


@pytest.fixture
def database(path: Path, no_keeper: None, start: Start) -> Database:
    return start(path)


@pytest.fixture
def watched(path: Path, no_keeper: None, start: Start) -> Watched:
    disk = Watched()
    disk.database = start(path, disk)
    return disk


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Commits --------------------------------------------------------------------------------------------------


def test_many_are_prepared_at_once_and_committed_in_any_order(database: Database) -> None:
    prepared = {oid: database.prepare(Store(oid, NO_TID, record(oid))) for oid in (A, B, C, D)}
    database.engine.abandon(prepared.pop(B))
    database.commit(prepared[D], prepared[A])
    database.commit(prepared[C])
    assert [told[4] for told in database.told()] == [((oid, record(oid)),) for oid in (D, A, C)]
    assert database.data(B) is None
    assert database.appender._promised_bytes == 0


def test_a_batch_is_one_write_and_one_sync_of_the_journal(watched: Watched) -> None:
    database = watched.database
    assert database is not None
    prepared = [database.prepare(Store(oid, NO_TID, record(oid))) for oid in (A, B, C)]
    watched.done.clear()
    database.commit(*prepared)
    assert watched.done == [("write", "journal"), ("sync", "journal"), ("write", "data file")]


def test_a_large_transaction_is_in_the_data_file_only(watched: Watched) -> None:
    database = watched.database
    assert database is not None
    prepared = database.prepare(Store(A, NO_TID, record(b"x" * LARGE)))
    watched.done.clear()
    database.commit(prepared, ids=[b"large"])
    assert [each for each, _ in itertools.groupby(watched.done)] == [
        ("write", "journal"), ("sync", "journal"),  # it is announced
        ("write", "data file"), ("sync", "data file"),
        ("write", "journal"), ("sync", "journal"),  # and confirmed
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in Path(f"{database.path}.journal").iterdir()) < LARGE
    database.restart()
    assert database.data(A) == record(b"x" * LARGE)
    assert list(database.engine.outcomes().committed) == [(b"large", tid(1))]


def test_a_batch_of_many_small_ones_is_no_large_transaction(database: Database) -> None:
    half = b"x" * (LARGE // 2)
    prepared = [database.prepare(Store(oid, NO_TID, record(half))) for oid in (A, B, C)]
    database.commit(*prepared)
    entries = contents_of(database.path).entries
    assert [len(entry.transactions) for entry in entries if isinstance(entry, Batch)] == [3]
    assert database.appender._promised_to_journal_bytes == database.appender._promised_bytes == 0


@pytest.mark.parametrize("size", [10, LARGE])
def test_nobody_sees_what_is_not_durable(watched: Watched, size: int) -> None:
    database = watched.database
    assert database is not None
    database.store(A)
    seen: list[bool] = []

    def look(name: str, where: str) -> None:
        undoable = len(database.engine.undo_log(0, 9))
        seen.append(database.serial(A) == database.engine.last_tid() == tid(1) and undoable == 1)

    prepared = database.prepare(Store(A, tid(1), record(b"x" * size)))
    watched.watch = look
    database.commit(prepared)
    watched.watch = None
    assert len(seen) >= 3
    assert all(seen)
    assert database.serial(A) == tid(2)


def test_the_commit_lock_is_held_while_the_file_is_written(watched: Watched) -> None:
    """A pack, and who reads from the end of the file, wait for it."""
    database = watched.database
    assert database is not None
    held: list[bool] = []
    watched.watch = lambda name, where: held.append(database.storage._commit_lock.locked())
    database.store(A)
    database.write(Store(B, NO_TID, record(b"x" * LARGE)))
    database.engine.checkpoint()
    watched.watch = None
    # The first sync of a checkpoint, of another descriptor, is done while others write.
    assert held.count(False) == 1
    assert not database.storage._commit_lock.locked()


def test_a_transaction_without_records(database: Database) -> None:
    assert database.write(id=b"empty") == tid(1)
    database.restart()
    assert database.engine.last_tid() == tid(1)
    assert [told[0] for told in database.told()] == [tid(1)]


def test_what_a_transaction_says_of_itself_survives(database: Database) -> None:
    info = TransactionInfo(b"\xc3\xa4", b"what it did", {"key": ["value"]}, None, "p")
    database.write(Store(A, NO_TID, record(b"data")), info=info)
    for _ in range(2):
        (found,) = database.engine.iterate(None, None)
        assert (found.status, found.user, found.description) == ("p", b"\xc3\xa4", b"what it did")
        assert found.extension == {"key": ["value"]}
        database.restart()


# Room -----------------------------------------------------------------------------------------------------


class Tight(Quick):
    """A disk with little room for the data file: it may grow to so many bytes."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.journal_is_full = False

    def reserve(self, fd: int, start: int, length: int) -> None:
        if start + length > self.size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, path: Any, *, create: bool = False, read_only: bool = False) -> int:
        if self.journal_is_full and create:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().open(path, create=create, read_only=read_only)


def test_room_is_promised_and_taken_back(path: Path, start: Start, no_keeper: None) -> None:
    database = start(path, Tight(10_000))
    store = Store(A, NO_TID, record(b"x" * 6000))
    first = database.prepare(store)
    with pytest.raises(StorageError, match=r"no room for a transaction of 6,.* bytes: No space left"):
        database.prepare(Store(B, NO_TID, record(b"x" * 6000)))
    database.engine.abandon(first)
    database.commit(database.prepare(store))
    with pytest.raises(StorageError, match="no room"):
        database.prepare(Store(B, NO_TID, record(b"x" * 6000)))
    database.commit(database.prepare(Store(B, NO_TID, record(b"x" * 3000))))
    assert database.engine.failure == ""
    database.close()
    assert len(in_stock_storage(path)) == 2


def test_a_full_disk_leaves_nothing_of_a_transaction(path: Path, start: Start, no_keeper: None) -> None:
    database = start(path, Tight(10_000))
    database.store(A)
    before, last = snapshot(path.parent), database.engine.last_tid()
    for size in 20_000, LARGE:
        with pytest.raises(StorageError, match="no room"):
            database.prepare(Store(A, tid(1), record(b"x" * size)))
    assert (snapshot(path.parent), database.engine.last_tid()) == (before, last)
    database.store(A)
    database.close()


def test_a_disk_without_room_for_the_journal(path: Path, start: Start, no_keeper: None) -> None:
    disk = Tight(1 << 40)
    database = start(path, disk)
    disk.journal_is_full = True
    before = snapshot(path.parent)
    with pytest.raises(StorageError, match=r"no room .* No space left"):
        database.prepare(Store(A, NO_TID, record(b"x" * 70_000)))
    assert snapshot(path.parent) == before
    database.store(A)
    disk.journal_is_full = False
    database.write(Store(A, tid(1), record(b"x" * 70_000)))
    assert database.engine.failure == ""
    database.close()


def test_what_was_promised_together_does_fit(path: Path, start: Start, no_keeper: None) -> None:
    """Each would fit into the rest of the segment by itself."""
    disk = Tight(1 << 40)
    database = start(path, disk)
    prepared = [database.prepare(Store(oid, NO_TID, record(b"x" * 25_000))) for oid in (A, B)]
    disk.journal_is_full = True
    with pytest.raises(StorageError, match="no room"):
        database.prepare(Store(C, NO_TID, record(b"x" * 25_000)))
    for each in prepared:
        database.commit(each)
    database.close()


def test_a_quota(database: Database) -> None:
    database.store(A)
    database.storage._quota = database.engine.size_bytes() + 1000
    with pytest.raises(FileStorageQuotaError):
        database.prepare(Store(B, NO_TID, record(b"x" * 1000)))
    database.store(A)
    assert database.appender._promised_bytes == 0


def test_the_room_that_was_reserved_is_given_back(path: Path, start: Start, no_keeper: None) -> None:
    database = start(path)
    database.store(A)
    taken = path.stat()
    database.close()
    left = path.stat()
    assert left.st_size == taken.st_size
    assert left.st_blocks * 512 < limits.RESERVE_BYTES // 2


# Failures -------------------------------------------------------------------------------------------------


def small_one(database: Database) -> None:
    database.store(A, data=b"new", id=b"new")


def large_one(database: Database) -> None:
    database.write(Store(A, database.serial(A), record(b"new" * LARGE)), id=b"new")


@pytest.mark.parametrize(
    ("work", "number"), [*((small_one, number) for number in range(3)), *((large_one, n) for n in range(7))]
)
def test_after_a_failure_nothing_is_written(
    path: Path,
    start: Start,
    no_keeper: None,
    work: Callable[[Database], None],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = FaultyDisk(path.parent)
    record_file_operations(monkeypatch, disk)
    database = start(path, disk)
    database.store(ROOT, A, data=b"old", id=b"old")
    prepared = database.prepare(Store(B, NO_TID, record(b"prepared before")))
    disk.fail_at(number + 1, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        work(database)
    assert "broken" in database.engine.failure
    files = snapshot(path.parent)
    for refused in (
        lambda: database.commit(prepared),
        database.engine.checkpoint,
        lambda: database.engine.new_oids(20_000),
        lambda: database.pack(2),
    ):
        with pytest.raises(OSError, match=r"broken|can't be used"):
            refused()
    assert not database.storage._commit_lock.locked()
    database.close()
    after = snapshot(path.parent)
    after.pop(Path(f"{path}.index"), None)
    files.pop(Path(f"{path}.index"), None)
    assert {name for name in after if after[name] != files.get(name)} <= {Path(f"{path}.pack")}
    database.disk = Quick()
    database.reopen()
    told = database.told()
    assert told[0][4] == ((ROOT, record(b"old")), (A, record(b"old")))
    ids = [id for id, _ in database.engine.outcomes().committed]
    assert ids == [b"old", b"new"][: len(told)]
    database.close()


def test_a_failure_is_reported_by_who_makes_checkpoints(
    path: Path, start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk(path.parent)
    database = start(path, disk)
    keeper: Any = database.engine._keeper
    database.store(A)
    disk.on_operation = lambda name, _: (_ for _ in ()).throw(OSError(errno.EIO, "broken"))
    monkeypatch.setattr(limits, "CHECKPOINT_BYTES", 0)
    with caplog.at_level(logging.ERROR, "zeoid.server"):
        keeper.committed()
        keeper._thread.join(30)
    assert "broken" in database.engine.failure
    assert [f"{path}: the checkpoint failed" in each.getMessage() for each in caplog.records] == [True]
    disk.on_operation = None
    database.close()


# Checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_makes_the_data_file_complete_by_itself(database: Database, tmp_path: Path) -> None:
    for number in range(5):
        last = database.store(A, data=b"%d" % number)
    assert [entry for entry in contents_of(database.path).entries if isinstance(entry, Batch)]
    assert database.engine.checkpoint() == last
    contents = contents_of(database.path)
    assert (contents.entries, contents.base.places[0].tid) == ([], last)
    assert database.appender.journal.unsettled_bytes == 0
    shutil.copy(database.path, tmp_path / "Data.fs")
    assert in_stock_storage(tmp_path / "Data.fs") == database.told()


def test_a_checkpoint_lets_segments_be_used_again(path: Path, start: Start, no_keeper: None) -> None:
    database = start(path)
    directory = Path(f"{path}.journal")
    for _ in range(8):
        for _ in range(6):
            database.store(A, data=b"x" * 20_000)
        database.engine.checkpoint()
    assert len(list(directory.iterdir())) <= 1 + limits.JOURNAL_SPARES
    database.close()
    assert len(in_stock_storage(path)) == 48


def test_a_clean_stop_leaves_nothing_in_the_journal(path: Path, start: Start, no_keeper: None) -> None:
    database = start(path)
    database.store(A)
    told = database.told()
    database.close()
    assert contents_of(path).entries == []
    assert in_file(path) == told


def noticing(of: Any, name: str) -> threading.Event:
    """Set as soon as it has done that."""
    done = threading.Event()
    method = getattr(of, name)

    def noticed() -> Any:
        try:
            return method()
        finally:
            done.set()

    setattr(of, name, noticed)
    return done


def test_a_checkpoint_when_the_journal_has_grown(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CHECKPOINT_BYTES", 5000)
    database = start(path)
    done = noticing(database.appender, "checkpoint")
    database.store(A, data=b"x" * 3000)
    assert not done.is_set()
    database.store(B, data=b"x" * 3000)
    assert done.wait(30)
    assert contents_of(path).base.places[0].tid == tid(2)
    database.close()


def test_a_checkpoint_when_it_is_time(path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHECKPOINT_S", 0.01)
    database = start(path)
    done = noticing(database.appender, "checkpoint")
    database.store(A)
    assert done.wait(30)
    database.close()


def test_no_checkpoint_where_nothing_was_committed(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CHECKPOINT_S", 0.001)
    database = start(path)
    checkpoint = noticing(database.appender, "checkpoint")
    for _ in range(3):  # the thread has come round
        assert noticing(database.appender.journal, "prepare_spare").wait(30)
    assert not checkpoint.is_set()
    database.close()


def test_a_spare_segment_is_made_ahead_of_need(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CHECKPOINT_S", 0.001)
    database = start(path)
    assert noticing(database.appender.journal, "prepare_spare").wait(30)
    assert len(list(Path(f"{path}.journal").iterdir())) == 2
    database.close()


def test_no_thread_is_left(path: Path, start: Start) -> None:
    before = threading.active_count()
    database = start(path)
    assert threading.active_count() == before + 1
    database.close()
    assert threading.active_count() == before


# Oids -----------------------------------------------------------------------------------------------------


def test_oids_are_not_given_out_again_after_a_kill(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OID_BLOCK", 20)
    given: set[bytes] = set()
    for count in (1, 5, 30, 1, 100, 19, 2):
        oids = database.engine.new_oids(count)
        assert len(oids) == count
        assert given.isdisjoint(oids)
        given.update(oids)
        database.engine.abandon(database.prepare(Store(oids[-1], NO_TID, b"abandoned")))
        database.restart()


def test_a_mark_is_written_for_each_block_only(watched: Watched) -> None:
    database = watched.database
    assert database is not None
    for _ in range(5):
        database.engine.new_oids(100)
    assert len(watched.done) == 2  # one write, one sync


def test_oids_that_could_not_be_marked_are_not_given_out(path: Path, start: Start, no_keeper: None) -> None:
    disk = FaultyDisk(path.parent)
    database = start(path, disk)
    disk.fail_at(2, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        database.engine.new_oids(10)
    with pytest.raises(OSError, match="broken"):
        database.engine.new_oids(10)
    database.close()


def test_an_oid_that_a_client_chose_is_nobody_elses(database: Database) -> None:
    database.store(p64(500_000))
    database.restart()  # it is written to the data file again
    assert u64(database.engine.new_oids(1)[0]) > 500_000
    database.store(p64(600_000))
    assert u64(database.engine.new_oids(1)[0]) > 600_000


def test_an_oid_of_a_packed_object_is_nobody_elses(database: Database) -> None:
    database.store(ROOT)
    chosen = p64(500_000)
    database.store(chosen)
    database.store(ROOT)
    database.pack(4)
    assert database.data(chosen) is None
    database.restart()
    assert u64(database.engine.new_oids(1)[0]) > 500_000


# Outcomes -------------------------------------------------------------------------------------------------


def test_outcomes_are_known_after_a_restart(database: Database) -> None:
    assert database.engine.outcomes().floor == NO_TID
    expected = [(b"one", database.store(A, id=b"one"))]
    database.store(A)  # its client has made none
    large = database.write(Store(B, NO_TID, record(b"x" * LARGE)), id=b"large")
    prepared = database.prepare(Store(C, NO_TID, record(b"never")))
    database.engine.abandon(prepared)
    expected += [(b"large", large), (b"last", database.store(A, id=b"last"))]
    for again in (database.restart, lambda: (database.close(), database.reopen()), database.restart):
        again()
        outcomes = database.engine.outcomes()
        assert (outcomes.floor, list(outcomes.committed)) == (NO_TID, expected)


# Packs ----------------------------------------------------------------------------------------------------


def test_the_last_tid_stays_when_a_pack_removes_the_last_transaction(database: Database) -> None:
    database.store(ROOT)
    database.store(ROOT)
    last = database.store(D)  # which nothing refers to
    database.pack(4)
    assert database.data(D) is None
    assert [told[0] for told in database.told()] == [tid(2)]
    for again in (
        lambda: None,
        database.restart,
        lambda: (database.close(), database.reopen()),
        database.restart,
    ):
        again()
        assert database.engine.last_tid() == last
    assert database.store(ROOT) > last
    database.restart()
    assert [told[0] for told in database.told()] == [tid(2), tid(4)]


def test_a_pack_that_removes_everything(database: Database) -> None:
    last = database.store(D)
    database.store(D)
    database.write(Delete(D, tid(2)))
    database.pack(4)
    assert database.told() == []
    database.restart()
    assert database.engine.last_tid() == tid(3) > last
    database.store(ROOT)
    database.restart()
    assert [told[0] for told in database.told()] == [tid(4)]


def test_an_undo_that_was_prepared_before_a_pack_is_committed_after_it(database: Database) -> None:
    """What it referred to is gone: it writes the data."""
    database.store(ROOT, A)
    database.store(A, data=b"x" * 5000)
    database.store(A, data=b"undone")
    refers = [Store(ROOT, tid(1), record(b"root", A))]
    database.write(*refers)
    undo = database.prepare(Undo(undo_id(database, tid(3))))
    store = database.prepare(Store(B, NO_TID, record(b"prepared")))
    size = database.engine.size_bytes()
    database.pack(4)
    assert database.engine.size_bytes() < size - 4000
    database.commit(store, undo)
    assert database.data(A) == record(b"x" * 5000)
    assert database.engine.size_bytes() > size - 1000
    told = database.told()
    database.restart()
    assert database.told() == told
    database.close()
    assert in_stock_storage(database.path) == told
    database.reopen()


def undo_id(database: Database, at: bytes) -> bytes:
    (found,) = (each["id"] for each in database.engine.undo_log(0, 100) if undone_tid(each["id"]) == at)
    return bytes(found)


def test_a_pack_that_fails_does_no_harm(database: Database) -> None:
    database.store(ROOT)
    database.write(Store(ROOT, tid(1), b"no pickle"))
    told = database.told()
    for _ in range(2):
        with pytest.raises(Exception, match="invalid load key"):
            database.pack(2)
        assert not database.storage._commit_lock.locked()
    assert database.told() == told
    database.store(A)
    database.restart()
    assert len(database.told()) == 3


def test_a_pack_with_nothing_to_remove(database: Database) -> None:
    database.pack(1)
    database.store(ROOT)
    database.pack(1)
    assert database.appender.journal.unsettled_bytes == 0
    database.store(ROOT)
    assert len(database.told()) == 2


def test_a_packed_file_that_cant_be_synced_is_given_up(path: Path, start: Start, no_keeper: None) -> None:
    """Nothing was acknowledged that is only there: the engine goes on."""
    disk = FaultyDisk(path.parent)
    database = start(path, disk)
    database.store(ROOT)
    database.store(ROOT)

    def fail(operation: str, where: str) -> None:
        if operation == "sync" and where.endswith(".pack"):
            raise OSError(errno.ENOSPC, "full")

    disk.on_operation = fail
    with pytest.raises(OSError, match="full"):
        database.pack(2)
    assert database.engine.failure == ""
    assert not Path(f"{path}.pack").exists()
    database.store(ROOT)
    assert len(database.told()) == 3


@pytest.mark.parametrize("name", ["sync", "sync_directory"])
def test_a_disk_that_fails_while_a_pack_ends(path: Path, start: Start, no_keeper: None, name: str) -> None:
    disk = FaultyDisk(path.parent)
    database = start(path, disk)
    database.store(ROOT)
    database.store(ROOT)
    told = database.told()

    def fail(operation: str, where: str) -> None:
        if operation == name and not where.endswith(".pack"):
            raise OSError(errno.EIO, "broken")

    disk.on_operation = fail
    with pytest.raises(OSError, match="broken"):
        database.pack(2)
    disk.on_operation = None
    assert "broken" in database.engine.failure
    assert not database.storage._commit_lock.locked()
    database.close()
    database.disk = Quick()
    database.reopen()
    assert database.told() == told
    database.close()


def test_a_base_that_names_two_files_is_followed_by_one_that_names_one(database: Database) -> None:
    database.store(ROOT)
    database.store(ROOT)
    bases: list[int] = []
    append = database.journal.append

    def noticed(*entries: Any) -> None:
        bases.extend(len(entry.places) for entry in entries if isinstance(entry, Base))
        append(*entries)

    database.journal.append = noticed  # type: ignore[method-assign]
    database.pack(2)
    assert bases == [2, 1]


# Reading only ---------------------------------------------------------------------------------------------


def test_a_read_only_file_is_not_written(path: Path, start: Start, no_keeper: None) -> None:
    database = start(path)
    database.store(ROOT)
    database.store(ROOT)
    database.close()
    before = snapshot(path.parent)
    engine = open_filestorage(path, read_only=True)
    for refused in (
        lambda: engine.prepare(None, INFO, [Store(A, NO_TID, b"data")]),
        engine.checkpoint,
        lambda: engine.pack(4e9),
    ):
        with pytest.raises(ReadOnlyError):
            refused()
    assert engine.failure == ""
    outcomes = engine.outcomes()
    assert (outcomes.floor, list(outcomes.committed)) == (tid(2), [])
    engine.close()
    assert snapshot(path.parent) == before
