"""The engine for FileStorage: as any storage's, with a shorter way to read a record and to write some.

FileStorage's own `loadBefore` passes through a pool of file objects and a dozen of small functions. A server
does hardly anything else than this, so here a record is read with one system call: the position from the
storage's index, header and data from its file, under its lock. Likewise a transaction that does nothing but
store objects is laid out in memory and written in one piece at vote, unfinished; to finish it, its status is
written and the file is synced: the same bytes in the same order as FileStorage's own, without its copies.

Owns how the two share FileStorage's file, index and locks (the file's layout is `datafile`'s; the index,
ZODB.fsIndex, is a tree for the first six bytes of an oid, and in it one for the last two, and its own `get`
takes as long as reading the record). Whatever is unusual is left to FileStorage: a record that refers to
another one's data, undo, restore, deletion, a quota, metadata that is too long, a system without positioned
reads.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage.format import CorruptedError
from ZODB.POSException import POSKeyError

from zeoid.engines.datafile import COMMITTED, META_LIMIT_BYTES, RECORD_HEADER, STATUS_OFFSET, LaidOut, lay_out
from zeoid.engines.storage import StorageEngine, refuse_empty
from zeoid.model import Conflict, Operation, Revision, Store, TransactionInfo
from zeoid.ports import Prepared, TransactionRecord

_HEADER_BYTES = RECORD_HEADER.size
_unpack_header = RECORD_HEADER.unpack_from
_pread = getattr(os, "pread", None)
#: Data, and the length that is needed to read it; the file's times may be lost.
_sync = getattr(os, "fdatasync", os.fsync)
#: Most records fit in one read of this size, header included.
_READ_BYTES = 2048


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """A transaction that stands in the file, behind its end: without its data, which may be large."""

    tid: bytes
    position: int
    end: int
    index: dict[bytes, int]


class FileStorageEngine(StorageEngine):
    """A FileStorage."""

    def __init__(self, storage: Any) -> None:
        super().__init__(storage)
        self._lock = storage._lock
        #: The data file's number, and the file object it belongs to: a pack replaces that.
        self._file: Any = None
        self._number = -1
        #: The prepared transaction, if it is one of stores only.
        self._unfinished: _Unfinished | None = None

    def iterate(self, start: bytes | None, stop: bytes | None) -> Iterator[TransactionRecord]:
        try:
            return super().iterate(start, stop)
        except (ValueError, AttributeError, CorruptedError):
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

    # Writing --------------------------------------------------------------------------------------

    def prepare(self, tid: bytes, info: TransactionInfo, operations: Iterable[Operation]) -> Prepared:
        operations = list(operations)
        stores = [operation for operation in operations if type(operation) is Store]
        extension = TransactionMetaData(b"", b"", info.extension).extension_bytes
        meta_bytes = len(info.user) + len(info.description) + len(extension)
        storage = self._storage
        if (
            len(stores) < len(operations)
            or info.status != " "
            or meta_bytes > META_LIMIT_BYTES
            or storage._quota is not None
            or self.read_only
            or _pread is None
        ):
            return super().prepare(tid, info, operations)
        storage._commit_lock.acquire()  # as tpc_begin does; a pack holds it when it replaces the file
        try:
            conflicts, records = self._look_up(stores)
            if not conflicts:
                laid_out = lay_out(storage._pos, tid, info.user, info.description, extension, records)
                self._write(laid_out)
                unfinished = _Unfinished(tid, laid_out.position, laid_out.end, laid_out.index)
        except BaseException:
            storage._commit_lock.release()
            raise
        if conflicts:
            storage._commit_lock.release()
            return Prepared(list(conflicts.values()))
        self._unfinished = unfinished
        return Prepared((), list(unfinished.index))

    def _look_up(
        self, stores: Iterable[Store]
    ) -> tuple[dict[bytes, Conflict], list[tuple[bytes, int, bytes]]]:
        """The stores that met a newer record, and the records to write."""
        conflicts: dict[bytes, Conflict] = {}
        records: list[tuple[bytes, int, bytes]] = []
        storage = self._storage
        for store in stores:
            refuse_empty(store.oid, store.data)
            with self._lock:
                if store.oid > storage._oid:
                    storage.set_max_oid(store.oid)
            newest = self.newest_tid(store.oid)
            if newest is not None and newest != store.serial:
                conflicts[store.oid] = Conflict(store.oid, newest, store.serial, store.data)
            records.append((store.oid, storage._index.get(store.oid, 0), store.data))
        return conflicts, records

    def _write(self, transaction: LaidOut) -> None:
        """Put it behind the file's end, unfinished. OSError: the file is as it was."""
        file, rest = self._storage._file.fileno(), memoryview(transaction.data)
        position = transaction.position
        with self._lock:  # who looks for a transaction from the file's end must not meet a half of one
            try:
                while rest:
                    written = os.pwrite(file, rest, position)
                    position, rest = position + written, rest[written:]
            except BaseException:
                self._roll_back(transaction.position)
                raise

    def _roll_back(self, position: int) -> None:
        with self._lock:
            os.ftruncate(self._storage._file.fileno(), position)
            self._storage._file.flush()  # nobody may go on with what they have read of it
            self._storage._files.flush()

    def finish(self) -> None:
        transaction, self._unfinished = self._unfinished, None
        if transaction is None:
            super().finish()
            return
        storage = self._storage
        file = storage._file.fileno()
        try:
            os.pwrite(file, COMMITTED, transaction.position + STATUS_OFFSET)
            _sync(file)
            with storage._files.write_lock(), self._lock:
                storage._file.flush()  # it may have read what was there before
                storage._pos = transaction.end
                storage._index.update(transaction.index)
                storage._ltid = transaction.tid
        finally:
            storage._commit_lock.release()

    def abandon(self) -> None:
        transaction, self._unfinished = self._unfinished, None
        if transaction is None:
            super().abandon()
            return
        try:
            self._roll_back(transaction.position)
        finally:
            self._storage._commit_lock.release()

    def newest_tid(self, oid: bytes) -> bytes | None:
        with self._lock:
            position = self._storage._index.get(oid)
            if not position:
                return None
            # As `getTid`, but a deleted object has a tid, too: a store that does not know of the deletion
            # must meet it here, and not in FileStorage, which would unpickle the client's data to resolve it.
            tid: bytes = self._storage._read_data_header(position, oid).tid
            return tid
