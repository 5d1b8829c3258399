"""One storage of a server: its engine, its transactions, its clients, and its invalidation log.

Carries out what `commit.transactions` decides, on the event loop's thread. What an engine does goes to
threads: batches to one of their own, so that a disk that syncs holds up nobody, and transactions that are
large, or that undo, to another. Small ones are prepared at once: they take no longer than the way to a
thread. Engines that are exclusive do everything at once, unless a pack holds their locks. Knows sessions by
few methods only (see `Client`), so that tests can pass anything that has them.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ZODB.POSException import ConflictError, ReadOnlyError

from zeoid import limits
from zeoid.commit.actions import (
    Abandon,
    Action,
    Commit,
    Decide,
    Discard,
    Expire,
    Fail,
    Prepare,
    Publish,
    Reply,
    State,
    Transaction,
)
from zeoid.commit.invalidations import InvalidationLog
from zeoid.commit.transactions import Transactions
from zeoid.ports import Clock, Engine, Prepared
from zeoid.ports import Commit as Committing
from zeoid.server.visible import Visible
from zeoid.wire.messages import EXTENSIONS

log = logging.getLogger("zeoid.server")
#: Where people who come from ZEO look for this one line.
timeout_log = logging.getLogger("ZEO.StorageServer")


class Client(Protocol):
    """What a hosted storage needs of a session."""

    label: str

    def answer(self, transaction: Transaction, value: Any) -> None: ...

    def refuse(self, transaction: Transaction, problem: Exception) -> None: ...

    def tell(self, announcement: "Announcement") -> None: ...

    def hold(self) -> None: ...

    def let_go(self) -> None: ...

    def drop(self, reason: str) -> None: ...


class Announcement:
    """A one-way call that many clients get: encoded once for each coding."""

    __slots__ = ("args", "encoded", "name")

    def __init__(self, name: str, *args: Any) -> None:
        self.name = name
        self.args = args
        #: The bytes for each coding that was needed.
        self.encoded: dict[str, bytes] = {}


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
        run_beside: RunInThread,
        is_alone: Callable[[], bool],
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
        self.transactions = Transactions(
            self.visible.tid,
            exclusive=engine.exclusive,
            outcomes=engine.outcomes(),
            timeout_s=transaction_timeout_s,
        )
        self.invalidations = InvalidationLog(
            self.visible.tid,
            engine.last_invalidations(min(limits.INVALIDATION_LOG_AT_START, invalidation_log_transactions)),
            transactions=invalidation_log_transactions,
        )
        #: Batches, one after the other; and what may take its time meanwhile.
        self._run_in_thread = run_in_thread
        self._run_beside = run_beside
        #: Whether the server has one connection only, which waits for what is done for it.
        self._is_alone = is_alone
        self._on_fatal = on_fatal
        self._todo: deque[Action] = deque()
        self._performing = False
        self._packing = False
        self._in_thread = 0
        self._failed = ""
        self._told_size = engine.size_bytes()
        self._tell_size_s = 0.0
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

    def outcome(self, id: bytes, after: bytes, asker: Callable[[bytes | None], None]) -> None:
        """Tell *asker* the tid of a transaction, or None if it is not committed and never will be."""
        self.perform(self.transactions.outcome(asker, id, after, *self._now()))

    def disconnected(self, client: Client) -> None:
        self.clients.discard(client)
        self.perform(self.transactions.gone(client, *self._now()))

    def tick(self) -> None:
        """Time has passed: see to the deadlines, and to what happened in the background."""
        if self.engine.failure and not self._failed:
            self._fail(f"storage {self.name!r} failed: {self.engine.failure}")
        self.perform(self.transactions.expire(*self._now()))
        if self.clock.monotonic() >= self._tell_size_s:
            self._tell_size()

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
            while self._todo:
                self._todo.extend(self._carry_out(self._todo.popleft()))
        finally:
            self._performing = False

    def _carry_out(self, action: Action) -> Sequence[Action]:
        match action:  # those of every commit come first, and are taken apart by what costs less
            case Reply():
                action.transaction.owner.answer(action.transaction, action.value)
            case Prepare():
                return self._prepare(action.transaction)
            case Commit():
                return self._commit(action.batch)
            case Publish():
                self._publish(action.transaction)
            case Fail(transaction, problem):
                self.counts.conflicts += isinstance(problem, ConflictError)
                self._log_conflict(transaction, problem)
                transaction.owner.refuse(transaction, problem)
            case Decide(asker, tid):
                asker(tid)
            case Abandon(transaction):
                assert transaction.prepared is not None
                abandoned = transaction.prepared
                call = self._beside if abandoned.blobs else self._engine_call
                return call(lambda: self.engine.abandon(abandoned), self._abandoned)
            case Discard(blobs):
                return self._beside(lambda: self.engine.discard_blobs(blobs), lambda *_: [])
            case Expire(transaction, state):
                self._expire(transaction, state)
        return ()

    # The engine's part ----------------------------------------------------------------------------

    def _prepare(self, transaction: Transaction) -> Sequence[Action]:
        engine = self.engine

        def work() -> Prepared:
            return engine.prepare(transaction.tid or None, transaction.info, transaction.operations)

        def done(prepared: Prepared | None, problem: BaseException | None) -> list[Action]:
            if problem is not None:
                if not isinstance(problem, Exception):
                    raise problem
                return self.transactions.failed(transaction, problem, self.clock.time())
            assert prepared is not None
            if prepared.conflicts:
                self.counts.conflicts += 1
                return self.transactions.conflicted(transaction, list(prepared.conflicts), *self._now())
            self.counts.conflicts_resolved += transaction.rounds > 0
            return self.transactions.prepared(transaction, prepared, *self._now())

        if not engine.exclusive and (
            transaction.undoes
            or transaction.blobs
            or len(transaction.operations) > limits.PREPARE_INLINE_OPERATIONS
            or engine.resolves_conflicts
        ):
            return self._beside(work, done)
        return self._engine_call(work, done)

    def _commit(self, batch: Sequence[Transaction]) -> Sequence[Action]:
        def work() -> None:
            committing = []
            for each in batch:
                assert each.prepared is not None
                id = each.id if type(each.id) is bytes else b""
                committing.append(Committing(each.tid, id, each.prepared))
            self.engine.commit(committing)

        def done(_: Any, problem: BaseException | None) -> list[Action]:
            if problem is not None:
                # What is on the disk can't be known: whoever guesses loses data.
                self._fail(f"storage {self.name!r} failed to commit: {problem!r}")
                return []
            self.counts.commits += len(batch)
            return self.transactions.committed(batch, self.clock.time())

        if self.engine.exclusive or (self._is_alone() and not self._packing):
            return self._engine_call(work, done)  # there is nobody whom it could hold up
        return self._in_commit_thread(work, done, clients=list(self.clients) if len(batch) > 1 else ())

    def _abandoned(self, _: Any, problem: BaseException | None) -> list[Action]:
        if problem is not None:
            self._fail(f"storage {self.name!r} failed to abandon a transaction: {problem!r}")
        return []

    def _fail(self, reason: str) -> None:
        self._failed = reason
        self._on_fatal(reason)

    def _engine_call(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], list[Action]]
    ) -> Sequence[Action]:
        """Have the engine do *work*; the actions that *done* makes of the result now, or () if later."""
        if self._failed:
            return ()
        if self.engine.exclusive and (self._packing or self._in_thread):
            # A pack holds the storage's commit lock while it copies what was committed meanwhile. What
            # went to the thread keeps its place before what comes after it.
            return self._in_commit_thread(work, done)
        try:
            value = work()
        except Exception as problem:
            return done(None, problem)
        return done(value, None)

    def _in_commit_thread(
        self,
        work: Callable[[], Any],
        done: Callable[[Any, BaseException | None], list[Action]],
        clients: Sequence[Client] = (),
    ) -> Sequence[Action]:
        """As `_engine_call`, later; what *clients* are sent because of it is sent in one piece."""
        if self._failed:
            return ()
        self._in_thread += 1

        def landed(value: Any, problem: BaseException | None) -> None:
            self._in_thread -= 1
            for client in clients:
                client.hold()
            try:
                self.perform(done(value, problem))
            finally:
                for client in clients:
                    client.let_go()

        self._run_in_thread(work, landed)
        return ()

    def _beside(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], list[Action]]
    ) -> Sequence[Action]:
        if self._failed:
            return ()
        self._in_thread += 1

        def landed(value: Any, problem: BaseException | None) -> None:
            self._in_thread -= 1
            self.perform(done(value, problem))

        self._run_beside(work, landed)
        return ()

    def _publish(self, transaction: Transaction) -> None:
        assert transaction.prepared is not None
        tid, oids = transaction.tid, list(transaction.prepared.oids)
        self.invalidations.append(tid, oids)
        others = [client for client in self.clients if client is not transaction.owner]
        if others:
            announcement = Announcement("invalidateTransaction", tid, oids)
            for client in others:
                client.tell(announcement)
        self.visible.advance(tid)

    def _tell_size(self) -> None:
        """Clients are told of the storage's size when it has changed, if not at every commit."""
        self._tell_size_s = self.clock.monotonic() + limits.INFO_S
        size = self.engine.size_bytes()
        if size != self._told_size and self.clients:
            self._told_size = size
            announcement = Announcement("info", {"length": self.engine.count(), "size": size})
            for client in list(self.clients):
                client.tell(announcement)

    def _log_conflict(self, transaction: Transaction, problem: Exception) -> None:
        if isinstance(problem, ConflictError) and problem.oid is not None and problem.serials:
            committed, read = problem.serials
            log.info(
                "%s: conflict on object %s, which is at %s and was read at %s, in %s",
                transaction.owner.label, problem.oid.hex(), committed.hex(), read.hex(), _told(transaction),
            )  # fmt: skip

    def _expire(self, transaction: Transaction, state: State) -> None:
        owner: Client = transaction.owner
        held = () if transaction.claim is None else transaction.claim.oids
        timeout_s = self.transactions.timeout_s
        timeout_log.critical(
            "(%s) Transaction timeout after %g seconds: it was %s, and held %s; %s",
            owner.label, timeout_s, state.value, _told_oids(held), _told(transaction),
        )  # fmt: skip
        owner.drop(f"its transaction was not finished in {timeout_s:g} s")

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
            "extensions": EXTENSIONS,
        }

    def pack_begins(self) -> None:
        """From now on the engine may be slow to prepare and to finish."""
        self._packing = True

    def pack_ended(self) -> None:
        self._packing = False
        self._tell_size()

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
            "lock_time": self.transactions.locked_at,
            "start": self._started,
            "stores": counts.stores,
            "timeout-thread-is-alive": True,
            "waiting": self.transactions.waiting,
        }


def _told(transaction: Transaction) -> str:
    """What a transaction is doing, as far as its client said."""
    info = transaction.info
    user, description = (_printable(text) for text in (info.user, info.description))
    return f"a transaction of {user or 'nobody'}: {description or 'no description'}"


def _printable(text: bytes) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:200].decode("utf-8", "replace")).strip()


def _told_oids(oids: Sequence[bytes]) -> str:
    if not oids:
        return "the whole storage"
    shown = ", ".join(oid.hex() for oid in oids[:5])
    return f"{len(oids)} objects: {shown}" + (" …" if len(oids) > 5 else "")
