"""Blobs that a client sends in chunks: joined to their transaction when they are durable, or gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import StorageError, StorageTransactionError, Unsupported
from ZODB.utils import p64

from tests.engines.blobfiles import final_files, staged_files
from tests.room import no_room_beyond
from tests.server.inmemory import Call, MemoryHouse, Peer
from zeoid import limits
from zeoid.engines.opening import open_filestorage
from zeoid.model import NO_TID

A, B = p64(1), p64(2)
RECORD = b"the record"
CHUNK = b"x" * 59_000


@pytest.fixture
def blob_dir(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def house(make_house: Callable[..., MemoryHouse], tmp_path: Path, blob_dir: Path) -> MemoryHouse:
    return make_house({"1": open_filestorage(tmp_path / "Data.fs", blob_dir=blob_dir)})


def send(peer: Peer, *chunks: bytes) -> None:
    peer.one_way("storeBlobStart")
    for chunk in chunks:
        peer.one_way("storeBlobChunk", chunk)


def upload(peer: Peer, *chunks: bytes, oid: bytes = A, serial: Any = NO_TID, id: int = 1) -> None:
    peer.one_way("storea", oid, serial, RECORD, id)
    send(peer, *chunks)
    peer.one_way("storeBlobEnd", oid, serial, RECORD, id)


def vote(house: MemoryHouse, peer: Peer) -> Call:
    """A vote, and all that it waits for."""
    call = peer.start("vote", 1)
    settle(house, peer)
    return call


def settle(house: MemoryHouse, peer: Peer) -> None:
    house.blobs.run_all()
    while len(house.blobs) or len(house.beside) or len(house.commit):
        house.work()
        house.blobs.run_all()
    peer.read()


def finish(house: MemoryHouse, peer: Peer) -> bytes:
    assert vote(house, peer).result == ()
    tid: bytes = peer.ask("tpc_finish", 1)
    return tid


def content(house: MemoryHouse, oid: bytes, tid: bytes) -> bytes:
    with house.hosted.engine.open_blob(oid, tid) as file:
        return file.read()


@pytest.mark.parametrize("chunks", [(), (b"small",), (CHUNK,) * 20 + (b"end",)], ids=len)
def test_a_blob_is_committed_with_its_record(house: MemoryHouse, chunks: tuple[bytes, ...]) -> None:
    peer = house.peer()
    peer.begin()
    upload(peer, *chunks)
    tid = finish(house, peer)
    assert content(house, A, tid) == b"".join(chunks)
    assert peer.ask("loadBefore", A, p64(2**62))[:2] == (RECORD, tid)


def test_a_vote_waits_for_the_writer(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    upload(peer, b"content")
    call = peer.start("vote", 1)
    house.work()
    peer.read()
    assert not call.answered
    assert house.hosted.busy
    settle(house, peer)
    assert call.result == ()


def test_a_vote_waits_for_all_of_them(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    upload(peer, b"one")
    upload(peer, b"two", oid=B)
    call = peer.start("vote", 1)
    house.blobs.run()
    house.work()
    peer.read()
    assert not call.answered
    settle(house, peer)
    tid = peer.ask("tpc_finish", 1)
    assert (content(house, A, tid), content(house, B, tid)) == (b"one", b"two")


def test_the_record_counts_once(house: MemoryHouse) -> None:
    """A stock client sends it twice; our own may leave it to the end of the blob."""
    peer = house.peer()
    peer.begin()
    upload(peer, b"content")
    send(peer, b"content")
    peer.one_way("storeBlobEnd", B, NO_TID, RECORD, 1)
    settle(house, peer)
    transaction = house.hosted.transactions.find(peer.session, 1)
    assert transaction is not None
    assert [type(each).__name__ for each in transaction.operations] == ["Store", "Store", *["AttachBlob"] * 2]


@pytest.mark.parametrize("serial", [None, "\0" * 8])
def test_an_object_that_is_new_may_have_no_serial(house: MemoryHouse, serial: str | None) -> None:
    peer = house.peer()
    peer.begin()
    upload(peer, b"content", serial=serial)
    assert content(house, A, finish(house, peer)) == b"content"


def test_a_second_start_abandons_the_first(house: MemoryHouse, blob_dir: Path) -> None:
    peer = house.peer()
    peer.begin()
    send(peer, *[CHUNK] * 10)
    house.blobs.run()
    assert len(staged_files(blob_dir)) == 1
    upload(peer, b"second")
    tid = finish(house, peer)
    assert content(house, A, tid) == b"second"
    assert len(final_files(blob_dir)) == 1
    house.hosted.engine.checkpoint()
    assert staged_files(blob_dir) == []


def opened(house: MemoryHouse, peer: Peer) -> None:
    send(peer, b"little")


def being_written(house: MemoryHouse, peer: Peer) -> None:
    send(peer, *[CHUNK] * 10)
    house.blobs.work()


def written(house: MemoryHouse, peer: Peer) -> None:
    send(peer, *[CHUNK] * 10)
    house.blobs.run()


def being_completed(house: MemoryHouse, peer: Peer) -> None:
    upload(peer, b"content")
    house.blobs.work()


def ended(house: MemoryHouse, peer: Peer) -> None:
    upload(peer, b"content")


def voted_on(house: MemoryHouse, peer: Peer) -> None:
    upload(peer, b"content")
    peer.start("vote", 1)


def joined(house: MemoryHouse, peer: Peer) -> None:
    upload(peer, b"content")
    house.blobs.run_all()


STATES = (opened, being_written, written, being_completed, ended, voted_on, joined)


@pytest.mark.parametrize("state", STATES)
def test_nothing_is_left_of_a_connection_that_is_lost(
    house: MemoryHouse, blob_dir: Path, state: Callable[[MemoryHouse, Peer], None]
) -> None:
    peer = house.peer()
    peer.begin()
    state(house, peer)
    peer.disconnect()
    settle(house, house.peer())
    assert staged_files(blob_dir) == []
    assert not house.hosted.busy


@pytest.mark.parametrize("state", [being_completed, ended, voted_on, joined])
def test_nothing_is_left_of_a_transaction_that_is_aborted(
    house: MemoryHouse, blob_dir: Path, state: Callable[[MemoryHouse, Peer], None]
) -> None:
    peer = house.peer()
    peer.begin()
    state(house, peer)
    peer.start("tpc_abort", 1)
    settle(house, peer)
    assert staged_files(blob_dir) == []
    peer.begin()
    upload(peer, b"again")
    assert content(house, A, finish(house, peer)) == b"again"


def test_a_vote_that_waits_is_answered_when_its_transaction_is_aborted(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    upload(peer, b"content")
    call = peer.start("vote", 1)
    peer.start("tpc_abort", 1)
    with pytest.raises(StorageTransactionError, match="aborted"):
        call.result  # noqa: B018 - it raises
    settle(house, peer)


def test_a_second_vote_does_not_take_the_place_of_one_that_waits(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    upload(peer, b"content")
    first, second = peer.start("vote", 1), peer.start("vote", 1)
    with pytest.raises(StorageTransactionError):
        second.result  # noqa: B018 - it raises
    settle(house, peer)
    assert first.result == ()


def test_a_transaction_that_is_over_when_its_blob_is_durable(house: MemoryHouse, blob_dir: Path) -> None:
    peer = house.peer()
    peer.begin()
    upload(peer, b"content")
    house.hosted.abort(peer.session, 1)
    settle(house, peer)
    peer.start("tpc_abort", 1)
    settle(house, peer)
    assert staged_files(blob_dir) == []


def test_no_more_is_read_than_can_be_written(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    send(peer)
    sent = 0
    while not peer.wire.stopped:
        assert sent <= limits.BLOB_QUEUE_BYTES
        peer.one_way("storeBlobChunk", CHUNK)
        sent += len(CHUNK)
    house.blobs.run()  # the first piece only
    assert peer.wire.stopped
    house.blobs.run()
    assert not peer.wire.stopped
    peer.one_way("storea", A, NO_TID, RECORD, 1)
    peer.one_way("storeBlobEnd", A, NO_TID, RECORD, 1)
    assert len(content(house, A, finish(house, peer))) == sent


def test_what_is_ended_counts_until_it_is_written(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    for number in range(1, 100):
        upload(peer, *[CHUNK] * 4, oid=p64(number))
        if peer.wire.stopped:
            break
    assert peer.wire.stopped
    settle(house, peer)
    assert not peer.wire.stopped


EMPTY = {
    "ends": [("storeBlobStart",), ("storeBlobEnd", A, NO_TID, RECORD, 1)],
    "chunks": [("storeBlobChunk", b"")],
    "handed over": [("storeBlobShared", A, NO_TID, RECORD, "a.tmp", 1)],
}


@pytest.mark.parametrize("messages", EMPTY.values(), ids=EMPTY)
def test_what_has_no_content_counts_too(house: MemoryHouse, messages: list[tuple[Any, ...]]) -> None:
    peer = house.peer()
    peer.begin()
    send(peer)
    rounds = 0
    while not peer.wire.stopped:
        assert rounds <= limits.BLOB_QUEUE_BYTES // limits.BLOB_MESSAGE_BYTES
        for name, *args in messages:
            peer.one_way(name, *args)
        rounds += 1
    settle(house, peer)
    assert not peer.wire.stopped
    assert peer.session.uploads.queued_bytes == 0


@pytest.mark.parametrize("chunks", [2, 20], ids=["at its end", "in the middle"])
def test_a_full_disk_fails_the_vote_and_leaves_nothing(
    house: MemoryHouse, blob_dir: Path, chunks: int
) -> None:
    peer = house.peer()
    peer.begin()
    with no_room_beyond(100_000):
        send(peer, *[CHUNK] * chunks)
        house.blobs.run_all()
        peer.one_way("storeBlobChunk", CHUNK)
        peer.one_way("storea", A, NO_TID, RECORD, 1)
        peer.one_way("storeBlobEnd", A, NO_TID, RECORD, 1)
        call = vote(house, peer)
    with pytest.raises(StorageError, match="a blob can't be stored: File too large"):
        call.result  # noqa: B018 - it raises
    assert staged_files(blob_dir) == []
    assert not peer.wire.stopped
    peer.begin()
    upload(peer, b"room again")
    assert content(house, A, finish(house, peer)) == b"room again"


def test_a_disk_that_can_not_be_begun_on(house: MemoryHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size_bytes: int | None = None) -> Any:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(house.hosted.engine, "stage_blob", refuse)
    peer = house.peer()
    peer.begin()
    upload(peer, b"content")
    with pytest.raises(StorageError, match="quota"):
        vote(house, peer).result  # noqa: B018 - it raises


def test_a_storage_without_blobs_says_so_at_the_vote(make_house: Callable[..., MemoryHouse]) -> None:
    house = make_house()
    peer = house.peer()
    peer.begin()
    upload(peer, b"content")
    with pytest.raises(Unsupported):
        vote(house, peer).result  # noqa: B018 - it raises


def test_a_chunk_of_nothing_ends_the_connection(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.one_way("storeBlobChunk", b"content")
    assert peer.wire.closed


def test_an_end_of_nothing_breaks_its_transaction(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    peer.one_way("storeBlobEnd", A, NO_TID, RECORD, 1)
    with pytest.raises(Exception, match="no blob was begun"):
        vote(house, peer).result  # noqa: B018 - it raises


def test_an_end_for_no_transaction_leaves_nothing(house: MemoryHouse, blob_dir: Path) -> None:
    peer = house.peer()
    send(peer, *[CHUNK] * 10)
    house.blobs.run_all()
    peer.one_way("storeBlobEnd", A, NO_TID, RECORD, 1)
    peer.start("tpc_abort", 1)
    settle(house, peer)
    assert staged_files(blob_dir) == []


def test_who_may_not_write_sends_nothing(house: MemoryHouse) -> None:
    peer = Peer(house)
    peer.register(read_only=True)
    peer.one_way("storeBlobStart")
    assert peer.wire.closed


@pytest.mark.parametrize(
    "name",
    ["../secret.tmp", "/etc/passwd", "a/b.tmp", "secret", ".tmp", "", "x.tmp\n", "é.tmp", "..tmp/x.tmp"],
)
def test_a_shared_file_is_one_of_the_object(house: MemoryHouse, blob_dir: Path, name: str) -> None:
    """Nothing but the name of a file that a client puts into the object's own directory is taken."""
    secret = blob_dir / "secret.tmp"
    secret.write_text("secret")
    peer = house.peer()
    peer.begin()
    peer.one_way("storea", A, NO_TID, RECORD, 1)
    peer.one_way("storeBlobShared", A, NO_TID, RECORD, name, 1)
    with pytest.raises(StorageError):
        vote(house, peer).result  # noqa: B018 - it raises
    assert secret.read_text() == "secret"
    assert staged_files(blob_dir) == []


def test_a_conflict_on_a_blob_frees_its_locks(house: MemoryHouse, blob_dir: Path) -> None:
    first, second, third = house.peer(), house.peer(), house.peer()
    first.begin()
    upload(first, b"first")
    tid = finish(house, first)
    second.begin()
    upload(second, b"stale")
    (conflict,) = vote(house, second).result
    assert conflict["oid"] == A
    second.start("tpc_abort", 1)
    settle(house, second)
    third.begin()
    upload(third, b"third", serial=tid)
    assert content(house, A, finish(house, third)) == b"third"
    house.hosted.engine.checkpoint()
    assert staged_files(blob_dir) == []


def test_who_waits_for_a_lock_with_a_blob_and_is_lost_holds_up_nobody(
    house: MemoryHouse, blob_dir: Path
) -> None:
    holder, waiter, third = house.peer(), house.peer(), house.peer()
    holder.begin()
    upload(holder, b"holder's")
    assert vote(house, holder).result == ()
    waiter.begin()
    upload(waiter, b"waiter's")
    waiting = vote(house, waiter)
    assert not waiting.answered
    waiter.disconnect()
    tid = holder.ask("tpc_finish", 1)
    third.begin()
    upload(third, b"third's", serial=tid)
    assert content(house, A, finish(house, third)) == b"third's"
    house.hosted.engine.checkpoint()
    assert staged_files(blob_dir) == []
