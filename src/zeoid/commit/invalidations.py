"""The invalidation log: what the latest transactions wrote, so that a client that was away can catch up.

Owns the bound on what is remembered. A client whose last tid is older than what is remembered must be told
so (`None`), never given half a list.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from zeoid import limits
from zeoid.model import NO_TID


class InvalidationLog:
    """The transactions after `floor`, every one of them, oldest first."""

    def __init__(
        self,
        last_tid: bytes,
        known: Iterable[tuple[bytes, Sequence[bytes]]] = (),
        *,
        transactions: int = limits.INVALIDATION_LOG_TRANSACTIONS,
        oids: int = limits.INVALIDATION_LOG_OIDS,
    ) -> None:
        """*known*: (tid, oids) of transactions up to *last_tid* without a gap, oldest first."""
        self._entries: deque[tuple[bytes, Sequence[bytes]]] = deque()
        self._most_transactions = transactions
        self._most_oids = oids
        self._oid_count = 0
        #: The newest tid that the log knows nothing about.
        self.floor = last_tid
        self.last_tid = last_tid
        known = list(known)
        if known and known[-1][0] == last_tid:
            # Something may stand before the oldest one; a client at its tid has seen that, too.
            self.floor = self.last_tid = known[0][0]
            for tid, written in known[1:]:
                self.append(tid, written)
        if last_tid == NO_TID:
            self.floor = NO_TID

    def append(self, tid: bytes, oids: Sequence[bytes]) -> None:
        """The next transaction. *tid* must be later than the last one."""
        if tid <= self.last_tid:
            raise AssertionError("transactions are logged in order")
        self._entries.append((tid, oids))
        self._oid_count += len(oids)
        self.last_tid = tid
        while len(self._entries) > self._most_transactions or self._oid_count > self._most_oids:
            self.floor, dropped = self._entries.popleft()
            self._oid_count -= len(dropped)

    def forget(self, tid: bytes) -> None:
        """It isn't known what changed up to *tid*."""
        self._entries.clear()
        self._oid_count = 0
        self.floor = self.last_tid = tid

    def may_have_changed(self, oid: bytes, after: bytes) -> bool:
        """Whether *oid* was written after *after*, or that isn't known any more."""
        if after < self.floor:
            return True
        for tid, oids in reversed(self._entries):
            if tid <= after:
                break
            if oid in oids:
                return True
        return False

    def since(self, tid: bytes) -> tuple[bytes, list[bytes]] | None:
        """(last tid, the oids written after *tid*), or None when that isn't known any more."""
        if tid < self.floor:
            return None
        changed: dict[bytes, None] = {}
        for when, oids in reversed(self._entries):
            if when <= tid:
                break
            changed.update(dict.fromkeys(oids))
        return self.last_tid, list(changed)

    def __len__(self) -> int:
        return len(self._entries)
