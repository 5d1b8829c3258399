"""Comparing two storages, transaction by transaction.

Owns what it means that two transactions are equal: the same tid, status, user, description and extension, and
for every object the same data and blob. Where the data is kept once and pointed back to, the order of the
records, and how an extension is pickled belong to a storage, not to the transaction. Must not know which one
was copied.

A storage without history has lost who wrote a transaction, and every revision but the newest of each object;
so much is compared, and that each object's newest revision is the same. Memory is bounded by the number of
records of one transaction.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from zeoid.admin.reading import Reading, Transaction, is_blob, shown
from zeoid.errors import CopyFailed
from zeoid.model import frozen

#: Called again and again; what it raises ends the comparison.
Tick = Callable[[], None]


@frozen
class Summary:
    """All of a transaction, with a digest in the place of each record."""

    transaction: Transaction
    #: By oid; None for an object that is deleted, or whose creation was undone. The last record of each
    #: object counts: undoing twice in one transaction makes two.
    records: dict[bytes, bytes | None]


def summary(reading: Reading, transaction: Transaction, tick: Tick) -> Summary:
    """Read *transaction* of *reading* to its end."""
    records: dict[bytes, bytes | None] = {}
    for record in transaction:
        records[record.oid] = None if record.data is None else _digest(reading, record, tick)
        tick()
    return Summary(transaction, records)


def _digest(reading: Reading, record: Any, tick: Tick) -> bytes:
    digest = hashlib.blake2b(record.data, digest_size=16)
    if is_blob(record):
        with reading.blob(record) as pieces:
            digest.update(b"no file" if pieces is None else b"file")
            for piece in pieces or ():
                digest.update(piece)
                tick()
    return digest.digest()


def difference(source: Summary, destination: Summary, *, whole: bool) -> str:
    """What differs between two transactions of one tid; empty if nothing does.

    *whole*: both storages keep history; if not, only records that both have are compared.
    """
    if whole and (what := _metadata_difference(source.transaction, destination.transaction)):
        return what
    for oid, digest in source.records.items():
        if oid not in destination.records:
            if whole:
                return f"object {oid.hex()} is missing in the destination"
        elif digest != destination.records[oid]:
            return f"object {oid.hex()} differs"
    extra = next((oid for oid in destination.records if oid not in source.records), None)
    return "" if extra is None else f"object {extra.hex()} is in the destination only"


def _metadata_difference(ours: Transaction, theirs: Transaction) -> str:
    for name, a, b in (
        ("status", ours.status, theirs.status),
        ("user", ours.meta.user, theirs.meta.user),
        ("description", ours.meta.description, theirs.meta.description),
    ):
        if a != b:
            return f"its {name} is {a!r} in the source and {b!r} in the destination"
    if ours.meta.extension_bytes != theirs.meta.extension_bytes and _extension(ours) != _extension(theirs):
        return "its extension differs"
    return ""


def _extension(transaction: Transaction) -> Any:
    try:
        return _plain(transaction.meta.extension)
    except Exception:  # pickled with classes that are not here: then only its bytes can be equal
        return transaction.meta.extension_bytes


def _plain(value: Any) -> Any:
    """The coding M5 knows one kind of list, which it reads as tuples."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def differences(source: Reading, destination: Reading, last: bytes, tick: Tick) -> Iterator[str | None]:
    """Compare all transactions up to *last*: for each one None if it is equal, or what differs.

    CopyFailed if one of the two can't be read.
    """
    whole = source.keeps_history and destination.keeps_history
    theirs = destination.transactions()
    other = next(theirs, None)
    for transaction in source.transactions(stop=last):
        while other is not None and other.tid < transaction.tid:
            yield f"transaction {shown(other.tid)} is in the destination only"
            other = next(theirs, None)
        ours = summary(source, transaction, tick)
        if other is None or other.tid != transaction.tid:
            what = "it is missing in the destination" if whole else ""
            there = Summary(transaction, {})
        else:
            there = summary(destination, other, tick)
            what = difference(ours, there, whole=whole)
            other = next(theirs, None)
        if not what and not destination.keeps_history:
            what = _not_superseded(source, destination, ours, there)
        yield f"transaction {shown(transaction.tid)}: {what}" if what else None
    while other is not None:
        yield f"transaction {shown(other.tid)} is in the destination only"
        other = next(theirs, None)


def _not_superseded(source: Reading, destination: Reading, ours: Summary, theirs: Summary) -> str:
    """What a destination without history lost though nothing newer took its place; empty if nothing."""
    for oid in ours.records:
        if oid not in theirs.records and source.current_tid(oid) != destination.current_tid(oid):
            return f"object {oid.hex()} is missing in the destination"
    return ""


def check_prefix(source: Reading, destination: Reading, tick: Tick) -> str:
    """Why the *destination*, which is not empty, can't be what an interrupted copy left; empty if it can be.

    Its last transaction is compared, and its first one where both keep history.
    """
    last = destination.last_tid
    if last > source.last_tid:
        return f"its last transaction, {shown(last)}, is later than the source's, {shown(source.last_tid)}"
    whole = source.keeps_history and destination.keeps_history
    for which, tid in (("first", _first_tid(destination) if whole else last), ("last", last)):
        ours = _summary_at(source, tid, tick)
        if ours is None:
            return f"its {which} transaction, {shown(tid)}, is not in the source"
        theirs = _summary_at(destination, tid, tick)
        if theirs is None:
            raise CopyFailed(f"{destination.name} tells of transaction {shown(tid)}, but does not have it")
        what = difference(ours, theirs, whole=whole)
        if what:
            return f"its {which} transaction, {shown(tid)}, is not the source's: {what}"
    return ""


def _summary_at(reading: Reading, tid: bytes, tick: Tick) -> Summary | None:
    with contextlib.closing(reading.transactions(tid, tid)) as found:
        transaction = next(found, None)
        return None if transaction is None else summary(reading, transaction, tick)


def _first_tid(reading: Reading) -> bytes:
    with contextlib.closing(reading.transactions()) as found:
        return next(found).tid
