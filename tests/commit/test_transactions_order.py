"""Transactions of several owners: their order, their tids, their deadlines, and how many there may be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from ZODB.POSException import StorageError, StorageTransactionError

from tests.commit.desk import (
    INFO,
    NOON,
    TIMEOUT_S,
    VOTE_WAIT_S,
    A,
    Desk,
    brief,
    finishing,
    prepared,
    preparing,
    problems,
    resolving,
    storing,
    waiting,
)
from zeoid import limits
from zeoid.commit.tids import next_tid
from zeoid.commit.transactions import (
    Abandon,
    Expire,
    Prepare,
    Publish,
    State,
    Transactions,
)
from zeoid.model import (
    NO_TID,
    CheckCurrent,
    Delete,
    Operation,
    Restore,
    Store,
    TransactionInfo,
    Undo,
    tid_before,
)

# Order ----------------------------------------------------------------------------------------------------


def test_votes_are_taken_in_order() -> None:
    desk = Desk()
    owners = ["first", "second", "third", "fourth"]
    for owner in owners:
        desk.begin(owner)
    for owner in owners:
        desk.vote(owner)
    assert desk.machine.waiting == 3
    for owner, following in pairwise(owners):
        transaction = desk.get(owner)
        desk.prepared(transaction)
        desk.finish(owner)
        assert brief(desk.finished(transaction)) == [
            f"Publish {owner}", f"Reply {owner}", f"Prepare {following}",
        ]  # fmt: skip


def test_the_order_of_begins_does_not_matter() -> None:
    desk = Desk()
    desk.begin("slow")
    desk.begin("quick")
    assert brief(desk.vote("quick")) == ["Prepare quick"]
    assert desk.vote("slow") == []


def test_publication_comes_before_the_reply_that_reveals_the_tid() -> None:
    desk = Desk()
    transaction = finishing(desk)
    assert brief(desk.finished(transaction)) == ["Publish us", "Reply us"]


def test_the_engine_forgets_one_before_it_prepares_the_next() -> None:
    desk = Desk()
    waiting(desk)
    assert brief(desk.gone("other")) == ["Abandon other", "Prepare us"]


# Tids -----------------------------------------------------------------------------------------------------


def test_a_tid_is_given_when_the_lock_is() -> None:
    desk = Desk()
    transaction = storing(desk)
    assert transaction.tid == b""
    desk.vote("us")
    assert transaction.tid == next_tid(NO_TID, NOON)


def test_tids_increase_even_if_the_clock_goes_back() -> None:
    desk = Desk()
    last = desk.commit("us")
    for seconds in (-3600.0, 0.0, -86400.0, 7200.0):
        desk.now_s += seconds
        tid = desk.commit("us")
        assert tid > last
        last = tid


def test_the_first_tid_is_later_than_what_the_storage_holds() -> None:
    future = next_tid(NO_TID, NOON + 1e6)
    assert Desk(last_tid=future).commit("us") > future


def test_the_tid_of_what_was_not_committed_may_be_given_again() -> None:
    desk = Desk()
    transaction = preparing(desk)
    desk.prepared(transaction)
    desk.abort("us")
    assert desk.commit("us") == transaction.tid


def test_the_tid_of_a_retry_is_made_anew() -> None:
    desk = Desk()
    transaction = resolving(desk)
    first = transaction.tid
    desk.now_s += 1
    desk.store("us")
    desk.vote("us")
    assert transaction.tid > first


def copied(tid: bytes) -> TransactionInfo:
    return TransactionInfo(b"", b"", {}, tid)


def test_a_copied_transaction_keeps_its_tid() -> None:
    desk = Desk()
    tid = next_tid(NO_TID, NOON - 1000)
    transaction = desk.begin("us", info=copied(tid))
    desk.vote("us")
    assert transaction.tid == tid


@pytest.mark.parametrize("age", ["equal", "older"])
def test_a_copied_transaction_that_comes_too_late_fails(age: str) -> None:
    desk = Desk()
    last = desk.commit("us")
    desk.begin("us", info=copied(last if age == "equal" else tid_before(last)))
    actions = desk.vote("us")
    assert brief(actions) == ["Fail us"]
    assert "too old" in str(problems(actions)[0])
    assert desk.machine.active == 0
    assert desk.machine.last_tid == last


def test_whether_a_copy_comes_too_late_shows_when_its_turn_comes() -> None:
    desk = Desk()
    tid = next_tid(NO_TID, NOON - 1000)
    holder = desk.begin("other")
    desk.vote("other")
    desk.begin("us", info=copied(tid))
    assert desk.vote("us") == []
    desk.prepared(holder)
    desk.finish("other")
    assert brief(desk.finished(holder)) == ["Publish other", "Reply other", "Fail us"]


# Deadlines ------------------------------------------------------------------------------------------------


def test_the_expired_makes_room_for_the_next() -> None:
    desk = Desk()
    waiting(desk)
    actions = desk.later(TIMEOUT_S)
    assert brief(actions) == ["Expire other", "Abandon other", "Prepare us"]


def test_who_expired_is_told_in_which_state() -> None:
    desk = Desk()
    transaction = resolving(desk)
    assert desk.later(TIMEOUT_S) == [Expire(transaction, State.RESOLVING)]
    transaction = prepared(desk)
    assert desk.later(TIMEOUT_S) == [Expire(transaction, State.PREPARED), Abandon(transaction)]


def test_who_expired_loses_its_other_transactions_as_well() -> None:
    """Its connection is dropped: the engine must not be put to work for it."""
    desk = Desk()
    waiting(desk)
    desk.begin("other", 2)
    desk.vote("other", 2)
    assert brief(desk.later(TIMEOUT_S)) == ["Expire other", "Fail other", "Abandon other", "Prepare us"]


def test_a_vote_may_wait_longer_than_a_transaction_may_take() -> None:
    desk = Desk()
    waiting(desk)
    desk.finish("other")
    assert desk.later(TIMEOUT_S * 3) == []
    assert brief(desk.later(VOTE_WAIT_S)) == ["Fail us"]


def test_those_who_waited_too_long_are_told_in_their_order() -> None:
    desk = Desk()
    holder = desk.begin("holder")
    desk.vote("holder")
    desk.prepared(holder)
    desk.finish("holder")
    for owner in ("first", "second"):
        desk.begin(owner)
        desk.vote(owner)
        desk.now_s += 10
    assert brief(desk.later(VOTE_WAIT_S - 20)) == ["Fail first"]
    assert brief(desk.later(10)) == ["Fail second"]
    assert desk.finished(holder)[0] == Publish(holder)


def test_when_the_lock_gets_free_at_the_deadline_the_vote_goes_ahead() -> None:
    desk = Desk(vote_wait_s=TIMEOUT_S)
    waiting(desk)
    assert brief(desk.later(TIMEOUT_S)) == ["Expire other", "Abandon other", "Prepare us"]


# Owners ---------------------------------------------------------------------------------------------------


def test_one_owner_may_have_several_transactions() -> None:
    desk = Desk()
    for id in (1, "two", b"three"):
        desk.begin("us", id)
        desk.store("us", id=id)
    assert brief(desk.vote("us", "two")) == ["Prepare us"]
    assert desk.vote("us", 1) == []
    desk.abort("us", b"three")
    assert desk.machine.active == 2


def test_the_same_id_means_another_transaction_to_another_owner() -> None:
    desk = Desk()
    ours, theirs = desk.begin("us"), desk.begin("them")
    desk.abort("them")
    assert desk.get("us") is ours
    assert ours is not theirs


def test_all_transactions_of_a_lost_owner_are_given_up_and_no_others() -> None:
    desk = Desk()
    holder = desk.begin("us", 1)
    desk.vote("us", 1)
    desk.prepared(holder)
    desk.begin("us", 2)
    desk.vote("us", 2)
    desk.begin("them")
    desk.vote("them")
    desk.begin("us", 3)
    assert brief(desk.gone("us")) == ["Fail us", "Abandon us", "Prepare them"]
    assert desk.machine.active == 1


def test_an_owner_is_lost_that_holds_the_lock_and_has_a_broken_transaction_in_the_queue() -> None:
    desk = Desk()
    holder = desk.begin("us", 1)
    desk.vote("us", 1)
    desk.prepared(holder)
    desk.begin("us", 2)
    desk.vote("us", 2)
    desk.store("us", id=2)  # after the vote
    assert brief(desk.gone("us")) == ["Fail us", "Abandon us"]
    assert (desk.machine.active, desk.machine.holder) == (0, None)


def test_the_queue_of_an_owner_is_not_prepared_when_the_owner_is_lost() -> None:
    desk = Desk()
    holder = desk.begin("us", 1)
    desk.vote("us", 1)
    desk.prepared(holder)
    for id in (2, 3):
        desk.begin("us", id)
        desk.vote("us", id)
    assert "Prepare us" not in brief(desk.gone("us"))
    assert desk.machine.holder is None


def test_an_owner_is_lost_while_its_transaction_is_finishing() -> None:
    """Too late: it will be durable, so the others must hear of it."""
    desk = Desk()
    transaction = finishing(desk)
    assert desk.gone("us") == []
    assert brief(desk.finished(transaction)) == ["Publish us", "Reply us"]


# Bounds ---------------------------------------------------------------------------------------------------


def test_an_owner_may_have_only_so_many_transactions() -> None:
    desk = Desk(per_owner=3)
    for id in range(3):
        desk.begin("us", id)
    with pytest.raises(StorageTransactionError, match="more than 3"):
        desk.begin("us", 3)
    desk.begin("them", 3)
    assert desk.machine.active == 4
    desk.abort("us", 0)
    desk.begin("us", 3)


def test_operations_of_unknown_transactions_count_as_transactions() -> None:
    desk = Desk(per_owner=3)
    for id in range(3):
        desk.store("us", id=id)
    with pytest.raises(StorageTransactionError, match="more than 3"):
        desk.store("us", id=3)
    with pytest.raises(StorageTransactionError, match="more than 3"):
        desk.machine.break_("us", 4, StorageError("not understood"))
    assert desk.machine.active == 3


def test_a_transaction_that_grows_too_large_is_broken_and_takes_no_memory() -> None:
    desk = Desk(transaction_bytes=10_000)
    transaction = desk.begin("us")
    for _ in range(20):
        desk.store("us", data=b"x" * 1000)
    assert transaction.operations == []
    (problem,) = problems(desk.vote("us"))
    assert isinstance(problem, StorageError)
    assert "10,000 bytes" in str(problem)


@pytest.mark.parametrize(
    "operation",
    [Store(A, NO_TID, b""), Restore(A, None, None), CheckCurrent(A, NO_TID), Delete(A, NO_TID), Undo(b"")],
    ids=lambda operation: type(operation).__name__,
)
def test_many_operations_without_data_are_too_large_as_well(operation: Operation) -> None:
    desk = Desk(transaction_bytes=100_000)
    transaction = desk.begin("us")
    for _ in range(5_000):
        desk.operate("us", operation)
    assert transaction.operations == []
    assert "larger" in str(problems(desk.vote("us"))[0])


def test_restored_data_counts() -> None:
    desk = Desk(transaction_bytes=10_000)
    desk.begin("us")
    desk.operate("us", Restore(A, b"x" * 20_000, None))
    assert "larger" in str(problems(desk.vote("us"))[0])


def test_data_of_resolved_conflicts_counts() -> None:
    desk = Desk(transaction_bytes=10_000)
    resolving(desk)
    desk.store("us", data=b"x" * 20_000)
    assert "larger" in str(problems(desk.vote("us"))[0])


def test_a_transaction_just_within_the_bound() -> None:
    desk = Desk(transaction_bytes=10_000)
    transaction = desk.begin("us")
    desk.store("us", data=b"x" * 9_500)
    assert desk.vote("us") == [Prepare(transaction)]


def test_the_bounds_are_those_of_the_table_of_limits() -> None:
    machine = Transactions(NO_TID)
    for id in range(limits.TRANSACTIONS_PER_CONNECTION):
        machine.begin("us", id, INFO)
    with pytest.raises(StorageTransactionError):
        machine.begin("us", -1, INFO)
    assert machine.timeout_s == limits.TRANSACTION_TIMEOUT_S
