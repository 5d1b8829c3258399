"""The short way to read a record gives what FileStorage itself gives, whatever the history of the object."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from persistent.TimeStamp import TimeStamp
from ZODB.POSException import POSKeyError, UndoError
from ZODB.utils import p64

from tests.engines.datafiles import open_engine, use_small_segments
from zeoid.commit.tids import next_tid
from zeoid.engines import filestorage
from zeoid.engines.filestorage import FileStorageEngine
from zeoid.engines.opening import open_filestorage
from zeoid.model import (
    MAX_TID,
    NO_TID,
    Delete,
    Operation,
    Store,
    TransactionInfo,
    Undo,
    tid_after,
    tid_before,
)
from zeoid.ports import Commit

INFO = TransactionInfo(b"", b"", {})
ROOT = p64(0)
OIDS = [p64(number) for number in range(6)]
UNKNOWN = p64(1000)


class History:
    """A data file with a past."""

    def __init__(self, engine: FileStorageEngine) -> None:
        self.engine = engine
        self.tids: list[bytes] = []
        self.now = 1_000_000_000.0

    def write(self, *operations: Operation) -> bytes:
        self.now += 10
        prepared = self.engine.prepare(None, INFO, operations)
        if prepared.conflicts:
            raise UndoError("changed since")
        tid = next_tid(self.engine.last_tid(), self.now)
        self.engine.commit([Commit(tid, b"", prepared)])
        self.tids.append(tid)
        return tid

    def serial(self, oid: bytes) -> bytes:
        """The tid of the newest record of any kind, also that of a deletion."""
        return self.engine.newest_tid(oid) or NO_TID

    def exists(self, oid: bytes) -> bool:
        try:
            self.engine.current_tid(oid)
        except POSKeyError:
            return False
        return True

    def store(self, *oids: bytes, size: int = 20) -> bytes:
        return self.write(*(Store(oid, self.serial(oid), record(size)) for oid in oids))

    def delete(self, oid: bytes) -> bytes:
        return self.write(Delete(oid, self.serial(oid)))

    def undo(self, number: int) -> bool:
        """Undo one of the transactions, unless that is impossible."""
        entries = self.engine.undo_log(0, 1000)
        if not entries:
            return False  # everything is packed
        try:
            self.write(Undo(entries[number % len(entries)]["id"]))
        except (UndoError, POSKeyError):
            return False
        return True

    def pack(self, number: int) -> None:
        """Forget what was overwritten before one of the transactions."""
        self.engine.pack(TimeStamp(self.tids[number]).timeTime())

    def moments(self) -> list[bytes]:
        """Every tid there is, and those just before and after it."""
        near = [at for tid in self.tids for at in (tid_before(tid), tid, tid_after(tid))]
        return [NO_TID, tid_after(NO_TID), *near, MAX_TID]


def record(size: int) -> bytes:
    """A record that refers to all objects, so that none is garbage, with *size* bytes of data.

    Two pickles: the name of a class, and a state that is a tuple of persistent references and bytes.
    """
    references = b"".join(b"(C\x08" + oid + b"cpersistent\nPersistent\ntQ" for oid in OIDS)
    data = b"B" + size.to_bytes(4, "little") + random.Random(size).randbytes(size)
    return b"cpersistent\nPersistent\n.(" + references + data + b"t."


def same(engine: FileStorageEngine, oid: bytes, tid: bytes) -> Any:
    """What both ways to read say, which must be the same."""
    mine = result_of(lambda: engine.load_before(oid, tid))
    theirs = result_of(lambda: engine._storage.loadBefore(oid, tid))
    assert mine == theirs, (oid, tid)
    return mine


def result_of(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except POSKeyError as problem:
        return POSKeyError, problem.args


def everything_is_the_same(history: History) -> None:
    oids = [*OIDS, UNKNOWN]
    for tid in history.moments():
        each = [same(history.engine, oid, tid) for oid in oids]
        together = history.engine.load_before_many(oids, tid, 2**40)
        assert together == [None if one is None or one[0] is POSKeyError else one for one in each]


@pytest.fixture(autouse=True, scope="module")
def small_segments() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_small_segments(patch, 64 * 1024)
        yield


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(open_engine(tmp_path / "Data.fs"))
    yield history
    history.engine.close()


def test_many_revisions(history: History) -> None:
    for number in range(30):
        history.store(*OIDS[: number % 5 + 1], size=number + 1)
    everything_is_the_same(history)
    assert same(history.engine, OIDS[0], MAX_TID)[1:] == (history.tids[-1], None)


#: On both sides of what one read of the engine takes, with the header of 42 bytes and without, and far off.
SIZES = [1, 7, 8, 9, 500, 2005, 2006, 2007, 2047, 2048, 2049, 2090, 4096, 8192, 100_000, 1_000_000]


@pytest.mark.parametrize("size", SIZES)
def test_records_of_every_size(history: History, size: int) -> None:
    data = random.Random(size).randbytes(size)
    for written in (data, b"other", data):
        history.write(Store(ROOT, history.serial(ROOT), written))
    everything_is_the_same(history)
    assert same(history.engine, ROOT, MAX_TID)[0] == data


def test_many_records_at_once_end_when_there_is_enough_of_them(history: History) -> None:
    """With the one that makes it enough, so that there is always one."""
    for oid in OIDS:
        history.write(Store(oid, NO_TID, bytes(1000)))
    wanted = [*OIDS, UNKNOWN, *OIDS]
    for most_bytes, count in ((1, 1), (999, 1), (1000, 1), (1001, 2), (6000, 6), (6001, 8), (12_001, 13)):
        found = history.engine.load_before_many(wanted, MAX_TID, most_bytes)
        assert [one and len(one[0]) for one in found] == ([1000] * 6 + [None] + [1000] * 6)[:count]
    assert history.engine.load_before_many([UNKNOWN, UNKNOWN], MAX_TID, 1) == [None, None]
    assert history.engine.load_before_many([], MAX_TID, 1) == []


def test_older_revisions_count_for_more_than_their_data(history: History) -> None:
    """Each may take any number of reads: so many of them at once would keep others waiting."""
    before = tid_after(history.store(*OIDS))
    for _ in range(3):
        history.store(*OIDS)
    assert len(history.engine.load_before_many(OIDS * 10, MAX_TID, 64 * 1024)) == 60
    assert 2 <= len(history.engine.load_before_many(OIDS * 10, before, 64 * 1024)) <= 10


def test_the_last_record_of_a_file(history: History) -> None:
    """A read of the usual size goes beyond the end of the file."""
    history.store(ROOT, size=1)
    assert same(history.engine, ROOT, MAX_TID)[0] == record(1)


def test_unknown_objects(history: History) -> None:
    history.store(ROOT)
    for tid in history.moments():
        assert same(history.engine, UNKNOWN, tid) == (POSKeyError, (UNKNOWN,))


def test_before_an_object_existed(history: History) -> None:
    history.store(ROOT)
    began = history.store(OIDS[1])
    assert same(history.engine, OIDS[1], began) is None
    assert same(history.engine, OIDS[1], tid_after(began)) is not None


def test_deleted_objects(history: History) -> None:
    history.store(ROOT, OIDS[1])
    deleted = history.delete(OIDS[1])
    assert same(history.engine, OIDS[1], MAX_TID) == (POSKeyError, (OIDS[1],))
    assert same(history.engine, OIDS[1], deleted)[2] == deleted
    again = history.store(OIDS[1])
    assert same(history.engine, OIDS[1], MAX_TID)[1:] == (again, None)
    everything_is_the_same(history)


def test_an_undone_creation(history: History) -> None:
    history.store(ROOT)
    history.store(OIDS[1])
    assert history.undo(0)
    assert same(history.engine, OIDS[1], MAX_TID) == (POSKeyError, (OIDS[1],))
    everything_is_the_same(history)


def test_an_undone_change_refers_to_the_data_of_an_earlier_revision(history: History) -> None:
    first = history.store(ROOT, size=5000)
    history.store(ROOT, size=7)
    assert history.undo(0)
    data, tid, end = same(history.engine, ROOT, MAX_TID)
    assert (data, tid, end) == (record(5000), history.tids[-1], None)
    assert tid != first
    everything_is_the_same(history)


def test_an_undo_that_was_undone(history: History) -> None:
    history.store(ROOT, size=10)
    history.store(ROOT, size=20)
    assert history.undo(0)
    assert history.undo(0)
    assert same(history.engine, ROOT, MAX_TID)[0] == record(20)
    everything_is_the_same(history)


STEP = st.one_of(
    st.tuples(
        st.just("store"),
        st.lists(st.sampled_from(OIDS), min_size=1, max_size=4, unique=True),
        st.sampled_from([1, 10, 1800, 2048, 5000]),
    ),
    st.tuples(st.just("delete"), st.sampled_from(OIDS), st.none()),
    st.tuples(st.just("undo"), st.integers(0, 5), st.none()),
    st.tuples(st.just("pack"), st.integers(0, 10), st.none()),
    st.tuples(st.just("reopen"), st.none(), st.none()),
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(STEP, max_size=25))
def test_any_history(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any, Any]]) -> None:
    path = tmp_path_factory.mktemp("history") / "Data.fs"
    history = History(open_engine(path))
    try:
        history.store(*OIDS)
        for step in steps:
            apply(history, path, *step)
        everything_is_the_same(history)
    finally:
        history.engine.close()


def apply(history: History, path: Path, what: str, which: Any, size: Any) -> None:
    match what:
        case "store":
            history.store(*which, size=size)
        case "delete":
            if history.exists(which):
                history.delete(which)
        case "undo":
            history.undo(which)
        case "pack":
            with contextlib.suppress(KeyError):  # of an object that is deleted and still referred to
                history.pack(-1 - which % len(history.tids))
        case "reopen":
            history.engine.close()
            history.engine = open_engine(path)


def test_after_a_pack(history: History) -> None:
    for number in range(20):
        history.store(*OIDS, size=number * 300 + 1)
    assert history.undo(0)
    history.pack(10)
    everything_is_the_same(history)
    history.store(ROOT)
    everything_is_the_same(history)


def test_while_a_pack_is_under_way(history: History) -> None:
    """Its end replaces file and index: a reader meets the old ones or the new ones, never a mix."""
    for number in range(60):
        history.store(*OIDS, size=number * 100 + 1)
    expected = {oid: history.engine.load_before(oid, MAX_TID) for oid in OIDS}
    problems: list[BaseException] = []

    def pack() -> None:
        try:
            for number in range(40, 60):
                history.pack(number)
        except BaseException as problem:
            problems.append(problem)

    packing = threading.Thread(target=pack)
    packing.start()
    deadline_s = time.monotonic() + 60
    rounds = 0
    while packing.is_alive() or not rounds:
        assert time.monotonic() < deadline_s
        for oid in OIDS:
            assert history.engine.load_before(oid, MAX_TID) == expected[oid]
        rounds += 1
    packing.join()
    assert problems == []
    everything_is_the_same(history)


def test_while_a_transaction_is_prepared(history: History) -> None:
    history.store(ROOT, size=10)
    before = same(history.engine, ROOT, MAX_TID)
    prepared = history.engine.prepare(None, INFO, [Store(ROOT, history.serial(ROOT), record(5000))])
    assert same(history.engine, ROOT, MAX_TID) == before
    history.engine.abandon(prepared)
    assert same(history.engine, ROOT, MAX_TID) == before


def test_no_file_is_touched_while_transactions_are_prepared(history: History, tmp_path: Path) -> None:
    history.store(*OIDS)
    files = [tmp_path / "Data.fs", *tmp_path.glob("Data.fs.journal/*1.log")]
    before = [file.read_bytes() for file in files]
    prepared = [
        history.engine.prepare(None, INFO, [Store(oid, history.serial(oid), record(5000))]) for oid in OIDS
    ]
    assert len(before) == 2
    assert [file.read_bytes() for file in files] == before
    for each in prepared:
        history.engine.abandon(each)


class Writer:
    """A lock that is had when another thread has finished what it was writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = path.stat().st_size
        with path.open("ab") as file:
            file.write(b"half a transaction" * 3)

    def __enter__(self) -> None:
        os.truncate(self._path, self._end)

    def __exit__(self, *problem: object) -> None:
        pass


# FileStorage's iterator leaves its file to the garbage collector when it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("start", range(5))
def test_iteration_while_a_transaction_is_half_written(
    history: History, tmp_path: Path, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        history.store(ROOT, size=300)
    with monkeypatch.context() as patch:
        patch.setattr(history.engine._storage, "_commit_lock", Writer(tmp_path / "Data.fs"))
        found = history.engine.iterate(history.tids[start], history.tids[-1])
        assert [transaction.tid for transaction in found] == history.tids[start:]


def test_a_read_only_file(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "Data.fs")
    history = History(engine)
    history.store(*OIDS, size=3000)
    engine.close()
    history.engine = open_filestorage(tmp_path / "Data.fs", read_only=True)  # type: ignore[assignment]
    everything_is_the_same(history)
    history.engine.close()


def test_a_system_without_positioned_reads(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    history.store(ROOT, size=10)
    monkeypatch.setattr(filestorage, "_pread", None)
    assert same(history.engine, ROOT, MAX_TID)[0] == record(10)
