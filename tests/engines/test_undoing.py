"""What an undo or a restore would write is what FileStorage writes when it does the same.

`Twins` are two storages to which the same happens. One does it by itself; into the other goes what `undo`
and `restore` found by looking. Both files are the same afterwards, byte for byte, unless several operations
of one transaction met in one object: FileStorage then writes a record for each.
"""

from __future__ import annotations

import importlib
import random
from base64 import encodebytes
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from persistent.TimeStamp import TimeStamp
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError, MultipleUndoErrors, POSKeyError, UndoError
from ZODB.tests.ConflictResolution import PCounter
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import zodb_pickle, zodb_unpickle
from ZODB.utils import p64

from zeoid.engines.records import DataFile
from zeoid.engines.undoing import Pending, Undone, restore, undo
from zeoid.model import NO_TID, Conflict, Delete, Operation, Restore, Store, Undo, tid_after

ROOT, A, B, C = (p64(number) for number in range(4))
#: Objects that know how to resolve conflicts.
COUNTER, OTHER_COUNTER = (p64(number) for number in (0x10000, 0x10001))
OIDS = (A, B, C, COUNTER, OTHER_COUNTER)
ROOT_DATA = zodb_pickle(MinPO("root"))
ZERO, ONE, TWO, THREE = VALUES = [zodb_pickle(MinPO(number)) for number in range(4)]

LATER = "Some data were modified by a later transaction"
ADDED = "Can't undo an add transaction followed by conflicting transactions."
NO_DATA = "_loadBack() failed"
UNKNOWN = "Invalid transaction id"
PACKED = "non-undoable transaction"


def counter(value: int) -> bytes:
    it = PCounter()
    it._value = value
    data: bytes = zodb_pickle(it)
    return data


def tid_at(minute: int) -> bytes:
    time = datetime(2020, 1, 1) + timedelta(minutes=minute)
    tid: bytes = TimeStamp(time.year, time.month, time.day, time.hour, time.minute, 0.0).raw()
    return tid


def store(oid: bytes, data: bytes) -> Store:
    return Store(oid, NO_TID, data)


def delete(oid: bytes) -> Delete:
    return Delete(oid, NO_TID)


class Failed(Exception):
    """An operation failed in both storages: why, by object, or by b"" for all of it."""

    def __init__(self, reasons: dict[bytes, str]) -> None:
        self.reasons = reasons


def reasons_of(problem: UndoError) -> dict[bytes, str]:
    if isinstance(problem, MultipleUndoErrors):
        # FileStorage never fills in the name that this one has a place for.
        return {oid: each._reason.removesuffix(" for %s") for oid, each in problem._errs}
    return {b"": problem._reason}


class Twins:
    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.theirs = FileStorage(str(folder / "theirs.fs"))
        self.mine = FileStorage(str(folder / "mine.fs"))
        self.file = DataFile(self.mine)
        self.tids: list[bytes] = []
        #: Whether both files are the same.
        self.identical = True
        #: How often what happened.
        self.seen: Counter[str] = Counter()
        self.do(store(ROOT, ROOT_DATA))

    def close(self) -> None:
        self.theirs.close()
        self.mine.close()

    # Changes --------------------------------------------------------------------------------------

    def do(self, *operations: Operation) -> bytes:
        """One transaction of them; its tid. The serials of stores and deletions don't matter. Failed if
        there can be no such transaction."""
        tid = tid_at(len(self.tids))
        meta = TransactionMetaData(b"user", b"description")
        both = self.theirs, self.mine
        for storage in both:
            storage.tpc_begin(meta, tid)
        pending: dict[bytes, Pending] = {}
        try:
            for operation in operations:
                written = self._apply(operation, meta, tid, pending)
                self.identical = self.identical and not pending.keys() & written.keys()
                pending |= written
        except BaseException:
            for storage in both:
                storage.tpc_abort(meta)
            raise
        for oid, (data, same_as) in pending.items():
            self.mine.restore(oid, tid, data, "", same_as, meta)
        for storage in both:
            storage.tpc_vote(meta)
            storage.tpc_finish(meta)
        self.tids.append(tid)
        return tid

    def _apply(
        self, operation: Operation, meta: Any, tid: bytes, pending: dict[bytes, Pending]
    ) -> dict[bytes, Pending]:
        match operation:
            case Store(oid, _, data):
                self.theirs.store(oid, self._newest_tid(oid), data, "", meta)
                return {oid: Pending(data, None)}
            case Delete(oid, _):
                self.theirs.deleteObject(oid, self._newest_tid(oid), meta)
                return {oid: Pending(None, None)}
            case Restore(oid, restored, same_as):
                self.theirs.restore(oid, tid, restored, "", same_as, meta)
                return {oid: Pending(*restore(self.file, oid, restored, same_as, pending)[1:])}
            case Undo(undone):
                return self._undo(undone, meta, pending)
        raise AssertionError(operation)

    def _undo(self, tid: bytes, meta: Any, pending: dict[bytes, Pending]) -> dict[bytes, Pending]:
        expected: dict[bytes, str] = {}
        try:
            self.theirs.undo(encodebytes(tid).rstrip(), meta)
        except UndoError as problem:
            expected = reasons_of(problem)
        self.seen.update(expected.values())
        try:
            undone = undo(self.file, tid, pending)
        except UndoError as problem:
            reasons = reasons_of(problem)
            # A conflict is not resolved, if the transaction can't be undone anyway.
            assert {oid: why for oid, why in expected.items() if oid in reasons} == reasons
            assert {why for oid, why in expected.items() if oid not in reasons} <= {LATER}
            raise Failed(expected) from None
        if self.identical:
            assert undo(DataFile(self.theirs), tid, pending) == undone
        written, unresolved = self._resolved(undone, pending)
        assert unresolved == expected
        if unresolved:
            raise Failed(unresolved)
        found = self.file.transaction(tid)
        assert found is not None
        assert written.keys() == {header.oid for header in found[1]}
        return {header.oid: written[header.oid] for header in found[1]}

    def _resolved(
        self, undone: Undone, pending: dict[bytes, Pending]
    ) -> tuple[dict[bytes, Pending], dict[bytes, str]]:
        """What an undo writes after its conflicts were resolved, and where that failed."""
        written = {oid: Pending(data, same_as) for oid, data, same_as in undone.records}
        for data, same_as in written.values():
            self.seen["data" if data is not None else "refers to nothing" if same_as else "nothing"] += 1
        unresolved: dict[bytes, str] = {}
        for conflict in undone.conflicts:
            self.seen["conflict with pending" if conflict.oid in pending else "conflict"] += 1
            try:
                written[conflict.oid] = Pending(self.resolve(conflict), None)
                self.seen["resolved"] += 1
            except ConflictError:
                unresolved[conflict.oid] = LATER
        return written, unresolved

    def resolve(self, conflict: Conflict) -> bytes:
        """As a client does it: only with what the conflict says, and what can be loaded."""
        data: bytes = self.mine.tryToResolveConflict(
            conflict.oid, conflict.committed, conflict.read, conflict.data
        )
        return data

    def pack_up_to(self, tid: bytes) -> None:
        """The root refers to every object. (Without that search FileStorage forgets what is referred to.)"""
        alive = [oid for oid in OIDS if before(self.theirs, oid, tid_after(tid)) not in (None, "gone")]
        for storage in self.theirs, self.mine:
            storage.pack(TimeStamp(tid).timeTime(), lambda data: alive if data == ROOT_DATA else [])

    # Looking --------------------------------------------------------------------------------------

    def _newest_tid(self, oid: bytes) -> bytes:
        newest = DataFile(self.theirs).newest(oid)
        return NO_TID if newest is None else newest.tid

    def data(self, oid: bytes) -> bytes | None:
        """The current data."""
        newest = self.file.newest(oid)
        assert newest is not None
        return self.file.data(newest)

    def check(self) -> None:
        if self.identical:
            theirs, mine = (
                Path(storage._file_name).read_bytes()[: storage.getSize()]
                for storage in (self.theirs, self.mine)
            )
            assert mine == theirs
        else:
            self.check_loads()

    def check_loads(self) -> None:
        for oid in OIDS:
            for tid in self.tids:
                after = tid_after(tid)
                assert before(self.mine, oid, after) == before(self.theirs, oid, after)


def before(storage: Any, oid: bytes, tid: bytes) -> Any:
    try:
        return storage.loadBefore(oid, tid)
    except POSKeyError:
        return "gone"


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("ZODB.FileStorage.FileStorage"), "fsync", None)


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[Twins]:
    twins = Twins(tmp_path / "twins")
    yield twins
    twins.check()
    twins.check_loads()
    twins.close()


def fails(twins: Twins, *operations: Operation) -> dict[bytes, str]:
    with pytest.raises(Failed) as failed:
        twins.do(*operations)
    return failed.value.reasons


# The rules, one by one --------------------------------------------------------------------------------


def test_the_data_from_before_becomes_the_data_again(twins: Twins) -> None:
    first = twins.do(store(A, ZERO), store(B, ZERO))
    second = twins.do(store(A, ONE), store(B, TWO))
    assert undo(twins.file, second, {}) == Undone([(A, ZERO, first), (B, ZERO, first)], [])
    twins.do(Undo(second))
    assert (twins.data(A), twins.data(B)) == (ZERO, ZERO)


def test_an_object_ceases_to_be_when_its_creation_is_undone(twins: Twins) -> None:
    created = twins.do(store(A, ZERO))
    assert undo(twins.file, created, {}) == Undone([(A, None, None)], [])
    undone = twins.do(Undo(created))
    assert twins.data(A) is None
    assert undo(twins.file, undone, {}) == Undone([(A, ZERO, created)], [])
    twins.do(Undo(undone))
    assert twins.data(A) == ZERO


def test_an_undo_can_be_undone_and_so_on(twins: Twins) -> None:
    twins.do(store(A, ZERO))
    tid = twins.do(store(A, ONE))
    for expected in (ZERO, ONE) * 4:
        tid = twins.do(Undo(tid))
        assert twins.data(A) == expected


def test_a_deletion_can_be_undone_and_so_on(twins: Twins) -> None:
    twins.do(store(A, ZERO))
    tid = deleted = twins.do(delete(A))
    for expected in (ZERO, None) * 3:
        tid = twins.do(Undo(tid))
        assert twins.data(A) == expected
    twins.do(store(A, ONE))
    assert fails(twins, Undo(deleted)) == {A: NO_DATA}


def test_an_object_that_is_gone_again_may_be_so_by_the_same_deletion(twins: Twins) -> None:
    created = twins.do(store(A, ZERO))
    deleted = twins.do(delete(A))
    again = twins.do(Undo(twins.do(Undo(deleted))))
    assert twins.data(A) is None
    assert undo(twins.file, deleted, {}) == Undone([(A, ZERO, created)], [])
    twins.do(Undo(deleted))
    assert twins.data(A) == ZERO
    assert fails(twins, Undo(again)) == {A: NO_DATA}


def test_a_transaction_can_be_undone_when_the_data_is_the_same_again(twins: Twins) -> None:
    first = twins.do(store(A, ZERO))
    second = twins.do(store(A, ONE))
    twins.do(store(A, TWO))
    twins.do(store(A, ONE))
    assert undo(twins.file, second, {}) == Undone([(A, ZERO, first)], [])
    twins.do(Undo(second))


def test_a_transaction_can_be_undone_when_later_ones_were(twins: Twins) -> None:
    created = twins.do(store(A, ZERO))
    second = twins.do(store(A, ONE))
    twins.do(Undo(second))
    assert undo(twins.file, created, {}) == Undone([(A, None, None)], [])
    twins.do(Undo(created))


def test_a_later_change_is_a_conflict(twins: Twins) -> None:
    twins.do(store(A, ZERO))
    second = twins.do(store(A, ONE))
    third = twins.do(store(A, TWO))
    assert undo(twins.file, second, {}) == Undone([], [Conflict(A, third, second, ZERO)])
    assert fails(twins, Undo(second)) == {A: LATER}


def test_a_conflict_can_be_resolved_by_the_class(twins: Twins) -> None:
    twins.do(store(COUNTER, counter(10)))
    second = twins.do(store(COUNTER, counter(15)), store(A, ONE))
    third = twins.do(store(COUNTER, counter(16)))
    undone = undo(twins.file, second, {})
    assert undone == Undone([(A, None, None)], [Conflict(COUNTER, third, second, counter(10))])
    assert zodb_unpickle(twins.resolve(undone.conflicts[0]))._value == 11
    twins.do(Undo(second))
    assert twins.data(COUNTER) == counter(11)


def test_a_creation_can_not_be_undone_under_other_data(twins: Twins) -> None:
    created = twins.do(store(A, ZERO), store(B, ZERO))
    twins.do(store(A, ONE))
    assert fails(twins, Undo(created)) == {A: ADDED}


def test_what_is_gone_has_no_data_to_be_undone(twins: Twins) -> None:
    twins.do(store(A, ZERO), store(B, ZERO), store(C, ZERO))
    changed = twins.do(store(A, ONE), delete(B), store(C, ONE))
    twins.do(delete(A))
    twins.do(store(B, TWO))
    assert fails(twins, Undo(changed)) == {A: NO_DATA, B: NO_DATA}
    with pytest.raises(MultipleUndoErrors) as failed:
        undo(twins.file, changed, {})
    assert [oid for oid, _ in failed.value._errs] == [A, B]


def test_a_conflict_with_nothing_before_it_can_not_be_resolved(twins: Twins) -> None:
    twins.do(store(COUNTER, counter(1)))
    twins.do(delete(COUNTER))
    stored = twins.do(store(COUNTER, counter(2)))
    twins.do(store(COUNTER, counter(3)))
    assert fails(twins, Undo(stored)) == {COUNTER: NO_DATA}


def test_a_transaction_that_is_not_there_can_not_be_undone(twins: Twins) -> None:
    tid = twins.do(store(A, ZERO))
    for unknown in NO_TID, tid_after(tid), b"\xff" * 8:
        assert fails(twins, Undo(unknown)) == {b"": UNKNOWN}


def test_a_transaction_that_was_packed_can_not_be_undone(twins: Twins) -> None:
    gone = twins.do(store(A, ZERO))
    packed = twins.do(store(A, ONE))
    later = twins.do(store(A, TWO))
    twins.pack_up_to(packed)
    assert fails(twins, Undo(gone)) == {b"": UNKNOWN}
    assert fails(twins, Undo(packed)) == {b"": PACKED}
    assert undo(twins.file, later, {}) == Undone([(A, ONE, packed)], [])
    twins.do(Undo(later))


def test_nothing_is_undone_of_a_transaction_without_records(twins: Twins) -> None:
    tid = twins.do()
    assert undo(twins.file, tid, {}) == Undone([], [])


def test_of_two_records_of_one_object_the_last_one_counts(twins: Twins) -> None:
    meta = TransactionMetaData(b"user", b"description")
    first = twins.do(store(A, ZERO), store(B, ZERO))
    second = tid_at(len(twins.tids))
    for storage in twins.theirs, twins.mine:
        storage.tpc_begin(meta, second)
        for oid, data in (A, ONE), (B, ONE), (A, TWO):
            storage.store(oid, first, data, "", meta)
        storage.tpc_vote(meta)
        storage.tpc_finish(meta)
    twins.tids.append(second)
    assert undo(twins.file, second, {}) == Undone([(B, ZERO, first), (A, ZERO, first)], [])
    twins.identical = False
    undone = twins.do(Undo(second))
    assert (twins.data(A), twins.data(B)) == (ZERO, ZERO)
    twins.do(Undo(undone))
    assert (twins.data(A), twins.data(B)) == (TWO, ONE)


# Several in one transaction ---------------------------------------------------------------------------


def test_the_newest_transactions_are_undone_one_after_the_other(twins: Twins) -> None:
    first = twins.do(store(A, ZERO), store(B, ZERO))
    second = twins.do(store(A, ONE), store(B, ONE))
    third = twins.do(store(A, TWO))
    pending = {A: Pending(ONE, second)}
    assert undo(twins.file, second, pending) == Undone([(A, ZERO, first), (B, ZERO, first)], [])
    twins.do(Undo(third), Undo(second))
    assert (twins.data(A), twins.data(B)) == (ZERO, ZERO)


def test_undoing_twice_in_one_transaction_changes_nothing_more(twins: Twins) -> None:
    twins.do(store(COUNTER, counter(0)))
    tid = twins.do(store(COUNTER, counter(5)))
    twins.do(Undo(tid), Undo(tid))
    # The class of a counter takes it for another change by 5.
    assert twins.data(COUNTER) == counter(-5)
    twins.do(store(A, ZERO))
    tid = twins.do(store(A, ONE))
    assert fails(twins, Undo(tid), Undo(tid)) == {A: LATER}


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_conflicts_of_several_undos_are_resolved_in_any_order(twins: Twins, order: tuple[int, int]) -> None:
    tids = [twins.do(store(COUNTER, counter(value))) for value in (0, 1, 11, 111)]
    twins.do(*(Undo(tids[which]) for which in order))
    assert twins.data(COUNTER) == counter(100)


def test_a_conflict_with_what_is_pending_can_be_resolved_from_what_is_committed(twins: Twins) -> None:
    first = twins.do(store(COUNTER, counter(0)))
    second = twins.do(store(COUNTER, counter(1)))
    third = twins.do(store(COUNTER, counter(11)))
    pending = {COUNTER: Pending(counter(1_000), None)}
    conflict = Conflict(COUNTER, first, second, counter(1_000), current=third)
    assert undo(twins.file, second, pending) == Undone([], [conflict])
    assert twins.resolve(conflict) == counter(999)


def test_what_is_pending_counts_as_the_current_data(twins: Twins) -> None:
    first = twins.do(store(A, ZERO))
    second = twins.do(store(A, ONE))
    third = twins.do(store(A, TWO))
    for same in Pending(TWO, None), Pending(TWO, third):
        assert undo(twins.file, third, {A: same}) == Undone([(A, ONE, second)], [])
    assert undo(twins.file, second, {A: Pending(ONE, second)}) == Undone([(A, ZERO, first)], [])
    twins.do(store(A, ONE), Undo(second))
    gone = fails(twins, delete(A), Undo(second))
    assert gone == {A: NO_DATA}
    assert fails(twins, store(B, ONE), store(A, TWO), Undo(first)) == {A: ADDED}


def test_an_object_with_an_unresolved_conflict_is_left_out(twins: Twins) -> None:
    first = twins.do(store(A, ZERO), store(COUNTER, counter(0)))
    second = twins.do(store(A, ONE), store(COUNTER, counter(1)))
    assert undo(twins.file, second, {}, {COUNTER: 1}) == Undone([(A, ZERO, first)], [])


# Restore ----------------------------------------------------------------------------------------------


def test_a_restored_record_refers_to_the_same_data(twins: Twins) -> None:
    first = twins.do(store(A, ZERO))
    second = twins.do(store(A, ONE))
    undone = twins.do(Undo(second))
    for same_as in first, undone:
        assert restore(twins.file, A, ZERO, same_as, {}) == (A, ZERO, same_as)
        twins.do(Restore(A, ZERO, same_as))
        assert twins.data(A) == ZERO


def test_a_restored_record_has_its_own_data_where_there_is_none_to_refer_to(twins: Twins) -> None:
    first = twins.do(store(A, ZERO))
    other = twins.do(store(B, ONE))
    undone = twins.do(Undo(twins.do(store(A, ONE))))
    deleted = twins.do(delete(B))
    for oid, same_as in (A, None), (A, first), (A, other), (A, undone), (B, deleted), (A, NO_TID):
        assert restore(twins.file, oid, THREE, same_as, {}) == (oid, THREE, None)
    assert restore(twins.file, A, ZERO, tid_after(undone), {}) == (A, ZERO, None)
    twins.do(Restore(A, THREE, first), Restore(C, THREE, None))
    assert (twins.data(A), twins.data(C)) == (THREE, THREE)


def test_without_data_it_is_taken_from_the_revision_that_is_named(twins: Twins) -> None:
    first = twins.do(store(A, ZERO))
    undone = twins.do(Undo(twins.do(store(A, ONE))))
    assert restore(twins.file, A, None, first, {}) == (A, ZERO, first)
    assert restore(twins.file, A, None, undone, {}) == (A, ZERO, undone)


def test_a_restored_object_ceases_to_be_without_data(twins: Twins) -> None:
    first = twins.do(store(A, ZERO))
    assert restore(twins.file, A, None, None, {}) == (A, None, None)
    assert restore(twins.file, A, None, tid_after(first), {}) == (A, None, None)
    deleted = twins.do(delete(A))
    assert restore(twins.file, A, None, deleted, {}) == (A, None, deleted)
    twins.do(Restore(A, None, deleted), Restore(B, None, None))
    assert twins.data(A) is None
    assert twins.data(B) is None


# Any history ------------------------------------------------------------------------------------------


class History:
    """A random life of a small database."""

    def __init__(self, twins: Twins, chance: random.Random, several: bool) -> None:
        self._twins = twins
        self._chance = chance
        self._several = several

    def live(self, steps: int) -> None:
        choices = [self._store, self._delete, self._undo, self._restore, self._pack]
        for step in self._chance.choices(choices, [25, 6, 50, 8, 3], k=steps):
            step()
            self._twins.check()
        self._twins.check_loads()

    def _data(self, oid: bytes) -> bytes:
        if oid in (COUNTER, OTHER_COUNTER):
            return counter(self._chance.randrange(100))
        return self._chance.choice(VALUES)

    def _store(self) -> None:
        oids = self._chance.sample(OIDS, self._chance.randint(1, 3))
        self._twins.do(*(store(oid, self._data(oid)) for oid in oids))

    def _delete(self) -> None:
        oid = self._chance.choice(OIDS)
        if self._twins.file.newest(oid) is not None:
            self._twins.do(delete(oid))

    def _undo(self) -> None:
        count = self._chance.choice([1, 2, 3]) if self._several else 1
        recent = self._chance.choice([2, 5, 100])
        tids = self._chance.choices(self._twins.tids[1:][-recent:] or [NO_TID], k=count)
        operations: list[Operation] = [Undo(tid) for tid in tids]
        if self._several and self._chance.random() < 0.2:
            oid = self._chance.choice(OIDS)
            operations.insert(0, store(oid, self._data(oid)))
        try:
            self._twins.do(*operations)
        except Failed:
            self._twins.seen["failed"] += 1
        else:
            self._twins.seen["undone"] += 1

    def _restore(self) -> None:
        oid, tid = self._chance.choice(OIDS), self._chance.choice(self._twins.tids)
        header = self._twins.file.revision(oid, tid)
        if header is not None:
            self._twins.do(Restore(oid, self._twins.file.data(header), tid))
        else:
            self._twins.do(Restore(oid, self._chance.choice([None, self._data(oid)]), None))

    def _pack(self) -> None:
        # Of two records that a transaction has of an object, FileStorage's pack may take the wrong one.
        if self._twins.identical:
            self._twins.pack_up_to(self._chance.choice(self._twins.tids))


def live(tmp_path: Path, histories: int, several: bool) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(histories):
        twins = Twins(tmp_path / str(seed))
        try:
            History(twins, random.Random(seed), several).live(30)
        except BaseException as problem:
            problem.add_note(f"seed {seed}")
            raise
        finally:
            twins.close()
        seen += twins.seen
    return seen


RULES = [
    "data",
    "nothing",
    "refers to nothing",
    "conflict",
    "resolved",
    LATER,
    ADDED,
    NO_DATA,
    UNKNOWN,
    PACKED,
]


def test_whatever_was_done_before_an_undo_writes_the_same_bytes(tmp_path: Path) -> None:
    seen = live(tmp_path, 100, several=False)
    assert all(seen[rule] >= 10 for rule in [*RULES, "failed", "undone"]), seen


def test_whatever_else_a_transaction_does_an_undo_has_the_same_effect(tmp_path: Path) -> None:
    seen = live(tmp_path, 100, several=True)
    assert all(seen[rule] >= 10 for rule in [*RULES, "failed", "undone", "conflict with pending"]), seen


# A pack meanwhile -------------------------------------------------------------------------------------


class PackingLock:
    """A storage's lock, of which the *nth* holder finds that a pack has just ended."""

    def __init__(self, lock: Any, pack: Callable[[], None], nth: int) -> None:
        self.left = nth
        self._lock = lock
        self._pack = pack

    def __enter__(self) -> None:
        if self.left == 0:
            self._pack()
        self.left -= 1
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Seen:
    """A storage with another lock, as `DataFile` sees it."""

    def __init__(self, storage: Any, lock: PackingLock) -> None:
        self._real = storage
        self._lock = lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def undo_while_packing(twins: Twins, nth: int) -> bool:
    """Whether the pack came before the undo was over."""
    for value in ZERO, ONE, TWO:
        first = twins.do(store(A, value), store(COUNTER, counter(len(twins.tids))))
    undone = twins.do(store(A, THREE), store(B, ONE), store(COUNTER, counter(20)))
    later = twins.do(store(COUNTER, counter(21)))
    expected = Undone([(A, TWO, first), (B, None, None)], [Conflict(COUNTER, later, undone, counter(3))])
    lock = PackingLock(twins.mine._lock, lambda: twins.pack_up_to(first), nth)
    assert undo(DataFile(Seen(twins.mine, lock)), undone, {}) == expected
    return lock.left < 0


def restore_while_packing(twins: Twins, nth: int) -> bool:
    """Whether the pack came before the record was found."""
    twins.do(store(A, ZERO))
    second = twins.do(store(A, ONE))
    undone = twins.do(Undo(twins.do(store(A, TWO))))
    lock = PackingLock(twins.mine._lock, lambda: twins.pack_up_to(second), nth)
    assert restore(DataFile(Seen(twins.mine, lock)), A, ONE, undone, {}) == (A, ONE, undone)
    return lock.left < 0


@pytest.mark.parametrize("reach", [undo_while_packing, restore_while_packing])
def test_what_is_found_is_the_same_whenever_a_pack_ends(
    tmp_path: Path, reach: Callable[[Twins, int], bool]
) -> None:
    for nth in range(500):
        twins = Twins(tmp_path / str(nth))
        try:
            if not reach(twins, nth):
                break
        finally:
            twins.close()
    assert 3 < nth < 499
