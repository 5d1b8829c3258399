"""Blobs that a client asks for: in pieces, between which other replies go, with their own behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from ZODB.POSException import POSKeyError, Unsupported
from ZODB.utils import p64

from tests.server.inmemory import Call, MemoryHouse, Peer
from tests.server.test_uploads import A, B, finish, upload
from zeoid import limits
from zeoid.engines.opening import open_filestorage
from zeoid.model import NO_TID

LARGE = bytes(range(256)) * 4000
PIECES = len(LARGE) // (4 * limits.BLOB_CHUNK_BYTES) + 1


@pytest.fixture
def house(make_house: Callable[..., MemoryHouse], tmp_path: Path) -> MemoryHouse:
    return make_house({"1": open_filestorage(tmp_path / "Data.fs", blob_dir=tmp_path / "blobs")})


@pytest.fixture
def tid(house: MemoryHouse) -> bytes:
    """Of two blobs, A's large and B's small."""
    peer = house.peer()
    peer.begin()
    upload(peer, LARGE)
    upload(peer, b"small", oid=B)
    return finish(house, peer)


def test_a_small_blob_may_be_asked_for_by_as_many_threads_as_there_are(
    house: MemoryHouse, tid: bytes
) -> None:
    peer = house.peer()
    calls = peer.calls(*[("blob_load", B, tid, 100)] * (limits.SLOW_REQUESTS_PER_CONNECTION + 1))
    while len(house.blobs) or len(house.slow):
        run_all(house, peer)
        house.slow.run_all()
    peer.read()
    assert {call.result for call in calls} == {(5, b"small")}


def received(peer: Peer, oid: bytes = A) -> bytes:
    """What came of a blob so far, of which everything came in order."""
    events = [
        event for event in peer.events if event.name.startswith("receiveBlob") and event.value[0] == oid
    ]
    assert [event.name for event in events[:1]] == ["receiveBlobStart"][: len(events)]
    assert all(event.name == "receiveBlobChunk" for event in events[1:-1])
    return b"".join(event.value[2] for event in events if event.name == "receiveBlobChunk")


def ask(peer: Peer, tid: bytes, oid: bytes = A) -> Call:
    return peer.start("sendBlob", oid, tid)


def run(house: MemoryHouse, peer: Peer) -> None:
    house.blobs.run()
    peer.read()


def run_all(house: MemoryHouse, peer: Peer) -> None:
    house.blobs.run_all()
    peer.read()


@pytest.mark.parametrize(
    "size_bytes",
    [0, 1, limits.BLOB_CHUNK_BYTES, 4 * limits.BLOB_CHUNK_BYTES, 4 * limits.BLOB_CHUNK_BYTES + 1, 1_000_000],
)
def test_the_reply_stands_behind_the_blob(house: MemoryHouse, size_bytes: int) -> None:
    peer = house.peer()
    peer.begin()
    upload(peer, b"x" * size_bytes)
    tid = finish(house, peer)
    peer.events.clear()
    call = ask(peer, tid)
    assert not call.answered
    run_all(house, peer)
    assert call.result is None
    names = [event.name for event in peer.events]
    chunks = -(-size_bytes // limits.BLOB_CHUNK_BYTES)
    assert names == ["receiveBlobStart", *["receiveBlobChunk"] * chunks, "receiveBlobStop", "sendBlob"]
    assert received(peer) == b"x" * size_bytes


@pytest.mark.parametrize("coding", ["M5", "Z5"])
def test_both_codings(house: MemoryHouse, tid: bytes, coding: str) -> None:
    peer = house.peer(coding=coding)
    call = ask(peer, tid)
    run_all(house, peer)
    assert call.result is None
    assert received(peer) == LARGE


def test_a_blob_that_is_not_there(house: MemoryHouse, tid: bytes) -> None:
    peer = house.peer()
    call = ask(peer, tid, oid=p64(9))
    run_all(house, peer)
    with pytest.raises(POSKeyError):
        call.result  # noqa: B018 - it raises
    assert not peer.wire.closed


def test_a_storage_without_blobs_has_none(make_house: Callable[..., MemoryHouse]) -> None:
    house = make_house()
    peer = house.peer()
    call = ask(peer, NO_TID)
    run_all(house, peer)
    with pytest.raises(Unsupported, match="takes no blobs"):
        call.result  # noqa: B018 - it raises


def test_nothing_beyond_the_visible_tid(house: MemoryHouse, tid: bytes) -> None:
    """The file is there, but its invalidation is not on its way yet."""
    writer, reader = house.peer(), house.peer()
    writer.begin()
    upload(writer, b"newer", serial=tid)
    writer.start("vote", 1)
    house.blobs.run_all()
    house.work()
    writer.start("tpc_finish", 1)
    house.commit.work()  # committed, and not yet landed on the loop
    newest = house.hosted.engine.last_tid()
    assert newest > tid
    call = ask(reader, newest)
    house.blobs.run()
    reader.read()
    with pytest.raises(POSKeyError):
        call.result  # noqa: B018 - it raises
    house.commit.land()
    call = ask(reader, newest)
    run_all(house, reader)
    assert call.result is None
    assert received(reader) == b"newer"


def test_other_replies_go_between_the_pieces(house: MemoryHouse, tid: bytes) -> None:
    peer = house.peer()
    call = ask(peer, tid)
    run(house, peer)
    before = received(peer)
    assert 0 < len(before) < len(LARGE)
    assert peer.ask("getTid", A) == tid
    assert not call.answered
    run_all(house, peer)
    assert call.answered
    assert received(peer) == LARGE


def test_two_at_a_time_come_piece_by_piece_and_whole(house: MemoryHouse, tid: bytes) -> None:
    peer = house.peer()
    large, small = ask(peer, tid), ask(peer, tid, oid=B)
    run(house, peer)
    run(house, peer)
    assert small.answered
    assert not large.answered
    assert received(peer, B) == b"small"
    run_all(house, peer)
    assert received(peer) == LARGE


def test_one_more_than_are_sent_at_a_time_waits(house: MemoryHouse, tid: bytes) -> None:
    peer = house.peer()
    calls = [ask(peer, tid, oid=B) for _ in range(limits.BLOB_DOWNLOADS_PER_CONNECTION + 1)]
    assert len(house.blobs) == limits.BLOB_DOWNLOADS_PER_CONNECTION
    run_all(house, peer)
    assert all(call.answered for call in calls)


def test_only_so_many_wait(house: MemoryHouse, tid: bytes) -> None:
    peer = house.peer()
    most = limits.BLOB_DOWNLOADS_PER_CONNECTION + limits.BLOB_DOWNLOADS_WAITING
    calls = [ask(peer, tid, oid=B) for _ in range(most)]
    with pytest.raises(TypeError, match="too many blobs"):
        ask(peer, tid, oid=B).result  # noqa: B018 - it raises
    run_all(house, peer)
    assert all(call.result is None for call in calls)


def test_no_more_is_read_than_the_client_takes(house: MemoryHouse, tid: bytes) -> None:
    peer = house.peer()
    call = ask(peer, tid)
    peer.session.hold_blobs()
    run_all(house, peer)
    assert 0 < len(received(peer)) < len(LARGE)
    assert not call.answered
    peer.session.send_blobs()
    run_all(house, peer)
    assert call.answered
    assert received(peer) == LARGE


@pytest.mark.parametrize("in_thread", [True, False])
def test_a_connection_that_is_lost_closes_the_file(
    house: MemoryHouse, tid: bytes, in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[BinaryIO] = []
    engine = house.hosted.engine
    open_blob = engine.open_blob

    def opening(oid: bytes, serial: bytes) -> BinaryIO:
        files.append(open_blob(oid, serial))
        return files[-1]

    monkeypatch.setattr(engine, "open_blob", opening)
    peer = house.peer()
    ask(peer, tid)
    peer.session.hold_blobs()
    house.blobs.work()
    if not in_thread:
        house.blobs.land()
    assert not files[0].closed
    peer.disconnect()
    house.blobs.run_all()
    assert files[0].closed
    assert not house.hosted.busy


def test_a_file_that_can_not_be_read(house: MemoryHouse, tid: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        closed = False

        def fileno(self) -> int:
            return 0

        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

        def close(self) -> None:
            self.closed = True

    broken: Any = Broken()
    monkeypatch.setattr(house.hosted.engine, "open_blob", lambda oid, serial: broken)
    peer = house.peer()
    call = ask(peer, tid)
    run_all(house, peer)
    with pytest.raises(Exception, match="Input/output error"):
        call.result  # noqa: B018 - it raises
    assert broken.closed
