"""The operations of one transaction, becoming what it writes to a data file: found by looking only.

Owns which record of an object counts, which blob belongs to it, and what is a conflict. Writes nothing, and
promises nothing: that is `filestorage`'s business.
"""

from dataclasses import replace

from ZODB.POSException import (
    ConflictError,
    MultipleUndoErrors,
    POSKeyError,
    ReadConflictError,
    StorageError,
    UndoError,
)

from zeoid.engines.journal import Record
from zeoid.engines.records import DataFile
from zeoid.engines.resolving import Resolver
from zeoid.engines.storage import StorageEngine, refuse_empty, undone_tid
from zeoid.engines.undoing import Pending, restore, undo
from zeoid.model import (
    AttachBlob,
    CheckCurrent,
    Conflict,
    Delete,
    Operation,
    Restore,
    StagedBlob,
    Store,
    Undo,
)


class Writing:
    """The operations of one transaction, becoming what it writes."""

    def __init__(self, engine: StorageEngine, file: DataFile, resolver: Resolver | None) -> None:
        self._engine = engine
        self._file = file
        self._resolver = resolver
        self.records: dict[bytes, Record] = {}
        #: Those whose data is another than the client knows.
        self.resolved: dict[bytes, None] = {}
        #: What the client must resolve, if anything: then nothing is written.
        self.conflicts: dict[bytes, Conflict] = {}
        #: What the client staged for records, for those that count and for those that don't.
        self.attached: dict[bytes, StagedBlob] = {}
        self.superseded: list[StagedBlob] = []
        #: For records that an undo writes: revisions of the object, in one of which their blob may be found.
        self.revived: dict[bytes, tuple[bytes, ...]] = {}

    def apply(self, operation: Operation, position: int) -> None:
        match operation:
            case Store():  # not taken apart by the pattern, which takes longer: most are stores
                oid, serial, data = operation.oid, operation.serial, operation.data
                refuse_empty(oid, data)
                newest = self._engine.newest_tid(oid)
                if newest is not None and newest != serial:
                    self._meet(Conflict(oid, newest, serial, data, position=position))
                else:
                    self.conflicts.pop(oid, None)  # an undo's, which its client has resolved by this
                    self.records[oid] = Record(oid, data)
            case Restore(oid, restored, same_as):
                refuse_empty(oid, restored)
                self.records[oid] = Record(*restore(self._file, oid, restored, same_as, self._pending()))
            case Delete(oid, serial):
                current = self._engine.newest_tid(oid)
                if current is None:
                    raise POSKeyError(oid)
                if current != serial:
                    raise ConflictError(oid=oid, serials=(current, serial))
                self.records[oid] = Record(oid, None, None)
                self._supersede(oid)
            case AttachBlob(oid, blob):
                self._supersede(oid)
                self.attached[oid] = blob
            case CheckCurrent(oid, serial):
                current = self._engine.current_tid(oid)
                if current != serial:
                    raise ReadConflictError(oid=oid, serials=(current, serial))
            case Undo(transaction_id):
                self._undo(undone_tid(transaction_id), position)

    def _undo(self, tid: bytes, position: int) -> None:
        undone = undo(self._file, tid, self._pending(), self.conflicts)
        for record in undone.records:
            self.records[record[0]] = Record(*record)
            self.resolved[record[0]] = None
            self._supersede(record[0])
            self._revive(*record)
        for conflict in undone.conflicts:
            self.resolved[conflict.oid] = None
            try:
                self._meet(replace(conflict, position=position))
            except ConflictError:
                problem = UndoError("Some data were modified by a later transaction", conflict.oid)
                # As FileStorage says it: of all errors of an undo, stock clients know this one.
                raise MultipleUndoErrors([(conflict.oid, problem)]) from None

    def _meet(self, conflict: Conflict) -> None:
        oid = conflict.oid
        if self._resolver is None:
            self.conflicts[oid] = conflict
        else:
            self.records[oid] = Record(oid, self._resolver.resolve(conflict), None)
            self.resolved[oid] = None

    def _pending(self) -> dict[bytes, Pending]:
        return {oid: Pending(record.data, record.same_as) for oid, record in self.records.items()}

    # Blobs ----------------------------------------------------------------------------------------

    def check_blobs(self) -> None:
        """StorageError if there is a blob without a record, when there are no more operations."""
        for oid in self.attached:
            record = self.records.get(oid)
            if record is None or record.data is None:
                raise StorageError(f"there is a blob for object {oid.hex()}, but no record")

    def _supersede(self, oid: bytes) -> None:
        """What was attached to earlier records of the object does not count."""
        self.revived.pop(oid, None)
        blob = self.attached.pop(oid, None)
        if blob is not None:
            self.superseded.append(blob)

    def _revive(self, oid: bytes, data: bytes | None, same_as: bytes | None) -> None:
        if data is None or same_as is None:
            return

        def source() -> tuple[bytes, ...]:
            revision = self._file.revision(oid, same_as)
            found = None if revision is None else self._file.source(revision)
            return (same_as,) if found is None else (same_as, found.tid)

        self.revived[oid] = self._file.steadily(source)
