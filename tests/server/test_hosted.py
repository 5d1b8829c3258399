"""One storage of a server: what the machine decides is carried out on the engine and told to the clients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import ConflictError, ReadOnlyError, StorageError
from ZODB.utils import p64

from tests.server.inmemory import MemoryHouse, ParallelEngine, Peer, in_order
from zeoid import limits
from zeoid.engines.opening import open_filestorage, open_memory
from zeoid.engines.storage import StorageEngine
from zeoid.model import MAX_TID, NO_TID
from zeoid.wire.messages import BLOB_EXTENSIONS, EXTENSIONS

A, B, C = p64(1), p64(2), p64(3)
STATUS_AT_START = {
    "aborts": 0, "active_txns": 0, "commits": 0, "conflicts": 0, "conflicts_resolved": 0, "connections": 0,
    "last-transaction": "0" * 16, "loads": 0, "lock_time": None, "stores": 0, "timeout-thread-is-alive": True,
    "waiting": 0,
}  # fmt: skip


class Failing(StorageEngine):
    """An engine that fails where it is told to."""

    failing = ""

    def _check(self, where: str) -> None:
        if self.failing == where:
            raise OSError(28, "No space left on device")

    def prepare(self, *args: Any) -> Any:
        self._check("prepare")
        return super().prepare(*args)

    def commit(self, *args: Any) -> None:
        self._check("commit")
        super().commit(*args)

    def abandon(self, *args: Any) -> None:
        self._check("abandon")
        super().abandon(*args)


@pytest.fixture
def failing(make_house: Callable[..., MemoryHouse]) -> MemoryHouse:
    return make_house({"1": Failing(open_memory()._storage)})


def fail_at(house: MemoryHouse, where: str) -> None:
    engine = house.hosted.engine
    assert isinstance(engine, Failing)
    engine.failing = where


# Committing -----------------------------------------------------------------------------------------------


def test_a_commit_is_told_to_everybody_else(house: MemoryHouse) -> None:
    writer, reader, other = house.peer(), house.peer(), house.peer()
    tid = writer.commit(A, B)
    for peer in (reader, other):
        assert peer.told() == [(tid, (A, B))]
    assert writer.told() == []


def sizes_told(peer: Peer) -> list[int]:
    peer.read()
    return [event.value[0]["size"] for event in peer.events if event.name == "info"]


def test_everybody_is_told_of_the_size_now_and_then(file_house: MemoryHouse) -> None:
    """At most once a second, and only if it has changed: not at every commit."""
    writer, reader = file_house.peer(), file_house.peer()
    engine = file_house.hosted.engine
    file_house.later(limits.INFO_S)
    writer.commit(A)
    file_house.later(limits.INFO_S * 0.9)
    writer.commit(B)
    assert sizes_told(writer) == sizes_told(reader) == []
    file_house.later(limits.INFO_S * 0.2)
    first = engine.size_bytes()
    assert sizes_told(writer) == sizes_told(reader) == [first]
    writer.commit(C)
    file_house.later(limits.INFO_S * 0.5)
    assert sizes_told(reader) == [first]
    for _ in range(3):
        file_house.later(limits.INFO_S)
    assert sizes_told(writer) == sizes_told(reader) == [first, engine.size_bytes()]


def test_those_who_have_not_registered_are_told_nothing(house: MemoryHouse) -> None:
    stranger = Peer(house)
    house.peer().commit(A)
    assert stranger.read() == []


def test_votes_wait_for_each_other_where_the_engine_takes_one_at_a_time(house: MemoryHouse) -> None:
    first, second, third = house.peer(), house.peer(), house.peer()
    assert first.prepare(A).result == ()
    votes = [second.prepare(B), third.prepare(C)]
    assert house.hosted.status()["waiting"] == 2
    first.ask("tpc_finish", 1)
    second.read()
    third.read()
    assert [vote.answered for vote in votes] == [True, False]
    second.ask("tpc_abort", 1)
    third.read()
    assert votes[1].answered


def test_a_conflict_is_put_to_the_client_that_can_resolve_it(house: MemoryHouse) -> None:
    writer, peer = house.peer(), house.peer()
    first = writer.commit(A, data=b"one")
    peer.begin()
    peer.store(A, b"mine", serial=first)
    second = writer.commit(A, data=b"two")
    (conflict,) = peer.ask("vote", 1)
    assert conflict == {"oid": A, "serials": (second, first), "data": b"mine"}
    peer.store(A, b"both", serial=second)
    assert peer.ask("vote", 1) == ()
    tid = peer.ask("tpc_finish", 1)
    assert peer.ask("loadBefore", A, MAX_TID) == (b"both", tid, None)
    status = house.hosted.status()
    assert (status["conflicts"], status["conflicts_resolved"]) == (1, 1)


def test_a_failure_to_prepare_is_the_clients_matter(failing: MemoryHouse) -> None:
    peer = failing.peer()
    fail_at(failing, "prepare")
    with pytest.raises(Exception, match="No space left"):
        _ = peer.prepare(A).result
    assert failing.fatal == []
    fail_at(failing, "")
    assert peer.commit(A)


# What can't go on -----------------------------------------------------------------------------------------


def test_a_failure_to_commit_stops_the_server(failing: MemoryHouse) -> None:
    """What is on the disk can't be known: no reply, no invalidation, nothing more for the engine to do."""
    writer, reader = failing.peer(), failing.peer()
    assert writer.prepare(A).answered
    waiting = reader.prepare(C)
    fail_at(failing, "commit")
    finish = writer.start("tpc_finish", 1)
    assert not finish.answered
    assert reader.told() == []
    assert not waiting.answered
    (reason,) = failing.fatal
    assert "storage '1' failed to commit" in reason
    assert "No space left" in reason
    fail_at(failing, "")
    writer.disconnect()
    reader.disconnect()
    assert failing.hosted.visible.tid == NO_TID


def test_a_failure_to_abandon_stops_the_server(failing: MemoryHouse) -> None:
    peer = failing.peer()
    peer.prepare(A)
    fail_at(failing, "abandon")
    peer.ask("tpc_abort", 1)
    assert "failed to abandon" in failing.fatal[0]


def test_a_failure_to_commit_in_a_thread_stops_the_server(failing: MemoryHouse) -> None:
    writer, reader = failing.peer(), failing.peer()
    assert writer.prepare(A).answered
    failing.hosted.pack_begins()
    fail_at(failing, "commit")
    finish = writer.start("tpc_finish", 1)
    failing.commit.run()
    writer.read()
    assert not finish.answered
    assert reader.told() == []
    assert len(failing.fatal) == 1


def test_an_engine_that_fails_in_the_background_stops_the_server(
    make_house: Callable[..., MemoryHouse],
) -> None:
    """It is noticed at the next tick, and said once."""
    engine = ParallelEngine()
    house = make_house({"1": engine})
    peer = house.peer()
    engine.problem = "OSError: [Errno 5] Input/output error"
    for _ in range(3):
        house.later(limits.TICK_S)
    assert house.fatal == ["storage '1' failed: OSError: [Errno 5] Input/output error"]
    assert not peer.prepare(A).answered
    assert engine.batches == []


# What a server says of a storage --------------------------------------------------------------------------


def test_the_status_at_the_start(house: MemoryHouse) -> None:
    status = house.hosted.status()
    assert isinstance(status.pop("start"), str)
    assert status == STATUS_AT_START


def test_the_status_counts(house: MemoryHouse) -> None:
    peer, other = house.peer(), house.peer()
    tid = peer.commit(A, B)
    peer.ask("loadBefore", A, MAX_TID)
    peer.ask("loadBefore", B, MAX_TID)
    other.prepare(C)
    peer.prepare(A)
    peer.begin("aborted")
    peer.ask("tpc_abort", "aborted")
    peer.ask("tpc_abort", "never begun")
    status = house.hosted.status()
    counted = {key: status[key] for key in ("aborts", "active_txns", "commits", "loads", "stores", "waiting")}
    assert counted == {"aborts": 1, "active_txns": 2, "commits": 1, "loads": 2, "stores": 4, "waiting": 1}
    assert (status["connections"], status["last-transaction"]) == (2, tid.hex())


def test_the_status_tells_since_when_the_lock_is_held(house: MemoryHouse) -> None:
    peer, other = house.peer(), house.peer()
    locked_at = house.clock.time()
    peer.prepare(A)
    other.prepare(B)
    house.later(5)
    assert house.hosted.status()["lock_time"] == locked_at
    peer.ask("tpc_finish", 1)
    other.ask("tpc_abort", 1)
    assert house.hosted.status()["lock_time"] is None


def test_the_storage_is_described(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    peer.commit(A, B)
    info = peer.ask("get_info")
    engine = file_house.hosted.engine
    assert info.pop("interfaces") == engine.interfaces
    assert info == {
        "length": 2, "size": engine.size_bytes(), "name": engine.name, "supportsUndo": True,
        "supports_record_iternext": True,
        "extensions": tuple(name for name in EXTENSIONS if name not in BLOB_EXTENSIONS),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "given"),
    [(1, 1), (100, 100), (0, 1), (-5, 1), (1000, 1000), (10**9, limits.NEW_OIDS), (True, 1)],
)
def test_oids_are_given_in_reasonable_numbers(house: MemoryHouse, count: int, given: int) -> None:
    oids = house.peer().ask("new_oids", count)
    assert len(oids) == len(set(oids)) == given


def test_a_hundred_oids_are_given_unless_asked_otherwise(house: MemoryHouse) -> None:
    assert len(house.peer().ask("new_oids")) == 100


def test_a_read_only_server_gives_no_oids(make_house: Callable[..., MemoryHouse]) -> None:
    house = make_house(read_only=True)
    with pytest.raises(ReadOnlyError):
        house.hosted.new_oids(1)


def test_what_clients_missed_is_known_from_the_start_on(
    file_house: MemoryHouse, make_house: Callable[..., MemoryHouse], tmp_path: Path
) -> None:
    writer = file_house.peer()
    first, second = writer.commit(A), writer.commit(B)
    file_house.close()
    again = make_house({"1": open_filestorage(tmp_path / "Data.fs")})
    assert again.peer().ask("getInvalidations", first) == (second, (B,))
    assert again.peer().ask("getInvalidations", NO_TID) is None


@pytest.mark.parametrize("size", [0, 1, 3])
def test_only_so_many_transactions_are_remembered(make_house: Callable[..., MemoryHouse], size: int) -> None:
    house = make_house(invalidation_log_transactions=size)
    peer = house.peer()
    tids = [peer.commit(A) for _ in range(6)]
    for behind, tid in enumerate(reversed(tids)):
        expected = None if behind > size else (tids[-1], (A,) if behind else ())
        assert peer.ask("getInvalidations", tid) == expected


# Clients that come and go while something is being done --------------------------------------------------


def test_a_client_that_is_dropped_for_its_slowness_gives_up_everything(house: MemoryHouse) -> None:
    slow, other = house.peer(), house.peer()
    slow.prepare(A)
    slow.prepare(B, id=2)
    vote = other.prepare(C)
    house.later(limits.TRANSACTION_TIMEOUT_S)
    other.read()
    assert vote.result == ()
    assert house.hosted.transactions.active == 1
    assert house.hosted.clients == {other.session}


def test_replies_come_in_the_order_of_what_happened(house: MemoryHouse) -> None:
    first, second = house.peer(), house.peer()
    first.prepare(A)
    second.prepare(B)
    second.read()
    second.events.clear()
    first.calls(("tpc_finish", 1), ("lastTransaction",))
    assert list(in_order(second.read())) == ["call invalidateTransaction", "reply vote"]
    assert list(in_order(first.events))[-2:] == ["reply tpc_finish", "reply lastTransaction"]


def test_an_error_that_is_expected_is_no_matter_for_the_log(
    failing: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    peer = failing.peer()
    peer.commit(A)
    peer.begin()
    peer.one_way("checkCurrentSerialInTransaction", A, NO_TID, 1)
    with pytest.raises(ConflictError):
        peer.ask("vote", 1)
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def test_a_disk_that_is_full_is_a_matter_for_the_log(
    failing: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    peer = failing.peer()
    fail_at(failing, "prepare")
    with pytest.raises(StorageError, match="No space left"):
        _ = peer.prepare(A).result
    problems = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert problems == ["peer: vote failed"]
