"""Clients that come, go, dawdle and collide at random: whatever they do, the machine keeps its invariants.

The engine here is the simplest that can be right: a dictionary of current revisions. What was published is
compared with a model that applies one transaction after the other, so a lost update would show.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ZODB.POSException import StorageError, StorageTransactionError
from ZODB.utils import p64

from zeoid import limits
from zeoid.commit.transactions import (
    Abandon,
    Action,
    Expire,
    Fail,
    Finish,
    Prepare,
    Publish,
    Reply,
    State,
    Transaction,
    Transactions,
)
from zeoid.model import NO_TID, Conflict, Store, TransactionInfo

INFO = TransactionInfo(b"", b"", {})
TIMEOUT_S = 30.0
VOTE_WAIT_S = 50.0
OIDS = [p64(1), p64(2), p64(3)]
OWNERS = range(3)
IDS = range(2)
PER_OWNER = 2

clients = st.sampled_from(OWNERS)
ids = st.sampled_from(IDS)
rarely = st.integers(0, 4).map(lambda number: number == 4)
mostly = st.integers(0, 4).map(lambda number: number != 4)


class Clients(RuleBasedStateMachine):
    """Connections, their transactions, and an engine that works when it is told to."""

    @initialize()
    def start(self) -> None:
        self.machine = Transactions(NO_TID, timeout_s=TIMEOUT_S, vote_wait_s=VOTE_WAIT_S, per_owner=PER_OWNER)
        self.now_s, self.time_s = 1000.0, 1_700_000_000.0
        self.connections = {client: (client, 0) for client in OWNERS}
        #: Votes and finishes that were accepted, in order, and have no answer yet.
        self.unanswered: dict[Transaction, str] = {}
        #: Votes that wait for the engine, in order.
        self.queue: list[Transaction] = []
        #: When somebody began to wait: for the lock, or for a client.
        self.waiting_since_s: dict[Transaction, float] = {}
        #: What the engine is doing: nothing, or "prepare", "prepared", "finish".
        self.engine: tuple[str, Transaction | None] = ("", None)
        self.current: dict[bytes, tuple[bytes, bytes]] = {}
        self.published: list[tuple[bytes, list[Store]]] = []
        self.stores = 0

    @property
    def times(self) -> tuple[float, float]:
        return self.now_s, self.time_s

    # What the machine wants done --------------------------------------------------------------------

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            getattr(self, f"do_{type(action).__name__}")(action)

    def do_Prepare(self, action: Prepare) -> None:
        transaction = action.transaction
        assert self.engine == ("", None), "the engine prepares one transaction at a time"
        assert self.machine.holder is transaction
        assert transaction.tid > self.machine.last_tid
        if transaction in self.queue:
            assert self.queue[0] is transaction, "votes are taken in order"
            self.queue.remove(transaction)
        else:
            assert transaction.rounds > 0
        self.waiting_since_s.pop(transaction, None)
        self.engine = ("prepare", transaction)

    def do_Finish(self, action: Finish) -> None:
        assert self.engine == ("prepared", action.transaction)
        self.waiting_since_s.pop(action.transaction)
        self.engine = ("finish", action.transaction)

    def do_Abandon(self, action: Abandon) -> None:
        assert self.engine == ("prepared", action.transaction)
        self.waiting_since_s.pop(action.transaction, None)
        self.engine = ("", None)

    def do_Publish(self, action: Publish) -> None:
        transaction = action.transaction
        assert self.engine == ("durable", transaction), "what is not durable is not published"
        assert not self.published or transaction.tid > self.published[-1][0], "tids only grow"
        self.published.append((transaction.tid, [op for op in transaction.operations if type(op) is Store]))
        self.engine = ("", None)

    def do_Reply(self, action: Reply) -> None:
        asked = self.unanswered.pop(action.transaction)
        if asked == "finish":
            assert self.published[-1][0] == action.value, "a tid is published before it is revealed"
        else:
            assert action.transaction.state in (State.PREPARED, State.RESOLVING)

    def do_Fail(self, action: Fail) -> None:
        transaction = action.transaction
        del self.unanswered[transaction]
        if transaction in self.queue:
            self.queue.remove(transaction)
        self.waiting_since_s.pop(transaction, None)

    def do_Expire(self, action: Expire) -> None:
        transaction = action.transaction
        assert self.waiting_since_s[transaction] + TIMEOUT_S <= self.now_s
        if action.state is State.RESOLVING:
            del self.waiting_since_s[transaction]
        # As the server does: who kept others waiting loses the connection.
        self.disconnect(transaction.owner[0])

    # What clients do --------------------------------------------------------------------------------

    @rule(client=clients, id=ids, oids=st.lists(st.sampled_from(OIDS), max_size=2), stale=rarely)
    def begin(self, client: int, id: int, oids: list[bytes], stale: bool) -> None:
        if self.machine.find(self.connections[client], id) is None:
            self.machine.begin(self.connections[client], id, INFO)
            for oid in oids:
                self.store(client, id, oid, stale)

    def store(self, client: int, id: int, oid: bytes, stale: bool) -> None:
        serial = NO_TID if stale else self.current.get(oid, (NO_TID, b""))[0]
        self.stores += 1
        self.machine.operate(self.connections[client], id, Store(oid, serial, b"%d" % self.stores))

    @rule(client=clients, id=ids, what=st.sampled_from(["store", "begin again", "break", "abort", "leave"]))
    def do_anything(self, client: int, id: int, what: str) -> None:
        """A client that is not polite, or not well."""
        owner = self.connections[client]
        transaction = self.machine.find(owner, id)
        match what:
            case "store":
                self.store(client, id, OIDS[0], stale=False)
            case "begin again":
                self.machine.begin(owner, id, INFO)
            case "break":
                self.machine.break_(owner, id, StorageError("not understood"))
            case "abort":
                if transaction is not None and transaction.state is State.RESOLVING:
                    self.waiting_since_s.pop(transaction)
                self.perform(self.machine.abort(owner, id, *self.times))
            case "leave":
                self.disconnect(client)

    def ask(self, what: str, client: int, id: int) -> None:
        owner = self.connections[client]
        transaction = self.machine.find(owner, id)
        allowed = {"vote": (State.STORING, State.RESOLVING), "finish": (State.PREPARED,)}[what]
        if transaction is None or transaction.state not in allowed:
            try:
                getattr(self.machine, what)(owner, id, *self.times)
            except StorageTransactionError:
                return
            raise AssertionError(f"{what} must be refused")
        self.unanswered[transaction] = what
        if what == "vote" and transaction.state is State.STORING and transaction.broken is None:
            self.queue.append(transaction)
            self.waiting_since_s[transaction] = self.now_s
        self.perform(getattr(self.machine, what)(owner, id, *self.times))

    @rule(client=clients, id=ids, oid=st.sampled_from(OIDS))
    def try_to_commit(self, client: int, id: int, oid: bytes) -> None:
        """What a polite client does, up to its vote."""
        if self.machine.find(self.connections[client], id) is None:
            self.begin(client, id, [oid], False)
            self.ask("vote", client, id)

    @rule(which=st.integers(0, 20), resolves=mostly)
    def vote(self, which: int, resolves: bool) -> None:
        known = [self.machine.find(owner, id) for owner in self.connections.values() for id in IDS]
        ready = [t for t in known if t is not None and t.state in (State.STORING, State.RESOLVING)]
        if not ready:
            return
        transaction = ready[which % len(ready)]
        if resolves and transaction.state is State.RESOLVING:
            for conflict in list(transaction.conflicts.values()):
                store = Store(conflict.oid, conflict.committed, b"resolved")
                self.machine.operate(transaction.owner, transaction.id, store)
        self.ask("vote", transaction.owner[0], transaction.id)

    @rule(client=clients, id=ids, what=st.sampled_from(["vote", "finish"]))
    def ask_at_any_time(self, client: int, id: int, what: str) -> None:
        self.ask(what, client, id)

    @precondition(lambda self: self.engine[0] == "prepared")
    @rule()
    def finish_what_is_prepared(self) -> None:
        transaction = self.engine[1]
        assert transaction is not None
        self.ask("finish", transaction.owner[0], transaction.id)

    def disconnect(self, client: int) -> None:
        owner = self.connections[client]
        for id in IDS:
            transaction = self.machine.find(owner, id)
            if transaction is not None and transaction.state is State.RESOLVING:
                self.waiting_since_s.pop(transaction)
        self.connections[client] = (client, owner[1] + 1)
        self.perform(self.machine.gone(owner, *self.times))
        assert not any(self.machine.find(owner, id) for id in IDS if self.engine[0] != "finish")

    # What time and the engine do --------------------------------------------------------------------

    @rule(
        seconds=st.sampled_from([1.0, 1.0, TIMEOUT_S / 2, TIMEOUT_S, VOTE_WAIT_S]), clock=st.floats(-60, 60)
    )
    def pass_time(self, seconds: float, clock: float) -> None:
        self.now_s += seconds
        self.time_s += clock  # the time of day may go back
        self.perform(self.machine.expire(*self.times))
        for transaction, since_s in self.waiting_since_s.items():
            patience_s = VOTE_WAIT_S if transaction in self.queue else TIMEOUT_S
            assert since_s + patience_s > self.now_s, "who waits has a deadline"

    @precondition(lambda self: self.engine[0] == "prepare")
    @rule(fails=rarely)
    def prepare(self, fails: bool) -> None:
        transaction = self.engine[1]
        assert transaction is not None
        doomed = transaction.state is State.DOOMED
        stores = [operation for operation in transaction.operations if type(operation) is Store]
        conflicts = [
            Conflict(store.oid, self.current[store.oid][0], store.serial, store.data)
            for store in stores
            if store.oid in self.current and self.current[store.oid][0] != store.serial
        ]
        if fails:
            self.engine = ("", None)
            problem = StorageError("disk full")
            self.perform(self.machine.failed(transaction, problem, self.time_s))
        elif conflicts:
            self.engine = ("", None)
            if not doomed and transaction.rounds + 1 < limits.RESOLUTION_ROUNDS:
                self.waiting_since_s[transaction] = self.now_s
            self.perform(self.machine.conflicted(transaction, conflicts, *self.times))
        else:
            self.engine = ("prepared", transaction)
            if not doomed:
                self.waiting_since_s[transaction] = self.now_s
            oids = [store.oid for store in stores]
            self.perform(self.machine.prepared(transaction, oids, (), *self.times))

    @precondition(lambda self: self.engine[0] == "finish")
    @rule()
    def make_durable(self) -> None:
        transaction = self.engine[1]
        assert transaction is not None
        for store in transaction.operations:
            assert isinstance(store, Store)
            self.current[store.oid] = (transaction.tid, store.data)
        self.engine = ("durable", transaction)
        self.perform(self.machine.finished(transaction, self.time_s))

    # What must hold at any time ---------------------------------------------------------------------

    @invariant()
    def there_is_one_holder(self) -> None:
        if not hasattr(self, "machine"):
            return
        known = [self.machine.find(owner, id) for owner in self.connections.values() for id in IDS]
        holding = [t for t in known if t is not None and t.state not in (State.STORING, State.WAITING)]
        assert len(holding) <= 1
        if holding:
            assert self.machine.holder is holding[0]
        if self.engine[1] is not None:
            assert self.machine.holder is self.engine[1]
        if self.machine.holder is None:
            assert self.machine.waiting == 0, "nobody waits for a lock that is free"
        assert self.machine.waiting == len(self.queue)

    @invariant()
    def who_waits_is_known(self) -> None:
        if hasattr(self, "machine"):
            for transaction in self.unanswered:
                assert transaction.state is not State.DOOMED
                assert self.machine.find(transaction.owner, transaction.id) is transaction

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        for client in OWNERS:
            self.disconnect(client)
        for _ in range(2):  # a last one may be under way in the engine
            if self.engine[0] == "prepare":
                self.prepare(fails=False)
            elif self.engine[0] == "finish":
                self.make_durable()
        self.there_is_nothing_left()
        self.updates_were_not_lost()

    def there_is_nothing_left(self) -> None:
        assert (self.machine.active, self.machine.waiting, self.machine.holder) == (0, 0, None)
        assert self.engine == ("", None)
        assert (self.unanswered, self.queue, self.waiting_since_s) == ({}, [], {})

    def updates_were_not_lost(self) -> None:
        """Each revision was made from the one before it, and the last one is what is current."""
        model: dict[bytes, tuple[bytes, bytes]] = {}
        for tid, stores in self.published:
            for store in stores:
                committed = model.get(store.oid)
                assert committed is None or committed[0] in (store.serial, tid)
            for store in stores:
                model[store.oid] = (tid, store.data)
        assert model == self.current


Clients.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestClients: Any = Clients.TestCase
