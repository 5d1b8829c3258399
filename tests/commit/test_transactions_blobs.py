"""Blobs of transactions: each that was attached is committed, forgotten by the engine, or discarded; once."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.POSException import StorageError, StorageTransactionError

from tests.commit.desk import STATES, A, B, C, Desk, brief, copied, prepared
from zeoid import limits
from zeoid.commit.actions import Abandon, Action, Commit, Discard, Prepare, State, Transaction
from zeoid.model import NO_TID, AttachBlob, Conflict, Delete, StagedBlob, Store, Undo
from zeoid.ports import Prepared


def blob(name: str) -> StagedBlob:
    return StagedBlob(name.encode(), 0)


def attach(desk: Desk, name: str, oid: bytes = A, owner: str = "us") -> None:
    desk.operate(owner, AttachBlob(oid, blob(name)))


def discarded(actions: list[Action]) -> list[str]:
    found = [each for action in actions if isinstance(action, Discard) for each in action.blobs]
    return [each.name.decode() for each in found]


def test_a_transaction_that_is_given_up_before_it_is_prepared_discards_its_blobs() -> None:
    desk = Desk()
    desk.begin("us")
    attach(desk, "x")
    attach(desk, "y", B)
    assert brief(desk.abort("us")) == ["Discard x y"]
    assert desk.is_idle()


@pytest.mark.parametrize("how", ["abort", "gone", "outcome", "deadline"])
def test_one_that_waits_answers_its_vote_and_discards(how: str) -> None:
    desk = Desk(vote_wait_s=10.0)
    desk.hold("other", A)
    desk.begin("us")
    attach(desk, "x")
    assert desk.vote("us") == []
    gone = {
        "abort": lambda: desk.abort("us"),
        "gone": lambda: desk.gone("us"),
        "outcome": lambda: desk.outcome(b"us")[:-1],
        "deadline": lambda: desk.later(15.0),
    }[how]()
    assert brief(gone) == ["Fail us", "Discard x"]


def test_a_blob_claims_its_object() -> None:
    desk = Desk()
    desk.begin("us")
    attach(desk, "x")
    desk.vote("us")
    assert desk.voted("other", A) == []
    assert brief(desk.voted("third", B)) == ["Prepare third"]


def test_what_is_prepared_is_the_engines() -> None:
    desk = Desk()
    desk.begin("us")
    attach(desk, "x")
    desk.vote("us")
    assert brief(desk.prepared(desk.get("us"))) == ["Reply us"]
    assert brief(desk.abort("us")) == ["Abandon us"]


def test_what_is_committed_is_nobodys_to_discard() -> None:
    desk = Desk()
    transaction = desk.begin("us")
    attach(desk, "x")
    desk.vote("us")
    desk.prepared(transaction)
    desk.finish("us")
    assert brief(desk.committed(transaction)) == ["Publish us", "Reply us"]


@pytest.mark.parametrize("then", ["prepared", "conflicted", "failed"])
def test_one_that_is_given_up_while_it_is_prepared(then: str) -> None:
    desk = Desk()
    transaction = desk.begin("us")
    attach(desk, "x")
    desk.vote("us")
    assert brief(desk.abort("us")) == ["Fail us"]  # the engine still works with the file
    told = {
        "prepared": lambda: desk.prepared(transaction),
        "conflicted": lambda: desk.conflicted(transaction),
        "failed": lambda: desk.failed(transaction, StorageError("full")),
    }[then]()
    assert brief(told) == (["Abandon us"] if then == "prepared" else ["Discard x"])


def test_a_conflict_keeps_the_blob_for_the_next_round() -> None:
    desk = Desk()
    transaction = desk.begin("us")
    desk.store("us")
    attach(desk, "x", B)
    desk.vote("us")
    assert brief(desk.conflicted(transaction)) == ["Reply us"]
    desk.store("us")
    assert desk.vote("us") == [Prepare(transaction)]
    assert [type(each) for each in transaction.operations] == [Store, AttachBlob]
    assert brief(desk.prepared(transaction)) == ["Reply us"]
    assert brief(desk.abort("us")) == ["Abandon us"]


def test_too_many_rounds_discard() -> None:
    desk = Desk()
    transaction = desk.begin("us")
    desk.store("us")
    attach(desk, "x", B)
    for _ in range(limits.RESOLUTION_ROUNDS - 1):
        desk.vote("us")
        assert brief(desk.conflicted(transaction)) == ["Reply us"]
        desk.store("us")
    desk.vote("us")
    assert brief(desk.conflicted(transaction)) == ["Fail us", "Discard x"]


def test_a_vote_on_a_broken_transaction_discards() -> None:
    desk = Desk()
    desk.begin("us")
    attach(desk, "x")
    desk.break_("us", StorageError("broken"))
    attach(desk, "y")
    assert brief(desk.vote("us")) == ["Fail us", "Discard x y"]


def test_a_transaction_that_is_too_large_discards() -> None:
    desk = Desk(transaction_bytes=1000)
    desk.begin("us")
    attach(desk, "x")
    desk.store("us", data=bytes(2000))
    attach(desk, "y")
    assert brief(desk.vote("us")) == ["Fail us", "Discard x y"]


def test_a_blob_before_its_transaction_is_discarded_with_that() -> None:
    desk = Desk()
    attach(desk, "x")
    assert brief(desk.vote("us")) == ["Fail us", "Discard x"]


def test_a_blob_that_no_transaction_takes_is_the_callers() -> None:
    desk = Desk(per_owner=1)
    desk.begin("us")
    with pytest.raises(StorageTransactionError):
        desk.operate("us", AttachBlob(A, blob("x")), id=b"another")
    assert desk.abort("us") == []


@pytest.mark.parametrize("state", [state for state in State if state is not State.DOOMED])
def test_a_blob_that_comes_too_late_is_discarded_in_the_end(state: State) -> None:
    desk = Desk()
    transaction = STATES[state](desk)
    attach(desk, "late")
    actions: list[Action] = []
    if state is State.PREPARING:
        actions += desk.prepared(transaction)
    if state is State.FINISHING:
        actions += desk.committed(transaction)
    actions += desk.abort("us")
    assert discarded(actions) == ["late"]


def test_one_too_late_is_discarded_and_the_one_before_is_the_engines() -> None:
    desk = Desk()
    transaction = desk.begin("us")
    attach(desk, "early")
    desk.vote("us")
    attach(desk, "late")
    desk.prepared(transaction)
    assert brief(desk.finish("us")) == ["Fail us", "Abandon us", "Discard late"]


def test_a_copy_that_comes_too_late_discards() -> None:
    desk = Desk()
    desk.commit("other")
    desk.begin("us", info=copied(NO_TID))
    attach(desk, "x")
    assert brief(desk.vote("us")) == ["Fail us", "Discard x"]


# Every order of events -----------------------------------------------------------------------------------

OWNERS = ("a", "b", "c")
EVENTS = ("begin", "attach", "store", "undo", "break", "vote", "finish", "abort", "gone", "outcome", "later",
          "prepared", "conflicted", "failed", "committed")  # fmt: skip
events = st.tuples(
    st.sampled_from(OWNERS), st.sampled_from(EVENTS), st.sampled_from([A, B, C]), st.integers(0, 3)
)


class Engine:
    """Takes what it is told to, and keeps account of every file."""

    def __init__(self) -> None:
        self.desk = Desk(transaction_bytes=1400, per_owner=1)
        self.numbers = itertools.count()
        self.taken: set[str] = set()
        self.ended: Counter[str] = Counter()
        self.preparing: list[tuple[Transaction, list[str]]] = []
        self.holds: dict[Transaction, list[str]] = {}
        self.in_flight: list[Transaction] = []

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Prepare(transaction):
                    attached = [each for each in transaction.operations if isinstance(each, AttachBlob)]
                    self.preparing.append((transaction, [each.blob.name.decode() for each in attached]))
                case Commit(batch):
                    self.in_flight = list(batch)
                case Abandon(transaction):
                    self.ended.update(self.holds.pop(transaction))
                case Discard(blobs):
                    self.ended.update(each.name.decode() for each in blobs)

    def happens(self, owner: str, event: str, oid: bytes, which: int) -> None:
        desk = self.desk
        try:
            match event:
                case "begin":
                    desk.begin(owner)
                case "attach":
                    name = f"{next(self.numbers)}"
                    desk.operate(owner, AttachBlob(oid, blob(name)))
                    self.taken.add(name)
                case "store":
                    desk.store(owner, oid)
                case "undo":
                    desk.operate(owner, Undo(b"") if which else Delete(oid, NO_TID))
                case "break":
                    desk.break_(owner, StorageError("broken"))
                case "vote" | "finish" | "abort" | "gone":
                    self.perform(getattr(desk, event)(owner))
                case "outcome":
                    self.perform(desk.outcome(owner.encode()))
                case "later":
                    self.perform(desk.later(40.0))
                case "committed":
                    self.commit()
                case _:
                    self.report(event, which)
        except (StorageTransactionError, StorageError):
            pass

    def report(self, event: str, which: int) -> None:
        if not self.preparing:
            return
        transaction, attached = self.preparing.pop(which % len(self.preparing))
        stores = [each for each in transaction.operations if isinstance(each, Store)]
        if event == "conflicted" and stores:
            conflict = Conflict(stores[0].oid, NO_TID, NO_TID, b"")
            self.perform(self.desk.conflicted(transaction, conflict))
        elif event == "prepared":
            self.holds[transaction] = attached
            self.perform(self.desk.prepared(transaction))
        else:
            self.perform(self.desk.failed(transaction, StorageError("full")))

    def commit(self) -> None:
        batch, self.in_flight = self.in_flight, []
        if batch:
            for transaction in batch:
                self.ended.update(self.holds.pop(transaction))
            self.perform(self.desk.committed(*batch))


@settings(max_examples=400, deadline=None)
@given(st.lists(events, max_size=60))
def test_whatever_happens_each_blob_has_one_end(happened: list[tuple[str, str, bytes, int]]) -> None:
    engine = Engine()
    for event in happened:
        engine.happens(*event)
        assert not [name for name, count in engine.ended.items() if count > 1]
    for owner in OWNERS:
        engine.perform(engine.desk.gone(owner))
    while engine.preparing or engine.in_flight:
        engine.report("prepared", 0)
        engine.commit()
    assert engine.ended == Counter(engine.taken)
    assert engine.holds == {}


def test_no_action_is_added_where_there_are_no_blobs() -> None:
    desk = Desk()
    prepared(desk)
    assert brief(desk.abort("us")) == ["Abandon us"]
    assert Prepared().blobs == ()
