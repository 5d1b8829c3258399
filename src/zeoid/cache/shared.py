"""The object cache that all processes of a host share: what one has loaded, none of them loads again.

    step                                       what it does to the environment
    a transaction is told, its tid T           nothing if `applied` ≥ T; otherwise its oids' current revisions
                                               end at T, and `applied` becomes T, in one transaction
    (since, T] was missed, its oids are known  the same, but they are removed: when they ended isn't known
    it isn't known what (…, T] wrote           nothing if `applied` ≥ T; otherwise a new epoch begins
    a revision was loaded                      it waits in this process's memory (`_waiting`)
    the flusher's turn, this process at T      what waits is put there; what is current only if `applied` = T
    the lock can't be had, LMDB has an error   for what waits: later; otherwise this process leaves the
                                               environment, which is set aside, and joins a new one, at T

Invariants, for a process that was told everything up to T:
 1. `applied` ≥ T in every snapshot that it reads: others may be ahead, it never is. So what is current there
    is so up to T, and answers for all tids up to the one after T.
 2. `applied` moves from A to T only together with everything that (A, T] ended, by a process that was told
    all of it. One that was not (A is before what it knows) begins a new epoch.
 3. A current revision is put there only by a process that has been told everything up to `applied`.
 4. Its stream tells transactions in the order of their tids, its own included (servers see to that).
 5. No wait is longer than its deadline, whoever was killed or stopped at whatever moment.

When there can be no environment, what waits is a cache of its own. Owns these steps; layout and files are
`records`' and `environment`'s.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable

import lmdb

from zeoid import limits
from zeoid.cache import environment
from zeoid.cache.environment import Environment, Unusable
from zeoid.cache.memory import MemoryCache
from zeoid.cache.records import Records, State
from zeoid.model import MAX_TID, NO_TID, Applied, CacheFigures, Revision

log = logging.getLogger("zeoid.cache")
_number = int.from_bytes


class SharedCache:
    """See the module. It joins its environment when whoever connects first asks how far that is."""

    def __init__(
        self, cache_dir: str | os.PathLike[str], key: str, size_bytes: int, told: bytes = NO_TID
    ) -> None:
        """*key*: what tells the storage from others. *size_bytes*: of a new environment. *told*: what this
        process was told everything up to."""
        self._cache_dir = cache_dir
        self._key = key
        self._size_bytes = size_bytes
        #: Everything below is changed with this held.
        self._lock = threading.RLock()
        self._environment: Environment | None = None
        self._tries = limits.SHARED_CACHE_TRIES
        #: Environments that were left: they are not joined again.
        self._left: set[tuple[int, int]] = set()
        self._waiting = MemoryCache(limits.SHARED_CACHE_WAITING_BYTES)
        #: The newest transaction that this process was told of.
        self._told = told
        self._epoch = 0
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    # Reading --------------------------------------------------------------------------------------

    def applied(self) -> Applied:
        with self._lock:
            if self._environment is None and self._tries == limits.SHARED_CACHE_TRIES:
                self._join()
            here = self._environment
            if here is None:
                return NO_TID, None
            try:
                state = here.records.look()
            except (TimeoutError, lmdb.Error) as problem:
                self._leave(here, problem)
                return NO_TID, None
            return state.applied, state.witness if state.witness != NO_TID else None

    def load_before(self, oid: bytes, tid: bytes, applied: bytes) -> Revision | None:
        if self._waiting.used_bytes:
            found = self._waiting.load_before(oid, tid, applied)
            if found is not None:
                return found
        here = self._environment
        if here is None:
            return None
        current = tid <= applied or _number(tid, "big") == _number(applied, "big") + 1
        try:
            return here.records.find(oid, tid, current, self._epoch)
        except lmdb.Error as problem:
            self._leave(here, problem)
            return None

    def written_by(self, tid: bytes) -> bytes | None:
        with self._lock:
            applied, witness = self.applied()
            return witness if applied == tid and witness else self._waiting.written_by(tid)

    def figures(self) -> CacheFigures:
        here = self._environment
        waiting = len(self._waiting)
        if here is not None:
            try:
                return CacheFigures(
                    here.records.used_bytes(), here.size_bytes, here.records.look().evicted, waiting
                )
            except (TimeoutError, lmdb.Error) as problem:
                self._leave(here, problem)
        return self._waiting.figures()

    # What is told ---------------------------------------------------------------------------------

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        with self._lock:
            here = self._environment
            if here is not None:
                if len(data) > _largest_bytes(here):
                    return
                self._start_flusher()
                if not self._wake.is_set():
                    self._wake.set()
            self._waiting.store(oid, start, end, data)
            if here is not None and self._waiting.used_bytes > limits.SHARED_CACHE_WAITING_BYTES // 2:
                with contextlib.suppress(TimeoutError):  # it comes faster than the flusher has its turns
                    self.flush()

    def store_many(self, revisions: Iterable[tuple[bytes, Revision]]) -> None:
        with self._lock:
            for oid, (data, start, end) in revisions:
                self.store(oid, start, end, data)

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        oids = list(oids)

        def end(records: Records, txn: lmdb.Transaction, state: State) -> None:
            for oid in oids:
                records.end(txn, state, oid, tid)

        with self._lock:
            self._apply(self._told, tid, oids, end)
            self._waiting.invalidate(tid, oids)
            self._told = max(self._told, tid)
            here = self._environment
            if here is not None and (self._waiting.used_bytes or here.records.used):
                self._start_flusher()
                self._wake.set()  # what is current may have waited for this

    def caught_up(self, since: bytes, tid: bytes, oids: Iterable[bytes]) -> None:
        oids = list(oids)

        def forget(records: Records, txn: lmdb.Transaction, state: State) -> None:
            for oid in oids:
                records.forget(txn, oid)

        with self._lock:
            self._apply(since, tid, oids, forget)
            self._waiting.forget(oids)
            self._told = max(self._told, tid)

    def started_over(self, tid: bytes) -> None:
        with self._lock:
            self._apply(MAX_TID, tid, (), lambda *_: None)
            self._waiting.started_over(tid)
            self._told = max(self._told, tid)

    def forget(self, oids: Iterable[bytes]) -> None:
        oids = list(oids)
        with self._lock:
            self._waiting.forget(oids)
            here = self._environment
            if here is not None:
                try:
                    with here.writing(limits.SHARED_CACHE_LOCK_S) as (txn, _):
                        for oid in oids:
                            here.records.forget(txn, oid)
                except (TimeoutError, lmdb.Error) as problem:
                    self._leave(here, problem)

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._told = NO_TID
            here = self._environment
            if here is not None:
                self._leave(here, "it is of another history of the database")

    def _apply(
        self,
        since: bytes,
        tid: bytes,
        oids: Iterable[bytes],
        change: Callable[[Records, lmdb.Transaction, State], None],
    ) -> None:
        """Have `applied` at *tid* at least. *change* is what (*since*, *tid*] does to what is current."""
        while (here := self._environment) is not None:
            try:
                state = here.records.look()
                if state.applied < tid:
                    with here.writing(limits.SHARED_CACHE_LOCK_S) as (txn, state):
                        if state.applied < tid:
                            if state.applied < since:
                                state.epoch += 1
                            else:
                                change(here.records, txn, state)
                            state.applied = tid
                            state.witness = next(iter(oids), NO_TID)
                self._epoch = state.epoch
                return
            except (TimeoutError, lmdb.Error) as problem:
                self._leave(here, problem)

    # The environment ------------------------------------------------------------------------------

    def _join(self) -> None:
        """Join an environment, and have it where this process is; without one when that can't be had."""
        while self._tries and self._environment is None:
            self._tries -= 1
            try:
                here = environment.join(self._cache_dir, self._key, self._size_bytes)
            except Unusable as problem:
                log.warning("without a shared object cache: %s", problem)
                self._tries = 0
                break
            if here.identity in self._left:  # it could not be set aside
                environment.leave(here)
                continue
            self._environment = here
            if self._told != NO_TID:
                self._apply(MAX_TID, self._told, (), lambda *_: None)
        if self._environment is None:
            # What could not be shared is not to be missed altogether.
            self._waiting.grow(limits.CACHE_BYTES)

    def _leave(self, here: Environment, reason: object) -> None:
        """Something is wrong with the environment: it is set aside, and a new one joined."""
        with self._lock:
            if self._environment is not here:
                return
            told = "others had its lock for too long" if isinstance(reason, TimeoutError) else str(reason)
            log.warning("the shared object cache %s is set aside: %s", here.path, told)
            self._environment = None
            self._left.add(here.identity)
            environment.set_aside(here)
            environment.leave(here)
            self._join()

    def close(self) -> None:
        """Put there what waits, and leave the environment. Idempotent."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None:
            thread.join(limits.CLOSE_TIMEOUT_S)
        with self._lock:
            here, self._environment = self._environment, None
            self._tries = 0
        if here is not None:
            environment.leave(here)

    # The flusher ----------------------------------------------------------------------------------

    def _start_flusher(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="zeoid object cache", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        stopped = threading.Event()  # nobody sets it: to wait for a while
        while not self._closed:
            self._wake.wait()
            if not self._closed:
                stopped.wait(limits.SHARED_CACHE_FLUSH_S)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                while self.flush():
                    pass

    def flush(self) -> bool:
        """Put some of what waits into the environment. Whether there may be more. TimeoutError."""
        with self._lock:
            here, told = self._environment, self._told
            if here is None:
                return False
            batch = self._waiting.some(limits.SHARED_CACHE_BATCH, _largest_bytes(here))
        records = here.records
        used, records.used = records.used, set()
        if not batch and not used:
            return False
        done = []
        try:
            with here.writing(limits.SHARED_CACHE_PUT_S) as (txn, state):
                records.make_room(txn, state, here.size_bytes * limits.SHARED_CACHE_GENERATION_PERCENT // 100)
                for oid, start, end, data in batch:
                    if end is not None:
                        records.put_past(txn, state, oid, start, end, data)
                    elif state.applied == told:
                        records.put_current(txn, state, oid, start, data)
                        if start == told:
                            state.witness = oid
                    else:
                        continue
                    done.append((oid, start, end))
                for oid in used:
                    records.promote(txn, state, oid)
        except lmdb.Error as problem:
            self._leave(here, problem)
            return False
        with self._lock:
            for oid, start, end in done:
                self._waiting.remove(oid, start, end)
        return len(done) == len(batch) > 0


def _largest_bytes(here: Environment) -> int:
    """Of one record, and of what is written at once: that must not need much of the room that is left."""
    return here.size_bytes // limits.SHARED_CACHE_PARTS
