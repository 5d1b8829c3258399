"""The object cache in memory: whatever happens, it answers as the server would, or not at all.

The server is modelled by all revisions there ever were. The cache may forget anything at any time; what it
says must be true.
"""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zeoid import limits
from zeoid.cache.memory import MemoryCache
from zeoid.model import MAX_TID, NO_TID, Revision, tid_after

BIG = 10**9
#: Few, so that it does not take long to have more.
ENDED_REVISIONS = 3
OIDS = [number.to_bytes(8, "big") for number in range(6)]
oids = st.sampled_from(OIDS)
some_oids = st.sets(oids, min_size=1, max_size=3)


def tid(number: int) -> bytes:
    return number.to_bytes(8, "big")


def cost(size_bytes: int) -> int:
    """What a revision with so much data takes."""
    cache = MemoryCache(BIG)
    cache.store(OIDS[0], tid(1), None, b"x" * size_bytes)
    return cache.used_bytes


class Database:
    """Every revision of every object."""

    def __init__(self) -> None:
        self.last = 1
        self.revisions: dict[bytes, list[tuple[int, bytes]]] = {oid: [(1, b"first")] for oid in OIDS}

    def commit(self, written: set[bytes], size_bytes: int, step: int) -> int:
        self.last += step
        for oid in written:
            data = b"%d of %d " % (self.last, oid[7])
            self.revisions[oid].append((self.last, data + b"x" * size_bytes))
        return self.last

    def load_before(self, oid: bytes, before: bytes) -> Revision | None:
        found: Revision | None = None
        for start, data in self.revisions[oid]:
            if tid(start) < before:
                found = data, tid(start), None
            elif found is not None and found[2] is None:
                found = found[0], found[1], tid(start)
        return found


class CacheMachine(RuleBasedStateMachine):
    """The cache is told what a client would tell it, in the order in which the client hears of it."""

    @initialize(size=st.sampled_from([0, 1, cost(0) * 3, cost(10) * 4, BIG]))
    def begin(self, size: int) -> None:
        self.patched = patch.object(limits, "ENDED_REVISIONS", ENDED_REVISIONS)
        self.patched.start()
        self.size_bytes = size
        self.cache = MemoryCache(size)
        self.database = Database()
        self.applied = tid(self.database.last)

    # What the client hears

    @rule(written=some_oids, size=st.integers(0, 40), step=st.integers(1, 3))
    def another_client_commits(self, written: set[bytes], size: int, step: int) -> None:
        self.applied = tid(self.database.commit(written, size, step))
        self.cache.invalidate(self.applied, written)

    @rule(written=some_oids, size=st.integers(0, 40), step=st.integers(1, 3))
    def this_client_commits(self, written: set[bytes], size: int, step: int) -> None:
        self.another_client_commits(written, size, step)
        for oid in written:
            start, data = self.database.revisions[oid][-1]
            self.cache.store(oid, tid(start), None, data)

    @rule(own=some_oids, others=some_oids, size=st.integers(0, 40))
    def this_client_hears_of_its_own_commit_after_a_later_one(
        self, own: set[bytes], others: set[bytes], size: int
    ) -> None:
        first = tid(self.database.commit(own, size, 1))
        second = tid(self.database.commit(others, size, 1))
        self.cache.invalidate(second, others)
        self.applied = second
        self.cache.invalidate(first, own)
        for oid in own:
            (data,) = [data for start, data in self.database.revisions[oid] if tid(start) == first]
            self.cache.store(oid, first, second if oid in others else None, data)

    @rule(commits=st.lists(some_oids, min_size=1, max_size=4), size=st.integers(0, 40))
    def commits_are_missed(self, commits: list[set[bytes]], size: int) -> None:
        for written in commits:
            self.applied = tid(self.database.commit(written, size, 1))
        self.cache.forget(set().union(*commits))

    @rule(commits=st.lists(some_oids, min_size=1, max_size=4), size=st.integers(0, 40))
    def too_many_commits_are_missed(self, commits: list[set[bytes]], size: int) -> None:
        for written in commits:
            self.applied = tid(self.database.commit(written, size, 1))
        self.cache.started_over(MAX_TID)

    @rule()
    def everything_is_forgotten(self) -> None:
        self.cache.clear()
        assert self.cache.used_bytes == len(self.cache) == 0

    # What the client does

    @rule(oid=oids, back=st.integers(0, 12))
    def load(self, oid: bytes, back: int) -> None:
        """From the cache, or else from the server; what came from the server is kept."""
        before = tid_after(tid(max(0, self.database.last - back)))
        answer = self.database.load_before(oid, before)
        found = self.cache.load_before(oid, before, self.applied)
        if found is not None:
            assert found == answer
        elif answer is not None:
            data, start, end = answer
            self.cache.store(oid, start, end, data)
            kept = self.cache.load_before(oid, before, self.applied)
            if self.size_bytes == BIG and len(self.database.revisions[oid]) <= ENDED_REVISIONS:
                assert kept == answer
            else:
                assert kept in (answer, None)

    @rule(loaded=st.lists(oids, max_size=8), back=st.integers(0, 12))
    def load_several_at_once(self, loaded: list[bytes], back: int) -> None:
        """Those that are here already may be among them, and the same one twice."""
        before = tid_after(tid(max(0, self.database.last - back)))
        answers = [(oid, self.database.load_before(oid, before)) for oid in loaded]
        self.cache.store_many([(oid, answer) for oid, answer in answers if answer is not None])
        for oid, answer in answers:
            kept = self.cache.load_before(oid, before, self.applied)
            if answer and self.size_bytes == BIG and len(self.database.revisions[oid]) <= ENDED_REVISIONS:
                assert kept == answer
            else:
                assert kept in (answer, None)

    @rule(oid=oids, back=st.integers(0, 12))
    def load_a_revision_twice_over(self, oid: bytes, back: int) -> None:
        """Two threads that miss the same revision both store it."""
        before = tid_after(tid(max(0, self.database.last - back)))
        answer = self.database.load_before(oid, before)
        if answer is not None:
            data, start, end = answer
            self.cache.store(oid, start, end, data)
            self.cache.store(oid, start, end, data)

    def ask(self, oid: bytes, before: int) -> None:
        found = self.cache.load_before(oid, tid(before), self.applied)
        assert found is None or found == self.database.load_before(oid, tid(before)), before

    @rule()
    def ask_everything(self) -> None:
        for oid in OIDS:
            for before in range(self.database.last + 2):
                self.ask(oid, before)

    @rule(oid=oids, ahead=st.integers(2, 5))
    def ask_about_the_future(self, oid: bytes, ahead: int) -> None:
        """Beyond what was applied there may be revisions that nobody told of yet."""
        before = tid(int.from_bytes(self.applied, "big") + ahead)
        assert self.cache.load_before(oid, before, self.applied) is None
        assert self.cache.load_before(oid, MAX_TID, self.applied) is None

    @precondition(lambda self: self.size_bytes == BIG)
    @rule(oid=oids)
    def with_room_enough_nothing_is_forgotten(self, oid: bytes) -> None:
        kept = len(self.cache)
        answer = self.database.load_before(oid, tid_after(self.applied))
        assert answer is not None
        data, start, end = answer
        known = self.cache.load_before(oid, tid_after(self.applied), self.applied)
        self.cache.store(oid, start, end, data)
        assert len(self.cache) == kept + (known is None)

    # What is always true

    @invariant()
    def it_stays_within_its_bound(self) -> None:
        if hasattr(self, "cache"):
            assert 0 <= self.cache.used_bytes <= self.size_bytes
            assert (self.cache.used_bytes == 0) == (len(self.cache) == 0)

    def teardown(self) -> None:
        """What it says it takes is what its revisions take: ask for every revision there ever was."""
        if not hasattr(self, "cache"):
            return
        self.patched.stop()
        self.ask_everything()
        found: set[Any] = set()
        for oid in OIDS:
            for start, _ in self.database.revisions[oid]:
                revision = self.cache.load_before(oid, tid(start + 1), self.applied)
                if revision is not None:
                    found.add((oid, revision))
        assert len(found) == len(self.cache)
        assert sum(cost(len(revision[0])) for _, revision in found) == self.cache.used_bytes


CacheMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestCacheMachine = CacheMachine.TestCase


# By example -------------------------------------------------------------------------------------------

A, B, C, D = OIDS[:4]


def test_several_are_kept_as_if_each_were_stored_by_itself() -> None:
    """New ones, known ones, newer and older ones, history, and one that is too large."""
    revisions: list[tuple[bytes, Revision]] = [
        (OIDS[0], (b"new", tid(5), None)),
        (OIDS[1], (b"past", tid(2), tid(4))),
        (OIDS[1], (b"now", tid(4), None)),
        (OIDS[2], (b"newer", tid(3), None)),
        (OIDS[3], (b"known", tid(2), None)),
        (OIDS[4], (b"older", tid(1), None)),
        (OIDS[5], (bytes(10_000), tid(1), None)),
    ]
    caches = MemoryCache(5000), MemoryCache(5000)
    for cache in caches:
        for number in (2, 3, 4):
            cache.store(OIDS[number], tid(2), None, b"known")
    caches[0].store_many(revisions)
    for oid, (data, start, end) in revisions:
        caches[1].store(oid, start, end, data)
    questions = [(oid, tid(before)) for oid in OIDS for before in range(8)]
    answers = [[cache.load_before(oid, before, tid(7)) for oid, before in questions] for cache in caches]
    assert answers[0] == answers[1]
    assert sum(answer is not None for answer in answers[0]) > 20
    assert caches[0].used_bytes == caches[1].used_bytes


def test_the_least_recently_used_object_goes_first() -> None:
    cache = MemoryCache(3 * cost(10))
    for oid in (A, B, C):
        cache.store(oid, tid(1), None, b"x" * 10)
    assert cache.load_before(A, tid(2), tid(1)) is not None  # A is used, B is the oldest now
    cache.store(D, tid(1), None, b"x" * 10)
    assert [cache.load_before(oid, tid(2), tid(1)) is not None for oid in (A, B, C, D)] == [
        True, False, True, True,
    ]  # fmt: skip


def test_using_history_is_use_too() -> None:
    cache = MemoryCache(3 * cost(10))
    cache.store(A, tid(1), tid(2), b"x" * 10)
    cache.store(B, tid(2), None, b"x" * 10)
    cache.store(C, tid(2), None, b"x" * 10)
    assert cache.load_before(A, tid(2), tid(2)) is not None
    cache.store(D, tid(2), None, b"x" * 10)
    assert cache.load_before(A, tid(2), tid(2)) is not None
    assert cache.load_before(B, tid(3), tid(2)) is None


def test_a_miss_is_no_use() -> None:
    cache = MemoryCache(2 * cost(10))
    cache.store(A, tid(5), None, b"x" * 10)
    cache.store(B, tid(5), None, b"x" * 10)
    assert cache.load_before(A, tid(3), tid(5)) is None
    cache.store(C, tid(5), None, b"x" * 10)
    assert cache.load_before(A, tid(6), tid(5)) is None
    assert cache.load_before(B, tid(6), tid(5)) is not None


def test_a_revision_that_is_larger_than_the_cache_pushes_nothing_out() -> None:
    cache = MemoryCache(2 * cost(10))
    cache.store(A, tid(1), None, b"x" * 10)
    cache.store(B, tid(1), None, b"x" * 10_000)
    cache.store(B, tid(1), tid(2), b"x" * 10_000)
    assert cache.load_before(A, tid(2), tid(1)) is not None
    assert cache.load_before(B, tid(2), tid(1)) is None


def test_a_revision_that_is_too_large_takes_the_place_of_the_older_one_all_the_same() -> None:
    cache = MemoryCache(2 * cost(10))
    cache.store(A, tid(1), None, b"x" * 10)
    cache.store(A, tid(3), None, b"x" * 10_000)
    assert cache.load_before(A, tid(5), tid(4)) is None
    assert cache.used_bytes in (0, cost(10))


def test_an_older_current_revision_never_replaces_a_newer_one() -> None:
    cache = MemoryCache()
    cache.store(A, tid(3), None, b"new")
    cache.store(A, tid(1), None, b"old")
    assert cache.load_before(A, tid(5), tid(4)) == (b"new", tid(3), None)


def test_a_newer_current_revision_replaces_an_older_one() -> None:
    cache = MemoryCache()
    cache.store(A, tid(1), None, b"old, of 17 bytes.")
    cache.store(A, tid(3), None, b"new")
    assert cache.load_before(A, tid(5), tid(4)) == (b"new", tid(3), None)
    assert cache.load_before(A, tid(2), tid(4)) is None  # nobody said when it ended
    assert cache.used_bytes == cost(3)


def test_an_object_that_is_written_all_the_time_does_not_fill_the_cache_with_its_past() -> None:
    cache = MemoryCache()
    cache.store(B, tid(1), None, b"data")
    last = 5 * limits.ENDED_REVISIONS
    for number in range(1, last + 1):
        cache.invalidate(tid(number), [A])
        cache.store(A, tid(number), None, b"%d" % number)
    assert len(cache) == limits.ENDED_REVISIONS + 2
    oldest = last - limits.ENDED_REVISIONS
    for number in range(oldest, last + 1):
        found = cache.load_before(A, tid(number + 1), tid(last))
        assert found is not None
        assert found[0] == b"%d" % number
    assert cache.load_before(A, tid(oldest), tid(last)) is None
    assert cache.load_before(B, tid(2), tid(last)) is not None
    assert cache.used_bytes == cost(4) + sum(cost(len(b"%d" % n)) for n in range(oldest, last + 1))


def test_before_means_before() -> None:
    cache = MemoryCache()
    cache.store(A, tid(3), None, b"data")
    cache.invalidate(tid(6), [A])
    expected = {1: None, 3: None, 4: tid(3), 6: tid(3), 7: None}
    for before, start in expected.items():
        found = cache.load_before(A, tid(before), tid(9))
        assert (found and found[1]) == start, before


def test_an_invalidation_that_was_applied_already_changes_nothing() -> None:
    cache = MemoryCache()
    cache.store(A, tid(3), None, b"data")
    cache.invalidate(tid(2), [A, B])
    cache.invalidate(tid(3), [A])
    assert cache.load_before(A, tid(5), tid(4)) == (b"data", tid(3), None)


def test_what_is_stored_together_and_forgotten_again_and_again_leaves_no_places_behind() -> None:
    cache = MemoryCache(BIG)
    for _ in range(1000):
        cache.store_many([(oid, (b"data", tid(1), None)) for oid in OIDS])
        cache.forget(OIDS)
    assert len(cache) == 0
    assert len(cache._queue) < 2 * 1000


def test_a_cache_of_nothing() -> None:
    cache = MemoryCache(0)
    cache.store(A, tid(1), None, b"")
    cache.invalidate(tid(2), [A])
    cache.forget([A])
    cache.started_over(tid(3))
    assert cache.load_before(A, tid(2), NO_TID) is None
    assert cache.used_bytes == len(cache) == 0


def test_many_threads() -> None:
    """The sum stays right, and the bound is kept, whoever does what at the same time."""
    cache = MemoryCache(20 * cost(100))
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(400):
                oid = OIDS[(number * 7 + seed) % len(OIDS)]
                start = tid(number + 1)
                cache.store(oid, start, None, b"x" * (number % 100))
                cache.invalidate(tid(number + 2), [oid])
                cache.load_before(oid, start, MAX_TID)
                cache.forget([oid])
                assert 0 <= cache.used_bytes <= 20 * cost(100)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert problems == []
    cache.clear()
    assert cache.used_bytes == 0


@pytest.mark.parametrize("size", [-1, 0])
def test_a_size_that_holds_nothing(size: int) -> None:
    cache = MemoryCache(size)
    cache.store(A, tid(1), None, b"data")
    assert len(cache) == 0
