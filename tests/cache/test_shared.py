"""The shared object cache, scene by scene: several processes, in the order that hurts.

Processes that can be simulated are: each has a cache and a view of its own. Those that are stopped, killed or
forked are real.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from tests.cache.sharing import KEY, ROOT, SIZE_BYTES, Other, flush, oid, tid
from tests.client.scenes import Held, Task
from tests.peers import die_with_parent
from tests.peers import environment as variables
from zeoid import limits
from zeoid.cache import environment, shared
from zeoid.cache.environment import Environment
from zeoid.cache.shared import SharedCache
from zeoid.client.view import View
from zeoid.model import NO_TID, Revision, tid_after

A, B, C, D = map(oid, range(1, 5))
T1, T2, T3, T5, T7, T9, T10, T11 = map(tid, (1, 2, 3, 5, 7, 9, 10, 11))
#: Deadlines of these tests; what is prompt comes long before that.
SHORT_S = 0.2
PROMPT_S = 5.0

Join = Callable[..., View]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long, and flushers have their turns when the test says so."""
    monkeypatch.setattr(limits, "SHARED_CACHE_LOCK_S", SHORT_S)
    monkeypatch.setattr(limits, "SHARED_CACHE_OPEN_S", SHORT_S)
    monkeypatch.setattr(limits, "SHARED_CACHE_PUT_S", SHORT_S / 10)
    monkeypatch.setattr(SharedCache, "_start_flusher", lambda _: None)


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Another simulated process, which has connected when the server was at *told*."""
    caches: list[SharedCache] = []

    def join(told: bytes | None = None) -> View:
        caches.append(SharedCache(tmp_path, KEY, SIZE_BYTES))
        view = View(caches[-1])
        known, _ = view.known()
        if told is not None:
            assert known in (NO_TID, told)
            view.begin(told)
        return view

    yield join
    for cache in caches:
        cache.close()
    assert not environment._all


def cache(view: View) -> SharedCache:
    assert isinstance(view.cache, SharedCache)
    return view.cache


def here(view: View) -> Environment:
    joined = cache(view)._here
    assert joined is not None
    return joined[0]


def load(view: View, oid: bytes, start: bytes, end: bytes | None = None, data: bytes = b"data") -> None:
    view.loaded((oid, view.mark, oid), (data, start, end))


def put(view: View) -> None:
    """Have the flusher's turn."""
    flush(cache(view))
    assert cache(view)._waiting.used_bytes == 0


def now(view: View, oid: bytes) -> Revision | None:
    return view.lookup(oid, tid_after(view.last_tid()))


# What one knows all of them know ----------------------------------------------------------------------


def test_what_one_has_loaded_another_finds(join: Join) -> None:
    one, two = join(T9), join(T9)
    load(one, A, T3)
    load(one, B, T1, T5, b"past")
    assert now(two, A) is now(two, B) is None
    put(one)
    for view in (one, two, join(T9)):
        assert now(view, A) == view.lookup(A, T5) == (b"data", T3, None)
        assert view.lookup(A, T3) is None
        assert view.lookup(B, T5) == (b"past", T1, T5)
        assert now(view, B) is view.lookup(B, T1) is None


def test_a_process_that_starts_knows_what_the_others_were_told(join: Join) -> None:
    one = join(T5)
    load(one, A, T3)
    put(one)
    one.invalidate(T9, [B])
    two = join()
    assert two.known() == (T9, B)
    two.begin(T9)
    assert now(two, A) == (b"data", T3, None)


@pytest.mark.parametrize(
    "learns", [lambda view: view.catch_up(T5, T9, [A, B]), lambda view: view.learned(T9, [A], None)]
)
def test_there_is_no_witness_of_what_was_missed(join: Join, learns: Callable[[View], None]) -> None:
    """One of these objects was written before: whoever looks for it in the last transaction finds that the
    database was restored.
    """
    one = join(T5)
    learns(one)
    assert join().known() == (T9, None)


def test_an_object_that_is_larger_than_the_cache(join: Join) -> None:
    one, two = join(T5), join(T5)
    load(one, B, T1)
    for size_bytes in (SIZE_BYTES // limits.SHARED_CACHE_PARTS + 1, 2 * SIZE_BYTES):
        load(one, A, T3, None, b"x" * size_bytes)
        load(one, A, T1, T2, b"x" * size_bytes)
        one.finished(tid_after(one.last_tid()), {A: b"x" * size_bytes}, one.mark, None)
    put(one)
    assert now(one, A) is now(two, A) is None
    assert now(two, B) == (b"data", T1, None)
    largest = b"x" * (SIZE_BYTES // limits.SHARED_CACHE_PARTS)
    load(one, A, one.last_tid(), None, largest)
    put(one)
    assert now(join(one.last_tid()), A) == (largest, one.last_tid(), None)


# Races, as they are known of other caches -------------------------------------------------------------


@pytest.mark.parametrize("order", ["load first", "invalidation first"])
@pytest.mark.parametrize("when", ["flushed between", "flushed later"])
def test_a_load_and_an_invalidation_of_the_same_object(join: Join, order: str, when: str) -> None:
    one, two = join(T5), join(T5)
    asked = (A, one.mark, T5)
    steps = [lambda: one.loaded(asked, (b"data", T3, None)), lambda: one.invalidate(T9, [A])]
    for step in steps if order == "load first" else steps[::-1]:
        step()
        if when == "flushed between":
            flush(cache(one))
    put(one)
    assert now(one, A) is None
    assert now(two, A) == two.lookup(A, T5) == (b"data", T3, T9)
    two.invalidate(T9, [A])
    for view in (one, two):
        assert now(view, A) is None
        assert view.lookup(A, T9) == (b"data", T3, T9)


def test_the_cache_is_told_before_the_database_and_the_last_tid_comes_last(join: Join) -> None:
    one, two = join(T5), join(T5)
    load(one, A, T3)
    put(one)
    seen: list[Any] = []

    class Listener:
        def invalidate(self, tid: bytes, oids: Any) -> None:
            # Another process may see it now; it answers both what was before and nothing for what is.
            seen.append((here(two).records.look().applied, two.lookup(A, T9), one._last))

    one.listener = Listener()  # type: ignore[assignment]
    one.invalidate(T9, [A])
    assert seen == [(T9, (b"data", T3, T9), T5)]
    assert now(one, A) is None


@pytest.mark.parametrize("own", [T9, T10])
def test_an_own_commit_and_the_one_of_another(join: Join, own: bytes) -> None:
    one, two = join(T5), join(T5)
    load(one, A, T3)
    put(one)
    mark = one.mark
    for number in (T9, T10):
        if number == own:
            one.finished(number, {A: b"own"}, mark, None)
        else:
            one.invalidate(number, [A])
    put(one)
    assert now(one, A) == ((b"own", T10, None) if own == T10 else None)
    assert one.lookup(A, T10) == ((b"own", T9, T10) if own == T9 else None)
    assert two.lookup(A, T9) == (b"data", T3, T9)
    for number in (T9, T10):
        two.invalidate(number, [A])
        assert two.lookup(A, tid_after(number)) == (
            (b"own", T10, None) if own == number == T10 else (b"own", T9, T10) if own == number else None
        )


def test_what_comes_between_registration_and_verification_is_applied_once(join: Join) -> None:
    one = join(T5)
    load(one, A, T3)
    load(one, B, T3)
    put(one)
    two = View(SharedCache(here(one).path.parent, KEY, SIZE_BYTES))
    known, _ = two.known()  # and is registered at T9; T10 is on its way
    one.catch_up(T5, T9, [B])
    one.invalidate(T10, [A])
    epoch = here(one).records.look().epoch
    two.catch_up(known, T9, [B])
    assert now(two, B) is None
    assert now(two, A) == (b"data", T3, T10)
    two.invalidate(T10, [A])
    assert now(two, A) is now(two, B) is None
    assert two.lookup(A, T10) == (b"data", T3, T10)
    assert here(one).records.look().epoch == epoch
    cache(two).close()


def test_what_was_missed_gets_no_end_that_was_made_up(join: Join) -> None:
    """A was written by T7, B by T9, and nobody says which was which."""
    one, two = join(T5), join(T5)
    load(one, A, T3)
    put(one)
    load(one, B, T3)  # this waits
    one.catch_up(T5, T9, [A, B])
    put(one)
    for view in (one, two):
        for before in (T5, T7, tid(8), T9, T10):
            assert view.lookup(A, before) is view.lookup(B, before) is None
    load(two, A, T3)  # it is still at T5, and right
    put_some = cache(two).flush()
    assert not put_some
    assert now(one, A) is None


@pytest.mark.parametrize("first", ["who verifies", "who connects"])
def test_one_verifies_while_another_one_connects_and_applies_more(join: Join, first: str) -> None:
    """A is overwritten by T7, which only verification tells of; B by T10."""
    one = join(T5)
    for each in (A, B, C):
        load(one, each, T3)
    put(one)
    cache(one).close()
    verifying = View(SharedCache(here_dir := cache(one)._cache_dir, KEY, SIZE_BYTES))
    known, _ = verifying.known()
    assert known == T5
    connecting = View(SharedCache(here_dir, KEY, SIZE_BYTES))
    assert connecting.known()[0] == T5
    if first == "who verifies":
        verifying.catch_up(known, T9, [A])
        assert connecting.known()[0] == T9
        connecting.begin(T9)
        connecting.invalidate(T10, [B])
    else:  # it connects at T9, with what it knew before
        connecting.catch_up(T5, T9, [A])
        connecting.invalidate(T10, [B])
        verifying.catch_up(known, T9, [A])
    for view in (verifying, connecting):
        assert now(view, A) is None
        assert now(view, C) == (b"data", T3, None)
    assert now(verifying, B) == (b"data", T3, T10)
    assert now(connecting, B) is None
    verifying.invalidate(T10, [B])
    assert now(verifying, A) is now(verifying, B) is None
    cache(verifying).close()
    cache(connecting).close()


def test_another_one_is_faster(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process waits for the lock the cache is told of more than it has to tell."""
    one, two = join(T5), join(T5)
    load(one, A, T3)
    put(one)
    writing = Environment.writing

    def waiting(*args: Any) -> Any:
        monkeypatch.undo()
        for number, written in ((T7, C), (T9, B), (T10, A)):
            two.invalidate(number, [written])
        load(two, A, T10, None, b"new")
        put(two)
        return writing(*args)

    monkeypatch.setattr(Environment, "writing", waiting)
    one.invalidate(T7, [C])
    assert here(one).records.look().applied == T10
    assert now(one, A) == (b"data", T3, T10)
    assert now(two, A) == (b"new", T10, None)


def test_who_connects_without_knowing_what_was_missed_takes_nothing_for_current(join: Join) -> None:
    one = join(T5)
    load(one, A, T3)
    put(one)
    two = View(SharedCache(cache(one)._cache_dir, KEY, SIZE_BYTES))
    assert two.known() == (T5, None)
    two.start_over(T9)
    assert now(two, A) is None
    assert now(one, A) == (b"data", T3, None)  # who is behind may go on with it
    load(one, B, T3)
    assert not cache(one).flush()
    one.invalidate(T7, [A])
    one.invalidate(T9, [C])
    assert now(one, A) is now(two, B) is None
    put(one)
    assert now(two, B) == (b"data", T3, None)
    cache(two).close()


def test_processes_at_different_tids(join: Join) -> None:
    ahead, behind = join(T5), join(T5)
    load(ahead, A, T3, None, b"old")
    put(ahead)
    ahead.invalidate(T7, [A])
    load(ahead, A, T7, None, b"new")
    ahead.invalidate(T9, [B])
    put(ahead)
    assert now(ahead, A) == (b"new", T7, None)
    assert now(behind, A) == (b"old", T3, T7)
    assert behind.lookup(A, T9) is None  # that is the future
    # What it loads now is current for it, and maybe for nobody else.
    load(behind, B, T3)
    load(behind, C, T3)
    assert not cache(behind).flush()
    assert now(behind, B) == now(behind, C) == (b"data", T3, None)
    assert now(ahead, B) is now(ahead, C) is None
    behind.invalidate(T7, [A])
    assert not cache(behind).flush()
    behind.invalidate(T9, [B])
    put(behind)
    assert now(ahead, C) == (b"data", T3, None)
    assert now(ahead, B) is None
    assert ahead.lookup(B, T9) == (b"data", T3, T9)


def test_a_put_that_failed_between_two_invalidations(join: Join) -> None:
    one, two = join(T5), join(T5)
    one.invalidate(T7, [B])
    load(one, A, T3)
    with here(two)._write_lock(1), pytest.raises(TimeoutError):
        cache(one).flush()
    one.invalidate(T9, [A])
    put(one)
    assert now(one, A) is None
    assert one.lookup(A, T9) == two.lookup(A, T5) == (b"data", T3, T9)
    two.invalidate(T7, [B])
    two.invalidate(T9, [A])
    assert now(two, A) is None


def test_another_history_is_another_environment(join: Join) -> None:
    one, two = join(T9), join(T9)
    load(one, A, T7)
    put(one)
    one.restored(T5)
    assert now(one, A) is one.lookup(A, T9) is None
    load(one, A, T3, None, b"other")
    put(one)
    assert now(two, A) == (b"data", T7, None)
    assert now(join(T5), A) == (b"other", T3, None)


# Leaving an environment -------------------------------------------------------------------------------


def test_nobody_meets_an_environment_that_is_behind_him(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is at T9 and joins one at T5; its threads load all the time."""
    one = join(T9)
    here_one = here(one)
    environment.set_aside(here_one)
    two = join(T5)
    load(two, A, T3)
    put(two)
    seen: list[Any] = []
    look = type(here_one.records).look

    def looking(records: Any) -> Any:
        seen.append(now(one, A))
        state = look(records)
        seen.append(now(one, A))
        return state

    monkeypatch.setattr(type(here_one.records), "look", looking)
    cache(one)._leave(here_one, "the test says so")
    monkeypatch.undo()
    assert here(one) is here(two)
    assert set(seen) == {None}
    assert now(one, A) is None
    assert now(two, A) == (b"data", T3, None)


def test_an_epoch_means_nothing_in_another_environment(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is about to look into the old environment meanwhile looks with its epoch there."""
    one, two = join(T5), join(T5)
    for epoch in (T7, T9):
        load(one, A, T3)
        put(one)
        one.start_over(epoch)
    old = here(one)
    seen: list[Any] = []
    number = shared._number

    def leaving(*args: Any) -> int:
        if not seen:
            seen.append("left")
            cache(one)._leave(old, "the test says so")
        return number(*args)

    monkeypatch.setattr(shared, "_number", leaving)
    assert now(one, A) is None
    assert seen
    assert here(one) is not old
    assert here(two) is old


def test_who_leaves_is_not_taken_for_one_that_was_left(join: Join, tmp_path: Path) -> None:
    """Files that are removed leave their numbers to new ones."""
    one = join(T5)
    paths = set()
    for _ in range(limits.SHARED_CACHE_TRIES - 1):
        left = here(one)
        paths.add(left.identity)
        cache(one)._leave(left, "the test says so")
        assert left.identity != here(one).identity
        assert now(join(T5), A) is None
        load(one, A, T3)
        put(one)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_environment_stays_open_for_who_is_writing(
    join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a flusher may be that met a slow disk, when the database turns out to be restored."""
    one = join(T5)
    load(one, A, T3)
    held, old = Held(), here(one)
    put_current = type(old.records).put_current

    def putting(*args: Any) -> None:
        held.stop_here()
        put_current(*args)

    monkeypatch.setattr(type(old.records), "put_current", putting)
    flusher = Task(cache(one).flush)
    held.wait_for_entry()
    one.restored(T3)
    assert old._is_open
    assert environment.is_used(here(one).path)
    held.let_go()
    assert flusher.outcome(PROMPT_S) in (True, False)
    old.close()


def test_a_flusher_that_finds_its_environment_left(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not lock, nor unlock, a file of another purpose that has got the number of its own one."""
    one = join(T5)
    old = here(one)
    cache(one)._leave(old, "the test says so")
    locked: list[Any] = []
    monkeypatch.setattr(environment, "lock", lambda *args, **_: locked.append(args) or True)
    with pytest.raises(lmdb.Error, match="closed"), old.writing(1):
        raise AssertionError
    monkeypatch.undo()
    assert locked == []
    assert old._thread_lock.acquire(blocking=False)
    old._thread_lock.release()


def test_readers_that_do_not_end_keep_their_turns(join: Join) -> None:
    one = join(T5)
    records = here(one).records
    for _ in range(3):
        with records._reading(), pytest.raises(TimeoutError):
            records.end_reading(0.01)
    assert len(records._turns) == limits.SHARED_CACHE_READS_AT_ONCE


def test_two_storages_of_one_process(join: Join) -> None:
    one, two = join(T5), join(T5)
    assert here(one) is here(two)
    load(one, A, T3)
    put(one)
    cache(one).close()
    cache(one).close()
    assert now(one, A) is None
    assert now(two, A) == (b"data", T3, None)
    cache(two)._leave(here(two), "the test says so")
    three = join(T5)
    assert here(three) is here(two)
    assert now(three, A) is None


def test_one_of_two_storages_of_a_process_leaves(join: Join) -> None:
    one, two = join(T5), join(T5)
    load(one, A, T3)
    put(one)
    old = here(one)
    cache(one)._leave(old, "the test says so")
    assert here(one) is not old is here(two)
    assert now(two, A) == (b"data", T3, None)
    one.invalidate(T9, [A])
    two.invalidate(T9, [A])
    assert now(one, A) is now(two, A) is None
    assert two.lookup(A, T9) == (b"data", T3, T9)


# Room -------------------------------------------------------------------------------------------------


def test_what_is_told_makes_room_as_well(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    """What ends goes from the old generation to the young one, which must not grow without bounds."""
    one = join(T5)
    records = here(one).records
    most_bytes = SIZE_BYTES * limits.SHARED_CACHE_GENERATION_PERCENT // 100
    for generation in (0, 1):
        with here(one).writing(1) as (_, state):
            state.young = generation
        for number in range(80):
            load(one, oid(100 * generation + number), T3, None, b"x" * 3000)
        put(one)
    for number in range(80):
        one.invalidate(tid(100 + number), [oid(number)])
        with records._reading() as txn:
            for generation in (0, 1):
                assert records._taken_bytes(txn, generation) < most_bytes + SIZE_BYTES // 20, number
        assert now(one, oid(number)) is None
    assert records.look().evicted > 0
    assert cache(one)._here == (here(one), 1)
    assert caplog.records == []


def test_what_was_used_is_kept_little_by_little(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    one = join(T5)
    for number in range(100):
        load(one, oid(number), T3, None, b"x" * 3000)
    put(one)
    records = here(one).records
    with here(one).writing(1) as (_, state):
        state.young = 1 - state.young
    for number in range(100):
        assert now(one, oid(number)) is not None
    assert len(records.used) == 100
    assert cache(one).flush()
    assert 90 < len(records.used) < 100
    put(one)
    assert not records.used
    with records._reading() as txn:
        entries = [txn.stat(database)["entries"] for database in records._current]
    assert sorted(entries) == [0, 100]
    assert caplog.records == []


def test_a_commit_that_is_too_large_for_the_room_there_is(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    """The processes stay together, whatever of it can be kept."""
    one, two = join(T5), join(T5)
    for number in range(80):
        load(one, oid(number), T3, None, b"x" * 3500)
        if number % 10 == 0:
            put(one)
    put(one)
    joined = here(one)
    one.invalidate(T9, [oid(number) for number in range(100_000)])
    two.invalidate(T9, [oid(number) for number in range(100_000)])
    assert here(one) is here(two) is joined
    for number in range(80):
        assert now(one, oid(number)) is now(two, oid(number)) is None
        assert two.lookup(oid(number), T9) in ((b"x" * 3500, T3, T9), None)
    load(one, A, T9)
    put(one)
    assert now(two, A) == (b"data", T9, None)
    assert caplog.records == []


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_there_is_no_room_for_what_is_told(
    join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    one, two = join(T5), join(T5)
    load(one, A, T3)
    load(one, B, T3)
    put(one)
    joined, left = here(one), [failures]
    for name in ("end", "write_state")[: 1 + (failures == 3)]:
        method = getattr(type(joined.records), name)

        def failing(*args: Any, method: Any = method) -> None:
            if left[0] and args[2].applied != T5:
                left[0] -= 1
                raise lmdb.MapFullError("full")
            method(*args)

        def ending(*args: Any, method: Any = method) -> None:
            if left[0]:
                left[0] -= 1
                raise lmdb.MapFullError("full")
            method(*args)

        monkeypatch.setattr(type(joined.records), name, ending if name == "end" else failing)
    one.invalidate(T9, [A])
    monkeypatch.undo()
    assert (here(one) is joined) == (failures < 3)
    assert len(caplog.records) == (failures == 3)
    assert here(one).records.look().applied == T9
    assert now(one, A) is None
    if failures == 2:
        assert now(one, B) is None
    two.invalidate(T9, [A])
    assert now(two, A) is None


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_there_is_no_room_for_what_waits(
    join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    one = join(T5)
    load(one, A, T3)
    joined, left = here(one), [failures]
    put_current = type(joined.records).put_current

    def putting(*args: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise lmdb.MapFullError("full")
        put_current(*args)

    monkeypatch.setattr(type(joined.records), "put_current", putting)
    flush(cache(one))
    put(one)
    assert (here(one) is joined) == (failures < 3)
    assert len(caplog.records) == (failures == 3)
    assert now(one, A) == now(join(T5), A) == (b"data", T3, None)


def test_a_cache_that_goes_well_for_long_is_tried_as_often_again(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = join(T5)
    for _ in range(3 * limits.SHARED_CACHE_TRIES):
        cache(one)._joined_s -= limits.SHARED_CACHE_TRIES_S
        cache(one)._leave(here(one), "the test says so")
    for _ in range(limits.SHARED_CACHE_TRIES):
        cache(one)._leave(here(one), "the test says so")
    assert cache(one)._here is None


# Forks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a look", "a flush", "an invalidation"])
def test_a_fork_while_other_threads_are_at_it(
    join: Join, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """They wait for it, and go on in the same environment."""
    one = join(T5)
    load(one, A, T3)
    old = here(one)
    monkeypatch.setattr(limits, "SHARED_CACHE_LOCK_S", PROMPT_S)
    monkeypatch.setattr(limits, "SHARED_CACHE_PUT_S", PROMPT_S)
    with environment._registry_lock:
        old.pause()
        assert now(one, B) is None
        does = {
            "a look": cache(one).applied,
            "a flush": cache(one).flush,
            "an invalidation": lambda: one.invalidate(T9, [B]),
        }
        task = Task(does[what])
        assert task.is_held_up()
        old.go_on()
        task.result(PROMPT_S)
    assert here(one) is old
    assert caplog.records == []
    put(one)
    assert now(join(), A) is None
    assert now(one, A) == (b"data", T3, None)


def test_an_environment_that_cannot_be_opened_after_a_fork(
    join: Join, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = join(T5)
    old = here(one)
    load(one, A, T3)
    put(one)

    def fail(*_: Any) -> None:
        raise lmdb.Error("no")

    old.pause()
    with monkeypatch.context() as patch:
        patch.setattr(environment, "_open_lmdb", fail)
        old.go_on()
    assert now(one, A) is None
    one.invalidate(T9, [B])
    assert here(one) is not old
    assert here(one).records.look().applied == T9


def test_forks_while_threads_read_and_write(tmp_path: Path) -> None:
    process = subprocess.run(
        [*die_with_parent(), sys.executable, "-m", "tests.cache.forking", str(tmp_path)],
        cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "all is well\n"


# Real processes that are killed or stopped -------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    with Other(tmp_path) as other:
        yield other


def fill(view: View, count: int, start: bytes = T3) -> None:
    for number in range(count):
        load(view, oid(number), start, None, b"%d" % number * 100)
    put(view)


def is_right(view: View, count: int, start: bytes, changed: set[int]) -> bool:
    """Whether all that is found of `fill` is right; those that changed must not be found as current."""
    for number in range(count):
        found = now(view, oid(number))
        if found is not None and (number in changed or found != (b"%d" % number * 100, start, None)):
            return False
    return True


KILLS = [
    "stand_still_in('state', True)",
    "stand_still_in('state', False)",
    "stand_still_in('put_past', True)",
    "stand_still_in('put_past', False)",
    "stand_still_in('write_state', True)",
    "stand_still_in('write_state', False)",
    "die_beyond(3 * 4096)",
    "die_beyond(20 * 4096)",
]


@pytest.mark.parametrize("how", KILLS)
def test_a_process_is_killed_in_a_transaction_that_writes(
    join: Join, other: Other, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that applies T9, which wrote the first ten objects. The others go on, with that and everything."""
    one = join(T5)
    fill(one, 200)
    assert other.ask("(cache.applied()[0], view.begin(tid(5)))") == (T5, None)
    other.ask(how)
    other.tell("view.invalidate(tid(9), map(oid, range(10)))")
    if how.startswith("die"):
        assert other.wait_for_death() == -signal.SIGXFSZ
    else:
        assert other.hear() == "here"
        other.kill()
    applied = here(one).records.look().applied
    assert applied == T5
    assert is_right(one, 200, T3, set())
    one.invalidate(T9, [oid(number) for number in range(10)])
    assert is_right(one, 200, T3, set(range(10)))
    assert now(one, oid(10)) is not None
    assert one.lookup(oid(0), T9) == (b"0" * 100, T3, T9)
    for number in range(10):
        load(one, oid(number), T9, None, b"new")
    put(one)
    assert here(one).records.damaged() == 0
    assert now(one, oid(0)) == (b"new", T9, None)
    assert caplog.records == []


@pytest.mark.parametrize("how", ["''", "'with a transaction'"])
def test_a_process_is_stopped_that_has_the_write_lock(
    join: Join, other: Other, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = join(T5), join(T5)
    load(one, A, T3)
    put(one)
    load(one, B, T3)
    assert other.ask("cache.applied()[0]") == T5
    other.tell(f"hold_write_lock(cache, {how})")
    assert other.hear() == "here"
    other.stop()
    began_s = time.monotonic()
    with pytest.raises(TimeoutError):
        cache(one).flush()
    assert now(one, A) == now(one, B) == (b"data", T3, None)
    assert now(join(T5), A) == (b"data", T3, None) or True
    old = here(one)
    one.invalidate(T9, [A])
    assert time.monotonic() - began_s < PROMPT_S
    assert here(one) is not old
    (record,) = caplog.records
    assert "is set aside: others had its lock for too long" in record.getMessage()
    assert now(one, A) is None
    assert now(one, B) == (b"data", T3, None)
    put(one)
    # Whoever needs no lock goes on where it is, and whoever comes joins the new one.
    assert now(two, A) == (b"data", T3, None)
    assert here(join(T9)) is here(one)
    two.invalidate(T9, [A])
    assert here(two) is here(one)
    assert now(two, B) == (b"data", T3, None)
    other.go_on()
    other.kill()


def test_a_process_is_stopped_that_reads(join: Join, other: Other, caplog: pytest.LogCaptureFixture) -> None:
    """No room can be used again, until there is none: then it is left."""
    one = join(T5)
    fill(one, 10)
    assert other.ask("cache.applied()[0]") == T5
    other.tell("hold_snapshot(cache)")
    assert other.hear() == "here"
    other.stop()
    old = here(one)
    number = turn = 0
    while here(one) is old:
        turn += 1
        assert turn < 5000, "it never ran out of room"
        number = (number + 1) % 50
        one.finished(tid(100 + turn), {oid(number): b"x" * 3000}, one.mark, None)
        flush(cache(one))
        found = now(one, oid(number))
        assert found in ((b"x" * 3000, tid(100 + turn), None), None)
    (record,) = caplog.records
    assert "MDB_MAP_FULL" in record.getMessage()
    put(one)


def readers(here: Environment) -> set[int]:
    """The processes that LMDB knows of."""
    _, *lines = here._env.readers().splitlines()
    return {int(line.split()[0]) for line in lines}


def test_a_process_is_killed_that_read(join: Join, other: Other, caplog: pytest.LogCaptureFixture) -> None:
    """What it held is used again."""
    one = join(T5)
    fill(one, 10)
    assert other.ask("cache.applied()[0]") == T5
    other.tell("hold_snapshot(cache)")
    assert other.hear() == "here"
    old = here(one)
    assert other.pid in readers(old)
    other.kill()
    for turn in range(1500):
        one.finished(tid(100 + turn), {oid(turn % 50): b"x" * 3000}, one.mark, None)
        flush(cache(one))
        assert other.pid not in readers(old)
    assert here(one) is old
    assert old.records.look().evicted > 100
    assert caplog.records == []


def test_a_process_is_stopped_that_has_the_lock_of_the_key(
    join: Join, other: Other, caplog: pytest.LogCaptureFixture
) -> None:
    assert other.ask("(cache.applied()[0], view.begin(tid(5)))") == (NO_TID, None)
    other.tell("hold_key_lock(cache_dir)")
    assert other.hear() == "here"
    other.stop()
    began_s = time.monotonic()
    one = join(T5)
    assert time.monotonic() - began_s < PROMPT_S
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "another process holds the lock of the object cache" in record.getMessage()
    assert cache(one)._here is None
    load(one, A, T3)
    assert now(one, A) == (b"data", T3, None)
    one.invalidate(T9, [A])
    assert now(one, A) is None
    assert one.lookup(A, T9) == (b"data", T3, T9)


def test_the_lock_of_the_key_is_held_when_an_environment_is_to_be_left(
    join: Join, other: Other, caplog: pytest.LogCaptureFixture
) -> None:
    one = join(T5)
    load(one, A, T3)
    put(one)
    assert other.ask("cache.applied()[0]") == T5
    other.tell("hold_key_lock(cache_dir)")
    assert other.hear() == "here"
    other.stop()
    with here(one)._write_lock(1), contextlib.suppress(TimeoutError):
        began_s = time.monotonic()
        one.invalidate(T9, [A])
    assert time.monotonic() - began_s < PROMPT_S
    assert cache(one)._here is None
    assert now(one, A) is None
    assert len(caplog.records) == 2
