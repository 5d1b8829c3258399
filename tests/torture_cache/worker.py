"""A process that shares the cache: its threads read and write objects at random until its input ends.

It writes down what it reads, in one line each, at once: it may be killed at any moment. A line is

    read OID BEFORE CHECK START END      what there was of an object before a tid; END may be -
    found HITS EVICTED                   revisions that the cache had so far, and those it evicted
"""

from __future__ import annotations

import logging
import pickle
import random
import sys
import threading
import traceback
from pathlib import Path
from typing import Any
from zlib import crc32

from persistent import Persistent
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, StorageError

import zeoid
from zeoid.cache.records import Records
from zeoid.cache.shared import SharedCache
from zeoid.errors import Disconnected, OutcomeUnknown
from zeoid.model import tid_after

STORAGE = "1"
OBJECTS = 1200
#: How the data of an object begins whose conflicts can't be resolved.
HEAD = pickle.dumps(Persistent, 3)
#: Together more than the cache can hold.
MOST_BYTES = 6000
CACHE_BYTES = 4 * 1024 * 1024
THREADS = 2
WAIT_TIMEOUT_S = 20.0
WRITES = 0.15
#: Of reads, those at some point in the past.
IN_THE_PAST = 0.3
REMEMBERED = 50
STATUS_EVERY = 100


def oid(number: int) -> bytes:
    return number.to_bytes(8, "big")


class Journal:
    """See the module."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def read(self, oid: bytes, before: bytes, revision: tuple[bytes, bytes, bytes | None]) -> None:
        data, start, end = revision
        ended = end.hex() if end is not None else "-"
        self._write(f"read {oid.hex()} {before.hex()} {crc32(data)} {start.hex()} {ended}")

    def found(self, hits: int, evicted: int) -> None:
        self._write(f"found {hits} {evicted}")

    def close(self) -> None:
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n".encode())


class Worker:
    """One thread's work."""

    def __init__(self, storage: Any, journal: Journal, choices: random.Random) -> None:
        self._storage = storage
        self._journal = journal
        self._choices = choices
        self._tids: list[bytes] = []

    def work(self, over: threading.Event) -> None:
        deeds = 0
        while not over.is_set():
            deeds += 1
            try:
                if self._choices.random() < WRITES:
                    self._write()
                else:
                    self._read()
            except (Disconnected, ConflictError, OutcomeUnknown):
                continue
            if deeds % STATUS_EVERY == 0:
                self._journal.found(hits.count, evicted(self._storage))

    def _read(self) -> None:
        """Some objects, at one point in time."""
        last = self._storage.lastTransaction()
        if last not in self._tids:
            self._tids = [*self._tids[-REMEMBERED:], last]
        if self._choices.random() < IN_THE_PAST:
            last = self._choices.choice(self._tids)
        for _ in range(5):
            self._look(oid(self._choices.randrange(OBJECTS)), tid_after(last))

    def _look(self, oid: bytes, before: bytes) -> tuple[bytes, bytes, bytes | None]:
        revision: tuple[bytes, bytes, bytes | None] = self._storage.loadBefore(oid, before)
        self._journal.read(oid, before, revision)
        return revision

    def _write(self) -> None:
        storage, choices = self._storage, self._choices
        last = storage.lastTransaction()
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        try:
            for number in choices.sample(range(OBJECTS), choices.randint(1, 4)):
                _, start, _ = self._look(oid(number), tid_after(last))
                data = HEAD + pickle.dumps(choices.randbytes(choices.randrange(MOST_BYTES)), 3)
                storage.store(oid(number), start, data, "", transaction)
            storage.tpc_vote(transaction)
            storage.tpc_finish(transaction)
        except BaseException:
            storage.tpc_abort(transaction)
            raise


class Hits:
    """How many revisions were found in the environment."""

    count = 0


hits = Hits()


def count_hits() -> None:
    find = Records.find

    def finding(*args: Any) -> Any:
        found = find(*args)
        hits.count += found is not None
        return found

    Records.find = finding  # type: ignore[method-assign]


def evicted(storage: Any) -> int:
    cache = storage._view.cache
    assert isinstance(cache, SharedCache)
    joined = cache._here
    try:
        return joined[0].records.look().evicted if joined is not None else 0
    except Exception:  # it is just being left
        return 0


def open_storage(address: str, cache_dir: str, over: threading.Event) -> Any:
    while not over.is_set():
        try:
            return zeoid.ClientStorage(
                address,
                STORAGE,
                cache_dir=cache_dir,
                cache_size_bytes=CACHE_BYTES,
                wait_timeout=WAIT_TIMEOUT_S,
            )
        except (Disconnected, StorageError):
            continue  # the server is down, which is what we are here for
    return None


def main(seed: str, address: str, cache_dir: str, path: str) -> int:
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("zeoid.cache").setLevel(logging.WARNING)
    over = threading.Event()

    def wait_for_end_of_input() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    count_hits()
    storage = open_storage(address, cache_dir, over)
    if storage is None:
        return 0
    journal = Journal(Path(path))
    failures: list[str] = []

    def work(number: int) -> None:
        try:
            Worker(storage, journal, random.Random(f"{seed}/{number}")).work(over)
        except BaseException:
            failures.append(traceback.format_exc())
            over.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage.close()
    journal.close()
    print(*failures, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
