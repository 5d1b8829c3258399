"""The two codings: what goes in comes out, also through stock ZEO's own, and nothing else comes out."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZEO.asyncio import marshal
from ZODB.POSException import POSKeyError

from tests.wire.samples import (
    OID,
    PREFIX_PICKLE,
    TID,
    messages,
    nested,
    peak_bytes,
    unhurried,
)
from zeoid import limits
from zeoid.errors import PeerError, UndecodableMessage, UnknownProtocol, UnsendableValue
from zeoid.model import UndoPrefix
from zeoid.wire import pickles
from zeoid.wire.codec import PROTOCOLS, Codec, MsgpackCodec, PickleCodec, codec_for

both = pytest.mark.parametrize("protocol", PROTOCOLS)

#: What stock ZEO's client and server use to read and to write.
STOCK_DECODERS = [marshal.decoder, marshal.server_decoder]


def codec(protocol: str) -> Codec:
    return codec_for(protocol.encode())


# What goes in comes out -------------------------------------------------------------------------------


@both
@unhurried
@given(message=messages)
def test_a_message_survives(protocol: str, message: tuple[Any, int, str, Any]) -> None:
    assert codec(protocol).decode(codec(protocol).encode(*message)) == message


@both
@unhurried
@given(message=messages)
def test_stock_zeo_reads_it(protocol: str, message: tuple[Any, int, str, Any]) -> None:
    data = codec(protocol).encode(*message)
    for decoder in STOCK_DECODERS:
        assert decoder(protocol.encode())(data) == message


@both
@unhurried
@given(message=messages, server=st.booleans())
def test_what_stock_zeo_writes_is_read(
    protocol: str, message: tuple[Any, int, str, Any], server: bool
) -> None:
    data = marshal.encoder(protocol.encode(), server)(*message)
    assert codec(protocol).decode(data) == message


def test_lists_stay_lists_in_a_pickle_and_become_tuples_in_msgpack() -> None:
    value = [[OID], {"a": [1]}]
    assert codec("Z5").decode(codec("Z5").encode(1, 0, "vote", value))[3] == [[OID], {"a": [1]}]
    assert codec("M5").decode(codec("M5").encode(1, 0, "vote", value))[3] == ((OID,), {"a": (1,)})


@both
def test_sets_are_sent_as_lists(protocol: str) -> None:
    data = codec(protocol).encode(0, 1, "invalidateTransaction", (TID, {OID}, {"deeper": frozenset({7})}))
    assert [list(part) for part in marshal.decoder(protocol.encode())(data)[3][1:]] == [[OID], ["deeper"]]


def test_stock_flags_are_read() -> None:
    # Stock ZEO writes the flag of a call as True or False.
    for protocol in PROTOCOLS:
        data = marshal.encoder(protocol.encode())(0, True, "ping", ())
        assert codec(protocol).decode(data) == (0, 1, "ping", ())


def test_a_pickle_may_hold_a_prefix_and_msgpack_cannot() -> None:
    specification = b"}X\x09\0\0\0user_name" + PREFIX_PICKLE + b"s"
    data = b"\x80\x03(K\x01K\x00X\x08\0\0\0undoInfo(K\x00J\xec\xff\xff\xff" + specification + b"tt."
    _, _, name, (first, last, asked) = codec("Z5").decode(data)
    assert (name, first, last) == ("undoInfo", 0, -20)
    assert asked["user_name"].path == ("", "a", "b")
    for protocol in PROTOCOLS:
        with pytest.raises(UnsendableValue):
            codec(protocol).encode(1, 0, "undoInfo", (0, -20, {"user_name": UndoPrefix(("", "a"))}))


@both
@pytest.mark.parametrize(
    "value",
    [object(), POSKeyError(OID), ..., 1j, nested(100_000), [object()], {"a": {"b": print}}],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_sent_is_refused(protocol: str, value: Any) -> None:
    ours = codec(protocol)
    with pytest.raises(UnsendableValue):
        ours.encode(1, 0, ".reply", value)
    assert ours.decode(ours.encode(1, 0, ".reply", OID)) == (1, 0, ".reply", OID)


def test_msgpack_has_no_place_for_large_numbers_or_lone_surrogates() -> None:
    for value in (2**64, -(2**63) - 1, "\ud800"):
        with pytest.raises(UnsendableValue):
            codec("M5").encode(1, 0, ".reply", value)


@pytest.mark.parametrize(
    ("protocol", "keys"),
    [("M5", [7, 1.5, None, True, (1,), ()]), ("Z5", [(1, 2), (), frozenset()])],
)
def test_keys_that_the_peer_would_refuse_are_not_sent(protocol: str, keys: list[Any]) -> None:
    ours = codec(protocol)
    for key in keys:
        for value in ({key: 1}, (1, {"a": [{key: 1}]}), [{"a": 1}, {"b": 2, key: 3}]):
            with pytest.raises(UnsendableValue, match="a key that no message may have"):
                ours.encode(1, 0, ".reply", value)


def test_a_pickle_may_have_numbers_as_keys() -> None:
    value = {7: 1, 1.5: 2, None: 3, True: 4}
    assert PickleCodec().decode(PickleCodec().encode(1, 0, ".reply", value))[3] == value


def test_a_large_message_leaves_no_large_buffer_behind() -> None:
    ours = MsgpackCodec()
    large = bytes(20_000_000)

    def send() -> None:
        ours.encode(1, 0, ".reply", large)

    def fail_to_send() -> None:
        for value in (object(), 2**70):
            with pytest.raises(UnsendableValue):
                ours.encode(1, 0, ".reply", (large, value))

    assert retained_bytes(send) < 1_000_000
    assert retained_bytes(fail_to_send) < 1_000_000
    assert ours.decode(ours.encode(1, 0, ".reply", OID)) == (1, 0, ".reply", OID)


def retained_bytes(call: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


# Nothing but messages comes out -----------------------------------------------------------------------


def check_message(message: Any) -> None:
    """Fail unless it has the shape of a message."""
    message_id, flag, name, _ = message
    assert type(message_id) is int or [type(part) for part in message_id] == [bytes, bytes]
    hash(message_id)
    assert type(flag) in (int, bool)
    assert type(name) is str


@both
@unhurried
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_message_or_refused(protocol: str, data: bytes) -> None:
    with contextlib.suppress(UndecodableMessage):
        check_message(codec(protocol).decode(data))


@both
@unhurried
@given(message=messages, data=st.data())
def test_a_damaged_message_is_a_message_or_refused(
    protocol: str, message: tuple[Any, int, str, Any], data: st.DataObject
) -> None:
    damaged = bytearray(codec(protocol).encode(*message))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    start, stop = data.draw(st.integers(0, 3)), data.draw(st.integers(0, len(damaged)))
    with contextlib.suppress(UndecodableMessage):
        check_message(codec(protocol).decode(bytes(damaged[start:stop])))


SHAPES = [
    None, 7, "text", (), (1, 0, "x"), (1, 0, "x", (), ()), {"a": 1}, ("1", 0, "x", ()), (1.5, 0, "x", ()),
    (None, 0, "x", ()), ((), 0, "x", ()), ((OID,), 0, "x", ()), ((OID, TID, TID), 0, "x", ()),
    ((OID, "text"), 0, "x", ()), ((OID, b"123456789"), 0, "x", ()), ((OID, (TID,)), 0, "x", ()),
    ({"a": 1}, 0, "x", ()), (1, None, "x", ()), (1, "0", "x", ()), (1, 0.0, "x", ()), (1, (0,), "x", ()),
    (1, 0, b"x", ()), (1, 0, None, ()), (1, 0, ("x",), ()), (True, 0, "x", ()),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_other_shapes_are_refused(shape: Any) -> None:
    for protocol, data in (("M5", msgpack.packb(shape)), ("Z5", pickles.dumps(shape))):
        with pytest.raises(UndecodableMessage):
            codec(protocol).decode(data)


@both
def test_ids_and_flags_have_bounds(protocol: str) -> None:
    ours = codec(protocol)
    for message_id in (0, -1, 2**63, 2**64 - 1, (b"", b""), (OID, TID)):
        assert ours.decode(ours.encode(message_id, 0, "x", ()))[0] == message_id
    with pytest.raises(UndecodableMessage):
        PickleCodec().decode(PickleCodec().encode(2**64, 0, "x", ()))


def deep(protocol: str, depth: int) -> bytes:
    """A message whose args are *depth* tuples deep."""
    if protocol == "M5":
        return b"\x94\x01\x00\xa1x" + b"\x91" * (depth - 1) + b"\x90"
    return b"\x80\x03(K\x01K\x00X\x01\0\0\0x)" + b"\x85" * (depth - 1) + b"t."


@both
def test_messages_may_be_as_deep_as_the_limit_and_no_deeper(protocol: str) -> None:
    assert codec(protocol).decode(deep(protocol, limits.NESTING))[3] == nested(limits.NESTING)
    for depth in (limits.NESTING + 1, 400, 1100, 100_000):
        with pytest.raises(UndecodableMessage):
            codec(protocol).decode(deep(protocol, depth))


@both
@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: {"a": v}, lambda v: (1, v, 2)], ids=["list", "dict", "tuple"]
)
def test_every_container_counts(protocol: str, wrap: Any) -> None:
    ours = codec(protocol)
    value: Any = ()
    for _ in range(limits.NESTING - 1):
        value = wrap(value)
    ours.decode(ours.encode(1, 0, "x", value))
    deeper = (1, 0, "x", wrap(value))
    with pytest.raises(UnsendableValue, match="deep"):
        ours.encode(*deeper)
    with pytest.raises(UndecodableMessage, match="deep"):
        ours.decode(msgpack.packb(deeper) if protocol == "M5" else pickles.dumps(deeper))


def test_exceptions_in_exceptions_count() -> None:
    inner = b"cZODB.POSException\nUndoError\n" * 70 + b")R" + b"\x85R" * 69
    with pytest.raises(UndecodableMessage, match="deep"):
        PickleCodec().decode(b"(K\x01K\x00X\x01\0\0\0x" + inner + b"t.")


# Bombs ------------------------------------------------------------------------------------------------

HEAD = b"\x94\x01\x00\xa1x"
BOMBS = {
    "array 32": b"\xdd\xff\xff\xff\xff",
    "array 32, a million": b"\xdd\x00\x0f\x42\x40",
    "array 16": b"\xdc\xff\xff",
    "arrays in arrays": b"\xdd\x7f\xff\xff\xff" * 200,
    "map 32": b"\xdf\xff\xff\xff\xff",
    "map 16": b"\xde\xff\xff",
    "maps in maps": b"\xdf\x7f\xff\xff\xff\xa1a" * 200,
    "bin 32": b"\xc6\xff\xff\xff\xff",
    "bin 32, a gigabyte": b"\xc6\x40\x00\x00\x00" + b"x" * 1000,
    "str 32": b"\xdb\xff\xff\xff\xff",
    "str 8": b"\xd9\xffx",
    "text that is no UTF-8": b"\xa2\xff\xff",
    "ext 8": b"\xc7\x01\x05x",
    "ext 16": b"\xc8\xff\xff\x05",
    "ext 32": b"\xc9\xff\xff\xff\xff\x05",
    "fixext 1": b"\xd4\x05x",
    "fixext 16": b"\xd8\x7f" + b"x" * 16,
    "timestamp that is none": b"\xd4\xffx",
    "timestamp with 2 ** 34 nanoseconds": b"\xd7\xff" + b"\xff" * 8,
    "deep arrays": b"\x91" * 100_000,
    "deep maps": b"\x81\xa1a" * 100_000,
    "a number as a key": b"\x81\x01\x02",
    "a tuple as a key": b"\x81\x92\x01\x02\x02",
    "None as a key": b"\x81\xc0\x02",
    "deep arrays as a key": b"\x81" + b"\x91" * 400 + b"\xc0\xc0",
    "never used": b"\xc1",
    "more than one value": b"\xc0\xc0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_msgpack_bombs_are_refused_in_little_time_and_memory(name: str) -> None:
    bomb = HEAD + BOMBS[name]
    start = time.process_time()
    with pytest.raises(UndecodableMessage):
        MsgpackCodec().decode(bomb)
    assert time.process_time() - start < 1.0
    assert peak_bytes(lambda: MsgpackCodec().decode(bomb)) < 4_000_000


def test_a_timestamp_is_read_as_a_number() -> None:
    assert MsgpackCodec().decode(HEAD + b"\xd6\xff\x00\x00\x00\x05")[3] == 5.0


@pytest.mark.parametrize("part", [b"\x80", b"\x90", b"\xc0", b"\x91\xc0"], ids=repr)
def test_memory_is_proportional_to_the_length(part: bytes) -> None:
    def peak(count: int) -> int:
        data = HEAD + b"\xdd" + count.to_bytes(4, "big") + part * count
        return peak_bytes(lambda: MsgpackCodec().decode(data))

    assert peak(20_000) < 120 * 20_000 * len(part)
    assert peak(40_000) < 2.5 * peak(20_000)


# Names of protocols -----------------------------------------------------------------------------------


def test_protocols_are_named_as_on_the_wire() -> None:
    assert PROTOCOLS == ("M5", "Z5")
    assert [codec(protocol).name for protocol in PROTOCOLS] == ["M5", "Z5"]


@pytest.mark.parametrize(
    "name", [b"", b"M", b"Z", b"5", b"Z4", b"Z3101", b"M6", b"X5", b"m5", b"M5 ", b"Z55", b"x" * 9999]
)
def test_other_protocols_are_unknown(name: bytes) -> None:
    with pytest.raises(UnknownProtocol, match="only M5 and Z5") as caught:
        codec_for(name)
    assert isinstance(caught.value, PeerError)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_long_message_may_have_so_many_values(protocol: bytes) -> None:
    """Long records are fine; values that take more in memory than on the wire are counted."""
    large = codec(protocol)
    record = large.encode(1, 0, "store", [b"x" * 3_000_000])
    assert len(large.decode_long(record)[3][0]) == 3_000_000
    for many in ([None] * 1_000_000, [[1] * 1000] * 1000, [{}] * 1_000_000, {"a": [{"b": 1}] * 500_000}):
        message = large.encode(1, 0, "ping", many)
        with pytest.raises(UndecodableMessage, match=r"more than|exceeds max"):
            large.decode_long(message)
    assert large.decode(large.encode(1, 0, "ping", ()))[2] == "ping"
