"""The engine for FileStorage: as any storage's, with a shorter way to read a record.

FileStorage's own `loadBefore` passes through a pool of file objects and a dozen of small functions. A server
does hardly anything else than this, so here a record is read with one system call: the position from the
storage's index, header and data from its file, under its lock. Owns the knowledge of the record header's
layout (the format is described at the top of ZODB.FileStorage.format) and of the index's (ZODB.fsIndex: a
tree for the first six bytes of an oid, in it one for the last two; its own `get` takes as long as reading the
record). Whatever is unusual is left to
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
_HEADER_BYTES = _HEADER.size
_unpack_header = _HEADER.unpack_from
_pread = getattr(os, "pread", None)
#: Most records fit in one read of this size, header included.
_READ_BYTES = 2048


class FileStorageEngine(StorageEngine):
    """A FileStorage."""

    def __init__(self, storage: Any) -> None:
        super().__init__(storage)
        self._lock = storage._lock
        #: The data file's number, and the file object it belongs to: a pack replaces that.
        self._file: Any = None
        self._number = -1

    def iterate(self, start: bytes | None, stop: bytes | None) -> Iterator[TransactionRecord]:
        try:
            return super().iterate(start, stop)
        except (ValueError, AttributeError):
            # It looked for *start* from the end of the file, where a transaction was half written.
            with self._lock:
                return super().iterate(start, stop)

    def load_before(self, oid: bytes, tid: bytes) -> Revision | None:
        if _pread is None:
            return super().load_before(oid, tid)
        end = None
        storage = self._storage
        lock = self._lock
        lock.acquire()  # in a `with` it takes twice as long
        try:
            # Both are replaced when a pack ends, under this lock.
            tree = storage._index._data.get(oid[:6])
            place = None if tree is None else tree.get(oid[6:])
            if self._file is not storage._file:
                self._file = storage._file
                self._number = self._file.fileno()
            file = self._number
            if place is None:
                raise POSKeyError(oid)
            position = int.from_bytes(place, "big")
            while True:
                record = _pread(file, _READ_BYTES, position)
                owner, start, previous, _, _, size = _unpack_header(record)
                if owner != oid:
                    break
                if start < tid:
                    stop = _HEADER_BYTES + size
                    if stop > _READ_BYTES:
                        record += _pread(file, stop - _READ_BYTES, position + _READ_BYTES)
                    if not size or len(record) < stop:
                        break
                    return record[_HEADER_BYTES:stop], start, end
                if not previous:
                    return None
                end, position = start, previous
        finally:
            lock.release()
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
