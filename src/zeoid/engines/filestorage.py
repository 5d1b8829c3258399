"""The engine for FileStorage: reads with a shorter way to a record, and writes by itself, in batches.

FileStorage's own `loadBefore` passes through a pool of file objects and a dozen of small functions. A server
does hardly anything else than this, so here a record is read with one system call: the position from the
storage's index, header and data from its file, under its lock. FileStorage writes one transaction at a time
and syncs each, under one lock from vote to finish. Here any number of transactions is prepared at once, by
looking only; what they write is put into the file in batches, by `appending`.

Owns how the two share FileStorage's file, index and locks for reading (the index, ZODB.fsIndex, is a tree for
the first six bytes of an oid, and in it one for the last two, and its own `get` takes as long as reading the
record), and what a transaction writes. Of FileStorage's own ways to change the file only the pack is left.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from ZODB.blob import is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage.FileStorage import FileStorage, FileStorageQuotaError
from ZODB.FileStorage.format import CorruptedError
from ZODB.POSException import (
    MultipleUndoErrors,
    POSKeyError,
    ReadOnlyError,
    StorageError,
    UndoError,
    Unsupported,
)
from ZODB.utils import p64, u64

from zeoid import limits
from zeoid.engines.appending import Appender
from zeoid.engines.blob_packing import remove_packed, sync_list
from zeoid.engines.blobs import BlobDirectory
from zeoid.engines.bulk_reading import READ_BYTES, load_before_many
from zeoid.engines.datafile import FIELD_LIMIT_BYTES, RECORD_HEADER, transaction_bytes
from zeoid.engines.journal import LoggedBlob, LoggedTransaction, Record
from zeoid.engines.journal_format import BLOB_BYTES
from zeoid.engines.keeping import Keeper
from zeoid.engines.packing import UNWATCHED, pack
from zeoid.engines.preparing import Writing
from zeoid.engines.records import DataFile
from zeoid.engines.storage import StorageEngine
from zeoid.errors import not_stored
from zeoid.model import NO_TID, Operation, Revision, StagedBlob, TransactionInfo
from zeoid.ports import BlobWriter, Commit, Outcomes, PackProgress, Prepared, TransactionRecord

log = logging.getLogger("zeoid.server")

_HEADER_BYTES = RECORD_HEADER.size
_unpack_header = RECORD_HEADER.unpack_from
_pread = getattr(os, "pread", None)


class _Written(Prepared):
    """What a prepared transaction will write."""

    __slots__ = ("description", "extension", "records", "status", "user")

    def __init__(
        self, info: TransactionInfo, extension: bytes, records: dict[bytes, Record], resolved: Sequence[bytes]
    ) -> None:
        self.user = info.user
        self.description = info.description
        self.extension = extension
        self.status = info.status
        self.records = tuple(records.values())
        data_bytes = 0
        for record in self.records:
            if record.data is not None:
                data_bytes += len(record.data)
        meta_bytes = len(info.user) + len(info.description) + len(extension)
        size_bytes = transaction_bytes(meta_bytes, len(records), data_bytes)
        super().__init__((), list(records), resolved, size_bytes)
        self.blobs: tuple[LoggedBlob, ...] = ()


class FileStorageEngine(StorageEngine):
    """A FileStorage, and the journal beside it. Without an *appender* it can only be read."""

    exclusive = False

    def __init__(
        self,
        storage: Any,
        appender: Appender | None,
        outcomes: Outcomes,
        oid_mark: bytes,
        last_tid: bytes = NO_TID,
        blobs: BlobDirectory | None = None,
    ) -> None:
        super().__init__(storage)
        self._lock = storage._lock
        #: The data file's number, and the file object it belongs to: a pack replaces that.
        self._file: Any = None
        self._number = -1
        self._appender = appender
        self._blobs = blobs
        self._outcomes = outcomes
        self._last_tid = last_tid
        self._oids = threading.Lock()
        self._oid_mark = max(oid_mark, storage._oid)
        self._keeper: Keeper | None = None
        self._packer = storage.packer
        #: A packer that a configuration brought along is left alone, but can't be watched.
        self.can_cancel_pack = self._packer is FileStorage.packer
        self._progress: PackProgress = UNWATCHED
        if appender is not None:
            storage.set_max_oid(self._oid_mark)
            storage.packer = self._pack_beside
            if blobs is not None:
                storage._remove_blob_files_tagged_for_removal_during_pack = self._remove_packed_blobs
            self._keeper = Keeper(appender, self.name)

    # Reading --------------------------------------------------------------------------------------

    def last_tid(self) -> bytes:
        # A pack may have removed the transaction that it names: clients have seen it all the same.
        return max(self._last_tid, super().last_tid())

    def outcomes(self) -> Outcomes:
        return self._outcomes

    def last_invalidations(self, count: int) -> list[tuple[bytes, Sequence[bytes]]]:
        try:
            found = DataFile(self._storage).last_transactions(count, limits.INVALIDATION_LOG_RECORDS_AT_START)
        except CorruptedError as problem:
            log.warning("clients that were away have to forget what they know: %s", problem)
            return []
        return [(tid, tuple(oids)) for tid, oids in found]

    @property
    def failure(self) -> str:
        return "" if self._appender is None else self._appender.failure

    def iterate(self, start: bytes | None, stop: bytes | None) -> Iterator[TransactionRecord]:
        try:
            return super().iterate(start, stop)
        except (ValueError, AttributeError, CorruptedError):
            # It looked for *start* from the end of the file, where a transaction was half written.
            with self._storage._commit_lock:
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
                record = _pread(file, READ_BYTES, position)
                owner, start, previous, _, _, size = _unpack_header(record)
                if owner != oid:
                    break
                if start < tid:
                    stop = _HEADER_BYTES + size
                    if stop > READ_BYTES:
                        record += _pread(file, stop - READ_BYTES, position + READ_BYTES)
                    if not size or len(record) < stop:
                        break
                    return record[_HEADER_BYTES:stop], start, end
                if not previous:
                    return None
                end, position = start, previous
        finally:
            lock.release()
        return super().load_before(oid, tid)

    def load_before_many(
        self, oids: Sequence[bytes], tid: bytes, most_bytes: int
    ) -> Sequence[Revision | None]:
        if _pread is None:
            return super().load_before_many(oids, tid, most_bytes)
        storage = self._storage
        with self._lock:  # which `load_before` may take again
            return load_before_many(
                storage._index, storage._file.fileno(), oids, tid, most_bytes, self.load_before
            )

    def newest_tid(self, oid: bytes) -> bytes | None:
        # As `getTid`, but a deleted object has a tid, too: a store must meet the deletion.
        with self._lock:
            tree = self._storage._index._data.get(oid[:6])
            place = None if tree is None else tree.get(oid[6:])
            if place is None:
                return None
            header = os.pread(self._storage._file.fileno(), _HEADER_BYTES, int.from_bytes(place, "big"))
        owner, tid, _, _, _, _ = _unpack_header(header)
        if owner != oid:
            raise CorruptedError(f"the record of {oid.hex()} is not where the index says")
        newest: bytes = tid
        return newest

    # Writing --------------------------------------------------------------------------------------

    def prepare(self, tid: bytes | None, info: TransactionInfo, operations: Iterable[Operation]) -> Prepared:
        if self._appender is None:
            raise ReadOnlyError()
        extension = b""
        if info.extension:
            extension = TransactionMetaData(b"", b"", info.extension).extension_bytes
        if max(len(info.user), len(info.description), len(extension)) > FIELD_LIMIT_BYTES:
            raise _too_long(info, extension)
        writing = Writing(self, self._appender.data_file, self._resolver)
        for position, operation in enumerate(operations):
            writing.apply(operation, position)
        if writing.conflicts:
            return Prepared(list(writing.conflicts.values()))
        prepared = _Written(info, extension, writing.records, list(writing.resolved))
        self._note_oids(prepared.oids)
        if writing.attached or writing.superseded or writing.revived:
            self._promise_with_blobs(prepared, writing)
        else:
            self._promise(prepared.size_bytes)
        return prepared

    def _promise_with_blobs(self, prepared: _Written, writing: Writing) -> None:
        """As `_promise`. If it raises, what the client staged is the transaction's as before."""
        writing.check_blobs()
        if self._blobs is None and not writing.attached and not writing.superseded:
            self._promise(prepared.size_bytes)  # an undo, where no blobs are kept
            return
        blobs = self._kept_blobs()
        given = [LoggedBlob(oid, blob.name) for oid, blob in writing.attached.items()]
        made: list[LoggedBlob] = []
        try:
            for oid, tids in writing.revived.items():
                blob = _staged_again(blobs, oid, tids, writing.records[oid].data)
                if blob is not None:
                    made.append(LoggedBlob(oid, blob.name))
            prepared.blobs = (*given, *made)
            prepared.size_bytes += BLOB_BYTES * len(prepared.blobs)
            if prepared.blobs:
                blobs.promise(prepared.blobs)
            self._promise(prepared.size_bytes)
        except BaseException as problem:
            blobs.discard([blob.name for blob in made], [blob.oid for blob in (*given, *made)])
            if isinstance(problem, OSError):
                raise not_stored(problem) from None
            raise
        blobs.discard([blob.name for blob in writing.superseded])

    def _promise(self, size_bytes: int) -> None:
        assert self._appender is not None
        storage = self._storage
        if storage._quota is not None and storage._pos + size_bytes > storage._quota:
            raise FileStorageQuotaError("The storage quota has been exceeded.")
        try:
            self._appender.promise(size_bytes)
        except OSError as problem:
            reason = problem.strerror or problem
            raise StorageError(f"no room for a transaction of {size_bytes:,} bytes: {reason}") from None

    def commit(self, batch: Sequence[Commit]) -> None:
        assert self._appender is not None
        transactions = []
        size_bytes = 0
        for one in batch:
            written = one.prepared
            assert isinstance(written, _Written)
            size_bytes += written.size_bytes
            transactions.append(
                LoggedTransaction(
                    one.tid, one.id, written.user, written.description, written.extension, written.status,
                    written.records, written.blobs,
                )
            )  # fmt: skip
        self._appender.commit(tuple(transactions), size_bytes)
        self._appender.take_back(*[one.prepared.size_bytes for one in batch])
        assert self._keeper is not None
        self._keeper.committed()

    def abandon(self, prepared: Prepared) -> None:
        assert self._appender is not None
        assert isinstance(prepared, _Written)
        self._appender.take_back(prepared.size_bytes)
        if prepared.blobs:
            self._kept_blobs().discard(
                [blob.name for blob in prepared.blobs], [blob.oid for blob in prepared.blobs]
            )

    # Blobs ----------------------------------------------------------------------------------------

    def _kept_blobs(self) -> BlobDirectory:
        if self._blobs is None:
            raise Unsupported(f"{self.name} has no directory for blobs")
        return self._blobs

    def stage_blob(self, size_bytes: int | None = None) -> BlobWriter:
        if self._appender is None:
            raise ReadOnlyError()
        return self._kept_blobs().stage(size_bytes)

    def take_shared_blob(self, oid: bytes, filename: str) -> StagedBlob:
        if self._appender is None:
            raise ReadOnlyError()
        return self._kept_blobs().take_shared(oid, filename)

    def discard_blobs(self, blobs: Sequence[StagedBlob]) -> None:
        self._kept_blobs().discard([blob.name for blob in blobs])

    def open_blob(self, oid: bytes, serial: bytes) -> BinaryIO:
        return self._kept_blobs().open(oid, serial)

    # ----------------------------------------------------------------------------------------------

    def new_oids(self, count: int) -> list[bytes]:
        assert self._appender is not None
        storage = self._storage
        with self._oids:
            first = u64(storage._oid) + 1
            last = p64(first + count - 1)
            if last > self._oid_mark:
                mark = p64(first + count - 1 + limits.OID_BLOCK)
                self._appender.note_oids(mark)
                self._oid_mark = mark
            storage.set_max_oid(last)
        return [p64(number) for number in range(first, first + count)]

    def _note_oids(self, oids: Sequence[bytes]) -> None:
        """Clients may choose oids by themselves: no other is to get them."""
        newest = max(oids, default=b"")
        with self._oids:
            if newest > self._storage._oid:
                self._storage.set_max_oid(newest)

    def checkpoint(self) -> bytes:
        if self._appender is None:
            raise ReadOnlyError()
        return self._appender.checkpoint()

    def pack(self, time: float, progress: PackProgress = UNWATCHED) -> None:
        if self.failure:  # what is behind the file's end is not for a pack to read
            raise OSError(self.failure)
        self._progress = progress
        try:
            super().pack(time, progress)
        finally:
            self._progress = UNWATCHED
        assert self._appender is not None
        self._appender.settle_packed()

    def _pack_beside(self, storage: Any, referencesf: Any, stop: bytes, gc: bool) -> Any:
        """As FileStorage has its file packed. With a result it holds the commit lock, to replace the file."""
        appender, progress, path = self._appender, self._progress, f"{storage._file_name}.pack"
        assert appender is not None
        try:
            if self.can_cancel_pack:
                packed = pack(storage, referencesf, stop, gc, progress, lambda: appender.sync_file(path))
            else:
                packed = self._packer(storage, referencesf, stop, gc)
            if packed is None:
                return None
            try:
                progress.begin_replacing()
                if self._blobs is not None:
                    sync_list(self._blobs.path, appender.disk)
            except BaseException:
                storage._commit_lock.release()
                raise
        except Exception:
            appender.discard(path)
            raise
        try:
            appender.settle_either(path, packed[0])
        except BaseException:
            storage._commit_lock.release()
            raise
        return packed

    def _remove_packed_blobs(self) -> None:
        """In the place of FileStorage's, which removes the directory of an object that was garbage with all
        that is in it, whatever was committed meanwhile."""
        assert self._appender is not None
        self._appender.settle_packed()
        remove_packed(self._kept_blobs(), self._storage, self._appender.disk)

    def close(self) -> None:
        try:
            if self._keeper is not None:
                self._keeper.close()
            if self._appender is not None:
                self._appender.close()
        finally:
            super().close()
            if self._appender is not None:
                self._appender.sync_index()


def _staged_again(
    blobs: BlobDirectory, oid: bytes, tids: Sequence[bytes], data: bytes | None
) -> StagedBlob | None:
    """A blob as one of these revisions had it, for an undo; None if it is no blob's record."""
    for tid in tids:
        with contextlib.suppress(POSKeyError):
            return blobs.stage_revision(oid, tid)
    if not is_blob_record(data):
        return None
    problem = UndoError("the blob of the earlier revision is gone", oid)
    raise MultipleUndoErrors([(oid, problem)])


def _too_long(info: TransactionInfo, extension: bytes) -> StorageError:
    fields = ("user", info.user), ("description", info.description), ("extension", extension)
    name = next(name for name, field in fields if len(field) > FIELD_LIMIT_BYTES)
    return StorageError(f"the {name} of the transaction is longer than {FIELD_LIMIT_BYTES:,} bytes")
