"""`ClientStorage`: a ZODB storage whose data is kept by a storage server.

Owns the face: ZODB's storage methods with their meaning and their errors. The connection is `link`'s, what
is known of the database is `view`'s, a transaction is `committing`'s.

Long because ZODB asks a storage for so many methods, each of which is short.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import random
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import zope.interface
from ZODB import interfaces
from ZODB.BaseStorage import copy
from ZODB.blob import copyTransactionsFromTo
from ZODB.ConflictResolution import ConflictResolvingStorage
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
    Unsupported,
)

from zeoid import limits
from zeoid.addresses import parse_addresses
from zeoid.client import merging
from zeoid.client.blobs import blobs_for
from zeoid.client.channel import Channel
from zeoid.client.committing import Commit, Extended, Stock
from zeoid.client.iteration import Discarded, RemoteIteration
from zeoid.client.link import Access, Link, State
from zeoid.client.oids import NewOids
from zeoid.client.options import cache_maker, certificates_for, check_options
from zeoid.client.prefetching import Prefetching
from zeoid.client.reading_ahead import ReadAhead
from zeoid.client.turns import Turns
from zeoid.client.view import View
from zeoid.errors import Disconnected, OutcomeUnknown, ServerError, TimedOut
from zeoid.model import MAX_TID, NO_TID, Revision
from zeoid.wire.messages import CHECK_CURRENT, DELETE, RESTORE, STORE, UNDO

#: What the server's storage provides, the client does, too.
_PASSED_ON = {
    (interface.__module__, interface.__name__): interface
    for interface in (
        interfaces.IStorageRestoreable,
        interfaces.IStorageIteration,
        interfaces.IStorageUndoable,
        interfaces.IStorageCurrentRecordIteration,
        interfaces.IExternalGC,
    )
}

#: Every storage of this process, to be told of a fork.
_storages: "weakref.WeakSet[ClientStorage]" = weakref.WeakSet()


@zope.interface.implementer(interfaces.IMultiCommitStorage)
class ClientStorage(ConflictResolvingStorage):  # type: ignore[misc]
    """A ZODB storage on a storage server, Zeoid's or ZEO's.

    addr: where the server is: `(host, port)`, `"host:port"`, the path of a unix socket, a port on this
        machine, or a list of these, which are tried in turn.
    storage: the name of the storage on the server.
    name: what `getName` begins with; the addresses if it is left out.
    wait: wait for a connection before returning.
    wait_timeout: seconds; the deadline of every call, and of waiting for a connection.
    read_only: refuse to write, and be content with a read-only server.
    read_only_fallback: prefer a server that can write, but take one that can't until there is one.
    cache_dir: a directory of this user, for an object cache that all processes of the machine share and that
        stays when they end; without one each has its own, in memory.
    cache_size_bytes: the size of the object cache. Left out, 20 MiB in memory, 256 MiB in a cache_dir; there
        the process that makes the cache decides.
    client_label: a name for this client in the server's log.
    token: what `zeoid tokens make` has printed, for a server that wants one. It is sent over
        connections that are encrypted, and over unix sockets; with one, others are refused.
    server_sync: make a round trip at every transaction's begin, so that it sees what was committed before.
    read_ahead: over a slow link, also load what the objects that are loaded refer to, as far as it is used.
    coding: "M5" or "Z5"; left out, the better one that both sides know.
    blob_dir: a directory for blobs; without one there are none.
    shared_blob_dir: it is the server's own, which both reach; otherwise it is a cache of this machine.
    blob_cache_size: bytes; what the cache may hold, about. Left out, all that it is given.
    blob_cache_size_check: percent of that; by so much it may grow before it is looked at.
    tls: a file in PEM with a private key, its certificate, and those of the authorities whose servers are
        trusted; or a `ClientTls`. TCP connections have TLS then, unix sockets never.
    tls_key: the file of the key, if it is not in there.
    tls_ca: the file of the authorities, if they are not in there; "system": those that this machine trusts.
        Alone: TLS without a certificate of one's own.
    tls_server_hostname: the name in the server's certificate, if it is reached by another one.

    Raises ConfigurationError for addresses that are none, TimedOut or a refusal if *wait* and no server can
    be had. After that, methods raise ZODB's errors, and `zeoid.errors.Disconnected` (a StorageError and
    TransientError of ZODB) while there is no connection. Safe for use by several threads. In a forked child
    it connects anew.
    """

    def __init__(
        self,
        addr: Any,
        storage: str = "1",
        *,
        name: str = "",
        wait: bool = True,
        wait_timeout: float | None = limits.WAIT_TIMEOUT_S,
        read_only: bool = False,
        read_only_fallback: bool = False,
        cache_size_bytes: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        client_label: str = "",
        token: str | None = None,
        server_sync: bool = False,
        read_ahead: bool = True,
        coding: str | None = None,
        blob_dir: str | os.PathLike[str] | None = None,
        shared_blob_dir: bool = False,
        blob_cache_size: int | None = None,
        blob_cache_size_check: int = 10,
        tls: Any = None,
        tls_key: str | os.PathLike[str] | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_server_hostname: str | None = None,
    ) -> None:
        addresses = parse_addresses(addr)
        check_options(
            storage=storage,
            client_label=client_label,
            token=token,
            read_only=read_only,
            read_only_fallback=read_only_fallback,
            wait_timeout=wait_timeout,
            cache_size_bytes=cache_size_bytes,
            cache_dir=cache_dir,
            coding=coding,
        )
        certificates = certificates_for(tls, tls_key, tls_ca, tls_server_hostname)
        self.__name__ = name or ", ".join(map(str, addresses))
        self._storage_name = storage
        self._label = client_label
        self._timeout_s = limits.WAIT_TIMEOUT_S if wait_timeout is None else wait_timeout
        self._server_sync = server_sync
        self._info: dict[str, Any] = {"length": 0, "size": 0, "supportsUndo": False, "interfaces": ()}
        self._make_cache = cache_maker(cache_dir, cache_size_bytes, storage, addresses)
        self._view = View(self._make_cache(NO_TID))
        self._ahead_bytes = 0
        if read_ahead:
            self._ahead_bytes = int(self._view.cache.figures().size_bytes * limits.READ_AHEAD_SHARE)
        self._discarded: Discarded = collections.deque()
        self._reset()
        self._blobs = blobs_for(
            blob_dir,
            shared_blob_dir,
            blob_cache_size,
            blob_cache_size_check,
            self._blob_channel,
            self._timeout_s,
        )
        self.fshelper = self._blobs.fshelper
        if self._blobs.supported:
            zope.interface.alsoProvides(self, interfaces.IBlobStorage)
        self._link = Link(
            addresses,
            storage,
            self._view,
            access=Access.READ if read_only else Access.FALLBACK if read_only_fallback else Access.WRITE,
            timeout_s=self._timeout_s,
            coding=coding,
            label=client_label,
            certificates=certificates,
            token=token or "",
            jitter=random.random,
            on_connected=self._connected,
            on_info=self._info.update,
            on_blob=self._blobs.receive,
        )
        _storages.add(self)
        if wait:
            try:
                self._link.wait(self._timeout_s)
            except BaseException:
                self.close()
                raise
        else:
            self._link.start()

    def _reset(self) -> None:
        """What a forked child has of its own."""
        self._turns = Turns(self._timeout_s)
        self._commits: dict[int, Commit] = {}
        self._numbers = itertools.count(1)
        #: With a number behind it, a transaction's id that no other client ever makes.
        self._id_prefix = os.urandom(8)
        self._oids = NewOids()
        self._ahead = ReadAhead(self._view, self._ahead_bytes, self._timeout_s)

    def _connected(self, info: Mapping[str, Any]) -> None:
        self._info.update(info)
        for pair in info.get("interfaces", ()):
            interface = _PASSED_ON.get(tuple(pair))
            if interface is not None and not interface.providedBy(self):
                zope.interface.alsoProvides(self, interface)
        if self._blobs.supported and "blob_token" in info.get("extensions", ()):
            zope.interface.alsoProvides(self, interfaces.IBlobStorageRestoreable)

    def _after_fork(self) -> None:
        self._reset()
        self._view.after_fork(self._make_cache)
        self._blobs.after_fork()
        self._link.after_fork()

    # The storage as a whole -----------------------------------------------------------------------

    def close(self) -> None:
        """Close the connection and end the threads. Calls that are under way raise Disconnected."""
        self._link.close()
        self._turns.wake()
        self._blobs.close()
        self._view.cache.close()

    def registerDB(self, db: Any) -> None:
        super().registerDB(db)
        self._view.listener = db

    def getName(self) -> str:
        """The name and the state of the connection, such as "zoo (connected to zooserver:7700)"."""
        return f"{self.__name__} ({self._link.describe()})"

    def sortKey(self) -> str:
        if self._link.peer is None:
            raise Disconnected("the storage was never connected")
        return f"{self._storage_name}:{self._link.peer}"

    def is_connected(self) -> bool:
        return self._link.state is State.READY

    @property
    def protocol(self) -> str:
        """The coding in use, M5 or Z5; empty while not connected."""
        channel = self._link.ready
        return "" if channel is None else channel.protocol

    def isReadOnly(self) -> bool:
        return self._link.read_only

    is_read_only = isReadOnly

    def supportsUndo(self) -> bool:
        return bool(self._info["supportsUndo"])

    def getSize(self) -> int:
        """The size of the storage in bytes, as last heard."""
        return int(self._info["size"])

    def __len__(self) -> int:
        """The number of objects: asked of the server, or as last heard while there is none."""
        if self.is_connected():
            with contextlib.suppress(Disconnected):
                self._info.update(self._read("get_info"))
        return int(self._info["length"])

    def __bool__(self) -> bool:
        return True

    def sync(self, force: bool = True) -> None:
        """Apply what has arrived from the server. With `server_sync`, all that was committed before now."""
        if self._server_sync:
            self._read("ping")
        else:
            channel = self._link.ready
            if channel is not None:
                channel.drain()

    def ping(self) -> None:
        """A round trip."""
        self._read("ping")

    def server_status(self) -> dict[str, Any]:
        """The figures of the server for this storage."""
        status: dict[str, Any] = self._read("server_status")
        return status

    def cache_statistics(self) -> dict[str, int]:
        """Figures of the object cache: `hits` and `misses` in this process, and how many revisions it has
        `read_ahead`, of which so many were used, `read_ahead_used`; the `bytes` that its revisions
        take and the `size_bytes` that they may take, approximately; its `evictions`, revisions removed for
        others' sake. With a `cache_dir`, those three are of what all processes share, and `waiting` is the
        number of revisions that this one has not put there yet, which takes some hundredths of a second.
        """
        figures = self._view.cache.figures()
        return {
            "hits": self._view.hits, "misses": self._view.misses,
            "read_ahead": self._ahead.asked, "read_ahead_used": self._ahead.used,
            **dataclasses.asdict(figures),
        }  # fmt: skip

    # Reading --------------------------------------------------------------------------------------

    def _read(self, name: str, *args: Any, timeout_s: float | None = None) -> Any:
        """A call that may be repeated."""
        return self._repeatedly(lambda channel, left_s: channel.call(name, args, left_s), timeout_s)

    def _repeatedly(self, read: Callable[[Channel, float], Any], timeout_s: float | None = None) -> Any:
        """Do *read* on the connection, with the time that is left; when it is lost, again on the next one."""
        left_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + left_s
        while True:
            channel = self._link.channel(left_s)
            try:
                return read(channel, left_s)
            except TimedOut:
                raise
            except Disconnected:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or self._link.closed:
                    raise

    def lastTransaction(self) -> bytes:
        return self._view.last_tid()

    def loadBefore(self, oid: bytes, tid: bytes) -> Revision | None:
        view = self._view
        found = view.lookup(oid, tid)
        if found is not None:
            if oid in self._ahead.unused:
                self._used(oid, tid, found)
            return found
        timeout_s = self._timeout_s
        deadline_s = time.monotonic() + timeout_s
        while True:
            channel = self._link.ready or self._link.channel(timeout_s)
            try:
                if channel.pending and (other := merging.find(channel, view, oid, tid)) is not None:
                    known = merging.follow(channel, view, other, oid, tid, timeout_s)
                    if known is not None:
                        if known[0] is not None and oid in self._ahead.unused:
                            self._used(oid, tid, known[0])
                        return known[0]
                    timeout_s = deadline_s - time.monotonic()
                revision: Revision | None = channel.call(
                    "loadBefore", (oid, tid), timeout_s, hook=view.loaded, context=(oid, view.mark, tid)
                )
            except TimedOut:
                raise
            except Disconnected:
                timeout_s = deadline_s - time.monotonic()
                if timeout_s <= 0 or self._link.closed:
                    raise
            else:
                if time.monotonic() - deadline_s + timeout_s > limits.READ_AHEAD_SLOW_S:
                    with contextlib.suppress(Disconnected):
                        self._ahead.loaded_slowly(channel, oid, tid, revision)
                elif self._ahead.slow_loads:
                    self._ahead.slow_loads = 0
                return revision

    def _used(self, oid: bytes, tid: bytes, found: Revision) -> None:
        """What was read ahead is used."""
        channel = self._link.ready
        if channel is not None:
            with contextlib.suppress(Disconnected):
                self._ahead.was_used(channel, oid, tid, found)

    def load(self, oid: bytes, version: str = "") -> tuple[bytes, bytes]:
        """The current revision, as the server has it."""
        revision = self.loadBefore(oid, MAX_TID)
        if revision is None:
            raise POSKeyError(oid)
        return revision[:2]

    def prefetch(self, oids: Iterable[bytes], tid: bytes) -> None:
        """Have the revisions of *oids* before *tid* in the cache, loading all that is missing together.

        What can't be had is left to the load that needs it. Returns when everything else is there.
        """
        Prefetching(self._view, self._repeatedly, tid).prefetch(oids)

    def loadSerial(self, oid: bytes, serial: bytes) -> bytes:
        data: bytes = self._read("loadSerial", oid, serial)
        return data

    def getTid(self, oid: bytes) -> bytes:
        tid: bytes = self._read("getTid", oid)
        return tid

    def history(self, oid: bytes, size: int = 1) -> list[dict[str, Any]]:
        return list(self._read("history", oid, size))

    def record_iternext(self, next: bytes | None = None) -> tuple[bytes, bytes, bytes, bytes | None]:
        oid, tid, data, after = self._read("record_iternext", next)
        return oid, tid, data, after

    def undoLog(
        self, first: int = 0, last: int = -20, filter: Callable[[Any], bool] | None = None
    ) -> list[dict[str, Any]]:
        """The undoable transactions. A *filter* is a function, which can't be sent: the result is empty."""
        return [] if filter is not None else list(self._read("undoLog", first, last))

    def undoInfo(
        self, first: int = 0, last: int = -20, specification: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        return list(self._read("undoInfo", first, last, specification))

    def iterator(self, start: bytes | None = None, stop: bytes | None = None) -> RemoteIteration:
        """The transactions from *start* to *stop*, both included."""

        def call(channel: Channel, name: str, args: tuple[Any, ...]) -> Any:
            return channel.call(name, args, self._timeout_s)

        return RemoteIteration(self._link.channel(self._timeout_s), call, self._discarded, start, stop)

    # Blobs ----------------------------------------------------------------------------------------

    def _blob_channel(self, timeout_s: float) -> Channel:
        channel = self._link.channel(timeout_s)
        if ("ZODB.interfaces", "IBlobStorage") not in map(tuple, self._info["interfaces"]):
            raise Unsupported(f"{channel.peer} has no blobs: its storage has no blob directory")
        return channel

    def loadBlob(self, oid: bytes, serial: bytes) -> str:
        return self._blobs.path(oid, serial)

    def openCommittedBlobFile(self, oid: bytes, serial: bytes, blob: Any = None) -> BinaryIO:
        return self._blobs.open(oid, serial, blob)

    def temporaryDirectory(self) -> str:
        return self._blobs.temporary_directory()

    def storeBlob(
        self, oid: bytes, serial: Any, data: bytes, blobfilename: str, version: str, transaction: Any
    ) -> None:
        if serial == "\0" * 8:  # ZODB's own tests write "nothing" as text
            serial = NO_TID
        self._blobs.store(self._committing(transaction), (STORE, oid, serial, data, None), blobfilename)

    # Writing --------------------------------------------------------------------------------------

    def new_oid(self) -> bytes:
        if self._link.read_only:
            raise ReadOnlyError()
        return self._oids.take(self._link, self._read)

    def tpc_begin(self, transaction: Any, tid: bytes | None = None, status: str = " ") -> None:
        if self._link.read_only:
            raise ReadOnlyError()
        if id(transaction) in self._commits:
            raise StorageTransactionError("Duplicate tpc_begin calls for same transaction")
        try:
            channel, extended = self._turns.take(transaction, self._link)
            number = next(self._numbers)
            way: Stock | Extended
            if extended:
                way = Extended(
                    self._id_prefix + number.to_bytes(8, "big"), channel, self._timeout_s, self._blobs.streams
                )
            else:
                way = Stock(number, channel, self._timeout_s)
            commit = Commit(transaction, way, self._view.last_tid(), self._label)
            commit.begin(tid, status)
            self._commits[id(transaction)] = commit
        except BaseException:
            self._end(transaction)
            raise

    def _committing(self, transaction: Any) -> Commit:
        if self._link.read_only:
            raise ReadOnlyError()
        commit = self._commits.get(id(transaction))
        if commit is None:
            raise StorageTransactionError("this transaction was not begun, or is over", transaction)
        return commit

    def _end(self, transaction: Any) -> None:
        self._turns.leave(transaction)
        commit = self._commits.pop(id(transaction), None)
        if commit is not None:
            commit.blobs.discard()

    def store(self, oid: bytes, serial: bytes, data: bytes, version: str, transaction: Any) -> None:
        self._committing(transaction).operate(STORE, oid, serial, data)

    def restore(
        self, oid: bytes, serial: bytes, data: bytes | None, version: str, prev_txn: Any, transaction: Any
    ) -> None:
        self._committing(transaction).operate(RESTORE, oid, serial, data, prev_txn)

    def restoreBlob(
        self,
        oid: bytes,
        serial: bytes,
        data: bytes,
        blobfilename: str,
        prev_txn: bytes | None,
        transaction: Any,
    ) -> None:
        """As `restore`, with a blob, whose file is taken. Unsupported by ZEO's servers."""
        operation = RESTORE, oid, serial, data, prev_txn
        self._blobs.store(self._committing(transaction), operation, blobfilename)

    def deleteObject(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        self._committing(transaction).operate(DELETE, oid, serial)

    def checkCurrentSerialInTransaction(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        self._committing(transaction).operate(CHECK_CURRENT, oid, serial)

    def undo(self, transaction_id: bytes, transaction: Any) -> None:
        """Undo a transaction within another. What that changes is known after the vote."""
        self._committing(transaction).operate(UNDO, None, None, transaction_id)

    def tpc_transaction(self) -> Any:
        """A transaction that is being committed, if there is one."""
        commit = next(iter(list(self._commits.values())), None)
        return None if commit is None else commit.transaction

    def tpc_vote(self, transaction: Any) -> Sequence[bytes] | None:
        """Prepare the transaction; the oids whose data is another than was stored."""
        commit = self._committing(transaction)
        try:
            return commit.vote(self.tryToResolveConflict) or None
        except ConflictError as problem:
            oid = getattr(problem, "oid", None)  # a conflict of BTrees has none
            if oid is not None:
                # Whoever retries must not read the same stale revision again.
                self._view.forget(oid)
            raise

    def tpc_finish(self, transaction: Any, f: Callable[[bytes], Any] | None = None) -> bytes:
        """Commit; *f* is called with the tid in the order in which the server committed. The tid.

        When the connection is lost meanwhile, the next one is asked for the outcome (of servers that can be
        asked): Disconnected if the transaction is not committed, OutcomeUnknown if that is not to be learned.
        """
        commit = self._committing(transaction)
        view, mark = self._view, self._view.mark
        try:
            return commit.finish(lambda tid: view.finished(tid, commit.written, mark, f))
        except OutcomeUnknown as unknown:
            return commit.outcome(
                unknown,
                self._repeatedly,
                lambda tid: view.learned(tid, commit.written, f),
            )
        finally:
            self._end(transaction)

    def tpc_abort(self, transaction: Any) -> None:
        commit = self._commits.get(id(transaction))
        try:
            if commit is not None:
                commit.abort()
        finally:
            self._end(transaction)

    def copyTransactionsFrom(self, other: Any, verbose: int = 0) -> None:
        """Copy every transaction of another storage into this one, with their tids.

        With their blobs if this storage has a blob_dir; Unsupported then if the server is ZEO's.
        """
        if self._blobs.supported and interfaces.IBlobStorage.providedBy(other):
            copyTransactionsFromTo(other, self)
        else:
            copy(other, self, verbose)

    def pack(
        self, t: float | None = None, referencesf: Any = None, wait: bool = True, days: float = 0
    ) -> None:
        """Pack to the time *t* (seconds since the epoch; now if left out) less *days*.

        *referencesf* is ZODB's and not sent: the server has its own. With *wait* there is no deadline but
        the life of the connection.
        """
        time_s = (time.time() if t is None else t) - days * 86400
        channel = self._link.channel(self._timeout_s)
        channel.call("pack", (time_s, bool(wait)), limits.PACK_TIMEOUT_S if wait else self._timeout_s)

    def pack_status(self) -> dict[str, Any] | None:
        """How far the server's pack of this storage is, or how the last one ended: see docs/protocol.md.

        None if the server can't tell, as ZEO's can't.
        """

        def ask(channel: Channel, left_s: float) -> Any:
            known = "pack_status" in channel.extensions
            return channel.call("pack_status", (), left_s) if known else None

        status: dict[str, Any] | None = self._repeatedly(ask)
        return status

    def cancel_pack(self) -> None:
        """Have the server give up the pack that is under way. `pack_status` tells when that is done.

        StorageError if there is none, or it can't be cancelled (any more); then it goes on.
        """
        channel = self._link.channel(self._timeout_s)
        if "pack_cancel" not in channel.extensions:
            raise ServerError("this server can't cancel a pack")
        refusal = channel.call("pack_cancel", (), self._timeout_s)
        if refusal is not None:
            raise StorageError(str(refusal))

    def checkpoint(self) -> bytes:
        """Have the server make its data file complete and durable by itself; the tid that it reaches.

        ServerError if the server knows no checkpoints. There is no deadline but the life of the connection.
        """
        channel = self._link.channel(self._timeout_s)
        if "checkpoint" not in channel.extensions:
            raise ServerError("this server knows no checkpoints")
        tid: bytes = channel.call("checkpoint", (), limits.PACK_TIMEOUT_S)
        return tid


def _after_fork_in_child() -> None:
    for storage in list(_storages):
        storage._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
