"""The object cache in this process's memory: bounded, what was not used lately first out.

Owns which revisions are kept. A revision is current (no end known) or history (start and end known). Its
one law: what it answers is what the server would answer. So a current revision answers only up to the tid
whose invalidations it was told, and history answers only between its start and its end.

Reading takes no lock: a reader meets each object's revisions as they were before or after a change, and
either is true for what it may ask. So what is changed in place here is dictionaries only, one key at a time;
a revision is in `_ended` before it leaves `_current`.
"""

import itertools
from collections import deque
from collections.abc import Iterable

from zeoid import limits
from zeoid.model import NO_TID, Applied, CacheFigures, Revision

#: What a revision costs besides its data: the objects that hold it.
_OVERHEAD_BYTES = 300
#: Places in the queue that may be out of date before it is tidied up.
_QUEUE_SLACK = 1000


class MemoryCache:
    """See the module."""

    def __init__(self, size_bytes: int = limits.CACHE_BYTES) -> None:
        self._size_bytes = size_bytes
        #: What the revisions take, approximately.
        self.used_bytes = 0
        self._evictions = 0
        self._current: dict[bytes, Revision] = {}
        #: oid → revisions that ended, oldest first; none of them overlap
        self._ended: dict[bytes, tuple[Revision, ...]] = {}
        #: Whose turn it is to go. Among them may be oids that were forgotten meanwhile, or came back.
        self._queue: deque[bytes] = deque()
        #: Used since they were queued: they get another turn.
        self._used: set[bytes] = set()

    def load_before(self, oid: bytes, tid: bytes, applied: bytes) -> Revision | None:
        revision = self._current.get(oid)
        if revision is not None and revision[1] < tid:
            # "Before tid" is known up to the revision after *applied*, and not beyond.
            if tid <= applied or int.from_bytes(tid, "big") == int.from_bytes(applied, "big") + 1:
                self._used.add(oid)
                return revision
            return None
        for revision in self._ended.get(oid, ()):
            if revision[1] < tid <= revision[2]:  # type: ignore[operator]
                self._used.add(oid)
                return revision
        return None

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        size_bytes = len(data) + _OVERHEAD_BYTES
        known = oid in self._current or oid in self._ended
        if known:
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
        self.used_bytes += size_bytes
        if known:
            self._used.add(oid)
        else:
            self._queue.append(oid)
        self._make_room()

    def _make_room(self) -> None:
        if len(self._queue) > 2 * (len(self._current) + len(self._ended)) + _QUEUE_SLACK:
            self._tidy()
        while self.used_bytes > self._size_bytes and self._queue:
            self._evict()

    def store_many(self, revisions: Iterable[tuple[bytes, Revision]]) -> None:
        current, ended, queue = self._current, self._ended, self._queue
        for oid, revision in revisions:
            data, start, end = revision
            size_bytes = len(data) + _OVERHEAD_BYTES
            if end is None and oid not in current and oid not in ended and size_bytes <= self._size_bytes:
                current[oid] = revision
                queue.append(oid)
                self.used_bytes += size_bytes
            else:
                self.store(oid, start, end, data)
        self._make_room()

    def _knows(self, oid: bytes, start: bytes, end: bytes | None) -> bool:
        """Whether it has this revision already, or a newer one that is current."""
        if end is None:
            current = self._current.get(oid)
            return current is not None and current[1] >= start
        return any(revision[1] == start for revision in self._ended.get(oid, ()))

    def _keep_ended(self, oid: bytes, revision: Revision) -> None:
        ended = (*self._ended.get(oid, ()), revision)
        if len(ended) > 1 and revision[1] < ended[-2][1]:
            ended = tuple(sorted(ended, key=lambda revision: revision[1]))
        if len(ended) > limits.ENDED_REVISIONS:
            # An object that is written all the time would otherwise fill the cache with its past.
            self.used_bytes -= _cost(ended[0])
            ended = ended[1:]
        self._ended[oid] = ended

    def _tidy(self) -> None:
        """Drop the places in the queue of what is not here, and the second ones."""
        there = self._current.keys() | self._ended.keys()
        self._queue = deque(oid for oid in dict.fromkeys(self._queue) if oid in there)
        self._used &= there

    def _evict(self) -> None:
        oid = self._queue.popleft()
        if oid in self._used:
            self._used.discard(oid)
            self._queue.append(oid)
            return
        current = self._current.pop(oid, None)
        if current is not None:
            self.used_bytes -= _cost(current)
            self._evictions += 1
        for revision in self._ended.pop(oid, ()):
            self.used_bytes -= _cost(revision)
            self._evictions += 1

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        for oid in oids:
            ended = self._ended.get(oid, ())
            if ended and tid < ended[-1][2]:  # type: ignore[operator]
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

    def caught_up(self, since: bytes, tid: bytes, oids: Iterable[bytes]) -> None:
        self.forget(oids)

    def started_over(self, tid: bytes) -> None:
        for oid in list(self._current):
            self._forget(oid)

    def _forget(self, oid: bytes) -> None:
        revision = self._current.pop(oid, None)
        if revision is not None:
            self.used_bytes -= _cost(revision)

    def some(self, most: int, most_bytes: int) -> list[tuple[bytes, bytes, bytes | None, bytes]]:
        """Up to *most* revisions as (oid, start, end, data), of *most_bytes* together, or a single one."""
        found: list[tuple[bytes, bytes, bytes | None, bytes]] = []
        left_bytes = most_bytes
        ended = ((oid, each) for oid, revisions in self._ended.items() for each in revisions)
        for oid, (data, start, end) in itertools.chain(ended, self._current.items()):
            left_bytes -= len(data)
            if found and (left_bytes < 0 or len(found) >= most):
                break
            found.append((oid, start, end, data))
        return found

    def remove(self, oid: bytes, start: bytes, end: bytes | None) -> None:
        """Remove one revision, if it is there and ends there."""
        if end is None:
            current = self._current.get(oid)
            if current is not None and current[1] == start:
                self._forget(oid)
            return
        ended = self._ended.get(oid, ())
        for revision in ended:
            if revision[1] == start and revision[2] == end:
                self.used_bytes -= _cost(revision)
                rest = tuple(each for each in ended if each is not revision)
                if rest:
                    self._ended[oid] = rest
                else:
                    del self._ended[oid]

    def grow(self, size_bytes: int) -> None:
        """Have room for so much, if there is less."""
        self._size_bytes = max(self._size_bytes, size_bytes)

    def clear(self) -> None:
        self._current.clear()
        self._ended.clear()
        self._queue.clear()
        self._used.clear()
        self.used_bytes = 0

    def applied(self) -> Applied:
        return NO_TID, None

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return len(self._current) + sum(map(len, self._ended.values()))

    def written_by(self, tid: bytes) -> bytes | None:
        return next((oid for oid, revision in self._current.items() if revision[1] == tid), None)

    def figures(self) -> CacheFigures:
        return CacheFigures(self.used_bytes, self._size_bytes, self._evictions)


def _cost(revision: Revision) -> int:
    return len(revision[0]) + _OVERHEAD_BYTES
