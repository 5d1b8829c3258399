"""A desk for the tests: the machine of transactions with a clock of its own, and the way to each state.

Must not know what the tests expect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ZODB.utils import p64

from zeoid.commit.actions import Action, Commit, Decide, Discard, Fail, Prepare, Reply, State, Transaction
from zeoid.commit.transactions import Transactions
from zeoid.model import NO_TID, CheckCurrent, Conflict, Operation, Store, TransactionInfo, Undo
from zeoid.ports import Prepared

A, B, C = p64(1), p64(2), p64(3)
INFO = TransactionInfo(b"user", b"description", {})
NOON = 1_700_000_000.0
TIMEOUT_S = 30.0
VOTE_WAIT_S = 100.0
CONFLICT = Conflict(A, p64(7), p64(5), b"conflicting")


def copied(tid: bytes) -> TransactionInfo:
    """What a transaction that was copied from elsewhere says of itself."""
    return TransactionInfo(b"", b"", {}, tid)


class Desk:
    """A machine with a clock that the test moves: events in, actions out.

    Where no id is given the owner's name is the id.
    """

    def __init__(self, last_tid: bytes = NO_TID, **bounds: Any) -> None:
        self.now_s = 0.0
        bounds = {"timeout_s": TIMEOUT_S, "vote_wait_s": VOTE_WAIT_S, **bounds}
        self.machine = Transactions(last_tid, **bounds)

    @property
    def times(self) -> tuple[float, float]:
        return self.now_s, NOON + self.now_s

    # What owners say ------------------------------------------------------------------------------

    def begin(self, owner: str, id: Any = None, info: TransactionInfo = INFO) -> Transaction:
        self.machine.begin(owner, _id(owner, id), info)
        return self.get(owner, id)

    def find(self, owner: str, id: Any = None) -> Transaction | None:
        return self.machine.find(owner, _id(owner, id))

    def get(self, owner: str, id: Any = None) -> Transaction:
        transaction = self.find(owner, id)
        assert transaction is not None
        return transaction

    def operate(self, owner: str, operation: Operation, id: Any = None) -> None:
        self.machine.operate(owner, _id(owner, id), operation)

    def store(self, owner: str, oid: bytes = A, data: bytes = b"data", id: Any = None) -> None:
        self.operate(owner, Store(oid, NO_TID, data), id)

    def check(self, owner: str, oid: bytes, id: Any = None) -> None:
        self.operate(owner, CheckCurrent(oid, NO_TID), id)

    def break_(self, owner: str, problem: Exception, id: Any = None) -> None:
        self.machine.break_(owner, _id(owner, id), problem)

    def vote(self, owner: str, id: Any = None) -> list[Action]:
        return self.machine.vote(owner, _id(owner, id), *self.times)

    def finish(self, owner: str, id: Any = None) -> list[Action]:
        return self.machine.finish(owner, _id(owner, id), *self.times)

    def abort(self, owner: str, id: Any = None) -> list[Action]:
        return self.machine.abort(owner, _id(owner, id), *self.times)

    def gone(self, owner: str) -> list[Action]:
        return self.machine.gone(owner, *self.times)

    def outcome(self, id: bytes, after: bytes = NO_TID, asker: str = "asker") -> list[Action]:
        return self.machine.outcome(asker, id, after, *self.times)

    def later(self, seconds: float) -> list[Action]:
        self.now_s += seconds
        return self.machine.expire(*self.times)

    # What the engine says -------------------------------------------------------------------------

    def prepared(
        self, transaction: Transaction, oids: Sequence[bytes] = (A,), resolved: Sequence[bytes] = ()
    ) -> list[Action]:
        return self.machine.prepared(transaction, Prepared((), oids, resolved), *self.times)

    def conflicted(self, transaction: Transaction, *conflicts: Conflict) -> list[Action]:
        return self.machine.conflicted(transaction, conflicts or (CONFLICT,), *self.times)

    def failed(self, transaction: Transaction, problem: Exception) -> list[Action]:
        return self.machine.failed(transaction, problem, NOON + self.now_s)

    def committed(self, *batch: Transaction) -> list[Action]:
        return self.machine.committed(batch, NOON + self.now_s)

    # Several steps at once ------------------------------------------------------------------------

    def voted(self, owner: str, *oids: bytes, id: Any = None) -> list[Action]:
        """Begin, store *oids*, vote: what the vote causes."""
        self.begin(owner, id)
        for oid in oids:
            self.store(owner, oid, id=id)
        return self.vote(owner, id)

    def hold(self, owner: str, *oids: bytes, id: Any = None) -> Transaction:
        """A transaction of *owner* that has written *oids* and is prepared."""
        assert brief(self.voted(owner, *oids, id=id)) == [f"Prepare {owner}"]
        transaction = self.get(owner, id)
        self.prepared(transaction, oids)
        return transaction

    def commit(self, owner: str, oid: bytes = A, id: Any = None) -> bytes:
        transaction = self.hold(owner, oid, id=id)
        assert self.finish(owner, id) == [Commit([transaction])]
        self.committed(transaction)
        return transaction.tid

    def is_idle(self) -> bool:
        """Whether nothing is under way, and somebody who wants the whole storage gets it at once."""
        if (self.machine.active, self.machine.waiting, self.machine.locked_at) != (0, 0, None):
            return False
        probe = self.begin("probe", 0)
        self.operate("probe", Undo(b""), 0)
        is_free = self.vote("probe", 0) == [Prepare(probe)]
        if is_free:
            self.failed(probe, AssertionError())
        return is_free


def _id(owner: str, id: Any) -> Any:
    return owner.encode() if id is None else id


def brief(actions: Sequence[Action]) -> list[str]:
    """Actions as words: what is done, and to whose transaction, or for whom."""
    words = []
    for action in actions:
        match action:
            case Commit(batch):
                whom = " ".join(transaction.owner for transaction in batch)
            case Decide(asker, tid):
                whom = f"{asker}: {'no' if tid is None else 'yes'}"
            case Discard(blobs):
                whom = " ".join(blob.name.decode() for blob in blobs)
            case _:
                whom = action.transaction.owner
        words.append(f"{type(action).__name__} {whom}")
    return words


def problems(actions: Sequence[Action]) -> list[Exception]:
    return [action.problem for action in actions if isinstance(action, Fail)]


# The way to each state --------------------------------------------------------------------------------


def storing(desk: Desk) -> Transaction:
    transaction = desk.begin("us")
    desk.store("us")
    return transaction


def waiting(desk: Desk) -> Transaction:
    """Another one holds what we need, and is prepared."""
    desk.hold("other", A)
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
    assert desk.finish("us") == [Commit([transaction])]
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
