"""A commit journal as text for people: every segment, every record, and what is wrong with them.

Owns the wording. Never raises for what it finds, and shows names that came from clients escaped.
"""

import os
from collections.abc import Iterator

from persistent.TimeStamp import TimeStamp

from zeoid.engines.disk import Disk, StrPath
from zeoid.engines.journal_format import (
    HEADER_BYTES,
    Base,
    Batch,
    Direct,
    Entry,
    Framed,
    Head,
    LoggedTransaction,
    Malformed,
    OidMark,
    entry_of,
    header_of,
    records_after,
)
from zeoid.engines.journal_reading import Scan, read, scan, segment_numbers, segment_path
from zeoid.errors import ConfigurationError


def dump(directory: StrPath, disk: Disk) -> Iterator[str]:
    """Lines of text that tell what is in the journal in *directory*, sound or damaged."""
    numbers = segment_numbers(directory, disk)
    if not numbers:
        yield "no journal"
    for number in numbers:
        yield from _segment(_content(directory, disk, number), number)
    try:
        contents = read(directory, disk)
    except ConfigurationError as problem:
        yield f"can't be used: {problem}"
        return
    if contents is None:
        return
    tail = contents.tail
    if tail is not None:
        yield f"interrupted append: {tail.size:,} bytes at byte {tail.offset} of segment {tail.segment}"
    yield (
        f"sound: {len(contents.entries)} entries after the newest base, last tid {_tid(contents.last_tid)}, "
        f"{len(contents.outcomes)} outcomes"
    )


def _content(directory: StrPath, disk: Disk, number: int) -> bytes:
    file = disk.open(segment_path(os.fspath(directory), number), read_only=True)
    try:
        return disk.pread(file, disk.size(file), 0)
    finally:
        disk.close(file)


def _segment(data: bytes, number: int) -> Iterator[str]:
    try:
        header = header_of(data, number)
    except ConfigurationError as problem:
        yield f"segment {number}: {problem}"
        return
    if header is None:
        yield f"segment {number}: {len(data):,} bytes, not begun (or its header is damaged)"
        return
    yield (
        f"segment {number}: {len(data):,} bytes, journal {header.name.hex()}, "
        f"from record {header.first_sequence}"
    )
    found = scan(data, header)
    for record in found.records:
        yield from _record(record)
    yield from _beyond(found)


def _beyond(found: Scan) -> Iterator[str]:
    """What looks like records of this segment behind the last one that is in order."""
    for offset, record in records_after(found.data, found.end, found.mark):
        if record is None:
            yield f"  {offset:>10} a record that is not whole"
        else:
            yield f"  {offset:>10} out of order:"
            yield from _record(record)
    if found.end == HEADER_BYTES:
        yield f"  {found.end:>10} no head"


def _record(record: Framed) -> Iterator[str]:
    where = f"  {record.offset:>10} record {record.sequence}"
    if record.before:
        where += f" (with {record.append})"
    try:
        entry = entry_of(record.payload)
    except Malformed as problem:
        yield f"{where} unreadable, {len(record.payload):,} bytes: {problem}"
        return
    yield f"{where} {_described(entry)}, {len(record.payload):,} bytes"
    if isinstance(entry, Batch):
        for transaction in entry.transactions:
            size = sum(len(each.data or b"") for each in transaction.records)
            yield (
                f"{'':14}{_tid(transaction.tid)} id {transaction.id.hex() or 'none'} "
                f"user {_text(transaction.user)} {_text(transaction.description)} "
                f"status {transaction.status!r}: {len(transaction.records)} objects, {size:,} bytes"
                f"{_blobs(transaction)}"
            )


def _described(entry: Entry | Head) -> str:
    if isinstance(entry, Batch):
        return f"batch of {len(entry.transactions)} transactions"
    if isinstance(entry, Base):
        return f"base: the data file is durable up to {_places(entry)}"
    if isinstance(entry, OidMark):
        return f"oid mark {entry.oid.hex()}"
    if isinstance(entry, Direct):
        return (
            f"direct {_tid(entry.tid)} id {entry.id.hex() or 'none'}: "
            f"{entry.length:,} bytes at byte {entry.position} of the data file{_blobs(entry)}"
        )
    return (
        f"head: {len(entry.outcomes)} outcomes after {_tid(entry.floor)}, oid mark {entry.oid_mark.hex()}, "
        f"last tid {_tid(entry.last_tid)}, {len(entry.undecided)} undecided, "
        f"base (record {entry.base_sequence}) {_places(entry.base)}"
    )


def _blobs(owner: LoggedTransaction | Direct) -> str:
    return f", {len(owner.blobs)} blobs" if owner.blobs else ""


def _places(base: Base) -> str:
    return " or ".join(f"{place.length:,} bytes with {_tid(place.tid)}" for place in base.places)


def _tid(tid: bytes) -> str:
    return f"{tid.hex()} ({TimeStamp(tid)} UTC)"


def _text(value: bytes) -> str:
    return ascii(value.decode("utf-8", "replace"))
