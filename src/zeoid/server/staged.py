"""The blobs that a client has sent ahead of the transactions that are to attach them.

    a blob is     event                                            becomes
    –             it is announced                                  arriving
    arriving      all of it is here, and durable                   staged
    arriving      it breaks off, or the disk failed                –, and its file is removed by who writes it
    arriving      its transaction, or the session, is over         –, and so when all of it is here
    staged        its transaction attaches it                      the transaction's (`commit.blobs`)
    staged        its transaction, or the session, is over         –, and its file is removed

Blobs arrive in threads, and are attached on the event loop. Owns which of them are whose, so that each file
is attached or removed, once. Must not know how a blob comes here.
"""

import threading

from ZODB.POSException import StorageError, StorageTransactionError

from zeoid import limits
from zeoid.errors import TooLarge, not_stored
from zeoid.model import StagedBlob
from zeoid.ports import BlobWriter, Engine


class Staged:
    """Those of one session. Every method may be called by any thread."""

    def __init__(self, most: int = limits.BLOBS_UNCLAIMED) -> None:
        self._most = most
        self._lock = threading.Lock()
        #: For each transaction its blobs by name; None while one is arriving.
        self._all: dict[bytes, dict[bytes, StagedBlob | None]] = {}
        self._count = 0
        #: The latest transactions that are over, oldest first: a client may have given one up while a blob of
        #: it was still on its way.
        self._over: dict[bytes, None] = {}
        self._closed = False

    def announce(self, id: bytes, name: bytes) -> None:
        """A blob of transaction *id* is about to arrive. StorageError if it can't be taken."""
        with self._lock:
            if self._closed or id in self._over:
                raise StorageTransactionError("a blob for a transaction that is over")
            if self._count >= self._most:
                raise StorageError(f"more than {self._most:,} blobs that belong to no transaction yet")
            blobs = self._all.setdefault(id, {})
            if name in blobs:
                raise StorageError("a blob of this name is here already")
            blobs[name] = None
            self._count += 1

    def complete(self, id: bytes, name: bytes, blob: StagedBlob) -> bool:
        """All of it is here. False if nobody wants it any more: then it is still the caller's."""
        with self._lock:
            blobs = self._all.get(id)
            if blobs is None or name not in blobs:
                return False
            blobs[name] = blob
            return True

    def give_up(self, id: bytes, name: bytes) -> None:
        """Nothing will come of one that was arriving."""
        with self._lock:
            self._remove(id, name)

    def claim(self, id: bytes, name: bytes) -> StagedBlob:
        """A blob that is the caller's from now on. StorageError if there is no such blob."""
        with self._lock:
            blob = self._all.get(id, {}).get(name)
            if blob is None:
                raise StorageTransactionError(
                    "the transaction attaches a blob that was not sent, or not completely"
                )
            self._remove(id, name)
            return blob

    def _remove(self, id: bytes, name: bytes) -> None:
        blobs = self._all.get(id)
        if blobs is not None and name in blobs:
            del blobs[name]
            self._count -= 1
            if not blobs:
                del self._all[id]

    def forget(self, id: bytes) -> list[StagedBlob]:
        """The transaction is over; what the caller is to remove."""
        with self._lock:
            self._over[id] = None
            if len(self._over) > limits.BLOB_TRANSACTIONS_OVER:
                del self._over[next(iter(self._over))]
            blobs = self._all.pop(id, {})
            self._count -= len(blobs)
            return [blob for blob in blobs.values() if blob is not None]

    def close(self) -> list[StagedBlob]:
        """The session is over; what the caller is to remove."""
        with self._lock:
            self._closed = True
            blobs = [blob for each in self._all.values() for blob in each.values() if blob is not None]
            self._all.clear()
            self._count = 0
            return blobs


def refuse_large(size_bytes: int, most_bytes: int) -> None:
    """TooLarge if a blob is larger than it may be."""
    if size_bytes > most_bytes:
        raise TooLarge(f"the blob is larger than {most_bytes:,} bytes, the most that this server takes")


class Arrival:
    """One blob that is arriving, in a thread. Whoever makes one owes `end`.

    StorageError from everything but `end`, if the blob can't be stored.
    """

    def __init__(self, staged: Staged, engine: Engine, id: bytes, name: bytes, size_bytes: int) -> None:
        self._staged, self._engine, self._id, self._name = staged, engine, id, name
        staged.announce(id, name)
        try:
            self._writer: BlobWriter = engine.stage_blob(size_bytes)
        except BaseException as problem:
            staged.give_up(id, name)
            if isinstance(problem, OSError):
                raise not_stored(problem) from None
            raise
        self._complete = False

    def write(self, data: memoryview) -> None:
        try:
            self._writer.write(data)
        except OSError as problem:
            raise not_stored(problem) from None

    def complete(self) -> None:
        """Have it durable, and there to be attached."""
        try:
            blob = self._writer.complete()
        except OSError as problem:
            raise not_stored(problem) from None
        self._complete = True
        if not self._staged.complete(self._id, self._name, blob):
            self._engine.discard_blobs((blob,))
            raise StorageTransactionError("a blob for a transaction that is over")

    def end(self) -> None:
        """Without effect when it is complete."""
        if not self._complete:
            self._writer.abandon()
            self._staged.give_up(self._id, self._name)
