"""What this client knows of the database: the last tid it has applied, and its object cache.

Everything here happens in the order of the server's stream: the thread that reads the stream applies each
invalidation, each reply to a load and each reply to a finish before it looks at the next message.

The cache may be shared with other processes, which may have told it more; but it was told everything that
this one was, before this one's last tid shows it.

Invariants:
 1. An invalidation is applied to the cache, then to ZODB, then the last tid advances, all in one re-entrant
    critical section. `last_tid()` waits for it: a ZODB connection opened in between would otherwise start at
    the old tid, miss the invalidation, and keep a stale object.
 2. The last tid never goes back, unless the database itself did (`restored`).
 3. A revision is kept as current only if no invalidation of it can have been missed: a reply that was under
    way while an invalidation was applied is corrected by it (`_ended_since`).
 4. A revision gets an end only from what came in the order of the stream. What is learned outside of it (by
    verification, or the outcome of an own commit on a later connection) makes the cache forget.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from zeoid import limits
from zeoid.errors import ServerError
from zeoid.model import NO_TID, Applied, Revision, tid_after
from zeoid.ports import ObjectCache


class Listener(Protocol):
    """What a ZODB database offers to be told of changes."""

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None: ...

    def invalidateCache(self) -> None: ...


class View:
    """See the module."""

    def __init__(self, cache: ObjectCache) -> None:
        self.cache = cache
        self.listener: Listener | None = None
        self._lock = threading.RLock()
        self._last: bytes = NO_TID
        #: An object that the transaction `_last` wrote, if one is known.
        self._witness: bytes | None = None
        #: Lookups that found something, and that did not; approximately, where threads look at once.
        self.hits = 0
        self.misses = 0
        #: How many invalidations were applied: taken when a load is sent, given to `loaded` with its reply.
        self.mark = 0
        #: (number of the application, tid, oids), oldest first
        self._recent: deque[tuple[int, bytes, frozenset[bytes]]] = deque(maxlen=limits.RECENT_INVALIDATIONS)

    def last_tid(self) -> bytes:
        """The newest transaction whose changes ZODB and the cache have been told completely."""
        with self._lock:
            return self._last

    # Loading --------------------------------------------------------------------------------------

    def lookup(self, oid: bytes, tid: bytes) -> Revision | None:
        """What the cache knows for sure of *oid* before *tid*."""
        found = self.cache.load_before(oid, tid, self._last)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def is_settled(self, tid: bytes) -> bool:
        """Whether what there is before *tid* can't change any more, and was told."""
        return tid <= tid_after(self._last)

    def loaded(self, asked: tuple[bytes, int, bytes], reply: Any) -> Revision | None:
        """A reply to a load arrived; *asked*: the oid, `mark` when the load was sent, and its tid."""
        if reply is None:
            return None
        sound = type(reply) is tuple and len(reply) == 3
        if sound:
            data, start, end = reply
            sound = type(data) is type(start) is bytes and len(start) == 8
            sound = sound and (end is None or (type(end) is bytes and len(end) == 8 and start < end))
        if not sound:
            raise ServerError("the server answered a load with what is no revision")
        oid, mark, _ = asked
        # A new connection may be catching up while the old one's last replies come in. (An interruption can
        # come between a bare acquire and what releases it, but not into a `with`.)
        with self._lock:
            if end is None and mark != self.mark:
                known, end = self._ended_since(mark, oid, start)
                if not known:
                    return data, start, None
            self.cache.store(oid, start, end, data)
        return data, start, end

    def loaded_many(self, asked: tuple[Sequence[bytes], int, bytes], reply: Any) -> int:
        """As `loaded`, for the reply to a bulk load; *asked* has all the oids.

        How many of the oids it answers: those at the beginning.
        """
        oids, mark, _ = asked
        if type(reply) not in (tuple, list) or not 0 < len(reply) <= len(oids):
            raise ServerError("the server answered a bulk load with what is none")
        revisions: list[tuple[bytes, Revision]] = []
        for pair in zip(oids, reply, strict=False):
            revision = pair[1]
            if revision is None:
                continue
            sound = type(revision) is tuple and len(revision) == 3
            if sound:
                data, start, end = revision
                sound = type(data) is type(start) is bytes and len(start) == 8
                sound = sound and (end is None or (type(end) is bytes and len(end) == 8 and start < end))
            if not sound:
                raise ServerError("the server answered a bulk load with what is no revision")
            revisions.append(pair)
        with self._lock:
            if mark != self.mark:
                revisions = self._corrected(mark, revisions)
            self.cache.store_many(revisions)
        return len(reply)

    def _corrected(
        self, mark: int, revisions: Iterable[tuple[bytes, Revision]]
    ) -> list[tuple[bytes, Revision]]:
        """*revisions*, which were asked for at *mark*, as they are now, without what isn't known any more."""
        corrected: list[tuple[bytes, Revision]] = []
        for oid, (data, start, end) in revisions:
            if end is None:
                known, end = self._ended_since(mark, oid, start)
                if not known:
                    continue
            corrected.append((oid, (data, start, end)))
        return corrected

    def _ended_since(self, mark: int, oid: bytes, start: bytes) -> tuple[bool, bytes | None]:
        """(whether it is known, the tid) of the first invalidation after *mark* that ended *oid*@*start*."""
        with self._lock:
            if not self._recent or self._recent[0][0] > mark + 1:
                return False, None
            end = None
            for number, tid, oids in reversed(self._recent):  # of many, hardly any came after the mark
                if number <= mark:
                    break
                if oid in oids and tid > start and (end is None or tid < end):
                    end = tid
        return True, end

    def forget(self, oid: bytes) -> None:
        """What is known of the current revision of *oid* has turned out to be wrong."""
        with self._lock:
            self.cache.forget((oid,))

    # What the server says -------------------------------------------------------------------------

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """Another client committed *tid*, writing *oids*."""
        with self._lock:
            written = frozenset(oids)
            self._note(tid, written)
            self.cache.invalidate(tid, written)
            if self.listener is not None:
                self.listener.invalidate(tid, written)
            self._advance(tid, written)

    def _advance(self, tid: bytes, written: Iterable[bytes] = ()) -> None:
        if tid > self._last:
            self._last = tid
            self._witness = next(iter(written), None)

    def finished(
        self,
        tid: bytes,
        written: Mapping[bytes, bytes | None],
        mark: int,
        callback: Callable[[bytes], Any] | None,
    ) -> None:
        """Our own transaction was committed as *tid*; *written* has the new data where we know it."""
        with self._lock:
            self._note(tid, frozenset(written))
            self.cache.invalidate(tid, written)
            for oid, data in written.items():
                if data is not None:
                    known, end = self._ended_since(mark, oid, tid)
                    if known:
                        self.cache.store(oid, tid, end, data)
            if callback is not None:
                callback(tid)
            self._advance(tid, written)

    def learned(self, tid: bytes, written: Iterable[bytes], callback: Callable[[bytes], Any] | None) -> None:
        """Our own transaction was committed as *tid*, as a later connection than its own has told.

        That connection's verification, or an invalidation, may have told of it before, and of newer ones.
        """
        with self._lock:
            oids = frozenset(written)
            self._note(tid, oids)
            self.cache.caught_up(self._last, tid, oids)
            if callback is not None:
                callback(tid)
            self._advance(tid, oids)

    def _note(self, tid: bytes, written: frozenset[bytes]) -> None:
        self.mark += 1
        self._recent.append((self.mark, tid, written))

    # Verification, when a connection is made ------------------------------------------------------

    def known(self) -> Applied:
        """Up to where what we have is true: what a new connection has to be verified from.

        That is our own last tid, or what others have told the cache that we share with them.
        """
        with self._lock:
            applied = self.cache.applied()
            if self._last == NO_TID:
                return applied
            return self._last, self._witness or self.cache.written_by(self._last)

    def catch_up(self, since: bytes, tid: bytes, oids: Iterable[bytes]) -> None:
        """*oids* were written by the transactions after *since* up to *tid*; by which ones isn't known."""
        with self._lock:
            written = frozenset(oids)
            self.cache.caught_up(since, tid, written)
            if self.listener is not None:
                self.listener.invalidate(tid, written)
            self._forget_recent()
            self._advance(tid)

    def start_over(self, tid: bytes) -> None:
        """So much was missed up to *tid* that nothing current can be kept."""
        with self._lock:
            self.cache.started_over(tid)
            if self.listener is not None:
                self.listener.invalidateCache()
            self._forget_recent()
            self._advance(tid)

    def restored(self, tid: bytes) -> None:
        """The database has another history than the one we knew, up to *tid*: forget everything.

        Here, and only here, the last tid may go back.
        """
        with self._lock:
            self.cache.clear()
            self._last = NO_TID
            self.start_over(tid)

    def begin(self, tid: bytes) -> None:
        """The first connection: nothing is known beyond what the cache knows, which is up to *tid*."""
        with self._lock:
            self.cache.started_over(tid)
            self._advance(tid)

    def _forget_recent(self) -> None:
        # No load survives a change of connections, so no mark from before is ever used again.
        self.mark += 1
        self._recent.clear()

    def after_fork(self, make_cache: Callable[[bytes], ObjectCache]) -> None:
        """In a forked child: locks and cache may have been in use by threads that do not exist here.

        *make_cache* makes one that has to be where we are, at the tid that it is given.
        """
        self._lock = threading.RLock()
        cache = make_cache(self._last)
        self.cache = cache
        self._forget_recent()
