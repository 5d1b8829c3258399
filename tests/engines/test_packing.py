"""A pack that is watched: how far it is, giving it up at any moment, and what is committed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from persistent.TimeStamp import TimeStamp
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileStorageError
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import p64

from tests.engines.datafiles import (
    INFO,
    ROOT,
    Database,
    databases,
    in_stock_storage,
    number_of,
    record,
    tid,
    use_no_keeper,
    use_small_segments,
)
from zeoid import limits
from zeoid.engines.opening import engine_of
from zeoid.engines.storage import StorageEngine
from zeoid.errors import PackCancelled
from zeoid.model import NO_TID, Store
from zeoid.ports import Commit, PackStep
from zeoid.testing.disk import FaultyDisk

Start = Callable[..., Database]
LIVE, GARBAGE = [p64(number) for number in range(1, 11)], [p64(number) for number in range(11, 15)]
#: The pack time: what is later stays.
PACK_AT = 4


class Watcher:
    """The progress of a pack: what was told, and what is done when it is told."""

    def __init__(self, meanwhile: Callable[[PackStep], None] = lambda step: None) -> None:
        self.steps: list[PackStep] = []
        self.meanwhile = meanwhile
        #: The report that finds that the pack is to be given up, counted from 0.
        self.cancel_at = -1
        self.cancel_in_the_end = False

    def report(self, step: PackStep) -> None:
        self.steps.append(step)
        if len(self.steps) - 1 == self.cancel_at:
            raise PackCancelled("given up")
        self.meanwhile(step)

    def begin_replacing(self) -> None:
        if self.cancel_in_the_end:
            raise PackCancelled("given up")

    @property
    def phases(self) -> list[str]:
        """Without repetitions."""
        named = [step.phase for step in self.steps]
        return [name for index, name in enumerate(named) if index == 0 or name != named[index - 1]]


@pytest.fixture(autouse=True)
def every_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is told, and everything that came after the pack time is copied while others commit."""
    use_no_keeper(monkeypatch)
    use_small_segments(monkeypatch, 64 * 1024)
    monkeypatch.setattr(limits, "PACK_REPORT_RECORDS", 1)
    monkeypatch.setattr(limits, "PACK_LAST_BYTES", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "var").mkdir()
    return tmp_path / "var" / "Data.fs"


@pytest.fixture
def start() -> Iterator[Start]:
    yield from databases()


def fill(database: Database) -> Database:
    """Objects that are overwritten, some that nothing refers to, and transactions after the pack time."""
    stores = [Store(ROOT, NO_TID, record(b"root", *LIVE))]
    database.write(*stores, *(Store(oid, NO_TID, record(b"one")) for oid in LIVE + GARBAGE))
    database.store(*LIVE[:5], data=b"two")
    database.store(*LIVE[:2], data=b"three")
    database.store(LIVE[0], data=b"four")
    database.store(LIVE[1], data=b"five")
    database.store(*LIVE[3:6], data=b"six")
    assert number_of(database.engine.last_tid()) == PACK_AT + 2
    return database


@pytest.fixture
def database(path: Path, start: Start) -> Database:
    return fill(start(path))


def pack(database: Database, watcher: Watcher, at: int = PACK_AT) -> None:
    database.engine.pack(TimeStamp(tid(at)).timeTime(), watcher)


def held(database: Database) -> bool:
    return bool(database.storage._commit_lock.locked())


# How far it is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, PACK_AT, PACK_AT + 2])
def test_the_progress_grows_to_its_end(database: Database, at: int) -> None:
    size = database.engine.size_bytes()
    watcher = Watcher()
    pack(database, watcher, at)
    percents = [step.percent or 0.0 for step in watcher.steps]
    assert percents == sorted(percents)
    assert percents[0] == 0
    assert 95 < percents[-1] <= 100
    assert len(set(percents)) > 20
    assert watcher.phases == ["reading", "tracing", "reading", "copying"]
    objects = [step.objects for step in watcher.steps]
    assert objects == sorted(objects)
    last = watcher.steps[-1]
    assert (last.objects, last.objects_total) == (11, 15)  # with the root, and with the garbage
    for step in watcher.steps:
        assert (step.bytes, step.bytes_total) == (0, 0) or step.bytes_total == size
        assert step.bytes <= step.bytes_total
    for phase in ("reading", "copying"):
        assert max(step.bytes for step in watcher.steps if step.phase == phase) > size * 0.8


def test_it_is_told_now_and_then_only(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher()
    monkeypatch.setattr(limits, "PACK_REPORT_RECORDS", 10)
    pack(database, watcher)
    assert len(watcher.steps) < 20


def test_without_a_search_for_garbage(path: Path, start: Start) -> None:
    fill(start(path)).close()
    engine = engine_of(FileStorage(str(path), pack_gc=False))
    try:
        watcher = Watcher()
        engine.pack(TimeStamp(tid(2)).timeTime(), watcher)
    finally:
        engine.close()
    assert watcher.phases == ["reading", "copying"]
    assert 95 < (watcher.steps[-1].percent or 0) <= 100
    assert (watcher.steps[-1].objects, watcher.steps[-1].objects_total) == (15, 15)


def test_a_storage_that_packs_by_itself_tells_that_it_packs() -> None:
    engine = StorageEngine(MappingStorage())
    watcher = Watcher()
    assert not engine.can_cancel_pack
    engine.pack(1e9, watcher)
    assert watcher.steps == [PackStep("packing")]


def test_a_packer_that_a_configuration_names_is_left_alone(path: Path) -> None:
    calls = []

    def packer(*given: object) -> None:
        calls.append(given)

    storage = FileStorage(str(path), packer=packer)
    engine = engine_of(storage)
    try:
        assert not engine.can_cancel_pack
        prepared = engine.prepare(None, INFO, [Store(ROOT, NO_TID, record(b"root"))])
        engine.commit([Commit(tid(1), b"", prepared)])
        watcher = Watcher()
        engine.pack(1e9, watcher)
    finally:
        engine.close()
    assert len(calls) == 1
    assert watcher.steps == [PackStep("packing")]


# Giving it up -----------------------------------------------------------------------------------------


def everything(database: Database) -> dict[str, bytes]:
    files = [file for file in database.path.parent.rglob("*") if file.is_file()]
    return {str(file.relative_to(database.path.parent)): file.read_bytes() for file in files}


def test_it_can_be_given_up_at_any_moment(database: Database) -> None:
    """Nothing is left of it, nothing is locked, and commits and another pack work."""
    told, size = database.told(), database.engine.size_bytes()
    index = dict(database.storage._index.items())
    files = everything(database)
    phases = set()
    for cancel_at in range(1000):
        watcher = Watcher()
        watcher.cancel_at = cancel_at
        try:
            pack(database, watcher)
        except PackCancelled:
            phases.add(watcher.steps[-1].phase)
        else:
            break
        assert not held(database)
        assert everything(database) == files
        assert dict(database.storage._index.items()) == index
        assert database.engine.failure == ""
    assert cancel_at > 60
    assert phases == {"reading", "tracing", "copying"}
    assert database.engine.size_bytes() < size
    assert database.told()[-2:] == told[-2:]
    database.store(*LIVE)
    told = database.told()
    database.restart()
    assert database.told() == told
    database.close()
    assert in_stock_storage(database.path) == told


def test_it_can_be_given_up_while_the_last_of_the_rest_is_copied(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it has the commit lock."""
    monkeypatch.setattr(limits, "PACK_LAST_BYTES", 1 << 20)
    watcher = Watcher()
    watcher.meanwhile = lambda step: give_up_if(held(database))
    told = database.told()
    with pytest.raises(PackCancelled):
        pack(database, watcher)
    assert not held(database)
    assert database.told() == told
    assert not Path(f"{database.path}.pack").exists()
    size = database.engine.size_bytes()
    pack(database, Watcher())
    assert database.engine.size_bytes() < size


def give_up_if(wanted: bool) -> None:
    if wanted:
        raise PackCancelled("given up")


def test_it_can_be_given_up_until_the_file_is_replaced(database: Database) -> None:
    watcher = Watcher()
    watcher.cancel_in_the_end = True
    files = everything(database)
    with pytest.raises(PackCancelled):
        pack(database, watcher)
    assert everything(database) == files
    assert not held(database)
    database.store(LIVE[0])
    pack(database, Watcher())
    assert not held(database)


def test_what_is_committed_before_it_is_given_up_stays(database: Database) -> None:
    committed: list[bytes] = []

    def commit_once(step: PackStep) -> None:
        if step.phase == "copying" and not committed:
            committed.append(database.store(LIVE[0], data=b"meanwhile"))
            raise PackCancelled("given up")

    with pytest.raises(PackCancelled):
        pack(database, Watcher(commit_once))
    assert database.told()[-1][0] == committed[0]
    database.restart()
    assert database.data(LIVE[0]) == record(b"meanwhile")


def test_a_pack_that_fails_leaves_no_file_behind(database: Database) -> None:
    def fail(step: PackStep) -> None:
        if step.phase == "copying" and step.bytes > 500:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pack(database, Watcher(fail))
    assert not Path(f"{database.path}.pack").exists()
    assert not held(database)


def test_a_second_one_is_refused_and_does_not_disturb_the_first(database: Database) -> None:
    second = Watcher()

    def pack_again(step: PackStep) -> None:
        if step.phase == "tracing":
            with pytest.raises(FileStorageError, match="Already packing"):
                pack(database, second)

    first = Watcher(pack_again)
    pack(database, first)
    assert second.steps == []
    assert first.phases[-1] == "copying"


# Meanwhile --------------------------------------------------------------------------------------------


def test_commits_and_loads_go_on(path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that something is told another thread could commit, but while the last of it is copied."""
    monkeypatch.setattr(limits, "PACK_ROUNDS", 3)
    monkeypatch.setattr(limits, "PACK_REPORT_RECORDS", 4)
    database = fill(start(path))
    committed: list[bytes] = []
    waiting = 0

    def meanwhile(step: PackStep) -> None:
        nonlocal waiting
        assert database.data(LIVE[7]) is not None
        if held(database):
            waiting += 1
        else:
            committed.append(database.store(LIVE[7], data=b"%d" % len(committed)))

    watcher = Watcher(meanwhile)
    pack(database, watcher)
    assert len(committed) > 10 * waiting
    percents = [step.percent or 0.0 for step in watcher.steps]
    assert percents == sorted(percents), "it gets no less though the file grows"
    assert all(step.bytes <= step.bytes_total for step in watcher.steps), "nor more than there is"
    assert [told[0] for told in database.told()[-len(committed) :]] == committed
    assert database.data(LIVE[7]) == record(b"%d" % (len(committed) - 1))
    told = database.told()
    database.close()
    assert in_stock_storage(path) == told


def test_the_new_file_is_synced_before_everybody_waits(path: Path, start: Start) -> None:
    disk = FaultyDisk(path.parent)
    database = fill(start(path, disk))
    waiting: list[bool] = []

    def note(operation: str, where: str) -> None:
        if operation == "sync" and where.endswith(".pack"):
            waiting.append(held(database))

    disk.on_operation = note
    pack(database, Watcher())
    # What stays of the past, what came after the pack time, and the little that came meanwhile.
    assert waiting == [False, False, True]
    waiting.clear()
    database.store(LIVE[0])
    pack(database, Watcher(), PACK_AT + 3)
    assert waiting == [False, True]
    disk.on_operation = None
