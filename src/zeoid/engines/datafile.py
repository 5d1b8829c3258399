"""The layout of a transaction in a data file (Data.fs), as FileStorage writes one that stores objects.

Owns bytes and positions only: knows no file, no storage, no locks. Source: the description of the format at
the top of ZODB.FileStorage.format. A test compares its bytes with FileStorage's own.

    transaction   tid 8 · length 8 · status 1 · lengths of user, description, extension 2 each · those three ·
                  records · length 8
    record        oid 8 · tid 8 · position of the previous record 8 · position of the transaction 8 · 0 2 ·
                  length of the data 8 · data
"""

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Final

#: oid, tid, position of the previous record, position of its transaction, (unused), length of the data
RECORD_HEADER: Final = Struct(">8s8sQQHQ")
_TRANSACTION: Final = Struct(">8sQcHHH")
_LENGTH: Final = Struct(">Q")
#: Where the status stands in a transaction, and what it says: it is being written, it is committed.
STATUS_OFFSET: Final = 16
UNFINISHED: Final = b"c"
COMMITTED: Final = b" "
#: The longest user, description and extension together: a header has two bytes for each of their lengths.
META_LIMIT_BYTES: Final = 65_535 - _TRANSACTION.size


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A transaction as it will stand in the file from *position* on, and where its records will be."""

    data: bytes
    position: int
    index: dict[bytes, int]

    @property
    def end(self) -> int:
        return self.position + len(self.data)


def lay_out(
    position: int,
    tid: bytes,
    user: bytes,
    description: bytes,
    extension: bytes,
    records: Iterable[tuple[bytes, int, bytes]],
) -> LaidOut:
    """The transaction *tid* at *position*, unfinished; *records* are (oid, previous position or 0, data).

    User, description and extension must not be longer than META_LIMIT_BYTES together.
    """
    parts = [b"", user, description, extension]
    index: dict[bytes, int] = {}
    length = _TRANSACTION.size + len(user) + len(description) + len(extension)
    for oid, previous, data in records:
        index[oid] = position + length
        parts += (RECORD_HEADER.pack(oid, tid, previous, position, 0, len(data)), data)
        length += RECORD_HEADER.size + len(data)
    parts[0] = _TRANSACTION.pack(tid, length, UNFINISHED, len(user), len(description), len(extension))
    parts.append(_LENGTH.pack(length))
    return LaidOut(b"".join(parts), position, index)
