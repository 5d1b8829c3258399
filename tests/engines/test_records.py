"""Records are read as FileStorage reads them, and a transaction is found wherever it is in the file."""

from __future__ import annotations

import importlib
import os
import random
from base64 import encodebytes
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from persistent.TimeStamp import TimeStamp
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import CorruptedError
from ZODB.POSException import POSKeyError
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.utils import p64

from zeoid.engines.datafile import LENGTH, RECORD_HEADER, TRANSACTION_HEADER, lay_out
from zeoid.engines.records import DataFile, FileReplaced
from zeoid.model import MAX_TID, NO_TID, tid_after, tid_before

ROOT, A, B, C = (p64(number) for number in (0, 1, 2, 0x10003))
ROOT_DATA = zodb_pickle(MinPO("root"))
PLAIN = [zodb_pickle(MinPO(number)) for number in range(8)]


def tid_at(minute: int) -> bytes:
    time = datetime(2020, 1, 1) + timedelta(minutes=minute)
    tid: bytes = TimeStamp(time.year, time.month, time.day, time.hour, time.minute, 0.0).raw()
    return tid


class Writer:
    """Writes to a FileStorage, one transaction a minute."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.tids: list[bytes] = []
        self._commit(tid_at(-1), lambda meta: storage.store(ROOT, NO_TID, ROOT_DATA, "", meta))

    def write(self, **changes: bytes | None) -> bytes:
        """Store or delete; the names are those of this module's oids."""

        def change(meta: TransactionMetaData) -> None:
            for name, data in changes.items():
                oid = globals()[name]
                serial = newest_tid(self.storage, oid)
                if data is None:
                    self.storage.deleteObject(oid, serial, meta)
                else:
                    self.storage.store(oid, serial, data, "", meta)

        return self.within(change)

    def undo(self, tid: bytes) -> bytes:
        return self.within(lambda meta: self.storage.undo(encodebytes(tid).rstrip(), meta))

    def within(self, change: Callable[[TransactionMetaData], object]) -> bytes:
        tid = tid_at(len(self.tids))
        self._commit(tid, change)
        self.tids.append(tid)
        return tid

    def _commit(self, tid: bytes, change: Callable[[TransactionMetaData], object]) -> None:
        meta = TransactionMetaData(b"user", b"description")
        self.storage.tpc_begin(meta, tid)
        change(meta)
        self.storage.tpc_vote(meta)
        self.storage.tpc_finish(meta)

    def pack_up_to(self, tid: bytes) -> None:
        """Pack, the root referring to every object there is. (Without this search FileStorage loses some.)"""
        alive = [oid for oid in (A, B, C) if self._is_alive(oid, tid_after(tid))]
        self.storage.pack(TimeStamp(tid).timeTime(), lambda data: alive if data == ROOT_DATA else [])

    def _is_alive(self, oid: bytes, tid: bytes) -> bool:
        try:
            return self.storage.loadBefore(oid, tid) is not None
        except POSKeyError:
            return False


def newest_tid(storage: Any, oid: bytes) -> bytes:
    newest = DataFile(storage).newest(oid)
    return NO_TID if newest is None else newest.tid


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(importlib.import_module("ZODB.FileStorage.FileStorage"), "fsync", None)
    storage = FileStorage(str(tmp_path / "Data.fs"))
    yield storage
    storage.close()


@pytest.fixture
def writer(storage: Any) -> Writer:
    return Writer(storage)


@pytest.fixture
def file(storage: Any) -> DataFile:
    return DataFile(storage)


# One record -------------------------------------------------------------------------------------------


def test_the_newest_record_is_the_one_that_the_index_knows(writer: Writer, file: DataFile) -> None:
    first = writer.write(A=PLAIN[0], B=PLAIN[1])
    second = writer.write(A=PLAIN[2])
    newest = file.newest(A)
    assert newest is not None
    assert (newest.oid, newest.tid, newest.size, newest.back) == (A, second, len(PLAIN[2]), 0)
    assert file.data(newest) == PLAIN[2]
    assert file.source(newest) == newest
    before = file.previous(newest)
    assert before is not None
    assert (before.tid, before.position, before.previous) == (first, newest.previous, 0)
    assert file.previous(before) is None
    after_root = file.newest(ROOT)
    assert after_root is not None
    assert (after_root.transaction, before.transaction) == (4, after_root.end + LENGTH.size)


def test_an_empty_file_has_nothing(file: DataFile) -> None:
    assert file.newest(A) is None
    assert file.revision(A, tid_at(0)) is None
    for tid in NO_TID, tid_at(0), MAX_TID:
        assert file.transaction(tid) is None
    assert file.last_transactions(10, 100) == []


def test_what_does_not_exist_is_none(writer: Writer, file: DataFile) -> None:
    writer.write(A=PLAIN[0])
    second = writer.write(B=PLAIN[0])
    third = writer.write(A=PLAIN[1])
    assert file.newest(C) is None
    for tid in NO_TID, second, tid_before(third), tid_after(third), MAX_TID:
        assert file.revision(A, tid) is None
    for tid in (
        NO_TID,
        tid_before(tid_at(-1)),
        tid_before(writer.tids[0]),
        tid_before(second),
        tid_after(third),
        MAX_TID,
    ):
        assert file.transaction(tid) is None


def test_data_is_found_through_any_number_of_references(writer: Writer, file: DataFile) -> None:
    first = writer.write(A=PLAIN[0])
    tid = writer.write(A=PLAIN[1])
    for _ in range(5):  # each refers to the record before the one that it undoes, so some to references
        tid = writer.undo(tid)
    newest = file.newest(A)
    assert newest is not None
    assert (newest.tid, newest.size) == (tid, 0)
    assert newest.back != 0
    assert file.data(newest) == PLAIN[0]
    source = file.source(newest)
    assert source is not None
    assert source == file.revision(A, first)


def test_an_object_that_ceased_to_be_has_a_record_and_no_data(writer: Writer, file: DataFile) -> None:
    created = writer.write(A=PLAIN[0], B=PLAIN[0])
    deleted = writer.write(B=None)
    uncreated = writer.undo(writer.write(C=PLAIN[0]))
    again = writer.undo(writer.undo(deleted))
    assert created
    for oid, tid in (B, deleted), (C, uncreated), (B, again):
        header = file.revision(oid, tid)
        assert header is not None
        assert file.data(header) is None
        assert file.source(header) is None


def test_every_record_is_read_as_filestorage_iterates_it(
    storage: Any, writer: Writer, file: DataFile
) -> None:
    chance = random.Random(1)
    for _ in range(60):
        if writer.tids and chance.random() < 0.3:
            writer.undo(writer.tids[-1])
        else:
            names = chance.sample("ABC", chance.randint(1, 3))
            writer.write(**{name: chance.choice(PLAIN) for name in names})
    writer.pack_up_to(writer.tids[20])
    kept = 0
    for transaction in storage.iterator():
        found = file.transaction(transaction.tid)
        assert found is not None
        status, headers = found
        assert status.decode() == transaction.status
        theirs = list(transaction)
        assert [(each.oid, each.tid, file.data(each)) for each in headers] == [
            (each.oid, each.tid, each.data) for each in theirs
        ]
        if status == b" ":
            assert [file.revision(each.oid, each.tid) for each in headers] == headers
        kept += 1
    assert kept > 30


def test_an_empty_transaction_is_found(writer: Writer, file: DataFile) -> None:
    writer.write(A=PLAIN[0])
    empty = writer.within(lambda meta: None)
    writer.write(A=PLAIN[1])
    assert file.transaction(empty) == (b" ", [])


def test_the_last_transactions_are_those_that_filestorage_tells(
    storage: Any, writer: Writer, file: DataFile
) -> None:
    chance = random.Random(2)
    for _ in range(30):
        writer.write(**dict.fromkeys(chance.sample("ABC", chance.randint(1, 3)), PLAIN[0]))
    writer.within(lambda meta: None)
    writer.undo(writer.tids[-1])
    for count in (0, 1, 7, 100):
        theirs = [(tid, list(oids)) for tid, oids in storage.lastInvalidations(count)]
        assert file.last_transactions(count, 1000) == theirs


def test_no_more_records_are_read_than_was_said(writer: Writer, file: DataFile) -> None:
    tids = [writer.write(A=PLAIN[0]), writer.write(A=PLAIN[1], B=PLAIN[0]), writer.write(C=PLAIN[0])]
    known = [(tids[0], [A]), (tids[1], [A, B]), (tids[2], [C])]
    assert file.last_transactions(10, 4) == known
    assert file.last_transactions(10, 3) == known[1:]
    assert file.last_transactions(10, 2) == known[2:]
    assert file.last_transactions(10, 0) == []


# A pack meanwhile -------------------------------------------------------------------------------------


class PackingLock:
    """A storage's lock, under which the *nth* holder finds that a pack has just ended."""

    def __init__(self, writer: Writer, stop: bytes, nth: int) -> None:
        self.left = nth
        self._writer = writer
        self._stop = stop
        self._lock = writer.storage._lock

    def __enter__(self) -> None:
        self._lock.acquire()
        if self.left == 0:
            self.left -= 1
            self._lock.release()
            self._writer.pack_up_to(self._stop)
            self._lock.acquire()
        self.left -= 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Seen:
    """A storage with another lock, as `DataFile` sees it."""

    def __init__(self, storage: Any, lock: PackingLock) -> None:
        self._real = storage
        self._lock = lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_position_is_not_used_in_another_file(writer: Writer, file: DataFile) -> None:
    writer.write(A=PLAIN[3])  # this one goes
    writer.write(A=PLAIN[0])
    old = writer.write(A=PLAIN[1])
    undo = writer.undo(old)
    header = file.newest(A)
    assert header is not None
    writer.pack_up_to(old)
    for ask in file.previous, file.source, file.data:
        with pytest.raises(FileReplaced):
            ask(header)
    again = file.revision(A, undo)
    assert again is not None
    assert file.data(again) == PLAIN[0]


def test_what_is_looked_for_steadily_is_found_in_one_file(writer: Writer, file: DataFile) -> None:
    writer.write(A=PLAIN[0])
    writer.write(A=PLAIN[1])
    last = writer.write(A=PLAIN[2])
    looks = []

    def look() -> bytes | None:
        header = file.newest(A)
        assert header is not None
        looks.append(header)
        if len(looks) == 1:
            writer.pack_up_to(last)
        return file.data(header)

    assert file.steadily(look) == PLAIN[2]
    assert len(looks) == 2


def test_a_transaction_is_found_whenever_a_pack_ends(storage: Any, tmp_path: Path) -> None:
    for nth in range(100):
        storage = FileStorage(str(tmp_path / f"{nth}.fs"))
        try:
            writer = Writer(storage)
            for number in range(3):
                writer.write(A=PLAIN[number], B=PLAIN[number + 1])
            wanted = writer.undo(writer.tids[-1])
            writer.write(B=PLAIN[0])
            lock = PackingLock(writer, writer.tids[1], nth)
            found = DataFile(Seen(storage, lock)).transaction(wanted)
            assert found is not None
            assert found == DataFile(storage).transaction(wanted)
            assert [each.oid for each in found[1]] == [A, B]
            if lock.left >= 0:
                break  # it was over before
        finally:
            storage.close()
    else:
        pytest.fail("it never ends")
    assert nth > 3


# Finding a transaction in a large file ----------------------------------------------------------------


Contents = list[tuple[bytes, list[tuple[bytes, bytes]]]]


class Large:
    """A large data file, written directly; *contents*: (tid, (oid, data) …) of each transaction."""

    def __init__(self, path: Path, contents: Iterable[tuple[bytes, list[tuple[bytes, bytes]]]]) -> None:
        index: dict[bytes, int] = {}
        self.oids: dict[bytes, list[bytes]] = {}
        position = 4
        with path.open("wb") as out:
            out.write(b"FS30")
            for tid, records in contents:
                laid_out = lay_out(
                    position, tid, b" ", b"", b"", b"", ((o, index.get(o, 0), d, 0) for o, d in records)
                )
                out.write(b"".join(laid_out.parts))
                index.update(laid_out.index)
                position += laid_out.length
                self.oids[tid] = [oid for oid, _ in records]
        self.storage = FileStorage(str(path), read_only=True)
        self.file = DataFile(self.storage)

    def check(self, tids: Iterable[bytes]) -> None:
        for tid in tids:
            found = self.file.transaction(tid)
            assert found is not None
            assert [each.oid for each in found[1]] == self.oids[tid]
            assert {each.tid for each in found[1]} <= {tid}
            for absent in tid_before(tid), tid_after(tid):
                assert self.file.transaction(absent) is None


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Callable[[Iterable[tuple[bytes, list[tuple[bytes, bytes]]]]], Large]]:
    made: list[Large] = []

    def make(contents: Iterable[tuple[bytes, list[tuple[bytes, bytes]]]]) -> Large:
        made.append(Large(tmp_path / f"{len(made)}.fs", contents))
        return made[-1]

    yield make
    for each in made:
        each.storage.close()


Make = Callable[[Iterable[tuple[bytes, list[tuple[bytes, bytes]]]]], Large]


class Reads:
    """Counts what is read from files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.size_bytes = 0
        pread = os.pread

        def counting(file: int, size: int, position: int) -> bytes:
            self.calls += 1
            self.size_bytes += size
            return pread(file, size, position)

        monkeypatch.setattr(os, "pread", counting)


@pytest.mark.parametrize(
    ("count", "objects", "largest"),
    [(12_000, 9_000, 5_000), (12_000, 300, 5_000), (150, 100, 400_000)],
    ids=["mostly written once", "no old record is current", "large records"],
)
def test_old_transactions_are_found_as_quickly_as_new_ones(
    large: Make, monkeypatch: pytest.MonkeyPatch, count: int, objects: int, largest: int
) -> None:
    chance = random.Random(2)
    here = large(
        (tid_at(n), [(p64(chance.randrange(objects)), chance.randbytes(chance.randrange(1, largest)))])
        for n in range(count)
    )
    assert here.storage.getSize() > 25_000_000
    reads = Reads(monkeypatch)
    for n in [0, 1, count - 1, *chance.sample(range(count), 60)]:
        for tid, present in (tid_at(n), True), (tid_after(tid_at(n)), False):
            reads.size_bytes = 0
            assert (here.file.transaction(tid) is not None) is present
            assert reads.size_bytes < 6_000_000
    here.check(tid_at(n) for n in chance.sample(range(count), 60))


@pytest.mark.parametrize("seed", range(6))
def test_transactions_of_any_size_are_found(large: Make, seed: int) -> None:
    chance = random.Random(seed)
    objects = chance.choice([1, 3, 50, 5_000])
    sizes = [1, 40, 900, 70_000, 300_000, 2_500_000]
    weights = [20, 20, 20, 5, 2, 1]

    def transaction() -> list[tuple[bytes, bytes]]:
        oids = {p64(chance.randrange(objects)) for _ in range(chance.choice([0, 1, 1, 2, 30]))}
        fill = chance.choice([b"\0", b"\1", b"\0\0\3\4"])
        return [(oid, (fill * chance.choices(sizes, weights)[0])[:2_500_000]) for oid in sorted(oids)]

    contents: Contents = []
    size = 0
    while size < 12_000_000:
        contents.append((tid_at(len(contents)), transaction()))
        size += sum(len(data) for _, data in contents[-1][1])
    here = large(contents)
    tids = [tid for tid, _ in contents]
    here.check({tids[0], tids[-1], *chance.sample(tids, min(len(tids), 40))})


def test_tids_may_have_nothing_in_common(large: Make) -> None:
    tids = [p64((n + 1) << 48) for n in range(3_000)]
    here = large((tid, [(p64(n), b"data" * 400)]) for n, tid in enumerate(tids))
    here.check(tids[::150])


def test_where_nothing_is_vouched_for_the_file_is_walked(
    large: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tids = [tid_at(n) for n in range(3_000)]
    here = large((tid, [(A, b"data" * 400)]) for tid in tids)
    here.check([*tids[::300], tids[-1]])
    reads = Reads(monkeypatch)
    assert here.file.transaction(tids[0]) is not None
    assert reads.calls < 30_000


def test_records_may_name_another_transaction(large: Make) -> None:
    """A copy with FileStorage's restore may have given them the tid that they had elsewhere."""
    tids = [tid_at(n) for n in range(3_000)]
    here = large((tid, [(p64(n), b"data" * 400)]) for n, tid in enumerate(tids))
    with open(here.storage._file_name, "r+b") as out:
        for n in range(3_000):
            out.seek(here.storage._index[p64(n)] + 8)
            out.write(tids[(n + 1_000) % 3_000])
    for n in range(0, 3_000, 150):
        found = here.file.transaction(tids[n])
        assert found is not None
        assert [each.oid for each in found[1]] == [p64(n)]


def test_data_that_looks_like_a_transaction_is_none(large: Make) -> None:
    """Who knows where it will be written can store what looks like a transaction in every respect."""
    position, contents, decoys = 4, [], []
    for n in range(200):
        true_tid, decoy_tid = tid_at(2 * n), tid_at(2 * n + 1)
        filling = b""
        inside = position + TRANSACTION_HEADER.size + RECORD_HEADER.size
        while len(filling) < 20_000:
            oid = p64(n)
            parts = lay_out(
                inside + len(filling), decoy_tid, b" ", b"", b"", b"", [(oid, 0, b"decoy" * 20, 0)]
            )
            filling += b"".join(parts.parts)
        contents.append((true_tid, [(p64(n), filling)]))
        decoys.append(decoy_tid)
        position += TRANSACTION_HEADER.size + RECORD_HEADER.size + len(filling) + LENGTH.size
    here = large(contents)
    assert here.storage.getSize() == position > 4_000_000
    for tid in decoys[::7]:
        assert here.file.transaction(tid) is None
    here.check(tid for tid, _ in contents[::7])


# Damage -----------------------------------------------------------------------------------------------


def overwrite(storage: Any, position: int, data: bytes) -> None:
    with open(storage._file_name, "r+b") as out:
        out.seek(position)
        out.write(data)


PREVIOUS_OFFSET, SIZE_OFFSET = 16, 34


def test_a_record_that_refers_to_what_is_behind_it_is_refused(
    storage: Any, writer: Writer, file: DataFile
) -> None:
    writer.write(A=PLAIN[0])
    writer.undo(writer.write(A=PLAIN[1]))
    header = file.newest(A)
    assert header is not None
    for offset in PREVIOUS_OFFSET, RECORD_HEADER.size:
        overwrite(storage, header.position + offset, p64(header.position))
        with pytest.raises(CorruptedError):  # and not looked for without end
            file.newest(A)
        overwrite(storage, header.position + offset, p64(header.previous))
    assert file.newest(A) is not None


def test_a_record_of_another_object_is_refused(storage: Any, writer: Writer, file: DataFile) -> None:
    writer.write(A=PLAIN[0], B=PLAIN[1])
    writer.write(A=PLAIN[2])
    newest, other = file.newest(A), file.newest(B)
    assert newest is not None
    assert other is not None
    overwrite(storage, newest.position + PREVIOUS_OFFSET, p64(other.position))
    again = file.newest(A)
    assert again is not None
    with pytest.raises(CorruptedError):
        file.previous(again)


def test_data_beyond_the_end_is_refused_before_it_is_read(
    storage: Any, writer: Writer, file: DataFile
) -> None:
    writer.write(A=PLAIN[0])
    header = file.newest(A)
    assert header is not None
    overwrite(storage, header.position + SIZE_OFFSET, p64(1 << 60))
    again = file.newest(A)
    assert again is not None
    with pytest.raises(CorruptedError):
        file.data(again)
    with pytest.raises(CorruptedError):
        file.transaction(header.tid)


@pytest.mark.parametrize("length", [0, 30, 1 << 20, 1 << 60])
def test_lengths_that_differ_are_refused(storage: Any, writer: Writer, file: DataFile, length: int) -> None:
    first = writer.write(A=PLAIN[0])
    writer.write(A=PLAIN[1])
    overwrite(storage, storage.getSize() - LENGTH.size, p64(length))
    with pytest.raises(CorruptedError):
        file.transaction(first)


def test_a_file_that_was_cut_off_is_refused(storage: Any, writer: Writer, file: DataFile) -> None:
    tid = writer.write(A=PLAIN[0])
    os.truncate(storage._file_name, storage.getSize() - 20)
    header = file.newest(A)
    assert header is not None
    with pytest.raises(CorruptedError):
        file.data(header)
    with pytest.raises(CorruptedError):
        file.transaction(tid)


def test_filestorage_agrees_that_nothing_is_left(storage: Any, writer: Writer, file: DataFile) -> None:
    """That the reading here has no idea of its own of what "ceases to be" means."""
    writer.write(A=PLAIN[0])
    writer.write(A=None)
    with pytest.raises(POSKeyError):
        storage.load(A)
    newest = file.newest(A)
    assert newest is not None
    assert file.data(newest) is None
