"""What became of the latest transactions with client-made ids. Owns what is remembered, and for how long."""

from collections.abc import Hashable

from zeoid import limits
from zeoid.ports import Outcomes


class DecidedOutcomes:
    """Committed and given up; what is neither is not decided yet, or forgotten."""

    def __init__(self, known: Outcomes) -> None:
        #: The newest tid that a forgotten id may belong to.
        self.floor = known.floor
        self._committed = dict(known.committed)
        self._denied: dict[bytes, None] = {}

    def tid(self, id: bytes) -> bytes | None:
        return self._committed.get(id)

    def is_over(self, id: Hashable) -> bool:
        return id in self._committed or id in self._denied

    def note(self, id: bytes, tid: bytes) -> None:
        self._committed[id] = tid
        if len(self._committed) > limits.OUTCOMES:
            self.floor = max(self.floor, self._committed.pop(next(iter(self._committed))))

    def deny(self, id: bytes) -> None:
        self._denied[id] = None
        if len(self._denied) > limits.OUTCOMES:
            del self._denied[next(iter(self._denied))]
