"""Frames of a blob connection: what is said arrives, and anything else is refused within bounds."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import POSKeyError, StorageError

from tests.wire.samples import cut, peak_bytes, unhurried
from zeoid import limits
from zeoid.errors import FrameTooLarge, PeerError, UnknownProtocol
from zeoid.wire import streams
from zeoid.wire.connection import ServerConnection, State
from zeoid.wire.frames import frame

eight = st.binary(min_size=8, max_size=8)
sizes = st.integers(0, (1 << 63) - 1)
gets = st.builds(streams.Get, eight, eight, sizes)
puts = st.builds(streams.Put, st.binary(min_size=1, max_size=64), st.binary(min_size=16, max_size=16), sizes)
plain: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.text() | st.binary() | st.floats(),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=12,
)


def read(stream: bytes, where: list[int] | None = None) -> list[bytes]:
    """The frames in a stream that comes in pieces, read as far as may be read and no further."""
    incoming = streams.Incoming()
    frames = []
    for piece in cut(stream, where or []):
        while piece:
            wants = incoming.wants
            assert 0 < wants <= limits.BLOB_FRAME_BYTES
            payload = incoming.receive(piece[:wants])
            piece = piece[wants:]
            if payload is not None:
                frames.append(payload)
                assert incoming.between
    return frames


@unhurried
@given(st.lists(gets | puts, max_size=5), st.lists(st.integers(0, 500), max_size=10))
def test_requests_arrive_however_they_are_cut(
    wanted: list[streams.Get | streams.Put], where: list[int]
) -> None:
    stream = b"".join(map(streams.request, wanted))
    assert [streams.request_of(payload) for payload in read(stream, where)] == wanted


@given(sizes)
def test_answers_arrive(size_bytes: int) -> None:
    (payload,) = read(streams.size(size_bytes))
    assert streams.answer_to(payload, streams.SIZE) == size_bytes
    for word in (streams.OK, streams.GO, streams.DONE):
        (payload,) = read(streams.reply(word))
        assert streams.answer_to(payload, word) == 0
        for other in {streams.OK, streams.GO, streams.DONE, streams.SIZE} - {word}:
            with pytest.raises(PeerError):
                streams.answer_to(payload, other)


def test_faults_arrive() -> None:
    (payload,) = read(streams.fault(POSKeyError(b"12345678", b"87654321")))
    with pytest.raises(POSKeyError, match="0x3132333435363738"):
        streams.answer_to(payload, streams.GO)
    with pytest.raises(PeerError):  # before it was asked for anything
        streams.answer_to(payload, streams.OK)


@pytest.mark.parametrize(
    "problem", [StorageError("ü" * 100_000), StorageError(1 << 100), StorageError("\ud800")], ids=str
)
def test_faults_that_do_not_fit_are_told_in_short(problem: StorageError) -> None:
    (payload,) = read(streams.fault(problem))
    with pytest.raises(StorageError):
        streams.answer_to(payload, streams.DONE)


@unhurried
@given(st.binary(max_size=200) | plain.map(msgpack.packb) | st.lists(plain, max_size=5).map(msgpack.packb))
def test_any_frame_is_decoded_or_refused(payload: bytes) -> None:
    with contextlib.suppress(PeerError):
        assert type(streams.request_of(payload)) in (streams.Get, streams.Put)
    for expected in (streams.OK, streams.SIZE, streams.GO, streams.DONE):
        try:
            assert 0 <= streams.answer_to(payload, expected) < 1 << 63
        except PeerError:
            pass
        except Exception:
            assert msgpack.unpackb(payload)[0] == "fault"


@pytest.mark.parametrize(
    "wrong",
    [
        ["get", b"1234567", b"12345678", 0], ["get", b"12345678", b"12345678", -1],
        ["get", b"12345678", b"12345678", True], ["get", b"12345678", b"12345678", 1 << 63],
        ["get", b"12345678", b"12345678"], ["put", b"", b"n" * 16, 0], ["put", b"t" * 65, b"n" * 16, 0],
        ["put", 1, b"n" * 16, 0], ["put", b"t", b"n" * 15, 0], ["put", b"t", "n" * 16, 0],
        ["put", b"t", b"n" * 16, 1.0], ["ok"], [], "get", 0,
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_request(wrong: Any) -> None:
    with pytest.raises(PeerError):
        streams.request_of(msgpack.packb(wrong))


@pytest.mark.parametrize("length", [0, limits.BLOB_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_a_length_that_no_message_has(length: int) -> None:
    def receive() -> None:
        with pytest.raises(FrameTooLarge):
            streams.Incoming().receive(length.to_bytes(4, "big"))

    assert peak_bytes(receive) < 100_000


# The handshake ----------------------------------------------------------------------------------------


@given(st.binary(min_size=16, max_size=16), st.lists(st.integers(0, 30), max_size=5))
def test_a_connection_is_handed_over(token: bytes, where: list[int]) -> None:
    server = ServerConnection("Z5")
    for piece in cut(streams.answer(token), where):
        assert server.receive(piece) == []
    assert (server.state, server.token) == (State.HANDED_OVER, token)


@pytest.mark.parametrize("behind", [b"\0", frame(b"M5"), streams.answer(bytes(16))], ids=repr)
def test_nothing_may_follow(behind: bytes) -> None:
    server = ServerConnection("Z5")
    with pytest.raises(PeerError):
        server.receive(streams.answer(bytes(16)) + behind)
    assert server.state is State.CLOSED


@pytest.mark.parametrize("answer", [b"B5", b"B5" + bytes(15), b"B5" + bytes(17), b"B4" + bytes(16)], ids=repr)
def test_what_is_no_token(answer: bytes) -> None:
    with pytest.raises(UnknownProtocol):
        ServerConnection("Z5").receive(frame(answer))


def test_the_token_comes_first_or_never() -> None:
    server = ServerConnection("Z5")
    server.receive(frame(b"M5"))
    with pytest.raises(PeerError):
        server.receive(streams.answer(bytes(16)))
