"""What becomes of the transactions of one owner, and how many and how large they may be."""

from __future__ import annotations

import pytest
from ZODB.POSException import StorageError, StorageTransactionError

from tests.commit.desk import (
    INFO,
    A,
    B,
    C,
    Desk,
    brief,
    finishing,
    problems,
    resolving,
)
from zeoid import limits
from zeoid.commit.actions import Prepare
from zeoid.commit.transactions import Transactions
from zeoid.model import NO_TID, CheckCurrent, Delete, Operation, Restore, Store, Undo

# Owners ---------------------------------------------------------------------------------------------------


def test_one_owner_may_have_several_transactions_under_way() -> None:
    desk = Desk()
    for id, oid in ((1, A), ("two", B), (b"three", A)):
        desk.begin("us", id)
        desk.store("us", oid, id=id)
    assert brief(desk.vote("us", "two")) == ["Prepare us"]
    assert brief(desk.vote("us", 1)) == ["Prepare us"]
    assert desk.vote("us", b"three") == []
    desk.abort("us", b"three")
    assert desk.machine.active == 2


def test_the_same_id_means_another_transaction_to_another_owner() -> None:
    """A stock client's ids are numbers that mean nothing to others."""
    desk = Desk()
    ours, theirs = desk.begin("us", 1), desk.begin("them", 1)
    desk.abort("them", 1)
    assert desk.get("us", 1) is ours
    assert ours is not theirs
    assert desk.vote("us", 1) == [Prepare(ours)]


def test_all_transactions_of_a_lost_owner_are_given_up_and_no_others() -> None:
    desk = Desk()
    for id, oid in (("prepared", A), ("resolving", B)):
        desk.voted("us", oid, id=id)
    desk.prepared(desk.get("us", "prepared"), [A])
    desk.conflicted(desk.get("us", "resolving"))
    assert brief(desk.voted("us", C, id="preparing")) == ["Prepare us"]
    desk.voted("us", A, id="waiting")
    desk.begin("us", "storing")
    for owner, oid in (("one", A), ("another", B), ("third", C)):
        assert desk.voted(owner, oid) == []
    doomed = desk.get("us", "preparing")
    actions = brief(desk.gone("us"))
    assert sorted(actions) == ["Abandon us", "Fail us", "Fail us", "Prepare another", "Prepare one"]
    assert actions.index("Abandon us") < actions.index("Prepare one")
    assert desk.machine.active == 3
    assert brief(desk.prepared(doomed)) == ["Abandon us", "Prepare third"]


def test_an_owner_is_lost_that_holds_locks_and_has_a_broken_transaction_waiting_for_them() -> None:
    desk = Desk()
    desk.hold("us", A, id=1)
    desk.voted("us", A, id=2)
    desk.store("us", id=2)  # after the vote
    assert brief(desk.gone("us")) == ["Fail us", "Abandon us"]
    assert desk.is_idle()


@pytest.mark.parametrize(
    ("is_broken", "begun", "between_s"),
    [
        (False, "in the order of their votes", 1),
        (False, "in the order of their votes", 0),
        (False, "the other way round", 1),
        (True, "in the order of their votes", 0),
        (True, "the other way round", 1),
        (True, "the other way round", 0),
    ],
)
def test_what_one_transaction_of_a_lost_owner_gives_back_another_does_not_get(
    is_broken: bool, begun: str, between_s: float
) -> None:
    """The second shares what the holder has: only the first, which writes it, keeps it waiting."""
    desk = Desk()
    desk.begin("holder")
    desk.check("holder", A)
    desk.vote("holder")
    for id in (1, 2) if "order" in begun else (2, 1):
        desk.begin("lost", id)
    desk.store("lost", A, id=1)
    desk.check("lost", A, id=2)
    assert desk.vote("lost", 1) == []
    desk.now_s += between_s
    assert desk.vote("lost", 2) == []
    if is_broken:
        desk.store("lost", B, id=2)  # after the vote
    assert brief(desk.gone("lost")) == ["Fail lost", "Fail lost"]
    assert desk.machine.active == 1


def test_those_of_an_owner_that_wait_are_not_prepared_when_the_owner_is_lost() -> None:
    desk = Desk()
    desk.hold("us", A, id=1)
    for id in (2, 3):
        desk.voted("us", A, id=id)
    assert brief(desk.gone("us")) == ["Fail us", "Fail us", "Abandon us"]
    assert desk.is_idle()


def test_an_owner_is_lost_while_its_transaction_is_finishing() -> None:
    """Too late: it will be durable, so the others must hear of it."""
    desk = Desk()
    transaction = finishing(desk)
    desk.begin("us", 2)
    assert desk.gone("us") == []
    assert desk.machine.active == 1
    assert brief(desk.committed(transaction)) == ["Publish us", "Reply us"]


def test_to_lose_an_owner_that_has_nothing_does_nothing() -> None:
    assert Desk().gone("us") == []


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
        desk.break_("us", StorageError("not understood"), id=4)
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
