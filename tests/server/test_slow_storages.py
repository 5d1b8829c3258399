"""A storage that may have to wait is asked in threads: who waits for it is its own clients, and only they."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ZODB.DemoStorage import DemoStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

import zeoid
from tests.server.inmemory import Call, MemoryHouse, in_order
from tests.server.sockets import RawClient
from zeoid import limits
from zeoid.engines.opening import engine_of
from zeoid.model import MAX_TID, NO_TID

A, B = p64(1), p64(2)
WAIT_S = 30.0


class Distant(MappingStorage):
    """Keeps those waiting who load A, or commit, while it is told to."""

    def __init__(self) -> None:
        super().__init__("distant")
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Semaphore(0)

    def loadBefore(self, oid: bytes, tid: bytes) -> Any:
        if oid == A:
            self._wait()
        return super().loadBefore(oid, tid)

    def tpc_vote(self, transaction: Any) -> Any:
        self._wait()
        return super().tpc_vote(transaction)

    def _wait(self) -> None:
        self.asked.release()
        assert self.answers.wait(WAIT_S)


@pytest.fixture
def distant() -> Iterator[Distant]:
    storage = Distant()
    yield storage
    storage.answers.set()


def test_which_storages_are_asked_on_the_event_loop() -> None:
    for storage, inline in (
        (MappingStorage(), True),
        (DemoStorage(), True),
        (DemoStorage(base=DemoStorage()), True),
        (Distant(), False),
        (DemoStorage(base=Distant()), False),
        (DemoStorage(changes=Distant()), False),
    ):
        engine = engine_of(storage)
        assert (engine.inline, engine.exclusive, engine.shared) == (inline, True, False), storage
        engine.close()


def test_a_load_that_waits_holds_up_nobody_else(distant: Distant) -> None:
    with zeoid.serve({"distant": distant, "near": None}) as server:
        address = (server.address.host, server.address.port)
        with RawClient(address) as writer, RawClient(address) as one, RawClient(address) as near:
            tid = writer.register("distant").commit(B)
            writer.commit(A)
            one.register("distant")
            near.register("near")
            distant.answers.clear()
            while distant.asked.acquire(blocking=False):
                pass
            waiting = one.start("loadBefore", A, MAX_TID)
            assert distant.asked.acquire(timeout=WAIT_S)
            assert writer.call("loadBefore", B, MAX_TID) == (b"data", tid, None)
            assert near.call("lastTransaction") == NO_TID
            with pytest.raises(POSKeyError):
                near.call("loadBefore", B, MAX_TID)
            assert not waiting.answered
            distant.answers.set()
            assert one.answer(waiting)[0] == b"data"


def test_more_loads_at_a_time_than_are_taken_are_all_answered(distant: Distant) -> None:
    """What comes after them is not even read from the socket, until some are done."""
    with zeoid.serve({"distant": distant}) as server:
        address = (server.address.host, server.address.port)
        with RawClient(address) as client, RawClient(address) as other:
            tid = client.register("distant").commit(A)
            distant.answers.clear()
            calls = [Call("loadBefore", (A, MAX_TID)) for _ in range(2 * limits.READS_PER_CONNECTION + 10)]
            client.send(b"".join(client.connection.call(call, call.name, call.args) for call in calls))
            last = client.start("lastTransaction")
            assert other.register("distant").call("lastTransaction") == tid
            distant.answers.set()
            assert client.answer(last) == tid
            assert {client.answer(call) for call in calls} == {(b"data", tid, None)}


def test_a_vote_that_waits_holds_up_no_load(distant: Distant) -> None:
    with zeoid.serve({"distant": distant, "near": None}) as server:
        address = (server.address.host, server.address.port)
        with RawClient(address) as writer, RawClient(address) as reader, RawClient(address) as near:
            first = writer.register("distant").commit(B)
            reader.register("distant")
            distant.answers.clear()
            while distant.asked.acquire(blocking=False):
                pass
            voting = threading.Thread(target=writer.commit, args=(A,), daemon=True)
            voting.start()
            assert distant.asked.acquire(timeout=WAIT_S)
            assert reader.call("loadBefore", B, MAX_TID) == (b"data", first, None)
            assert near.register("near").commit(A)
            distant.answers.set()
            voting.join(WAIT_S)
            assert reader.call("loadBefore", A, MAX_TID)[0] == b"data"


@pytest.fixture
def house(distant: Distant, make_house: Callable[..., MemoryHouse]) -> MemoryHouse:
    return make_house({"1": engine_of(distant)})


def test_transactions_are_carried_out_in_order_in_one_thread(house: MemoryHouse) -> None:
    one, other = house.peer(), house.peer()
    first, second = one.prepare(A), other.prepare(A)
    assert len(house.commit) == 1, "one at a time"
    house.commit.run_all()
    one.read()
    assert first.answered
    assert not second.answered
    tid = one.ask("tpc_finish", 1)
    house.commit.run_all()
    other.read()
    (conflict,) = second.result
    assert conflict["serials"][0] == tid
    assert list(in_order(other.events))[-2:] == ["call invalidateTransaction", "reply vote"]


def test_records_are_walked_through_in_threads(house: MemoryHouse) -> None:
    peer = house.peer()
    tid = peer.commit(A)
    call = peer.start("iterator_start")
    assert not call.answered
    house.beside.run_all()
    peer.read()
    number = call.result
    first, second = peer.calls(("iterator_next", number), ("iterator_next", number))
    house.beside.run_all()
    peer.read()
    assert (first.result[0], second.result) == (tid, None)


def test_a_pack_asks_for_sizes_in_its_thread(house: MemoryHouse, distant: Distant) -> None:
    """A database tells its size by a question to its server, too."""
    asked = 0
    in_thread = False
    size_of = distant.getSize

    def size() -> Any:
        nonlocal asked
        assert in_thread
        asked += 1
        return size_of() + 1000

    peer = house.peer()
    peer.commit(A)
    distant.getSize = size  # type: ignore[method-assign]
    distant.pack = lambda *_: None  # type: ignore[method-assign]
    call = peer.start("pack", house.clock.time())
    assert peer.ask("pack_status")["state"] == "running"
    in_thread = True
    house.packs.work()
    in_thread = False
    house.packs.land()
    peer.read()
    assert call.result is None
    told = peer.ask("pack_status")
    assert (told["state"], told["size_after"], asked) == ("done", size_of() + 1000, 1)


def test_a_connection_that_is_lost_while_it_waits_is_forgotten(house: MemoryHouse) -> None:
    peer, other = house.peer(), house.peer()
    peer.commit(A)
    call = peer.start("loadBefore", A, MAX_TID)
    peer.disconnect()
    house.beside.run_all()
    assert not call.answered
    assert other.ask("lastTransaction")
