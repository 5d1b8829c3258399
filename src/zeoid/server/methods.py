"""What a server does for each method of the protocol. Pure dispatch: a method's work is done elsewhere.

`METHODS` has a function for every row of `wire.messages.SERVER_METHODS`. Each takes the session and the
checked arguments, and returns the value to reply with, `LATER` (the hosted storage answers), or
work that must not hold up the event loop (`Slow`, `Read`, `Download`, `Pack`).

Long because it has a function for every method of the protocol.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from ZODB.POSException import ReadOnlyError, StorageError, StorageTransactionError, Unsupported

from zeoid import limits
from zeoid.errors import InvalidCall
from zeoid.model import (
    MAX_TID,
    NO_TID,
    AttachBlob,
    CheckCurrent,
    Delete,
    Operation,
    Restore,
    Revision,
    Store,
    TransactionInfo,
    Undo,
    frozen,
)
from zeoid.security.audit import Event
from zeoid.wire import messages

if TYPE_CHECKING:
    from zeoid.server.session import Session

#: The reply follows from what happens to the transaction.
LATER: Final = object()


@frozen
class Slow:
    """Work for a thread; its result is the reply."""

    work: Callable[[], Any]


@frozen
class Read:
    """Work for a thread; its result is the reply, unless one of *oids* was written meanwhile.

    Without oids it reads a blob, of which nothing is ever written again.
    """

    work: Callable[[], Any]
    oids: Sequence[bytes] = ()


@frozen
class Download:
    """A blob to send, before the reply."""

    oid: bytes
    serial: bytes


@frozen
class Pack:
    """A pack of the session's storage, up to *time* (seconds since the epoch)."""

    time: float
    wait: bool


@frozen
class Outcome:
    """A question for the outcome of a transaction that was begun when *after* was the last tid."""

    id: bytes
    after: bytes


def authenticate(session: "Session", token: str | bytes) -> str:
    return session.authenticate(_text(token))


def register(session: "Session", storage: str | bytes, read_only: bool) -> bytes:
    return session.register(_text(storage), bool(read_only))


# Reading ----------------------------------------------------------------------------------------------


def load_before(session: "Session", oid: bytes, tid: bytes) -> Revision | Read | None:
    hosted = session.hosted
    hosted.counts.loads += 1
    if hosted.engine.inline:
        return hosted.visible.load_before(oid, tid)
    return Read(lambda: hosted.visible.load_before(oid, tid), (oid,))


def load_before_many(session: "Session", oids: Sequence[bytes], tid: bytes) -> Any:
    hosted = session.hosted
    hosted.counts.loads += len(oids)
    if hosted.engine.inline:
        session.bulk_loads += len(oids)
        return hosted.visible.load_before_many(oids, tid)
    return Read(lambda: hosted.visible.load_before_many(oids, tid), oids)


def load_serial(session: "Session", oid: bytes, serial: bytes) -> Any:
    visible = session.hosted.visible
    return _read(session, lambda: visible.load_serial(oid, serial), oid)


def get_tid(session: "Session", oid: bytes) -> Any:
    visible = session.hosted.visible
    return _read(session, lambda: visible.current_tid(oid), oid)


def _read(session: "Session", work: Callable[[], Any], oid: bytes) -> Any:
    return work() if session.hosted.engine.inline else Read(work, (oid,))


def _ask(session: "Session", work: Callable[[], Any]) -> Any:
    return work() if session.hosted.engine.inline else Slow(work)


def last_transaction(session: "Session") -> bytes:
    return session.hosted.visible.tid


def get_invalidations(session: "Session", tid: bytes) -> tuple[bytes, list[bytes]] | None:
    return session.hosted.invalidations_since(tid)


def get_info(session: "Session") -> dict[str, Any]:
    return session.hosted.info()


def history(session: "Session", oid: bytes, size: int = 1) -> Slow:
    visible = session.hosted.visible
    return Slow(lambda: visible.history(oid, max(0, size)))


def record_iternext(session: "Session", following: bytes | None = None) -> Any:
    visible = session.hosted.visible
    return _ask(session, lambda: visible.record_iternext(following))


def undo_info(
    session: "Session", first: int = 0, last: int = -20, specification: dict[str, Any] | None = None
) -> Slow:
    visible = session.hosted.visible
    return Slow(lambda: visible.undo_info(first, last, specification))


def undo_log(session: "Session", first: int = 0, last: int = -20) -> Slow:
    visible = session.hosted.visible
    return Slow(lambda: visible.undo_log(first, last))


def send_blob(session: "Session", oid: bytes, serial: bytes) -> Download:
    return Download(oid, serial)


# Iteration --------------------------------------------------------------------------------------------


def iterator_start(session: "Session", start: bytes | None = None, stop: bytes | None = None) -> Slow:
    visible = session.hosted.visible
    reserved = session.iterators.reserve()
    if visible.tid == NO_TID:
        return Slow(lambda: session.iterators.open(reserved, iter(())))
    return Slow(lambda: session.iterators.open(reserved, visible.iterate(start, stop)))


def iterator_next(session: "Session", iterator: int) -> Any:
    return _ask(session, lambda: session.iterators.next_transaction(iterator))


def iterator_record_start(session: "Session", iterator: int, tid: bytes) -> Any:
    return _ask(session, lambda: session.iterators.open_records(iterator, tid))


def iterator_record_next(session: "Session", iterator: int) -> Any:
    return _ask(session, lambda: session.iterators.next_record(iterator))


def iterator_gc(session: "Session", iterators: list[int]) -> Any:
    return _ask(session, lambda: session.iterators.forget(iterators))


# Transactions -----------------------------------------------------------------------------------------


def new_oids(session: "Session", count: int = 100) -> Any:
    if session.read_only:
        raise ReadOnlyError()
    hosted = session.hosted
    return _ask(session, lambda: hosted.new_oids(count))


def tpc_begin(
    session: "Session",
    id: Any,
    user: str | bytes,
    description: str | bytes,
    extension: dict[str, Any],
    tid: bytes | None = None,
    status: str | bytes = " ",
) -> None:
    problem: Exception | None = None
    if type(status) is not str:
        status = _text(status)
    if session.read_only:
        problem = ReadOnlyError()
    elif tid is not None and not NO_TID < tid < MAX_TID:
        problem = InvalidCall("tpc_begin: no transaction can have this tid")
    elif status not in _STATUSES:
        problem = InvalidCall("tpc_begin: the status must be ' ' or 'p'")
    if type(user) is not bytes or type(description) is not bytes:
        user, description = _bytes(user), _bytes(description)
    info = TransactionInfo(user, description, extension, tid, status)
    session.hosted.transactions.begin(session, id, info, problem)


def _operate(session: "Session", id: Any, operation: Operation) -> None:
    if not isinstance(operation, CheckCurrent | Undo):
        session.hosted.counts.stores += 1
    session.hosted.transactions.operate(session, id, operation)


def _serial(serial: bytes | str | None) -> bytes:
    """What is no tid says that the object is new."""
    return serial if type(serial) is bytes else NO_TID


def store(session: "Session", oid: bytes, serial: Any, data: bytes, id: Any) -> None:
    _operate(session, id, Store(oid, _serial(serial), data))


def restore(
    session: "Session", oid: bytes, serial: bytes, data: bytes | None, same_as: bytes | None, id: Any
) -> None:
    _operate(session, id, Restore(oid, data, same_as))


def delete(session: "Session", oid: bytes, serial: bytes, id: Any) -> None:
    _operate(session, id, Delete(oid, serial))


def check_current(session: "Session", oid: bytes, serial: bytes, id: Any) -> None:
    _operate(session, id, CheckCurrent(oid, serial))


def undo(session: "Session", transaction_id: bytes, id: Any) -> None:
    _operate(session, id, Undo(transaction_id))
    session.authority.undoes(id, transaction_id)


def blob_start(session: "Session") -> None:
    session.uploads.begin()


def blob_chunk(session: "Session", chunk: bytes) -> None:
    session.uploads.chunk(chunk)


def blob_end(session: "Session", oid: bytes, serial: Any, data: bytes, id: Any) -> None:
    session.uploads.end(Store(oid, _serial(serial), data), id)


def blob_shared(
    session: "Session", oid: bytes, serial: Any, data: bytes, filename: str | bytes, id: Any
) -> None:
    session.uploads.take(Store(oid, _serial(serial), data), _text(filename), id)


def vote(session: "Session", id: Any) -> Any:
    if session.has_uploads:
        session.vote_after_uploads(id)
    else:
        session.hosted.vote(session, id)
    return LATER


def tpc_finish(session: "Session", id: Any) -> Any:
    session.hosted.finish(session, id)
    return LATER


def tpc_abort(session: "Session", id: Any) -> None:
    if session.has_uploads:
        session.abort_uploads(id)
    session.hosted.abort(session, id)
    session.over(id)


def operate(
    session: "Session", id: Any, begin: tuple[Any, ...] | None, operations: Sequence[tuple[Any, ...]]
) -> None:
    if begin is not None:
        tpc_begin(session, id, *begin)
    made: list[Operation] = []
    stores = 0
    undone: list[bytes] = []
    missing: Exception | None = None
    for kind, oid, serial, data, same_as in operations:
        if kind == messages.STORE:
            made.append(Store(oid, serial or NO_TID, data))
            stores += 1
        elif kind == messages.RESTORE:
            made.append(Restore(oid, data, same_as))
            stores += 1
        elif kind == messages.DELETE:
            made.append(Delete(oid, serial))
            stores += 1
        elif kind == messages.CHECK_CURRENT:
            made.append(CheckCurrent(oid, serial))
        elif kind == messages.UNDO:
            made.append(Undo(data))
            undone.append(data)
        else:
            try:
                made.append(AttachBlob(oid, session.grant.staged.claim(id, data)))
            except StorageError as problem:
                missing = problem
    transactions = session.hosted.transactions
    if made:
        session.hosted.counts.stores += stores
        try:
            transactions.operate(session, id, *made)
        except StorageTransactionError:
            session.hosted.discard([each.blob for each in made if isinstance(each, AttachBlob)])
            raise
        if undone:
            for each in undone:
                session.authority.undoes(id, each)
    if missing is not None:
        transactions.break_(session, id, missing)


def prepare(
    session: "Session", id: Any, begin: tuple[Any, ...] | None, operations: Sequence[tuple[Any, ...]]
) -> Any:
    operate(session, id, begin, operations)
    return vote(session, id)


def outcome(session: "Session", id: bytes, after: bytes) -> Outcome:
    if session.read_only:
        raise ReadOnlyError()
    return Outcome(id, after)


def checkpoint(session: "Session") -> Slow:
    if session.read_only:
        raise ReadOnlyError()
    session.authority.tell(Event.CHECKPOINT)
    return Slow(session.hosted.engine.checkpoint)


# Blobs, beside what ZEO knows --------------------------------------------------------------------------


def blob_token(session: "Session") -> bytes:
    if not session.hosted.engine.has_blobs:
        raise Unsupported("this storage keeps no blobs")
    return session.open_blob_connection()


def blob_load(session: "Session", oid: bytes, serial: bytes, most: int) -> Read:
    visible = session.hosted.visible
    return Read(lambda: _small_blob(visible.open_blob(oid, serial), min(most, limits.BLOB_INLINE_BYTES)))


def _small_blob(file: BinaryIO, most_bytes: int) -> tuple[int, bytes | None]:
    with file:
        size_bytes = os.fstat(file.fileno()).st_size
        return size_bytes, file.read() if size_bytes <= most_bytes else None


# The rest ---------------------------------------------------------------------------------------------


def pack(session: "Session", time: float, wait: bool = True) -> Pack:
    return Pack(float(time), bool(wait))


def pack_status(session: "Session") -> dict[str, Any]:
    return session.hosted.packs.status()


def pack_cancel(session: "Session") -> str | None:
    """None, or why that can't be: it is nothing that the server's log would have to tell of."""
    if session.read_only or session.hosted.read_only:
        raise ReadOnlyError()
    refusal = session.hosted.packs.cancel(session.label)
    if refusal is None:
        session.authority.tell(Event.PACK_CANCELLED)
    return refusal


def server_status(session: "Session") -> dict[str, Any]:
    return session.hosted.status()


def set_client_label(session: "Session", label: str | bytes) -> None:
    session.set_label(_text(label))


def ping(session: "Session") -> None:
    return None


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")


#: Done, and packed. With another one in it, a data file would be cut off there when it is opened again.
_STATUSES: Final = (" ", "p")

METHODS: Final[dict[str, Callable[..., Any]]] = {
    "authenticate": authenticate,
    "register": register,
    "get_info": get_info,
    "lastTransaction": last_transaction,
    "getInvalidations": get_invalidations,
    "loadBefore": load_before,
    "loadBeforeMany": load_before_many,
    "loadSerial": load_serial,
    "getTid": get_tid,
    "history": history,
    "record_iternext": record_iternext,
    "undoInfo": undo_info,
    "undoLog": undo_log,
    "sendBlob": send_blob,
    "iterator_start": iterator_start,
    "iterator_next": iterator_next,
    "iterator_record_start": iterator_record_start,
    "iterator_record_next": iterator_record_next,
    "iterator_gc": iterator_gc,
    "new_oids": new_oids,
    "tpc_begin": tpc_begin,
    "storea": store,
    "restorea": restore,
    "deleteObject": delete,
    "checkCurrentSerialInTransaction": check_current,
    "undoa": undo,
    "storeBlobStart": blob_start,
    "storeBlobChunk": blob_chunk,
    "storeBlobEnd": blob_end,
    "storeBlobShared": blob_shared,
    "vote": vote,
    "tpc_finish": tpc_finish,
    "tpc_abort": tpc_abort,
    "tpc_operate": operate,
    "tpc_prepare": prepare,
    "outcome": outcome,
    "checkpoint": checkpoint,
    "blob_token": blob_token,
    "blob_load": blob_load,
    "pack": pack,
    "pack_status": pack_status,
    "pack_cancel": pack_cancel,
    "server_status": server_status,
    "set_client_label": set_client_label,
    "ping": ping,
}

#: The transaction's id is the last argument of these: what is wrong with them breaks the transaction.
OPERATIONS: Final = frozenset(
    {
        "storea",
        "restorea",
        "deleteObject",
        "checkCurrentSerialInTransaction",
        "undoa",
        "storeBlobEnd",
        "storeBlobShared",
        "tpc_operate",
    }
)
#: It is the first argument of these.
NAMED_FIRST: Final = frozenset({"tpc_operate"})
#: The hosted storage answers these, when what they ask for has happened.
ANSWERED_LATER: Final = frozenset({"vote", "tpc_prepare", "tpc_finish"})
