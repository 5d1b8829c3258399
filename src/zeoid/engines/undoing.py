"""What undoing a transaction writes, and what copying a record does: found by looking, without writing.

Owns the rules by which an object's earlier data becomes its data again. They are those of FileStorage's undo
and restore, which a test compares; only conflicts are told instead of being resolved, and blobs are not taken
for each other because their records are equal.

    the object now                                what is written
    is as the undone transaction left it          its data from before that; it ceases to be if there was none
    was written since, and holds the same data    the same (of a blob: is a reference to the same record)
    holds other data, and had some before         nothing yet: a Conflict, which its class may resolve
    holds other data, and had none before         UndoError
    is gone, or was gone then, by other records   UndoError
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from ZODB.blob import is_blob_record
from ZODB.POSException import MultipleUndoErrors, UndoError

from zeoid.engines.records import DataFile, RecordHeader
from zeoid.model import Conflict, frozen

#: (oid, data or None if the object ceases to be, tid of an earlier revision that is the same or None)
Written = tuple[bytes, bytes | None, bytes | None]


class Pending(NamedTuple):
    """What an earlier operation of the same transaction writes."""

    data: bytes | None
    same_as: bytes | None


@frozen
class Undone:
    """The records that an undo writes, and the objects for which that is up to their class."""

    records: list[Written]
    conflicts: list[Conflict]


def undo(
    file: DataFile, tid: bytes, pending: Mapping[bytes, Pending], unresolved: Collection[bytes] = ()
) -> Undone:
    """Reverse the transaction *tid*. UndoError or MultipleUndoErrors if that can't be.

    *pending*: what earlier operations of the same transaction write. *unresolved*: the objects for which one
    of them met a conflict; they are left out, as they can be undone further only when that is resolved.

    A conflict with what is only *pending* has the sides of the merge change places: see `Conflict`.
    """
    return file.steadily(lambda: _undo_transaction(file, tid, pending, unresolved))


def _undo_transaction(
    file: DataFile, tid: bytes, pending: Mapping[bytes, Pending], unresolved: Collection[bytes]
) -> Undone:
    found = file.transaction(tid)
    if found is None:
        raise UndoError("Invalid transaction id")
    status, headers = found
    if status != b" ":  # a pack keeps some records of a transaction only
        raise UndoError("non-undoable transaction")
    records: list[Written] = []
    conflicts: list[Conflict] = []
    problems: list[tuple[bytes, UndoError]] = []
    for header in _last_of_each(headers):
        oid = header.oid
        try:
            if oid in unresolved:
                continue
            outcome = _undo_record(file, header, pending.get(oid))
        except UndoError as problem:
            problems.append((oid, problem))
        else:
            if isinstance(outcome, Conflict):
                conflicts.append(outcome)
            else:
                records.append(outcome)
    if problems:
        raise MultipleUndoErrors(problems)
    return Undone(records, conflicts)


def _last_of_each(headers: list[RecordHeader]) -> list[RecordHeader]:
    """A transaction may write an object more than once; the last record counts."""
    last = {header.oid: header.position for header in headers}
    return [header for header in headers if last[header.oid] == header.position]


def _undo_record(file: DataFile, undone: RecordHeader, pending: Pending | None) -> Written | Conflict:
    oid = undone.oid
    before = file.previous(undone)
    newest = file.newest(oid)
    if newest is None:
        raise UndoError("the object is gone", oid)
    if _is_in_force(newest, pending, undone) or _holds_same(file, newest, pending, undone):
        if before is None:
            return oid, None, None
        # Also where it did not exist then: undoing this undo depends on what it refers to.
        return oid, file.data(before), before.tid
    if before is None:
        raise UndoError("Can't undo an add transaction followed by conflicting transactions.", oid)
    data = file.data(before)
    if data is None:
        raise UndoError("_loadBack() failed", oid)
    if pending is None:
        return Conflict(oid, newest.tid, undone.tid, data)
    assert pending.data is not None  # `_holds_same` has refused that
    return Conflict(oid, before.tid, undone.tid, pending.data, newest.tid)


def _is_in_force(newest: RecordHeader, pending: Pending | None, undone: RecordHeader) -> bool:
    """Whether the object's state is the undone record's, directly or by one reference."""
    if pending is not None:
        return pending.same_as == undone.tid
    return undone.position in (newest.position, newest.back)


def _holds_same(file: DataFile, newest: RecordHeader, pending: Pending | None, undone: RecordHeader) -> bool:
    """Whether the object's data is what the undone record wrote. UndoError if one of them has none."""
    now = file.data(newest) if pending is None else pending.data
    then = file.data(undone)
    if now is None or then is None:
        raise UndoError("_loadBack() failed", undone.oid)
    if now == then and is_blob_record(now):
        # All records of blobs are the same, and what they are of is not.
        return _source(file, newest, pending) == _source(file, undone, None)
    return now == then


def _source(file: DataFile, header: RecordHeader, pending: Pending | None) -> RecordHeader | None:
    """The record whose data, and blob, it has; None for one that is still to be written."""
    if pending is None:
        return file.source(header)
    earlier = None if pending.same_as is None else file.revision(header.oid, pending.same_as)
    return None if earlier is None else file.source(earlier)


def restore(
    file: DataFile, oid: bytes, data: bytes | None, same_as: bytes | None, pending: Mapping[bytes, Pending]
) -> Written:
    """What copying a record writes: a reference to *same_as* where that revision is here with the same data.

    Without *data* its data is taken, or the object ceases to be, as it also does where that revision is not
    here: *same_as* is a hint only. What is *pending* can't be referred to, so it does not matter.
    """
    return file.steadily(lambda: _restore(file, oid, data, same_as))


def _restore(file: DataFile, oid: bytes, data: bytes | None, same_as: bytes | None) -> Written:
    same = None if same_as is None else file.revision(oid, same_as)
    if same is None:
        return oid, data, None
    known = file.data(same)
    if data is None or data == known:
        return oid, known, same_as
    return oid, data, None
