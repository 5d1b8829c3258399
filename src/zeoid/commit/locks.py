"""Locks on objects, taken all at once, first come first served.

A claim asks for everything it needs in one step: objects to write (exclusive), objects that must not change
(shared), or the whole storage. It stands in the queue of each of them from then on, and is granted when it
has come to the front of all. Owns who holds and who waits; knows nothing of what for, of time, or of errors.

Invariants:
 1. Nobody holds an object together with somebody who writes it; nobody holds anything while somebody holds
    the whole.
 2. Of two claims that exclude each other the earlier one is granted first, so there is no deadlock: the
    earliest claim of all waits for nobody.
 3. In each queue those who have reached the front are its first entries; they are a single claim, or share.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any, Final

#: Everybody takes a share of this key, or all of it.
_WHOLE: Final = b""


class Claim:
    """What somebody asked for. `missing` counts the queues whose front it has not reached: 0 is granted."""

    __slots__ = ("_wanted", "missing", "who")

    def __init__(self, who: Any, wanted: dict[bytes, bool]) -> None:
        self.who = who
        #: Whether it is exclusive, for each key.
        self._wanted = wanted
        self.missing = 0

    @property
    def oids(self) -> list[bytes]:
        """The objects that it asks for."""
        return [key for key in self._wanted if key != _WHOLE]


class _Queue:
    """The claims on one key in the order in which they came; the first `front` of them hold it."""

    __slots__ = ("claims", "front", "shared")

    def __init__(self, first: Claim, shared: bool) -> None:
        self.claims: dict[Claim, bool] = {first: not shared}
        self.front = 1
        self.shared = shared

    def add(self, claim: Claim, exclusive: bool) -> None:
        if self.shared and not exclusive and self.front == len(self.claims):
            self.front += 1
        else:
            claim.missing += 1
        self.claims[claim] = exclusive

    def remove(self, claim: Claim) -> list[Claim]:
        """Take it out; those who have reached the front of all their queues because of that."""
        if self.front == len(self.claims):
            self.front -= 1
            del self.claims[claim]
            return []
        position = 0
        for position, each in enumerate(self.claims):
            if each is claim or position == self.front:
                break
        if position < self.front:
            self.front -= 1
        del self.claims[claim]
        granted = []
        for next_one, exclusive in islice(self.claims.items(), self.front, None):
            if self.front and (exclusive or not self.shared):
                break
            self.front += 1
            self.shared = not exclusive
            next_one.missing -= 1
            if not next_one.missing:
                granted.append(next_one)
        return granted


class Locks:
    """The locks of one storage."""

    def __init__(self) -> None:
        #: A claim that nobody else wants the key of stands there by itself: most are alone.
        self._keys: dict[bytes, Claim | _Queue] = {}

    def claim(
        self, who: Any, exclusive: Iterable[bytes], shared: Iterable[bytes] = (), *, whole: bool = False
    ) -> Claim:
        """Ask for all of it; granted at once if `missing` is 0, otherwise by a later `release`."""
        wanted = dict.fromkeys(shared, False)
        wanted.update(dict.fromkeys(exclusive, True))
        wanted[_WHOLE] = whole
        claim = Claim(who, wanted)
        keys = self._keys
        for key, is_exclusive in wanted.items():
            found = keys.setdefault(key, claim)
            if found is claim:
                continue
            if type(found) is Claim:
                found = keys[key] = _Queue(found, not found._wanted[key])
            found.add(claim, is_exclusive)  # type: ignore[union-attr]
        return claim

    def release(self, claim: Claim) -> list[Claim]:
        """Give back what it holds, or leave the queues; the claims that are granted by that."""
        granted: list[Claim] = []
        keys = self._keys
        for key in claim._wanted:
            found = keys[key]
            if found is claim:
                del keys[key]
                continue
            assert type(found) is _Queue
            granted += found.remove(claim)
            if not found.claims:
                del keys[key]
        return granted

    def __len__(self) -> int:
        """How many keys somebody holds or waits for."""
        return len(self._keys)
