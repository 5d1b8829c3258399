"""The engine for databases that others write to, too: storages with instances, each with a view of its own.

RelStorage is one (ZODB's IMVCCStorage): its database may have other RelStorages on it, or another server.
Nobody tells what those commit. It has to be asked for (`poll_invalidations`), and the answer says only which
objects changed, and up to which tid.

    instance      used by                        its view is renewed
    watcher       the thread that commits        at every poll: it is what polls
    writer        the thread that commits        when a transaction is prepared
    readers       one thread at a time           when there was news since
    the storage   makes instances, packs         never: it has none

Invariants:
 1. A reader's view is never older than the newest tid that a poll has seen or that we wrote something at:
    whoever was told of a tid reads what it wrote. A database that answers with an older state (a replica that
    lags) fails the read; where it does so after a commit of ours, it can't be told what others committed.
 2. Tids are the database's, given under its own commit lock. Only a transaction that is copied brings its
    own; it is refused when the database has got so far already, which is looked at under that lock.
 3. A poll that follows a vote tells of all that changed the transaction's objects before it: from the vote on
    the database keeps them locked. So does a poll after a vote that met a conflict.
 4. The application's code is never run: conflicts go to the client, also those that the database finds.

Must not know clients: `commit.others` says what news means to them.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import zope.interface
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IMVCCStorage, IStorageCurrentRecordIteration
from ZODB.POSException import ConflictError, POSKeyError, ReadConflictError, StorageError

from zeoid.engines.resolving import Resolver
from zeoid.engines.storage import StorageEngine, Voted
from zeoid.model import NO_TID, Operation, Revision, TransactionInfo
from zeoid.ports import Commit, News, Prepared, TransactionRecord

#: What the instances are, but a client of this server is not.
_HIDDEN = (IMVCCStorage, IStorageCurrentRecordIteration)


class PolledEngine(StorageEngine):
    """One ZODB storage that has instances."""

    shared = True

    def __init__(self, storage: Any) -> None:
        super().__init__(storage, inline=False)
        self.supports_record_iteration = False
        hidden = {
            (each.__module__, each.__name__)
            for each in zope.interface.providedBy(storage).__iro__
            if any(each.isOrExtends(interface) for interface in _HIDDEN)
        }
        self.interfaces = tuple(name for name in self.interfaces if name not in hidden)
        self._watcher = storage.new_instance()
        self._writer = storage.new_instance()
        self._writer.registerDB(_Unresolving())
        self._readers = _Readers(storage.new_instance)
        #: The state that readers must have.
        self._newest = _State(0, NO_TID)
        #: The tid that `poll` told last, and what changed since; None: that can't be told.
        self._told: bytes = NO_TID
        self._changed: set[bytes] | None = set()
        self._look()
        self._told, self._changed = self._newest.tid, set()

    # Others ---------------------------------------------------------------------------------------

    def poll(self) -> News | None:
        self._look()
        self._readers.rest(self._newest)
        seen = self._newest.tid
        told, self._told = self._told, seen
        changed, self._changed = self._changed, set()
        if changed is None:
            # It says so again as long as a replica lags, and of an empty database, where nothing can change.
            if told in (seen, NO_TID):
                changed = set()
            else:
                return News(seen, None)
        return News(seen, sorted(changed)) if changed or told != seen else None

    def _look(self) -> None:
        """Renew the watcher's view; keep what is new in it until it is told."""
        changed = _renew(self._watcher)
        tid = self._watcher.lastTransaction() or NO_TID
        _rest(self._watcher)
        if changed is None or self._changed is None or tid < self._newest.tid:
            self._changed = None
        else:
            self._changed.update(changed)
        if changed or tid > self._newest.tid:
            self._newest = self._newest.after(tid)

    def last_tid(self) -> bytes:
        return self._newest.tid

    # Reading --------------------------------------------------------------------------------------

    def load_before(self, oid: bytes, tid: bytes) -> Revision | None:
        with self._readers.one(self._newest) as reader:
            # What is current is in RelStorage's own cache; for anything else it asks the database thrice.
            with contextlib.suppress(POSKeyError):
                data, start = reader.load(oid)
                if start < tid:
                    return data, start, None
            revision: Revision | None = reader.loadBefore(oid, tid)
        if revision is not None and revision[0] is None:
            raise POSKeyError(oid)
        return revision

    def load_serial(self, oid: bytes, serial: bytes) -> bytes:
        with self._readers.one(self._newest) as reader:
            data: bytes = reader.loadSerial(oid, serial)
        return data

    def current_tid(self, oid: bytes) -> bytes:
        with self._readers.one(self._newest) as reader:
            tid: bytes = reader.load(oid)[1]
        return tid

    def history(self, oid: bytes, size: int) -> list[dict[str, Any]]:
        with self._readers.one(self._newest) as reader:
            return list(reader.history(oid, size=size))

    def undo_log(self, first: int, last: int) -> Sequence[dict[str, Any]]:
        if not self.supports_undo:
            return []
        with self._readers.one(self._newest) as reader:
            return list(reader.undoLog(first, last))

    def undo_info(
        self, first: int, last: int, specification: dict[str, Any] | None
    ) -> Sequence[dict[str, Any]]:
        if not self.supports_undo:
            return []
        with self._readers.one(self._newest) as reader:
            return list(reader.undoInfo(first, last, specification))

    def open_blob(self, oid: bytes, serial: bytes) -> BinaryIO:
        with self._readers.one(self._newest) as reader:
            return self._blob_files.open(oid, serial, reader)

    def iterate(self, start: bytes | None, stop: bytes | None) -> Iterator[TransactionRecord]:
        """An iterator may stay open for long, so it has an instance of its own."""
        instance = self._storage.new_instance()
        try:
            _renew(instance)
            # ZODB's StorageStopIteration has no value, and "yield from" crashes the interpreter over that.
            for transaction in instance.iterator(start, stop):  # noqa: UP028
                yield transaction
        finally:
            instance.release()

    def new_oids(self, count: int) -> list[bytes]:
        with self._readers.one(self._newest) as reader:
            return [reader.new_oid() for _ in range(count)]

    # Writing --------------------------------------------------------------------------------------

    def newest_tid(self, oid: bytes) -> bytes | None:
        try:
            tid: bytes = self._writer.load(oid)[1]
        except POSKeyError:
            return None
        return tid

    def prepare(self, tid: bytes | None, info: TransactionInfo, operations: Iterable[Operation]) -> Prepared:
        _renew(self._writer)
        return super().prepare(info.tid, info, operations)

    def _begin(self, meta: TransactionMetaData, tid: bytes | None, info: TransactionInfo) -> None:
        if tid is None:
            self._writer.tpc_begin(meta)
            return
        self._refuse_old(tid)
        super()._begin(meta, tid, info)
        self._refuse_old(tid)  # the lock was waited for

    def _refuse_old(self, tid: bytes) -> None:
        self._look()
        if tid <= self._newest.tid:
            raise StorageError("a transaction can't be copied before later ones: its tid is too old")

    def commit(self, batch: Sequence[Commit]) -> Sequence[bytes] | None:
        tids = super().commit(batch)
        for one, tid in zip(batch, tids or (), strict=True):
            assert isinstance(one.prepared, Voted)
            # A transaction that writes nothing leaves no trace that a poll could see.
            self._newest = self._newest.after(tid if one.prepared.writes else NO_TID)
        return tids

    def resolve_conflicts(self) -> None:
        # The writer's view has what was committed since the last poll.
        self._resolver = Resolver(self._writer.loadSerial)
        self.resolves_conflicts = True

    def close(self) -> None:
        self._readers.close()
        for instance in (self._watcher, self._writer):
            instance.release()
        super().close()


class _State:
    """What a view must have: it was renewed since *number* was counted, and shows *tid*."""

    __slots__ = ("number", "tid")

    def __init__(self, number: int, tid: bytes) -> None:
        self.number = number
        self.tid = tid

    def after(self, tid: bytes) -> "_State":
        return _State(self.number + 1, max(self.tid, tid))


class _Readers:
    """Instances for reading. There are as many as threads that read at a time."""

    def __init__(self, new_instance: Callable[[], Any]) -> None:
        self._new_instance = new_instance
        #: Each with the number of the state that it has, None without a view; the one used last at the end.
        self._idle: deque[tuple[Any, int | None]] = deque()

    @contextlib.contextmanager
    def one(self, newest: _State) -> Iterator[Any]:
        """An instance that has the state *newest*, or a newer one, in its view."""
        try:
            reader, has = self._idle.pop()
        except IndexError:
            reader, has = self._new_instance(), None
        try:
            if has is None or has < newest.number:
                has = None
                _renew(reader)
                if (reader.lastTransaction() or NO_TID) < newest.tid:
                    raise ReadConflictError("the database has an older state than it had before")
                has = newest.number
            yield reader
        except POSKeyError:
            raise
        except BaseException:
            has = None  # whatever it was, the view may have gone with it
            raise
        finally:
            self._idle.append((reader, has))

    def rest(self, newest: _State) -> None:
        """Give up the views that are older: a database keeps for them what it could clean away."""
        for _ in range(len(self._idle)):
            try:
                reader, has = self._idle.popleft()
            except IndexError:
                return
            if has is not None and has < newest.number:
                has = None
                _rest(reader)
            self._idle.appendleft((reader, has)) if has is None else self._idle.append((reader, has))

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[0].release()


class _Unresolving:
    """Stands where a database would: asked for a record to resolve a conflict with, it says that it can't."""

    def untransform_record_data(self, data: bytes) -> bytes:
        raise ConflictError("conflicts are resolved by clients")

    def transform_record_data(self, data: bytes) -> bytes:
        return data


def _renew(instance: Any) -> Iterable[bytes] | None:
    """Have an instance see the newest state; what changed since it last did, None if that can't be told."""
    instance.sync()
    changed: Iterable[bytes] | None = instance.poll_invalidations()
    return changed


def _rest(instance: Any) -> None:
    """Have an instance give up its view, if it can. It must be renewed before it is used again."""
    if hasattr(instance, "afterCompletion"):
        instance.afterCompletion()
