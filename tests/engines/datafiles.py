"""Data files for tests: an engine with few words around it, what stock ZODB reads, small journals."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from persistent.TimeStamp import TimeStamp
from ZODB.FileStorage import FileIterator, FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64, u64

from tests.engines.journals import Quick
from zeoid.engines import filestorage, opening
from zeoid.engines.disk import Disk
from zeoid.engines.filestorage import FileStorageEngine
from zeoid.engines.journal import Contents, Journal
from zeoid.engines.opening import open_filestorage
from zeoid.engines.recovery import journal_directory
from zeoid.model import MAX_TID, NO_TID, AttachBlob, Operation, StagedBlob, Store, TransactionInfo
from zeoid.ports import Commit, Prepared, TransactionRecord

INFO = TransactionInfo(b"", b"", {})
ROOT, A, B, C, D = (p64(number) for number in range(5))
#: The record of a blob: they are all the same.
BLOB_RECORD = b"cZODB.blob\nBlob\n.N."
#: Small, so that a few transactions fill one.
SEGMENT_BYTES = 4096

#: (tid, status, user, description, ((oid, data), …))
Told = tuple[bytes, str, bytes, bytes, tuple[tuple[bytes, bytes | None], ...]]


def tid(number: int) -> bytes:
    """Long ago, a quarter of a second apart."""
    return bytes(p64(0x03C0_0000_0000_0000 + number * 0x0100_0000))


def number_of(at: bytes) -> int:
    return (u64(at) - 0x03C0_0000_0000_0000) // 0x0100_0000


def record(state: bytes, *references: bytes) -> bytes:
    """A record that refers to these objects, as a pack reads it: the pickles of a class and of a state."""
    referring = b"".join(b"(C\x08" + oid + b"cpersistent\nPersistent\ntQ" for oid in references)
    data = b"B" + len(state).to_bytes(4, "little") + state
    return b"cpersistent\nPersistent\n.(" + referring + data + b"t."


def open_engine(path: Path, disk: Disk | None = None, blob_dir: Path | None = None) -> FileStorageEngine:
    engine = open_filestorage(path, blob_dir=blob_dir, disk=disk or Quick())
    assert isinstance(engine, FileStorageEngine)
    return engine


class Database:
    """An engine, and the tids that it was given."""

    def __init__(self, path: Path, disk: Disk | None = None, blob_dir: Path | None = None) -> None:
        self.path = path
        self.blob_dir = blob_dir
        self.disk = disk or Quick()
        self.is_open = False
        self.reopen()

    @property
    def appender(self) -> Any:
        return self.engine._appender

    @property
    def journal(self) -> Journal:
        journal: Journal = self.appender.journal
        return journal

    @property
    def storage(self) -> Any:
        return self.engine._storage

    def next_tid(self) -> bytes:
        return tid(max(number_of(self.engine.last_tid()), 0) + 1)

    def serial(self, oid: bytes) -> bytes:
        """The tid of its newest record, also of a deletion."""
        return self.engine.newest_tid(oid) or NO_TID

    def data(self, oid: bytes) -> bytes | None:
        """Its current data, None if it does not exist."""
        try:
            found = self.engine.load_before(oid, MAX_TID)
        except POSKeyError:
            return None
        assert found is not None
        return found[0]

    def prepare(self, *operations: Operation, info: TransactionInfo = INFO) -> Prepared:
        prepared = self.engine.prepare(None, info, operations)
        assert not prepared.conflicts
        return prepared

    def commit(self, *prepared: Prepared, ids: Sequence[bytes] = ()) -> list[bytes]:
        """Commit them in one batch; their tids."""
        first = number_of(self.next_tid())
        tids = [tid(first + index) for index in range(len(prepared))]
        ids = ids or [b""] * len(prepared)
        self.engine.commit([Commit(*each) for each in zip(tids, ids, prepared, strict=True)])
        return tids

    def write(self, *operations: Operation, id: bytes = b"", info: TransactionInfo = INFO) -> bytes:
        return self.commit(self.prepare(*operations, info=info), ids=[id])[0]

    def store(self, *oids: bytes, data: bytes = b"data", id: bytes = b"") -> bytes:
        return self.write(*(Store(oid, self.serial(oid), record(data)) for oid in oids), id=id)

    def stage(self, content: bytes) -> StagedBlob:
        file = self.engine.stage_blob()
        try:
            file.write(content)
            return file.complete()
        except OSError:
            file.abandon()
            raise

    def blob_operations(self, *blobs: tuple[bytes, bytes]) -> list[Operation]:
        """What stores these objects with these contents."""
        operations: list[Operation] = []
        for oid, content in blobs:
            operations.append(Store(oid, self.serial(oid), BLOB_RECORD))
            operations.append(AttachBlob(oid, self.stage(content)))
        return operations

    def store_blobs(self, *blobs: tuple[bytes, bytes], id: bytes = b"") -> bytes:
        return self.write(*self.blob_operations(*blobs), id=id)

    def blob(self, oid: bytes, at: bytes) -> bytes | None:
        """The content of a blob, None if there is none."""
        try:
            with self.engine.open_blob(oid, at) as file:
                return file.read()
        except POSKeyError:
            return None

    def pack(self, number: int) -> None:
        """Forget what is not needed to read the state at this tid and later."""
        self.engine.pack(TimeStamp(tid(number)).timeTime())

    def told(self) -> list[Told]:
        return told(self.engine.iterate(None, None))

    def close(self) -> None:
        self.is_open = False
        self.engine.close()

    def kill(self) -> None:
        """As if the process had ended: nothing is written any more, and others may have the files."""
        if self.engine._keeper is not None:
            self.appender.failure = "killed"
        self.engine._storage._save_index = lambda: None
        self.close()

    def reopen(self) -> None:
        self.engine = open_engine(self.path, self.disk, self.blob_dir)
        self.is_open = True

    def restart(self) -> None:
        """The process was killed, and another one is started."""
        self.kill()
        self.reopen()


def databases() -> Iterator[Callable[..., Database]]:
    """For fixtures: opens databases, and closes those that the test left open."""
    opened: list[Database] = []

    def start(path: Path, disk: Disk | None = None, blob_dir: Path | None = None) -> Database:
        opened.append(Database(path, disk, blob_dir))
        return opened[-1]

    yield start
    for database in opened:
        if database.is_open:
            database.close()


def told(transactions: Iterable[TransactionRecord]) -> list[Told]:
    return [
        (each.tid, _text(each.status), each.user, each.description, tuple((r.oid, r.data) for r in each))
        for each in transactions
    ]


def _text(status: str | bytes) -> str:
    return status.decode() if isinstance(status, bytes) else status


def in_file(path: Path) -> list[Told]:
    """What stands in a data file, as ZODB reads it without opening a storage."""
    with contextlib.closing(FileIterator(str(path))) as transactions:
        return told(transactions)


def in_stock_storage(path: Path, blob_dir: Path | None = None) -> list[Told]:
    """What a stock FileStorage has of it: it is opened for writing, and its index must be that of a scan."""
    storage = FileStorage(str(path), blob_dir=None if blob_dir is None else str(blob_dir))
    try:
        index = dict(storage._index.items())
        found = told(storage.iterator())
    finally:
        storage.close()
    Path(f"{path}.index").unlink()
    storage = FileStorage(str(path))
    try:
        assert dict(storage._index.items()) == index
    finally:
        storage.close()
    return found


def contents_of(path: Path) -> Contents:
    contents = Journal.read(journal_directory(str(path)), Quick())
    assert contents is not None
    return contents


def use_small_segments(patch: pytest.MonkeyPatch, size_bytes: int = SEGMENT_BYTES) -> None:
    """Filling sixteen megabytes for each new journal takes long."""

    class SmallJournal(Journal):
        @classmethod
        def create(cls, *given: Any, **options: Any) -> Journal:
            return Journal.create(*given, **{"segment_bytes": size_bytes, **options})

        @classmethod
        def open(cls, *given: Any, **options: Any) -> Journal:
            return Journal.open(*given, **{"segment_bytes": size_bytes, **options})

    patch.setattr(opening, "Journal", SmallJournal)


class NoKeeper:
    """In the place of the thread that makes checkpoints: the test says when."""

    def __init__(self, *given: Any) -> None: ...

    def committed(self) -> None: ...

    def close(self) -> None: ...


def use_no_keeper(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(filestorage, "Keeper", NoKeeper)


@contextlib.contextmanager
def in_thread(work: Any) -> Iterator[list[Any]]:
    """Run *work* in a thread during the block; its result, or what it raised, is in the list after it."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as problem:
            results.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join(30)
        assert not thread.is_alive()
