"""What is made durable together, in which order it is told, and which tids it gets."""

from __future__ import annotations

import pytest
from ZODB.POSException import StorageError, StorageTransactionError
from ZODB.utils import p64

from tests.commit.desk import (
    NOON,
    A,
    B,
    C,
    Desk,
    brief,
    copied,
    finishing,
    prepared,
    preparing,
    problems,
    resolving,
    storing,
)
from zeoid import limits
from zeoid.commit.actions import Action, Commit, Prepare, Publish, Reply, State, Transaction
from zeoid.commit.tids import next_tid
from zeoid.model import NO_TID, Restore, tid_before


def many(desk: Desk, count: int, data: bytes = b"") -> list[Transaction]:
    """Transactions of *count* owners, each prepared, none in another's way."""
    for index in range(count):
        owner = f"owner{index}"
        desk.begin(owner)
        desk.store(owner, p64(index), data)
        assert brief(desk.vote(owner)) == [f"Prepare {owner}"]
        desk.prepared(desk.get(owner), [p64(index)])
    return [desk.get(f"owner{index}") for index in range(count)]


def batch_of(actions: list[Action]) -> list[Transaction]:
    (batch,) = [action.batch for action in actions if isinstance(action, Commit)]
    return list(batch)


# Batches --------------------------------------------------------------------------------------------------


def test_while_one_batch_is_made_durable_the_next_one_gathers() -> None:
    desk = Desk()
    first, second, third = many(desk, 3)
    assert desk.finish("owner0") == [Commit([first])]
    assert desk.finish("owner2") == []
    assert desk.finish("owner1") == []
    assert {first.state, second.state, third.state} == {State.FINISHING}
    # The disk goes on first; then what is durable is told.
    assert brief(desk.committed(first)) == ["Commit owner2 owner1", "Publish owner0", "Reply owner0"]
    assert brief(desk.committed(third, second)) == [
        "Publish owner2", "Reply owner2", "Publish owner1", "Reply owner1",
    ]  # fmt: skip
    assert desk.is_idle()


def test_the_batch_after_an_idle_time_is_not_kept_waiting() -> None:
    desk = Desk()
    desk.commit("other")
    transaction = desk.hold("us", A)
    assert desk.finish("us") == [Commit([transaction])]


def test_publication_comes_before_the_reply_that_reveals_the_tid() -> None:
    desk = Desk()
    transactions = many(desk, 4)
    desk.finish("owner0")
    for owner in ("owner2", "owner1", "owner3"):
        desk.finish(owner)
    batch = batch_of(desk.committed(transactions[0]))
    actions = desk.committed(*batch)
    assert [action.transaction for action in actions if isinstance(action, Publish)] == batch
    for transaction in batch:
        published = actions.index(Publish(transaction))
        assert actions[published + 1] == Reply(transaction, transaction.tid)
    tids = [transaction.tid for transaction in batch]
    assert tids == sorted(tids)
    assert desk.machine.last_tid == tids[-1]


def test_locks_are_kept_until_everything_of_the_batch_was_told() -> None:
    """Who gets them afterwards may be shown what was written."""
    desk = Desk()
    first, second, third = many(desk, 3)
    assert desk.voted("next", p64(1)) == []
    assert desk.voted("another", p64(2)) == []
    desk.finish("owner0")
    desk.finish("owner1")
    desk.finish("owner2")
    desk.committed(first)
    actions = brief(desk.committed(second, third))
    assert actions[-2:] == ["Prepare next", "Prepare another"]
    assert actions[:4] == ["Publish owner1", "Reply owner1", "Publish owner2", "Reply owner2"]


def test_nothing_of_a_batch_is_durable_before_the_engine_says_so() -> None:
    desk = Desk(NO_TID)
    transaction = finishing(desk)
    assert desk.machine.last_tid == NO_TID
    assert desk.voted("next", A) == []
    desk.committed(transaction)
    assert desk.machine.last_tid == transaction.tid


def test_a_batch_has_only_so_many_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BATCH_TRANSACTIONS", 3)
    desk = Desk()
    transactions = many(desk, 8)
    for index in range(8):
        desk.finish(f"owner{index}")
    sizes, batch = [], transactions[:1]
    while batch:
        sizes.append(len(batch))
        actions = desk.committed(*batch)
        batch = batch_of(actions) if brief(actions)[0].startswith("Commit") else []
    assert sizes == [1, 3, 3, 1]
    assert desk.is_idle()


def test_a_batch_has_only_so_much_data() -> None:
    desk = Desk()
    transactions = many(desk, 4, data=b"x" * (limits.BATCH_BYTES * 2 // 5))
    for index in range(4):
        desk.finish(f"owner{index}")
    assert batch_of(desk.committed(transactions[0])) == transactions[1:3]
    assert batch_of(desk.committed(*transactions[1:3])) == transactions[3:]


def test_what_is_larger_than_a_batch_is_one() -> None:
    desk = Desk()
    transactions = many(desk, 3, data=b"x" * (limits.BATCH_BYTES + 1))
    for index in range(3):
        desk.finish(f"owner{index}")
    for before, following in ((0, 1), (1, 2)):
        assert batch_of(desk.committed(transactions[before])) == [transactions[following]]


def test_who_aborts_before_the_finish_is_in_no_batch() -> None:
    desk = Desk()
    transactions = many(desk, 3)
    desk.finish("owner0")
    desk.finish("owner2")
    assert brief(desk.abort("owner1")) == ["Abandon owner1"]
    assert batch_of(desk.committed(transactions[0])) == [transactions[2]]


def test_who_is_gathering_cannot_be_given_up_any_more() -> None:
    desk = Desk()
    first, second = many(desk, 2)
    desk.finish("owner0")
    desk.finish("owner1")
    assert desk.abort("owner1") == []
    assert desk.gone("owner1") == []
    with pytest.raises(StorageTransactionError, match="finishing"):
        desk.finish("owner1")
    assert batch_of(desk.committed(first)) == [second]


# Tids -----------------------------------------------------------------------------------------------------


def test_a_tid_is_given_when_the_batch_goes_to_the_engine() -> None:
    desk = Desk()
    first, second = many(desk, 2)
    assert first.tid == b""
    desk.finish("owner0")
    assert first.tid == next_tid(NO_TID, NOON)
    desk.finish("owner1")
    assert second.tid == b""
    desk.now_s += 10
    desk.committed(first)
    assert second.tid == next_tid(NO_TID, NOON + 10)


@pytest.mark.parametrize("clock_s", [0.0, -3600.0, 3600.0], ids=["stands", "goes back", "goes on"])
def test_tids_of_a_batch_increase_whatever_the_clock_does(clock_s: float) -> None:
    desk = Desk()
    transactions = many(desk, 10)
    desk.finish("owner0")
    for index in range(1, 10):
        desk.finish(f"owner{index}")
    desk.now_s += clock_s
    batch = batch_of(desk.committed(transactions[0]))
    tids = [transactions[0].tid, *(transaction.tid for transaction in batch)]
    assert tids == sorted(set(tids))
    assert len(tids) == 10


def test_tids_increase_from_batch_to_batch_even_if_the_clock_goes_back() -> None:
    desk = Desk()
    last = desk.commit("us", id=1)
    for seconds in (-3600.0, 0.0, -86400.0, 7200.0):
        desk.now_s += seconds
        tid = desk.commit("us", id=1)
        assert tid > last
        last = tid


def test_the_first_tid_is_later_than_what_the_storage_holds() -> None:
    future = next_tid(NO_TID, NOON + 1e6)
    assert Desk(last_tid=future).commit("us") > future


def test_an_exclusive_engine_is_told_the_tid_when_it_prepares() -> None:
    desk = Desk(exclusive=True)
    transaction = storing(desk)
    assert desk.vote("us") == [Prepare(transaction)]
    tid = transaction.tid
    assert tid == next_tid(NO_TID, NOON)
    desk.now_s += 10
    desk.prepared(transaction)
    assert desk.finish("us") == [Commit([transaction])]
    assert transaction.tid == tid


def test_the_tid_of_what_was_not_committed_may_be_given_again() -> None:
    desk = Desk(exclusive=True)
    transaction = prepared(desk)
    desk.abort("us")
    assert desk.commit("us") == transaction.tid


def test_a_resolved_transaction_of_an_exclusive_engine_is_the_newest_still() -> None:
    desk = Desk(exclusive=True)
    transaction = resolving(desk)
    assert desk.voted("other", B) == []
    desk.store("us")
    assert desk.vote("us") == [Prepare(transaction)]
    desk.prepared(transaction)
    desk.finish("us")
    desk.committed(transaction)
    other = desk.get("other")
    assert other.tid > transaction.tid == desk.machine.last_tid


# Copies of transactions from elsewhere --------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [False, True], ids=["beside others", "exclusive"])
def test_a_copied_transaction_keeps_its_tid(exclusive: bool) -> None:
    desk = Desk(exclusive=exclusive)
    tid = next_tid(NO_TID, NOON - 1000)
    transaction = desk.begin("us", info=copied(tid))
    desk.operate("us", Restore(A, b"x", None))
    assert desk.vote("us") == [Prepare(transaction)]
    desk.prepared(transaction)
    assert desk.finish("us") == [Commit([transaction])]
    assert transaction.tid == tid
    desk.committed(transaction)
    assert desk.machine.last_tid == tid


def test_what_follows_a_copy_from_the_future_is_later_still() -> None:
    desk = Desk()
    tid = next_tid(NO_TID, NOON + 1e6)
    transaction = desk.begin("us", info=copied(tid))
    desk.vote("us")
    desk.prepared(transaction)
    desk.finish("us")
    desk.committed(transaction)
    assert desk.commit("other") > tid


@pytest.mark.parametrize("age", ["equal", "older"])
def test_a_copied_transaction_that_comes_too_late_fails(age: str) -> None:
    desk = Desk()
    last = desk.commit("us")
    desk.begin("us", 2, copied(last if age == "equal" else tid_before(last)))
    actions = desk.vote("us", 2)
    assert brief(actions) == ["Fail us"]
    (problem,) = problems(actions)
    assert isinstance(problem, StorageError)
    assert "too old" in str(problem)
    assert desk.machine.last_tid == last
    assert desk.is_idle()


def test_whether_a_copy_comes_too_late_shows_when_its_turn_comes() -> None:
    desk = Desk()
    holder = desk.hold("other", A)
    desk.begin("us", info=copied(next_tid(NO_TID, NOON - 1000)))
    assert desk.vote("us") == []
    desk.finish("other")
    assert brief(desk.committed(holder)) == ["Publish other", "Reply other", "Fail us"]


def test_a_copy_is_compared_with_the_batches_that_were_under_way() -> None:
    desk = Desk()
    desk.now_s += 1
    tid = next_tid(NO_TID, NOON + 10)
    first, second = many(desk, 2)
    desk.finish("owner0")
    desk.finish("owner1")
    desk.begin("us", info=copied(tid))
    assert desk.vote("us") == []
    desk.now_s += 20
    assert brief(desk.committed(first)) == ["Commit owner1", "Publish owner0", "Reply owner0"]
    assert brief(desk.committed(second)) == ["Publish owner1", "Reply owner1", "Fail us"]


def test_behind_a_copy_that_comes_too_late_the_others_go_on() -> None:
    desk = Desk()
    holder = desk.hold("other", A)
    desk.begin("us", info=copied(next_tid(NO_TID, NOON - 1000)))
    desk.vote("us")
    for owner, oid in (("one", B), ("another", C)):
        assert desk.voted(owner, oid) == []
    desk.finish("other")
    assert brief(desk.committed(holder))[2:] == ["Fail us", "Prepare one", "Prepare another"]


def test_a_failure_to_prepare_takes_no_tid() -> None:
    desk = Desk()
    transaction = preparing(desk)
    desk.failed(transaction, StorageError("disk full"))
    assert (transaction.tid, desk.machine.last_tid) == (b"", NO_TID)


# Engines that are shared with others ----------------------------------------------------------------------


def shared_desk() -> Desk:
    return Desk(exclusive=True, shared=True)


def test_a_shared_engine_gives_the_tid() -> None:
    desk = shared_desk()
    transaction = desk.hold("us", A)
    assert desk.finish("us") == [Commit([transaction])]
    assert transaction.tid == b""
    transaction.tid = next_tid(NO_TID, NOON + 5)
    assert desk.committed(transaction) == [Publish(transaction), Reply(transaction, transaction.tid)]
    assert desk.machine.last_tid == transaction.tid


def test_what_a_shared_engine_could_not_commit_makes_way_for_the_next() -> None:
    desk = shared_desk()
    transaction = desk.hold("us", A)
    desk.voted("other", B)
    desk.finish("us")
    actions = desk.machine.uncommitted([transaction], StorageError("gone"), NOON)
    assert brief(actions) == ["Fail us", "Prepare other"]
    assert desk.find("us") is None


def test_what_became_of_it_cant_be_told() -> None:
    desk = shared_desk()
    seen = next_tid(NO_TID, NOON)
    desk.machine.others_committed(seen)
    transaction = desk.hold("us", A)
    desk.finish("us")
    assert desk.outcome(b"us", seen) == []
    actions = desk.machine.uncommitted([transaction], StorageError("gone"), NOON)
    assert brief(actions) == ["Fail us"], "who asked is told neither yes nor no"
    with pytest.raises(StorageError, match="not known"):
        desk.outcome(b"us", seen)
    assert brief(desk.outcome(b"never begun", next_tid(seen, NOON + 9))) == ["Decide asker: no"]


def test_a_copy_comes_too_late_after_others() -> None:
    desk = shared_desk()
    desk.machine.others_committed(next_tid(NO_TID, NOON))
    desk.begin("us", info=copied(next_tid(NO_TID, NOON - 1)))
    assert brief(desk.vote("us")) == ["Fail us"]
