"""A load takes a short way through a session. Nobody may notice but by the time it takes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import p64

from tests.server.inmemory import Call, MemoryHouse, Peer
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ServerError
from zeoid.model import MAX_TID, Revision
from zeoid.wire.loads import REQUEST_BYTES

A, B = p64(1), p64(2)
codings = pytest.mark.parametrize("coding", ["M5", "Z5"])


class CountingEngine(StorageEngine):
    """Counts the loads, and fails them on demand."""

    def __init__(self) -> None:
        super().__init__(MappingStorage("counting"))
        self.loads = 0
        self.problem: Exception | None = None

    def load_before(self, oid: bytes, tid: bytes) -> Revision | None:
        self.loads += 1
        if self.problem is not None:
            raise self.problem
        return super().load_before(oid, tid)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def house(engine: CountingEngine) -> Any:
    house = MemoryHouse({"1": engine})
    yield house
    house.close()


def load(peer: Peer, oid: bytes, tid: bytes = MAX_TID) -> bytes:
    """The bytes that ask for it; the answer will be among the peer's events."""
    data = peer.connection.call(Call("loadBefore"), "loadBefore", (oid, tid))
    assert len(data) == REQUEST_BYTES or peer.connection.protocol == "Z5"
    return data


@codings
@pytest.mark.parametrize("size", [1, 255, 256, 65535, 65536])
def test_a_load_is_answered_with_the_revision(house: MemoryHouse, coding: str, size: int) -> None:
    peer = house.peer(coding=coding)
    data = bytes(size - 1) + b"."
    tid = peer.commit(A, data=data)
    assert peer.ask("loadBefore", A, MAX_TID) == (data, tid, None)
    assert peer.ask("loadBefore", A, tid) is None


@codings
def test_an_earlier_revision_has_its_end(house: MemoryHouse, coding: str) -> None:
    peer = house.peer(coding=coding)
    first = peer.commit(A)
    second = peer.commit(A)
    assert peer.ask("loadBefore", A, second)[1:] == (first, second)


@codings
def test_each_load_is_one_load_of_the_engine_and_counted_once(
    house: MemoryHouse, engine: CountingEngine, coding: str
) -> None:
    peer = house.peer(coding=coding)
    peer.commit(A)
    engine.loads = house.hosted.counts.loads = 0
    peer.ask("loadBefore", A, MAX_TID)
    peer.calls(("loadBefore", A, MAX_TID), ("loadBefore", A, MAX_TID))
    assert (engine.loads, house.hosted.counts.loads) == (3, 3)


@codings
def test_a_load_that_fails_is_answered_and_logged(
    house: MemoryHouse, engine: CountingEngine, coding: str, caplog: pytest.LogCaptureFixture
) -> None:
    peer = house.peer(coding=coding)
    engine.problem = OSError("the disk is gone")
    with pytest.raises(ServerError, match="the disk is gone"):
        peer.ask("loadBefore", A, MAX_TID)
    assert "peer: loadBefore failed" in [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    engine.problem = None
    assert peer.ask("lastTransaction") == house.hosted.visible.tid


def test_before_register_there_is_nothing_to_load(house: MemoryHouse, engine: CountingEngine) -> None:
    peer = Peer(house)
    with pytest.raises(TypeError, match="before register"):
        peer.ask("loadBefore", A, MAX_TID)
    assert engine.loads == 0


def test_who_does_not_read_gets_no_load_answered(house: MemoryHouse, engine: CountingEngine) -> None:
    peer = house.peer()
    peer.commit(A, B)
    peer.session.pause()
    engine.loads = 0
    peer.send(load(peer, A))
    assert engine.loads == 0
    peer.send(peer.connection.call(Call("ping"), "ping", ()))
    peer.send(load(peer, B))  # it waits behind what came before it
    assert engine.loads == 0
    peer.session.resume()
    assert engine.loads == 2
    assert [event.kind for event in peer.read()] == ["reply"] * 3


def test_a_load_keeps_its_place_behind_calls_that_wait(house: MemoryHouse, engine: CountingEngine) -> None:
    peer = house.peer()
    peer.commit(A)
    peer.session.pause()
    peer.send(peer.connection.call(Call("ping"), "ping", ()))
    peer.session._paused = False  # as for a moment in `resume`, before it carries out what waits
    engine.loads = 0
    peer.send(load(peer, A))
    assert [event.kind for event in peer.read()] == ["reply"] * 2
    assert engine.loads == 1


def test_what_is_held_back_comes_before_the_answer_to_a_later_load(house: MemoryHouse) -> None:
    """An invalidation that was written first is read first, also while writes are gathered."""
    writer, reader = house.peer(), house.peer()
    reader.session.hold()
    tid = writer.commit(A)
    reader.send(load(reader, A))
    assert reader.wire.writes == []
    reader.session.let_go()
    told, answer = reader.read()
    assert (told.name, told.value[0]) == ("invalidateTransaction", tid)
    assert answer.value[1] == tid


def test_a_load_on_a_connection_that_breaks_now(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.wire.problem = ConnectionResetError("gone")
    peer.send(load(peer, A))
    assert peer.session not in house.hosted.clients
    assert peer.wire.closed


def test_a_closed_session_answers_no_load(house: MemoryHouse, engine: CountingEngine) -> None:
    peer = house.peer()
    peer.session.drop("enough")
    engine.loads = 0
    peer.send(load(peer, A))
    assert engine.loads == 0
    assert peer.wire.writes == []
