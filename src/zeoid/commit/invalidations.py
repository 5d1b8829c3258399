"""The invalidation log: what the latest transactions wrote, so that a client that was away can catch up.

Owns the bound on what is remembered. A client whose last tid is older than what is remembered must be told
so (`None`), never given half a list.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from zeoid import limits
from zeoid.model import NO_TID

_OID_BYTES = 8
#: What a transaction takes besides its oids: a tuple with two strings of bytes, in a queue.
ENTRY_BYTES = 140


class InvalidationLog:
    """The transactions after `floor`, every one of them, oldest first."""

    def __init__(
        self,
        last_tid: bytes,
        known: Iterable[tuple[bytes, Sequence[bytes]]] = (),
        *,
        transactions: int = limits.INVALIDATION_LOG_TRANSACTIONS,
        size_bytes: int = limits.INVALIDATION_LOG_BYTES,
    ) -> None:
        """*known*: (tid, oids) of transactions up to *last_tid* without a gap, oldest first."""
        #: (tid, its oids, one behind the other)
        self._entries: deque[tuple[bytes, bytes]] = deque()
        self._most_transactions = transactions
        self._most_bytes = size_bytes
        self._used_bytes = 0
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
        joined = b"".join(oids)
        self._entries.append((tid, joined))
        self._used_bytes += len(joined) + ENTRY_BYTES
        self.last_tid = tid
        while len(self._entries) > self._most_transactions or self._used_bytes > self._most_bytes:
            self.floor, dropped = self._entries.popleft()
            self._used_bytes -= len(dropped) + ENTRY_BYTES

    def forget(self, tid: bytes) -> None:
        """It isn't known what changed up to *tid*."""
        self._entries.clear()
        self._used_bytes = 0
        self.floor = self.last_tid = tid

    def may_have_changed(self, oid: bytes, after: bytes) -> bool:
        """Whether *oid* was written after *after*, or that isn't known any more."""
        if after < self.floor:
            return True
        for tid, joined in reversed(self._entries):
            if tid <= after:
                break
            at = joined.find(oid)
            while at >= 0:
                if at % _OID_BYTES == 0:
                    return True
                at = joined.find(oid, at + 1)
        return False

    def since(self, tid: bytes) -> tuple[bytes, list[bytes]] | None:
        """(last tid, the oids written after *tid*), or None when that isn't known any more."""
        if tid < self.floor:
            return None
        changed: dict[bytes, None] = {}
        for when, joined in reversed(self._entries):
            if when <= tid:
                break
            for at in range(0, len(joined), _OID_BYTES):
                changed[joined[at : at + _OID_BYTES]] = None
        return self.last_tid, list(changed)

    def __len__(self) -> int:
        return len(self._entries)
