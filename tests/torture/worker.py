"""One thread of a client: makes deeds in transactions, writes down each, and watches what it sees.

What must hold while it runs, and is a violation otherwise: a storage's last transaction never goes back; a
counter is never smaller than anybody of this process has read before, or than what this thread knows to be
committed; twins are equal; no error but those that a lost connection or a conflict explains.
"""

from __future__ import annotations

import random
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import transaction
from ZODB.POSException import ConflictError

import zeoid
from tests.torture.deeds import Deed, GivenUp
from tests.torture.journal import Effect, End, Journal
from tests.torture.objects import STORAGES, TWINS, Entry, resolutions
from zeoid.errors import Disconnected, OutcomeUnknown

TRIES = 20
LAST_WAIT_S = 0.2
REMEMBERED = 20


class Violation(Exception):
    """A client saw what must never be."""


class Aborted(Exception):
    """The transaction is given up, as intended."""


class HalfFinished(Exception):
    """It failed while it was being finished in two storages: one may have it, the other not.

    No transient error: whoever tries it again may do the first half twice.
    """


class Floors:
    """What the threads of one process have seen, below which nothing may be seen from then on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], int] = {}
        self._tids: dict[str, bytes] = {}

    def values(self) -> dict[tuple[str, str], int]:
        with self._lock:
            return dict(self._values)

    def raise_to(self, storage: str, name: str, value: int) -> None:
        with self._lock:
            self._values[storage, name] = max(value, self._values.get((storage, name), 0))

    def look_at_tid(self, storage: str, last_transaction: Callable[[], bytes]) -> None:
        with self._lock:  # asked and compared in one, or another thread's newer one would come in between
            before, now = self._tids.get(storage, b""), last_transaction()
            self._tids[storage] = now
        if now < before:
            raise Violation(f"lastTransaction of {storage} went back from {before.hex()} to {now.hex()}")


class Manager(transaction.TransactionManager):  # type: ignore[misc]
    """Counts conflicts, and tells a failure between two finishes from one before them."""

    def __init__(self) -> None:
        super().__init__(explicit=True)
        self.conflicts = 0

    def commit(self) -> None:
        first = First()
        self.get().join(first)
        try:
            super().commit()
        except ConflictError:
            self.conflicts += 1
            raise
        except Exception as problem:
            if first.finishing and len(self.storages) > 1 and not isinstance(problem, OutcomeUnknown):
                raise HalfFinished(repr(problem)) from problem
            raise

    #: Those that the current deed writes to.
    storages: frozenset[str] = frozenset()


class DataManager:
    """One that has no data."""

    def abort(self, transaction: Any) -> None: ...

    tpc_begin = commit = tpc_vote = tpc_finish = tpc_abort = abort


class First(DataManager):
    """Takes part before every storage, so it knows whether the finishing has begun."""

    finishing = False

    def sortKey(self) -> str:
        return ""

    def tpc_finish(self, transaction: Any) -> None:
        self.finishing = True


class Objecting(DataManager):
    """Takes part after every storage, and votes no."""

    def sortKey(self) -> str:
        return "~"

    def tpc_vote(self, transaction: Any) -> None:
        raise Aborted


class Worker:
    """See the module. *databases*: of the storages, which belong to one multi-database."""

    def __init__(self, databases: dict[str, Any], journal: Journal, floors: Floors, jitter: random.Random):
        self._storages = {storage: database.storage for storage, database in databases.items()}
        self._journal = journal
        self._floors = floors
        #: Storages and keys of the latest entries with a blob that this thread has committed.
        self._with_blobs: list[tuple[str, str]] = []
        self._manager = Manager()
        self._retry = zeoid.retry(
            tries=TRIES, last_wait_s=LAST_WAIT_S, manager=self._manager, random=jitter.random
        )
        first, *others = STORAGES
        self._connection = databases[first].open(self._manager)
        self._connections = {first: self._connection}
        for storage in others:
            self._connections[storage] = self._connection.get_connection(storage)

    def close(self) -> None:
        self._connection.close()

    def work(self, deeds: Iterator[Deed], over: threading.Event) -> None:
        """Make deeds until it is *over*."""
        for deed in deeds:
            if over.is_set():
                return
            self.make(deed)

    def make(self, deed: Deed) -> None:
        """Make one transaction, and write it down before and after."""
        conflicts, resolved = self._manager.conflicts, resolutions.count
        self._journal.trying(deed.id, deed.effects)
        end = self._try(deed)
        self._journal.ended(deed.id, end, self._manager.conflicts - conflicts, resolutions.count - resolved)

    def _try(self, deed: Deed) -> End:
        try:
            written = self._run(deed)
        except Aborted:
            return "given up"
        except (OutcomeUnknown, HalfFinished):
            return "unknown"
        except (ConflictError, Disconnected):
            return "failed"
        except Violation as violation:
            self._journal.violation(f"{deed.id}: {violation}")
            return "failed"
        except Exception:  # nothing else is expected, so it may have done anything
            self._journal.violation(f"{deed.id}: {traceback.format_exc()}")
            return "unknown"
        if deed.blob_bytes:
            inserted = [(effect.storage, effect.name) for effect in deed.effects if not effect.amount]
            self._with_blobs = (self._with_blobs + inserted)[-REMEMBERED:]
        for (storage, name), value in written.items():
            self._floors.raise_to(storage, name, value)
        return "done"

    def _run(self, deed: Deed) -> dict[tuple[str, str], int]:
        """Commit it; what it made of each counter, which may have become more by resolution."""
        floors = self._floors.values()
        self._manager.storages = frozenset(effect.storage for effect in deed.effects)
        for attempt in self._retry.attempts():
            with attempt as current:
                current.note(deed.id)
                for storage in self._manager.storages:
                    self._floors.look_at_tid(storage, self._storages[storage].lastTransaction)
                    self._look_at_twins(storage)
                self._look_at_blobs()
                written = dict(self._apply(deed, floors))
                if deed.given_up is GivenUp.BEFORE_COMMIT:
                    raise Aborted
                if deed.given_up is GivenUp.AFTER_VOTES:
                    current.join(Objecting())
        return written

    def _look_at_twins(self, storage: str) -> None:
        counters = self._connections[storage].root()["counters"]
        first, second = (counters[name].value for name in TWINS)
        if first != second:
            raise Violation(f"the twins in {storage} differ: {first} and {second}")

    def _look_at_blobs(self) -> None:
        """One whose commit was acknowledged, long enough ago for the cache to have forgotten it, maybe."""
        if self._with_blobs:
            storage, name = self._with_blobs[0]
            if not self._connections[storage].root()["entries"][name].sound:
                raise Violation(f"the blob of {name} in {storage} is not what was committed")

    def _apply(self, deed: Deed, floors: dict[tuple[str, str], int]) -> Iterator[tuple[tuple[str, str], int]]:
        sums: defaultdict[tuple[str, str], int] = defaultdict(int)
        for effect in deed.effects:
            connection = self._connections[effect.storage]
            if not effect.amount:
                entry = Entry(effect.name, deed.size_bytes)
                connection.add(entry)  # its oid is of a connection that may be lost before the commit
                if deed.blob_bytes:
                    entry.give_blob(deed.blob_bytes)
                connection.root()["entries"][effect.name] = entry
            else:
                key = effect.storage, effect.name
                sums[key] = self._increment(connection, effect, floors.get(key, 0))
        yield from sums.items()

    def _increment(self, connection: Any, effect: Effect, floor: int) -> int:
        counter = connection.root()["counters"][effect.name]
        if counter.value < floor:
            raise Violation(f"{effect.name} in {effect.storage} went back from {floor} to {counter.value}")
        self._floors.raise_to(effect.storage, effect.name, counter.value)
        counter.value += effect.amount
        value: int = counter.value
        return value
