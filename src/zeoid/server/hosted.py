"""One storage of a server: its engine, its transactions, its clients, and its invalidation log.

Carries out what `commit.transactions` decides. All of it runs on the event loop's thread; an engine's work
goes to a thread only while a pack holds the engine's locks for long. Knows sessions by four methods only
(see `Client`), so that tests can pass anything that has them.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ZODB.POSException import ConflictError, ReadOnlyError

from zeoid import limits
from zeoid.commit.invalidations import InvalidationLog
from zeoid.commit.transactions import (
    Abandon,
    Action,
    Expire,
    Fail,
    Finish,
    Prepare,
    Publish,
    Reply,
    Transaction,
    Transactions,
)
from zeoid.model import Conflict
from zeoid.ports import Clock, Engine, Prepared
from zeoid.server.visible import Visible

log = logging.getLogger("zeoid.server")
#: Where people who come from ZEO look for this one line.
timeout_log = logging.getLogger("ZEO.StorageServer")


class Client(Protocol):
    """What a hosted storage needs of a session."""

    label: str

    def answer(self, transaction: Transaction, value: Any) -> None: ...

    def refuse(self, transaction: Transaction, problem: Exception) -> None: ...

    def tell(self, name: str, *args: Any) -> None: ...

    def drop(self, reason: str) -> None: ...


#: What is called with the result of work in a thread, or with the exception.
Done = Callable[[Any, BaseException | None], None]
#: Runs the first function in a thread, then calls the second on the loop.
RunInThread = Callable[[Callable[[], Any], Done], None]


@dataclass(slots=True)
class Counts:
    """What server_status reports, since the start."""

    loads: int = 0
    stores: int = 0
    commits: int = 0
    aborts: int = 0
    conflicts: int = 0
    conflicts_resolved: int = 0


class Hosted:
    """A storage that a server serves under a name."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        clock: Clock,
        run_in_thread: RunInThread,
        on_fatal: Callable[[str], None],
        *,
        read_only: bool = False,
        transaction_timeout_s: float = limits.TRANSACTION_TIMEOUT_S,
        invalidation_log_transactions: int = limits.INVALIDATION_LOG_TRANSACTIONS,
    ) -> None:
        self.name = name
        self.engine = engine
        self.read_only = read_only or engine.read_only
        self.clock = clock
        self.visible = Visible(engine)
        self.counts = Counts()
        self.clients: set[Client] = set()
        self.transactions = Transactions(self.visible.tid, timeout_s=transaction_timeout_s)
        self.invalidations = InvalidationLog(
            self.visible.tid,
            engine.last_invalidations(min(limits.INVALIDATION_LOG_AT_START, invalidation_log_transactions)),
            transactions=invalidation_log_transactions,
        )
        self._run_in_thread = run_in_thread
        self._on_fatal = on_fatal
        self._todo: deque[Action] = deque()
        self._performing = False
        self._packing = False
        self._in_thread = 0
        self._failed = ""
        self._locked_at: float | None = None
        self._started = time.ctime(clock.time())

    # Transactions ---------------------------------------------------------------------------------

    def vote(self, client: Client, id: Any) -> None:
        self.perform(self.transactions.vote(client, id, *self._now()))

    def finish(self, client: Client, id: Any) -> None:
        self.perform(self.transactions.finish(client, id, *self._now()))

    def abort(self, client: Client, id: Any) -> None:
        if self.transactions.find(client, id) is not None:
            self.counts.aborts += 1
            self.perform(self.transactions.abort(client, id, *self._now()))

    def disconnected(self, client: Client) -> None:
        self.clients.discard(client)
        self.perform(self.transactions.gone(client, *self._now()))

    def tick(self) -> None:
        """Time has passed: see to the deadlines."""
        self.perform(self.transactions.expire(*self._now()))

    def _now(self) -> tuple[float, float]:
        return self.clock.monotonic(), self.clock.time()

    def perform(self, actions: Iterable[Action]) -> None:
        """Carry out actions and all that follow from them, in order.

        What carrying one out causes (a client that is dropped gives up its transactions) comes after it.
        """
        self._todo.extend(actions)
        if self._performing:
            return
        self._performing = True
        try:
            self._perform_all()
        finally:
            self._performing = False
        holder = self.transactions.holder
        if holder is None:
            self._locked_at = None
        elif self._locked_at is None:
            self._locked_at = self.clock.time()

    def _perform_all(self) -> None:
        todo = self._todo
        while todo:
            match todo.popleft():
                case Prepare(transaction):
                    todo.extendleft(reversed(self._prepare(transaction)))
                case Finish(transaction):
                    todo.extendleft(reversed(self._finish(transaction)))
                case Abandon():
                    self._engine_call(self.engine.abandon, self._abandoned)
                case Publish(transaction):
                    self._publish(transaction)
                case Reply(transaction, value):
                    transaction.owner.answer(transaction, value)
                case Fail(transaction, problem):
                    self.counts.conflicts += isinstance(problem, ConflictError)
                    transaction.owner.refuse(transaction, problem)
                case Expire(transaction, state):
                    self._expire(transaction, state.value)

    def _prepare(self, transaction: Transaction) -> list[Action]:
        def work() -> Prepared:
            return self.engine.prepare(transaction.tid, transaction.info, transaction.operations)

        def done(prepared: Prepared | None, problem: BaseException | None) -> list[Action]:
            if problem is not None:
                return self._prepare_failed(transaction, problem)
            assert prepared is not None
            if prepared.conflicts:
                return self._conflicted(transaction, list(prepared.conflicts))
            self.counts.conflicts_resolved += transaction.rounds > 0
            return self.transactions.prepared(transaction, prepared.oids, prepared.resolved, *self._now())

        return self._engine_call(work, done)

    def _prepare_failed(self, transaction: Transaction, problem: BaseException) -> list[Action]:
        if not isinstance(problem, Exception):
            raise problem
        return self.transactions.failed(transaction, problem, self.clock.time())

    def _conflicted(self, transaction: Transaction, conflicts: list[Conflict]) -> list[Action]:
        self.counts.conflicts += 1
        return self.transactions.conflicted(transaction, conflicts, *self._now())

    def _finish(self, transaction: Transaction) -> list[Action]:
        def done(_: Any, problem: BaseException | None) -> list[Action]:
            if problem is not None:
                # What is on the disk can't be known: whoever guesses loses data.
                self._fail(f"storage {self.name!r} failed to finish a transaction: {problem!r}")
                return []
            self.counts.commits += 1
            return self.transactions.finished(transaction, self.clock.time())

        return self._engine_call(self.engine.finish, done)

    def _abandoned(self, _: Any, problem: BaseException | None) -> list[Action]:
        if problem is not None:
            self._fail(f"storage {self.name!r} failed to abandon a transaction: {problem!r}")
        return []

    def _fail(self, reason: str) -> None:
        self._failed = reason
        self._on_fatal(reason)

    def _engine_call(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], list[Action]]
    ) -> list[Action]:
        """Have the engine do *work*; the actions that *done* makes of the result now, or () if later."""
        if self._failed:
            return []
        if self._packing or self._in_thread:
            # A pack holds the storage's commit lock while it copies what was committed meanwhile. What
            # went to the thread keeps its place before what comes after it.
            self._in_thread += 1

            def landed(value: Any, problem: BaseException | None) -> None:
                self._in_thread -= 1
                self.perform(done(value, problem))

            self._run_in_thread(work, landed)
            return []
        try:
            value = work()
        except Exception as problem:
            return done(None, problem)
        return done(value, None)

    def _publish(self, transaction: Transaction) -> None:
        tid, oids = transaction.tid, list(transaction.oids)
        self.invalidations.append(tid, oids)
        for client in list(self.clients):
            if client is not transaction.owner:
                client.tell("invalidateTransaction", tid, oids)
        self.visible.advance(tid)
        transaction.owner.tell("info", {"size": self.engine.size_bytes()})

    def _expire(self, transaction: Transaction, state: str) -> None:
        owner: Client = transaction.owner
        timeout_log.critical(
            "(%s) Transaction timeout after %g seconds: it was %s",
            owner.label, self.transactions.timeout_s, state,
        )  # fmt: skip
        owner.drop(f"its transaction was not finished in {self.transactions.timeout_s:g} s")

    # Everything else ------------------------------------------------------------------------------

    def new_oids(self, count: int) -> list[bytes]:
        if self.read_only:
            raise ReadOnlyError()
        return self.engine.new_oids(max(1, min(count, limits.NEW_OIDS)))

    def invalidations_since(self, tid: bytes) -> tuple[bytes, list[bytes]] | None:
        return self.invalidations.since(tid)

    def info(self) -> dict[str, Any]:
        return {
            "length": self.engine.count(),
            "size": self.engine.size_bytes(),
            "name": self.engine.name,
            "supportsUndo": self.engine.supports_undo,
            "supports_record_iternext": self.engine.supports_record_iteration,
            "interfaces": self.engine.interfaces,
        }

    def pack_begins(self) -> None:
        """From now on the engine may be slow to prepare and to finish."""
        self._packing = True

    def pack_ended(self) -> None:
        self._packing = False
        size = {"length": self.engine.count(), "size": self.engine.size_bytes()}
        for client in list(self.clients):
            client.tell("info", size)

    @property
    def busy(self) -> bool:
        """Whether the engine is doing something in a thread whose end must not be missed."""
        return self._in_thread > 0 and not self._failed

    @property
    def packing(self) -> bool:
        return self._packing

    def status(self) -> dict[str, Any]:
        """Exactly the thirteen figures that ZEO's users compare."""
        counts = self.counts
        return {
            "aborts": counts.aborts,
            "active_txns": self.transactions.active,
            "commits": counts.commits,
            "conflicts": counts.conflicts,
            "conflicts_resolved": counts.conflicts_resolved,
            "connections": len(self.clients),
            "last-transaction": self.visible.tid.hex(),
            "loads": counts.loads,
            "lock_time": self._locked_at,
            "start": self._started,
            "stores": counts.stores,
            "timeout-thread-is-alive": True,
            "waiting": self.transactions.waiting,
        }
