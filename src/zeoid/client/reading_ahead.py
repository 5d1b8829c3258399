"""Reading ahead: what a loaded object refers to is asked for before the application does, over slow links.

    event                                             credit              what follows
    a load took a round trip, as fast as usual        –                   nothing: reading ahead is off
    `READ_AHEAD_SLOW_LOADS` in a row took longer      –                   reading ahead is on
    a load took a round trip, a long one              + a little          a trail begins with its references
    a record that came ahead is used                  + more than it      its trail goes on from there
                                                        cost
    a record is asked for ahead                       - 1

So credit grows where what comes ahead is used, and runs out where it is not: then one record comes ahead
for every few loads, to find out whether that has changed.

A trail is what an object leads to, in the order in which an application that follows every reference would
get there; it looks through up to `READ_AHEAD_DEPTH` records that nobody has used yet. Trails that prove right
are followed further ahead; of those that don't, the oldest are given up.

Owns what is wanted, and what came and was not used. Must not know how a reply is kept (the view's business).
Nothing waits for replies: they are delivered by whoever reads the connection. Many records are asked for with
one message (`loadBeforeMany`), or one by one of a server that doesn't know it.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ZODB.serialize import referencesf

from zeoid import limits
from zeoid.client.channel import Channel
from zeoid.client.view import View
from zeoid.model import Revision

#: What a load asks for, as `View.loaded` and `View.loaded_many` take it.
_Asked = tuple[Any, int, bytes]


class _Trail:
    """Where an application may go from one object."""

    def __init__(self, oids: Iterable[bytes]) -> None:
        self.oids = deque(oids)
        #: How many records that nobody has used yet lie between one and a used one, unless none.
        self.depths: dict[bytes, int] = {}
        #: How many of the next records may be asked for.
        self.window = limits.READ_AHEAD_FIRST

    def go_on_from(self, oid: bytes, references: Iterable[bytes]) -> bool:
        """The application is at *oid*. False if that lies not on this trail."""
        try:
            self.oids.rotate(-self.oids.index(oid))
        except ValueError:
            return False
        self.depths.pop(self.oids.popleft(), None)
        for reference in references:
            self.depths.pop(reference, None)
        self.put_first(references)
        self.window = min(2 * self.window, limits.READ_AHEAD_MOST)
        return True

    def look_through(self, oid: bytes, references: Sequence[bytes]) -> None:
        """*oid*, which was first and is taken off, will lead to these."""
        depth = self.depths.get(oid, 0) + 1
        for reference in references:
            self.depths.setdefault(reference, depth)
        self.put_first(references)

    def put_first(self, oids: Iterable[bytes]) -> None:
        self.oids.extendleft(reversed(list(oids)))
        while len(self.oids) > limits.READ_AHEAD_TRAIL:
            self.depths.pop(self.oids.pop(), None)


class ReadAhead:
    """See the module. Safe for use by several threads."""

    def __init__(self, view: View, room_bytes: int, timeout_s: float) -> None:
        """*room_bytes*: what may be there that nobody has used yet; with 0 nothing is read ahead."""
        self._view = view
        self._room_bytes = room_bytes
        self._timeout_s = timeout_s
        #: What came ahead and was not used yet, with the sizes. To be looked at by anyone.
        self.unused: dict[bytes, int] = {}
        #: Loads in a row that took long.
        self.slow_loads = 0
        #: How many records were asked for, and how many of them were used.
        self.asked = 0
        self.used = 0
        self._unused_bytes = 0
        self._credit = float(limits.READ_AHEAD_FIRST)
        #: The one that proved right last comes first.
        self._trails: list[_Trail] = []
        #: What was used since anything was asked for, with its references.
        self._recent: deque[tuple[bytes, list[bytes]]] = deque(maxlen=limits.READ_AHEAD_USES)
        #: Those of `unused` that were looked through.
        self._opened: set[bytes] = set()
        self._under_way: set[bytes] = set()
        #: What there was not when it was asked for: references may lead nowhere.
        self._absent: set[bytes] = set()
        self._channel: Channel | None = None
        self._lock = threading.Lock()

    # What the storage tells -------------------------------------------------------------------------

    def loaded_slowly(self, channel: Channel, oid: bytes, tid: bytes, revision: Revision | None) -> None:
        """The application has loaded *oid* from the server, which took long."""
        self.slow_loads += 1
        if revision is None or not self._room_bytes or not self._view.is_settled(tid):
            return
        with self._lock:
            is_on = self.slow_loads >= limits.READ_AHEAD_SLOW_LOADS
            if is_on:
                self._earn(limits.READ_AHEAD_CREDIT_OF_A_LOAD)
            if self._credit < 1:
                return  # it does not pay: not even looking into what was loaded
            self._recent.append((oid, _references(revision[0])))
            oids = self._next(channel, tid) if is_on else []
        self._ask(channel, oids, tid)

    def was_used(self, channel: Channel, oid: bytes, tid: bytes, revision: Revision) -> None:
        """The application has used *oid*, which is in `unused`."""
        with self._lock:
            if oid not in self.unused:
                return  # another thread was faster
            self._drop(oid)
            self.used += 1
            self._earn(limits.READ_AHEAD_CREDIT_OF_A_USE)
            self._recent.append((oid, _references(revision[0])))
            oids = self._next(channel, tid)
        self._ask(channel, oids, tid)

    # What to ask for --------------------------------------------------------------------------------

    def _earn(self, credit: float) -> None:
        self._credit = min(self._credit + credit, limits.READ_AHEAD_MOST)

    def _next(self, channel: Channel, tid: bytes) -> list[bytes]:
        """What to ask for now that an object was used; it counts as asked for."""
        if channel is not self._channel or not channel.pending:
            # Of what another connection was asked for nothing comes, nor of what could not be had.
            self._channel = channel
            self._under_way.clear()
        enough = min(limits.READ_AHEAD_USES, len(self.unused) + len(self._under_way))
        if len(self._recent) < enough and not self._lacks(self._recent[-1][1]):
            return []  # too little to be worth a message
        self._find_trails()
        missing: list[bytes] = []
        for trail in self._trails:
            missing += self._missing(trail, int(self._credit) - len(missing), tid)
        self._credit -= len(missing)
        self.asked += len(missing)
        return missing

    def _lacks(self, oids: Iterable[bytes]) -> bool:
        """Whether some are not known to be here or under way."""
        return any(oid not in self.unused and oid not in self._under_way for oid in oids)

    def _find_trails(self) -> None:
        """Where the application has gone."""
        last = self._recent[-1][0]
        for oid, references in self._recent:
            if not references and oid is not last:
                continue
            for trail in self._trails:
                if trail.go_on_from(oid, references):
                    break
            else:
                if not references:
                    continue
                trail = _Trail(references)
                self._trails.append(trail)
            self._trails.remove(trail)
            self._trails.insert(0, trail)
        self._recent.clear()
        del self._trails[limits.READ_AHEAD_TRAILS :]

    def _missing(self, trail: _Trail, most: int, tid: bytes) -> list[bytes]:
        """Those of the next ones on a trail that are neither here nor under way. Now they are.

        They stay on the trail until they are used: so the next ones are found from there on.
        """
        cache, last_tid = self._view.cache, self._view.last_tid()
        oids, unused, under_way = trail.oids, self.unused, self._under_way
        missing: list[bytes] = []
        next_ones: dict[bytes, None] = {}
        while oids and len(missing) < most and len(next_ones) < trail.window:
            oid = oids.popleft()
            if oid in next_ones:
                continue
            if oid in unused:
                if oid not in self._opened and trail.depths.get(oid, 0) < limits.READ_AHEAD_DEPTH:
                    self._opened.add(oid)
                    found = cache.load_before(oid, tid, last_tid)
                    if found is not None:
                        trail.look_through(oid, _references(found[0]))
            elif oid not in under_way:
                if oid in self._absent or cache.load_before(oid, tid, last_tid) is not None:
                    trail.depths.pop(oid, None)
                    continue
                missing.append(oid)
                under_way.add(oid)
            next_ones[oid] = None
        trail.put_first(next_ones)
        return missing

    def _ask(self, channel: Channel, oids: Sequence[bytes], tid: bytes) -> None:
        if not oids:
            return
        mark = self._view.mark
        if "loadBeforeMany" in channel.extensions:
            most = limits.BULK_LOAD_OIDS
            portions = [oids[start : start + most] for start in range(0, len(oids), most)]
            channel.begin(
                "loadBeforeMany", [(portion, tid) for portion in portions], self._timeout_s,
                partial(self._many_arrived, channel), [(portion, mark, tid) for portion in portions],
            )  # fmt: skip
        else:
            channel.begin(
                "loadBefore", [(oid, tid) for oid in oids], self._timeout_s,
                partial(self._one_arrived, channel), [(oid, mark, tid) for oid in oids],
            )  # fmt: skip

    # What comes -------------------------------------------------------------------------------------

    def _many_arrived(self, channel: Channel, asked: _Asked, reply: Any) -> int:
        count = self._view.loaded_many(asked, reply)
        oids = asked[0]
        self._note(channel, oids, zip(oids, reply, strict=False))
        return count

    def _one_arrived(self, channel: Channel, asked: _Asked, reply: Any) -> Revision | None:
        revision = self._view.loaded(asked, reply)
        self._note(channel, (asked[0],), ((asked[0], revision),))
        return revision

    def _note(
        self, channel: Channel, asked: Iterable[bytes], came: Iterable[tuple[bytes, Revision | None]]
    ) -> None:
        with self._lock:
            if channel is self._channel:
                self._under_way.difference_update(asked)
            for oid, revision in came:
                if revision is None:
                    if len(self._absent) >= limits.READ_AHEAD_MOST:
                        self._absent.clear()
                    self._absent.add(oid)
                    continue
                self._drop(oid)
                self.unused[oid] = size_bytes = len(revision[0])
                self._unused_bytes += size_bytes
            while len(self.unused) > 2 * limits.READ_AHEAD_MOST or self._unused_bytes > self._room_bytes:
                self._drop(next(iter(self.unused)))

    def _drop(self, oid: bytes) -> None:
        self._unused_bytes -= self.unused.pop(oid, 0)
        self._opened.discard(oid)


def _references(data: bytes) -> list[bytes]:
    """The oids that a record refers to, in order."""
    if _PERSISTENT_ID not in data:
        return []
    try:
        return list(dict.fromkeys(referencesf(data)))
    except Exception:  # what can't be read is for whoever loads it to complain of
        return []


#: The opcode of a pickle behind every reference.
_PERSISTENT_ID = b"Q"
