"""Transactions of several owners: who waits for whom, and how long."""

from __future__ import annotations

from itertools import pairwise

import pytest
from ZODB.POSException import StorageError

from tests.commit.desk import (
    INFO,
    NOON,
    TIMEOUT_S,
    VOTE_WAIT_S,
    A,
    B,
    C,
    Desk,
    brief,
    copied,
    finishing,
    prepared,
    resolving,
    waiting,
)
from zeoid.commit.actions import Abandon, Expire, State
from zeoid.commit.tids import next_tid
from zeoid.model import NO_TID, Delete, Operation, Restore, Store, Undo

TID = next_tid(NO_TID, NOON + 1000)

# Who waits for whom ---------------------------------------------------------------------------------------


def test_votes_on_different_objects_do_not_wait() -> None:
    desk = Desk()
    for owner, oid in (("first", A), ("second", B), ("third", C)):
        assert brief(desk.voted(owner, oid)) == [f"Prepare {owner}"]
    assert desk.machine.waiting == 0


def test_votes_on_one_object_are_taken_in_order() -> None:
    desk = Desk()
    owners = ["first", "second", "third", "fourth"]
    for owner in owners:
        desk.voted(owner, A)
    assert desk.machine.waiting == 3
    for owner, following in pairwise(owners):
        transaction = desk.get(owner)
        desk.prepared(transaction)
        desk.finish(owner)
        assert brief(desk.committed(transaction)) == [
            f"Publish {owner}", f"Reply {owner}", f"Prepare {following}",
        ]  # fmt: skip


def test_the_order_of_begins_does_not_matter() -> None:
    desk = Desk()
    for owner in ("slow", "quick"):
        desk.begin(owner)
        desk.store(owner)
    assert brief(desk.vote("quick")) == ["Prepare quick"]
    assert desk.vote("slow") == []


def test_a_vote_has_all_its_locks_or_waits() -> None:
    """And what it waits with keeps others waiting: nobody overtakes it for ever."""
    desk = Desk()
    desk.hold("first", A)
    assert desk.voted("second", B, A) == []
    assert desk.voted("third", B) == []
    assert brief(desk.abort("first")) == ["Abandon first", "Prepare second"]
    desk.failed(desk.get("second"), StorageError("disk full"))
    assert desk.get("third").state is State.PREPARING


def test_who_writes_the_same_objects_in_another_order_is_no_deadlock() -> None:
    desk = Desk()
    desk.hold("first", A, B)
    assert desk.voted("second", B, A) == []
    assert brief(desk.abort("first")) == ["Abandon first", "Prepare second"]


@pytest.mark.parametrize(
    "operation",
    [Store(A, NO_TID, b"x"), Restore(A, b"x", None), Delete(A, NO_TID)],
    ids=lambda operation: type(operation).__name__,
)
def test_who_writes_an_object_excludes_all_others(operation: Operation) -> None:
    desk = Desk()
    desk.begin("us")
    desk.operate("us", operation)
    assert brief(desk.vote("us")) == ["Prepare us"]
    assert desk.voted("writer", A) == []
    desk.begin("reader")
    desk.check("reader", A)
    assert desk.vote("reader") == []


def test_who_depends_on_an_object_shares_it_with_those_who_do_too() -> None:
    desk = Desk()
    for owner, written in (("first", B), ("second", C)):
        desk.begin(owner)
        desk.check(owner, A)
        desk.store(owner, written)
        assert brief(desk.vote(owner)) == [f"Prepare {owner}"]
    assert desk.voted("writer", A) == []
    for owner in ("first", "second"):
        desk.prepared(desk.get(owner))
    assert brief(desk.abort("first")) == ["Abandon first"]
    assert brief(desk.abort("second")) == ["Abandon second", "Prepare writer"]


def test_who_depends_on_an_object_that_it_also_writes_does_not_share_it() -> None:
    desk = Desk()
    desk.begin("us")
    desk.store("us", A)
    desk.check("us", A)
    assert brief(desk.vote("us")) == ["Prepare us"]
    desk.begin("reader")
    desk.check("reader", A)
    assert desk.vote("reader") == []


def test_a_reader_does_not_overtake_a_writer_that_waits() -> None:
    desk = Desk()
    for owner in ("first", "late"):
        desk.begin(owner)
        desk.check(owner, A)
    assert brief(desk.vote("first")) == ["Prepare first"]
    assert desk.voted("writer", A) == []
    assert desk.vote("late") == []
    desk.prepared(desk.get("first"))
    assert brief(desk.abort("first")) == ["Abandon first", "Prepare writer"]


def test_an_empty_transaction_waits_for_nobody() -> None:
    desk = Desk()
    desk.hold("other", A)
    assert brief(desk.voted("us")) == ["Prepare us"]


@pytest.mark.parametrize("kind", ["undo", "copy"])
def test_what_cannot_be_prepared_beside_others_waits_for_all_and_all_wait_for_it(kind: str) -> None:
    desk = Desk()
    desk.hold("before", A)
    desk.begin("us", info=copied(TID) if kind == "copy" else INFO)
    desk.operate("us", Undo(b"x") if kind == "undo" else Restore(C, b"x", None))
    assert desk.vote("us") == []
    assert desk.voted("after", B) == []
    assert brief(desk.abort("before")) == ["Abandon before", "Prepare us"]
    desk.prepared(desk.get("us"), [C])
    assert brief(desk.abort("us")) == ["Abandon us", "Prepare after"]


def test_to_an_exclusive_engine_goes_one_after_the_other() -> None:
    desk = Desk(exclusive=True)
    assert brief(desk.voted("first", A)) == ["Prepare first"]
    assert desk.voted("second", B) == []
    assert desk.voted("empty") == []
    transaction = desk.get("first")
    desk.prepared(transaction)
    desk.finish("first")
    assert brief(desk.committed(transaction)) == ["Publish first", "Reply first", "Prepare second"]
    assert brief(desk.failed(desk.get("second"), StorageError("disk full"))) == [
        "Fail second", "Prepare empty",
    ]  # fmt: skip


def test_the_engine_forgets_one_before_it_prepares_the_next() -> None:
    desk = Desk()
    waiting(desk)
    assert brief(desk.gone("other")) == ["Abandon other", "Prepare us"]


def test_what_came_after_the_finish_is_too_late() -> None:
    desk = Desk()
    transaction = finishing(desk)
    desk.store("us", B)
    desk.break_("us", StorageError("not understood"))
    assert brief(desk.committed(transaction)) == ["Publish us", "Reply us"]


def test_any_number_of_broken_ones_in_a_row_make_way() -> None:
    """A peer can have very many, so what follows from the first is no recursion."""
    desk = Desk(per_owner=5_000)
    desk.hold("holder", A)
    for id in range(5_000):
        assert desk.voted("hostile", A, id=id) == []
        desk.store("hostile", B, id=id)
    desk.voted("next", A)
    assert brief(desk.abort("holder")) == ["Abandon holder", *["Fail hostile"] * 5_000, "Prepare next"]


# What is reported -----------------------------------------------------------------------------------------


def test_since_when_locks_are_held_is_what_the_oldest_holder_says() -> None:
    desk = Desk()
    desk.begin("idle")
    assert desk.machine.locked_at is None
    for owner, oid in (("first", A), ("second", B)):
        desk.now_s += 10
        desk.hold(owner, oid)
    assert desk.voted("waits", B) == []
    assert desk.machine.locked_at == NOON + 10
    desk.abort("first")
    assert desk.machine.locked_at == NOON + 20
    desk.now_s += 5
    desk.abort("second")
    assert desk.machine.locked_at == NOON + 25
    desk.gone("waits")
    assert desk.machine.locked_at is None


def test_how_many_are_under_way_and_how_many_wait() -> None:
    desk = Desk()
    desk.begin("stores")
    desk.hold("holds", A)
    for owner in ("waits", "too"):
        desk.voted(owner, A)
    assert (desk.machine.active, desk.machine.waiting) == (4, 2)
    assert [transaction.owner for transaction in desk.machine.all()] == ["stores", "holds", "waits", "too"]
    desk.abort("waits")
    assert (desk.machine.active, desk.machine.waiting) == (3, 1)


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


def test_what_the_expired_held_is_still_told() -> None:
    """It is logged when the action is carried out, and the locks are others' by then."""
    desk = Desk()
    transaction = desk.hold("us", A, B)
    assert brief(desk.later(TIMEOUT_S)) == ["Expire us", "Abandon us"]
    assert transaction.claim is not None
    assert transaction.claim.oids == [A, B]


def test_who_expired_loses_its_other_transactions_as_well() -> None:
    """Its connection is dropped: the engine must not be put to work for it."""
    desk = Desk()
    waiting(desk)
    desk.voted("other", A, id=2)
    assert brief(desk.later(TIMEOUT_S)) == ["Expire other", "Fail other", "Abandon other", "Prepare us"]


def test_an_owner_expires_once() -> None:
    desk = Desk()
    for id, oid in ((1, A), (2, B)):
        desk.hold("us", oid, id=id)
    assert sorted(brief(desk.later(TIMEOUT_S))) == ["Abandon us", "Abandon us", "Expire us"]
    assert desk.is_idle()


def test_a_vote_may_wait_longer_than_a_transaction_may_take() -> None:
    desk = Desk()
    waiting(desk)
    desk.finish("other")
    assert desk.later(TIMEOUT_S * 3) == []
    assert brief(desk.later(VOTE_WAIT_S)) == ["Fail us"]


def test_every_transaction_has_a_deadline_of_its_own() -> None:
    desk = Desk()
    for owner, oid in (("first", A), ("second", B)):
        desk.hold(owner, oid)
        desk.now_s += 10
    assert brief(desk.later(TIMEOUT_S - 20)) == ["Expire first", "Abandon first"]
    assert brief(desk.later(10)) == ["Expire second", "Abandon second"]


def test_those_who_waited_too_long_are_told_in_their_order() -> None:
    desk = Desk()
    holder = desk.hold("holder", A)
    desk.finish("holder")
    for owner in ("first", "second"):
        desk.voted(owner, A)
        desk.now_s += 10
    assert brief(desk.later(VOTE_WAIT_S - 20)) == ["Fail first"]
    assert brief(desk.later(10)) == ["Fail second"]
    assert brief(desk.committed(holder)) == ["Publish holder", "Reply holder"]


def test_when_the_locks_get_free_at_the_deadline_the_vote_goes_ahead() -> None:
    desk = Desk(vote_wait_s=TIMEOUT_S)
    waiting(desk)
    assert brief(desk.later(TIMEOUT_S)) == ["Expire other", "Abandon other", "Prepare us"]
    assert desk.get("us").state is State.PREPARING


def reader_behind_a_writer(desk: Desk) -> None:
    """*writer* waits for a reader that is slow, and *us*, a reader too, only because of *writer*."""
    desk.begin("holder")
    desk.check("holder", A)
    desk.vote("holder")
    desk.prepared(desk.get("holder"))
    desk.finish("holder")
    assert desk.voted("writer", A) == []
    desk.begin("us")
    desk.check("us", A)
    assert desk.vote("us") == []


def test_who_makes_way_at_the_deadline_makes_it_for_others_that_are_as_late() -> None:
    desk = Desk()
    reader_behind_a_writer(desk)
    assert brief(desk.later(VOTE_WAIT_S)) == ["Fail writer", "Prepare us"]


def test_one_that_is_broken_and_as_late_is_told_once() -> None:
    desk = Desk()
    reader_behind_a_writer(desk)
    desk.store("us", B)  # after the vote
    assert brief(desk.later(VOTE_WAIT_S)) == ["Fail writer", "Fail us"]
    assert desk.machine.active == 1
