"""The invalidation log: it tells everything that was written after a tid, or says that it doesn't know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.utils import p64

from zeoid.commit.invalidations import ENTRY_BYTES, InvalidationLog
from zeoid.engines.opening import open_filestorage
from zeoid.model import NO_TID, Store, TransactionInfo, tid_before
from zeoid.ports import Commit, Engine

A, B, C, D = (p64(number) for number in (1, 2, 3, 4))

INFO = TransactionInfo(b"", b"", {})


def tid(number: int) -> bytes:
    return bytes(p64(1000 + number))


def log_of(*written: list[bytes], **bounds: int) -> InvalidationLog:
    """A log that begins after transaction 0 and has seen transactions 1, 2, …"""
    log = InvalidationLog(tid(0), **bounds)
    for number, oids in enumerate(written, 1):
        log.append(tid(number), oids)
    return log


def told(log: InvalidationLog, seen: bytes) -> tuple[bytes, list[bytes]] | None:
    """What a client is told that has seen *seen*, the oids in order."""
    answer = log.since(seen)
    return None if answer is None else (answer[0], sorted(answer[1]))


# What a client that was away is told ----------------------------------------------------------------------


def test_everything_after_a_tid_is_told_once() -> None:
    log = log_of([A, B], [B, C], [A])
    assert told(log, tid(1)) == (tid(3), [A, B, C])


def test_a_client_that_is_up_to_date_has_nothing_to_forget() -> None:
    assert told(log_of([A], [B]), tid(2)) == (tid(2), [])


def test_a_tid_between_two_transactions() -> None:
    log = log_of([A], [B])
    assert told(log, tid_before(tid(2))) == (tid(2), [B])


def test_a_client_at_the_floor_has_seen_all_that_the_log_does_not_know() -> None:
    log = log_of([A], [B])
    assert log.floor == tid(0)
    assert told(log, tid(0)) == (tid(2), [A, B])


def test_a_client_below_the_floor_is_told_that_it_is_not_known() -> None:
    assert told(log_of([A], [B]), tid_before(tid(0))) is None
    assert told(log_of([A]), NO_TID) is None


def test_a_client_at_the_oldest_entry_has_seen_that_entry() -> None:
    assert told(log_of([A], [B], [C]), tid(1)) == (tid(3), [B, C])


def test_a_transaction_that_only_creates_objects_is_logged_like_any_other() -> None:
    """A client that was asked for such an object before it existed must hear of it, too."""
    log = log_of([A], [p64(500), p64(501)])
    assert told(log, tid(1)) == (tid(2), [p64(500), p64(501)])


def test_a_transaction_without_objects_moves_the_last_tid() -> None:
    assert told(log_of([A], []), tid(1)) == (tid(2), [])


def test_transactions_come_in_order() -> None:
    log = log_of([A], [B])
    with pytest.raises(AssertionError):
        log.append(tid(2), [C])
    with pytest.raises(AssertionError):
        log.append(tid(1), [C])


# Bounds ---------------------------------------------------------------------------------------------------


def test_only_so_many_transactions_are_remembered() -> None:
    log = log_of([A], [B], [C], [D], transactions=2)
    assert len(log) == 2
    assert log.floor == tid(2)
    assert told(log, tid(1)) is None
    assert told(log, tid(2)) == (tid(4), [C, D])


def test_only_so_many_oids_are_remembered() -> None:
    log = log_of([A, B], [C], [D, A], size_bytes=3 * 8 + 2 * ENTRY_BYTES)
    assert len(log) == 2
    assert told(log, tid(0)) is None
    assert told(log, tid(1)) == (tid(3), [A, C, D])


def test_a_transaction_larger_than_the_bound_leaves_an_empty_log() -> None:
    log = log_of([A], [A, B, C, D], size_bytes=3 * 8 + ENTRY_BYTES)
    assert len(log) == 0
    assert told(log, tid(1)) is None
    assert told(log, tid(2)) == (tid(2), [])
    log.append(tid(3), [B])
    assert told(log, tid(2)) == (tid(3), [B])


def test_a_log_that_is_to_remember_nothing_knows_only_the_last_tid() -> None:
    log = log_of([A], [B], transactions=0)
    assert told(log, tid(1)) is None
    assert told(log, tid(2)) == (tid(2), [])


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([A, B, C, D]), max_size=3, unique=True), max_size=20),
    st.integers(0, 6),
    st.integers(0, 10 * 8 + 6 * ENTRY_BYTES),
    st.integers(0, 21),
)
def test_what_is_told_is_all_or_nothing(
    written: list[list[bytes]], transactions: int, size_bytes: int, seen: int
) -> None:
    """Against the plainest model: a list of everything that was ever committed."""
    seen = min(seen, len(written))
    log = log_of(*written, transactions=transactions, size_bytes=size_bytes)
    answer = log.since(tid(seen))
    if answer is None:
        forgotten = len(written) - len(log)
        assert seen < forgotten
    else:
        last, changed = answer
        assert last == tid(len(written))
        assert sorted(changed) == sorted({oid for later in written[seen:] for oid in later})
    assert len(log) <= transactions
    assert sum(len(later) * 8 + ENTRY_BYTES for later in written[len(written) - len(log) :]) <= size_bytes
    # No more was forgotten than the bounds made necessary.
    oldest = len(written) - len(log) - 1
    if oldest >= 0:
        longer = written[oldest:]
        assert len(longer) > transactions or (
            sum(len(later) * 8 + ENTRY_BYTES for later in longer) > size_bytes
        )


# At the start ---------------------------------------------------------------------------------------------


def test_an_empty_database_is_known_from_its_beginning() -> None:
    log = InvalidationLog(NO_TID)
    assert told(log, NO_TID) == (NO_TID, [])
    log.append(tid(1), [A])
    assert told(log, NO_TID) == (tid(1), [A])


def test_what_the_storage_remembers_is_taken_over() -> None:
    log = InvalidationLog(tid(3), [(tid(1), [A]), (tid(2), [B]), (tid(3), [C])])
    assert told(log, tid(3)) == (tid(3), [])
    assert told(log, tid(2)) == (tid(3), [C])
    # The oldest one may have others before it, but a client at its tid has seen them.
    assert told(log, tid(1)) == (tid(3), [B, C])
    assert told(log, tid_before(tid(1))) is None


def test_a_single_transaction_that_the_storage_remembers() -> None:
    log = InvalidationLog(tid(1), [(tid(1), [A])])
    assert told(log, tid(1)) == (tid(1), [])
    assert told(log, tid(0)) is None


def test_what_the_storage_remembers_is_not_trusted_when_its_end_is_missing() -> None:
    log = InvalidationLog(tid(3), [(tid(1), [A]), (tid(2), [B])])
    assert told(log, tid(2)) is None
    assert told(log, tid(3)) == (tid(3), [])


def test_a_storage_that_remembers_nothing() -> None:
    log = InvalidationLog(tid(3), [])
    assert told(log, tid(2)) is None
    assert told(log, tid(3)) == (tid(3), [])


def test_the_bounds_hold_for_what_the_storage_remembers() -> None:
    log = InvalidationLog(tid(4), [(tid(n), [A]) for n in range(1, 5)], transactions=2)
    assert len(log) == 2
    assert told(log, tid(1)) is None
    assert told(log, tid(2)) == (tid(4), [A])


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_filestorage(tmp_path / "Data.fs")
    yield engine
    engine.close()


def commit(engine: Engine, number: int, *oids: bytes) -> None:
    stores = [Store(oid, NO_TID, b"data %d" % number) for oid in oids]
    engine.commit([Commit(tid(number), b"", engine.prepare(None, INFO, stores))])


def test_a_log_filled_from_a_data_file(engine: Engine) -> None:
    for number, oids in enumerate([[A, B], [C], [D], [p64(7)]], 1):
        commit(engine, number, *oids)
    log = InvalidationLog(engine.last_tid(), engine.last_invalidations(3))
    assert told(log, tid(4)) == (tid(4), [])
    assert told(log, tid(2)) == (tid(4), [D, p64(7)])
    assert told(log, tid(1)) is None


def test_a_log_filled_from_an_empty_data_file(engine: Engine) -> None:
    log = InvalidationLog(engine.last_tid(), engine.last_invalidations(1000))
    assert told(log, NO_TID) == (NO_TID, [])


def test_more_is_asked_for_than_a_data_file_has(engine: Engine) -> None:
    commit(engine, 1, A)
    commit(engine, 2, B)
    log = InvalidationLog(engine.last_tid(), engine.last_invalidations(1000))
    assert told(log, tid(1)) == (tid(2), [B])


# What may have changed ------------------------------------------------------------------------------------


def test_an_object_may_have_changed_after_a_tid() -> None:
    log = log_of([A], [B], [A, C])
    assert log.may_have_changed(A, tid(2))
    assert log.may_have_changed(B, tid(1))
    assert not log.may_have_changed(B, tid(2))
    assert not log.may_have_changed(A, tid(3))
    assert not log.may_have_changed(D, tid(0))


def test_anything_may_have_changed_before_what_the_log_knows() -> None:
    log = log_of([A], [B], [C], transactions=2)
    assert log.may_have_changed(D, tid(0))
    assert not log.may_have_changed(D, tid(1))


def test_a_log_that_forgot_begins_anew() -> None:
    log = log_of([A], [B])
    log.forget(tid(5))
    assert told(log, tid(2)) is None
    assert told(log, tid(5)) == (tid(5), [])
    assert len(log) == 0
    log.append(tid(6), [C])
    assert told(log, tid(5)) == (tid(6), [C])
