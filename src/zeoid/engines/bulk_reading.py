"""Many records of a data file at once: what is current in one read each, the rest by the engine's own load.

Owns what can be saved when many are read: the lock is taken once, and the index's tree for the first six
bytes of an oid is looked up once for neighbours. Must not know how an older revision is found.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from ZODB.POSException import POSKeyError

from zeoid.engines.datafile import RECORD_HEADER
from zeoid.model import Revision

_HEADER_BYTES: Final = RECORD_HEADER.size
_unpack_header = RECORD_HEADER.unpack_from
#: Most records fit in one read of this size, header included.
READ_BYTES: Final = 2048
#: What is not current takes more reads, nobody knows how many: it counts as so much data.
_OLDER_BYTES: Final = 8 * 1024


def load_before_many(
    index: Any,
    file: int,
    oids: Sequence[bytes],
    tid: bytes,
    most_bytes: int,
    load_before: Callable[[bytes, bytes], Revision | None],
) -> list[Revision | None]:
    """As `Engine.load_before_many`, under the lock of FileStorage's *index*. *load_before*: the engine's."""
    pread = os.pread
    trees = index._data
    prefix, tree = b"", None
    revisions: list[Revision | None] = []
    left_bytes = most_bytes
    for oid in oids:
        if oid[:6] != prefix:
            prefix = oid[:6]
            tree = trees.get(prefix)
        place = None if tree is None else tree.get(oid[6:])
        if place is None:
            revisions.append(None)
            continue
        record = pread(file, READ_BYTES, int.from_bytes(place, "big"))
        owner, start, _, _, _, size = _unpack_header(record)
        stop = _HEADER_BYTES + size
        if owner == oid and start < tid and size and stop <= len(record):
            revisions.append((record[_HEADER_BYTES:stop], start, None))
            left_bytes -= size
        else:
            revision = None
            try:
                revision = load_before(oid, tid)
            except POSKeyError:
                pass
            else:
                left_bytes -= 0 if revision is None else len(revision[0])
            revisions.append(revision)
            left_bytes -= _OLDER_BYTES
        if left_bytes <= 0:
            break
    return revisions
