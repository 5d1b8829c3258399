"""A transaction that the engine writes by itself is, byte for byte, what FileStorage would have written."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ZODB.FileStorage import FileIterator, FileStorage
from ZODB.POSException import StorageError
from ZODB.utils import p64

from zeoid.commit.tids import next_tid
from zeoid.engines import filestorage
from zeoid.engines.filestorage import FileStorageEngine
from zeoid.engines.storage import StorageEngine
from zeoid.model import NO_TID, Delete, Operation, Store, TransactionInfo

OIDS = [p64(number) for number in (0, 1, 2, 0x10000, 0x7FFFFFFFFFFF)]
PLAIN = TransactionInfo(b"", b"", {})


@dataclass
class Pair:
    """The same storage twice: one that the engine writes, one that FileStorage writes."""

    mine: FileStorageEngine
    theirs: StorageEngine
    folder: Path
    now: float = 1_000_000_000.0

    def close(self) -> None:
        self.mine.close()
        self.theirs.close()

    def prepare(self, info: TransactionInfo, *operations: Operation) -> Any:
        self.now += 1
        tid = next_tid(self.mine.last_tid(), self.now)
        results = [engine.prepare(tid, info, operations) for engine in (self.mine, self.theirs)]
        first, second = ((result.conflicts, result.oids) for result in results)
        assert first == second
        return results[0]

    def write(self, info: TransactionInfo, *operations: Operation, abandon: bool = False) -> None:
        if self.prepare(info, *operations).conflicts:
            return
        for engine in (self.mine, self.theirs):
            if abandon:
                engine.abandon()
            else:
                engine.finish()

    def serial(self, oid: bytes) -> bytes:
        return self.mine.newest_tid(oid) or NO_TID

    def file(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def check(self) -> None:
        """Files, indexes and what else the two keep in memory are the same."""
        assert self.file("mine.fs") == self.file("theirs.fs")
        mine, theirs = self.mine._storage, self.theirs._storage
        assert dict(mine._index.items()) == dict(theirs._index.items())
        for name in ("_pos", "_ltid", "_oid"):
            assert getattr(mine, name) == getattr(theirs, name), name
        assert mine.getSize() == theirs.getSize()


def open_pair(folder: Path) -> Pair:
    folder.mkdir(exist_ok=True)
    mine = FileStorageEngine(FileStorage(str(folder / "mine.fs"), create=True))
    theirs = StorageEngine(FileStorage(str(folder / "theirs.fs"), create=True))
    return Pair(mine, theirs, folder)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = open_pair(tmp_path)
    try:
        yield pair
    finally:
        pair.close()


infos = st.builds(
    TransactionInfo,
    st.binary(max_size=20),
    st.binary(max_size=20),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
#: (oid, whether the writer knows the current revision, the data)
stores = st.tuples(st.sampled_from(OIDS), st.integers(0, 4).map(bool), st.binary(min_size=1, max_size=3000))
transactions = st.tuples(infos, st.lists(stores, max_size=4), st.booleans())


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(transactions, max_size=8))
def test_random_histories(tmp_path_factory: pytest.TempPathFactory, history: list[Any]) -> None:
    pair = open_pair(tmp_path_factory.mktemp("pair"))
    try:
        for info, written, abandon in history:
            operations = [
                Store(oid, pair.serial(oid) if knows else p64(7), data) for oid, knows, data in written
            ]
            pair.write(info, *operations, abandon=abandon)
            pair.check()
    finally:
        pair.close()


def test_it_is_the_engine_that_writes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the comparisons here would compare FileStorage with itself."""
    monkeypatch.setattr(pair.mine._storage, "tpc_begin", None)
    pair.write(PLAIN, Store(OIDS[1], NO_TID, b"data"))
    pair.check()


@pytest.mark.parametrize("quota", [10_000_000])
def test_what_is_unusual_is_left_to_filestorage(pair: Pair, quota: int) -> None:
    pair.write(PLAIN, Store(OIDS[1], NO_TID, b"data"), Store(OIDS[2], NO_TID, b"data"))
    pair.write(PLAIN, Delete(OIDS[1], pair.serial(OIDS[1])))
    pair.check()
    pair.write(TransactionInfo(b"", b"", {}, None, "p"), Store(OIDS[2], pair.serial(OIDS[2]), b"packed"))
    pair.check()
    pair.mine._storage._quota = pair.theirs._storage._quota = quota
    pair.write(PLAIN, Store(OIDS[2], pair.serial(OIDS[2]), b"more"))
    pair.check()


def test_a_prepared_transaction_is_seen_by_nobody(pair: Pair) -> None:
    pair.write(PLAIN, Store(OIDS[1], NO_TID, b"first"))
    before = pair.mine.load_before(OIDS[1], b"\x7f" * 8)
    last = pair.mine.last_tid()
    pair.prepare(PLAIN, Store(OIDS[1], pair.serial(OIDS[1]), b"second"))
    assert pair.mine.load_before(OIDS[1], b"\x7f" * 8) == before
    assert pair.mine.last_tid() == last
    with contextlib.closing(FileIterator(str(pair.folder / "mine.fs"))) as transactions:
        assert [transaction.tid for transaction in transactions] == [last]
    pair.mine.abandon()
    pair.theirs.abandon()
    pair.check()


def test_what_was_read_of_an_abandoned_transaction_is_not_read_again(pair: Pair) -> None:
    """FileStorage's own file objects keep what they have read; the next transaction takes the same place."""
    pair.write(PLAIN, Store(OIDS[1], NO_TID, b"first"))
    end = pair.mine._storage._pos
    pair.prepare(PLAIN, Store(OIDS[2], NO_TID, b"abandoned"))
    storage = pair.mine._storage
    storage._file.seek(end)
    assert b"abandoned" in storage._file.read(200)
    with storage._files.get() as file:
        file.seek(end)
        assert b"abandoned" in file.read(200)
    pair.mine.abandon()
    pair.theirs.abandon()
    pair.write(PLAIN, Store(OIDS[2], NO_TID, b"committed"))
    assert storage.loadBefore(OIDS[2], b"\x7f" * 8)[0] == b"committed"
    storage._file.seek(end)
    assert b"committed" in storage._file.read(200)


def test_the_file_is_synced_after_the_status_was_written(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.prepare(PLAIN, Store(OIDS[1], NO_TID, b"data"))
    start = pair.mine._storage._pos
    statuses = []
    sync = filestorage._sync

    def watched(file: int) -> None:
        statuses.append(pair.file("mine.fs")[start + 16 : start + 17])
        assert pair.mine.newest_tid(OIDS[1]) is None, "it is seen before it is durable"
        sync(file)

    monkeypatch.setattr(filestorage, "_sync", watched)
    pair.mine.finish()
    assert statuses == [b" "]
    pair.theirs.finish()
    pair.check()


def test_a_disk_that_is_full(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails at the vote, nothing is left of it, and nobody is locked out."""
    pair.write(PLAIN, Store(OIDS[1], NO_TID, b"first"))
    pwrite = os.pwrite

    def full(file: int, data: Any, position: int) -> int:
        if len(data) > 100:
            return pwrite(file, data[:100], position)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(filestorage.os, "pwrite", full)
        tid = next_tid(pair.mine.last_tid(), 2e9)
        with pytest.raises(OSError, match="No space"):
            pair.mine.prepare(tid, PLAIN, [Store(OIDS[2], NO_TID, b"x" * 1000)])
    pair.mine._storage._oid = pair.theirs._storage._oid
    pair.check()
    pair.write(PLAIN, Store(OIDS[1], pair.serial(OIDS[1]), b"second"))
    pair.check()


def test_a_write_in_pieces(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(filestorage.os, "pwrite", lambda file, data, at: pwrite(file, data[:37], at))
    pair.write(PLAIN, Store(OIDS[1], NO_TID, b"x" * 1000), Store(OIDS[2], NO_TID, b"y" * 1000))
    pair.check()


def test_a_record_without_data_locks_nobody_out(pair: Pair) -> None:
    with pytest.raises(StorageError, match="empty"):
        pair.mine.prepare(next_tid(NO_TID, 2e9), PLAIN, [Store(OIDS[1], NO_TID, b"")])
    pair.write(PLAIN, Store(OIDS[1], NO_TID, b"data"))
    pair.check()


def test_a_file_written_so_opens_again_without_its_index(pair: Pair) -> None:
    for number in range(5):
        pair.write(PLAIN, *(Store(oid, pair.serial(oid), b"%d" % number) for oid in OIDS))
    pair.mine.close()
    (pair.folder / "mine.fs.index").unlink(missing_ok=True)
    reopened = FileStorage(str(pair.folder / "mine.fs"))
    pair.mine = FileStorageEngine(reopened)
    assert [reopened.loadBefore(oid, b"\x7f" * 8)[0] for oid in OIDS] == [b"4"] * len(OIDS)
    pair.check()


def test_a_pack_meets_transactions_written_so(pair: Pair) -> None:
    for number in range(5):
        pair.write(PLAIN, Store(OIDS[0], pair.serial(OIDS[0]), RECORD + b"%d\n." % number))
    for engine in (pair.mine, pair.theirs):
        engine.pack(pair.now - 1)
    pair.check()
    pair.write(PLAIN, Store(OIDS[0], pair.serial(OIDS[0]), RECORD + b"9\n."))
    pair.check()


#: A class and the begin of a state: pickles, since a pack looks for references in them.
RECORD = b"cpersistent\nPersistent\n.I"


@pytest.mark.parametrize("name", ["pwrite", "ftruncate"])
def test_nobody_reads_from_the_end_of_the_file_while_it_changes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """FileStorage looks for a transaction from there under its lock, which therefore must be held."""
    change = getattr(os, name)
    held: list[bool] = []

    def try_lock() -> None:
        got = pair.mine._lock.acquire(blocking=False)
        held.append(not got)
        if got:
            pair.mine._lock.release()

    def watched(*args: Any) -> Any:
        other = threading.Thread(target=try_lock)
        other.start()
        other.join()
        return change(*args)

    monkeypatch.setattr(filestorage.os, name, watched)
    pair.mine.prepare(next_tid(NO_TID, 2e9), PLAIN, [Store(OIDS[1], NO_TID, b"data")])
    pair.mine.abandon()
    assert held == [True]


def test_a_prepared_transaction_does_not_keep_its_data(pair: Pair) -> None:
    data = b"x" * 5_000_000
    tracemalloc.start()
    try:
        pair.mine.prepare(next_tid(NO_TID, 2e9), PLAIN, [Store(OIDS[1], NO_TID, data)])
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()
    pair.mine.abandon()
