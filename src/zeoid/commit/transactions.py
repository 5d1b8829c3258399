"""The transactions of one storage: their states, the order in which they are prepared, their deadlines.

A pure machine: every method takes an event and returns the actions that follow, in the order in which they
must be carried out. Whoever carries them out reports back (`prepared`, `conflicted`, `failed`,
`finished`), and gets the next actions.

    state      operation   vote              finish      abort       deadline
    STORING    gathered    WAITING           refused     gone        –
    WAITING    breaks it   refused           refused     gone, told  gone, told
    PREPARING  breaks it   refused           refused     DOOMED      –
    RESOLVING  gathered    PREPARING         refused     gone        gone, told
    PREPARED   breaks it   refused           FINISHING   gone        gone, told
    FINISHING  too late    refused           refused     too late    –
    DOOMED     –           –                 –           –           –

The engine moves PREPARING to PREPARED, RESOLVING (conflicts that the client is asked to resolve) or gone
(failure), FINISHING to gone (committed). What is gone is forgotten; what is DOOMED is forgotten, too, but for
the engine, which still works on it: its owner may use the id again. A broken transaction fails its vote, or
its finish, with the error that broke it: an operation is sent one-way, so the error can't be told at once.
Every vote that was accepted is answered once, also when its transaction is given up meanwhile.

Invariants:
 1. At most one transaction is PREPARING, RESOLVING, PREPARED, FINISHING or DOOMED: the holder. The others
    wait in the order of their votes. (One lock for the storage: this class is the place to change that.)
 2. A holder that waits for its client has a deadline. So has everybody who waits.
 3. Tids are assigned to the holder only, each later than the last committed one.
 4. `Publish` comes before the `Reply` that reveals its tid.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ZODB.POSException import ConflictError, StorageError, StorageTransactionError

from zeoid import limits
from zeoid.commit.tids import next_tid
from zeoid.model import Conflict, Operation, Restore, Store, TransactionInfo


class State(Enum):
    """See the table above."""

    STORING = "storing"
    WAITING = "waiting"
    PREPARING = "preparing"
    RESOLVING = "resolving conflicts"
    PREPARED = "prepared"
    FINISHING = "finishing"
    DOOMED = "doomed"


@dataclass(slots=True, eq=False)
class Transaction:
    """One transaction of one client, from its begin to its end."""

    owner: Any
    id: Hashable
    info: TransactionInfo
    state: State = State.STORING
    operations: list[Operation] = field(default_factory=list)
    size_bytes: int = 0
    broken: Exception | None = None
    rounds: int = 0
    conflicts: dict[bytes, Conflict] = field(default_factory=dict)
    tid: bytes = b""
    oids: Sequence[bytes] = ()
    resolved: Sequence[bytes] = ()
    deadline_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prepare:
    """Have the engine prepare it; report `prepared`, `conflicted` or `failed`."""

    transaction: Transaction


@dataclass(frozen=True, slots=True)
class Finish:
    """Have the engine finish it; report `finished`. If that fails, the storage can't go on."""

    transaction: Transaction


@dataclass(frozen=True, slots=True)
class Abandon:
    """Have the engine forget what it prepared."""

    transaction: Transaction


@dataclass(frozen=True, slots=True)
class Publish:
    """The transaction is durable: show its tid to readers and tell every client but its owner."""

    transaction: Transaction


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the owner's vote or finish."""

    transaction: Transaction
    value: Any


@dataclass(frozen=True, slots=True)
class Fail:
    """Answer the owner's vote or finish with an error."""

    transaction: Transaction
    problem: Exception


@dataclass(frozen=True, slots=True)
class Expire:
    """The owner kept others waiting for too long: log it and drop its connection."""

    transaction: Transaction
    state: State


Action = Prepare | Finish | Abandon | Publish | Reply | Fail | Expire

#: What an operation takes in memory besides its data, so that many small ones count, too.
_OPERATION_BYTES = 200


class Transactions:
    """All transactions of one storage that are under way."""

    def __init__(
        self,
        last_tid: bytes,
        *,
        timeout_s: float = limits.TRANSACTION_TIMEOUT_S,
        vote_wait_s: float = limits.VOTE_WAIT_S,
        transaction_bytes: int = limits.TRANSACTION_BYTES,
        per_owner: int = limits.TRANSACTIONS_PER_CONNECTION,
    ) -> None:
        self.last_tid = last_tid
        self.timeout_s = timeout_s
        self._vote_wait_s = vote_wait_s
        self._transaction_bytes = transaction_bytes
        self._per_owner = per_owner
        self._all: dict[tuple[Any, Hashable], Transaction] = {}
        self._queue: deque[Transaction] = deque()
        self.holder: Transaction | None = None

    # What the owner says --------------------------------------------------------------------------

    def begin(
        self, owner: Any, id: Hashable, info: TransactionInfo, problem: Exception | None = None
    ) -> None:
        """A transaction begins. With a *problem* it is broken from the start, and its vote will say why.

        Beginning it twice changes nothing, as in ZEO. StorageTransactionError when the owner has too many.
        """
        if (owner, id) not in self._all:
            self._add(Transaction(owner, id, info, broken=problem))

    def operate(self, owner: Any, id: Hashable, operation: Operation) -> None:
        """Gather an operation. Whatever is wrong with it breaks the transaction.

        StorageTransactionError when it belongs to none and the owner has too many.
        """
        transaction = self._all.get((owner, id))
        if transaction is None:
            early = StorageTransactionError("an operation before tpc_begin")
            self._add(Transaction(owner, id, _NOTHING, broken=early))
        elif transaction.state is State.STORING:
            self._gather(transaction, operation)
        elif transaction.state is State.RESOLVING:
            self._resolve(transaction, operation)
        elif transaction.broken is None:
            transaction.broken = StorageTransactionError("an operation after the vote")

    def break_(self, owner: Any, id: Hashable, problem: Exception) -> None:
        """An operation of this transaction could not even be understood.

        StorageTransactionError when there is no such transaction and the owner has too many.
        """
        transaction = self._all.get((owner, id))
        if transaction is None:
            self._add(Transaction(owner, id, _NOTHING, broken=problem))
        elif transaction.broken is None:
            transaction.broken = problem

    def vote(self, owner: Any, id: Hashable, now_s: float, time_s: float) -> list[Action]:
        """The owner wants it prepared. *now_s* is monotonic, *time_s* is the time of day.

        StorageTransactionError when it can't be voted on now; otherwise a Reply or Fail follows, maybe
        later.
        """
        transaction = self._find(owner, id)
        if transaction.state not in (State.STORING, State.RESOLVING):
            raise StorageTransactionError(f"vote on a transaction that is {transaction.state.value}")
        if transaction.broken is not None:
            return [Fail(transaction, transaction.broken), *self._leave(transaction, time_s)]
        if transaction.state is State.RESOLVING:
            return [self._prepare(transaction, time_s)]
        transaction.state = State.WAITING
        transaction.deadline_s = now_s + self._vote_wait_s
        self._queue.append(transaction)
        return self._next(time_s)

    def finish(self, owner: Any, id: Hashable, now_s: float, time_s: float) -> list[Action]:
        """The owner wants it committed. StorageTransactionError unless it is prepared."""
        transaction = self._find(owner, id)
        if transaction.state is not State.PREPARED:
            raise StorageTransactionError(f"finish of a transaction that is {transaction.state.value}")
        if transaction.broken is not None:
            problem = transaction.broken
            leaving = self._leave(transaction, time_s)
            return [Fail(transaction, problem), *leaving]
        transaction.state = State.FINISHING
        return [Finish(transaction)]

    def abort(self, owner: Any, id: Hashable, now_s: float, time_s: float) -> list[Action]:
        """The owner gives it up. Too late once it is finishing; nothing if there is no such transaction."""
        transaction = self._all.get((owner, id))
        return [] if transaction is None else self._leave(transaction, time_s)

    def gone(self, owner: Any, now_s: float, time_s: float) -> list[Action]:
        """The owner's connection is lost: all its transactions are given up."""
        actions: list[Action] = []
        mine = [t for (whose, _), t in self._all.items() if whose == owner]
        # The holder last: when it leaves, the lock goes to one that waits, which must not be one of these.
        for transaction in sorted(mine, key=lambda each: each is self.holder):
            actions += self._leave(transaction, time_s)
        return actions

    def expire(self, now_s: float, time_s: float) -> list[Action]:
        """Time has passed."""
        actions: list[Action] = []
        holder = self.holder
        if (
            holder is not None
            and holder.state in (State.RESOLVING, State.PREPARED)
            and holder.deadline_s <= now_s
        ):
            # Its owner's connection is dropped, so its other transactions are given up as well.
            actions += [Expire(holder, holder.state), *self.gone(holder.owner, now_s, time_s)]
        for waiting in [t for t in self._queue if t.deadline_s <= now_s]:
            problem = ConflictError(f"waited {self._vote_wait_s:g} s for the transactions before this one")
            actions += self._leave(waiting, time_s, problem)
        return actions

    # What the engine says -------------------------------------------------------------------------

    def prepared(
        self,
        transaction: Transaction,
        oids: Sequence[bytes],
        resolved: Sequence[bytes],
        now_s: float,
        time_s: float,
    ) -> list[Action]:
        """The engine has it prepared, writing *oids*, of which *resolved* became other data than sent."""
        if transaction.state is State.DOOMED:
            return [Abandon(transaction), *self._release(transaction, time_s)]
        transaction.state = State.PREPARED
        transaction.deadline_s = now_s + self.timeout_s
        transaction.oids = oids
        transaction.resolved = resolved
        return [Reply(transaction, list(resolved))]

    def conflicted(
        self, transaction: Transaction, conflicts: Sequence[Conflict], now_s: float, time_s: float
    ) -> list[Action]:
        """The engine prepared nothing, for these conflicts. The lock is kept while they are resolved."""
        transaction.rounds += 1
        if transaction.state is State.DOOMED:
            return self._release(transaction, time_s)
        if transaction.rounds >= limits.RESOLUTION_ROUNDS:
            first = conflicts[0]
            problem = ConflictError(oid=first.oid, serials=(first.committed, first.read))
            return [Fail(transaction, problem), *self._release(transaction, time_s)]
        transaction.state = State.RESOLVING
        transaction.deadline_s = now_s + self.timeout_s
        transaction.conflicts = {conflict.oid: conflict for conflict in conflicts}
        asked = [
            {"oid": c.oid, "serials": (c.committed, c.read), "data": c.data} for c in conflicts
        ]  # fmt: skip
        return [Reply(transaction, asked)]

    def failed(self, transaction: Transaction, problem: Exception, time_s: float) -> list[Action]:
        """The engine could not prepare it; nothing of it is left there."""
        if transaction.state is State.DOOMED:
            return self._release(transaction, time_s)
        return [Fail(transaction, problem), *self._release(transaction, time_s)]

    def finished(self, transaction: Transaction, time_s: float) -> list[Action]:
        """The engine has it durable."""
        self.last_tid = transaction.tid
        return [
            Publish(transaction),
            Reply(transaction, transaction.tid),
            *self._release(transaction, time_s),
        ]

    # What can be asked ----------------------------------------------------------------------------

    def find(self, owner: Any, id: Hashable) -> Transaction | None:
        return self._all.get((owner, id))

    @property
    def active(self) -> int:
        """How many transactions are under way."""
        return len(self._all)

    @property
    def waiting(self) -> int:
        """How many votes wait for those before them."""
        return len(self._queue)

    # ----------------------------------------------------------------------------------------------

    def _add(self, transaction: Transaction) -> None:
        owner = transaction.owner
        if sum(1 for key in self._all if key[0] == owner) >= self._per_owner:
            raise StorageTransactionError(f"more than {self._per_owner} transactions on one connection")
        self._all[owner, transaction.id] = transaction

    def _find(self, owner: Any, id: Hashable) -> Transaction:
        transaction = self._all.get((owner, id))
        if transaction is None:
            raise StorageTransactionError("no such transaction: it was not begun, or is over")
        return transaction

    def _gather(self, transaction: Transaction, operation: Operation) -> None:
        if transaction.broken is None and self._has_room(transaction, operation):
            transaction.operations.append(operation)

    def _has_room(self, transaction: Transaction, operation: Operation) -> bool:
        transaction.size_bytes += _OPERATION_BYTES
        if isinstance(operation, (Store, Restore)) and operation.data is not None:
            transaction.size_bytes += len(operation.data)
        if transaction.size_bytes <= self._transaction_bytes:
            return True
        transaction.broken = StorageError(f"the transaction is larger than {self._transaction_bytes:,} bytes")
        transaction.operations.clear()
        return False

    def _resolve(self, transaction: Transaction, operation: Operation) -> None:
        """A resolved store takes the place of the one that met the conflict."""
        if not isinstance(operation, Store) or operation.oid not in transaction.conflicts:
            transaction.broken = StorageTransactionError("an operation after the vote")
            return
        if transaction.broken is not None or not self._has_room(transaction, operation):
            return
        for index, known in enumerate(transaction.operations):
            if isinstance(known, Store) and known.oid == operation.oid:
                transaction.operations[index] = operation
        del transaction.conflicts[operation.oid]

    def _prepare(self, transaction: Transaction, time_s: float) -> Action:
        transaction.state = State.PREPARING
        transaction.tid = transaction.info.tid or next_tid(self.last_tid, time_s)
        return Prepare(transaction)

    def _next(self, time_s: float) -> list[Action]:
        """Whoever voted first gets the lock when it is free."""
        actions: list[Action] = []
        while self.holder is None and self._queue:
            transaction = self._queue.popleft()
            wanted = transaction.info.tid
            if transaction.broken is not None:
                del self._all[transaction.owner, transaction.id]
                actions.append(Fail(transaction, transaction.broken))
            elif wanted is not None and wanted <= self.last_tid:
                del self._all[transaction.owner, transaction.id]
                problem = StorageError("a transaction can't be copied before later ones: its tid is too old")
                actions.append(Fail(transaction, problem))
            else:
                self.holder = transaction
                actions.append(self._prepare(transaction, time_s))
        return actions

    def _release(self, transaction: Transaction, time_s: float) -> list[Action]:
        if transaction.state is not State.DOOMED:
            del self._all[transaction.owner, transaction.id]
        self.holder = None
        return self._next(time_s)

    def _leave(
        self, transaction: Transaction, time_s: float, problem: Exception | None = None
    ) -> list[Action]:
        """Give it up, whatever its state. A vote that has no answer yet gets *problem*."""
        match transaction.state:
            case State.STORING:
                del self._all[transaction.owner, transaction.id]
                return []
            case State.WAITING:
                del self._all[transaction.owner, transaction.id]
                self._queue.remove(transaction)
                return [Fail(transaction, problem or StorageTransactionError("the transaction was aborted"))]
            case State.PREPARING:
                del self._all[transaction.owner, transaction.id]
                transaction.state = State.DOOMED
                return [Fail(transaction, problem or StorageTransactionError("the transaction was aborted"))]
            case State.RESOLVING:
                return self._release(transaction, time_s)
            case State.PREPARED:
                return [Abandon(transaction), *self._release(transaction, time_s)]
            case _:
                return []


_NOTHING = TransactionInfo(b"", b"", {})
