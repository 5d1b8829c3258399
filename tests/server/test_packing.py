"""A storage that packs: what waits for it, what does not, and what clients are told at the end."""

from __future__ import annotations

import pickle

from ZODB.utils import p64

from tests.server.inmemory import NOON, MemoryHouse
from zeoid import limits

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
