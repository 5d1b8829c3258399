"""Blob connections of a real server: tokens, what travels, what is left of what breaks off."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import POSKeyError, ReadOnlyError, StorageError
from ZODB.utils import p64

from tests.blobserver import BEGINNING, RECORD, BlobServer, RawStream, attach, opened
from tests.peers import wait_until
from tests.server.sockets import RawClient
from zeoid import limits, system
from zeoid.model import MAX_TID, tid_after
from zeoid.server.server import StorageServer
from zeoid.server.staged import Staged
from zeoid.server.streams import Stream
from zeoid.wire import streams as wire
from zeoid.wire.messages import ATTACH, BLOB_EXTENSIONS, STORE

ID, NAME, OID = b"transaction 0001", b"n" * 16, p64(7)
LARGE = os.urandom(3_000_001)
INLINE = limits.BLOB_INLINE_BYTES
SIZES = [0, 1, INLINE - 1, INLINE, INLINE + 1, 3_000_001]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BlobServer]:
    with BlobServer(tmp_path) as server:
        yield server


@pytest.fixture
def client(server: BlobServer) -> Iterator[RawClient]:
    with RawClient(server.address).register() as client:
        yield client


@pytest.fixture
def stream(server: BlobServer, client: RawClient) -> Iterator[RawStream]:
    with opened(server, client) as stream:
        yield stream


def nothing_is_left(server: BlobServer) -> None:
    wait_until(lambda: not server.staged, "nothing is staged")


def is_closed(stream: RawStream) -> bool:
    return stream.read_to_end() == b""


# Tokens -----------------------------------------------------------------------------------------------


def test_a_token_is_good_once(server: BlobServer, client: RawClient) -> None:
    token = client.call("blob_token")
    with RawStream(server.address).open(token), RawStream(server.address) as second:
        second.read_frame()
        second.send(wire.answer(token))
        assert is_closed(second)


def test_a_token_that_was_never_given(server: BlobServer, client: RawClient) -> None:
    client.call("blob_token")
    with RawStream(server.address) as stream:
        stream.read_frame()
        stream.send(wire.answer(bytes(16)))
        assert is_closed(stream)
    assert client.call("ping") is None


def test_a_token_that_comes_late(
    server: BlobServer, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_TOKEN_S", 0.0)
    token = client.call("blob_token")
    with RawStream(server.address) as stream:
        stream.read_frame()
        stream.send(wire.answer(token))
        assert is_closed(stream)


def test_the_token_of_a_dead_session(server: BlobServer, client: RawClient) -> None:
    with RawClient(server.address).register() as dead:
        token = dead.call("blob_token")
    wait_until(lambda: client.call("server_status")["connections"] == 1, "the session is over")
    with RawStream(server.address) as stream:
        stream.read_frame()
        stream.send(wire.answer(token))
        assert is_closed(stream)


def test_bytes_behind_the_answer(server: BlobServer, client: RawClient) -> None:
    with RawStream(server.address) as stream:
        stream.read_frame()
        stream.send(wire.answer(client.call("blob_token")) + wire.request(wire.Get(OID, OID, 0)))
        assert is_closed(stream)


def test_no_more_tokens_than_a_client_needs(client: RawClient) -> None:
    for _ in range(limits.BLOB_TOKENS_PER_CONNECTION):
        client.call("blob_token")
    with pytest.raises(TypeError, match="about to be opened"):
        client.call("blob_token")


# What travels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_blob_there_and_back(
    size_bytes: int, server: BlobServer, client: RawClient, stream: RawStream
) -> None:
    content = LARGE[:size_bytes]
    stream.put(ID, NAME, content)
    tid = attach(client, ID, OID, NAME)
    assert stream.get(OID, tid) == content
    assert stream.get(OID, tid, size_bytes // 2) == content[size_bytes // 2 :]
    small = size_bytes <= limits.BLOB_INLINE_BYTES
    assert client.call("blob_load", OID, tid, 1 << 40) == (size_bytes, content if small else None)
    assert client.call("blob_load", OID, tid, -1) == (size_bytes, None)


def test_what_there_is_not(client: RawClient, stream: RawStream) -> None:
    stream.put(ID, NAME, b"content")
    tid = attach(client, ID, OID, NAME)
    for oid, serial in ((p64(8), tid), (OID, tid_after(tid))):
        with pytest.raises(POSKeyError):
            stream.get(oid, serial)
        with pytest.raises(POSKeyError):
            client.call("blob_load", oid, serial, 100)
    with pytest.raises(TypeError, match="7 bytes only"):
        stream.get(OID, tid, 8)
    assert stream.get(OID, tid) == b"content"


def test_nothing_beyond_what_is_visible(server: BlobServer, client: RawClient, stream: RawStream) -> None:
    stream.put(ID, NAME, b"content")
    tid = attach(client, ID, OID, NAME)
    visible = server.server.storages["1"].visible
    server.on_loop(lambda: setattr(visible, "_tid", tid_before(tid)))
    with pytest.raises(POSKeyError):
        stream.get(OID, tid)
    with pytest.raises(POSKeyError):
        client.call("blob_load", OID, tid, 100)
    server.on_loop(lambda: setattr(visible, "_tid", tid))
    assert stream.get(OID, tid) == b"content"


def tid_before(tid: bytes) -> bytes:
    return p64(int.from_bytes(tid, "big") - 1)


def test_a_blob_whose_tid_is_told_of_just_now(
    server: BlobServer, client: RawClient, stream: RawStream
) -> None:
    """What the loop is doing when the request comes is to make it visible."""
    stream.put(ID, NAME, b"content")
    tid = attach(client, ID, OID, NAME)
    visible = server.server.storages["1"].visible
    server.on_loop(lambda: setattr(visible, "_tid", tid_before(tid)))

    class Stepping:
        """A loop that is in the middle of a step."""

        def __call__(self, what: object) -> None:
            visible._tid = tid
            what()  # type: ignore[operator]

    (only,) = server.server.streams._of[next(iter(server.server.streams._of))]
    only._on_loop = Stepping()  # type: ignore[assignment]
    assert stream.get(OID, tid) == b"content"


def test_who_may_only_read_gets_and_does_not_put(server: BlobServer, client: RawClient) -> None:
    with opened(server, client) as writing:
        writing.put(ID, NAME, LARGE)
    tid = attach(client, ID, OID, NAME)
    with RawClient(server.address).register(read_only=True) as reader, opened(server, reader) as stream:
        for content in (b"small", LARGE):
            with pytest.raises(ReadOnlyError):
                stream.put(ID, NAME, content)
        assert stream.get(OID, tid) == LARGE


def test_extensions_are_named_where_there_are_blobs(client: RawClient, server: BlobServer) -> None:
    assert set(BLOB_EXTENSIONS) <= set(client.call("get_info")["extensions"])
    server.engine.has_blobs = False
    assert not set(BLOB_EXTENSIONS) & set(client.call("get_info")["extensions"])


# What breaks off --------------------------------------------------------------------------------------


def test_a_put_that_breaks_off(server: BlobServer, client: RawClient, stream: RawStream) -> None:
    stream.begin_put(ID, NAME, len(LARGE))
    stream.send(LARGE[:1_000_000])
    assert server.staged
    stream.socket.close()
    nothing_is_left(server)
    with pytest.raises(StorageError, match="not sent, or not completely"):
        client.call("tpc_prepare", ID, BEGINNING, [(ATTACH, OID, None, NAME, None)])


def test_a_put_that_is_longer_than_was_said(
    server: BlobServer, client: RawClient, stream: RawStream
) -> None:
    stream.put(ID, NAME, LARGE)
    stream.send(b"\xff" * 100)
    assert is_closed(stream)
    attach(client, ID, OID, NAME)


def test_the_end_of_a_session_is_that_of_its_blobs(server: BlobServer, client: RawClient) -> None:
    with RawClient(server.address).register() as other:
        complete, under_way = opened(server, other), opened(server, other)
        with complete, under_way:
            complete.put(ID, NAME, b"complete")
            under_way.begin_put(ID, b"m" * 16, len(LARGE))
            under_way.send(LARGE[:500_000])
            assert len(server.staged) == 2
            other.socket.close()
            assert is_closed(complete)
            assert is_closed(under_way)
            nothing_is_left(server)
    wait_until(lambda: not server.streams, "no blob connection is left")
    assert client.call("ping") is None


def test_the_end_of_a_session_is_told_of_by_that_of_its_connections_alone(
    server: BlobServer, client: RawClient, stream: RawStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that hears of a lost connection tries again, one that hears of a fault does not."""
    arriving, closed, answered = threading.Event(), threading.Event(), threading.Event()
    complete, close, fault = Staged.complete, Staged.close, Stream._fault
    of_client: list[Staged] = []

    def complete_late(self: Staged, *given: Any) -> bool:
        of_client.append(self)
        arriving.set()
        assert closed.wait(30)
        return complete(self, *given)

    def close_and_wait(self: Staged) -> Any:
        left = close(self)
        if self in of_client:  # another session may end meanwhile
            closed.set()
            assert answered.wait(30)
        return left

    def fault_and_tell(self: Stream, problem: Exception) -> None:
        try:
            fault(self, problem)
        finally:
            answered.set()

    monkeypatch.setattr(Staged, "complete", complete_late)
    monkeypatch.setattr(Staged, "close", close_and_wait)
    monkeypatch.setattr(Stream, "_fault", fault_and_tell)
    stream.begin_put(ID, NAME, 7)
    stream.send(b"content")
    assert arriving.wait(30)
    client.socket.close()
    assert is_closed(stream)
    assert answered.wait(30)  # before what is patched here is as it was
    nothing_is_left(server)


@pytest.mark.parametrize("how", ["abort", "failed vote", "finish without it"])
def test_what_no_transaction_attached_is_removed(
    how: str, server: BlobServer, client: RawClient, stream: RawStream
) -> None:
    stream.put(ID, NAME, b"content")
    assert len(server.staged) == 1
    if how == "abort":
        client.one_way("tpc_abort", ID)
    elif how == "failed vote":
        with pytest.raises(StorageError):
            client.call("tpc_prepare", ID, BEGINNING, [(ATTACH, OID, None, b"m" * 16, None)])
    else:
        client.call("tpc_prepare", ID, BEGINNING, [(STORE, OID, bytes(8), RECORD, None)])
        client.call("tpc_finish", ID)
    nothing_is_left(server)
    with pytest.raises(StorageError, match="that is over"):
        stream.put(ID, NAME, b"late")
    nothing_is_left(server)


def test_what_is_attached_by_an_unknown_name_breaks_the_transaction_with_all_that_it_has(
    server: BlobServer, client: RawClient, stream: RawStream
) -> None:
    stream.put(ID, NAME, b"content")
    operations = [
        (STORE, OID, bytes(8), RECORD, None),
        (ATTACH, OID, None, NAME, None),
        (ATTACH, OID, None, bytes(16), None),
    ]
    with pytest.raises(StorageError, match="not sent"):
        client.call("tpc_prepare", ID, BEGINNING, operations)
    nothing_is_left(server)


def test_a_name_is_good_once(server: BlobServer, stream: RawStream) -> None:
    stream.put(ID, NAME, b"content")
    with pytest.raises(StorageError, match="already"):
        stream.put(ID, NAME, b"other")
    assert len(server.staged) == 1


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
def test_a_disk_that_is_full(
    content: bytes, server: BlobServer, client: RawClient, stream: RawStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_FREE_BYTES", 1 << 62)
    with pytest.raises(StorageError, match="a blob can't be stored: No space left"):
        stream.put(ID, NAME, content)
    monkeypatch.undo()
    assert not server.staged
    stream.put(ID, NAME, content)
    assert stream.get(OID, attach(client, ID, OID, NAME)) == content


def test_too_many_open_files_fail_nothing_but_what_opens_more(
    server: BlobServer, client: RawClient, stream: RawStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened for clients left a checkpoint no descriptor, which ended the server."""
    stream.put(ID, NAME, b"content")
    tid = attach(client, ID, OID, NAME)
    with monkeypatch.context() as scarce:
        scarce.setattr(system, "is_scarce", lambda fd: True)
        with RawStream(server.address) as refused:
            assert refused.read_to_end() == b""
        too_many = pytest.raises(StorageError, match="oo many open files")
        with too_many:
            stream.put(bytes(16), NAME, b"content")
        with too_many:
            stream.get(OID, tid)
        with too_many:
            client.call("blob_load", OID, tid, 100)
        with too_many:
            client.call("sendBlob", OID, tid)
        client.commit(p64(8))
        client.call("checkpoint")
    assert stream.get(OID, tid) == b"content"
    with opened(server, client) as another:
        another.put(bytes(16), NAME, b"content")


def test_nothing_moves(server: BlobServer, client: RawClient) -> None:
    server.server.streams.idle_s = 0.05
    with opened(server, client) as idle, opened(server, client) as under_way:
        with contextlib.suppress(EOFError):
            under_way.begin_put(ID, NAME, len(LARGE))
        assert is_closed(idle)
        assert is_closed(under_way)
    nothing_is_left(server)


def test_a_stop_with_open_blob_connections(server: BlobServer, client: RawClient, stream: RawStream) -> None:
    stream.begin_put(ID, NAME, len(LARGE))
    stream.send(LARGE[:500_000])
    with opened(server, client) as idle:
        server.stop()
        assert is_closed(stream)
        assert is_closed(idle)
    assert not server.staged


def test_a_stop_while_a_blob_waits_for_its_tid(
    server: BlobServer, client: RawClient, stream: RawStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop has to turn once more for that."""
    stopping = threading.Event()
    opening, begun = Stream._open, threading.Event()

    def open_late(self: Stream, get: wire.Get) -> Any:
        begun.set()
        assert stopping.wait(30)
        return opening(self, get)

    monkeypatch.setattr(Stream, "_open", open_late)
    stream.send(wire.request(wire.Get(OID, MAX_TID, 0)))
    assert begun.wait(30)
    monkeypatch.setattr(StorageServer, "_cancel_packs", lambda _: stopping.set())
    client.socket.close()
    wait_until(lambda: not server.server.connections, "its session has ended")
    began_s = time.monotonic()
    server.stop()
    assert time.monotonic() - began_s < limits.BLOB_STREAM_IDLE_S / 2


def test_idle_ones_make_room_for_others(tmp_path: Path) -> None:
    with BlobServer(tmp_path) as server, contextlib.ExitStack() as open_:
        server.server.streams._most = 2
        clients = [open_.enter_context(RawClient(server.address).register()) for _ in range(3)]
        streams = [open_.enter_context(opened(server, client)) for client in clients[:2]]
        for number, stream in enumerate(streams):
            stream.put(ID, bytes([number]) * 16, b"content")
        wait_until(lambda: len(server.server.streams._idle) == 2, "both are idle")
        third = open_.enter_context(opened(server, clients[2]))
        assert is_closed(streams[0])
        third.put(ID, NAME, b"content")
