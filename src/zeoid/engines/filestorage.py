"""The engine for FileStorage: as any storage's, with a shorter way to read a record.

FileStorage's own `loadBefore` passes through a pool of file objects and a dozen of small functions. A server
does hardly anything else than this, so here a record is read with one system call: the position from the
storage's index, header and data from its file, under its lock. Owns the knowledge of the record header's
layout (the format is described at the top of ZODB.FileStorage.format). Whatever is unusual is left to
FileStorage: a record that refers to another one's data, or a file object without a number.
"""

import os
from collections.abc import Iterator
from struct import Struct
from typing import Any

from ZODB.POSException import POSKeyError

from zeoid.engines.storage import StorageEngine
from zeoid.model import Revision
from zeoid.ports import TransactionRecord

#: oid, tid, position of the previous record, position of its transaction, (unused), length of the data
_HEADER = Struct(">8s8sQQHQ")
#: Most records fit in one read of this size, header included.
_READ_BYTES = 2048


class FileStorageEngine(StorageEngine):
    """A FileStorage."""

    def __init__(self, storage: Any) -> None:
        super().__init__(storage)
        self._lock = storage._lock
        self._has_pread = hasattr(os, "pread")

    def iterate(self, start: bytes | None, stop: bytes | None) -> Iterator[TransactionRecord]:
        try:
            return super().iterate(start, stop)
        except (ValueError, AttributeError):
            # It looked for *start* from the end of the file, where a transaction was half written.
            with self._lock:
                return super().iterate(start, stop)

    def load_before(self, oid: bytes, tid: bytes) -> Revision | None:
        if not self._has_pread:
            return super().load_before(oid, tid)
        end = None
        with self._lock:
            storage = self._storage
            # Both are replaced when a pack ends, under this lock.
            position = storage._index.get(oid)
            file = storage._file.fileno()
            if not position:
                raise POSKeyError(oid)
            while True:
                record = os.pread(file, _READ_BYTES, position)
                owner, start, previous, _, _, size = _HEADER.unpack_from(record)
                if owner != oid:
                    break
                if start < tid:
                    data = record[_HEADER.size : _HEADER.size + size]
                    if len(data) < size:
                        data += os.pread(file, size - len(data), position + _HEADER.size + len(data))
                    if not size or len(data) != size:
                        break
                    return data, start, end
                if not previous:
                    return None
                end, position = start, previous
        return super().load_before(oid, tid)

    def newest_tid(self, oid: bytes) -> bytes | None:
        with self._lock:
            position = self._storage._index.get(oid)
            if not position:
                return None
            # As `getTid`, but a deleted object has a tid, too: a store that does not know of the deletion
            # must meet it here, and not in FileStorage, which would unpickle the client's data to resolve it.
            tid: bytes = self._storage._read_data_header(position, oid).tid
            return tid
