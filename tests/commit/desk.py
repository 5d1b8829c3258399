"""A desk for the tests: the machine of transactions with a clock of its own, and the way to each state.

Must not know what the tests expect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ZODB.utils import p64

from zeoid.commit.transactions import (
    Action,
    Fail,
    Finish,
    Prepare,
    Reply,
    State,
    Transaction,
    Transactions,
)
from zeoid.model import (
    NO_TID,
    Conflict,
    Operation,
    Store,
    TransactionInfo,
)

A, B = p64(1), p64(2)
INFO = TransactionInfo(b"user", b"description", {})
NOON = 1_700_000_000.0
TIMEOUT_S = 30.0
VOTE_WAIT_S = 100.0


class Desk:
    """A machine with a clock that the test moves: events in, names of actions out."""

    def __init__(self, last_tid: bytes = NO_TID, **bounds: Any) -> None:
        self.now_s = 0.0
        bounds = {"timeout_s": TIMEOUT_S, "vote_wait_s": VOTE_WAIT_S, **bounds}
        self.machine = Transactions(last_tid, **bounds)

    @property
    def times(self) -> tuple[float, float]:
        return self.now_s, NOON + self.now_s

    def begin(self, owner: str, id: Any = 1, info: TransactionInfo = INFO) -> Transaction:
        self.machine.begin(owner, id, info)
        return self.get(owner, id)

    def get(self, owner: str, id: Any = 1) -> Transaction:
        transaction = self.machine.find(owner, id)
        assert transaction is not None
        return transaction

    def operate(self, owner: str, operation: Operation, id: Any = 1) -> None:
        self.machine.operate(owner, id, operation)

    def store(self, owner: str, oid: bytes = A, data: bytes = b"data", id: Any = 1) -> None:
        self.operate(owner, Store(oid, NO_TID, data), id)

    def vote(self, owner: str, id: Any = 1) -> list[Action]:
        return self.machine.vote(owner, id, *self.times)

    def finish(self, owner: str, id: Any = 1) -> list[Action]:
        return self.machine.finish(owner, id, *self.times)

    def abort(self, owner: str, id: Any = 1) -> list[Action]:
        return self.machine.abort(owner, id, *self.times)

    def gone(self, owner: str) -> list[Action]:
        return self.machine.gone(owner, *self.times)

    def later(self, seconds: float) -> list[Action]:
        self.now_s += seconds
        return self.machine.expire(*self.times)

    def prepared(self, transaction: Transaction, oids: tuple[bytes, ...] = (A,)) -> list[Action]:
        return self.machine.prepared(transaction, oids, (), *self.times)

    def conflicted(self, transaction: Transaction, *conflicts: Conflict) -> list[Action]:
        return self.machine.conflicted(transaction, conflicts or (CONFLICT,), *self.times)

    def failed(self, transaction: Transaction, problem: Exception) -> list[Action]:
        return self.machine.failed(transaction, problem, NOON + self.now_s)

    def finished(self, transaction: Transaction) -> list[Action]:
        return self.machine.finished(transaction, NOON + self.now_s)

    def commit(self, owner: str, id: Any = 1) -> bytes:
        transaction = self.begin(owner, id)
        self.store(owner, id=id)
        self.vote(owner, id)
        self.prepared(transaction)
        self.finish(owner, id)
        self.finished(transaction)
        return transaction.tid


CONFLICT = Conflict(A, p64(7), p64(5), b"conflicting")


def brief(actions: list[Action]) -> list[str]:
    """Actions as words: what is done, and to whose transaction."""
    return [f"{type(action).__name__} {action.transaction.owner}" for action in actions]


def problems(actions: list[Action]) -> list[Exception]:
    return [action.problem for action in actions if isinstance(action, Fail)]


def storing(desk: Desk) -> Transaction:
    transaction = desk.begin("us")
    desk.store("us")
    return transaction


def waiting(desk: Desk) -> Transaction:
    holder = desk.begin("other")
    desk.vote("other")
    desk.prepared(holder)
    transaction = storing(desk)
    assert desk.vote("us") == []
    return transaction


def preparing(desk: Desk) -> Transaction:
    transaction = storing(desk)
    assert desk.vote("us") == [Prepare(transaction)]
    return transaction


def resolving(desk: Desk) -> Transaction:
    transaction = preparing(desk)
    assert brief(desk.conflicted(transaction)) == ["Reply us"]
    return transaction


def prepared(desk: Desk) -> Transaction:
    transaction = preparing(desk)
    assert desk.prepared(transaction) == [Reply(transaction, [])]
    return transaction


def finishing(desk: Desk) -> Transaction:
    transaction = prepared(desk)
    assert desk.finish("us") == [Finish(transaction)]
    return transaction


def doomed(desk: Desk) -> Transaction:
    transaction = preparing(desk)
    assert brief(desk.abort("us")) == ["Fail us"]
    return transaction


STATES: dict[State, Callable[[Desk], Transaction]] = {
    State.STORING: storing,
    State.WAITING: waiting,
    State.PREPARING: preparing,
    State.RESOLVING: resolving,
    State.PREPARED: prepared,
    State.FINISHING: finishing,
    State.DOOMED: doomed,
}
