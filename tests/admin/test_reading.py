"""Reading a storage from one end to the other: damage of every kind is an error, and says where it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import p64, u64

from tests.admin.databases import DAMAGES, HEADER_BYTES, Site, overwrite, positions, write_pages
from zeoid.admin.reading import Reading, Transaction
from zeoid.errors import ConfigurationError, CopyFailed


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A closed data file, with an index, of six transactions."""
    site = Site(tmp_path, blobs=False)
    write_pages(site, 5)
    site.close()
    return site


def read(path: Path) -> list[bytes]:
    """The tids that can be read; the storage is opened with the index that it had before it was damaged."""
    storage = FileStorage(str(path), read_only=True)
    tids = []
    try:
        with Reading(storage, "the source") as reading:
            for transaction in reading.transactions():
                list(transaction)
                tids.append(transaction.tid)
    except CopyFailed as problem:
        problem.add_note(f"{len(tids)} before it")
        raise
    finally:
        storage.close()
    return tids


def test_all_is_read(site: Site) -> None:
    assert len(read(site.path)) == 6


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_the_middle_is_an_error_that_says_where(site: Site, damage: str) -> None:
    """FileStorage by itself ends there, or in that transaction, without an error in most of these."""
    begin, end = positions(site.path)[3:5]
    before = read(site.path)[:3]
    overwrite(site.path, *DAMAGES[damage](begin, end))
    with pytest.raises(CopyFailed, match="the source") as caught:
        read(site.path)
    text = str(caught.value)
    assert "\n" not in text
    whole = int(caught.value.__notes__[0].split()[0])
    assert whole in (3, 4)
    tids = [before[-1].hex(), "in transaction"]
    assert any(tid in text for tid in tids), text


@pytest.mark.parametrize("transaction", [0, 5])
@pytest.mark.parametrize("rubbish", [b"\x55", b"\0"], ids=["rubbish", "zeros"])
def test_damage_that_hides_all_that_follows_is_not_taken_for_the_end(
    site: Site, rubbish: bytes, transaction: int
) -> None:
    """Without an index nothing else tells that there was more."""
    begin = positions(site.path)[transaction]
    overwrite(site.path, begin, rubbish * (site.path.stat().st_size - begin))
    site.path.with_name("site.fs.index").unlink()
    with pytest.raises(CopyFailed, match=f"is damaged .*: no transaction begins at {begin},") as caught:
        read(site.path)
    assert caught.value.__notes__ == [f"{transaction} before it"]


@pytest.mark.parametrize("written_bytes", [1, 20, HEADER_BYTES + 40, None])
def test_what_is_being_committed_is_no_damage(site: Site, written_bytes: int | None) -> None:
    """The file belongs to a running site."""
    begin = positions(site.path)[5]
    tids = read(site.path)
    overwrite(site.path, begin + 16, b"c")
    if written_bytes is not None:
        os.truncate(site.path, begin + written_bytes)
    assert read(site.path) == tids[:5]


@pytest.mark.parametrize("unfinished", [False, True], ids=["whole", "while it is written"])
def test_reading_from_a_tid_on(site: Site, unfinished: bool) -> None:
    """Also where ZODB can't find its way back from the end of the file."""
    tids = read(site.path)
    if unfinished:
        with site.path.open("ab") as file:
            file.write(p64(1 << 62) + p64(1000) + b"c" + bytes(100))
    storage = FileStorage(str(site.path), read_only=True)
    with Reading(storage, "the source") as reading:

        def found(start: bytes, stop: bytes | None = None) -> list[bytes]:
            return [transaction.tid for transaction in reading.transactions(start, stop)]

        for number, tid in enumerate(tids):
            assert found(tid) == tids[number:]
            assert found(p64(u64(tid) - 1)) == tids[number:]
            assert found(tid, tid) == [tid]
        assert found(p64(1)) == tids
        assert found(p64(u64(tids[2]) + 1), p64(u64(tids[3]) - 1)) == []
    storage.close()


def test_what_is_committed_while_it_is_opened_is_no_damage(site: Site) -> None:
    tids = read(site.path)
    whole = site.path.read_bytes()
    os.truncate(site.path, positions(site.path)[5])
    storage = FileStorage(str(site.path), read_only=True)
    site.path.write_bytes(whole)
    with Reading(storage, "the source") as reading:
        assert [transaction.tid for transaction in reading.transactions()] == tids[:5]
    storage.close()


def test_complaints_about_our_file_are_not_logged_and_others_are(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FileStorage(str(site.path), read_only=True)
    log = logging.getLogger("ZODB.FileStorage")
    with Reading(storage, "the source"):
        log.warning("%s is bad", site.path)
        log.warning("another.fs is bad")
    log.warning("%s is still bad", site.path)
    storage.close()
    assert [record.getMessage() for record in caplog.records] == [
        "another.fs is bad",
        f"{site.path} is still bad",
    ]


# Other storages ---------------------------------------------------------------------------------------


class Scripted:
    """A storage with these tids, that says that its last one is *last*."""

    def __init__(self, tids: list[int], last: int, problem: Exception | None = None) -> None:
        self.tids, self.last, self.problem = tids, last, problem
        self.closed = False

    def lastTransaction(self) -> bytes:
        return p64(self.last)

    def iterator(self, start: bytes | None, stop: bytes | None) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        for tid in self.tids:
            record = SimpleNamespace(oid=p64(1), tid=p64(tid), data=b"data", data_txn=None)
            yield _Scripted(p64(tid), [record])
        if self.problem is not None:
            raise self.problem

    def close(self) -> None:
        self.closed = True


class _Scripted(list[Any]):
    status, user, description, extension_bytes = " ", b"", b"", b""

    def __init__(self, tid: bytes, records: list[Any]) -> None:
        super().__init__(records)
        self.tid = tid


def tids_of(storage: Scripted) -> list[int]:
    found: list[Transaction] = list(Reading(storage, "the source").transactions())
    return [int.from_bytes(transaction.tid) for transaction in found]


def test_the_iterator_is_closed() -> None:
    storage = Scripted([1, 2], 2)
    assert tids_of(storage) == [1, 2]
    assert storage.closed


def test_a_storage_that_ends_early() -> None:
    with pytest.raises(CopyFailed, match=r"the source ends after transaction 0{15}2 .*its last .* 0{15}3 "):
        tids_of(Scripted([1, 2], 3))


def test_a_storage_that_has_nothing_of_what_it_tells() -> None:
    with pytest.raises(CopyFailed, match="ends before its first transaction"):
        tids_of(Scripted([], 3))


def test_tids_that_do_not_grow() -> None:
    with pytest.raises(CopyFailed, match=r"0{15}2 \(.*is not later, though after transaction 0{15}2 "):
        tids_of(Scripted([1, 2, 2, 3], 3))


def test_what_is_committed_meanwhile_is_not_read() -> None:
    assert tids_of(Scripted([1, 2, 3], 2)) == [1, 2]


def test_an_error_of_the_storage_is_told_on_one_line() -> None:
    with pytest.raises(CopyFailed, match=r"after transaction 0{15}2 \(.*: ValueError: no more$") as caught:
        tids_of(Scripted([1, 2], 3, ValueError("no\n  more")))
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_interrupt_is_not_made_an_error() -> None:
    class Interrupted(Scripted):
        def __iter__(self) -> Iterator[Any]:
            raise KeyboardInterrupt

    storage = Interrupted([1], 1)
    with pytest.raises(KeyboardInterrupt):
        tids_of(storage)
    assert storage.closed


def test_a_storage_without_an_iterator() -> None:
    with pytest.raises(ConfigurationError, match="no iterator"):
        Reading(object(), "the source")


def test_an_empty_storage() -> None:
    assert list(Reading(MappingStorage(), "the source").transactions()) == []
