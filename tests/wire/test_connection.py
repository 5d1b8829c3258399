"""The law of a connection: the handshake row by row, calls and replies, and what nobody may send."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZEO.asyncio import marshal
from ZODB.POSException import POSKeyError

from tests.wire.samples import LATER_TID, OID, TID, cut, messages, unhurried
from zeoid import limits
from zeoid.errors import (
    FrameTooLarge,
    InvalidCall,
    PeerError,
    UndecodableMessage,
    UnknownProtocol,
    UnsendableValue,
)
from zeoid.wire import faults
from zeoid.wire.codec import FAULT, ONE_WAY, PROTOCOLS, REPLY, codec_for
from zeoid.wire.connection import ClientConnection, ServerConnection, State
from zeoid.wire.frames import frame

both = pytest.mark.parametrize("protocol", PROTOCOLS)

LARGE = limits.HANDSHAKE_FRAME_BYTES + 1


def message(protocol: str, message_id: Any, flag: int, name: str, args: Any) -> bytes:
    """One framed message, as a peer writes it."""
    return frame(codec_for(protocol.encode()).encode(message_id, flag, name, args))


def open_server(protocol: str = "M5", **options: Any) -> ServerConnection:
    server = ServerConnection("Z5", **options)
    assert server.receive(frame(protocol.encode())) == []
    return server


def open_client(protocol: str = "M5", **options: Any) -> ClientConnection:
    client = ClientConnection(protocol, **options)
    assert client.receive(frame(b"Z5")) == []
    assert client.take_answer() == frame(protocol.encode())
    return client


def check_closed(connection: ServerConnection | ClientConnection, protocol: str = "M5") -> None:
    """Once it is closed, not even a right message gets in."""
    assert connection.state is State.CLOSED
    with pytest.raises(PeerError):
        connection.receive(message(protocol, 1, 0, "ping", ()))
    assert connection.state is State.CLOSED


# The handshake, the server's end ----------------------------------------------------------------------


@both
def test_the_server_speaks_first(protocol: str) -> None:
    server = ServerConnection(protocol)
    assert server.state is State.OFFERED
    assert server.offer == b"\0\0\0\x02" + protocol.encode()
    assert server.protocol == ""


@both
@pytest.mark.parametrize("offer", PROTOCOLS)
def test_a_server_takes_either_coding_whatever_it_offered(offer: str, protocol: str) -> None:
    server = ServerConnection(offer)
    assert server.receive(frame(protocol.encode())) == []
    assert server.state is State.OPEN
    assert server.protocol == protocol
    assert server.receive(message(protocol, 1, 0, "ping", ())) == [(1, 0, "ping", ())]


@both
def test_a_call_may_come_with_the_answer(protocol: str) -> None:
    server = ServerConnection("Z5")
    calls = server.receive(frame(protocol.encode()) + message(protocol, 1, 0, "register", ("1", False)))
    assert calls == [(1, 0, "register", ("1", False))]


def test_ruok_asks_for_the_status() -> None:
    server = ServerConnection("Z5")
    assert server.receive(frame(b"ruok")) == []
    assert server.state is State.ASKED


@pytest.mark.parametrize("more", [b"ruok", b"M5", b""], ids=repr)
def test_nothing_may_follow_ruok(more: bytes) -> None:
    server = ServerConnection("Z5")
    server.receive(frame(b"ruok"))
    with pytest.raises(PeerError, match="asked for its status"):
        server.receive(frame(more))
    check_closed(server)


ANSWERS = [b"", b"M", b"M4", b"Z4", b"Z3101", b"X5", b"ruok?", b"RUOK", b"GET /", b"\x80\x03N.", b"x" * 65536]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: repr(answer[:20]))
def test_any_other_answer_ends_the_connection(answer: bytes) -> None:
    server = ServerConnection("Z5")
    with pytest.raises(UnknownProtocol):
        server.receive(frame(answer))
    check_closed(server)


def test_ruok_comes_before_the_answer_or_not_at_all() -> None:
    server = open_server()
    with pytest.raises(UndecodableMessage):
        server.receive(frame(b"ruok"))
    check_closed(server)


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"SSH-2.0-OpenSSH"], ids=repr)
def test_another_protocol_altogether_is_too_large_a_frame(start: bytes) -> None:
    for connection in (ServerConnection("Z5"), ClientConnection()):
        with pytest.raises(FrameTooLarge):
            connection.receive(start)
        check_closed(connection)


def test_who_wants_tls_is_told_apart() -> None:
    server, client = ServerConnection("Z5"), ClientConnection()
    with pytest.raises(UnknownProtocol, match="it wants TLS"):
        server.receive(b"\x16\x03\x01\x02\x00\x01")
    with pytest.raises(UnknownProtocol, match="the server wants TLS"):
        client.receive(b"\x15\x03\x03\x00\x02\x02\x28")
    check_closed(server)
    check_closed(client)


# The handshake, the client's end ----------------------------------------------------------------------


@pytest.mark.parametrize("offer", [b"M5", b"Z5"])
@pytest.mark.parametrize(("coding", "answer"), [(None, b"M5"), ("M5", b"M5"), ("Z5", b"Z5")])
def test_a_client_answers_its_own_coding_whatever_was_offered(
    offer: bytes, coding: str | None, answer: bytes
) -> None:
    client = ClientConnection(coding)
    assert client.state is State.WAITING
    assert client.offered == ""
    assert client.take_answer() == b""
    assert client.receive(frame(offer)) == []
    assert client.offered == offer.decode()
    assert client.state is State.OPEN
    assert client.protocol == answer.decode()
    assert client.take_answer() == frame(answer)
    assert client.take_answer() == b""


@pytest.mark.parametrize("offer", [*ANSWERS, b"ruok"], ids=lambda offer: repr(offer[:20]))
def test_any_other_offer_ends_the_connection(offer: bytes) -> None:
    client = ClientConnection()
    with pytest.raises(UnknownProtocol):
        client.receive(frame(offer))
    assert client.take_answer() == b""
    check_closed(client)


def test_a_coding_that_is_none() -> None:
    client = ClientConnection("J5")
    with pytest.raises(UnknownProtocol, match="'J5' is neither M5 nor Z5"):
        client.receive(frame(b"Z5"))
    check_closed(client)


def test_our_own_ends_agree() -> None:
    for offer in PROTOCOLS:
        for coding in (None, *PROTOCOLS):
            server, client = ServerConnection(offer), ClientConnection(coding)
            client.receive(server.offer)
            server.receive(client.take_answer())
            assert server.protocol == client.protocol == (coding or "M5")


# Calls and replies ------------------------------------------------------------------------------------


@both
def test_calls_replies_and_faults(protocol: str) -> None:
    server, client = open_server(protocol), open_client(protocol)
    first, second, third = object(), object(), object()
    stream = (
        client.call(first, "loadBefore", (OID, TID))
        + client.one_way("tpc_begin", (7, b"", b"", {}))
        + client.call(second, "lastTransaction", ())
        + client.call(third, "getTid", (OID,))
    )
    calls = server.receive(stream)
    assert [call[1:] for call in calls] == [
        (0, "loadBefore", (OID, TID)), (ONE_WAY, "tpc_begin", (7, b"", b"", {})), (0, "lastTransaction", ()),
        (0, "getTid", (OID,)),
    ]  # fmt: skip
    ids = [call[0] for call in calls]
    assert client.slots() == [first, second, third]
    replies = (
        server.fault(ids[3], POSKeyError(OID))
        + server.call("invalidateTransaction", TID, [OID])
        + server.reply(ids[0], (b"data", TID, None))
        + server.reply(ids[2], LATER_TID)
    )
    fault, invalidation, *rest = client.receive(replies)
    assert fault[:3] == (third, FAULT, REPLY)
    assert faults.rebuild(fault[3]).args == (OID,)
    assert invalidation[:3] == (None, ONE_WAY, "invalidateTransaction")
    assert list(invalidation[3][1]) == [OID]
    assert rest == [(first, 0, REPLY, (b"data", TID, None)), (second, 0, REPLY, LATER_TID)]
    assert client.slots() == []


@both
@unhurried
@given(sent=st.lists(messages, max_size=8), where=st.lists(st.integers(0, 3000), max_size=20))
def test_the_same_calls_wherever_the_stream_is_cut(
    protocol: str, sent: list[tuple[Any, int, str, Any]], where: list[int]
) -> None:
    calls = [call for call in sent if call[2] != REPLY]
    stream = frame(protocol.encode()) + b"".join(message(protocol, *call) for call in calls)
    server = ServerConnection("Z5")
    assert [call for piece in cut(stream, where) for call in server.receive(piece)] == calls


@both
@unhurried
@given(where=st.lists(st.integers(0, 3000), max_size=20), order=st.permutations(range(6)))
def test_replies_find_their_slots_wherever_the_stream_is_cut(
    protocol: str, where: list[int], order: list[int]
) -> None:
    server, client = open_server(protocol), open_client(protocol)
    calls = server.receive(b"".join(client.call(slot, "getTid", (OID,)) for slot in range(6)))
    stream = b"".join(server.reply(calls[slot][0], slot * 11) for slot in order)
    deliveries = [delivery for piece in cut(stream, where) for delivery in client.receive(piece)]
    assert deliveries == [(slot, 0, REPLY, slot * 11) for slot in order]


@both
def test_a_stock_clients_load_has_a_pair_as_its_id(protocol: str) -> None:
    server = open_server(protocol)
    data = marshal.encoder(protocol.encode())((OID, TID), False, "loadBefore", (OID, TID))
    assert server.receive(frame(data)) == [((OID, TID), False, "loadBefore", (OID, TID))]
    reply = marshal.decoder(protocol.encode())(server.reply((OID, TID), None)[4:])
    assert reply == ((OID, TID), 0, ".reply", None)


@both
def test_a_call_that_cannot_be_sent_waits_for_nothing(protocol: str) -> None:
    client = open_client(protocol)
    with pytest.raises(UnsendableValue):
        client.call("slot", "undoInfo", (0, -20, {"user_name": object()}))
    assert client.slots() == []


@both
def test_a_reply_that_cannot_be_sent_can_be_replaced(protocol: str) -> None:
    server, client = open_server(protocol), open_client(protocol)
    ((message_id, *_),) = server.receive(client.call("slot", "history", (OID,)))
    with pytest.raises(UnsendableValue) as caught:
        server.reply(message_id, [object()])
    ((slot, flag, _, args),) = client.receive(server.fault(message_id, caught.value))
    assert (slot, flag) == ("slot", FAULT)
    assert isinstance(faults.rebuild(args), TypeError)


def test_messages_before_the_handshake_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        ServerConnection("Z5").call("info", {})
    with pytest.raises(AssertionError):
        ClientConnection().one_way("tpc_begin", ())


def test_a_closed_connection_takes_nothing() -> None:
    server, client = open_server(), open_client()
    for connection in (server, client):
        connection.close()
        check_closed(connection)
    with pytest.raises(AssertionError):
        server.call("info", {})
    with pytest.raises(AssertionError):
        client.one_way("tpc_abort", (7,))


# Heartbeats -------------------------------------------------------------------------------------------


@both
def test_a_heartbeat_says_nothing(protocol: str) -> None:
    server, client = open_server(protocol), open_client(protocol)
    beat = client.heartbeat()
    assert marshal.decoder(protocol.encode())(beat[4:]) == (-1, 0, ".reply", None)
    assert server.receive(beat + message(protocol, 5, 0, "ping", ()) + beat) == [(5, 0, "ping", ())]
    assert client.receive(beat) == []


@both
def test_a_stock_clients_heartbeat_is_known(protocol: str) -> None:
    server = open_server(protocol)
    assert server.receive(frame(marshal.encoder(protocol.encode())(-1, 0, ".reply", None))) == []


# Replies that nobody waits for ------------------------------------------------------------------------


@both
def test_a_late_reply_is_dropped(protocol: str) -> None:
    server, client = open_server(protocol), open_client(protocol)
    gave_up, waits = object(), object()
    calls = server.receive(client.call(gave_up, "undoLog", ()) + client.call(waits, "ping", ()))
    client.forget(gave_up)
    assert client.slots() == [waits]
    client.forget(gave_up)
    late = server.reply(calls[0][0], ["…"])
    assert client.receive(late + server.reply(calls[1][0], None)) == [(waits, 0, REPLY, None)]
    assert client.receive(server.fault(calls[0][0], InvalidCall("x"))) == []


def test_one_slot_may_wait_for_several_replies() -> None:
    client = open_client()
    group, other = object(), object()
    for slot in (group, other, group):
        client.call(slot, "loadBefore", (OID, TID))
    client.forget(group)
    assert client.slots() == [other]


def test_forget_goes_by_identity() -> None:
    client = open_client()
    one: list[int] = []
    client.call(one, "ping", ())
    client.forget([])
    assert client.slots() == [[]]


def test_nothing_is_kept_of_a_call_that_was_answered() -> None:
    class Slot:
        """What can be seen to go away."""

    server, client = open_server(), open_client()
    (call,) = server.receive(client.call(Slot(), "ping", ()))
    client.receive(server.reply(call[0], None))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Slot]


@both
@pytest.mark.parametrize("message_id", [0, 2, 99, -2, 2**63, (OID, TID)], ids=repr)
def test_a_reply_to_a_call_that_was_never_made(protocol: str, message_id: Any) -> None:
    client = open_client(protocol)
    client.call("slot", "ping", ())
    with pytest.raises(PeerError, match="never made"):
        client.receive(message(protocol, message_id, 0, REPLY, None))
    check_closed(client, protocol)


@both
@pytest.mark.parametrize("message_id", [0, 1, -2, (OID, TID)], ids=repr)
def test_a_client_has_nothing_to_reply_to(protocol: str, message_id: Any) -> None:
    server = open_server(protocol)
    with pytest.raises(PeerError, match="never made"):
        server.receive(message(protocol, message_id, 0, REPLY, None))
    check_closed(server, protocol)


@both
@pytest.mark.parametrize("flag", [0, 2, 3, -1], ids=repr)
def test_a_server_must_not_want_a_reply(protocol: str, flag: int) -> None:
    client = open_client(protocol)
    with pytest.raises(PeerError, match="wants a reply"):
        client.receive(message(protocol, 1, flag, "x" * 1000, ()))
    check_closed(client, protocol)


@both
@pytest.mark.parametrize(
    "payload", [b"", b"\x00", b"\xc1", b"N.", b"\x90", b"\x94\x01\x00\xa1x", b"\xff" * 50], ids=repr
)
def test_what_is_no_message_ends_the_connection(protocol: str, payload: bytes) -> None:
    for connection in (open_server(protocol), open_client(protocol)):
        with pytest.raises(UndecodableMessage):
            connection.receive(frame(payload))
        check_closed(connection, protocol)


# Limits -----------------------------------------------------------------------------------------------


def large_call(size: int) -> bytes:
    return message("M5", 1, 0, "storea", (OID, TID, bytes(size), 7))


def test_a_client_sends_little_until_it_has_registered() -> None:
    server = open_server()
    with pytest.raises(FrameTooLarge):
        server.receive(large_call(LARGE))
    check_closed(server)


def test_a_client_sends_much_once_it_has_registered() -> None:
    server = open_server()
    server.receive(message("M5", 1, 0, "register", ("1", False)))
    server.registered()
    assert len(server.receive(large_call(LARGE))[0][3][2]) == LARGE


def test_the_limit_after_register_can_be_chosen() -> None:
    server = open_server(frame_limit=100_000)
    server.registered()
    assert server.receive(large_call(99_000))
    with pytest.raises(FrameTooLarge, match="the limit is 100,000"):
        server.receive(large_call(100_000))
    check_closed(server)


def test_a_small_limit_holds_before_register_too() -> None:
    server = open_server(frame_limit=50)
    with pytest.raises(FrameTooLarge):
        server.receive(large_call(50))


def test_the_offer_is_small() -> None:
    client = ClientConnection()
    with pytest.raises(FrameTooLarge):
        client.receive(LARGE.to_bytes(4, "big"))
    check_closed(client)


def test_a_large_invalidation_may_follow_the_reply_to_register_at_once() -> None:
    # The server adds a client to those it tells of commits before it replies to `register`. The two may
    # arrive in one segment, so that nobody can have raised the limit in between.
    server, client = open_server(), open_client()
    (call,) = server.receive(client.call("register", "register", ("1", False)))
    oids = [index.to_bytes(8, "big") for index in range(LARGE // 8)]
    segment = server.reply(call[0], TID) + server.call("invalidateTransaction", LATER_TID, oids)
    reply, invalidation = client.receive(segment)
    assert reply == ("register", 0, REPLY, TID)
    assert len(invalidation[3][1]) == len(oids)


def test_a_client_chooses_its_limit() -> None:
    client = open_client(frame_limit=1000)
    client.call("slot", "loadSerial", (OID, TID))
    with pytest.raises(FrameTooLarge, match="the limit is 1,000"):
        client.receive(message("M5", 1, 0, REPLY, bytes(1000)))
    check_closed(client)
