"""The object cache in this process's memory: bounded, least recently used first out.

Owns which revisions are kept. A revision is current (no end known) or history (start and end known). Its
one law: what it answers is what the server would answer. So a current revision answers only up to the tid
whose invalidations it was told, and history answers only between its start and its end.

Reading takes no lock: a reader meets each object's revisions as they were before or after a change, and
either is true for what it may ask. So what is changed in place here is dictionaries only, one key at a time;
a revision is in `_ended` before it leaves `_current`.
"""

from collections import OrderedDict
from collections.abc import Iterable

from zeoid import limits
from zeoid.model import Revision

#: What a revision costs besides its data: the objects that hold it.
_OVERHEAD_BYTES = 300


class MemoryCache:
    """See the module."""

    def __init__(self, size_bytes: int = limits.CACHE_BYTES) -> None:
        self._size_bytes = size_bytes
        self._used_bytes = 0
        self._current: dict[bytes, Revision] = {}
        #: oid → revisions that ended, in any order; none of them overlap
        self._ended: dict[bytes, tuple[Revision, ...]] = {}
        #: oids by use, the least recent first
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def load_before(self, oid: bytes, tid: bytes, applied: bytes) -> Revision | None:
        revision = self._current.get(oid)
        if revision is not None and revision[1] < tid:
            # "Before tid" is known up to the revision after *applied*, and not beyond.
            if tid <= applied or int.from_bytes(tid, "big") == int.from_bytes(applied, "big") + 1:
                self._use(oid)
                return revision
            return None
        for revision in self._ended.get(oid, ()):
            if revision[1] < tid <= revision[2]:  # type: ignore[operator]
                self._use(oid)
                return revision
        return None

    def _use(self, oid: bytes) -> None:
        try:  # noqa: SIM105 - this is the way of every hit
            self._order.move_to_end(oid)
        except KeyError:
            pass  # it was evicted at this moment

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        size_bytes = len(data) + _OVERHEAD_BYTES
        if oid in self._order:
            if self._knows(oid, start, end):
                return
            if end is None:
                self._forget(oid)
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

    def _knows(self, oid: bytes, start: bytes, end: bytes | None) -> bool:
        """Whether it has this revision already, or a newer one that is current."""
        if end is None:
            current = self._current.get(oid)
            return current is not None and current[1] >= start
        return any(revision[1] == start for revision in self._ended.get(oid, ()))

    def _keep_ended(self, oid: bytes, revision: Revision) -> None:
        ended = (*self._ended.get(oid, ()), revision)
        if len(ended) > limits.ENDED_REVISIONS:
            # An object that is written all the time would otherwise fill the cache with its past.
            oldest = min(ended, key=lambda revision: revision[1])
            ended = tuple(revision for revision in ended if revision is not oldest)
            self._used_bytes -= _cost(oldest)
        self._ended[oid] = ended

    def _evict(self) -> None:
        oid, _ = self._order.popitem(last=False)
        current = self._current.pop(oid, None)
        if current is not None:
            self._used_bytes -= _cost(current)
        for revision in self._ended.pop(oid, ()):
            self._used_bytes -= _cost(revision)

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        for oid in oids:
            ended = self._ended.get(oid, ())
            if any(revision[1] < tid < revision[2] for revision in ended):  # type: ignore[operator]
                # A later end was told first, when our own commit was still on its way to us.
                self._ended[oid] = tuple(
                    (data, start, tid if start < tid < end else end)  # type: ignore[operator]
                    for data, start, end in ended
                )
            revision = self._current.get(oid)
            if revision is not None and revision[1] < tid:
                self._keep_ended(oid, (revision[0], revision[1], tid))
                del self._current[oid]

    def forget(self, oids: Iterable[bytes]) -> None:
        for oid in oids:
            self._forget(oid)

    def forget_current(self) -> None:
        for oid in list(self._current):
            self._forget(oid)

    def _forget(self, oid: bytes) -> None:
        revision = self._current.pop(oid, None)
        if revision is not None:
            self._used_bytes -= _cost(revision)
            if oid not in self._ended:
                del self._order[oid]

    def clear(self) -> None:
        self._current.clear()
        self._ended.clear()
        self._order.clear()
        self._used_bytes = 0

    def __len__(self) -> int:
        return len(self._current) + sum(map(len, self._ended.values()))

    @property
    def used_bytes(self) -> int:
        """What the revisions take, approximately."""
        return self._used_bytes


def _cost(revision: Revision) -> int:
    return len(revision[0]) + _OVERHEAD_BYTES
