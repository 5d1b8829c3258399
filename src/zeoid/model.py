"""The words of the domain, small and frozen. Owns no behaviour beyond what a value needs.

An oid names an object, a tid names a transaction and, on a record, the revision that it wrote. Both are
eight bytes, big-endian, so that byte order is number order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NewType, TypeVar, dataclass_transform

Oid = NewType("Oid", bytes)
Tid = NewType("Tid", bytes)

#: Before every transaction.
NO_TID = Tid(b"\0" * 8)
#: After every transaction: the largest tid that storages take (a signed 64-bit number).
MAX_TID = Tid(b"\x7f" + b"\xff" * 7)

#: The answer to "load before": data, its tid, and the tid of the next revision or None while it is current.
Revision = tuple[bytes, bytes, bytes | None]

#: A transaction whose changes somebody knows, with all before it; and an object that it wrote, if known.
Applied = tuple[bytes, bytes | None]


@dataclass(slots=True)
class CacheFigures:
    """What an object cache holds, and did."""

    #: What its revisions take, approximately, and what they may take.
    bytes: int
    size_bytes: int
    #: Revisions that were removed for others' sake, since the cache was made.
    evictions: int
    #: Revisions that only this process has so far, of a cache that it shares.
    waiting: int = 0


_Class = TypeVar("_Class")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[_Class]) -> type[_Class]:
    """Make a class one of values, which are equal when their fields are, and never change.

    That they don't is seen to by mypy. One that is frozen at run time as well takes four times as long to
    make, and a dozen are made for each commit.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


def tid_after(tid: bytes) -> Tid:
    """The smallest tid greater than *tid*: "before this one" includes *tid* itself."""
    return Tid((int.from_bytes(tid, "big") + 1).to_bytes(8, "big"))


def tid_before(tid: bytes) -> Tid:
    """The greatest tid less than *tid*, which must not be zero."""
    return Tid((int.from_bytes(tid, "big") - 1).to_bytes(8, "big"))


@frozen
class TransactionInfo:
    """What a transaction says of itself.

    `tid` and `status` are given only by those who copy transactions from elsewhere.
    """

    user: bytes
    description: bytes
    extension: dict[str, Any]
    tid: bytes | None = None
    status: str = " "


@frozen
class Store:
    """Write *data* as the next revision of *oid*, whose current revision the writer knew as *serial*."""

    oid: bytes
    serial: bytes
    data: bytes


@frozen
class Restore:
    """Write *data* (None: the object ceases to be) without a check, as a copy of another storage's record.

    *same_as* is the tid of an earlier revision with the same data, if there is one.
    """

    oid: bytes
    data: bytes | None
    same_as: bytes | None


@frozen
class Delete:
    """Delete *oid*, known at *serial* (external garbage collection)."""

    oid: bytes
    serial: bytes


@frozen
class CheckCurrent:
    """The transaction depends on *oid* still being at *serial*, without writing it."""

    oid: bytes
    serial: bytes


@frozen
class Undo:
    """Reverse a whole transaction. *transaction_id* is as the undo log gave it."""

    transaction_id: bytes


@dataclass(slots=True, eq=False)
class StagedBlob:
    """A file that will be a blob, and that nobody else has: whoever holds this owes a discard or a commit."""

    #: Random, of sixteen bytes.
    name: bytes
    size_bytes: int


@frozen
class AttachBlob:
    """The record of *oid* that the same transaction stores or restores has this blob. The last one counts."""

    oid: bytes
    blob: StagedBlob


Operation = Store | Restore | AttachBlob | Delete | CheckCurrent | Undo


@frozen
class Conflict:
    """A store, or an undo, that met a newer revision; the client is asked to resolve it.

    What it resolves is the change from revision *read* to *data*, on top of revision *committed*. (If an
    earlier undo of the same transaction changed the object already, these change places: *data* is what that
    one made, *committed* the revision before the undone one.)
    """

    oid: bytes
    committed: bytes
    read: bytes
    data: bytes
    #: The tid of the current revision, where *committed* is another one.
    current: bytes = b""
    #: Which of the transaction's operations it was; -1: the store of this object.
    position: int = -1


@dataclass(frozen=True, slots=True)
class UndoPrefix:
    """Matches a user name by the elements of the path that it begins with.

    Zope's undo form sends one (its class is `ZopeUndo.Prefix.Prefix`) in the specification of `undoInfo`.
    A user name is the path of a user folder, a space and the user's id.
    """

    path: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, bytes):
            other = other.decode("utf-8", "replace")
        if not isinstance(other, str):
            return NotImplemented
        elements = other.split("/")
        elements[-1] = elements[-1].rpartition(" ")[0] if " " in elements[-1] else elements[-1]
        return tuple(elements[: len(self.path)]) == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    @classmethod
    def of(cls, elements: Iterable[str]) -> "UndoPrefix":
        return cls(tuple(elements))
