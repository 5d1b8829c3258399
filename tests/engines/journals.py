"""Journals for tests: entries in few words, and a plain model of what a journal should say after them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zeoid.engines.disk import Disk, StrPath
from zeoid.engines.journal import (
    Base,
    Batch,
    Contents,
    Direct,
    Entry,
    Journal,
    LoggedTransaction,
    OidMark,
    Place,
    Record,
)

NAME = bytes(range(16))
#: Small, so that a few entries fill one; what is remembered takes little of it.
SEGMENT_BYTES = 2048
REMEMBERED = 5


class Quick(Disk):
    """A disk that leaves syncing to others: for tests in which no power is cut."""

    def sync(self, fd: int) -> None: ...

    def sync_directory(self, path: StrPath) -> None: ...

    def sync_all(self, path: StrPath) -> None: ...


def tid(number: int) -> bytes:
    return number.to_bytes(8, "big")


def transaction(number: int, *sizes: int, id: bytes | None = None) -> LoggedTransaction:
    """The transaction *number*, with a record of each size."""
    records = tuple(Record(tid(index), bytes([number % 256]) * size) for index, size in enumerate(sizes, 1))
    made = b"id-%d" % number if id is None else id
    return LoggedTransaction(tid(number), made, b"someone", b"\xc3\xa4", b"", " ", records)


def batch(*numbers: int, size: int = 100) -> Batch:
    return Batch(tuple(transaction(number, size) for number in numbers))


def base(number: int, *more: int) -> Base:
    """As if each transaction took 1000 bytes of the data file."""
    return Base(tuple(Place(1000 * each, tid(each)) for each in (number, *more)))


def direct(number: int) -> Direct:
    return Direct(tid(number), b"id-%d" % number, 1000 * (number - 1), 1000)


def mark(number: int) -> OidMark:
    return OidMark(tid(number))


START = base(0)


def create(directory: Path, disk: Disk | None = None, **options: Any) -> Journal:
    given: dict[str, Any] = {
        "last_tid": tid(0), "oid_mark": tid(0), "floor": tid(0), "name": NAME,
        "segment_bytes": SEGMENT_BYTES, "remembered": REMEMBERED,
    }  # fmt: skip
    return Journal.create(directory, disk or Quick(), START, **{**given, **options})


def read(directory: Path, disk: Disk | None = None) -> Contents | None:
    return Journal.read(directory, disk or Quick(), remembered=REMEMBERED)


def reopen(directory: Path, disk: Disk | None = None) -> Journal:
    disk = disk or Quick()
    contents = read(directory, disk)
    assert contents is not None
    return Journal.open(directory, disk, contents, segment_bytes=SEGMENT_BYTES, remembered=REMEMBERED)


@dataclass
class Told:
    """What a journal says."""

    base: Base
    entries: list[Entry] = field(default_factory=list)
    outcomes: list[tuple[bytes, bytes]] = field(default_factory=list)
    floor: bytes = tid(0)
    oid_mark: bytes = tid(0)
    last_tid: bytes = tid(0)


def told(contents: Contents | None) -> Told:
    assert contents is not None
    return Told(
        contents.base,
        list(contents.entries),
        contents.outcomes,
        contents.floor,
        contents.oid_mark,
        contents.last_tid,
    )


def expected(entries: Iterable[Entry], remembered: int = REMEMBERED) -> Told:
    """What it should say after *entries*, worked out without any of its code."""
    entries = list(entries)
    bases = [index for index, entry in enumerate(entries) if isinstance(entry, Base)]
    committed: list[tuple[bytes, bytes]] = []
    announced: list[Direct] = []
    for entry in entries:
        if isinstance(entry, Batch):
            committed += [(each.id, each.tid) for each in entry.transactions]
        elif isinstance(entry, Direct):
            announced.append(entry)
        elif isinstance(entry, Base):
            reached = {place.tid for place in entry.places}
            committed += [(each.id, each.tid) for each in announced if each.tid in reached]
        if isinstance(entry, Batch | Base):  # whatever was announced before is settled
            announced.clear()
    ids = [pair for pair in committed if pair[0]]
    forgotten = ids[:-remembered] if len(ids) > remembered else []
    return Told(
        entries[bases[-1]] if bases else START,  # type: ignore[arg-type]
        entries[bases[-1] + 1 :] if bases else entries,
        ids[len(forgotten) :],
        max((each for _, each in forgotten), default=tid(0)),
        max((entry.oid for entry in entries if isinstance(entry, OidMark)), default=tid(0)),
        max([tid(0), *(each for _, each in committed), *_based(entries)]),
    )


def _based(entries: Sequence[Entry]) -> list[bytes]:
    return [place.tid for entry in entries if isinstance(entry, Base) for place in entry.places]
