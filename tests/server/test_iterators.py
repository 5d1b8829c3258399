"""Iterators that a client holds open: their bound, their end, and questions in the wrong order."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.utils import p64

from tests.server.inmemory import MemoryHouse, Peer
from zeoid import limits
from zeoid.errors import InvalidCall
from zeoid.model import NO_TID, tid_before
from zeoid.server.iterators import Iterators

A, B, C = p64(1), p64(2), p64(3)


class Transactions:
    """An iterator over transactions that knows whether it was closed."""

    def __init__(self, *tids: int) -> None:
        self._rest = [Transaction(p64(number)) for number in tids]
        self.closed = False

    def __iter__(self) -> Transactions:
        return self

    def __next__(self) -> Transaction:
        if self.closed or not self._rest:
            raise StopIteration
        return self._rest.pop(0)

    def close(self) -> None:
        self.closed = True


class Transaction:
    status: str | bytes = " "
    user = b"user"
    description = b"description"
    extension: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it

    def __init__(self, tid: bytes) -> None:
        self.tid = tid

    def __iter__(self) -> Any:
        return iter([Record(A, self.tid), Record(B, self.tid)])


class Record:
    data = b"data"
    data_txn = None

    def __init__(self, oid: bytes, tid: bytes) -> None:
        self.oid = oid
        self.tid = tid


def opened(iterators: Iterators, *tids: int) -> tuple[int, Transactions]:
    transactions = Transactions(*tids)
    return iterators.open(iterators.reserve(), transactions), transactions


# One by one -----------------------------------------------------------------------------------------------


def test_transactions_and_their_records() -> None:
    iterators = Iterators()
    number, transactions = opened(iterators, 7)
    assert iterators.next_transaction(number) == (p64(7), " ", b"user", b"description", {})
    records = iterators.open_records(number, p64(7))
    assert iterators.next_record(records) == (A, p64(7), b"data", None)
    assert iterators.next_record(records) == (B, p64(7), b"data", None)
    assert iterators.next_record(records) is None
    assert iterators.next_transaction(number) is None
    assert transactions.closed


def test_the_status_is_text() -> None:
    iterators = Iterators()
    number, transactions = opened(iterators, 7)
    transactions._rest[0].status = b"p"
    assert (iterators.next_transaction(number) or ())[1] == "p"


def test_every_iterator_has_a_number_of_its_own() -> None:
    iterators = Iterators()
    numbers = [opened(iterators, 1)[0] for _ in range(5)]
    iterators.forget(numbers[:3])
    numbers += [opened(iterators, 1)[0] for _ in range(5)]
    assert len(set(numbers)) == 10


# Out of order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 7, -1, 10**30])
def test_an_iterator_that_was_never_started(number: int) -> None:
    iterators = Iterators()
    with pytest.raises(InvalidCall, match="never started, or is over"):
        iterators.next_transaction(number)
    with pytest.raises(InvalidCall, match="never started, or is over"):
        iterators.next_record(number)
    with pytest.raises(InvalidCall):
        iterators.open_records(number, p64(1))
    iterators.forget([number])


def test_an_iterator_that_is_over() -> None:
    iterators = Iterators()
    number, _ = opened(iterators)
    assert iterators.next_transaction(number) is None
    with pytest.raises(InvalidCall, match="is over"):
        iterators.next_transaction(number)


def test_records_of_a_transaction_that_was_not_handed_out() -> None:
    iterators = Iterators()
    number, _ = opened(iterators, 1, 2)
    with pytest.raises(InvalidCall, match="handed out last"):
        iterators.open_records(number, p64(1))
    iterators.next_transaction(number)
    with pytest.raises(InvalidCall, match="handed out last"):
        iterators.open_records(number, p64(2))
    iterators.next_transaction(number)
    with pytest.raises(InvalidCall, match="handed out last"):
        iterators.open_records(number, p64(1))


def test_an_iterator_of_one_kind_is_none_of_the_other() -> None:
    iterators = Iterators()
    number, _ = opened(iterators, 1)
    iterators.next_transaction(number)
    records = iterators.open_records(number, p64(1))
    with pytest.raises(InvalidCall):
        iterators.next_record(number)
    with pytest.raises(InvalidCall):
        iterators.next_transaction(records)


# Bounds and their end -------------------------------------------------------------------------------------


def test_only_so_many_iterators_are_open() -> None:
    iterators = Iterators(3)
    number, _ = opened(iterators, 1)
    opened(iterators)
    iterators.next_transaction(number)
    iterators.open_records(number, p64(1))
    with pytest.raises(InvalidCall, match="more than 3 iterators"):
        iterators.reserve()
    with pytest.raises(InvalidCall, match="more than 3 iterators"):
        iterators.open_records(number, p64(1))
    iterators.forget([1])
    opened(iterators)


def test_the_bound_is_that_of_the_table_of_limits() -> None:
    iterators = Iterators()
    for _ in range(limits.ITERATORS_PER_CONNECTION):
        opened(iterators)
    with pytest.raises(InvalidCall):
        iterators.reserve()


def test_what_is_over_makes_room() -> None:
    iterators = Iterators(2)
    for _ in range(10):
        number, _ = opened(iterators, 1)
        iterators.next_transaction(number)
        records = iterators.open_records(number, p64(1))
        while iterators.next_record(records):
            pass
        assert iterators.next_transaction(number) is None


def test_a_forgotten_iterator_is_closed() -> None:
    iterators = Iterators()
    number, transactions = opened(iterators, 1, 2)
    iterators.forget([number, number, 99])
    assert transactions.closed
    with pytest.raises(InvalidCall):
        iterators.next_transaction(number)


def test_records_outlive_a_transaction_iterator_that_is_forgotten() -> None:
    """Clients let go of an iterator while they still read the records of its last transaction."""
    iterators = Iterators()
    number, transactions = opened(iterators, 1)
    iterators.next_transaction(number)
    records = iterators.open_records(number, p64(1))
    iterators.forget([number])
    assert not transactions.closed
    assert iterators.next_record(records) == (A, p64(1), b"data", None)
    assert iterators.next_record(records) == (B, p64(1), b"data", None)
    assert iterators.next_record(records) is None
    assert transactions.closed
    with pytest.raises(InvalidCall):
        iterators.next_transaction(number)


def test_all_are_closed_at_the_end() -> None:
    iterators = Iterators()
    some = [opened(iterators, 1) for _ in range(3)]
    iterators.next_transaction(some[0][0])
    iterators.open_records(some[0][0], p64(1))
    iterators.close()
    assert all(transactions.closed for _, transactions in some)


# On a data file, through a session ------------------------------------------------------------------------


@pytest.fixture
def peer(file_house: MemoryHouse) -> Peer:
    peer = file_house.peer()
    for oid in (A, B, C):
        peer.commit(oid, data=b"of " + oid)
    return peer


def start(peer: Peer, *bounds: bytes | None) -> int:
    call = peer.start("iterator_start", *bounds)
    peer.house.slow.run()
    peer.read()
    number: int = call.result
    return number


def tids(peer: Peer, number: int) -> list[bytes]:
    found = []
    while transaction := peer.ask("iterator_next", number):
        found.append(transaction[0])
    return found


def test_a_whole_data_file(peer: Peer) -> None:
    number = start(peer, None, None)
    found = []
    while transaction := peer.ask("iterator_next", number):
        tid, status, user, description, extension = transaction
        assert (status, user, description, extension) == (" ", b"user", b"description", {})
        records = peer.ask("iterator_record_start", number, tid)
        while record := peer.ask("iterator_record_next", records):
            found.append(record)
    assert [(oid, data, same_as) for oid, tid, data, same_as in found] == [
        (oid, b"of " + oid, None) for oid in (A, B, C)
    ]
    assert [tid for _, tid, _, _ in found] == [peer.serial(oid) for oid in (A, B, C)]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(None, None, "ABC"), (B, None, "BC"), (None, B, "AB"), (B, B, "B"), (C, A, "")],
    ids=str,
)
def test_from_and_to(peer: Peer, first: bytes | None, last: bytes | None, expected: str) -> None:
    tid_of = {oid: peer.serial(oid) for oid in (A, B, C)}
    bounds = [None if oid is None else tid_of[oid] for oid in (first, last)]
    names = dict(zip((tid_of[A], tid_of[B], tid_of[C]), "ABC", strict=True))
    assert "".join(names[tid] for tid in tids(peer, start(peer, *bounds))) == expected


def test_from_before_the_beginning_and_to_after_the_end(peer: Peer) -> None:
    assert len(tids(peer, start(peer, NO_TID, b"\xff" * 8))) == 3
    assert len(tids(peer, start(peer, tid_before(peer.serial(A))))) == 3
    assert tids(peer, start(peer, b"\x7f" + b"\xff" * 7)) == []


def test_an_empty_database(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    assert tids(peer, start(peer)) == []


def test_two_iterators_at_once(peer: Peer) -> None:
    one, other = start(peer), start(peer)
    assert peer.ask("iterator_next", one) == peer.ask("iterator_next", other)
    peer.ask("iterator_gc", [one])
    assert len(tids(peer, other)) == 2


def test_iterators_of_two_clients_do_not_mix(peer: Peer, file_house: MemoryHouse) -> None:
    other = file_house.peer()
    number = start(peer)
    with pytest.raises(TypeError, match="no such iterator"):
        other.ask("iterator_next", number)


def test_transactions_committed_meanwhile_are_left_out(peer: Peer, file_house: MemoryHouse) -> None:
    number = start(peer)
    file_house.peer().commit(A)
    assert len(tids(peer, number)) == 3


@pytest.mark.parametrize("when", ["before it has started", "while it starts", "after it has started"])
def test_no_file_stays_open_when_the_client_leaves(file_house: MemoryHouse, when: str) -> None:
    peer = file_house.peer()
    peer.commit(A)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        call = peer.start("iterator_start")
        if when == "before it has started":
            peer.disconnect()
            file_house.slow.run()
        elif when == "while it starts":
            file_house.slow.work()
            peer.disconnect()
            file_house.slow.land()
        else:
            file_house.slow.run()
            peer.read()
            peer.ask("iterator_next", call.result)
            peer.disconnect()
        del call
        gc.collect()


def test_the_bound_holds_for_a_session(make_house: Callable[..., MemoryHouse]) -> None:
    house = make_house()
    peer = house.peer()
    for _ in range(limits.ITERATORS_PER_CONNECTION):
        start(peer)
    with pytest.raises(TypeError, match="more than 1000 iterators"):
        peer.ask("iterator_start")
    peer.ask("iterator_gc", list(range(10)))
    start(peer)
