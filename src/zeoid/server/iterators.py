"""The iterators that a client holds open on the server, by number. Owns their bound.

An iterator over transactions keeps the transaction it last handed out, so that the client can ask for its
records. These are read from the same file: it is closed when neither of them needs it any more, because
clients let go of an iterator while they still read the records of its last transaction. A client uses one
iterator from one place at a time; what it asks is answered in turn. Where the storage may have to wait it is
asked in threads: what several of them ask of one session is done one after the other.
"""

import threading
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from zeoid import limits
from zeoid.errors import InvalidCall
from zeoid.ports import TransactionRecord

#: tid, status, user, description, extension
TransactionItem = tuple[bytes, str, bytes, bytes, dict[str, Any]]
#: oid, tid, data or None, tid of the revision with the same data or None
RecordItem = tuple[bytes, bytes, bytes | None, bytes | None]


class _Source:
    """An iterator over transactions, what it handed out last, and how many numbers need it."""

    __slots__ = ("current", "iterator", "uses")

    def __init__(self, iterator: Iterator[TransactionRecord]) -> None:
        self.iterator = iterator
        self.current: TransactionRecord | None = None
        self.uses = 1

    def release(self) -> None:
        self.uses -= 1
        close = getattr(self.iterator, "close", None)
        if close is not None and not self.uses:
            close()


class Iterators:
    """All iterators of one session."""

    def __init__(self, most: int = limits.ITERATORS_PER_CONNECTION) -> None:
        self._most = most
        self._numbers = count()
        self._lock = threading.RLock()
        self._transactions: dict[int, _Source] = {}
        self._records: dict[int, tuple[Iterator[Any], _Source]] = {}

    def reserve(self) -> int:
        """The number for an iterator to come. InvalidCall when there are too many already."""
        if len(self._transactions) + len(self._records) >= self._most:
            raise InvalidCall(f"more than {self._most} iterators are open on this connection")
        return next(self._numbers)

    def open(self, number: int, transactions: Iterator[TransactionRecord]) -> int:
        self._transactions[number] = _Source(transactions)
        return number

    def next_transaction(self, number: int) -> TransactionItem | None:
        """The next transaction; None at the end, which closes the iterator."""
        with self._lock:
            source = self._transactions.get(number)
            if source is None:
                raise InvalidCall("no such iterator: it was never started, or is over")
            found = next(source.iterator, None)
            if found is None:
                self.forget([number])
                return None
            source.current = found
            return found.tid, _text(found.status), found.user, found.description, dict(found.extension)

    def open_records(self, number: int, tid: bytes) -> int:
        """The number of an iterator over the records of the transaction that was handed out last."""
        with self._lock:
            source = self._transactions.get(number)
            if source is None or source.current is None or source.current.tid != tid:
                raise InvalidCall("records can be had of the transaction that was handed out last only")
            reserved = self.reserve()
            self._records[reserved] = iter(source.current), source
            source.uses += 1
            return reserved

    def next_record(self, number: int) -> RecordItem | None:
        """The next record; None at the end, which closes the iterator."""
        with self._lock:
            if number not in self._records:
                raise InvalidCall("no such iterator: it was never started, or is over")
            found = next(self._records[number][0], None)
            if found is None:
                self.forget([number])
                return None
            return found.oid, found.tid, found.data, found.data_txn

    def forget(self, numbers: Iterable[int]) -> None:
        with self._lock:
            for number in numbers:
                if number in self._transactions:
                    self._transactions.pop(number).release()
                elif number in self._records:
                    self._records.pop(number)[1].release()

    def close(self) -> None:
        self.forget([*self._transactions, *self._records])


def _text(status: str | bytes) -> str:
    return status if isinstance(status, str) else status.decode("ascii", "replace")
