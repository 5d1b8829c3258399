"""The state table of transactions, cell by cell: what is broken, in conflict or given up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from ZODB.POSException import ConflictError, ReadOnlyError, StorageError, StorageTransactionError
from ZODB.utils import p64

from tests.commit.desk import (
    CONFLICT,
    INFO,
    STATES,
    TIMEOUT_S,
    VOTE_WAIT_S,
    A,
    B,
    Desk,
    brief,
    doomed,
    finishing,
    preparing,
    problems,
    resolving,
    storing,
    waiting,
)
from zeoid import limits
from zeoid.commit.actions import Abandon, Action, Commit, Fail, Prepare, Publish, Reply, State, Transaction
from zeoid.model import (
    CheckCurrent,
    Delete,
    Operation,
    Restore,
    Store,
    TransactionInfo,
    Undo,
)

# The table ------------------------------------------------------------------------------------------------


OVER = "over"
REFUSED = "refused"
NOTHING: list[str] = []


@dataclass
class Cell:
    """What an event does in a state: the actions (or REFUSED), and the state afterwards (or OVER)."""

    actions: list[str] | str
    becomes: State | str
    broken: bool = False


def unchanged(state: State) -> Cell:
    return Cell(NOTHING, state)


def refused(state: State) -> Cell:
    return Cell(REFUSED, state)


OPERATION = {
    State.STORING: unchanged(State.STORING),
    State.WAITING: Cell(NOTHING, State.WAITING, broken=True),
    State.PREPARING: Cell(NOTHING, State.PREPARING, broken=True),
    State.RESOLVING: unchanged(State.RESOLVING),
    State.PREPARED: Cell(NOTHING, State.PREPARED, broken=True),
    # That it is broken means nothing any more: it is committed.
    State.FINISHING: Cell(NOTHING, State.FINISHING, broken=True),
    State.DOOMED: unchanged(State.DOOMED),
}
VOTE = {
    State.STORING: Cell(["Prepare us"], State.PREPARING),
    State.WAITING: refused(State.WAITING),
    State.PREPARING: refused(State.PREPARING),
    State.RESOLVING: Cell(["Prepare us"], State.PREPARING),
    State.PREPARED: refused(State.PREPARED),
    State.FINISHING: refused(State.FINISHING),
    State.DOOMED: refused(State.DOOMED),
}
FINISH = {
    State.STORING: refused(State.STORING),
    State.WAITING: refused(State.WAITING),
    State.PREPARING: refused(State.PREPARING),
    State.RESOLVING: refused(State.RESOLVING),
    State.PREPARED: Cell(["Commit us"], State.FINISHING),
    State.FINISHING: refused(State.FINISHING),
    State.DOOMED: refused(State.DOOMED),
}
ABORT = {
    State.STORING: Cell(NOTHING, OVER),
    State.WAITING: Cell(["Fail us"], OVER),
    State.PREPARING: Cell(["Fail us"], State.DOOMED),
    State.RESOLVING: Cell(NOTHING, OVER),
    State.PREPARED: Cell(["Abandon us"], OVER),
    State.FINISHING: unchanged(State.FINISHING),
    State.DOOMED: unchanged(State.DOOMED),
}
#: Nobody has said anything for as long as a transaction, or a vote, may take.
DEADLINE = {
    State.STORING: unchanged(State.STORING),
    State.WAITING: Cell(["Fail us"], OVER),
    State.PREPARING: unchanged(State.PREPARING),
    State.RESOLVING: Cell(["Expire us"], OVER),
    State.PREPARED: Cell(["Expire us", "Abandon us"], OVER),
    State.FINISHING: unchanged(State.FINISHING),
    State.DOOMED: unchanged(State.DOOMED),
}
OUTCOME = {
    State.STORING: Cell(["Decide asker: no"], OVER),
    State.WAITING: Cell(["Fail us", "Decide asker: no"], OVER),
    State.PREPARING: Cell(["Fail us", "Decide asker: no"], State.DOOMED),
    State.RESOLVING: Cell(["Decide asker: no"], OVER),
    State.PREPARED: Cell(["Abandon us", "Decide asker: no"], OVER),
    # The answer comes with the engine's.
    State.FINISHING: unchanged(State.FINISHING),
    State.DOOMED: Cell(["Decide asker: no"], State.DOOMED),
}


def check(cell: Cell, desk: Desk, transaction: Transaction, event: Callable[[], list[Action] | None]) -> None:
    if cell.actions == REFUSED:
        with pytest.raises(StorageTransactionError):
            event()
    else:
        assert brief(event() or []) == cell.actions
    if cell.becomes in (OVER, State.DOOMED):
        assert desk.find("us") is None
    else:
        assert desk.find("us") is transaction
    if cell.becomes != OVER:
        assert transaction.state is cell.becomes
    assert (transaction.broken is not None) is cell.broken


def every_state(cells: dict[State, Cell]) -> Any:
    assert set(cells) == set(State)
    return pytest.mark.parametrize("state", State, ids=lambda state: state.name)


@every_state(OPERATION)
def test_operation(state: State) -> None:
    desk = Desk()
    transaction = STATES[state](desk)
    if state is State.DOOMED:
        before = list(transaction.operations)
        desk.store("us", B)
        assert transaction.operations == before
    else:
        check(OPERATION[state], desk, transaction, lambda: desk.store("us", A, b"again"))


@every_state(VOTE)
def test_vote(state: State) -> None:
    desk = Desk()
    transaction = STATES[state](desk)
    check(VOTE[state], desk, transaction, lambda: desk.vote("us"))


@every_state(FINISH)
def test_finish(state: State) -> None:
    desk = Desk()
    transaction = STATES[state](desk)
    check(FINISH[state], desk, transaction, lambda: desk.finish("us"))


def let_the_other_finish(desk: Desk) -> None:
    """Whoever holds what we wait for is alive, and slow; so nothing happens to it instead of to us."""
    if desk.find("other") is not None:
        assert brief(desk.finish("other")) == ["Commit other"]


def check_and_clear(
    cell: Cell, desk: Desk, transaction: Transaction, event: Callable[[], list[Action]]
) -> None:
    """The same; and what is over holds nothing, and waits for nothing."""
    check(cell, desk, transaction, event)
    other = desk.find("other")
    if other is not None:
        assert brief(desk.committed(other)) == ["Publish other", "Reply other"]
    assert desk.is_idle() is (cell.becomes == OVER)


@every_state(ABORT)
@pytest.mark.parametrize("event", ["abort", "gone"])
def test_abort_and_the_loss_of_the_connection(state: State, event: str) -> None:
    desk = Desk()
    transaction = STATES[state](desk)
    let_the_other_finish(desk)
    check_and_clear(ABORT[state], desk, transaction, lambda: getattr(desk, event)("us"))


@every_state(DEADLINE)
def test_deadline(state: State) -> None:
    desk = Desk()
    transaction = STATES[state](desk)
    let_the_other_finish(desk)
    check_and_clear(DEADLINE[state], desk, transaction, lambda: desk.later(max(TIMEOUT_S, VOTE_WAIT_S)))


@every_state(DEADLINE)
def test_just_before_the_deadline(state: State) -> None:
    desk = Desk()
    transaction = STATES[state](desk)
    let_the_other_finish(desk)
    patience_s = VOTE_WAIT_S if state is State.WAITING else TIMEOUT_S
    assert desk.later(patience_s - 0.001) == []
    assert transaction.state is state


@every_state(OUTCOME)
def test_outcome(state: State) -> None:
    desk = Desk()
    transaction = STATES[state](desk)
    let_the_other_finish(desk)
    check_and_clear(OUTCOME[state], desk, transaction, lambda: desk.outcome(b"us"))


def test_waiting_becomes_preparing_when_the_locks_are_free() -> None:
    desk = Desk()
    transaction = waiting(desk)
    assert brief(desk.abort("other")) == ["Abandon other", "Prepare us"]
    assert transaction.state is State.PREPARING


def test_preparing_becomes_prepared() -> None:
    desk = Desk()
    transaction = preparing(desk)
    assert desk.prepared(transaction, oids=[A, B], resolved=[B]) == [Reply(transaction, [B])]
    assert transaction.state is State.PREPARED


def test_what_the_engine_has_is_not_kept_twice() -> None:
    desk = Desk()
    transaction = preparing(desk)
    desk.prepared(transaction)
    assert transaction.operations == []


def test_preparing_fails() -> None:
    desk = Desk()
    transaction = preparing(desk)
    problem = StorageError("disk full")
    assert desk.failed(transaction, problem) == [Fail(transaction, problem)]
    assert desk.is_idle()


def test_finishing_becomes_committed() -> None:
    desk = Desk()
    transaction = finishing(desk)
    assert desk.committed(transaction) == [Publish(transaction), Reply(transaction, transaction.tid)]
    assert desk.machine.last_tid == transaction.tid
    assert desk.is_idle()


# Doomed: given up while the engine was at it --------------------------------------------------------------


def after_the_doomed(desk: Desk, transaction: Transaction, said: str) -> list[str]:
    """What follows when the engine at last says something of it."""
    match said:
        case "prepared":
            return brief(desk.prepared(transaction))
        case "conflicted":
            return brief(desk.conflicted(transaction))
        case _:
            return brief(desk.failed(transaction, StorageError("disk full")))


#: There is something to abandon only where something was prepared.
ABANDONED = {"prepared": ["Abandon us"], "conflicted": NOTHING, "failed": NOTHING}


@pytest.mark.parametrize("said", ABANDONED)
def test_the_doomed_is_forgotten_when_the_engine_is_done_with_it(said: str) -> None:
    desk = Desk()
    assert after_the_doomed(desk, doomed(desk), said) == ABANDONED[said]
    assert desk.is_idle()


@pytest.mark.parametrize("said", ABANDONED)
def test_after_the_doomed_comes_the_next(said: str) -> None:
    """The engine must not be asked to prepare an object that it is still working on."""
    desk = Desk()
    transaction = doomed(desk)
    assert desk.voted("next", A) == []
    assert after_the_doomed(desk, transaction, said) == [*ABANDONED[said], "Prepare next"]


def test_the_id_of_the_doomed_can_be_used_again() -> None:
    """A stock client's ids are memory addresses: the next transaction may well have the same one."""
    desk = Desk()
    dead = doomed(desk)
    alive = desk.begin("us")
    assert alive is not dead
    desk.store("us", A)
    assert desk.vote("us") == []  # it waits for the engine to be done with the dead one
    assert brief(desk.prepared(dead)) == ["Abandon us", "Prepare us"]
    assert desk.get("us") is alive
    assert desk.prepared(alive) == [Reply(alive, [])]
    assert desk.finish("us") == [Commit([alive])]


def test_one_that_resolved_its_conflicts_is_doomed_as_well() -> None:
    desk = Desk()
    transaction = resolving(desk)
    desk.store("us")
    assert desk.vote("us") == [Prepare(transaction)]
    assert brief(desk.gone("us")) == ["Fail us"]
    assert transaction.state is State.DOOMED
    assert desk.prepared(transaction) == [Abandon(transaction)]
    assert desk.is_idle()


# Every vote gets an answer --------------------------------------------------------------------------------


def test_a_vote_that_waits_is_answered_when_its_transaction_is_aborted() -> None:
    desk = Desk()
    waiting(desk)
    (problem,) = problems(desk.abort("us"))
    assert isinstance(problem, StorageTransactionError)
    assert "aborted" in str(problem)


def test_a_vote_under_way_is_answered_when_its_transaction_is_aborted() -> None:
    desk = Desk()
    preparing(desk)
    (problem,) = problems(desk.abort("us"))
    assert isinstance(problem, StorageTransactionError)
    assert "aborted" in str(problem)


def test_a_vote_that_waited_too_long_may_be_tried_again() -> None:
    desk = Desk()
    waiting(desk)
    desk.finish("other")
    (problem,) = problems(desk.later(VOTE_WAIT_S))
    assert isinstance(problem, ConflictError)
    assert "100 s" in str(problem)


# What is broken -------------------------------------------------------------------------------------------


def test_a_broken_transaction_fails_at_vote_with_what_broke_it() -> None:
    desk = Desk()
    problem = StorageError("not understood")
    transaction = desk.begin("us")
    desk.break_("us", problem)
    desk.store("us")
    assert desk.vote("us") == [Fail(transaction, problem)]
    assert desk.is_idle()


def test_the_first_of_several_problems_is_told() -> None:
    desk = Desk()
    first, second = StorageError("first"), StorageError("second")
    desk.begin("us")
    desk.break_("us", first)
    desk.break_("us", second)
    assert problems(desk.vote("us")) == [first]


def test_a_transaction_may_be_broken_from_the_start() -> None:
    desk = Desk()
    problem = ReadOnlyError()
    desk.machine.begin("us", b"us", INFO, problem)
    desk.store("us")
    assert problems(desk.vote("us")) == [problem]


def test_operations_of_a_broken_transaction_are_not_kept() -> None:
    desk = Desk()
    transaction = desk.begin("us")
    desk.break_("us", StorageError("broken"))
    for _ in range(100):
        desk.store("us", data=b"x" * 1000)
    assert transaction.operations == []


def test_what_was_broken_while_it_waited_fails_when_its_turn_comes() -> None:
    desk = Desk()
    waiting(desk)
    desk.store("us", B)
    actions = desk.abort("other")
    assert brief(actions) == ["Abandon other", "Fail us"]
    assert "after the vote" in str(problems(actions)[0])
    assert desk.machine.active == 0


def test_the_next_in_the_queue_does_not_wait_for_a_broken_one() -> None:
    desk = Desk()
    waiting(desk)
    assert desk.voted("third", A) == []
    desk.store("us", B)
    assert brief(desk.abort("other")) == ["Abandon other", "Fail us", "Prepare third"]


def test_what_was_broken_while_it_was_prepared_fails_at_finish() -> None:
    desk = Desk()
    transaction = preparing(desk)
    desk.store("us", B)
    assert brief(desk.prepared(transaction)) == ["Reply us"]
    actions = desk.finish("us")
    assert brief(actions) == ["Fail us", "Abandon us"]
    assert "after the vote" in str(problems(actions)[0])
    assert desk.is_idle()


def test_an_operation_without_a_beginning_fails_at_vote() -> None:
    desk = Desk()
    desk.store("us")
    assert "before tpc_begin" in str(problems(desk.vote("us"))[0])
    assert desk.machine.active == 0


def test_an_operation_that_was_not_understood_and_has_no_beginning() -> None:
    desk = Desk()
    problem = StorageError("not understood")
    desk.break_("us", problem)
    assert problems(desk.vote("us")) == [problem]


@pytest.mark.parametrize("event", ["vote", "finish"])
def test_what_never_began_can_be_neither_voted_on_nor_finished(event: str) -> None:
    desk = Desk()
    with pytest.raises(StorageTransactionError, match="not begun, or is over"):
        getattr(desk, event)("us")


def test_aborting_what_never_began_does_nothing() -> None:
    assert Desk().abort("us") == []


def test_to_begin_twice_changes_nothing() -> None:
    desk = Desk()
    transaction = storing(desk)
    desk.machine.begin("us", b"us", TransactionInfo(b"another", b"", {}), StorageError("broken"))
    assert desk.get("us") is transaction
    assert (transaction.info, transaction.broken) == (INFO, None)


# Conflicts ------------------------------------------------------------------------------------------------


def test_conflicts_are_put_to_the_client() -> None:
    desk = Desk()
    transaction = preparing(desk)
    (reply,) = desk.conflicted(transaction, CONFLICT)
    assert reply == Reply(
        transaction, [{"oid": A, "serials": (p64(7), p64(5)), "data": b"conflicting"}]
    )  # fmt: skip


def test_the_locks_are_kept_while_the_client_resolves() -> None:
    desk = Desk()
    transaction = resolving(desk)
    assert desk.voted("other", A) == []
    desk.store("us")
    assert desk.vote("us") == [Prepare(transaction)]
    assert brief(desk.failed(transaction, StorageError("disk full"))) == ["Fail us", "Prepare other"]


def test_a_resolved_store_takes_the_place_of_the_one_that_met_the_conflict() -> None:
    desk = Desk()
    transaction = desk.begin("us")
    check = CheckCurrent(B, p64(5))
    for operation in (Store(A, p64(5), b"mine"), check, Store(B, p64(5), b"else")):
        desk.operate("us", operation)
    desk.vote("us")
    desk.conflicted(transaction, CONFLICT)
    desk.operate("us", Store(A, p64(7), b"both"))
    assert brief(desk.vote("us")) == ["Prepare us"]
    assert transaction.operations == [Store(A, p64(7), b"both"), check, Store(B, p64(5), b"else")]


@pytest.mark.parametrize(
    "operation",
    [Store(B, p64(5), b"x"), CheckCurrent(A, p64(7)), Delete(A, p64(7)), Undo(b"x"), Restore(A, b"x", None)],
    ids=lambda operation: type(operation).__name__,
)
def test_only_what_is_in_conflict_may_be_stored_again(operation: Operation) -> None:
    desk = Desk()
    resolving(desk)
    desk.operate("us", operation)
    actions = desk.vote("us")
    assert brief(actions) == ["Fail us"]
    assert "after the vote" in str(problems(actions)[0])
    assert desk.is_idle()


def test_a_conflict_is_resolved_once() -> None:
    desk = Desk()
    resolving(desk)
    desk.store("us", A, b"resolved")
    desk.store("us", A, b"again")
    assert brief(desk.vote("us")) == ["Fail us"]


def test_every_round_has_a_deadline_of_its_own() -> None:
    desk = Desk()
    transaction = resolving(desk)
    for _ in range(5):
        assert desk.later(TIMEOUT_S - 1) == []
        desk.store("us")
        desk.vote("us")
        desk.conflicted(transaction)
    assert brief(desk.later(TIMEOUT_S)) == ["Expire us"]


def test_the_ninth_round_with_conflicts_is_the_last() -> None:
    """A stock client gives up after nine votes, and finishes whatever the ninth answer was."""
    desk = Desk()
    transaction = preparing(desk)
    for _ in range(limits.RESOLUTION_ROUNDS - 1):
        assert brief(desk.conflicted(transaction)) == ["Reply us"]
        desk.store("us")
        assert brief(desk.vote("us")) == ["Prepare us"]
    (problem,) = problems(desk.conflicted(transaction))
    assert isinstance(problem, ConflictError)
    assert (problem.oid, problem.serials) == (A, (p64(7), p64(5)))
    with pytest.raises(StorageTransactionError):
        desk.finish("us")
    assert desk.is_idle()


def test_the_ninth_round_without_conflicts_commits() -> None:
    desk = Desk()
    transaction = preparing(desk)
    for _ in range(limits.RESOLUTION_ROUNDS - 1):
        desk.conflicted(transaction)
        desk.store("us")
        desk.vote("us")
    assert brief(desk.prepared(transaction)) == ["Reply us"]
    assert brief(desk.finish("us")) == ["Commit us"]
