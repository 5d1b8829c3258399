"""The fixed layout of a load's request: the same bytes, and the same message, as the codec's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeoid.wire import loads
from zeoid.wire.codec import codec_for
from zeoid.wire.connection import ServerConnection
from zeoid.wire.frames import frame

OID, TID = b"\0\0\0\0\0\0\1\2", b"\3\4\5\6\7\x08\x09\x0a"
eight_bytes = st.binary(min_size=8, max_size=8)


@given(st.integers(loads.FIRST_ID, loads.LAST_ID), eight_bytes, eight_bytes)
def test_a_request_is_what_the_codec_writes(message_id: int, oid: bytes, tid: bytes) -> None:
    written = loads.request(message_id, (oid, tid))
    assert written == frame(codec_for(b"M5").encode(message_id, 0, loads.LOAD, (oid, tid)))
    assert len(written) == loads.REQUEST_BYTES
    assert loads.read_request(written) == (message_id, 0, loads.LOAD, (oid, tid))


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
        assert read == codec_for(b"M5").decode(bytes(request[4:]))
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
    server.close()
    with pytest.raises(Exception, match="closed"):
        server.receive(loads.request(loads.FIRST_ID, (OID, TID)) or b"")
