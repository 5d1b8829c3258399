"""What a server looks at now and then: how much it holds for its clients, and who has been silent for long.

    of a connection                                    becomes
    all hold more than `HELD_BYTES`, its identity's    closed at once, and so the next one, until it is
    more than any other's, and it the most of these    no more than that
    it has sent nothing for `IDLE_S`                   closed: clients send heartbeats

What is held: the part of a message that has come, transactions that are not committed, and what was not
read by the other end. Each has a limit of its own for one connection; without this one, thousands of them
could fill the memory. None of it is counted on the way of a message, so it costs nothing there: it is looked
at in every tick, and whenever `HELD_SHARE` of the limit has come in large pieces.

The system knows since when a TCP connection has brought nothing, where it is Linux. Elsewhere, and on unix
sockets, nobody is closed for silence; connections whose other end is gone are found by TCP's keepalive.

Owns these limits. Must not know what a connection means.
"""

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

from zeoid import limits

log = logging.getLogger("zeoid.server")


class Watched(Protocol):
    """A connection."""

    #: Its session, once there is one.
    session: Any

    def held_bytes(self) -> int: ...

    def silent_s(self) -> float | None: ...

    def shed(self, reason: str) -> None:
        """Close it at once."""


class Watch:
    """Of all connections of a server."""

    def __init__(
        self,
        connections: Collection[Watched],
        who: Callable[[Any], str],
        transactions: Callable[[], Iterable[tuple[Any, int]]],
        *,
        held_bytes: int = limits.HELD_BYTES,
        idle_s: float = limits.IDLE_S,
    ) -> None:
        """*who* tells whose a connection is, *transactions* the session and the size of each."""
        self._connections = connections
        self._who = who
        self._transactions = transactions
        #: What has come in large pieces since the last look.
        self._come_bytes = 0
        self._held_bytes = held_bytes
        self._idle_s = idle_s
        #: Those that are still to be asked in this round.
        self._to_ask: list[Watched] = []

    def tick(self) -> None:
        self._look()
        self._ask_some()

    def comes(self, size_bytes: int) -> None:
        """A large piece has come: what is held must not grow for long without a look."""
        self._come_bytes += size_bytes
        if self._come_bytes > self._held_bytes * limits.HELD_SHARE:
            self._look()

    def _look(self) -> None:
        self._come_bytes = 0
        held: dict[Watched, int] = {}
        for connection in self._connections:
            size_bytes = connection.held_bytes()
            if size_bytes:
                held[connection] = size_bytes
        of_session: dict[int, int] = {}
        for session, size_bytes in self._transactions():
            of_session[id(session)] = of_session.get(id(session), 0) + size_bytes
        if of_session:
            for connection in self._connections:
                size_bytes = of_session.get(id(connection.session), 0)
                if size_bytes:
                    held[connection] = held.get(connection, 0) + size_bytes
        if sum(held.values()) > self._held_bytes:
            self._shed(held)

    def _shed(self, held: dict[Watched, int]) -> None:
        total = sum(held.values())
        while total > self._held_bytes:
            of: dict[str, int] = {}
            for connection, size_bytes in held.items():
                who = self._who(connection)
                of[who] = of.get(who, 0) + size_bytes
            greediest = max(of, key=of.__getitem__)
            largest = max(
                (connection for connection in held if self._who(connection) == greediest),
                key=held.__getitem__,
            )
            size_bytes = held.pop(largest)
            largest.shed(
                f"{size_bytes:,} bytes are held for it, and {total:,} for all: more than {self._held_bytes:,}"
            )
            total -= size_bytes

    def _ask_some(self) -> None:
        """Few at a time: nobody is to wait for this."""
        if not self._to_ask:
            self._to_ask = list(self._connections)
        for _ in range(min(limits.IDLE_ASKED, len(self._to_ask))):
            connection = self._to_ask.pop()
            silent_s = connection.silent_s() if connection in self._connections else None
            if silent_s is not None and silent_s > self._idle_s:
                connection.shed(f"it has said nothing for {silent_s:.0f} s")
