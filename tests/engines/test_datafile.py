"""A transaction that the engine writes by itself is, byte for byte, what FileStorage would have written."""

from __future__ import annotations

from base64 import encodebytes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from persistent.TimeStamp import TimeStamp
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError, UndoError
from ZODB.utils import p64

from tests.engines.datafiles import (
    INFO,
    Database,
    in_file,
    in_stock_storage,
    record,
    tid,
    use_no_keeper,
    use_small_segments,
)
from tests.engines.journals import Quick
from zeoid.engines.datafile import LENGTH, TRANSACTION_HEADER, lay_out, tid_that_ends_at, transaction_bytes
from zeoid.engines.storage import StorageEngine
from zeoid.model import NO_TID, Conflict, Delete, Operation, Restore, Store, TransactionInfo, Undo
from zeoid.ports import Commit

OIDS = [p64(number) for number in (0, 1, 2, 0x10000, 0x7FFFFFFFFFFF)]


@pytest.fixture(autouse=True, scope="module")
def small_segments() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_small_segments(patch, 64 * 1024)
        use_no_keeper(patch)
        yield


@dataclass
class Pair:
    """The same storage twice: one that the engine writes, one that FileStorage writes."""

    mine: Database
    theirs: StorageEngine
    folder: Path
    tids: list[bytes] = field(default_factory=list)

    def close(self) -> None:
        self.mine.close()
        self.theirs.close()

    def write(self, *operations: Operation, info: TransactionInfo = INFO, abandon: bool = False) -> bool:
        """Whether it could be."""
        at = tid(len(self.tids) + 1)
        try:
            mine: Any = self.mine.engine.prepare(None, info, operations)
        except (UndoError, POSKeyError):
            mine = None
        try:
            theirs: Any = self.theirs.prepare(at, info, operations)
        except (UndoError, POSKeyError):
            theirs = None
        if mine is None or mine.conflicts or theirs is None or theirs.conflicts:
            # An undo that meets a conflict is told as one, where FileStorage tries to resolve it by itself.
            assert theirs is None or _short(theirs.conflicts) == _short(mine.conflicts)
            assert mine is None or mine.conflicts
            return False
        assert mine.oids == theirs.oids
        for engine, prepared in (self.mine.engine, mine), (self.theirs, theirs):
            if abandon:
                engine.abandon(prepared)
            else:
                engine.commit([Commit(at, b"", prepared)])
        if not abandon:
            self.tids.append(at)
        return True

    def store(self, oid: bytes, data: bytes) -> bool:
        return self.write(Store(oid, self.serial(oid), data))

    def undo(self, number: int) -> bool:
        return self.write(Undo(encodebytes(self.tids[number]).rstrip()))

    def serial(self, oid: bytes) -> bytes:
        return self.mine.serial(oid)

    def pack(self, number: int) -> None:
        for engine in self.mine.engine, self.theirs:
            engine.pack(_time(self.tids[number]))

    def check(self) -> None:
        """Files, indexes and what else the two keep in memory are the same."""
        assert (self.folder / "mine.fs").read_bytes() == (self.folder / "theirs.fs").read_bytes()
        mine, theirs = self.mine.storage, self.theirs._storage
        assert dict(mine._index.items()) == dict(theirs._index.items())
        assert (mine._pos, mine._ltid) == (theirs._pos, theirs._ltid)
        assert mine._oid >= max(mine._index, default=NO_TID)
        assert mine.getSize() == theirs.getSize()


def _short(conflicts: Sequence[Conflict]) -> list[tuple[bytes, bytes, bytes, bytes]]:
    return [(each.oid, each.committed, each.read, each.data) for each in conflicts]


def _time(at: bytes) -> float:
    time: float = TimeStamp(at).timeTime()
    return time


def open_pair(folder: Path) -> Pair:
    folder.mkdir(exist_ok=True)
    theirs = StorageEngine(FileStorage(str(folder / "theirs.fs"), create=True))
    return Pair(Database(folder / "mine.fs"), theirs, folder)


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
    st.none(),
    st.sampled_from("  p"),
)
#: oid: (whether the writer knows the current revision, the data)
stores = st.dictionaries(
    st.sampled_from(OIDS),
    st.tuples(st.integers(0, 4).map(bool), st.binary(min_size=1, max_size=3000)),
    max_size=4,
)
steps = st.one_of(
    st.tuples(st.just("store"), infos, stores, st.booleans()),
    st.tuples(st.just("undo"), st.integers(-4, -1)),
    st.tuples(st.just("delete"), st.sampled_from(OIDS)),
    st.tuples(st.just("restore"), st.sampled_from(OIDS), st.integers(-4, -1), st.booleans()),
    st.tuples(st.just("reopen")),
)


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.lists(steps, max_size=12))
def test_random_histories(tmp_path_factory: pytest.TempPathFactory, history: list[Any]) -> None:
    pair = open_pair(tmp_path_factory.mktemp("pair"))
    try:
        pair.store(OIDS[0], b"first")
        for step in history:
            take(pair, *step)
            pair.check()
    finally:
        pair.close()


def take(pair: Pair, what: str, *given: Any) -> None:
    match what, *given:
        case "store", info, written, abandon:
            operations = [
                Store(oid, pair.serial(oid) if knows else p64(7), data)
                for oid, (knows, data) in written.items()
            ]
            pair.write(*operations, info=info, abandon=abandon)
        case "undo", number:
            if len(pair.tids) >= -number:
                pair.undo(number)
        case "delete", oid:
            pair.write(Delete(oid, pair.serial(oid)))
        case "restore", oid, number, differs:
            if len(pair.tids) >= -number:
                pair.write(restored(pair, oid, pair.tids[number], differs))
        case ("reopen",):
            pair.mine.close()
            pair.mine.reopen()


def restored(pair: Pair, oid: bytes, same_as: bytes, differs: bool) -> Restore:
    """A copy of the revision that this transaction wrote, if it wrote one; perhaps with other data."""
    file = pair.mine.appender.data_file
    revision = file.revision(oid, same_as)
    if revision is None:
        return Restore(oid, b"no such revision", same_as)
    # Of a revision without data of its own FileStorage believes that it is the same.
    data = file.data(revision)
    return Restore(oid, data + b"differs" if differs and revision.size else data, same_as)


def test_it_is_the_engine_that_writes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the comparisons here would compare FileStorage with itself."""
    for name in "tpc_begin", "store", "restore", "undo", "deleteObject", "tpc_vote", "tpc_finish":
        monkeypatch.setattr(pair.mine.storage, name, None)
    pair.store(OIDS[1], b"data")
    pair.store(OIDS[1], b"other data")
    assert pair.undo(-1)
    assert pair.write(Delete(OIDS[1], pair.serial(OIDS[1])))
    assert pair.write(Restore(OIDS[1], b"data", pair.tids[0]))
    pair.check()


def test_what_refers_to_earlier_data_does_not_repeat_it(pair: Pair) -> None:
    pair.store(OIDS[1], b"x" * 5000)
    pair.store(OIDS[1], b"y")
    size = pair.mine.engine.size_bytes()
    assert pair.undo(-1)
    assert pair.write(Restore(OIDS[1], b"x" * 5000, pair.tids[0]))
    assert pair.undo(-1)
    assert pair.mine.engine.size_bytes() - size < 500
    pair.check()


def test_an_undone_deletion_and_an_undone_creation(pair: Pair) -> None:
    pair.store(OIDS[1], b"data")
    pair.write(Delete(OIDS[1], pair.serial(OIDS[1])))
    assert pair.undo(-2) is False
    pair.store(OIDS[2], b"created")
    assert pair.undo(-1)
    assert pair.undo(-1)
    pair.check()


def test_a_batch_is_what_its_transactions_would_be_one_by_one(pair: Pair) -> None:
    prepared = [pair.mine.prepare(Store(oid, NO_TID, b"data")) for oid in OIDS]
    pair.mine.commit(*prepared)
    for number, oid in enumerate(OIDS, 1):
        theirs = pair.theirs.prepare(tid(number), INFO, [Store(oid, NO_TID, b"data")])
        pair.theirs.commit([Commit(tid(number), b"", theirs)])
    pair.check()


@pytest.mark.parametrize("size", [1, 1000, 3_000_000])
def test_a_transaction_of_any_size(pair: Pair, size: int) -> None:
    for number in range(2):
        pair.write(
            Store(OIDS[1], pair.serial(OIDS[1]), b"%d" % number * size),
            Store(OIDS[2], pair.serial(OIDS[2]), b"x"),
        )
        pair.check()


def test_a_quota_changes_nothing_in_the_file(pair: Pair) -> None:
    pair.mine.storage._quota = pair.theirs._storage._quota = 10_000_000
    pair.store(OIDS[2], b"more")
    pair.check()


def test_a_write_in_pieces(tmp_path: Path) -> None:
    """A system may write less than it was asked to."""

    class Slow(Quick):
        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
            for start in range(0, len(data), 4093):
                super().pwrite(fd, memoryview(data)[start : start + 4093], offset + start)

    pair = open_pair(tmp_path)
    pair.mine.close()
    pair.mine = Database(pair.mine.path, Slow())
    pair.write(Store(OIDS[1], NO_TID, b"x" * 3_000_000), Store(OIDS[2], NO_TID, b"y" * 1000))
    pair.check()
    pair.close()


def test_a_file_written_so_opens_again_without_its_index(pair: Pair) -> None:
    for number in range(5):
        pair.write(*(Store(oid, pair.serial(oid), b"%d" % number) for oid in OIDS))
    told = pair.mine.told()
    pair.mine.close()
    (pair.folder / "mine.fs.index").unlink()
    assert in_file(pair.mine.path) == told
    assert in_stock_storage(pair.mine.path) == told
    pair.mine.reopen()
    assert [pair.mine.data(oid) for oid in OIDS] == [b"4"] * len(OIDS)
    pair.check()


def test_a_pack_meets_transactions_written_so(pair: Pair) -> None:
    for number in range(5):
        pair.store(OIDS[0], record(b"%d" % number))
    assert pair.undo(-1)
    pair.pack(-3)
    pair.check()
    pair.store(OIDS[0], record(b"after"))
    pair.check()


# The layout by itself -------------------------------------------------------------------------------------


def test_the_length_is_never_more_than_was_reckoned() -> None:
    for data in None, b"", b"x" * 1000:
        records = [(oid, 0, data, 0) for oid in OIDS]
        laid_out = lay_out(4, tid(1), b" ", b"user", b"description", b"", records)
        assert laid_out.length == sum(map(len, laid_out.parts))
        assert laid_out.length <= transaction_bytes(15, len(OIDS), len(data or b"") * len(OIDS))


def ends(content: bytes, end: int | None = None) -> bytes | None:
    return tid_that_ends_at(
        lambda position, size: content[position : position + size], len(content) if end is None else end
    )


def test_the_transaction_that_ends_somewhere() -> None:
    content = b"FS30"
    assert ends(content) == NO_TID
    for number in 1, 2:
        laid_out = lay_out(len(content), tid(number), b" ", b"u", b"", b"", [(OIDS[1], 0, b"data", 0)])
        content += b"".join(laid_out.parts)
        assert ends(content) == tid(number)
    for end in {*range(len(content) + 9)} - {4, 4 + (len(content) - 4) // 2, len(content)}:
        assert ends(content, end) is None, end


@pytest.mark.parametrize("spoiled", [b"", b"FS3", b"FS31", b"\0\0\0\0"])
def test_no_data_file_begins_so(spoiled: bytes) -> None:
    assert ends(spoiled, 4) is None


def test_a_transaction_that_was_not_finished_ends_nowhere() -> None:
    laid_out = lay_out(4, tid(1), b"c", b"", b"", b"", [])
    assert ends(b"FS30" + b"".join(laid_out.parts)) is None


def test_lengths_that_differ_belong_to_no_transaction() -> None:
    header = TRANSACTION_HEADER.pack(tid(1), TRANSACTION_HEADER.size + 1, b" ", 0, 0, 0)
    assert ends(b"FS30" + header + LENGTH.pack(TRANSACTION_HEADER.size)) is None
