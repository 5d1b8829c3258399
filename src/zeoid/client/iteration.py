"""Iterating over the transactions of a remote storage: the server holds the iterators, by number."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ZODB.BaseStorage import DataRecord, TransactionRecord

from zeoid import limits
from zeoid.client.channel import Channel
from zeoid.errors import Disconnected


class RemoteTransaction(TransactionRecord):  # type: ignore[misc]
    """One transaction. Iterating over it gives its records, as long as it is the newest one handed out."""

    def __init__(self, iteration: "RemoteIteration", item: tuple[Any, ...]) -> None:
        tid, status, user, description, extension = item
        super().__init__(tid, status, user, description, extension)
        self._iteration = iteration

    def __iter__(self) -> Iterator[Any]:
        return self._iteration.records(self.tid)


#: Iterators that nobody will finish: their connection and number. A destructor may run in the middle of
#: anything, so it puts them here, and the next iteration tells the server.
Discarded = deque[tuple[Channel, int]]


class RemoteIteration:
    """An iterator over transactions. It does not outlive its connection."""

    def __init__(
        self,
        channel: Channel,
        call: Callable[[Channel, str, tuple[Any, ...]], Any],
        discarded: Discarded,
        start: Any,
        stop: Any,
    ) -> None:
        self._channel = channel
        self._call = call
        self._discarded = discarded
        self._discard()
        self._number = call(channel, "iterator_start", (start, stop))
        self._ended = False

    def __iter__(self) -> "RemoteIteration":
        return self

    def __next__(self) -> RemoteTransaction:
        if not self._ended:
            item = self._call(self._channel, "iterator_next", (self._number,))
            if item is not None:
                return RemoteTransaction(self, item)
            self._ended = True
        raise StopIteration

    def records(self, tid: bytes) -> Iterator[Any]:
        number = self._call(self._channel, "iterator_record_start", (self._number, tid))
        while (item := self._call(self._channel, "iterator_record_next", (number,))) is not None:
            yield DataRecord(*item)

    def close(self) -> None:
        """Let the server forget it."""
        if not self._ended:
            self._ended = True
            self._discarded.append((self._channel, self._number))
            with contextlib.suppress(Disconnected):
                self._discard()

    def _discard(self) -> None:
        numbers = []
        with contextlib.suppress(IndexError):
            while True:
                channel, number = self._discarded.popleft()
                if channel is self._channel:
                    numbers.append(number)
        if numbers and self._channel.alive:
            message = self._channel.encode_one_way("iterator_gc", (numbers,))
            self._channel.send(message, limits.WAIT_TIMEOUT_S)

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._discarded.append((self._channel, self._number))
