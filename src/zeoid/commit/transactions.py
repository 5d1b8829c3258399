"""The transactions of one storage: their states, the locks they hold, their batches, their deadlines.

A pure machine: every method takes an event and returns the actions that follow, in the order in which they
must be carried out. Whoever carries them out reports back (`prepared`, `conflicted`, `failed`, `committed`),
and gets the next actions.

    state      operation   vote              finish      abort       deadline    outcome asked
    STORING    gathered    WAITING           refused     gone        –           gone: no
    WAITING    breaks it   refused           refused     gone, told  gone, told  gone, told: no
    PREPARING  breaks it   refused           refused     DOOMED      –           DOOMED: no
    RESOLVING  gathered    PREPARING         refused     gone        gone, told  gone: no
    PREPARED   breaks it   refused           FINISHING   gone        gone, told  gone: no
    FINISHING  too late    refused           refused     too late    –           when it is committed: its tid
    DOOMED     –           –                 –           –           –           –

A vote takes the locks of all objects that the transaction writes (exclusive) or depends on (shared), all at
once, and the transaction is WAITING until it has them: `locks` says in which order. The engine moves
PREPARING to PREPARED, RESOLVING (conflicts that the client is asked to resolve) or gone (failure), FINISHING
to gone (committed). What is gone is forgotten; what is DOOMED is forgotten, too, but for the engine, which
still works on it: its owner may use the id again. A broken transaction fails its vote, or its finish, with
the error that broke it: an operation is sent one-way, so the error can't be told at once. Every vote that was
accepted is answered once, also when its transaction is given up meanwhile.

Invariants:
 1. Whoever is PREPARING to FINISHING, or DOOMED, holds its locks; a transaction that can't be prepared beside
    others (undo, a copy with its own tid, an engine that is exclusive) holds the whole storage.
 2. Who waits for its client holding locks has a deadline. So has everybody who waits for locks.
 3. One batch is with the engine at a time. Tids are given out when a batch goes there, each later than all
    before (to exclusive engines at prepare: nothing else is under way then). Engines that are shared with
    others give the tids themselves: whoever reports `committed` has filled them in.
 4. For each transaction of a batch, in the order of tids: `Publish`, then the `Reply` that reveals its tid.
    Locks are released after that.
 5. Once an outcome was told it stays true: whom a "no" was told can't be begun again.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

from ZODB.POSException import ConflictError, StorageError, StorageTransactionError

from zeoid import limits
from zeoid.commit import batches, blobs, gathering, resolutions
from zeoid.commit.actions import (
    Abandon,
    Action,
    Commit,
    Decide,
    Expire,
    Fail,
    Prepare,
    Publish,
    Reply,
    State,
    Transaction,
)
from zeoid.commit.locks import Claim, Locks
from zeoid.commit.outcomes import DecidedOutcomes
from zeoid.commit.tids import next_tid
from zeoid.model import Conflict, Operation, Store, TransactionInfo, tid_after
from zeoid.ports import Outcomes, Prepared


class Transactions:
    """All transactions of one storage that are under way."""

    def __init__(
        self,
        last_tid: bytes,
        *,
        exclusive: bool = False,
        shared: bool = False,
        outcomes: Outcomes | None = None,
        timeout_s: float = limits.TRANSACTION_TIMEOUT_S,
        vote_wait_s: float = limits.VOTE_WAIT_S,
        transaction_bytes: int = limits.TRANSACTION_BYTES,
        per_owner: int = limits.TRANSACTIONS_PER_CONNECTION,
    ) -> None:
        #: The tid of the newest transaction that is committed and published.
        self.last_tid = last_tid
        self.timeout_s = timeout_s
        self._exclusive = exclusive
        self._shared = shared
        self._vote_wait_s = vote_wait_s
        self._transaction_bytes = transaction_bytes
        self._per_owner = per_owner
        self._all: dict[tuple[Any, Hashable], Transaction] = {}
        #: How many transactions each owner has.
        self._owned: dict[Any, int] = {}
        #: Those whose id their client made: it is unique, and names them on any connection.
        self._by_id: dict[bytes, Transaction] = {}
        self._locks = Locks()
        self._gathering: deque[Transaction] = deque()
        self._in_flight = False
        self._outcomes = DecidedOutcomes(outcomes or Outcomes(last_tid))

    # What the owner says --------------------------------------------------------------------------

    def begin(
        self, owner: Any, id: Hashable, info: TransactionInfo, problem: Exception | None = None
    ) -> None:
        """A transaction begins. With a *problem* it is broken from the start, and its vote will say why.

        Beginning it twice changes nothing, as in ZEO. StorageTransactionError when the owner has too many.
        """
        if (owner, id) not in self._all:
            if type(id) is bytes and (self._outcomes.is_over(id) or id in self._by_id):
                problem = StorageTransactionError("this transaction was begun before, or is over")
            transaction = Transaction(owner, id, info, broken=problem)
            transaction.size_bytes = gathering.begun(transaction)
            self._add(transaction)

    def operate(self, owner: Any, id: Hashable, *operations: Operation) -> None:
        """Gather operations. Whatever is wrong with them breaks the transaction.

        StorageTransactionError when it belongs to none and the owner has too many; then blobs stay with it.
        """
        transaction = self._all.get((owner, id))
        if transaction is None:
            early = StorageTransactionError("an operation before tpc_begin")
            transaction = Transaction(owner, id, _NOTHING, broken=early)
            self._add(transaction)
        elif transaction.state is State.STORING and transaction.broken is None:
            if gathering.count(transaction, operations, self._transaction_bytes):
                transaction.operations += operations
            return
        elif transaction.state is State.RESOLVING:
            for operation in operations:
                self._resolve(transaction, operation)
        elif transaction.broken is None:
            transaction.broken = StorageTransactionError("an operation after the vote")
        blobs.note(transaction, operations)

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
            resolutions.apply(transaction)
            transaction.state = State.PREPARING
            return [Prepare(transaction)]
        transaction.state = State.WAITING
        transaction.deadline_s = now_s + self._vote_wait_s
        transaction.claim = claim = self._claim(transaction)
        return [] if claim.missing else self._granted([claim], time_s)

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
        self._gathering.append(transaction)
        return self._next_batch(time_s)

    def abort(self, owner: Any, id: Hashable, now_s: float, time_s: float) -> list[Action]:
        """The owner gives it up. Too late once it is finishing; nothing if there is no such transaction."""
        transaction = self._all.get((owner, id))
        return [] if transaction is None else self._leave(transaction, time_s)

    def gone(self, owner: Any, now_s: float, time_s: float) -> list[Action]:
        """The owner's connection is lost: all its transactions are given up."""
        if owner not in self._owned:
            return []
        actions: list[Action] = []
        mine = [transaction for (whose, _), transaction in reversed(self._all.items()) if whose == owner]
        # Those that wait go first, the latest before the others: none must be given what another gives back.
        mine.sort(key=lambda each: (each.state is not State.WAITING, -each.deadline_s))
        for transaction in mine:
            if self._is_known(transaction):
                actions += self._leave(transaction, time_s)
        return actions

    def outcome(self, asker: Any, id: bytes, after: bytes, now_s: float, time_s: float) -> list[Action]:
        """*asker* lost its connection to the transaction *id*, which was begun when *after* was the last tid.

        If it can still be given up, it is, and never comes back. StorageError when it isn't known any more.
        """
        transaction = self._by_id.get(id)
        if transaction is not None and transaction.state is State.FINISHING:
            transaction.askers.append(asker)
            return []
        tid = self._outcomes.tid(id)
        if tid is not None:
            return [Decide(asker, tid)]
        if transaction is None and after < self._outcomes.floor and not self._outcomes.is_over(id):
            raise StorageError("the outcome of this transaction is not known any more: too many came later")
        self._outcomes.deny(id)
        leaving = [] if transaction is None else self._leave(transaction, time_s)
        return [*leaving, Decide(asker, None)]

    def expire(self, now_s: float, time_s: float) -> list[Action]:
        """Time has passed."""
        actions: list[Action] = []
        for late in [t for t in self._all.values() if _is_late(t, now_s)]:
            # One before it may have taken it along, or made way for it.
            if not self._is_known(late) or not _is_late(late, now_s):
                continue
            if late.state is State.WAITING:
                problem = ConflictError(
                    f"waited {self._vote_wait_s:g} s for transactions that hold the same objects"
                )
                actions += self._leave(late, time_s, problem)
            else:
                # Its owner's connection is dropped, so its other transactions are given up as well.
                actions += [Expire(late, late.state), *self.gone(late.owner, now_s, time_s)]
        return actions

    # What the engine says -------------------------------------------------------------------------

    def prepared(
        self, transaction: Transaction, prepared: Prepared, now_s: float, time_s: float
    ) -> list[Action]:
        """The engine has it prepared."""
        transaction.prepared = prepared
        if transaction.blobs:
            blobs.taken(transaction)
        if transaction.state is State.DOOMED:
            return [Abandon(transaction), *self._release(transaction, time_s)]
        transaction.state = State.PREPARED
        transaction.deadline_s = now_s + self.timeout_s
        transaction.operations.clear()
        return [Reply(transaction, list(prepared.resolved))]

    def conflicted(
        self, transaction: Transaction, conflicts: Sequence[Conflict], now_s: float, time_s: float
    ) -> list[Action]:
        """The engine prepared nothing, for these conflicts. The locks are kept while they are resolved."""
        transaction.rounds += 1
        if transaction.state is State.DOOMED:
            return self._release(transaction, time_s)
        if transaction.rounds >= limits.RESOLUTION_ROUNDS:
            problem = resolutions.refusal(transaction, conflicts[0])
            return [Fail(transaction, problem), *self._end(transaction, time_s)]
        transaction.state = State.RESOLVING
        transaction.deadline_s = now_s + self.timeout_s
        return [Reply(transaction, resolutions.ask(transaction, conflicts))]

    def failed(self, transaction: Transaction, problem: Exception, time_s: float) -> list[Action]:
        """The engine could not prepare it; nothing of it is left there."""
        if transaction.state is State.DOOMED:
            return self._release(transaction, time_s)
        return [Fail(transaction, problem), *self._end(transaction, time_s)]

    def committed(self, batch: Sequence[Transaction], time_s: float) -> list[Action]:
        """The engine has the batch durable. The next one goes first: the disk need not wait."""
        self.last_tid = batch[-1].tid
        self._in_flight = False
        actions = self._next_batch(time_s) if self._gathering else []
        for transaction in batch:
            actions += (Publish(transaction), Reply(transaction, transaction.tid))
            if transaction.askers:
                actions += [Decide(asker, transaction.tid) for asker in transaction.askers]
            if type(transaction.id) is bytes:
                self._outcomes.note(transaction.id, transaction.tid)
        for transaction in batch:
            actions += self._end(transaction, time_s)
        return actions

    def uncommitted(self, batch: Sequence[Transaction], problem: Exception, time_s: float) -> list[Action]:
        """A shared engine failed to commit, or to say that it has. Who asks for an outcome that isn't known,
        of a transaction that was begun before this, can't be told it; who has asked already gets no answer.
        """
        self._in_flight = False
        self._outcomes.floor = tid_after(self.last_tid)
        actions: list[Action] = []
        for transaction in batch:
            actions += [Fail(transaction, problem), *self._end(transaction, time_s)]
        return [*actions, *self._next_batch(time_s)]

    def others_committed(self, tid: bytes) -> None:
        """Somebody else wrote to the database of a shared engine."""
        self.last_tid = max(self.last_tid, tid)

    # What can be asked ----------------------------------------------------------------------------

    def find(self, owner: Any, id: Hashable) -> Transaction | None:
        return self._all.get((owner, id))

    def all(self) -> list[Transaction]:
        """Those under way, in the order in which they were begun."""
        return list(self._all.values())

    @property
    def active(self) -> int:
        """How many transactions are under way."""
        return len(self._all)

    @property
    def waiting(self) -> int:
        """How many votes wait for those before them."""
        return sum(transaction.state is State.WAITING for transaction in self._all.values())

    @property
    def locked_at(self) -> float | None:
        """Since when (seconds since the epoch) the one that has held its locks longest holds them."""
        return min((t.locked_at for t in self._all.values() if t.locked_at), default=None)

    # ----------------------------------------------------------------------------------------------

    def _add(self, transaction: Transaction) -> None:
        owner = transaction.owner
        owned = self._owned.get(owner, 0)
        if owned >= self._per_owner:
            raise StorageTransactionError(f"more than {self._per_owner} transactions on one connection")
        self._owned[owner] = owned + 1
        self._all[owner, transaction.id] = transaction
        if type(transaction.id) is bytes:
            self._by_id.setdefault(transaction.id, transaction)

    def _forget(self, transaction: Transaction) -> None:
        owner = transaction.owner
        del self._all[owner, transaction.id]
        if type(transaction.id) is bytes and self._by_id.get(transaction.id) is transaction:
            del self._by_id[transaction.id]
        if self._owned[owner] > 1:
            self._owned[owner] -= 1
        else:
            del self._owned[owner]

    def _is_known(self, transaction: Transaction) -> bool:
        return self._all.get((transaction.owner, transaction.id)) is transaction

    def _find(self, owner: Any, id: Hashable) -> Transaction:
        transaction = self._all.get((owner, id))
        if transaction is None:
            raise StorageTransactionError("no such transaction: it was not begun, or is over")
        return transaction

    def _resolve(self, transaction: Transaction, operation: Operation) -> None:
        """A resolved store answers a conflict."""
        if not isinstance(operation, Store) or operation.oid not in transaction.conflicts:
            transaction.broken = StorageTransactionError("an operation after the vote")
            return
        if transaction.broken is None and gathering.count(transaction, (operation,), self._transaction_bytes):
            resolutions.note(transaction, operation)

    def _claim(self, transaction: Transaction) -> Claim:
        # What an undo writes is known only when it is prepared.
        if self._exclusive or transaction.undoes or transaction.info.tid is not None:
            return self._locks.claim(transaction, (), whole=True)
        return self._locks.claim(transaction, *gathering.needs(transaction))

    def _granted(self, claims: Sequence[Claim], time_s: float) -> list[Action]:
        """These have got their locks: the engine may prepare them, and those after whoever fails."""
        actions: list[Action] = []
        granted = deque(claims)
        while granted:
            claim = granted.popleft()
            transaction: Transaction = claim.who
            wanted = transaction.info.tid
            problem = transaction.broken
            if problem is None and wanted is not None and wanted <= self.last_tid:
                problem = StorageError("a transaction can't be copied before later ones: its tid is too old")
            if problem is not None:
                self._forget(transaction)
                actions += (Fail(transaction, problem), *blobs.left(transaction))
                granted += self._locks.release(claim)
                continue
            transaction.locked_at = time_s
            transaction.state = State.PREPARING
            if self._exclusive and not self._shared:
                transaction.tid = wanted or next_tid(self.last_tid, time_s)
            actions.append(Prepare(transaction))
        return actions

    def _next_batch(self, time_s: float) -> list[Action]:
        """What has gathered goes to the engine, unless that is busy."""
        if self._in_flight or not self._gathering:
            return []
        self._in_flight = True
        return [Commit(batches.take(self._gathering, self.last_tid, time_s, gives_tids=self._shared))]

    def _release(self, transaction: Transaction, time_s: float) -> list[Action]:
        """Give its locks, or its place in the queues, to others. Nothing will come of its blobs."""
        claim = transaction.claim
        granted = None if claim is None else self._locks.release(claim)
        actions = blobs.left(transaction) if transaction.blobs else []
        return [*actions, *self._granted(granted, time_s)] if granted else actions

    def _end(self, transaction: Transaction, time_s: float) -> list[Action]:
        self._forget(transaction)
        return self._release(transaction, time_s)

    def _leave(
        self, transaction: Transaction, time_s: float, problem: Exception | None = None
    ) -> list[Action]:
        """Give it up, whatever its state. A vote that has no answer yet gets *problem*."""
        match transaction.state:
            case State.STORING | State.RESOLVING:
                return self._end(transaction, time_s)
            case State.WAITING:
                told = Fail(transaction, problem or StorageTransactionError("the transaction was aborted"))
                return [told, *self._end(transaction, time_s)]
            case State.PREPARING:
                self._forget(transaction)
                transaction.state = State.DOOMED
                return [Fail(transaction, problem or StorageTransactionError("the transaction was aborted"))]
            case State.PREPARED:
                return [Abandon(transaction), *self._end(transaction, time_s)]
            case _:
                return []


_NOTHING = TransactionInfo(b"", b"", {})
#: Who waits for its client, or for others, has a deadline.
_TIMED = (State.WAITING, State.RESOLVING, State.PREPARED)


def _is_late(transaction: Transaction, now_s: float) -> bool:
    return transaction.state in _TIMED and transaction.deadline_s <= now_s
