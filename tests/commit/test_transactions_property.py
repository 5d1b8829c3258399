"""Clients that come, go, dawdle and collide at random: whatever they do, the machine keeps its invariants.

The engine here is the simplest that can be right: a dictionary of current revisions, asked late and in any
order. It finds out whether two transactions that it has at the same time exclude each other. What was
published is compared with a model that applies one transaction after the other: a lost update would show.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ZODB.POSException import ReadConflictError, StorageError, StorageTransactionError
from ZODB.utils import p64

from zeoid import limits
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
from zeoid.commit.tids import next_tid
from zeoid.commit.transactions import Transactions
from zeoid.model import NO_TID, CheckCurrent, Conflict, Operation, Restore, Store, TransactionInfo, Undo
from zeoid.ports import Prepared

INFO = TransactionInfo(b"", b"", {})
TIMEOUT_S = 30.0
VOTE_WAIT_S = 50.0
OIDS = [p64(number) for number in range(1, 7)]
OWNERS = range(3)
PER_OWNER = 3

clients = st.sampled_from(OWNERS)
oids = st.sampled_from(OIDS)
#: Which one of those there are.
places = st.integers(0, 30)
#: Which ones of those there are.
choices = st.sets(st.integers(0, 8), min_size=1, max_size=7)
rarely = st.integers(0, 9).map(lambda number: number == 9)
mostly = st.integers(0, 9).map(lambda number: number != 9)
#: Client, whether it is a stock one, what it writes, what it depends on, whether it saw old revisions of it,
#: whether it votes at once.
Plan = tuple[int, bool, list[bytes], list[bytes], bool, bool]
plans = st.tuples(
    clients, rarely, st.lists(oids, max_size=2, unique=True), st.lists(oids, max_size=1), rarely, mostly
)


@dataclass(frozen=True)
class Wish:
    """What a transaction needs for itself, or shares with others."""

    written: frozenset[bytes]
    depended_on: frozenset[bytes]
    whole: bool

    def excludes(self, other: Wish) -> bool:
        return (
            self.whole
            or other.whole
            or bool(self.written & (other.written | other.depended_on))
            or bool(other.written & self.depended_on)
        )


@dataclass
class Work:
    """What the engine has of one transaction."""

    operations: list[Operation]
    #: The revisions that the engine found when it was asked.
    found: dict[bytes, bytes]
    result: Prepared | None = None


class Clients(RuleBasedStateMachine):
    """Connections, their transactions, and an engine that works when it is told to."""

    @initialize(exclusive=rarely)
    def start(self, exclusive: bool) -> None:
        self.exclusive = exclusive
        self.machine = Transactions(
            NO_TID, exclusive=exclusive, timeout_s=TIMEOUT_S, vote_wait_s=VOTE_WAIT_S, per_owner=PER_OWNER
        )
        self.now_s, self.time_s = 1000.0, 1_700_000_000.0
        self.connections = {client: (client, 0) for client in OWNERS}
        self.numbers = count()
        #: Ids that clients made.
        self.ids: list[bytes] = [b"never begun"]
        #: Votes and finishes that were accepted and have no answer yet.
        self.unanswered: dict[Transaction, str] = {}
        #: What was asked for with the votes, and those that wait for it, in order.
        self.wishes: dict[Transaction, Wish] = {}
        self.queue: list[Transaction] = []
        #: When somebody began to wait: for locks, or for a client.
        self.since_s: dict[Transaction, float] = {}
        #: Who asked for an outcome and has no answer yet; what was answered.
        self.askers: dict[int, bytes] = {}
        self.denied: set[bytes] = set()
        # The engine.
        self.preparing: dict[Transaction, Work] = {}
        self.prepared: dict[Transaction, Work] = {}
        self.in_flight: list[Transaction] = []
        self.durable: list[Transaction] = []
        self.current: dict[bytes, tuple[bytes, bytes]] = {}
        self.published: list[tuple[bytes, Transaction, list[Operation]]] = []

    @property
    def times(self) -> tuple[float, float]:
        return self.now_s, self.time_s

    def serial(self, oid: bytes) -> bytes:
        return self.current.get(oid, (NO_TID, b""))[0]

    # What the machine wants done --------------------------------------------------------------------

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            getattr(self, f"do_{type(action).__name__}")(action)

    def holders(self) -> list[Transaction]:
        resolving = [t for t in self.machine.all() if t.state is State.RESOLVING]
        return [*self.preparing, *self.prepared, *resolving]

    def do_Prepare(self, action: Prepare) -> None:
        transaction = action.transaction
        wish = self.wishes[transaction]
        for holder in self.holders():
            assert holder is transaction or not wish.excludes(self.wishes[holder]), "locks are kept"
            assert holder is transaction or not self.exclusive
        if transaction in self.queue:
            earlier = self.queue[: self.queue.index(transaction)]
            assert not any(wish.excludes(self.wishes[other]) for other in earlier), "first come, first served"
            self.queue.remove(transaction)
        else:
            assert transaction.rounds > 0
        if self.exclusive:
            assert transaction.tid > self.machine.last_tid
        found = {oid: self.serial(oid) for oid in OIDS}
        self.preparing[transaction] = Work(list(transaction.operations), found)

    def do_Commit(self, action: Commit) -> None:
        assert not self.in_flight, "one batch at a time"
        self.in_flight = list(action.batch)
        assert 0 < len(self.in_flight) <= limits.BATCH_TRANSACTIONS
        tids = [self.machine.last_tid, *(transaction.tid for transaction in self.in_flight)]
        assert all(one < other for one, other in pairwise(tids)), "tids only grow"
        for transaction in self.in_flight:
            assert self.unanswered[transaction] == "finish"
            assert transaction.prepared is self.prepared[transaction].result
            assert transaction.info.tid in (None, transaction.tid)

    def do_Abandon(self, action: Abandon) -> None:
        assert action.transaction not in self.in_flight
        work = self.prepared.pop(action.transaction)
        assert action.transaction.prepared is work.result

    def do_Publish(self, action: Publish) -> None:
        transaction = action.transaction
        assert self.durable[0] is transaction, "what is durable is published, in its order"
        assert not self.published or transaction.tid > self.published[-1][0], "tids only grow"
        assert transaction.id not in self.denied, "a no stays a no"
        self.published.append((transaction.tid, transaction, self.prepared[transaction].operations))

    def do_Reply(self, action: Reply) -> None:
        transaction = action.transaction
        if self.unanswered.pop(transaction) == "finish":
            assert self.published[-1][:2] == (action.value, transaction), "first published, then revealed"
            self.durable.remove(transaction)
            del self.prepared[transaction]
        else:
            assert transaction.state in (State.PREPARED, State.RESOLVING)
            self.since_s[transaction] = self.now_s

    def do_Fail(self, action: Fail) -> None:
        asked = self.unanswered.pop(action.transaction)
        assert asked == "vote" or action.transaction.broken is action.problem
        if action.transaction in self.queue:
            self.queue.remove(action.transaction)

    def do_Expire(self, action: Expire) -> None:
        assert action.state in (State.RESOLVING, State.PREPARED)
        assert self.since_s[action.transaction] + TIMEOUT_S <= self.now_s
        # As the server does: who kept others waiting loses the connection.
        self.disconnect(action.transaction.owner[0])

    def do_Decide(self, action: Decide) -> None:
        id = self.askers.pop(action.asker)
        if action.tid is None:
            self.denied.add(id)
        self.check_outcome(id, action.tid)

    def check_outcome(self, id: bytes, tid: bytes | None) -> None:
        committed = [when for when, transaction, _ in self.published if transaction.id == id]
        assert committed == ([] if tid is None else [tid]), "outcomes are true"

    # What clients do --------------------------------------------------------------------------------

    def begin(self, owner: Any, id: Any, info: TransactionInfo = INFO) -> Transaction | None:
        """None if the owner has as many as it may."""
        mine = [transaction for transaction in self.machine.all() if transaction.owner == owner]
        if len(mine) < PER_OWNER or any(transaction.id == id for transaction in mine):
            self.machine.begin(owner, id, info)
            return self.machine.find(owner, id)
        try:
            self.machine.begin(owner, id, info)
        except StorageTransactionError:
            return None
        raise AssertionError("one too many must be refused")

    def new_id(self, is_stock: bool) -> int | bytes:
        number = next(self.numbers)
        if is_stock:
            return number % 2
        self.ids.append(b"%d" % number)
        return self.ids[-1]

    def store(self, transaction: Transaction, oid: bytes, stale: bool = False) -> None:
        serial = NO_TID if stale else self.serial(oid)
        store = Store(oid, serial, b"%d" % next(self.numbers))
        self.machine.operate(transaction.owner, transaction.id, store)

    @rule(plans=st.lists(plans, min_size=1, max_size=5))
    def try_to_commit(self, plans: list[Plan]) -> None:
        """What polite clients do, up to their votes."""
        for client, is_stock, written, read, is_stale, votes in plans:
            transaction = self.begin(self.connections[client], self.new_id(is_stock))
            if transaction is None or transaction.state is not State.STORING:
                continue
            for oid in written:
                self.store(transaction, oid, is_stale)
            for oid in read:
                check = CheckCurrent(oid, NO_TID if is_stale else self.serial(oid))
                self.machine.operate(transaction.owner, transaction.id, check)
            if votes:
                self.ask("vote", transaction)

    def try_what_needs_the_whole_storage(self, client: int, oid: bytes, what: str) -> None:
        tid = self.machine.last_tid if "old" in what else next_tid(self.machine.last_tid, self.time_s + 5)
        info = INFO if what == "undo" else TransactionInfo(b"", b"", {}, tid)
        transaction = self.begin(self.connections[client], self.new_id(False), info)
        if transaction is not None:
            data = b"%d" % next(self.numbers)
            operation = Undo(oid) if what == "undo" else Restore(oid, data, None)
            self.machine.operate(transaction.owner, transaction.id, operation)
            self.ask("vote", transaction)

    def ask(self, what: str, transaction: Transaction) -> None:
        allowed = {"vote": (State.STORING, State.RESOLVING), "finish": (State.PREPARED,)}[what]
        event = getattr(self.machine, what)
        if transaction.state not in allowed:
            try:
                event(transaction.owner, transaction.id, *self.times)
            except StorageTransactionError:
                return
            raise AssertionError(f"{what} must be refused")
        self.unanswered[transaction] = what
        if what == "vote" and transaction.state is State.STORING and transaction.broken is None:
            self.queue.append(transaction)
            self.wishes[transaction] = self.wish(transaction)
            self.since_s[transaction] = self.now_s
        self.perform(event(transaction.owner, transaction.id, *self.times))

    def wish(self, transaction: Transaction) -> Wish:
        operations = transaction.operations
        return Wish(
            frozenset(each.oid for each in operations if isinstance(each, Store | Restore)),
            frozenset(each.oid for each in operations if isinstance(each, CheckCurrent)),
            self.exclusive or transaction.info.tid is not None or any(type(o) is Undo for o in operations),
        )

    @rule(chosen=choices, gives_in=rarely)
    def go_on(self, chosen: set[int], gives_in: bool) -> None:
        """What polite clients do next, where it is their turn."""
        for transaction in among(self.machine.all(), chosen):
            if transaction.state is State.RESOLVING and not gives_in:
                for conflict in list(transaction.conflicts.values()):
                    data = b"resolved %d" % next(self.numbers)
                    store = Store(conflict.oid, conflict.committed, data)
                    self.machine.operate(transaction.owner, transaction.id, store)
            if transaction.state in (State.STORING, State.RESOLVING):
                self.ask("vote", transaction)
            elif transaction.state is State.PREPARED:
                self.ask("finish", transaction)

    @rule(
        client=clients,
        place=places,
        oid=oids,
        what=st.sampled_from([
            "store", "begin again", "break", "abort", "vote", "finish", "leave", "use an id again", "ask",
            "undo", "copy", "copy of something old",
        ]),
    )  # fmt: skip
    def do_anything(self, client: int, place: int, oid: bytes, what: str) -> None:
        """A client that is not polite, or not well."""
        transaction = self.choose(place)
        id = self.ids[-1 - place % len(self.ids)]
        match what:
            case "leave":
                self.disconnect(client)
            case "ask":
                self.ask_for_the_outcome(id)
            case "undo" | "copy" | "copy of something old":
                self.try_what_needs_the_whole_storage(client, oid, what)
            case "use an id again":
                # One that is under way, perhaps on another connection, or over, or was never heard of.
                again = self.begin(self.connections[client], id)
                if again is not None:
                    self.store(again, oid)
                    self.ask("vote", again)
            case _ if transaction is not None:
                self.meddle_with(transaction, oid, what)

    def choose(self, place: int) -> Transaction | None:
        under_way = self.machine.all()
        return under_way[place % len(under_way)] if under_way else None

    def meddle_with(self, transaction: Transaction, oid: bytes, what: str) -> None:
        owner, id = transaction.owner, transaction.id
        match what:
            case "store":
                self.store(transaction, oid)
            case "begin again":
                assert self.begin(owner, id) is transaction
            case "break":
                self.machine.break_(owner, id, StorageError("not understood"))
            case "abort":
                self.perform(self.machine.abort(owner, id, *self.times))
            case _:
                self.ask(what, transaction)

    def disconnect(self, client: int) -> None:
        owner = self.connections[client]
        self.connections[client] = (client, owner[1] + 1)
        self.perform(self.machine.gone(owner, *self.times))
        left = [transaction for transaction in self.machine.all() if transaction.owner == owner]
        assert all(transaction.state is State.FINISHING for transaction in left)

    @precondition(lambda self: self.in_flight)
    @rule(place=places)
    def ask_for_an_outcome_that_is_under_way(self, place: int) -> None:
        finishing = [t for t in self.machine.all() if t.state is State.FINISHING]
        id = finishing[place % len(finishing)].id
        if isinstance(id, bytes):
            self.ask_for_the_outcome(id)

    def ask_for_the_outcome(self, id: bytes) -> None:
        asker = next(self.numbers)
        self.askers[asker] = id
        self.perform(self.machine.outcome(asker, id, NO_TID, *self.times))
        finishing = [t for t in self.machine.all() if t.id == id and t.state is State.FINISHING]
        assert (asker in self.askers) is bool(finishing), "who can be told is told at once"

    # What time and the engine do --------------------------------------------------------------------

    @rule(
        seconds=st.sampled_from([1.0] * 6 + [TIMEOUT_S / 2, TIMEOUT_S, VOTE_WAIT_S]),
        clock=st.sampled_from([-60.0, 0.0, 0.0, 1.0, 60.0]),
    )
    def pass_time(self, seconds: float, clock: float) -> None:
        self.now_s += seconds
        self.time_s += clock  # the time of day may stand, or go back
        self.perform(self.machine.expire(*self.times))
        for transaction in self.machine.all():
            if transaction.state in (State.WAITING, State.RESOLVING, State.PREPARED):
                patience_s = VOTE_WAIT_S if transaction.state is State.WAITING else TIMEOUT_S
                assert self.since_s[transaction] + patience_s > self.now_s, "who waits has a deadline"

    @rule(turns=st.integers(1, 6), chosen=choices)
    def all_do_their_best(self, turns: int, chosen: set[int]) -> None:
        """Whoever is chosen goes on, as does the engine with them."""
        for turn in range(turns):
            if self.in_flight and not turn % 2:
                self.make_durable()
            self.prepare(chosen, fails=False)
            self.go_on(chosen, gives_in=False)

    @precondition(lambda self: self.preparing)
    @rule(chosen=choices, fails=rarely)
    def prepare(self, chosen: set[int], fails: bool) -> None:
        """The engine has got through with any of those that it is preparing, in an order of its own."""
        for transaction in reversed(among(list(self.preparing), chosen)):
            if transaction in self.preparing:
                self.prepare_one(transaction, fails)

    def prepare_one(self, transaction: Transaction, fails: bool) -> None:
        work = self.preparing.pop(transaction)
        conflicts, stale = [], []
        for operation in work.operations:
            if not isinstance(operation, Store | CheckCurrent):
                continue
            oid, serial = operation.oid, self.serial(operation.oid)
            assert work.found[oid] == serial, "what a transaction needs stands still while it has its locks"
            if isinstance(operation, CheckCurrent) and serial != operation.serial:
                stale.append(oid)
            elif isinstance(operation, Store) and serial != operation.serial:
                conflicts.append(Conflict(oid, serial, operation.serial, operation.data))
        if fails:
            self.perform(self.machine.failed(transaction, StorageError("disk full"), self.time_s))
        elif stale:
            problem = ReadConflictError(oid=stale[0])
            self.perform(self.machine.failed(transaction, problem, self.time_s))
        elif conflicts:
            self.perform(self.machine.conflicted(transaction, conflicts, *self.times))
        else:
            self.prepared[transaction] = work
            work.result = Prepared()
            self.perform(self.machine.prepared(transaction, work.result, *self.times))

    @precondition(lambda self: self.in_flight)
    @rule()
    def make_durable(self) -> None:
        self.durable, self.in_flight = self.in_flight, []
        batch = list(self.durable)
        for transaction in batch:
            apply(self.current, transaction.tid, self.prepared[transaction].operations)
        self.perform(self.machine.committed(batch, self.time_s))
        assert not self.durable, "all that is durable was told"

    # What must hold at any time ---------------------------------------------------------------------

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        if not hasattr(self, "machine"):
            return
        assert self.machine.waiting == len(self.queue)
        holders = self.holders()
        for index, transaction in enumerate(self.queue):
            wish = self.wishes[transaction]
            before = [*holders, *self.queue[:index]]
            assert any(wish.excludes(self.wishes[other]) for other in before)
        gathering = [t for t in self.machine.all() if t.state is State.FINISHING]
        assert not gathering or self.in_flight, "a batch is under way when there is something to commit"

    @invariant()
    def who_waits_for_an_answer_is_known(self) -> None:
        if hasattr(self, "machine"):
            for transaction in self.unanswered:
                assert transaction.state is not State.DOOMED
                assert self.machine.find(transaction.owner, transaction.id) is transaction

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        for client in OWNERS:
            self.disconnect(client)
        while self.preparing or self.in_flight:
            if self.preparing:
                self.prepare({0}, fails=False)
            else:
                self.make_durable()
        self.there_is_nothing_left()
        self.one_after_the_other_gives_the_same()
        for id in self.ids:
            self.ask_for_the_outcome(id)

    def there_is_nothing_left(self) -> None:
        assert (self.machine.active, self.machine.waiting, self.machine.locked_at) == (0, 0, None)
        assert len(self.machine._locks) == 0
        assert (self.unanswered, self.queue, self.askers) == ({}, [], {})
        assert (self.prepared, self.in_flight) == ({}, [])

    def one_after_the_other_gives_the_same(self) -> None:
        """What each transaction had read was current when it was committed, so no update is lost."""
        model: dict[bytes, tuple[bytes, bytes]] = {}
        for tid, _, operations in self.published:
            for operation in operations:
                if isinstance(operation, Store | CheckCurrent):
                    assert operation.serial == model.get(operation.oid, (NO_TID, b""))[0]
            apply(model, tid, operations)
        assert model == self.current


def among(transactions: list[Transaction], chosen: set[int]) -> list[Transaction]:
    return [transaction for place, transaction in enumerate(transactions) if place in chosen]


def apply(current: dict[bytes, tuple[bytes, bytes]], tid: bytes, operations: list[Operation]) -> None:
    for operation in operations:
        if isinstance(operation, Undo):
            current[operation.transaction_id] = (tid, b"undone")
        elif isinstance(operation, Store | Restore):
            current[operation.oid] = (tid, operation.data or b"")


# What fails is printed as a program, with the means to run it again.
Clients.TestCase.settings = settings(
    max_examples=350, stateful_step_count=50, deadline=None, print_blob=True
)  # fmt: skip
TestClients: Any = Clients.TestCase
