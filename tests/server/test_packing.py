"""A storage that packs: what waits for it, what does not, and what clients are told at the end."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
from ZODB.POSException import ReadOnlyError, StorageError
from ZODB.utils import p64

from tests.server.assertions import log_lines
from tests.server.inmemory import NOON, MemoryHouse, Peer
from zeoid import limits
from zeoid.errors import PackCancelled
from zeoid.ports import PackStep

A, B, C = p64(1), p64(2), p64(3)
#: A record that refers to nothing, as a pack reads it.
ROOT = pickle.dumps("a class", 3) + pickle.dumps({}, 3)


def test_the_loop_does_not_wait_for_an_engine_that_packs(house: MemoryHouse) -> None:
    """One that takes one transaction at a time, and may hold its locks for as long as it packs."""
    peer = house.peer()
    peer.commit(p64(0), data=ROOT)
    packing = peer.start("pack", NOON)
    vote = peer.prepare(A)
    assert not vote.answered
    assert peer.ask("ping") is None
    house.commit.run()
    peer.read()
    assert vote.result == ()
    finish = peer.start("tpc_finish", 1)
    house.packs.run()
    house.commit.run()
    peer.read()
    assert finish.result == house.hosted.visible.tid
    assert packing.result is None
    assert peer.commit(B)


def test_the_loop_does_not_wait_for_a_data_file_that_is_packed(file_house: MemoryHouse) -> None:
    """A vote only looks; a commit waits for the pack, in a thread, also where there is no other client."""
    peer = file_house.peer()
    peer.commit(p64(0), data=ROOT)
    packing = peer.start("pack", NOON)
    assert peer.prepare(A).result == ()
    finish = peer.start("tpc_finish", 1)
    assert not finish.answered
    assert peer.ask("ping") is None
    file_house.packs.run()
    file_house.commit.run()
    peer.read()
    assert finish.result == file_house.hosted.visible.tid
    assert packing.result is None
    assert peer.commit(B)


def test_what_went_to_a_thread_keeps_its_place(house: MemoryHouse) -> None:
    """The pack has ended, but the thread has not: what comes later must not overtake what is in it."""
    first, second = house.peer(), house.peer()
    assert first.prepare(A).answered
    house.hosted.pack_begins()
    finish = first.start("tpc_finish", 1)
    vote = second.prepare(B)
    house.hosted.pack_ended()
    assert not vote.answered
    house.commit.work()
    assert not vote.answered
    house.commit.land()
    house.commit.run_all()
    first.read()
    second.read()
    assert finish.answered
    assert vote.result == ()
    assert second.ask("tpc_finish", 1) > finish.result
    assert second.commit(C)


def test_an_abort_during_a_pack_keeps_its_place(house: MemoryHouse) -> None:
    first, second = house.peer(), house.peer()
    assert first.prepare(A).answered
    house.hosted.pack_begins()
    first.ask("tpc_abort", 1)
    vote = second.prepare(B)
    assert len(house.commit) == 2
    house.commit.run_all()
    second.read()
    assert vote.result == ()
    house.hosted.pack_ended()
    assert second.ask("tpc_finish", 1)


def test_an_abort_in_a_thread_is_not_overtaken_when_the_pack_has_ended(house: MemoryHouse) -> None:
    """The engine must forget one transaction before it is given the next."""
    first, second = house.peer(), house.peer()
    assert first.prepare(A).answered
    house.hosted.pack_begins()
    first.ask("tpc_abort", 1)
    house.hosted.pack_ended()
    vote = second.prepare(B)
    assert not vote.answered
    house.commit.run_all()
    second.read()
    assert vote.result == ()
    assert second.ask("tpc_finish", 1)


def test_everybody_is_told_what_a_pack_freed(file_house: MemoryHouse) -> None:
    peers = [file_house.peer() for _ in range(3)]
    for _ in range(3):
        peers[0].commit(p64(0), data=ROOT)
    file_house.later(limits.INFO_S)
    for peer in peers:
        peer.read()
    before = file_house.hosted.engine.size_bytes()
    peers[0].start("pack", file_house.clock.time())
    file_house.packs.run()
    size = {"length": file_house.hosted.engine.count(), "size": file_house.hosted.engine.size_bytes()}
    assert size["size"] < before
    for peer in peers[1:]:
        assert [event.value for event in peer.read()] == [(size,)]


# Its state --------------------------------------------------------------------------------------------

KEYS = {
    "number", "state", "time", "phase", "percent", "objects", "objects_total", "bytes", "bytes_total",
    "size_before", "size_after", "seconds", "can_cancel", "cancelling", "error",
}  # fmt: skip


def status(peer: Peer) -> dict[str, Any]:
    told: dict[str, Any] = peer.ask("pack_status")
    assert set(told) == KEYS
    return told


@pytest.mark.parametrize("coding", ["M5", "Z5"])
def test_how_far_a_pack_is(file_house: MemoryHouse, coding: str) -> None:
    peer = Peer(file_house, coding=coding).register()
    reader = Peer(file_house, coding=coding).register(read_only=True)
    for _ in range(3):
        peer.commit(p64(0), data=ROOT)
    size = file_house.hosted.engine.size_bytes()
    assert reader.ask("pack_status") == {"number": 0, "state": "none"}

    peer.start("pack", file_house.clock.time() + 1)
    begun = status(reader)
    assert (begun["state"], begun["phase"], begun["percent"]) == ("running", "beginning", 0)
    assert (begun["time"], begun["number"] > 0) == (file_house.clock.time() + 1, True)
    assert (begun["size_before"], begun["size_after"]) == (size, 0)
    assert (begun["can_cancel"], begun["cancelling"], begun["error"]) == (True, False, "")
    file_house.later(7)
    assert status(reader)["seconds"] == 7

    file_house.packs.run()
    file_house.later(100)
    ended = status(reader)
    assert (ended["state"], ended["percent"], ended["seconds"]) == ("done", 100, 7)
    assert ended["size_after"] == file_house.hosted.engine.size_bytes() < size
    assert (ended["objects"], ended["objects_total"]) == (1, 1)
    assert (ended["can_cancel"], ended["number"]) == (False, begun["number"])

    peer.start("pack", file_house.clock.time())
    assert status(reader)["number"] > ended["number"]
    file_house.packs.run()


def test_what_an_engine_reports_is_told_but_not_the_whole_before_the_end(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    pack = file_house.hosted.pack_begins()
    pack.report(PackStep("copying", 12.5, 3, 4, 5, 6))
    told = status(peer)
    assert (told["phase"], told["percent"]) == ("copying", 12.5)
    assert [told[key] for key in ("objects", "objects_total", "bytes", "bytes_total")] == [3, 4, 5, 6]
    pack.report(PackStep("copying", 100.0, 4, 4, 6, 6))
    assert status(peer)["percent"] == 99.9
    pack.begin_replacing()
    assert (status(peer)["phase"], status(peer)["can_cancel"]) == ("replacing", False)
    file_house.hosted.pack_ended()
    assert status(peer)["percent"] == 100


def test_a_pack_that_failed(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    peer.commit(p64(0), data=b"no pickle")
    call = peer.start("pack", file_house.clock.time() + 1)
    file_house.packs.run()
    peer.read()
    with pytest.raises(StorageError, match="invalid load key"):
        _ = call.result
    told = status(peer)
    assert (told["state"], told["can_cancel"], told["size_after"]) == ("failed", False, 0)
    assert "UnpicklingError: invalid load key" in told["error"]
    assert told["percent"] < 100


def test_a_storage_that_packs_by_itself_tells_no_percentage(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.start("pack", NOON)
    told = status(peer)
    assert (told["percent"], told["can_cancel"]) == (None, False)
    assert peer.ask("pack_cancel") == "a pack of this storage can't be interrupted"
    house.packs.run()
    assert (status(peer)["state"], status(peer)["percent"]) == ("done", 100)


# Giving it up -----------------------------------------------------------------------------------------


def test_a_pack_is_cancelled(file_house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    """By anybody who may write; the one who waits for it is told."""
    peer, other = file_house.peer(), file_house.peer()
    for _ in range(3):
        peer.commit(p64(0), data=ROOT)
    size = file_house.hosted.engine.size_bytes()
    call = peer.start("pack", file_house.clock.time() + 1)
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert other.ask("pack_cancel") is None
    assert other.ask("pack_cancel") is None
    assert (status(other)["state"], status(other)["cancelling"]) == ("running", True)
    file_house.packs.run()
    peer.read()
    with pytest.raises(StorageError, match=r"^the pack was cancelled$"):
        _ = call.result
    assert (status(other)["state"], status(other)["cancelling"]) == ("cancelled", False)
    assert (file_house.hosted.packing, file_house.hosted.engine.size_bytes()) == (False, size)
    assert log_lines(caplog, logging.INFO) == [
        "peer cancels the pack of storage '1'",
        "peer cancels the pack of storage '1'",
        "the pack of storage '1' was cancelled",
    ]
    again = peer.start("pack", file_house.clock.time() + 1)
    file_house.packs.run()
    peer.read()
    assert again.result is None
    assert file_house.hosted.engine.size_bytes() < size


def test_there_is_nothing_to_cancel(file_house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = file_house.peer()
    assert peer.ask("pack_cancel") == "no pack of this storage is under way"
    peer.start("pack", NOON)
    file_house.packs.run()
    assert peer.ask("pack_cancel") == "no pack of this storage is under way"
    assert log_lines(caplog) == []


def test_it_is_too_late_to_cancel(file_house: MemoryHouse) -> None:
    """It is one or the other: what was cancelled is not replaced, what is being replaced is not cancelled."""
    peer = file_house.peer()
    late = file_house.hosted.pack_begins()
    late.begin_replacing()
    assert "too late" in peer.ask("pack_cancel")
    late.report(PackStep("copying"))
    file_house.hosted.pack_ended()

    early = file_house.hosted.pack_begins()
    assert peer.ask("pack_cancel") is None
    with pytest.raises(PackCancelled):
        early.begin_replacing()
    with pytest.raises(PackCancelled):
        early.report(PackStep("copying"))
    assert status(peer)["phase"] == "copying"
    file_house.hosted.pack_ended(PackCancelled())


def test_who_only_reads_cancels_nothing(file_house: MemoryHouse) -> None:
    file_house.peer().start("pack", NOON)
    with pytest.raises(ReadOnlyError):
        Peer(file_house).register(read_only=True).ask("pack_cancel")
    assert not status(file_house.peer())["cancelling"]
    file_house.packs.run()
