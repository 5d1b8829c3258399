"""Many revisions into the cache at once, with as few messages as the server knows how to answer.

Owns what is asked for, in which portions, and what is asked for again. What comes is the view's to keep.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from zeoid import limits
from zeoid.client.channel import Channel
from zeoid.client.merging import all_loads
from zeoid.client.view import View
from zeoid.errors import Disconnected, ServerError

#: Calls a function with the connection and the time that is left, and once more on the next connection.
Repeatedly = Callable[[Callable[[Channel, float], Any]], Any]


class Prefetching:
    """One prefetch, of revisions before *tid*."""

    def __init__(self, view: View, repeatedly: Repeatedly, tid: bytes) -> None:
        self._view = view
        self._repeatedly = repeatedly
        self._tid = tid

    def prefetch(self, oids: Iterable[bytes]) -> None:
        """Have the revisions of *oids* in the cache, except those that can't be had."""
        missing = self._missing(dict.fromkeys(oids))
        for start in range(0, len(missing), limits.PREFETCH_WINDOW):
            window = missing[start : start + limits.PREFETCH_WINDOW]
            while window:
                window = self._repeatedly(partial(self._ask, window))

    def _missing(self, oids: Iterable[bytes]) -> list[bytes]:
        lookup, tid = self._view.lookup, self._tid
        return [oid for oid in oids if lookup(oid, tid) is None]

    def _ask(self, oids: Sequence[bytes], channel: Channel, left_s: float) -> list[bytes]:
        """Ask for all of *oids* at once; those that are to be asked for again."""
        others = all_loads(channel, self._view, self._tid) if channel.pending else {}
        if others.keys().isdisjoint(oids):
            return self._load(oids, channel, left_s)
        deadline_s = time.monotonic() + left_s
        left = self._load([oid for oid in oids if oid not in others], channel, left_s)
        awaited = [oid for oid in oids if oid in others]
        for waiter in dict.fromkeys(others[oid] for oid in awaited):
            channel.follow(waiter, deadline_s - time.monotonic())
        return left + self._load(self._missing(awaited), channel, deadline_s - time.monotonic())

    def _load(self, oids: Sequence[bytes], channel: Channel, left_s: float) -> list[bytes]:
        """As `_ask`, whatever other threads do."""
        if not oids:
            return []
        view, mark, tid = self._view, self._view.mark, self._tid
        if "loadBeforeMany" not in channel.extensions:
            single = [(oid, tid) for oid in oids]
            channel.call_all("loadBefore", single, left_s, view.loaded, [(oid, mark, tid) for oid in oids])
            return []
        wrong: list[ServerError] = []

        def loaded(asked: tuple[Sequence[bytes], int, bytes], reply: Any) -> int:
            try:
                return view.loaded_many(asked, reply)
            except ServerError as problem:
                wrong.append(problem)
                raise

        most = limits.BULK_LOAD_OIDS
        portions = [oids[start : start + most] for start in range(0, len(oids), most)]
        calls = [(portion, tid) for portion in portions]
        contexts = [(portion, mark, tid) for portion in portions]
        try:
            answered = channel.call_all("loadBeforeMany", calls, left_s, loaded, contexts)
        except Disconnected:
            if wrong:  # it was us who broke it off
                raise wrong[0] from None
            raise
        if wrong:
            raise wrong[0]
        left: list[bytes] = []
        for portion, count in zip(portions, answered, strict=True):
            if type(count) is int:  # what could not be answered is left to the load that needs it
                left += portion[count:]
        return left
