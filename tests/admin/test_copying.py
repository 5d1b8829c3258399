"""Copying from storage to storage: everything is copied, and after any end it can be gone on with."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import p64, u64

import zeoid
from tests.admin.databases import (
    BLOB_BYTES,
    DAMAGES,
    Site,
    contents,
    contents_of_file,
    overwrite,
    positions,
    write_history,
    write_pages,
)
from zeoid.admin.copying import Copying, Stopped, Tally
from zeoid.admin.reading import Reading
from zeoid.errors import ConfigurationError, CopyFailed
from zeoid.model import NO_TID

Open = Callable[..., Any]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens FileStorages, which are closed at the end, unless the test has closed them."""
    with contextlib.ExitStack() as stack:

        def open_file(path: Path, *, blobs: bool = True, read_only: bool = False) -> Any:
            directory = str(path.with_name(f"{path.stem}-blobs")) if blobs else None
            storage = FileStorage(str(path), read_only=read_only, blob_dir=directory)
            stack.callback(storage.close)
            return storage

        yield open_file


@pytest.fixture
def source(tmp_path: Path, opened: Open) -> Iterator[Reading]:
    """A database with everything in it."""
    site = Site(tmp_path)
    write_history(site)
    site.close()
    with Reading(opened(site.path, read_only=True), "the source") as reading:
        yield reading


def reading_of_pages(folder: Path, opened: Open, count: int = 5) -> tuple[Reading, list[bytes]]:
    site = Site(folder, "pages", blobs=False)
    tids = write_pages(site, count)
    site.close()
    return Reading(opened(site.path, blobs=False, read_only=True), "the source"), tids


def go_on(tally: Tally) -> None:
    pass


def copied(source: Reading, destination: Any, tick: Any = go_on, **options: Any) -> Tally:
    copying = Copying(source, destination, "the destination", tick, **options)
    copying.prepare()
    copying.run()
    return copying.tally


def test_everything_is_copied(source: Reading, opened: Open, tmp_path: Path) -> None:
    destination = opened(tmp_path / "copy.fs")
    tally = copied(source, destination)
    expected = contents(source.storage)
    assert contents(destination) == expected
    records = [record for *_, of in expected for record in of.values()]
    assert any(data is None for data, _ in records)
    assert sum(blob is not None for _, blob in records) == tally.blobs == 4
    assert {status for _, status, *_ in expected} == {" ", "p"}
    assert (tally.transactions, tally.records) == (len(expected), len(records))
    assert tally.last_tid == source.last_tid
    assert tally.share == 1
    assert tally.size_bytes > BLOB_BYTES
    destination.close()
    # Also where undone data points back to: the file is the same to the byte.
    assert (tmp_path / "copy.fs").read_bytes() == (tmp_path / "site.fs").read_bytes()


def test_no_oid_of_the_copy_is_handed_out_again(source: Reading, opened: Open, tmp_path: Path) -> None:
    destination = opened(tmp_path / "copy.fs")
    copied(source, destination)
    highest = max(record.oid for of in source.storage.iterator() for record in of)
    assert destination.new_oid() > highest


def test_an_empty_source_makes_an_empty_destination(opened: Open, tmp_path: Path) -> None:
    tally = copied(Reading(opened(tmp_path / "a.fs"), "a"), opened(tmp_path / "b.fs"))
    assert (tally.transactions, tally.last_tid, tally.share) == (0, NO_TID, 1)


# Any end ----------------------------------------------------------------------------------------------


def stop_at(call: int) -> tuple[Callable[[Tally], None], list[int]]:
    """A tick that stops the work when it is called for the *call*th time, and how often it was called."""
    calls: list[int] = []

    def tick(tally: Tally) -> None:
        calls.append(len(calls))
        if len(calls) == call:
            raise Stopped

    return tick, calls


def test_a_copy_can_be_stopped_anywhere_and_gone_on_with(
    source: Reading, opened: Open, tmp_path: Path
) -> None:
    """At every record, and within every blob: what is there is the beginning of the source, in whole."""
    expected = contents(source.storage)
    tick, calls = stop_at(0)
    copied(source, opened(tmp_path / "whole.fs"), tick)
    seen = set()
    for point in range(1, len(calls)):  # the last call comes when all is done
        path = tmp_path / f"{point}.fs"
        destination = opened(path)
        copying = Copying(source, destination, "the destination", stop_at(point)[0])
        copying.prepare()
        with pytest.raises(Stopped):
            copying.run()
        assert list(Path(destination.temporaryDirectory()).iterdir()) == []
        destination.close()
        there = contents_of_file(path, path.with_name(f"{point}-blobs"))
        assert there == expected[: len(there)]
        assert len(there) == copying.tally.transactions
        assert copying.tally.last_tid.hex() == (there[-1][0] if there else NO_TID.hex())
        seen.add(len(there))
        destination = opened(path)
        tally = copied(source, destination)
        assert tally.transactions == len(expected) - len(there)
        assert contents(destination) == expected
        destination.close()
        assert path.read_bytes() == (tmp_path / "site.fs").read_bytes()
    assert seen == set(range(len(expected)))
    assert len(calls) > sum(len(of[5]) for of in expected) + 1  # blobs have points of their own


def test_what_came_since_is_copied_by_a_second_run(opened: Open, tmp_path: Path) -> None:
    site = Site(tmp_path)
    write_history(site)
    destination = opened(tmp_path / "copy.fs")
    with Reading(site.storage, "the source") as source:
        copied(source, destination)
        later = write_pages(site, 3)
        # What is committed while it runs is for the next run.
        assert copied(source, destination).transactions == 0
    with Reading(site.storage, "the source") as source:
        assert copied(source, destination).transactions == len(later)
    assert contents(destination) == contents(site.storage)
    site.close()


def test_an_interrupt_aborts_the_transaction(opened: Open, tmp_path: Path) -> None:
    source, tids = reading_of_pages(tmp_path, opened)
    destination = opened(tmp_path / "copy.fs")

    def tick(tally: Tally) -> None:
        if tally.transactions == 3:
            raise KeyboardInterrupt

    copying = Copying(source, destination, "the destination", tick)
    copying.prepare()
    with pytest.raises(KeyboardInterrupt):
        copying.run()
    assert destination.tpc_transaction() is None
    assert copied(source, destination).transactions == len(tids) + 1 - 3  # the database's own first one
    assert contents(destination) == contents(source.storage)


@pytest.mark.parametrize("method", ["tpc_begin", "restore", "tpc_vote", "tpc_finish", "restoreBlob"])
def test_a_destination_that_fails(
    source: Reading, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It is told with the transaction, and what is whole stays."""
    destination = opened(tmp_path / "copy.fs")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def tick(tally: Tally) -> None:
        if tally.transactions == 8:
            monkeypatch.setattr(destination, method, fail)

    copying = Copying(source, destination, "the destination", tick)
    copying.prepare()
    with pytest.raises(CopyFailed) as caught:
        copying.run()
    expected = contents(source.storage)
    failed = copying.tally.transactions
    assert 8 <= failed < len(expected)
    assert str(caught.value).startswith(f"the destination failed at transaction {expected[failed][0]} (20")
    assert str(caught.value).endswith("UTC): OSError: [Errno 28] No space left on device")
    monkeypatch.undo()
    assert contents(destination) == expected[:failed]
    copied(source, destination)
    assert contents(destination) == expected


def test_somebody_else_who_writes_to_the_destination(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left would come out of order, which not every storage refuses."""
    source, _ = reading_of_pages(tmp_path, opened)
    finished: list[bytes] = []
    with zeoid.serve(tmp_path / "served.fs") as server, contextlib.ExitStack() as stack:
        destination, other = (zeoid.ClientStorage(server.address) for _ in range(2))
        stack.callback(destination.close)
        stack.callback(other.close)
        finish = destination.tpc_finish

        def finish_before_another(meta: Any) -> None:
            finished.append(finish(meta))
            if len(finished) == 3:
                meta = TransactionMetaData()
                other.tpc_begin(meta)
                other.store(p64(1000), NO_TID, b"data", "", meta)
                other.tpc_vote(meta)
                finished.append(other.tpc_finish(meta))
                destination.ping()

        monkeypatch.setattr(destination, "tpc_finish", finish_before_another)
        with pytest.raises(CopyFailed, match="somebody else writes to the destination") as caught:
            copied(source, destination)
        assert f": it has transaction {finished[-1].hex()} (" in str(caught.value)
        assert [tid for tid, *_ in contents(other)] == [tid.hex() for tid in finished]


def test_damage_at_the_end_is_told_by_every_run(opened: Open, tmp_path: Path) -> None:
    """Also when there is nothing left to copy."""
    site = Site(tmp_path, "pages", blobs=False)
    write_pages(site, 3)
    site.close()
    with site.path.open("ab") as file:
        file.write(b"\x55" * 1000)
    source = Reading(opened(site.path, blobs=False, read_only=True), "the source")
    destination = opened(tmp_path / "copy.fs", blobs=False)
    for _ in range(2):
        with pytest.raises(CopyFailed, match="the source is damaged after transaction"):
            copied(source, destination)
        assert len(contents(destination)) == 4


def test_the_place_to_go_on_from_must_be_found_again(opened: Open, tmp_path: Path) -> None:
    source, tids = reading_of_pages(tmp_path, opened)
    copying = Copying(source, opened(tmp_path / "copy.fs"), "the destination", go_on)
    copying.tally.last_tid = p64(u64(tids[2]) + 1)
    with pytest.raises(CopyFailed, match="isn't found again"):
        copying.run()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("damaged", [2, 3, 4])
def test_a_copy_does_not_go_on_behind_the_damage(
    opened: Open, tmp_path: Path, damage: str, damaged: int
) -> None:
    """In the last transaction that was copied, the next one, or the one after that."""
    source, _ = reading_of_pages(tmp_path, opened)
    path = tmp_path / "pages.fs"
    expected = contents(source.storage)
    destination = opened(tmp_path / "copy.fs", blobs=False)

    def tick(tally: Tally) -> None:
        if tally.transactions == 3:
            raise Stopped

    with pytest.raises(Stopped):
        copied(source, destination, tick)
    begin, end = positions(path)[damaged : damaged + 2]
    overwrite(path, *DAMAGES[damage](begin, end))
    with Reading(source.storage, "the source") as source, pytest.raises((CopyFailed, ConfigurationError)):
        copied(source, destination)
    there = contents(destination)
    assert there == expected[: len(there)]
    assert len(there) in {2: [3], 3: [3, 4], 4: [3, 4, 5]}[damaged]


class Unreadable(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError(5, "Input/output error")


def test_a_blob_that_cannot_be_read_is_the_sources_fault(
    source: Reading, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.storage, "openCommittedBlobFile", lambda oid, tid: Unreadable())
    with pytest.raises(CopyFailed, match=r"^the source: the blob of object .* can't be read: OSError: "):
        copied(source, opened(tmp_path / "copy.fs"))


# What is refused --------------------------------------------------------------------------------------


def refusal(source: Reading, destination: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        copied(source, destination)
    return str(caught.value)


def test_a_destination_that_cannot_restore(source: Reading) -> None:
    destination = MappingStorage()
    assert "can't store transactions as they were" in refusal(source, destination)
    assert destination.lastTransaction() == NO_TID


def test_a_demo_storage_cannot_restore(source: Reading) -> None:
    assert "can't store transactions as they were" in refusal(source, DemoStorage())


def test_a_destination_that_is_read_only(source: Reading, opened: Open, tmp_path: Path) -> None:
    opened(tmp_path / "copy.fs").close()
    assert "read-only" in refusal(source, opened(tmp_path / "copy.fs", read_only=True))


def test_a_destination_with_another_database(source: Reading, opened: Open, tmp_path: Path) -> None:
    other = Site(tmp_path, "other")
    first = other.storage.lastTransaction()
    write_pages(other, 2)
    there = contents(other.storage)
    text = refusal(source, other.storage)
    assert text.startswith("the destination is neither empty nor the beginning of the source: ")
    # It was made after the source.
    assert "is later than the source's" in text
    assert contents(other.storage) == there
    other.close()
    assert first


def test_a_destination_with_an_older_database(opened: Open, tmp_path: Path) -> None:
    other = Site(tmp_path, "other")
    first = other.storage.lastTransaction()
    source, _ = reading_of_pages(tmp_path, opened)
    assert f"its first transaction, {first.hex()} (" in refusal(source, other.storage)
    other.close()


def test_a_destination_that_went_its_own_way(opened: Open, tmp_path: Path) -> None:
    """It was a copy, and then somebody used it."""
    source, tids = reading_of_pages(tmp_path, opened)
    destination = opened(tmp_path / "copy.fs", blobs=False)
    tick, _ = stop_at(5)
    with pytest.raises(Stopped):
        copied(source, destination, tick)
    meta = TransactionMetaData()
    own = p64(u64(destination.lastTransaction()) + 1)
    destination.tpc_begin(meta, own)
    destination.tpc_vote(meta)
    destination.tpc_finish(meta)
    assert own not in tids
    assert f"its last transaction, {own.hex()} (" in refusal(source, destination)
    assert "is not in the source" in refusal(source, destination)


def test_a_destination_whose_last_transaction_is_another_of_this_tid(opened: Open, tmp_path: Path) -> None:
    source, tids = reading_of_pages(tmp_path, opened)
    destination = opened(tmp_path / "copy.fs", blobs=False)
    tick, _ = stop_at(5)
    with pytest.raises(Stopped):
        copied(source, destination, tick)
    last = destination.lastTransaction()
    next_tid = tids[tids.index(last) + 1]
    meta = TransactionMetaData()
    destination.tpc_begin(meta, next_tid)
    destination.tpc_vote(meta)
    destination.tpc_finish(meta)
    text = refusal(source, destination)
    assert f"its last transaction, {next_tid.hex()} (" in text
    assert "is not the source's: its user is" in text


# Blobs ------------------------------------------------------------------------------------------------


def test_a_destination_without_blobs_is_told_of_the_first_one(
    source: Reading, opened: Open, tmp_path: Path
) -> None:
    destination = opened(tmp_path / "copy.fs", blobs=False)
    with pytest.raises(CopyFailed, match="is a blob, and the destination can't take it"):
        copied(source, destination)
    there = contents(destination)
    assert 0 < len(there) < len(contents(source.storage))


def test_a_source_without_its_blobs(source: Reading, opened: Open, tmp_path: Path) -> None:
    without = Reading(opened(tmp_path / "site.fs", blobs=False, read_only=True), "the source")
    with pytest.raises(CopyFailed, match="is a blob, and the source was opened without a blob directory"):
        copied(without, opened(tmp_path / "copy.fs"))


def lose_a_blob(source: Reading) -> str:
    """Remove the file of the first blob; its record's oid and tid."""
    (record, *_) = [
        record
        for of in source.storage.iterator()
        for record in of
        if record.data is not None and b"ZODB.blob" in record.data and record.oid != NO_TID
    ]
    Path(source.storage.loadBlob(record.oid, record.tid)).unlink()
    return f"the blob of object {record.oid.hex()} in transaction {record.tid.hex()}"


def test_a_blob_that_is_missing(source: Reading, opened: Open, tmp_path: Path) -> None:
    lost = lose_a_blob(source)
    with pytest.raises(CopyFailed) as caught:
        copied(source, opened(tmp_path / "copy.fs"))
    assert str(caught.value).startswith(f"the source: {lost} (20")
    assert "is missing; if it is lost, --allow-missing-blobs" in str(caught.value)


def test_a_blob_that_may_be_missing(source: Reading, opened: Open, tmp_path: Path) -> None:
    lost = lose_a_blob(source)
    destination = opened(tmp_path / "copy.fs")
    tally = copied(source, destination, allow_missing_blobs=True)
    assert (tally.blobs, tally.missing_blobs) == (3, 1)
    assert [what.partition(" (")[0] for what in tally.missing] == [lost]
    destination.close()
    assert (tmp_path / "copy.fs").read_bytes() == (tmp_path / "site.fs").read_bytes()
