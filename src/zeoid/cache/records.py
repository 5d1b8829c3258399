"""What the shared object cache keeps in its LMDB environment, and what can be done with it in a transaction.

    sub-database            key         value
    `state`                 `state`     see `State`, check
    `current0`, `current1`  oid         start, epoch, data, check: a revision that nobody has overwritten yet
    `past0`, `past1`        oid, end    start, data, check: one that was overwritten at *end*

Invariants, which every method that changes something keeps:
 1. A current revision of this epoch was not overwritten up to `State.applied`: start < applied tid, and no
    transaction between them wrote the object. One of an older epoch says nothing, as if it were not there.
 2. A past revision is true for ever: it was the newest one before every tid after its start, up to its end.
 3. Each of an object's revisions is in one of the two generations. New ones, and those that were used, go to
    the young one; when that is full the old one is emptied, and becomes the young one.

The check is a CRC-32 of what stands before it. What fails it is not there; a state that fails it is an error.
Owns the layout and nothing else: who may do what is `shared`'s business, the files are `environment`'s.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import Any, Final
from zlib import crc32

import lmdb

from zeoid import limits
from zeoid.model import NO_TID, Revision

#: Grows with every change of the table above.
VERSION: Final = 1
_STATE: Final = b"state"
_STATE_LAYOUT: Final = Struct(">8sQ8sBQ")
_CURRENT: Final = Struct(">8sQ")
_CURRENT_BYTES: Final = _CURRENT.size
_START_BYTES: Final = 8
_CHECK_BYTES: Final = 4
_OID_BYTES: Final = 8
_unpack_current = _CURRENT.unpack_from
#: The CRC-32 of anything with its own CRC-32 behind it, the least significant byte first.
_SOUND: Final = 0x2144DF1C
_DATABASES: Final = (b"state", b"current0", b"current1", b"past0", b"past1")
DATABASES: Final = len(_DATABASES)


@dataclass(slots=True)
class State:
    """What holds for the whole environment. Changed only within a write transaction."""

    #: All transactions up to this one were applied to what is current; never goes back.
    applied: bytes = NO_TID
    #: Grows when nothing that is current can be kept.
    epoch: int = 0
    #: An object that the transaction `applied` wrote, or zeros if none is known.
    witness: bytes = NO_TID
    #: The generation that is young: 0 or 1.
    young: int = 0
    #: Revisions that were removed because their generation was emptied.
    evicted: int = 0


class Records:
    """The sub-databases of an open environment."""

    def __init__(self, env: lmdb.Environment, *, create: bool) -> None:
        """lmdb.Error if they are not there, or can't be made."""
        #: Whoever reads takes one out, for as long as that takes; whoever finds none finds nothing.
        self._turns: list[object] = []
        self.attach(env, create=create)
        #: The young generation as last heard: only speed depends on it.
        self.young = 0
        #: Objects that were found in the old generation since somebody took this.
        self.used: set[bytes] = set()

    def attach(self, env: lmdb.Environment, *, create: bool = False) -> None:
        """Be in *env*, to begin with or after `end_reading`. lmdb.Error."""
        self._begin = env.begin
        self._state, *others = (env.open_db(name, create=create) for name in _DATABASES)
        self._current = others[:2]
        self._past = others[2:]
        self._page_bytes: int = env.stat()["psize"]

    # Reading --------------------------------------------------------------------------------------

    def begin_reading(self) -> None:
        self._turns.extend([object()] * limits.SHARED_CACHE_READS_AT_ONCE)

    def find(self, oid: bytes, tid: bytes, current: bool, epoch: int) -> Revision | None:
        """The newest revision of *oid* before *tid*, if it is known. One that is current will do only if
        *current*, and only of this *epoch* or a later one."""
        try:
            turn = self._turns.pop()
        except IndexError:
            return None
        try:
            txn = self._begin(self._current[self.young])
        except BaseException:
            self._turns.append(turn)
            raise
        try:
            value: Any = txn.get(oid)
            if value is None:
                value = txn.get(oid, None, self._current[1 - self.young])
                if value is not None:
                    self.used.add(oid)
            if value is not None:
                start, written = _unpack_current(value)
                if start < tid:
                    if not current or written < epoch or crc32(value) != _SOUND:
                        return None
                    return value[_CURRENT_BYTES:-_CHECK_BYTES], start, None
            return self._find_past(txn, oid, tid)
        except StructError:  # too short: damaged
            return None
        finally:
            txn.abort()
            self._turns.append(turn)

    def _find_past(self, txn: lmdb.Transaction, oid: bytes, tid: bytes) -> Revision | None:
        wanted = oid + tid
        for database in self._past:
            cursor = txn.cursor(database)
            if cursor.set_range(wanted):
                key: Any
                value: Any
                key, value = cursor.item()
                if key[:_OID_BYTES] == oid:
                    start = value[:_START_BYTES]
                    if start < tid and crc32(value) == _SOUND:
                        return value[_START_BYTES:-_CHECK_BYTES], start, key[_OID_BYTES:]
        return None

    @contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        turn = self._next_turn(time.monotonic() + limits.SHARED_CACHE_LOCK_S)
        try:
            with self._begin(self._state) as txn:
                yield txn
        finally:
            self._turns.append(turn)

    def _next_turn(self, deadline_s: float) -> object:
        while True:
            try:
                return self._turns.pop()
            except IndexError:
                if time.monotonic() > deadline_s:
                    raise TimeoutError from None
            time.sleep(limits.SHARED_CACHE_LOCK_POLL_S)

    def end_reading(self, timeout_s: float) -> None:
        """Have nobody begin to read any more, and wait for those who do. TimeoutError if they don't end."""
        deadline_s = time.monotonic() + timeout_s
        taken: list[object] = []
        try:
            for _ in range(limits.SHARED_CACHE_READS_AT_ONCE):
                taken.append(self._next_turn(deadline_s))
        except BaseException:
            self._turns.extend(taken)
            raise

    def look(self) -> State:
        """The state at this moment. lmdb.Error; TimeoutError if there is no turn for too long."""
        with self._reading() as txn:
            return self.state(txn)

    def state(self, txn: lmdb.Transaction) -> State:
        found: Any = txn.get(_STATE, None, self._state)
        state = State() if found is None else _state_of(found)
        self.young = state.young
        return state

    def count(self) -> tuple[int, int]:
        """How many revisions are current, and past."""
        with self._reading() as txn:
            current, past = (
                sum(txn.stat(database)["entries"] for database in databases)
                for databases in (self._current, self._past)
            )
            return current, past

    def used_bytes(self) -> int:
        """What both generations take in the file."""
        with self._reading() as txn:
            return sum(self._taken_bytes(txn, generation) for generation in (0, 1))

    def damaged(self) -> int:
        """How many revisions fail their check. Goes through all of them."""
        wrong = 0
        with self._reading() as txn:
            for database in (*self._current, *self._past):
                items: Any = txn.cursor(database)
                wrong += sum(crc32(value) != _SOUND for _, value in items)
        return wrong

    # Changing, within a write transaction ----------------------------------------------------------

    def write_state(self, txn: lmdb.Transaction, state: State) -> None:
        packed = _STATE_LAYOUT.pack(state.applied, state.epoch, state.witness, state.young, state.evicted)
        txn.put(_STATE, _checked(packed), db=self._state)
        self.young = state.young

    def put_current(self, txn: lmdb.Transaction, state: State, oid: bytes, start: bytes, data: bytes) -> None:
        rest = start + state.epoch.to_bytes(8, "big") + data
        txn.put(oid, _checked(rest), db=self._current[state.young])
        txn.delete(oid, db=self._current[1 - state.young])

    def put_past(
        self, txn: lmdb.Transaction, state: State, oid: bytes, start: bytes, end: bytes, data: bytes
    ) -> None:
        txn.put(oid + end, _checked(start + data), db=self._past[state.young])

    def end(self, txn: lmdb.Transaction, state: State, oid: bytes, tid: bytes) -> None:
        """What is current of *oid* was overwritten by *tid*."""
        for database in self._current:
            value: Any = txn.pop(oid, db=database)
            if value is None or crc32(value) != _SOUND:
                continue
            start, epoch = _unpack_current(value)
            if epoch == state.epoch and start < tid:
                self.put_past(txn, state, oid, start, tid, value[_CURRENT_BYTES:-_CHECK_BYTES])

    def forget(self, txn: lmdb.Transaction, oid: bytes) -> None:
        """What is current of *oid* may have been overwritten."""
        for database in self._current:
            txn.delete(oid, db=database)

    def promote(self, txn: lmdb.Transaction, state: State, oid: bytes) -> int:
        """Have what is current of *oid* in the young generation; how many bytes that moved."""
        value: Any = txn.pop(oid, db=self._current[1 - state.young])
        if value is not None and crc32(value) == _SOUND and _unpack_current(value)[1] == state.epoch:
            txn.put(oid, value, db=self._current[state.young], overwrite=False)
        return len(value or b"")

    def make_room(self, txn: lmdb.Transaction, state: State, most_bytes: int) -> None:
        """If the young generation takes more than *most_bytes*, begin a new one."""
        if self._taken_bytes(txn, state.young) > most_bytes:
            self.empty_old(txn, state)

    def empty_old(self, txn: lmdb.Transaction, state: State) -> None:
        """Empty the old generation, which is the young one from now on."""
        state.young = 1 - state.young
        for database in (self._current[state.young], self._past[state.young]):
            state.evicted += txn.stat(database)["entries"]
            txn.drop(database, delete=False)

    def _taken_bytes(self, txn: lmdb.Transaction, generation: int) -> int:
        pages = 0
        for database in (self._current[generation], self._past[generation]):
            stat = txn.stat(database)
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return pages * self._page_bytes


def _checked(content: bytes) -> bytes:
    return content + crc32(content).to_bytes(_CHECK_BYTES, "little")


def _state_of(value: bytes) -> State:
    if crc32(value) != _SOUND or len(value) != _STATE_LAYOUT.size + _CHECK_BYTES:
        raise lmdb.CorruptedError("its state is damaged")
    return State(*_STATE_LAYOUT.unpack_from(value))
