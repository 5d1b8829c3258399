"""Which transactions of a client may go on its connection. Stock servers know one at a time.

Owns the turns and who waits for one. Must not know what a transaction does.
"""

import threading
import time
from typing import Any

from zeoid import limits
from zeoid.client.channel import Channel
from zeoid.client.link import Link
from zeoid.errors import TimedOut


class Turns:
    """See the module."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        #: Transactions that have a turn, by the id() of their object.
        self._taken: set[int] = set()
        self._lock = threading.Lock()
        self._over = threading.Condition(self._lock)
        self._waiting = 0

    def take(self, transaction: Any, link: Link) -> tuple[Channel, bool]:
        """The connection, once *transaction* may go on it, and whether its server knows the extensions."""
        left_s = self._timeout_s
        deadline_s = time.monotonic() + left_s
        while True:
            channel = link.ready or link.channel(left_s)
            extended = "tpc_prepare" in channel.extensions
            most = limits.TRANSACTIONS_PER_CONNECTION if extended else 1
            with self._lock:
                if len(self._taken) < most:
                    self._taken.add(id(transaction))
                    return channel, extended
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimedOut(f"waited {self._timeout_s:g} s for another transaction of this process")
                # Whom an interruption takes away stays in the condition's queue and in the count: it is told
                # first, in vain, as its own transaction ends.
                self._waiting += 1
                self._over.wait(left_s)
                self._waiting -= 1

    def leave(self, transaction: Any) -> None:
        """It is over. Harmless when it had no turn."""
        with self._lock:
            self._taken.discard(id(transaction))
            if self._waiting:
                # Also when it had no turn: it may have been told of one, and leaves that to the next.
                self._over.notify()

    def wake(self) -> None:
        """Have those who wait look at the connection again."""
        with self._over:
            self._over.notify_all()
