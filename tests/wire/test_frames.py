"""Frames: the same messages however the stream is cut, and a limit that is checked before all else."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.samples import cut, peak_bytes, unhurried
from zeoid.errors import FrameTooLarge, PeerError
from zeoid.wire.frames import FrameReader, frame

payloads = st.lists(st.binary(max_size=300), max_size=12)
points = st.lists(st.integers(0, 5000), max_size=30)


def test_a_frame_is_a_big_endian_length_and_the_message() -> None:
    assert frame(b"") == b"\0\0\0\0"
    assert frame(b"Z5") == b"\0\0\0\x02Z5"
    assert frame(b"x" * 0x01020304)[:5] == b"\x01\x02\x03\x04x"


@unhurried
@given(payloads, points)
def test_the_same_messages_wherever_the_stream_is_cut(messages: list[bytes], where: list[int]) -> None:
    reader = FrameReader()
    stream = b"".join(map(frame, messages))
    assert [message for piece in cut(stream, where) for message in reader.feed(piece)] == messages
    assert reader.pending_bytes == 0


@unhurried
@given(st.lists(st.binary(max_size=20), max_size=6))
def test_byte_by_byte(messages: list[bytes]) -> None:
    reader = FrameReader()
    stream = b"".join(map(frame, messages))
    assert [message for byte in stream for message in reader.feed(bytes([byte]))] == messages


@unhurried
@given(st.binary(max_size=2000), points)
def test_any_bytes_give_the_same_or_are_refused_wherever_they_are_cut(data: bytes, where: list[int]) -> None:
    def read(pieces: list[bytes]) -> tuple[list[bytes], bool]:
        reader = FrameReader(limit=100)
        found: list[bytes] = []
        try:
            for piece in pieces:
                found += reader.feed(piece)
                assert reader.pending_bytes < 4 + 100
        except FrameTooLarge:
            return [], False
        return found, True

    assert read([data]) == read(cut(data, where))


def test_a_message_is_bytes_of_its_own() -> None:
    reader = FrameReader()
    piece = bytearray(frame(b"first") + frame(b"second")[:6])
    (message,) = reader.feed(bytes(piece))
    piece[:] = bytes(len(piece))
    assert type(message) is bytes
    (message,) = reader.feed(frame(b"second")[6:])
    assert message == b"second"
    assert type(message) is bytes


def test_a_message_may_be_as_long_as_the_limit_and_no_longer() -> None:
    assert FrameReader(limit=10).feed(frame(b"0123456789")) == [b"0123456789"]
    with pytest.raises(FrameTooLarge, match=r"11 bytes; the limit is 10"):
        FrameReader(limit=10).feed(frame(b"0123456789a"))
    assert issubclass(FrameTooLarge, PeerError)


def test_a_length_above_the_limit_is_refused_as_soon_as_it_is_known() -> None:
    reader = FrameReader(limit=10)
    assert reader.feed(b"\xff\xff\xff") == []
    with pytest.raises(FrameTooLarge):
        reader.feed(b"\xff")


def test_a_large_length_allocates_nothing() -> None:
    reader = FrameReader(limit=1 << 30)
    assert peak_bytes(lambda: reader.feed(struct.pack(">I", 1 << 30) + b"x")) < 10_000
    assert reader.pending_bytes == 5


def test_the_limit_can_be_raised_between_messages() -> None:
    reader = FrameReader(limit=4)
    large = frame(b"0123456789")
    assert reader.feed(frame(b"ok") + large[:3]) == [b"ok"]
    reader.limit = 10
    assert reader.feed(large[3:]) == [b"0123456789"]


def test_what_was_read_is_not_kept() -> None:
    reader = FrameReader()
    large = frame(b"x" * 1_000_000)
    reader.feed(large[:500_000])
    assert reader.pending_bytes == 500_000
    assert len(reader.feed(large[500_000:] + b"\0\0")) == 1
    assert reader.pending_bytes == 2


def test_many_small_pieces_of_one_large_frame_take_linear_time() -> None:
    reader = FrameReader()
    stream = frame(bytes(4_000_000))
    pieces = [stream[start : start + 100] for start in range(0, len(stream), 100)]
    # 40,001 pieces: copying what is held for each of them would move 80 GB.
    assert sum(len(reader.feed(piece)) for piece in pieces) == 1
