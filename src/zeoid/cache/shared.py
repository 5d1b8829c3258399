"""The object cache that all processes of a host share: what one has loaded, none of them loads again.

    step                                       what it does to the environment
    a transaction is told, its tid T           nothing if `applied` ≥ T; otherwise its oids' current revisions
                                               end at T, and `applied` becomes T, in one transaction
    (since, T] was missed, its oids are known  the same, but they are removed: when they ended isn't known
    it isn't known what (…, T] wrote           nothing if `applied` ≥ T; otherwise a new epoch begins
    a revision was loaded                      it waits in this process's memory (`_waiting`)
    the flusher's turn, this process at T      what waits is put there; what is current only if `applied` = T
    there is no room for it                    the old generation is emptied; if that is not enough, a new
                                               epoch begins, or, for what waits, it is an error
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
import time
from collections.abc import Callable, Iterable

import lmdb

from zeoid import limits
from zeoid.cache import environment
from zeoid.cache.environment import Environment, Unusable
from zeoid.cache.memory import MemoryCache
from zeoid.cache.records import Records, State
from zeoid.model import MAX_TID, NO_TID, Applied, CacheFigures, Revision

#: What is changed of the records when this process is told something.
_Change = Callable[[Records, lmdb.Transaction, State], None]

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
        #: The environment, where this process has been told of it, and its epoch then. Both are read at once
        #: by those who load: an epoch means nothing in another environment.
        self._here: tuple[Environment, int] | None = None
        self._tries = limits.SHARED_CACHE_TRIES
        self._joined_s = 0.0
        #: Environments that were left: they are not joined again.
        self._left: set[str] = set()
        self._waiting = MemoryCache(limits.SHARED_CACHE_WAITING_BYTES)
        #: The newest transaction that this process was told of.
        self._told = told
        #: How often there was no room for what waits, one time after the other.
        self._full = 0
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    # Reading --------------------------------------------------------------------------------------

    def applied(self) -> Applied:
        with self._lock:
            if self._here is None and self._tries == limits.SHARED_CACHE_TRIES:
                self._join()
            if self._here is None:
                return NO_TID, None
            here, _ = self._here
            try:
                state = here.records.look()
            except (OSError, lmdb.Error) as problem:
                self._leave(here, problem)
                return NO_TID, None
            return state.applied, state.witness if state.witness != NO_TID else None

    def load_before(self, oid: bytes, tid: bytes, applied: bytes) -> Revision | None:
        if self._waiting.used_bytes:
            found = self._waiting.load_before(oid, tid, applied)
            if found is not None:
                return found
        joined = self._here
        if joined is None:
            return None
        here, epoch = joined
        current = tid <= applied or _number(tid, "big") == _number(applied, "big") + 1
        try:
            return here.records.find(oid, tid, current, epoch)
        except lmdb.Error as problem:
            self._leave(here, problem)
            return None

    def written_by(self, tid: bytes) -> bytes | None:
        with self._lock:
            applied, witness = self.applied()
            return witness if applied == tid and witness else self._waiting.written_by(tid)

    def figures(self) -> CacheFigures:
        joined = self._here
        waiting = len(self._waiting)
        if joined is not None:
            here, _ = joined
            try:
                return CacheFigures(
                    here.records.used_bytes(), here.size_bytes, here.records.look().evicted, waiting
                )
            except (OSError, lmdb.Error) as problem:
                self._leave(here, problem)
        return self._waiting.figures()

    # What is told ---------------------------------------------------------------------------------

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        with self._lock:
            here = self._here and self._here[0]
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
            self._apply(self._told, tid, next(iter(oids), NO_TID), end)
            self._waiting.invalidate(tid, oids)
            self._told = max(self._told, tid)
            here = self._here and self._here[0]
            if here is not None and (self._waiting.used_bytes or here.records.used):
                self._start_flusher()
                self._wake.set()  # what is current may have waited for this

    def caught_up(self, since: bytes, tid: bytes, oids: Iterable[bytes]) -> None:
        oids = list(oids)

        def forget(records: Records, txn: lmdb.Transaction, state: State) -> None:
            for oid in oids:
                records.forget(txn, oid)

        with self._lock:
            # Which of them the transaction *tid* wrote isn't known, so there is no witness.
            self._apply(since, tid, NO_TID, forget)
            self._waiting.forget(oids)
            self._told = max(self._told, tid)

    def started_over(self, tid: bytes) -> None:
        with self._lock:
            self._apply(MAX_TID, tid, NO_TID, _nothing)
            self._waiting.started_over(tid)
            self._told = max(self._told, tid)

    def forget(self, oids: Iterable[bytes]) -> None:
        oids = list(oids)
        with self._lock:
            self._waiting.forget(oids)
            if self._here is not None:
                here, _ = self._here
                try:
                    with here.writing(limits.SHARED_CACHE_LOCK_S) as (txn, _):
                        for oid in oids:
                            here.records.forget(txn, oid)
                except (OSError, lmdb.Error) as problem:
                    self._leave(here, problem)

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._told = NO_TID
            if self._here is not None:
                self._leave(self._here[0], "it is of another history of the database")

    def _apply(self, since: bytes, tid: bytes, witness: bytes, change: _Change) -> None:
        """See `_bring`. An environment where that fails is left, for one where it is tried again."""
        while self._here is not None:
            here, _ = self._here
            try:
                self._here = here, _bring(here, since, tid, witness, change)
                return
            except (OSError, lmdb.Error) as problem:
                self._leave(here, problem)

    # The environment ------------------------------------------------------------------------------

    def _join(self) -> None:
        """Join an environment, and have it where this process is; without one when that can't be had."""
        while self._tries and self._here is None:
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
            self._joined_s = time.monotonic()
            try:
                # Others load all the time: they must not meet it before it is where this process is.
                self._here = here, _bring(here, MAX_TID, self._told, NO_TID, _nothing)
            except (OSError, lmdb.Error) as problem:
                self._set_aside(here, problem)
        if self._here is None:
            # What could not be shared is not to be missed altogether.
            self._waiting.grow(limits.CACHE_BYTES)

    def _leave(self, here: Environment, reason: object) -> None:
        """Something is wrong with the environment: it is set aside, and a new one joined."""
        with self._lock:
            if self._here is None or self._here[0] is not here:
                return
            self._here = None
            if time.monotonic() - self._joined_s > limits.SHARED_CACHE_TRIES_S:
                self._tries = limits.SHARED_CACHE_TRIES
            self._set_aside(here, reason)
            self._join()

    def _set_aside(self, here: Environment, reason: object) -> None:
        told = "others had its lock for too long" if isinstance(reason, TimeoutError) else str(reason)
        log.warning("the shared object cache %s is set aside: %s", here.path, told)
        self._left.add(here.identity)
        environment.set_aside(here)
        environment.leave(here)

    def close(self) -> None:
        """Put there what waits, and leave the environment. Idempotent."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None:
            thread.join(limits.CLOSE_TIMEOUT_S)
        with self._lock:
            joined, self._here = self._here, None
            self._tries = 0
        if joined is not None:
            environment.leave(joined[0])

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
            if self._here is None:
                return False
            (here, _), told = self._here, self._told
            batch = self._waiting.some(limits.SHARED_CACHE_BATCH, _largest_bytes(here))
        records = here.records
        used, records.used = records.used, set()
        if not batch and not used:
            return False
        done = []
        try:
            with here.writing(limits.SHARED_CACHE_PUT_S) as (txn, state):
                here.clear_dead_readers()
                _make_room(here, txn, state)
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
                left_bytes = _largest_bytes(here)
                while used and left_bytes > 0:
                    left_bytes -= records.promote(txn, state, used.pop())
            self._full = 0
        except TimeoutError:
            raise
        except (OSError, lmdb.Error) as problem:
            return self._fails(here, problem)
        with self._lock:
            for oid, start, end in done:
                self._waiting.remove(oid, start, end)
        records.used.update(used)
        return bool(used) or len(done) == len(batch) > 0

    def _fails(self, here: Environment, problem: Exception) -> bool:
        """What waits could not be put there. Whether it is worth another try. TimeoutError."""
        if isinstance(problem, lmdb.MapFullError) and self._full < 2:  # each generation once
            self._full += 1
            try:
                _empty_old(here, limits.SHARED_CACHE_PUT_S)
                return True
            except TimeoutError:
                raise
            except (OSError, lmdb.Error) as another:
                problem = another
        self._full = 0
        self._leave(here, problem)
        return False


def _bring(here: Environment, since: bytes, tid: bytes, witness: bytes, change: _Change) -> int:
    """Have an environment's `applied` at *tid* at least; its epoch. OSError, lmdb.Error.

    *change*: what (*since*, *tid*] does to what is current. *witness*: an object that *tid* wrote, or zeros.
    """
    state = here.records.look()
    if state.applied >= tid:
        return state.epoch
    try:
        return _tell(here, since, tid, witness, change)
    except lmdb.MapFullError:
        _empty_old(here, limits.SHARED_CACHE_LOCK_S)
    try:
        return _tell(here, since, tid, witness, change)
    except lmdb.MapFullError:  # it wrote more than there can be room for
        return _tell(here, MAX_TID, tid, witness, _nothing)


def _tell(here: Environment, since: bytes, tid: bytes, witness: bytes, change: _Change) -> int:
    with here.writing(limits.SHARED_CACHE_LOCK_S) as (txn, state):
        if state.applied < tid:
            if state.applied < since:
                state.epoch += 1
            else:
                _make_room(here, txn, state)
                change(here.records, txn, state)
            state.applied = tid
            state.witness = witness
        return state.epoch


def _make_room(here: Environment, txn: lmdb.Transaction, state: State) -> None:
    here.records.make_room(txn, state, here.size_bytes * limits.SHARED_CACHE_GENERATION_PERCENT // 100)


def _empty_old(here: Environment, timeout_s: float) -> None:
    """Make room at once. What is left of it may be in pieces, and a large record needs a whole one."""
    with here.writing(timeout_s) as (txn, state):
        here.clear_dead_readers()
        here.records.empty_old(txn, state)
    for _ in range(2):  # LMDB uses what was freed only in the second transaction after that
        with here.writing(timeout_s):
            pass


def _nothing(records: Records, txn: lmdb.Transaction, state: State) -> None:
    """Change nothing."""


def _largest_bytes(here: Environment) -> int:
    """Of one record, and of what is written at once: that must not need much of the room that is left."""
    return here.size_bytes // limits.SHARED_CACHE_PARTS
