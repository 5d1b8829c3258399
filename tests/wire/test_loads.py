"""The fixed layouts of a load and of its reply: the same bytes, and the same message, as the codec's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeoid.errors import PeerError
from zeoid.wire import loads
from zeoid.wire.codec import REPLY, codec_for
from zeoid.wire.connection import ClientConnection, ServerConnection
from zeoid.wire.frames import frame

OID, TID = b"\0\0\0\0\0\0\1\2", b"\3\4\5\6\7\x08\x09\x0a"
eight_bytes = st.binary(min_size=8, max_size=8)


@given(st.integers(loads.FIRST_ID, loads.LAST_ID), eight_bytes, eight_bytes)
def test_a_request_is_what_the_codec_writes(message_id: int, oid: bytes, tid: bytes) -> None:
    written = loads.request(message_id, (oid, tid))
    assert written == frame(codec_for(b"M5").encode(message_id, 0, loads.LOAD, (oid, tid)))
    assert len(written) == loads.REQUEST_BYTES
    assert loads.read_request(written) == (message_id, oid, tid)


@pytest.mark.parametrize(
    "args",
    [(OID,), (OID, TID, None), (OID[1:], TID), (OID, TID + b"\0"), ("12345678", TID), (OID, None), [OID], 7],
    ids=repr,
)
def test_what_does_not_fit_is_left_to_the_codec(args: Any) -> None:
    assert loads.request(loads.FIRST_ID, args) is None


def test_an_id_beyond_the_layout_is_left_to_the_codec() -> None:
    assert loads.request(loads.LAST_ID, (OID, TID)) is not None
    assert loads.request(loads.LAST_ID + 1, (OID, TID)) is None


@given(st.integers(0, loads.REQUEST_BYTES - 1), st.integers(0, 255))
def test_a_server_reads_every_frame_of_that_length_as_the_codec_does(place: int, byte: int) -> None:
    """One byte of a request is another: it is the same message for both, or for neither."""
    request = bytearray(loads.request(loads.FIRST_ID + 5, (OID, TID)) or b"")
    request[place] = byte
    read = loads.read_request(bytes(request))
    if read is not None:
        assert request[:4] == (loads.REQUEST_BYTES - 4).to_bytes(4, "big")
        message_id, oid, tid = read
        assert (message_id, 0, loads.LOAD, (oid, tid)) == codec_for(b"M5").decode(bytes(request[4:]))
    else:
        assert bytes(request) != loads.request(loads.FIRST_ID + 5, (OID, TID))


@pytest.mark.parametrize("cut", [1, 4, 20, loads.REQUEST_BYTES - 1])
def test_a_request_that_only_looks_whole_because_of_what_came_before_it(cut: int) -> None:
    """A segment of a request's length that begins in the middle of one is no request."""
    server = ServerConnection("M5")
    server.receive(frame(b"M5"))
    one = loads.request(loads.FIRST_ID, (OID, TID)) or b""
    two = loads.request(loads.FIRST_ID + 1, (TID, OID)) or b""
    stream = one + two
    assert server.receive(stream[:cut]) == []
    calls = server.receive(stream[cut : cut + loads.REQUEST_BYTES]) + server.receive(stream[cut + len(one) :])
    assert [call[3] for call in calls] == [(OID, TID), (TID, OID)]


def test_a_closed_connection_reads_no_request() -> None:
    server = ServerConnection("M5")
    server.receive(frame(b"M5"))
    request = loads.request(loads.FIRST_ID, (OID, TID)) or b""
    assert server.receive_load(request) == (loads.FIRST_ID, OID, TID)
    server.close()
    assert server.receive_load(request) is None
    with pytest.raises(PeerError, match="closed"):
        server.receive(request)


def test_only_between_frames_is_a_segment_a_request() -> None:
    server = ServerConnection("M5")
    server.receive(frame(b"M5"))
    request = loads.request(loads.FIRST_ID, (OID, TID)) or b""
    server.receive(request[:7])
    assert server.receive_load(request) is None


def test_a_server_that_speaks_pickle_reads_no_request() -> None:
    server = ServerConnection("Z5")
    server.receive(frame(b"Z5"))
    assert server.receive_load(loads.request(loads.FIRST_ID, (OID, TID)) or b"") is None


# Replies ----------------------------------------------------------------------------------------------


def encoded(message_id: int, value: Any, flag: int = 0, name: str = REPLY) -> bytes:
    """As the codec writes it."""
    return frame(codec_for(b"M5").encode(message_id, flag, name, value))


sizes = st.sampled_from([0, 1, 11, 12, 255, 256, 65535])


@given(st.integers(loads.FIRST_ID, loads.LAST_ID), sizes, st.binary(max_size=20), eight_bytes)
def test_a_reply_is_what_the_codec_writes(message_id: int, size: int, data: bytes, start: bytes) -> None:
    revision = ((data * size + bytes(size))[:size], start, None)
    written = loads.reply(message_id, revision)
    assert written == encoded(message_id, revision)
    assert loads.read_reply(written) == (message_id, revision)


@pytest.mark.parametrize(
    ("message_id", "value"),
    [
        (loads.FIRST_ID, None),
        (loads.FIRST_ID, (b"data", OID, TID)),
        (loads.FIRST_ID, (bytes(65536), OID, None)),
        (loads.FIRST_ID - 1, (b"data", OID, None)),
        (loads.LAST_ID + 1, (b"data", OID, None)),
    ],
    ids=["nothing", "ended", "large", "low id", "high id"],
)
def test_another_reply_goes_through_the_codec(message_id: int, value: Any) -> None:
    assert loads.reply(message_id, value) is None
    assert loads.read_reply(encoded(message_id, value)) is None


@given(st.integers(0, 60), st.integers(0, 255), st.sampled_from([20, 255, 256]))
def test_a_client_reads_every_frame_as_the_codec_does(place: int, byte: int, size: int) -> None:
    """One byte of a reply is another: what is read, the codec would have read."""
    whole = loads.reply(loads.FIRST_ID + 5, (bytes(range(size % 200)) + bytes(size - size % 200), TID, None))
    assert whole is not None
    for at in (place, len(whole) - 1 - place):
        changed = bytearray(whole)
        changed[at % len(whole)] = byte
        read = loads.read_reply(bytes(changed))
        if read is not None:
            message_id, revision = read
            assert int.from_bytes(changed[:4], "big") == len(changed) - 4
            assert (message_id, 0, REPLY, revision) == codec_for(b"M5").decode(bytes(changed[4:]))
        else:
            assert bytes(changed) != whole


@pytest.mark.parametrize(
    "change", [lambda reply: reply[:-1], lambda reply: reply + b"\0", lambda reply: reply[:9]]
)
@pytest.mark.parametrize("size", [0, 20, 300])
def test_a_segment_is_a_reply_only_as_a_whole(change: Any, size: int) -> None:
    reply = loads.reply(loads.FIRST_ID, (bytes(size), TID, None)) or b""
    assert loads.read_reply(reply) is not None
    assert loads.read_reply(change(reply)) is None


def client_with_a_load(coding: str = "M5") -> tuple[ClientConnection, object]:
    client, slot = ClientConnection(coding), object()
    client.receive(frame(b"Z5"))
    client.call(slot, loads.LOAD, (OID, TID))
    return client, slot


@pytest.mark.parametrize("cut", [1, 4, 20, 300])
def test_a_client_gets_its_reply_whole_or_in_pieces(cut: int) -> None:
    revision = (bytes(500), OID, None)
    reply = loads.reply(loads.FIRST_ID, revision) or b""
    client, slot = client_with_a_load()
    assert client.receive(reply) == [(slot, 0, REPLY, revision)]
    client, slot = client_with_a_load()
    assert client.receive(reply[:cut]) + client.receive(reply[cut:]) == [(slot, 0, REPLY, revision)]


def test_a_reply_inside_of_another_message_is_no_reply() -> None:
    """A segment may look like a reply and be the middle of a larger message."""
    client, slot = client_with_a_load()
    reply = loads.reply(loads.FIRST_ID, (bytes(300), OID, None)) or b""
    outer = encoded(loads.FIRST_ID, (b"<" * 300 + reply + b">" * 300, TID, TID))
    at = outer.index(reply)
    assert client.receive(outer[:at]) == client.receive(outer[at : at + len(reply)]) == []
    [(answered, _, _, value)] = client.receive(outer[at + len(reply) :])
    assert answered is slot
    assert value[1:] == (TID, TID)


def test_a_reply_to_no_load_that_was_sent_ends_the_connection() -> None:
    client, _ = client_with_a_load()
    with pytest.raises(PeerError, match="never made"):
        client.receive(loads.reply(loads.FIRST_ID + 1, (b"data", TID, None)) or b"")


def test_a_client_that_speaks_pickle_reads_no_reply_in_msgpack() -> None:
    client, _ = client_with_a_load("Z5")
    with pytest.raises(PeerError):
        client.receive(loads.reply(loads.FIRST_ID, (b"data", TID, None)) or b"")
