"""Who keeps others waiting for too long, or waits for too long: what becomes of them, and what is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from ZODB.POSException import ConflictError
from ZODB.utils import p64

from tests.server.inmemory import MemoryHouse, ParallelEngine
from zeoid import limits
from zeoid.model import NO_TID

A, B = p64(1), p64(2)


def test_a_transaction_that_is_not_finished_is_aborted(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    slow, other = house.peer(name="slow"), house.peer()
    slow.prepare(A)
    waiting = other.prepare(A)
    house.later(limits.TRANSACTION_TIMEOUT_S - 0.1)
    assert not slow.dropped
    house.later(0.2)
    assert slow.dropped
    other.read()
    assert waiting.result == ()
    critical = [(r.name, r.getMessage()) for r in caplog.records if r.levelno == logging.CRITICAL]
    assert critical == [
        (
            "ZEO.StorageServer",
            "(slow) Transaction timeout after 30 seconds: it was prepared, and held the whole storage; "
            "a transaction of user: description",
        )
    ]


def timeouts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ZEO.StorageServer"]


@pytest.mark.parametrize(
    ("count", "held"),
    [
        (1, "1 objects: 0000000000000001"),
        (2, "2 objects: 0000000000000001, 0000000000000002"),
        (
            7,
            "7 objects: 0000000000000001, 0000000000000002, 0000000000000003, 0000000000000004,"
            " 0000000000000005 …",
        ),
    ],
)
def test_the_log_says_what_a_transaction_held_that_was_not_finished(
    make_house: Callable[..., MemoryHouse], caplog: pytest.LogCaptureFixture, count: int, held: str
) -> None:
    house = make_house({"1": ParallelEngine()})
    slow = house.peer(name="slow")
    slow.one_way("tpc_begin", 1, b"/ clerk\n", b"/shop/order\x00 edit", {}, None, " ")
    for number in range(count):
        slow.store(p64(number + 1))
    slow.ask("vote", 1)
    house.later(limits.TRANSACTION_TIMEOUT_S)
    assert timeouts(caplog) == [
        f"(slow) Transaction timeout after 30 seconds: it was prepared, and held {held}; "
        "a transaction of / clerk: /shop/order  edit"
    ]


def test_the_log_says_it_of_a_transaction_without_a_name(
    make_house: Callable[..., MemoryHouse], caplog: pytest.LogCaptureFixture
) -> None:
    house = make_house({"1": ParallelEngine()})
    slow = house.peer(name="slow")
    slow.one_way("tpc_begin", 1, b"", b"", {}, None, " ")
    slow.store(A)
    slow.ask("vote", 1)
    house.later(limits.TRANSACTION_TIMEOUT_S)
    (line,) = timeouts(caplog)
    assert line.endswith("; a transaction of nobody: no description")


def test_a_client_that_does_not_resolve_its_conflict_is_dropped(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    house.peer().commit(A)
    slow = house.peer(name="slow")
    slow.ask("set_client_label", "worker 7")
    slow.begin()
    slow.store(A, serial=NO_TID)
    assert slow.ask("vote", 1)
    house.later(limits.TRANSACTION_TIMEOUT_S)
    assert slow.dropped
    (line,) = timeouts(caplog)
    assert line.startswith("(worker 7 slow) Transaction timeout after 30 seconds: it was resolving conflicts")


def test_the_timeout_can_be_chosen(make_house: Callable[..., MemoryHouse]) -> None:
    house = make_house(transaction_timeout_s=2.5)
    peer = house.peer()
    peer.prepare(A)
    house.later(2.4)
    assert not peer.dropped
    house.later(0.2)
    assert peer.dropped


def test_a_vote_does_not_wait_for_ever(house: MemoryHouse) -> None:
    holder, waiter = house.peer(), house.peer()
    assert holder.prepare(A).answered
    house.hosted.pack_begins()
    holder.start("tpc_finish", 1)  # and the engine takes its time
    vote = waiter.prepare(B)
    house.later(limits.VOTE_WAIT_S - 1)
    assert not vote.answered
    house.later(2)
    waiter.read()
    with pytest.raises(ConflictError, match="waited 300 s"):
        _ = vote.result
    house.commit.run_all()


def test_one_that_is_still_storing_has_all_the_time_it_needs(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    peer.store(A)
    house.later(1_000_000)
    assert not peer.dropped
    assert peer.ask("vote", 1) == ()
