"""The object cache in this process's memory: bounded, least recently used first out.

Owns which revisions are kept. A revision is current (no end known) or history (start and end known). Its
one law: what it answers is what the server would answer. So a current revision answers only up to the tid
whose invalidations it was told, and history answers only between its start and its end.
"""

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

from zeoid import limits
from zeoid.model import Revision

#: What a revision costs besides its data: the objects that hold it.
_OVERHEAD_BYTES = 300


class MemoryCache:
    """See the module. Safe for use by several threads."""

    def __init__(self, size_bytes: int = limits.CACHE_BYTES) -> None:
        self._size_bytes = size_bytes
        self._used_bytes = 0
        self._lock = Lock()
        self._current: dict[bytes, Revision] = {}
        #: oid → revisions that ended, in any order; none of them overlap
        self._ended: dict[bytes, list[Revision]] = {}
        #: oids by use, the least recent first
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def load_before(self, oid: bytes, tid: bytes, applied: bytes) -> Revision | None:
        with self._lock:
            revision = self._current.get(oid)
            if revision is not None and revision[1] < tid:
                # "Before tid" is known up to the revision after *applied*, and not beyond.
                if tid <= applied or int.from_bytes(tid, "big") == int.from_bytes(applied, "big") + 1:
                    self._order.move_to_end(oid)
                    return revision
                return None
            for revision in self._ended.get(oid, ()):
                if revision[1] < tid <= revision[2]:  # type: ignore[operator]
                    self._order.move_to_end(oid)
                    return revision
            return None

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        size_bytes = len(data) + _OVERHEAD_BYTES
        with self._lock:
            if end is None:
                known = self._current.get(oid)
                if known is not None and known[1] >= start:
                    return
                self._forget(oid)
            elif any(revision[1] == start for revision in self._ended.get(oid, ())):
                return
            if size_bytes > self._size_bytes:
                return
            if end is None:
                self._current[oid] = (data, start, None)
            else:
                self._keep_ended(oid, (data, start, end))
            self._used_bytes += size_bytes
            self._order[oid] = None
            self._order.move_to_end(oid)
            while self._used_bytes > self._size_bytes and self._order:
                self._evict()

    def _keep_ended(self, oid: bytes, revision: Revision) -> None:
        ended = self._ended.setdefault(oid, [])
        ended.append(revision)
        if len(ended) > limits.ENDED_REVISIONS:
            # An object that is written all the time would otherwise fill the cache with its past.
            oldest = min(range(len(ended)), key=lambda index: ended[index][1])
            self._used_bytes -= _cost(ended.pop(oldest))

    def _evict(self) -> None:
        oid, _ = self._order.popitem(last=False)
        current = self._current.pop(oid, None)
        if current is not None:
            self._used_bytes -= _cost(current)
        for revision in self._ended.pop(oid, ()):
            self._used_bytes -= _cost(revision)

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        with self._lock:
            for oid in oids:
                revision = self._current.get(oid)
                if revision is not None and revision[1] < tid:
                    del self._current[oid]
                    self._keep_ended(oid, (revision[0], revision[1], tid))
                for index, (data, start, end) in enumerate(self._ended.get(oid, ())):
                    if start < tid < end:  # type: ignore[operator]
                        # A later end was told first, when our own commit was still on its way to us.
                        self._ended[oid][index] = data, start, tid

    def forget(self, oids: Iterable[bytes]) -> None:
        with self._lock:
            for oid in oids:
                self._forget(oid)

    def forget_current(self) -> None:
        with self._lock:
            for oid in list(self._current):
                self._forget(oid)

    def _forget(self, oid: bytes) -> None:
        revision = self._current.pop(oid, None)
        if revision is not None:
            self._used_bytes -= _cost(revision)
            if oid not in self._ended:
                del self._order[oid]

    def clear(self) -> None:
        with self._lock:
            self._current.clear()
            self._ended.clear()
            self._order.clear()
            self._used_bytes = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._current) + sum(map(len, self._ended.values()))

    @property
    def used_bytes(self) -> int:
        """What the revisions take, approximately."""
        return self._used_bytes


def _cost(revision: Revision) -> int:
    return len(revision[0]) + _OVERHEAD_BYTES
