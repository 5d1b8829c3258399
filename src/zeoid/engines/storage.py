"""The engine that adapts a ZODB storage: MappingStorage, DemoStorage, any other with two-phase commit.

Owns the translation between ZODB's storage methods and the Engine protocol, and how stores that conflict are
found before the storage sees them: resolving a conflict means running the application's code, which is the
client's business unless it was asked for here. (Undo is the exception: the storage resolves its conflicts
where it can import the classes.) A storage must bear to be read by several threads, as ZODB's do. Must not
know connections, replies or the order of transactions.

    a storage that        is served by         reads                prepares and commits
    is a FileStorage      FileStorageEngine    on the event loop    see there
    lives in memory       StorageEngine        on the event loop    on the event loop
    may have to wait      StorageEngine        in several threads   in one thread, in order
    has instances to be   PolledEngine         in several threads,  in one thread, in order, together with
      read (IMVCCStorage)                        with instances       the polls for what others committed

One transaction is prepared at a time in all of them but the first. (`opening` says which one is taken.)
"""

import contextlib
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

from zeoid.engines.packing import UNWATCHED
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
from zeoid.ports import (
    BlobWriter,
    Commit,
    News,
    Outcomes,
    PackProgress,
    PackStep,
    Prepared,
    TransactionRecord,
)


class StorageEngine:
    """One ZODB storage, opened by whoever makes the engine and closed by `close`."""

    exclusive = True
    can_cancel_pack = False
    shared = False

    def __init__(self, storage: Any, *, inline: bool = True) -> None:
        self.inline = inline
        self._storage: Any = storage
        self._blob_files = StorageBlobs(storage)
        #: What is written to.
        self._writer: Any = storage
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
            if interface is not IBlobStorageRestoreable
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

    def load_before_many(
        self, oids: Sequence[bytes], tid: bytes, most_bytes: int
    ) -> Sequence[Revision | None]:
        revisions: list[Revision | None] = []
        left_bytes = most_bytes
        for oid in oids:
            revision: Revision | None = None
            with contextlib.suppress(POSKeyError):
                revision = self.load_before(oid, tid)
            revisions.append(revision)
            if revision is not None:
                left_bytes -= len(revision[0])
                if left_bytes <= 0:
                    break
        return revisions

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
            tid: bytes = self._writer.getTid(oid)
        except POSKeyError:
            return None
        return tid

    def history(self, oid: bytes, size: int) -> list[dict[str, Any]]:
        return list(self._storage.history(oid, size=size))

    def record_iternext(self, following: bytes | None) -> tuple[bytes, bytes, bytes, bytes | None]:
        if not hasattr(self._storage, "record_iternext"):
            raise Unsupported(f"{self._storage.getName()} can't list its objects")
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
        meta = TransactionMetaData(info.user, info.description, info.extension)
        writer = self._writer
        try:
            # A storage's lock may be held even if this fails, until the transaction is aborted.
            self._begin(meta, tid, info)
            writing = _Writing(writer, meta, tid, self.newest_tid, self._resolver)
            operations = list(operations)
            attached = {each.oid: each.blob for each in operations if isinstance(each, AttachBlob)}
            # The storage is given blobs only when no conflict is left that can be found before.
            if not attached or not writing.meets_conflicts(operations):
                writing.blobs = {oid: self._blob_files.path(blob) for oid, blob in attached.items()}
                for operation in operations:
                    writing.apply(operation)
                writing.check_blobs()
            if not writing.conflicts:
                writing.vote()
            conflicts = list(writing.conflicts.values())
        except BaseException:
            writer.tpc_abort(meta)
            raise
        if conflicts:
            writer.tpc_abort(meta)
            return Prepared(conflicts)
        if attached:  # the storage has those that count
            self._blob_files.discard(each.blob for each in operations if isinstance(each, AttachBlob))
        return Voted(meta, list(writing.oids), list(writing.resolved), writing.writes)

    def _begin(self, meta: TransactionMetaData, tid: bytes | None, info: TransactionInfo) -> None:
        assert tid is not None
        if info.status == " ":
            self._writer.tpc_begin(meta, tid)
        else:
            self._writer.tpc_begin(meta, tid, info.status)

    def commit(self, batch: Sequence[Commit]) -> Sequence[bytes] | None:
        tids = []
        for one in batch:
            assert isinstance(one.prepared, Voted)
            tids.append(self._writer.tpc_finish(one.prepared.meta))
        return tids

    def abandon(self, prepared: Prepared) -> None:
        assert isinstance(prepared, Voted)
        self._writer.tpc_abort(prepared.meta)

    def poll(self) -> News | None:
        return None

    def outcomes(self) -> Outcomes:
        return Outcomes(self.last_tid())

    def checkpoint(self) -> bytes:
        return self.last_tid()

    def pack(self, time: float, progress: PackProgress = UNWATCHED) -> None:
        if not self.can_cancel_pack:
            progress.report(PackStep("packing"))
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


class Voted(Prepared):
    """A transaction that the storage has voted on."""

    __slots__ = ("meta", "writes")

    def __init__(
        self, meta: TransactionMetaData, oids: Sequence[bytes], resolved: Sequence[bytes], writes: bool
    ) -> None:
        self.meta = meta
        #: Whether there will be records of it. Where there is no history a deletion leaves none.
        self.writes = writes
        super().__init__((), oids, resolved)


class _Writing:
    """The operations of one transaction on their way into the storage."""

    def __init__(
        self,
        storage: Any,
        meta: TransactionMetaData,
        tid: bytes | None,
        newest_tid: Callable[[bytes], bytes | None],
        resolver: Resolver | None,
    ) -> None:
        self._newest_tid = newest_tid
        self._resolver = resolver
        self._storage = storage
        self._meta = meta
        self._tid = tid
        self.oids: dict[bytes, None] = {}
        #: What was given to the storage, which may yet find at the vote that it conflicts.
        self._stored: dict[bytes, bytes] = {}
        self._deleted = 0
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
                if self._tid is None:
                    raise Unsupported("a record can only be restored in a transaction that brings its tid")
                path = self._blob_of(oid) if data is not None else None
                if path is None:
                    self._able("restore")(oid, self._tid, data, "", same_as, self._meta)
                else:
                    self._able("restoreBlob")(oid, self._tid, data, path, same_as, self._meta)
                self.oids[oid] = None
            case Delete(oid, serial):
                self._able("deleteObject")(oid, serial, self._meta)
                self.oids[oid] = None
                self._deleted += 1
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
        undone = self._able("undo")(transaction_id, self._meta)
        if undone is not None:  # RelStorage tells at the vote
            self._changed(undone[1])

    @property
    def writes(self) -> bool:
        return len(self.oids) > self._deleted

    def _changed(self, oids: Iterable[bytes]) -> None:
        self.oids.update(dict.fromkeys(oids))
        self.resolved.update(dict.fromkeys(oids))

    def vote(self) -> None:
        try:
            self._changed(self._storage.tpc_vote(self._meta) or ())
        except ReadConflictError:
            raise
        except ConflictError as conflict:
            if self._has_taken_blobs or not conflict.serials or conflict.oid not in self._stored:
                raise  # blobs that were taken are gone, so there is no next round
            committed, read = conflict.serials
            self.conflicts[conflict.oid] = Conflict(conflict.oid, committed, read, self._stored[conflict.oid])

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
            if self._has_taken_blobs or not conflict.serials:  # as at the vote
                raise
            committed, read = conflict.serials
            self.conflicts[oid] = Conflict(oid, committed, read, data)
            return
        self.oids[oid] = None
        self._stored[oid] = data


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
