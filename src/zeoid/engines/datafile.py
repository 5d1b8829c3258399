"""The layout of a transaction in a data file (Data.fs), as FileStorage writes it.

Owns bytes and positions only: knows no file, no storage, no locks. Source: the description of the format at
the top of ZODB.FileStorage.format. A test compares its bytes with FileStorage's own.

    transaction   tid 8 · length 8 · status 1 · lengths of user, description, extension 2 each · those three ·
                  records · length 8
    record        oid 8 · tid 8 · position of the previous record 8 · position of the transaction 8 · 0 2 ·
                  length of the data 8 · data; or, with length 0, the position of the record that has the same
                  data 8, which is 0 if the object ceases to be
"""

from collections.abc import Callable, Iterable
from struct import Struct
from typing import Final

from zeoid.model import NO_TID, frozen

#: oid, tid, position of the previous record, position of its transaction, (unused), length of the data
RECORD_HEADER: Final = Struct(">8s8sQQHQ")
#: tid, length, status, lengths of user, description and extension
TRANSACTION_HEADER: Final = Struct(">8sQcHHH")
LENGTH: Final = Struct(">Q")
#: What a data file begins with: since Python 3, and before.
MAGICS: Final = (b"FS30", b"FS21")
MAGIC_BYTES: Final = 4
#: The status of a transaction that FileStorage has not finished.
UNFINISHED: Final = b"c"
#: The longest user, description or extension: a header has two bytes for each of their lengths.
FIELD_LIMIT_BYTES: Final = 65_535


@frozen
class LaidOut:
    """A transaction as it will stand in the file from some position on: its bytes, its length with all that
    belongs to it, and where its records will be."""

    parts: list[bytes]
    length: int
    index: dict[bytes, int]


def transaction_bytes(meta_bytes: int, records: int, data_bytes: int) -> int:
    """The length of a transaction with so many bytes of user, description and extension, and of data."""
    return (
        TRANSACTION_HEADER.size + meta_bytes + records * (RECORD_HEADER.size + 8) + data_bytes + LENGTH.size
    )


def lay_out(
    position: int,
    tid: bytes,
    status: bytes,
    user: bytes,
    description: bytes,
    extension: bytes,
    records: Iterable[tuple[bytes, int, bytes | None, int]],
) -> LaidOut:
    """The transaction *tid* at *position*.

    *records* are (oid, previous position or 0, data, 0) or (oid, previous position or 0, None, position of
    the record that has the same data, or 0). User, description and extension must not be longer than
    FIELD_LIMIT_BYTES each.
    """
    parts = [b"", user, description, extension]
    index: dict[bytes, int] = {}
    length = TRANSACTION_HEADER.size + len(user) + len(description) + len(extension)
    for oid, previous, data, same in records:
        index[oid] = position + length
        if data is None:
            parts += (RECORD_HEADER.pack(oid, tid, previous, position, 0, 0), LENGTH.pack(same))
            length += RECORD_HEADER.size + LENGTH.size
        else:
            parts += (RECORD_HEADER.pack(oid, tid, previous, position, 0, len(data)), data)
            length += RECORD_HEADER.size + len(data)
    parts[0] = TRANSACTION_HEADER.pack(tid, length, status, len(user), len(description), len(extension))
    parts.append(LENGTH.pack(length))
    return LaidOut(parts, length + LENGTH.size, index)


def tid_that_ends_at(read: Callable[[int, int], bytes], end: int) -> bytes | None:
    """The tid of the transaction that ends at *end*: NO_TID where the first one begins, None if none does.

    *read* takes a position in the file and how many bytes to read there.
    """
    if end == MAGIC_BYTES:
        return NO_TID if read(0, end) in MAGICS else None
    if end < MAGIC_BYTES + TRANSACTION_HEADER.size + LENGTH.size:
        return None
    told = read(end - LENGTH.size, LENGTH.size)
    if len(told) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(told)
    start = end - LENGTH.size - length
    if length < TRANSACTION_HEADER.size or start < MAGIC_BYTES:
        return None
    tid: bytes
    tid, again, status, _, _, _ = TRANSACTION_HEADER.unpack(read(start, TRANSACTION_HEADER.size))
    return tid if again == length and status != UNFINISHED else None
