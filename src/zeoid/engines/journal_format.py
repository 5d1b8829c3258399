"""The bytes of the commit journal: headers of segments, records, and what is in them.

Owns layouts only, as docs/journal.md describes them: knows no file and no order of events. What is read here
may come from a disk that lost or mangled it, so nothing is believed before its checksum is right.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from struct import Struct
from typing import Any, Final

import msgpack

from zeoid.errors import ConfigurationError
from zeoid.model import frozen

MAGIC: Final = b"ZeoidLog"
#: What is written. Segments of the first version are read, too: their transactions have no blobs.
VERSION: Final = 2
#: magic, version, name of the journal, number of the segment, sequence number of its first record
_HEADER: Final = Struct(">8sI16sQQ")
_CHECKSUM: Final = Struct(">I")
HEADER_BYTES: Final = _HEADER.size + _CHECKSUM.size
#: marker, length of the payload, sequence number, records of the same append that come before this one
_PREFIX: Final = Struct(">4sIQI")
#: What a record takes besides its payload.
RECORD_BYTES: Final = _PREFIX.size + _CHECKSUM.size
PAYLOAD_LIMIT_BYTES: Final = 2**32 - 1
BLOB_NAME_BYTES: Final = 16
#: What a blob takes in a record.
BLOB_BYTES: Final = 1 + 2 + 8 + 2 + BLOB_NAME_BYTES

# What is remembered ------------------------------------------------------------------------------------


@frozen
class Record:
    """One object's new state. *data* None: it ceases to be. *same_as*: an earlier tid with the same data."""

    oid: bytes
    data: bytes | None
    same_as: bytes | None = None


@frozen
class LoggedBlob:
    """A transaction's record of *oid* has a blob, which is a file staged under *name* (16 bytes)."""

    oid: bytes
    name: bytes


@frozen
class LoggedTransaction:
    """One committed transaction. *id* was made by its client, and is empty if that made none; *extension* is
    as the data file will hold it; *status* is one character; *blobs* are those of its records."""

    tid: bytes
    id: bytes
    user: bytes
    description: bytes
    extension: bytes
    status: str
    records: tuple[Record, ...]
    blobs: tuple[LoggedBlob, ...] = ()


@frozen
class Batch:
    """Transactions that became durable together, in the order of their tids."""

    transactions: tuple[LoggedTransaction, ...]


@frozen
class Place:
    """A data file that is durable up to *length*, where its last transaction is *tid*."""

    length: int
    tid: bytes


@frozen
class Base:
    """What came before is durable in the data file, which is at one of these places.

    There is more than one while a pack replaces the file.
    """

    places: tuple[Place, ...]


@frozen
class OidMark:
    """Oids up to this one may have been handed out."""

    oid: bytes


@frozen
class Direct:
    """A large transaction is about to be written to the data file itself, *length* bytes at *position*.

    It is committed only if a later Base has a place with its tid.
    """

    tid: bytes
    id: bytes
    position: int
    length: int
    blobs: tuple[LoggedBlob, ...] = ()


@frozen
class Head:
    """The first record of a segment: what the segments before it would tell, so that they can be recycled.

    *outcomes* are (client-made id, tid) of committed transactions, oldest first; after *floor* every one is
    known. *base* is the newest one, stated by the record *base_sequence*. *undecided* are large transactions
    that no Base has confirmed yet.
    """

    outcomes: tuple[tuple[bytes, bytes], ...]
    floor: bytes
    oid_mark: bytes
    last_tid: bytes
    base_sequence: int
    base: Base
    undecided: tuple[Direct, ...]


Entry = Batch | Base | OidMark | Direct

# Payloads ----------------------------------------------------------------------------------------------


class Malformed(Exception):
    """A payload that no Zeoid of this version has written."""


def payload_of(entry: Entry | Head) -> list[Any]:
    """What msgpack is to pack for *entry*. ValueError for what could not be read again."""
    if isinstance(entry, Batch):
        return ["batch", list(map(_packed_transaction, entry.transactions))]
    if isinstance(entry, Base):
        if not entry.places:
            raise ValueError("a base needs a place")
        return ["base", _packed_places(entry)]
    if isinstance(entry, OidMark):
        _check(entry.oid)
        return ["oid-mark", entry.oid]
    if isinstance(entry, Direct):
        return ["direct", *_packed_direct(entry)]
    return [
        "head",
        entry.outcomes,
        entry.floor,
        entry.oid_mark,
        entry.last_tid,
        entry.base_sequence,
        _packed_places(entry.base),
        [_packed_direct(direct) for direct in entry.undecided],
    ]


def _packed_transaction(transaction: LoggedTransaction) -> list[Any]:
    records = []
    for record in transaction.records:
        oid, same_as = record.oid, record.same_as
        if len(oid) != 8 or (same_as is not None and len(same_as) != 8):
            raise ValueError("oids and tids have 8 bytes")
        records.append((oid, record.data, same_as))
    _check(transaction.tid)
    if len(transaction.status) != 1:
        raise ValueError("a status is one character")
    return [
        transaction.tid,
        transaction.id,
        transaction.user,
        transaction.description,
        transaction.extension,
        transaction.status,
        records,
        _packed_blobs(transaction.blobs) if transaction.blobs else (),
    ]


def _packed_blobs(blobs: tuple[LoggedBlob, ...]) -> list[tuple[bytes, bytes]]:
    _check(*(blob.oid for blob in blobs))
    if any(len(blob.name) != BLOB_NAME_BYTES for blob in blobs):
        raise ValueError("names of staged blobs have 16 bytes")
    return [(blob.oid, blob.name) for blob in blobs]


def _packed_places(base: Base) -> list[tuple[int, bytes]]:
    _check(*(place.tid for place in base.places))
    _check_numbers(*(place.length for place in base.places))
    return [(place.length, place.tid) for place in base.places]


def _packed_direct(direct: Direct) -> tuple[bytes, bytes, int, int, list[tuple[bytes, bytes]]]:
    _check(direct.tid)
    _check_numbers(direct.position, direct.length)
    return direct.tid, direct.id, direct.position, direct.length, _packed_blobs(direct.blobs)


def _check(*names: bytes) -> None:
    if any(len(name) != 8 for name in names):
        raise ValueError("oids and tids have 8 bytes")


def _check_numbers(*numbers: int) -> None:
    if any(not 0 <= number < 2**64 for number in numbers):
        raise ValueError("positions and lengths have 64 bits")


def entry_of(payload: bytes) -> Entry | Head:
    """The entry that *payload* holds. Malformed if it holds none."""
    try:
        kind, *rest = msgpack.unpackb(payload, raw=False, use_list=True)
        reader: Callable[..., Entry | Head] | None = _READERS.get(kind)
        if reader is not None:
            return reader(*rest)
    # msgpack raises its own errors, ValueError and, for text that isn't, UnicodeDecodeError
    except (ValueError, TypeError, msgpack.UnpackException) as problem:
        raise Malformed(f"{type(problem).__name__}: {problem}") from None
    raise Malformed(f"an entry of the unknown kind {kind!r}")


def _batch(transactions: Any) -> Batch:
    return Batch(tuple(_transaction(*each) for each in transactions))


def _transaction(
    tid: Any, id: Any, user: Any, description: Any, extension: Any, status: Any, records: Any, blobs: Any = ()
) -> LoggedTransaction:
    if not isinstance(status, str) or len(status) != 1:
        raise ValueError("a status is one character")
    return LoggedTransaction(
        _name(tid),
        _bytes(id),
        _bytes(user),
        _bytes(description),
        _bytes(extension),
        status,
        tuple(_record(*record) for record in records),
        _blobs(blobs),
    )


def _record(oid: Any, data: Any, same_as: Any) -> Record:
    return Record(
        _name(oid), None if data is None else _bytes(data), None if same_as is None else _name(same_as)
    )


def _blobs(blobs: Any) -> tuple[LoggedBlob, ...]:
    return tuple(LoggedBlob(_name(oid), _staged(name)) for oid, name in blobs)


def _staged(value: Any) -> bytes:
    if len(_bytes(value)) != BLOB_NAME_BYTES:
        raise ValueError("names of staged blobs have 16 bytes")
    return value  # type: ignore[no-any-return]


def _base(places: Any) -> Base:
    if not places:
        raise ValueError("a base without a place")
    return Base(tuple(Place(_number(length), _name(tid)) for length, tid in places))


def _direct(tid: Any, id: Any, position: Any, length: Any, blobs: Any = ()) -> Direct:
    return Direct(_name(tid), _bytes(id), _number(position), _number(length), _blobs(blobs))


def _head(
    outcomes: Any, floor: Any, oid_mark: Any, last_tid: Any, base_sequence: Any, places: Any, undecided: Any
) -> Head:
    return Head(
        tuple((_bytes(id), _name(tid)) for id, tid in outcomes),
        _name(floor),
        _name(oid_mark),
        _name(last_tid),
        _number(base_sequence),
        _base(places),
        tuple(_direct(*direct) for direct in undecided),
    )


_READERS: Final[dict[Any, Callable[..., Entry | Head]]] = {
    "batch": _batch,
    "base": _base,
    "oid-mark": lambda oid: OidMark(_name(oid)),
    "direct": _direct,
    "head": _head,
}


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"bytes expected, not {type(value).__name__}")
    return value


def _name(value: Any) -> bytes:
    if len(_bytes(value)) != 8:
        raise ValueError("oids and tids have 8 bytes")
    return value  # type: ignore[no-any-return]


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a number expected, not {type(value).__name__}")
    return value


# Headers and records -----------------------------------------------------------------------------------


@frozen
class Header:
    """The beginning of a segment: the journal's name (16 bytes), the segment, its first sequence number."""

    name: bytes
    segment: int
    first_sequence: int
    version: int = VERSION

    def encoded(self) -> bytes:
        fixed = _HEADER.pack(MAGIC, self.version, self.name, self.segment, self.first_sequence)
        return fixed + _CHECKSUM.pack(zlib.crc32(fixed))


def header_of(data: bytes, segment: int) -> Header | None:
    """The header of *segment* that *data* begins with; None if there is none, or one of its earlier life.

    ConfigurationError if a newer version wrote it.
    """
    fixed, checksum = data[: _HEADER.size], data[_HEADER.size : HEADER_BYTES]
    if len(data) < HEADER_BYTES or checksum != _CHECKSUM.pack(zlib.crc32(fixed)):
        return None
    magic, version, name, number, first_sequence = _HEADER.unpack(fixed)
    if magic != MAGIC or number != segment:
        return None
    if not 0 < version <= VERSION:
        raise ConfigurationError(
            f"the commit journal was written by a newer Zeoid (format {version}, this one knows {VERSION}); "
            "run that one, or have it stop cleanly and move the journal away"
        )
    return Header(name, number, first_sequence, version)


def marker(name: bytes, segment: int) -> bytes:
    """What begins each record of a segment, and no record of another one, whose bytes may still be there."""
    return _CHECKSUM.pack(zlib.crc32(segment.to_bytes(8, "big"), zlib.crc32(name)))


def framed(mark: bytes, sequence: int, payloads: Iterable[bytes]) -> list[bytes]:
    """Records, in parts, that are written in one piece; the first one gets the number *sequence*."""
    parts: list[bytes] = []
    for before, payload in enumerate(payloads):
        prefix = _PREFIX.pack(mark, len(payload), sequence + before, before)
        parts += prefix, _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(prefix))), payload
    return parts


@frozen
class Framed:
    """A whole record: where it is, its number, how many of the same append come before it, its payload."""

    offset: int
    sequence: int
    before: int
    payload: bytes

    @property
    def end(self) -> int:
        return self.offset + RECORD_BYTES + len(self.payload)

    @property
    def append(self) -> int:
        """The number of the first record of the append that it belongs to."""
        return self.sequence - self.before


def record_at(data: bytes, offset: int, mark: bytes) -> Framed | None:
    """The record at *offset*, if a whole one is there."""
    start = offset + RECORD_BYTES
    if len(data) < start or data[offset : offset + 4] != mark:
        return None
    prefix = data[offset : offset + _PREFIX.size]
    _, length, sequence, before = _PREFIX.unpack(prefix)
    if len(data) - start < length:
        return None
    payload = data[start : start + length]
    if data[offset + _PREFIX.size : start] != _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(prefix))):
        return None
    return Framed(offset, sequence, before, payload)


def claimed_end(data: bytes, offset: int, mark: bytes) -> int:
    """Where a record that is not whole would end, as far as it says, but within *data*."""
    if data[offset : offset + 4] != mark or len(data) < offset + _PREFIX.size:
        return min(len(data), offset + RECORD_BYTES)
    _, length, _, _ = _PREFIX.unpack_from(data, offset)
    return min(len(data), offset + RECORD_BYTES + int(length))


def records_after(data: bytes, offset: int, mark: bytes) -> Iterator[tuple[int, Framed | None]]:
    """(offset, the record if it is whole) of everything from *offset* on that begins as a record does."""
    offset = data.find(mark, offset)
    while offset >= 0:
        record = record_at(data, offset, mark)
        yield offset, record
        offset = data.find(mark, record.end if record else offset + 1)
