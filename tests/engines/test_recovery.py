"""A data file and the journal beside it, as they may be found: what is done, and what is refused."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from zc.lockfile import LockFile
from ZODB.FileStorage import FileStorage

from tests.engines.datafiles import (
    INFO,
    ROOT,
    A,
    B,
    C,
    D,
    Database,
    Told,
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
from zeoid.engines.disk import StrPath
from zeoid.engines.journal import JournalDamaged
from zeoid.engines.recovery import journal_directory, set_aside
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ConfigurationError
from zeoid.model import NO_TID, Store
from zeoid.ports import Commit

Start = Callable[..., Database]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_segments(monkeypatch, 64 * 1024)
    use_no_keeper(monkeypatch)
    monkeypatch.setattr(limits, "BATCH_BYTES", 3000)


@pytest.fixture
def start() -> Iterator[Start]:
    yield from databases()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "var").mkdir()
    return tmp_path / "var" / "Data.fs"


class Counting(Quick):
    """A disk that knows how many of its files are open."""

    def __init__(self) -> None:
        self.opened: set[int] = set()

    def open(self, path: StrPath, *, create: bool = False, read_only: bool = False) -> int:
        fd = super().open(path, create=create, read_only=read_only)
        self.opened.add(fd)
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        self.opened.remove(fd)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


def refused(path: Path, *words: str) -> str:
    """It isn't opened, one line says why, and nothing is changed, locked or left open."""
    before = snapshot(path.parent)
    disk = Counting()
    with pytest.raises(ConfigurationError) as caught:
        Database(path, disk)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert snapshot(path.parent) == before
    assert disk.opened == set()
    LockFile(f"{path}.lock").close()
    return message


def stock(path: Path, *data: bytes, first: int = 1) -> None:
    """Have a stock FileStorage write transactions to object C."""
    engine = StorageEngine(FileStorage(str(path)))
    for number, each in enumerate(data, first):
        serial = engine.newest_tid(C) or NO_TID
        at = tid(number)
        prepared = engine.prepare(at, INFO, [Store(C, serial, record(each))])
        engine.commit([Commit(at, b"", prepared)])
    engine.close()


def crashed(path: Path, start: Start) -> tuple[int, list[Told]]:
    """Leave a database whose last transactions only the journal has for sure: where those begin, and all."""
    database = start(path)
    database.store(ROOT, A, id=b"settled")
    database.engine.checkpoint()
    base = path.stat().st_size
    database.store(A, data=b"two", id=b"two")
    database.commit(*(database.prepare(Store(oid, database.serial(oid), record(b"x"))) for oid in (B, D)))
    database.store(A, data=b"four", id=b"four")
    told = database.told()
    database.kill()
    return base, told


# No journal, or nothing in it ---------------------------------------------------------------------------


def test_a_data_file_without_a_journal_gets_one(path: Path, start: Start) -> None:
    stock(path, b"one", b"two")
    database = start(path)
    assert contents_of(path).base.places[0].tid == database.engine.last_tid() == tid(2)
    outcomes = database.engine.outcomes()
    assert (outcomes.floor, list(outcomes.committed)) == (tid(2), [])
    database.store(A)
    database.close()
    assert [told[0] for told in in_stock_storage(path)] == [tid(1), tid(2), tid(3)]


@pytest.mark.parametrize("what", ["an empty directory", "a segment that was being made"])
def test_a_journal_that_was_never_made_completely(path: Path, start: Start, what: str) -> None:
    stock(path, b"one")
    directory = Path(journal_directory(str(path)))
    directory.mkdir()
    if what != "an empty directory":
        (directory / "new-segment").write_bytes(b"ZeoidLog")
    database = start(path)
    database.store(A)
    database.restart()
    assert len(database.told()) == 2


def test_a_stock_server_that_was_used_meanwhile(path: Path, start: Start) -> None:
    database = start(path)
    database.store(A, id=b"mine")
    database.close()
    stock(path, b"theirs", b"theirs, too", first=5)
    database.reopen()
    assert [told[0] for told in database.told()] == [tid(1), tid(5), tid(6)]
    assert database.engine.last_tid() == tid(6)
    # It knew nothing of ids, so nobody can say that an id is unknown.
    outcomes = database.engine.outcomes()
    assert (outcomes.floor, list(outcomes.committed)) == (tid(6), [(b"mine", tid(1))])
    assert contents_of(path).base.places[0].tid == tid(6)
    database.store(C, id=b"after")
    database.restart()
    assert [told[0] for told in database.told()] == [tid(1), tid(5), tid(6), tid(7)]


# Transactions that the data file may not have -----------------------------------------------------------


def test_whatever_part_of_them_reached_the_file(path: Path, start: Start, tmp_path: Path) -> None:
    base, told = crashed(path, start)
    size = path.stat().st_size
    assert size > base + 300
    for length in {*range(base, size, 7), base, base + 1, size - 1, size}:
        folder = tmp_path / f"{length}"
        shutil.copytree(path.parent, folder)
        os.truncate(folder / "Data.fs", length)
        database = start(folder / "Data.fs")
        assert database.told() == told
        outcomes = database.engine.outcomes().committed
        assert list(outcomes) == [(b"settled", tid(1)), (b"two", tid(2)), (b"four", tid(5))]
        database.close()
        assert in_file(folder / "Data.fs") == told
        shutil.rmtree(folder)


@pytest.mark.parametrize("hole", [(0, 30), (16, 17), (60, 100), (-200, -100), (-8, None), (0, None)])
def test_a_hole_in_what_reached_the_file(path: Path, start: Start, hole: tuple[int, int | None]) -> None:
    base, told = crashed(path, start)
    content = bytearray(path.read_bytes())
    tail = content[base:]
    tail[slice(*hole)] = bytes(len(tail[slice(*hole)]))
    path.write_bytes(content[:base] + tail)
    database = start(path)
    assert database.told() == told
    database.close()
    assert in_stock_storage(path) == told


@pytest.mark.parametrize("lost", range(1, 9))
def test_a_torn_tid_is_not_taken_for_another_transaction(path: Path, start: Start, lost: int) -> None:
    """All else of the first transaction reached the disk."""
    database = start(path)
    database.store(A)
    told = database.told()
    database.kill()
    content = bytearray(path.read_bytes())
    content[4 : 4 + lost] = bytes(lost)
    path.write_bytes(content)
    database = start(path)
    assert database.told() == told


def test_what_is_cut_off_and_known_to_nobody_is_kept(
    path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    _, told = crashed(path, start)
    end = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"half a transaction")
    with caplog.at_level(logging.WARNING, "zeoid.server"):
        database = start(path)
    assert database.told() == told
    kept = Path(journal_directory(str(path))) / f"cut-off-{end}"
    assert kept.read_bytes() == b"half a transaction"
    messages = [each.getMessage() for each in caplog.records if each.name == "zeoid.server"]
    assert any(str(kept) in message for message in messages)
    assert any("4 transactions are written to it again" in message for message in messages)


def test_a_large_transaction_that_was_not_confirmed_is_not_there(path: Path, start: Start) -> None:
    """Also if all of it is in the file: nobody was told so, and the question for it was answered by no."""
    database = start(path)
    database.store(A, id=b"small")
    told = database.told()
    prepared = database.prepare(Store(B, NO_TID, record(b"x" * 4000)))

    def killed(place: Any) -> None:
        raise OSError("killed")

    database.appender._state = killed
    with pytest.raises(OSError, match="killed"):
        database.commit(prepared, ids=[b"large"])
    database.kill()
    assert len(in_file(path)) == 2
    database.reopen()
    assert database.told() == told
    assert list(database.engine.outcomes().committed) == [(b"small", tid(1))]
    assert database.data(B) is None
    database.store(B)
    database.restart()
    assert len(database.told()) == 2


def test_a_journal_whose_last_append_was_torn(path: Path, start: Start) -> None:
    _, told = crashed(path, start)
    (segment,) = Path(journal_directory(str(path))).glob("*.log")
    content = segment.read_bytes()
    end = contents_of(path).end.offset
    segment.write_bytes(content[: end - 10] + bytes(len(content) - end + 10))
    # The data file is behind the journal, always: it has not got what the journal has not.
    last = in_file(path)[-1]
    os.truncate(path, path.stat().st_size - 100)
    database = start(path)
    assert database.told() == told[:-1]
    assert database.engine.last_tid() < last[0]
    assert [id for id, _ in database.engine.outcomes().committed] == [b"settled", b"two"]
    assert list(Path(journal_directory(str(path))).glob("torn-*"))


def test_a_kill_while_nothing_was_under_way(path: Path, start: Start) -> None:
    database = start(path)
    for number in range(5):
        database.store(A, data=b"%d" % number)
        told = database.told()
        database.restart()
        assert database.told() == told


def test_files_of_the_journal_are_closed_when_it_can_not_be_written_again(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed(path, start)

    def fail(*given: object) -> None:
        raise OSError("broken")

    disk = Counting()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "truncate", lambda *given: None)
        patch.setattr("zeoid.engines.appending.Appender._reveal", fail)
        with pytest.raises(ConfigurationError, match="broken"):
            Database(path, disk)
    assert disk.opened == set()
    assert len(start(path).told()) == 5


# What is refused ----------------------------------------------------------------------------------------


def test_another_transaction_behind_a_crash(path: Path, start: Start) -> None:
    """A stock server was started after the crash: it cut off what was half written, and went on."""
    base, _ = crashed(path, start)
    os.truncate(path, base + 50)
    stock(path, b"theirs", first=100)
    message = refused(
        path, "was written to by another server after a crash", f"recover --trust-data-file {path}"
    )
    assert "4 transactions that only it has" in message
    aside = set_aside(str(path), Quick(), "aside")
    assert aside == f"{journal_directory(str(path))}.aside"
    database = start(path)
    assert [told[0] for told in database.told()] == [tid(1), tid(100)]
    assert contents_of(Path(f"{path}")).base.places[0].tid == tid(100)


def test_another_transaction_behind_ours(path: Path, start: Start) -> None:
    """The stock server found all of it whole."""
    crashed(path, start)
    stock(path, b"theirs", first=100)
    refused(path, "was written to by another server after a crash")


def test_another_transaction_behind_a_large_one_that_was_not_confirmed(path: Path, start: Start) -> None:
    database = start(path)
    database.store(A)
    database.engine.checkpoint()
    prepared = database.prepare(Store(B, NO_TID, record(b"x" * 4000)))
    database.appender._state = lambda place: (_ for _ in ()).throw(OSError("killed"))
    with pytest.raises(OSError, match="killed"):
        database.commit(prepared)
    database.kill()
    stock(path, b"theirs", first=100)
    refused(path, "was written to by another server after a crash")


@pytest.mark.parametrize("committed", [0, 1])
def test_a_back_up_that_was_restored(path: Path, start: Start, committed: int) -> None:
    database = start(path)
    database.store(A)
    database.close()
    back_up = path.read_bytes()
    database.reopen()
    database.store(A)
    database.engine.checkpoint()
    for _ in range(committed):
        database.store(A)
    database.kill()
    path.write_bytes(back_up)
    refused(path, "Was a back-up restored?", f"{committed} transactions that only it has", tid(2).hex())


def test_another_file_of_the_same_length(path: Path, start: Start) -> None:
    database = start(path)
    database.store(C)
    database.close()
    size = path.stat().st_size
    for file in path, Path(f"{path}.index"):
        file.unlink()
    stock(path, b"data", first=9)
    assert path.stat().st_size == size
    refused(path, "is not the file that its journal was written for")


def test_a_damaged_journal(path: Path, start: Start) -> None:
    crashed(path, start)
    (segment,) = Path(journal_directory(str(path))).glob("*.log")
    content = bytearray(segment.read_bytes())
    place = content.index(b"settled")
    content[place] ^= 1
    segment.write_bytes(content)
    refused(path, "damaged in segment 1", "--trust-data-file")
    with pytest.raises(JournalDamaged):
        Database(path)


def test_there_is_no_journal_to_set_aside(path: Path) -> None:
    assert set_aside(str(path), Quick(), "aside") is None


# A pack -------------------------------------------------------------------------------------------------


class Killed(Exception): ...


def packed(path: Path, start: Start, at: str) -> list[Told]:
    """The process is killed when a pack has come so far; some transactions later than the pack time."""
    database = start(path)
    database.write(Store(ROOT, NO_TID, record(b"root", A)), Store(A, NO_TID, record(b"one")))
    database.store(A, data=b"overwritten", id=b"two")
    database.store(A, data=b"three", id=b"three")
    database.store(A, data=b"four", id=b"four")
    told = database.told()
    copy = path.parent / "killed"

    def rename(source: StrPath, target: StrPath) -> None:
        if at == "before" or (at == "between" and str(target) == str(path)):
            shutil.copytree(path.parent, copy, ignore=shutil.ignore_patterns("*.lock"))
            raise Killed
        os.rename(source, target)

    def settle(self: Any) -> None:
        shutil.copytree(path.parent, copy, ignore=shutil.ignore_patterns("*.lock"))
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zeoid.engines.appending.Appender.settle_packed", settle)
        given = {**vars(os), "rename": rename}
        patch.setattr(sys.modules["ZODB.FileStorage.FileStorage"], "os", SimpleNamespace(**given))
        with pytest.raises(Killed):
            database.pack(3)
    database.kill()
    for file in path.parent.iterdir():
        if file != copy:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    for file in copy.iterdir():
        file.rename(path.parent / file.name)
    copy.rmdir()
    return told


def _without_status(told: list[Told]) -> list[Any]:
    """A pack changes it."""
    return [(each[0], *each[2:]) for each in told]


@pytest.mark.parametrize("at", ["before", "between", "after"])
@pytest.mark.parametrize("index", [True, False])
def test_a_pack_that_was_interrupted(path: Path, start: Start, at: str, index: bool) -> None:
    told = packed(path, start, at)
    assert path.exists() == (at != "between")
    if not index:
        Path(f"{path}.index").unlink(missing_ok=True)
    database = start(path)
    found = database.told()
    # The root is all that is left of the first transaction, and nothing is of the second one.
    first = (*told[0][:4], told[0][4][:1])
    left = told if at == "before" else [first, *told[2:]]
    assert _without_status(found) == _without_status(left)
    assert database.data(A) == record(b"four")
    outcomes = [(b"two", tid(2)), (b"three", tid(3)), (b"four", tid(4))]
    assert list(database.engine.outcomes().committed) == outcomes
    database.store(A)
    told = database.told()
    database.restart()
    assert database.told() == told
    database.pack(4)
    database.close()
    assert in_stock_storage(path)[-1] == told[-1]


def test_a_packed_file_of_another_pack_is_not_put_in_place(path: Path, start: Start) -> None:
    packed(path, start, "between")
    left = Path(f"{path}.pack")
    left.write_bytes(left.read_bytes()[:-1])
    refused(path, "does not exist", f"{path}.old", "a pack was interrupted")
    assert not path.exists()
    # The file from before the pack is one of the two that fit.
    Path(f"{path}.old").rename(path)
    assert len(start(path).told()) == 4


def test_a_data_file_that_is_gone(path: Path, start: Start) -> None:
    database = start(path)
    database.store(A)
    database.close()
    path.unlink()
    Path(f"{path}.pack").write_bytes(b"FS30")  # what an earlier pack left
    refused(path, "does not exist")


def test_what_a_stock_server_packed_is_refused(path: Path, start: Start) -> None:
    """Nothing tells it from another file."""
    database = start(path)
    for _ in range(3):
        database.store(ROOT)
    database.close()
    engine = StorageEngine(FileStorage(str(path)))
    engine.pack(4e9)
    engine.close()
    refused(path, "is not the file that its journal was written for", "--trust-data-file")
