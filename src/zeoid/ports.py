"""What the layers above and below agree on: the engine behind a storage server, the object cache, the clock.

Owns no behaviour. An adapter is named after what it adapts and lives in `engines` or `cache`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

from zeoid.model import (
    Applied,
    CacheFigures,
    Conflict,
    Operation,
    Revision,
    StagedBlob,
    TransactionInfo,
    frozen,
)


class Clock(Protocol):
    """Time as an argument."""

    def time(self) -> float:
        """Seconds since the epoch: what tids are made of."""

    def monotonic(self) -> float:
        """Seconds that never go back: what deadlines are made of."""


class TransactionRecord(Protocol):
    """One transaction as an engine iterates over it, with its records as (oid, tid, data, same_as)."""

    tid: bytes
    status: str
    user: bytes
    description: bytes
    extension: dict[str, Any]

    def __iter__(self) -> Iterator[Any]: ...


class BlobWriter(Protocol):
    """A blob that arrives. Its methods take long, and are called by one thread at a time.

    Whoever has one owes `complete` or `abandon`, the latter also after an error.
    """

    def write(self, data: bytes | memoryview) -> None:
        """Append *data*, which is not kept. OSError: the disk is full, or failed."""

    def complete(self) -> StagedBlob:
        """Its content is durable now, for a transaction to attach. OSError."""

    def abandon(self) -> None:
        """Give it up; without effect when it is complete."""


class Engine(Protocol):
    """Where a storage server keeps one storage.

    Reading methods may be called by several threads at once, and while transactions are prepared and
    committed. A transaction is prepared, then committed or abandoned. Any number may be prepared at once, as
    long as no object is written by two of them (whoever calls sees to that), except where `exclusive` says
    that there can be one only. `commit` and `poll` are called by one thread at a time, which is the one that
    prepares, too, where the engine is exclusive and not `inline`.
    All reading raises ZODB's POSKeyError for what does not exist.
    """

    name: str
    #: Whether only one transaction can be prepared at a time; its tid must then be known at `prepare`.
    exclusive: bool
    #: Whether reading, and preparing what is small, is over so soon that an event loop can wait for it.
    inline: bool
    #: Whether others may write to the same database beside this server. `poll` tells what they committed,
    #: and tids are the engine's: it is exclusive, and gives them at `commit`.
    shared: bool
    read_only: bool
    supports_undo: bool
    #: Whether the storage keeps blobs, which are not served.
    has_blobs: bool
    #: Whether `record_iternext` works.
    supports_record_iteration: bool
    #: (module, name) of every interface that the storage provides.
    interfaces: tuple[tuple[str, str], ...]

    @property
    def failure(self) -> str:
        """What went wrong in the background, if anything did: the engine must not be used then."""

    @property
    def resolves_conflicts(self) -> bool:
        """Whether conflicts are resolved in the engine, instead of being told."""

    def resolve_conflicts(self) -> None:
        """From now on resolve conflicts in the engine, which runs the application's code there."""

    def last_tid(self) -> bytes:
        """The newest tid, durable or not."""

    def load_before(self, oid: bytes, tid: bytes) -> Revision | None:
        """The newest revision of *oid* before *tid*; None when the object began later."""

    def load_before_many(
        self, oids: Sequence[bytes], tid: bytes, most_bytes: int
    ) -> "Sequence[Revision | None]":
        """As `load_before` for each, None also for an object that there is not.

        Ends early, but not before the first object, when there are *most_bytes* of data, or when it took as
        long as reading so much."""

    def load_serial(self, oid: bytes, serial: bytes) -> bytes:
        """The data of the revision that transaction *serial* wrote."""

    def current_tid(self, oid: bytes) -> bytes:
        """The tid of the current revision."""

    def history(self, oid: bytes, size: int) -> list[dict[str, Any]]:
        """The newest *size* revisions, as ZODB's IStorage.history describes them."""

    def record_iternext(self, following: bytes | None) -> tuple[bytes, bytes, bytes, bytes | None]:
        """(oid, tid, data, next oid or None) of the record at *following*, or of the first one."""

    def undo_log(self, first: int, last: int) -> Sequence[dict[str, Any]]: ...

    def undo_info(
        self, first: int, last: int, specification: dict[str, Any] | None
    ) -> Sequence[dict[str, Any]]: ...

    def iterate(self, start: bytes | None, stop: bytes | None) -> Iterator[TransactionRecord]:
        """The transactions from *start* to *stop*, both included, oldest first."""

    def last_invalidations(self, count: int) -> list[tuple[bytes, Sequence[bytes]]]:
        """(tid, oids) of up to *count* newest transactions, oldest first; may be empty."""

    def stage_blob(self, size_bytes: int | None = None) -> BlobWriter:
        """Begin to take a blob, *size_bytes* long if that is known. OSError: there is no room for it.

        Here and below: Unsupported if the storage keeps no blobs."""

    def take_shared_blob(self, oid: bytes, filename: str) -> StagedBlob:
        """A file that a client left in the directory of the object's blobs, which it shares. StorageError if
        there is no such file, or it is none that may be taken; OSError. Takes long."""

    def discard_blobs(self, blobs: Sequence[StagedBlob]) -> None:
        """Remove what no transaction will have; what isn't there any more doesn't matter. Takes long."""

    def open_blob(self, oid: bytes, serial: bytes) -> BinaryIO:
        """The blob of the revision that transaction *serial* wrote. Once open it is there to be read."""

    def new_oids(self, count: int) -> list[bytes]:
        """Oids that were never handed out before."""

    def size_bytes(self) -> int: ...

    def count(self) -> int:
        """The number of objects, approximately."""

    def prepare(
        self, tid: bytes | None, info: TransactionInfo, operations: Iterable[Operation]
    ) -> "Prepared":
        """Do everything that can fail. Afterwards `commit` or `abandon` follows, unless this raised or
        found conflicts; then nothing of the transaction is left. *tid* is given to exclusive engines that
        are not shared.

        What was prepared owns the blobs that were attached. If this raised or found conflicts, they are the
        caller's as before."""

    def commit(self, batch: "Sequence[Commit]") -> Sequence[bytes] | None:
        """Make prepared transactions durable, in the order of their tids. If this raises, the engine must
        not be used again: what is on the disk can't be known. Except where it is shared: there its tids are
        the result, and if it raises, a later `poll` will tell whether something was committed."""

    def abandon(self, prepared: "Prepared") -> None:
        """Forget a prepared transaction."""

    def poll(self) -> "News | None":
        """Where the engine is shared: what was committed since the last poll, by others and by us."""

    def outcomes(self) -> "Outcomes":
        """What is known, when the engine is opened, of transactions that were committed before."""

    def checkpoint(self) -> bytes:
        """Have everything committed so far in the storage's own files, durable there; the tid reached."""

    @property
    def can_cancel_pack(self) -> bool:
        """Whether a pack tells how far it has come, and heeds that it is to be given up."""

    def pack(self, time: float, progress: "PackProgress") -> None:
        """Remove what is not needed to read the state at *time* (seconds since the epoch) and later.

        If *progress* raises PackCancelled, that is passed on, and the storage is as it was before.
        """

    def close(self) -> None: ...


@frozen
class PackStep:
    """How far a pack has come."""

    #: What it is doing: a word for people.
    phase: str
    #: Of its time, as far as that can be known, and never less than before. None if nothing is known.
    percent: float | None = None
    #: Objects found so far that are to stay, and those that there are.
    objects: int = 0
    objects_total: int = 0
    #: How far the file has been gone through in this phase, and its size.
    bytes: int = 0
    bytes_total: int = 0


class PackProgress(Protocol):
    """Whom an engine tells how its pack comes along, from the thread that packs."""

    def report(self, step: PackStep) -> None:
        """Raises PackCancelled if the pack is to be given up."""

    def begin_replacing(self) -> None:
        """From now on the pack can't be given up. Raises PackCancelled if that was asked for before."""


class Prepared:
    """What `Engine.prepare` found: conflicts to resolve, or what will be written. Engines add to it."""

    __slots__ = ("blobs", "conflicts", "oids", "resolved", "size_bytes")

    def __init__(
        self,
        conflicts: Sequence[Conflict] = (),
        oids: Sequence[bytes] = (),
        resolved: Sequence[bytes] = (),
        size_bytes: int = 0,
    ) -> None:
        #: If there are any, nothing was prepared.
        self.conflicts = conflicts
        #: The objects that the transaction writes.
        self.oids = oids
        #: Those whose data became another than the client knows, by undo or by resolution in the storage.
        self.resolved = resolved
        #: What it will take in the storage, approximately.
        self.size_bytes = size_bytes
        #: What it has of blobs; if there is something, abandoning it takes long.
        self.blobs: tuple[object, ...] = ()


@frozen
class Commit:
    """One transaction of a batch: its tid, and its client-made id (empty if the client made none)."""

    tid: bytes
    id: bytes
    prepared: Prepared


@frozen
class News:
    """A database went on to *tid*. *oids*: what changed since the last news, None if that can't be told."""

    tid: bytes
    oids: Sequence[bytes] | None


@frozen
class Outcomes:
    """The client-made ids of the latest transactions that were committed, oldest first, with their tids.

    After *floor* every one is known. An engine that keeps none has its last tid there.
    """

    floor: bytes
    committed: Sequence[tuple[bytes, bytes]] = ()


class ObjectCache(Protocol):
    """Revisions of objects on the client's side.

    `load_before` may be called by any thread at any time; the others are called by one thread at a time. What
    is told in order is what makes current revisions end; a cache that several processes share may have heard
    it from another one before.
    """

    def applied(self) -> Applied:
        """The newest tid whose changes the cache was told, with all before, by this process or by others."""

    def load_before(self, oid: bytes, tid: bytes, applied: bytes) -> Revision | None:
        """The newest revision of *oid* before *tid*, or None if the cache does not know it for sure.

        *applied* is the newest tid that this process told the cache of: a current revision answers only up
        to it.
        """

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        """Keep a revision that is current (*end* None) or was overwritten at *end*."""

    def store_many(self, revisions: Iterable[tuple[bytes, Revision]]) -> None:
        """`store` each: pairs of an oid and (data, start, end)."""

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """*tid*, the next transaction after all that was told, wrote *oids*."""

    def caught_up(self, since: bytes, tid: bytes, oids: Iterable[bytes]) -> None:
        """The transactions after *since* up to *tid* wrote *oids* and nothing else; which of them wrote what
        isn't known."""

    def started_over(self, tid: bytes) -> None:
        """It isn't known what the transactions up to *tid* wrote. History stays true."""

    def forget(self, oids: Iterable[bytes]) -> None:
        """The current revisions of *oids* can't be trusted."""

    def written_by(self, tid: bytes) -> bytes | None:
        """An object that the transaction *tid* wrote, if the cache has one that is current."""

    def figures(self) -> CacheFigures: ...

    def clear(self) -> None:
        """Nothing is true any more: the database is another one."""

    def close(self) -> None:
        """Without effect on what other processes share."""
