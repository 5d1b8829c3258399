"""The engine that adapts a ZODB storage: FileStorage, MappingStorage, any other with two-phase commit.

Owns the translation between ZODB's storage methods and the Engine protocol, and how stores that conflict are
found before the storage sees them: resolving a conflict means running the application's code, which is the
client's business unless it was asked for here. (Undo is the exception: the storage resolves its conflicts
where it can import the classes.) Must not know connections, replies or the order of transactions.
"""

from base64 import decodebytes
from binascii import Error as Base64Error
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import zope.interface
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IBlobStorage, IBlobStorageRestoreable
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadConflictError,
    StorageError,
    UndoError,
    Unsupported,
)
from ZODB.serialize import referencesf
from ZODB.utils import load_current

from zeoid.engines.resolving import Resolver
from zeoid.engines.storage_blobs import StorageBlobs
from zeoid.model import (
    NO_TID,
    AttachBlob,
    CheckCurrent,
    Conflict,
    Delete,
    Operation,
    Restore,
    Revision,
    StagedBlob,
    Store,
    TransactionInfo,
    Undo,
)
from zeoid.ports import BlobWriter, Commit, Outcomes, Prepared, TransactionRecord


class StorageEngine:
    """One ZODB storage, opened by whoever makes the engine and closed by `close`."""

    exclusive = True

    def __init__(self, storage: Any) -> None:
        self._storage: Any = storage
        self._blob_files = StorageBlobs(storage)
        self._resolver: Resolver | None = None
        self.resolves_conflicts = False
        self.name: str = storage.getName()
        self.read_only: bool = bool(storage.isReadOnly())
        self.supports_undo = bool(getattr(storage, "supportsUndo", bool)())
        self.has_blobs: bool = IBlobStorage.providedBy(storage)
        self.supports_record_iteration = hasattr(storage, "record_iternext")
        self.interfaces: tuple[tuple[str, str], ...] = tuple(
            (interface.__module__, interface.__name__)
            for interface in zope.interface.providedBy(storage).__iro__
            if interface not in (IBlobStorage, IBlobStorageRestoreable)
        )

    @property
    def failure(self) -> str:
        return ""

    # Reading --------------------------------------------------------------------------------------

    def last_tid(self) -> bytes:
        return self._storage.lastTransaction() or NO_TID

    def load_before(self, oid: bytes, tid: bytes) -> Revision | None:
        revision: Revision | None = self._storage.loadBefore(oid, tid)
        return revision

    def load_serial(self, oid: bytes, serial: bytes) -> bytes:
        data: bytes = self._storage.loadSerial(oid, serial)
        return data

    def current_tid(self, oid: bytes) -> bytes:
        if hasattr(self._storage, "getTid"):
            tid: bytes = self._storage.getTid(oid)
        else:
            tid = load_current(self._storage, oid)[1]
        return tid

    def newest_tid(self, oid: bytes) -> bytes | None:
        """The tid of the newest record of *oid*, also if it is a deletion and the storage can tell."""
        try:
            tid: bytes = self._storage.getTid(oid)
        except POSKeyError:
            return None
        return tid

    def history(self, oid: bytes, size: int) -> list[dict[str, Any]]:
        return list(self._storage.history(oid, size=size))

    def record_iternext(self, following: bytes | None) -> tuple[bytes, bytes, bytes, bytes | None]:
        oid, tid, data, after = self._storage.record_iternext(following)
        return oid, tid, data, after

    def undo_log(self, first: int, last: int) -> Sequence[dict[str, Any]]:
        return list(self._storage.undoLog(first, last)) if self.supports_undo else []

    def undo_info(
        self, first: int, last: int, specification: dict[str, Any] | None
    ) -> Sequence[dict[str, Any]]:
        return list(self._storage.undoInfo(first, last, specification)) if self.supports_undo else []

    def iterate(self, start: bytes | None, stop: bytes | None) -> Iterator[TransactionRecord]:
        return iter(self._storage.iterator(start, stop))

    def last_invalidations(self, count: int) -> list[tuple[bytes, Sequence[bytes]]]:
        ask = getattr(self._storage, "lastInvalidations", None)
        return [] if ask is None else [(tid, tuple(oids)) for tid, oids in ask(count)]

    def new_oids(self, count: int) -> list[bytes]:
        return [self._storage.new_oid() for _ in range(count)]

    def size_bytes(self) -> int:
        return int(self._storage.getSize())

    def count(self) -> int:
        return len(self._storage)

    # Writing --------------------------------------------------------------------------------------

    def prepare(self, tid: bytes | None, info: TransactionInfo, operations: Iterable[Operation]) -> Prepared:
        assert tid is not None
        meta = TransactionMetaData(info.user, info.description, info.extension)
        try:
            # A storage's lock may be held even if this fails, until the transaction is aborted.
            if info.status == " ":
                self._storage.tpc_begin(meta, tid)
            else:
                self._storage.tpc_begin(meta, tid, info.status)
            writing = _Writing(self._storage, meta, tid, self.newest_tid, self._resolver)
            operations = list(operations)
            attached = {each.oid: each.blob for each in operations if isinstance(each, AttachBlob)}
            if not attached or not writing.meets_conflicts(operations):
                writing.blobs = {oid: self._blob_files.path(blob) for oid, blob in attached.items()}
                for operation in operations:
                    writing.apply(operation)
                writing.check_blobs()
            conflicts = list(writing.conflicts.values())
            resolved = [] if conflicts else self._storage.tpc_vote(meta)
        except BaseException:
            self._storage.tpc_abort(meta)
            raise
        if conflicts:
            self._storage.tpc_abort(meta)
            return Prepared(conflicts)
        if attached:  # the storage has those that count
            self._blob_files.discard(each.blob for each in operations if isinstance(each, AttachBlob))
        return _Voted(meta, list(writing.oids), [*writing.resolved, *(resolved or ())])

    def commit(self, batch: Sequence[Commit]) -> None:
        for one in batch:
            assert isinstance(one.prepared, _Voted)
            self._storage.tpc_finish(one.prepared.meta)

    def abandon(self, prepared: Prepared) -> None:
        assert isinstance(prepared, _Voted)
        self._storage.tpc_abort(prepared.meta)

    def outcomes(self) -> Outcomes:
        return Outcomes(self.last_tid())

    def checkpoint(self) -> bytes:
        return self.last_tid()

    def pack(self, time: float) -> None:
        self._storage.pack(time, referencesf)

    def stage_blob(self, size_bytes: int | None = None) -> BlobWriter:
        return self._blob_files.stage(size_bytes)

    def take_shared_blob(self, oid: bytes, filename: str) -> StagedBlob:
        raise Unsupported(f"{self.name} shares no blob directory with clients")

    def discard_blobs(self, blobs: Sequence[StagedBlob]) -> None:
        self._blob_files.discard(blobs)

    def open_blob(self, oid: bytes, serial: bytes) -> BinaryIO:
        return self._blob_files.open(oid, serial)

    def resolve_conflicts(self) -> None:
        self._resolver = Resolver(self.load_serial)
        self.resolves_conflicts = True

    def close(self) -> None:
        self._storage.close()


class _Voted(Prepared):
    """A transaction that the storage has voted on."""

    __slots__ = ("meta",)

    def __init__(self, meta: TransactionMetaData, oids: Sequence[bytes], resolved: Sequence[bytes]) -> None:
        self.meta = meta
        super().__init__((), oids, resolved)


class _Writing:
    """The operations of one transaction on their way into the storage."""

    def __init__(
        self,
        storage: Any,
        meta: TransactionMetaData,
        tid: bytes,
        newest_tid: Callable[[bytes], bytes | None],
        resolver: Resolver | None,
    ) -> None:
        self._newest_tid = newest_tid
        self._resolver = resolver
        self._storage = storage
        self._meta = meta
        self._tid = tid
        self.oids: dict[bytes, None] = {}
        #: Those whose data is another than the client knows.
        self.resolved: dict[bytes, None] = {}
        self.conflicts: dict[bytes, Conflict] = {}
        #: Files that the storage is still to be given with the records of these objects.
        self.blobs: dict[bytes, str] = {}
        self._has_taken_blobs = False

    def meets_conflicts(self, operations: Iterable[Operation]) -> bool:
        """Whether a store meets a newer revision, so that nothing is to be given to the storage."""
        if self._resolver is None:
            for operation in operations:
                if isinstance(operation, Store):
                    newest = self._newest_tid(operation.oid)
                    if newest is not None and newest != operation.serial:
                        conflict = Conflict(operation.oid, newest, operation.serial, operation.data)
                        self.conflicts[operation.oid] = conflict
        return bool(self.conflicts)

    def check_blobs(self) -> None:
        """StorageError if there is a blob without a record."""
        for oid in self.blobs:
            raise StorageError(f"there is a blob for object {oid.hex()}, but no record")

    def apply(self, operation: Operation) -> None:
        match operation:
            case Store(oid, _, data):
                refuse_empty(oid, data)
                self._store(operation)
            case Restore(oid, data, same_as):
                refuse_empty(oid, data)
                path = self._blob_of(oid) if data is not None else None
                if path is None:
                    self._able("restore")(oid, self._tid, data, "", same_as, self._meta)
                else:
                    self._able("restoreBlob")(oid, self._tid, data, path, same_as, self._meta)
                self.oids[oid] = None
            case Delete(oid, serial):
                self._able("deleteObject")(oid, serial, self._meta)
                self.oids[oid] = None
            case AttachBlob():
                pass  # with its record
            case CheckCurrent(oid, serial):
                self._storage.checkCurrentSerialInTransaction(oid, serial, self._meta)
            case Undo(transaction_id):
                self._undo(transaction_id)

    def _blob_of(self, oid: bytes) -> str | None:
        path = self.blobs.pop(oid, None)
        self._has_taken_blobs = self._has_taken_blobs or path is not None
        return path

    def _able(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] | None = getattr(self._storage, name, None)
        if method is None:
            raise Unsupported(f"{self._storage.getName()} has no {name}")
        return method

    def _undo(self, transaction_id: bytes) -> None:
        undone_tid(transaction_id)
        _, oids = self._able("undo")(transaction_id, self._meta)
        self.oids.update(dict.fromkeys(oids))
        self.resolved.update(dict.fromkeys(oids))

    def _store(self, store: Store) -> None:
        oid, serial, data = store.oid, store.serial, store.data
        newest = self._newest_tid(oid)
        if newest is not None and newest != serial:
            conflict = Conflict(oid, newest, serial, data)
            if self._resolver is None:
                self.conflicts[oid] = conflict
                return
            serial, data = newest, self._resolver.resolve(conflict)
            self.resolved[oid] = None
        try:
            path = self._blob_of(oid)
            if path is None:
                self._storage.store(oid, serial, data, "", self._meta)
            else:
                self._storage.storeBlob(oid, serial, data, path, "", self._meta)
        except ReadConflictError:
            raise
        except ConflictError as conflict:
            if not conflict.serials or self._has_taken_blobs:  # these are gone, so there is no next round
                raise
            committed, read = conflict.serials
            self.conflicts[oid] = Conflict(oid, committed, read, data)
            return
        self.oids[oid] = None


def refuse_empty(oid: bytes, data: bytes | None) -> None:
    """StorageError for a record without data, which FileStorage would write: the rest is unreadable then."""
    if data is not None and not data:
        raise StorageError(f"the data of object {oid.hex()} is empty: no record can be")


def undone_tid(transaction_id: bytes) -> bytes:
    """The tid in the id that an undo log gave to a transaction. UndoError if there is none in it."""
    try:
        tid = decodebytes(transaction_id + b"\n")
    except (Base64Error, TypeError):
        tid = b""
    if len(tid) != 8:
        raise UndoError("Invalid transaction id")
    return tid
