"""What became of a transaction, asked by a client that lost its connection. What was told once stays true."""

from __future__ import annotations

import pytest
from ZODB.POSException import StorageError, StorageTransactionError
from ZODB.utils import p64

from tests.commit.desk import (
    INFO,
    A,
    B,
    Desk,
    brief,
    doomed,
    finishing,
    prepared,
    preparing,
    problems,
    storing,
    waiting,
)
from zeoid import limits
from zeoid.commit.actions import Decide, Prepare, Publish, Reply
from zeoid.commit.outcomes import DecidedOutcomes
from zeoid.model import NO_TID
from zeoid.ports import Outcomes

# Yes ------------------------------------------------------------------------------------------------------


def test_what_was_committed_is_told_with_its_tid() -> None:
    desk = Desk()
    tid = desk.commit("us")
    for _ in range(2):
        assert desk.outcome(b"us") == [Decide("asker", tid)]


def test_a_finish_that_is_under_way_is_waited_for() -> None:
    desk = Desk()
    transaction = finishing(desk)
    for asker in ("first", "second"):
        assert desk.outcome(b"us", asker=asker) == []
    assert desk.committed(transaction) == [
        Publish(transaction),
        Reply(transaction, transaction.tid),
        Decide("first", transaction.tid),
        Decide("second", transaction.tid),
    ]


def test_a_finish_that_waits_for_the_batch_before_it_is_waited_for() -> None:
    desk = Desk()
    before = desk.hold("before", B)
    desk.finish("before")
    transaction = prepared(desk)
    desk.finish("us")
    assert desk.outcome(b"us") == []
    assert "Decide asker: yes" not in brief(desk.committed(before))
    assert brief(desk.committed(transaction))[-1] == "Decide asker: yes"


def test_the_loss_of_the_connection_during_the_finish_changes_nothing() -> None:
    desk = Desk()
    transaction = finishing(desk)
    desk.gone("us")
    assert desk.outcome(b"us") == []
    assert brief(desk.committed(transaction))[-1] == "Decide asker: yes"


def test_what_was_committed_before_the_start_is_known() -> None:
    known = Outcomes(p64(3), [(b"one", p64(5)), (b"two", p64(7))])
    desk = Desk(p64(9), outcomes=known)
    assert desk.outcome(b"one", p64(4)) == [Decide("asker", p64(5))]
    assert desk.outcome(b"two", p64(4)) == [Decide("asker", p64(7))]


# No -------------------------------------------------------------------------------------------------------


def test_what_is_not_known_never_will_be_committed() -> None:
    desk = Desk()
    assert desk.outcome(b"us") == [Decide("asker", None)]
    storing(desk)
    (problem,) = problems(desk.vote("us"))
    assert isinstance(problem, StorageTransactionError)
    assert desk.outcome(b"us") == [Decide("asker", None)]
    assert desk.is_idle()


@pytest.mark.parametrize("owner", ["us", "other"])
def test_what_was_given_up_cannot_be_begun_again_on_any_connection(owner: str) -> None:
    desk = Desk()
    prepared(desk)
    assert brief(desk.outcome(b"us")) == ["Abandon us", "Decide asker: no"]
    desk.begin(owner, b"us")
    desk.store(owner, id=b"us")
    assert brief(desk.vote(owner, b"us")) == [f"Fail {owner}"]
    assert desk.is_idle()


def test_a_no_is_told_twice() -> None:
    desk = Desk()
    storing(desk)
    assert brief(desk.outcome(b"us")) == brief(desk.outcome(b"us")) == ["Decide asker: no"]


def test_the_doomed_cannot_be_begun_again_once_its_outcome_was_told() -> None:
    desk = Desk()
    transaction = doomed(desk)
    assert brief(desk.outcome(b"us")) == ["Decide asker: no"]
    assert brief(desk.prepared(transaction)) == ["Abandon us"]
    assert brief(desk.voted("us", A)) == ["Fail us"]


def test_what_the_engine_works_on_when_it_is_given_up_is_abandoned() -> None:
    desk = Desk()
    transaction = preparing(desk)
    assert brief(desk.outcome(b"us")) == ["Fail us", "Decide asker: no"]
    assert brief(desk.prepared(transaction)) == ["Abandon us"]
    assert desk.is_idle()


def test_what_waits_for_the_given_up_goes_on() -> None:
    desk = Desk()
    waiting(desk)
    assert brief(desk.outcome(b"other")) == ["Abandon other", "Prepare us", "Decide asker: no"]


def test_a_transaction_that_its_owner_aborted_is_not_committed() -> None:
    desk = Desk()
    storing(desk)
    desk.abort("us")
    assert desk.outcome(b"us") == [Decide("asker", None)]


# One id, one transaction ----------------------------------------------------------------------------------


def test_an_id_that_was_committed_cannot_be_begun_again() -> None:
    desk = Desk()
    tid = desk.commit("us")
    assert brief(desk.voted("other", B, id=b"us")) == ["Fail other"]
    assert desk.outcome(b"us") == [Decide("asker", tid)]


def test_an_id_that_is_under_way_cannot_be_begun_on_another_connection() -> None:
    desk = Desk()
    transaction = storing(desk)
    (problem,) = problems(desk.voted("other", B, id=b"us"))
    assert isinstance(problem, StorageTransactionError)
    assert desk.vote("us") == [Prepare(transaction)]


def test_the_outcome_is_that_of_the_transaction_and_not_of_its_double() -> None:
    desk = Desk()
    transaction = finishing(desk)
    desk.begin("other", b"us")
    assert desk.outcome(b"us") == []
    assert brief(desk.committed(transaction))[-1] == "Decide asker: yes"
    assert desk.outcome(b"us") == [Decide("asker", transaction.tid)]


def test_a_double_does_not_come_to_life_when_the_first_is_gone() -> None:
    desk = Desk()
    storing(desk)
    desk.begin("other", b"us")
    desk.store("other", id=b"us")
    assert brief(desk.outcome(b"us")) == ["Decide asker: no"]
    assert brief(desk.vote("other", b"us")) == ["Fail other"]
    assert desk.is_idle()


def test_the_end_of_a_double_leaves_the_first_alone() -> None:
    desk = Desk()
    transaction = prepared(desk)
    desk.begin("other", b"us")
    desk.gone("other")
    assert brief(desk.outcome(b"us")) == ["Abandon us", "Decide asker: no"]
    assert desk.find("us") is None
    assert transaction not in desk.machine.all()


def test_ids_of_stock_clients_are_used_again_and_again() -> None:
    desk = Desk()
    for _ in range(3):
        desk.commit("us", id=1)
        desk.commit("other", id=1)


def test_a_transaction_that_was_aborted_may_be_begun_again() -> None:
    desk = Desk()
    storing(desk)
    desk.abort("us")
    assert desk.commit("us")


# Forgotten ------------------------------------------------------------------------------------------------


def test_what_may_have_been_forgotten_is_not_answered() -> None:
    desk = Desk(p64(9), outcomes=Outcomes(p64(5), [(b"six", p64(6))]))
    with pytest.raises(StorageError, match="not known any more"):
        desk.outcome(b"us", after=p64(4))
    assert desk.outcome(b"us", after=p64(5)) == [Decide("asker", None)]


def test_an_engine_that_keeps_no_outcomes_knows_nothing_of_what_was_before() -> None:
    desk = Desk(p64(9))
    with pytest.raises(StorageError, match="not known any more"):
        desk.outcome(b"us", after=p64(8))
    assert desk.outcome(b"us", after=p64(9)) == [Decide("asker", None)]


def test_what_could_not_be_answered_is_not_given_up() -> None:
    desk = Desk(p64(9))
    with pytest.raises(StorageError):
        desk.outcome(b"us", after=NO_TID)
    assert desk.commit("us") > p64(9)


def test_a_transaction_under_way_is_known_however_old_it_is() -> None:
    desk = Desk(p64(9))
    storing(desk)
    assert desk.outcome(b"us", after=NO_TID) == [Decide("asker", None)]


def test_what_was_committed_is_known_however_old_the_question_is() -> None:
    desk = Desk(p64(9))
    tid = desk.commit("us")
    assert desk.outcome(b"us", after=NO_TID) == [Decide("asker", tid)]


def test_only_so_many_committed_ones_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OUTCOMES", 3)
    desk = Desk()
    tids = [desk.commit("us", id=b"%d" % number) for number in range(5)]
    for number in (0, 1):
        with pytest.raises(StorageError):
            desk.outcome(b"%d" % number, after=NO_TID)
        # Begun after the newest that is forgotten, it can't be one of those.
        assert desk.outcome(b"new%d" % number, after=tids[1]) == [Decide("asker", None)]
    for number in (2, 3, 4):
        assert desk.outcome(b"%d" % number, after=NO_TID) == [Decide("asker", tids[number])]


def test_commits_of_stock_clients_drive_out_no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OUTCOMES", 3)
    desk = Desk()
    tid = desk.commit("us")
    for number in range(10):
        desk.commit("us", id=number)
    assert desk.outcome(b"us") == [Decide("asker", tid)]


def test_a_no_that_is_remembered_is_told_again_however_many_came_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "OUTCOMES", 3)
    desk = Desk()
    assert desk.outcome(b"us") == [Decide("asker", None)]
    for number in range(10):
        desk.commit("other", id=b"%d" % number)
    assert desk.outcome(b"us") == [Decide("asker", None)]


def test_only_so_many_given_up_ones_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OUTCOMES", 3)
    outcomes = DecidedOutcomes(Outcomes(NO_TID))
    for number in range(5):
        outcomes.deny(b"%d" % number)
    assert [outcomes.is_over(b"%d" % number) for number in range(5)] == [False, False, True, True, True]
    assert outcomes.tid(b"4") is None


def test_what_the_engine_knew_is_not_changed() -> None:
    known = Outcomes(NO_TID, [(b"one", p64(5))])
    outcomes = DecidedOutcomes(known)
    outcomes.note(b"two", p64(6))
    assert known.committed == [(b"one", p64(5))]
    assert (outcomes.tid(b"one"), outcomes.tid(b"two")) == (p64(5), p64(6))


def test_a_problem_from_the_start_does_not_hide_the_outcome() -> None:
    desk = Desk()
    desk.machine.begin("us", b"us", INFO, StorageError("broken"))
    assert brief(desk.outcome(b"us")) == ["Decide asker: no"]
    assert desk.is_idle()
