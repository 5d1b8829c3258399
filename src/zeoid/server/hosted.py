"""One storage of a server: its engine, its transactions, its clients, and its invalidation log.

Carries out what `commit.transactions` decides, on the event loop's thread. What an engine does goes to
threads: batches to one of their own, so that a disk that syncs holds up nobody, and transactions that are
large, or that undo, to another. Small ones are prepared at once: they take no longer than the way to a
thread. Engines that are exclusive do everything at once, unless a pack holds their locks. All that goes to
threads with an engine that may have to wait: what is exclusive to the one for batches, in order, and reading
to some of its own. Knows sessions by few methods only (see `Client`), so that tests can pass anything that
has them.

Long because all of a storage's actions are carried out in one order, which has to be seen in one place.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ZODB.POSException import ConflictError, ReadOnlyError

from zeoid import limits
from zeoid.commit.actions import (
    Abandon,
    Action,
    Announce,
    Commit,
    Decide,
    Discard,
    Expire,
    Fail,
    Prepare,
    Publish,
    Reply,
    StartOver,
    State,
    Transaction,
)
from zeoid.commit.invalidations import InvalidationLog
from zeoid.commit.transactions import Transactions
from zeoid.model import StagedBlob
from zeoid.ports import Clock, Engine, Prepared
from zeoid.ports import Commit as Committing
from zeoid.server.clients import Announcement, Client, Done, RunInThread
from zeoid.server.counts import Counts
from zeoid.server.packing import Pack, Packs
from zeoid.server.polling import Polling
from zeoid.server.sizes import Sizes
from zeoid.server.visible import Visible
from zeoid.server.wording import told, told_oids
from zeoid.wire.messages import BLOB_EXTENSIONS, EXTENSIONS

log = logging.getLogger("zeoid.server")
#: Where people who come from ZEO look for this one line.
timeout_log = logging.getLogger("ZEO.StorageServer")
_WITHOUT_BLOBS = tuple(name for name in EXTENSIONS if name not in BLOB_EXTENSIONS)


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
        run_reading: RunInThread | None = None,
        run_with_blobs: RunInThread | None = None,
        read_only: bool = False,
        transaction_timeout_s: float = limits.TRANSACTION_TIMEOUT_S,
        invalidation_log_transactions: int = limits.INVALIDATION_LOG_TRANSACTIONS,
        blob_bytes: int = limits.BLOB_BYTES,
    ) -> None:
        self.name = name
        self.blob_bytes = blob_bytes
        self.engine = engine
        self.read_only = read_only or engine.read_only
        self.clock = clock
        self.visible = Visible(engine)
        self.counts = Counts()
        self.clients: set[Client] = set()
        self.transactions = Transactions(
            self.visible.tid,
            exclusive=engine.exclusive,
            shared=engine.shared,
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
        #: What is read and may take its time; of an engine that may have to wait, everything that is read.
        self.run_reading = run_reading or run_beside
        self._run_with_blobs = run_with_blobs or run_beside
        #: Whether the server has one connection only, which waits for what is done for it.
        self._is_alone = is_alone
        self._on_fatal = on_fatal
        self._todo: deque[Action] = deque()
        self._performing = False
        self.packs = Packs(name, engine, clock)
        self._packing = False
        self._in_thread = 0
        self._with_blobs = 0
        self._failed = ""
        self._sizes = Sizes(self)
        self._polling = Polling(self) if engine.shared else None
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

    def discard(self, blobs: Sequence[StagedBlob]) -> None:
        """Remove what a client sent and no transaction will have."""
        if blobs:
            self.perform([Discard(blobs)])

    def tick(self) -> None:
        """Time has passed: see to the deadlines, and to what happened in the background."""
        if self.engine.failure and not self._failed:
            self._fail(f"storage {self.name!r} failed: {self.engine.failure}")
        self.perform(self.transactions.expire(*self._now()))
        if self._polling is not None:
            self._polling.tick()
        self._sizes.tick()

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
            case Announce(tid, oids):
                self.transactions.others_committed(tid)
                self._tell_invalidation(tid, oids, list(self.clients))
            case StartOver(tid):
                self._start_over(tid)
        return ()

    # The engine's part ----------------------------------------------------------------------------

    def _prepare(self, transaction: Transaction) -> Sequence[Action]:
        engine = self.engine

        def work() -> Any:
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
            or not engine.inline
        ):
            return self._beside(work, done)
        if self._polling is not None:
            return self._engine_call(*self._polling.prepare(work, done))
        return self._engine_call(work, done)

    def _commit(self, batch: Sequence[Transaction]) -> Sequence[Action]:
        engine = self.engine

        def work() -> Sequence[bytes] | None:
            committing = []
            for each in batch:
                assert each.prepared is not None
                id = each.id if type(each.id) is bytes else b""
                committing.append(Committing(each.tid, id, each.prepared))
            return engine.commit(committing)

        def done(_: Any, problem: BaseException | None) -> list[Action]:
            if problem is not None and engine.shared and isinstance(problem, Exception):
                log.error("storage %r failed to commit", self.name, exc_info=problem)
                return self.transactions.uncommitted(batch, problem, self.clock.time())
            if problem is not None:
                # What is on the disk can't be known: whoever guesses loses data.
                self._fail(f"storage {self.name!r} failed to commit: {problem!r}")
                return []
            self.counts.commits += len(batch)
            return self.transactions.committed(batch, self.clock.time())

        if self._polling is not None:
            return self._engine_call(*self._polling.commit(batch, work, done))
        if engine.exclusive or (engine.inline and self._is_alone() and not self._packing):
            return self._engine_call(work, done)  # there is nobody whom it could hold up
        return self._later(
            self._run_in_thread, work, done, clients=list(self.clients) if len(batch) > 1 else ()
        )

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
        if self.engine.exclusive and (self._packing or self._in_thread or not self.engine.inline):
            # A pack holds the storage's commit lock while it copies what was committed meanwhile. What
            # went to the thread keeps its place before what comes after it.
            return self.in_commit_thread(work, done)
        try:
            value = work()
        except Exception as problem:
            return done(None, problem)
        return done(value, None)

    def in_commit_thread(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], list[Action]]
    ) -> Sequence[Action]:
        """As `_engine_call`, later, in its turn."""
        return self._later(self._run_in_thread, work, done)

    def _beside(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], list[Action]]
    ) -> Sequence[Action]:
        """As `_engine_call`, later, while others commit."""
        return self._later(self._run_beside, work, done)

    def _later(
        self,
        run: RunInThread,
        work: Callable[[], Any],
        done: Callable[[Any, BaseException | None], list[Action]],
        clients: Sequence[Client] = (),
    ) -> Sequence[Action]:
        """As `_engine_call`, in a thread; what *clients* are sent because of it is sent in one piece."""
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

        run(work, landed)
        return ()

    def _publish(self, transaction: Transaction) -> None:
        assert transaction.prepared is not None
        others = [client for client in self.clients if client is not transaction.owner]
        self._tell_invalidation(transaction.tid, transaction.prepared.oids, others)

    def _tell_invalidation(self, tid: bytes, oids: Sequence[bytes], clients: Sequence[Client]) -> None:
        oids = list(oids)
        self.invalidations.append(tid, oids)
        if clients:
            announcement = Announcement("invalidateTransaction", tid, oids)
            for client in clients:
                client.tell(announcement)
        self.visible.advance(tid)

    def _start_over(self, tid: bytes) -> None:
        """Clients that connect again hear that nothing is known up to *tid*, and forget what is current."""
        self.transactions.others_committed(tid)
        for client in list(self.clients):
            client.drop("the database was changed by others, in a way that can't be told")
        if tid > self.visible.tid:
            self.visible.advance(tid)
        self.invalidations.forget(self.visible.tid)

    def _log_conflict(self, transaction: Transaction, problem: Exception) -> None:
        if isinstance(problem, ConflictError) and problem.oid is not None and problem.serials:
            committed, read = problem.serials
            log.info(
                "%s: conflict on object %s, which is at %s and was read at %s, in %s",
                transaction.owner.label, problem.oid.hex(), committed.hex(), read.hex(), told(transaction),
            )  # fmt: skip

    def _expire(self, transaction: Transaction, state: State) -> None:
        owner: Client = transaction.owner
        held = () if transaction.claim is None else transaction.claim.oids
        timeout_s = self.transactions.timeout_s
        timeout_log.critical(
            "(%s) Transaction timeout after %g seconds: it was %s, and held %s; %s",
            owner.label, timeout_s, state.value, told_oids(held), told(transaction),
        )  # fmt: skip
        owner.drop(f"its transaction was not finished in {timeout_s:g} s")

    # Everything else ------------------------------------------------------------------------------

    def new_oids(self, count: int) -> list[bytes]:
        if self.read_only:
            raise ReadOnlyError()
        return self.engine.new_oids(max(1, min(count, limits.NEW_OIDS)))

    def run_with_blobs(self, work: Callable[[], Any], done: Done) -> None:
        """Have *work* done on the files of blobs in a thread, and wait for it at the end."""
        self._with_blobs += 1

        def landed(value: Any, problem: BaseException | None) -> None:
            self._with_blobs -= 1
            done(value, problem)

        self._run_with_blobs(work, landed)

    def look(self) -> None:
        """A client asked for what it can know only from elsewhere."""
        if self._polling is not None:
            self._polling.poll()

    def changed_since(self, after: bytes, oids: Sequence[bytes]) -> bytes | None:
        """The first of the objects, read when *after* was visible, that may be another now."""
        if self.visible.tid == after:
            return None
        if len(oids) == 1:
            return oids[0] if self.invalidations.may_have_changed(oids[0], after) else None
        told = self.invalidations.since(after)
        changed = frozenset(oids if told is None else told[1])
        return next((oid for oid in oids if oid in changed), None)

    def invalidations_since(self, tid: bytes) -> tuple[bytes, list[bytes]] | None:
        return self.invalidations.since(tid)

    def info(self) -> dict[str, Any]:
        length, size_bytes = self._sizes.known()
        return {
            "length": length,
            "size": size_bytes,
            "name": self.engine.name,
            "supportsUndo": self.engine.supports_undo,
            "supports_record_iternext": self.engine.supports_record_iteration,
            "interfaces": self.engine.interfaces,
            "extensions": EXTENSIONS if self.engine.has_blobs else _WITHOUT_BLOBS,
        }

    def pack_begins(self, time_s: float = 0.0) -> Pack:
        """From now on the engine may be slow to prepare and to finish. Whom it is to tell of its progress."""
        self._packing = True
        return self.packs.begin(time_s, self._sizes.known()[1])

    def pack_ended(self, problem: BaseException | None = None) -> None:
        self._packing = False
        self.packs.end(problem)
        self._sizes.tell()

    @property
    def busy(self) -> bool:
        """Whether the engine is doing something in a thread whose end must not be missed."""
        return self._with_blobs > 0 or (self._in_thread > 0 and not self._failed)

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
