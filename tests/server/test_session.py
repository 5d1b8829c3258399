"""One session: its handshake, who may call what and when, what it answers, and what it writes to the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.POSException import ReadOnlyError, StorageTransactionError
from ZODB.utils import p64

from tests.server.assertions import log_lines, refuses
from tests.server.inmemory import Call, MemoryHouse, MemoryWire, Peer
from zeoid import limits
from zeoid.engines.opening import open_memory
from zeoid.model import MAX_TID, NO_TID
from zeoid.security import identity
from zeoid.server.session import Session
from zeoid.wire.codec import codec_for
from zeoid.wire.frames import frame
from zeoid.wire.messages import SERVER_METHODS, Phase

A, B = p64(1), p64(2)
REGISTERED = [name for name, method in SERVER_METHODS.items() if method.phase is Phase.REGISTERED]
STATUS_KEYS = {
    "aborts", "active_txns", "commits", "conflicts", "conflicts_resolved", "connections", "last-transaction",
    "loads", "lock_time", "start", "stores", "timeout-thread-is-alive", "waiting",
}  # fmt: skip

codings = pytest.mark.parametrize("coding", ["M5", "Z5"])


@pytest.fixture(autouse=True)
def whole_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zeoid.server")


# The handshake --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offer", ["M5", "Z5"])
def test_the_server_speaks_first(house: MemoryHouse, offer: str) -> None:
    wire = MemoryWire()
    Session(house, wire, identity.Peer("peer"), offer=offer)
    assert wire.take() == frame(offer.encode())


@pytest.mark.parametrize("offer", ["M5", "Z5"])
@codings
def test_either_coding_is_accepted_as_the_answer(house: MemoryHouse, offer: str, coding: str) -> None:
    peer = Peer(house, coding=coding, offer=offer)
    assert peer.register().ask("lastTransaction") == NO_TID


@pytest.mark.parametrize(
    "answer", [b"", b"M4", b"Z3101", b"M55", b"X5", b"\0\0", b"GET / HTTP/1.1\r\n\r\n", b"ruok "], ids=repr
)
def test_an_answer_in_another_protocol(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, answer: bytes
) -> None:
    wire = MemoryWire()
    session = Session(house, wire, identity.Peer("peer"))
    session.receive(frame(answer))
    assert wire.closed
    (line,) = log_lines(caplog)
    assert line.startswith("peer dropped: protocol ")
    assert repr(answer) in line


def test_the_handshake_byte_by_byte(house: MemoryHouse) -> None:
    wire = MemoryWire()
    session = Session(house, wire, identity.Peer("peer"))
    codec = codec_for(b"M5")
    stream = frame(b"M5") + frame(codec.encode(1, 0, "register", ("1", False)))
    stream += frame(codec.encode(2, 0, "lastTransaction", ()))
    for position in range(len(stream)):
        session.receive(stream[position : position + 1])
    replies = frame(codec.encode(1, 0, ".reply", NO_TID)) + frame(codec.encode(2, 0, ".reply", NO_TID))
    assert wire.take() == frame(b"Z5") + replies


def test_the_handshake_and_the_first_calls_in_one_segment(house: MemoryHouse) -> None:
    wire = MemoryWire()
    session = Session(house, wire, identity.Peer("peer"))
    codec = codec_for(b"Z5")
    calls = [("register", ("1", False)), ("ping", ()), ("lastTransaction", ())]
    messages = [codec.encode(number, 0, name, args) for number, (name, args) in enumerate(calls)]
    session.receive(frame(b"Z5") + b"".join(map(frame, messages)))
    assert len(wire.writes) == 2  # the offer, and all replies at once


def test_a_large_message_before_register_is_refused_by_its_length(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    peer = Peer(house)
    peer.send((limits.HANDSHAKE_FRAME_BYTES + 1).to_bytes(4, "big"))
    assert peer.dropped
    assert "65,537 bytes; the limit is 65,536" in log_lines(caplog)[0]


def test_a_large_message_after_register(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.commit(A, data=b"x" * (limits.HANDSHAKE_FRAME_BYTES * 2))
    assert len(peer.ask("loadBefore", A, MAX_TID)[0]) == limits.HANDSHAKE_FRAME_BYTES * 2


def test_a_heartbeat_is_not_answered(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.send(peer.connection.heartbeat())
    assert peer.read() == []
    assert not peer.dropped


def test_a_reply_to_nothing_ends_the_connection(house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = house.peer()
    peer.send(frame(codec_for(b"M5").encode(7, 0, ".reply", None)))
    assert peer.dropped
    assert log_lines(caplog) == ["peer dropped: a reply to a call that was never made"]


@codings
def test_a_message_that_cant_be_decoded_ends_the_connection(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, coding: str
) -> None:
    peer = Peer(house, coding=coding).register()
    assert peer.ask("ping") is None
    peer.send(frame(b"\xc1 is neither a pickle nor msgpack"))
    assert peer.dropped
    (line,) = log_lines(caplog)
    assert line.startswith("peer dropped: ")


# ruok -----------------------------------------------------------------------------------------------------


def test_ruok_tells_the_status_of_every_storage_and_hangs_up(
    make_house: Callable[..., MemoryHouse], caplog: pytest.LogCaptureFixture
) -> None:
    house = make_house({"1": open_memory(), "other": open_memory()})
    house.peer().commit(A)
    wire = MemoryWire()
    session = Session(house, wire, identity.Peer("peer"))
    wire.take()
    caplog.clear()
    session.receive(frame(b"ruok"))
    data = wire.take()
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    status = json.loads(data[4:])
    assert set(status) == {"1", "other"}
    assert set(status["1"]) == set(status["other"]) == STATUS_KEYS
    assert (status["1"]["commits"], status["other"]["commits"]) == (1, 0)
    assert wire.closed
    assert log_lines(caplog, logging.INFO) == []  # monitors ask every few seconds


def test_what_follows_ruok_is_not_read(house: MemoryHouse) -> None:
    wire = MemoryWire()
    session = Session(house, wire, identity.Peer("peer"))
    session.receive(frame(b"ruok"))
    wire.take()
    session.receive(frame(b"ruok"))
    assert wire.take() == b""


# Register -------------------------------------------------------------------------------------------------


def test_register_tells_the_last_tid(house: MemoryHouse) -> None:
    tid = house.peer().commit(A)
    assert Peer(house).ask("register", "1", False) == tid


@codings
@pytest.mark.parametrize("name", ["1", b"1"])
def test_the_name_of_a_storage_may_be_text_or_bytes(house: MemoryHouse, coding: str, name: Any) -> None:
    assert Peer(house, coding=coding).ask("register", name, 0) == NO_TID


def test_an_unknown_storage(make_house: Callable[..., MemoryHouse], caplog: pytest.LogCaptureFixture) -> None:
    house = make_house({"1": open_memory(), "zoo": open_memory()})
    peer = Peer(house)
    refuses(peer.start("register", "nosuch", False), "unknown storage: 'nosuch'", "'1', 'zoo'")
    assert log_lines(caplog) == ["peer: unknown storage: 'nosuch'; this server has '1', 'zoo'"]
    assert peer.ask("register", "zoo", False) == NO_TID  # it may try another one


def test_a_storage_with_an_endless_name_full_of_line_breaks(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    refuses(Peer(house).start("register", "a\n" * 10_000, False), "unknown storage")
    (line,) = log_lines(caplog)
    assert len(line) < 400
    assert "\n" not in line


def test_a_server_that_is_read_only_has_no_writers(make_house: Callable[..., MemoryHouse]) -> None:
    house = make_house(read_only=True)
    peer = Peer(house)
    with pytest.raises(ReadOnlyError):
        peer.ask("register", "1", False)
    assert peer.ask("register", "1", True) == NO_TID


def test_who_registered_is_in_the_log(house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    Peer(house, coding="Z5").register(read_only=True)
    assert log_lines(caplog, logging.INFO) == ["peer connected to storage '1' read-only, protocol Z5"]


# Who may call what, and when ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTERED)
def test_before_register_nothing_else_may_be_called(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    peer = Peer(house)
    refuses(peer.start(name), f"{name} can't be called before register")
    assert log_lines(caplog) == [f"peer: {name} can't be called before register"]
    assert peer.ask("register", "1", False) == NO_TID


@pytest.mark.parametrize("name", REGISTERED)
def test_before_register_a_one_way_call_ends_the_connection(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    peer = Peer(house)
    peer.one_way(name)
    assert peer.dropped
    (line,) = log_lines(caplog)
    assert line == f"peer dropped: {name} can't be called before register"
    assert house.hosted.transactions.active == 0


def test_register_is_called_once(house: MemoryHouse) -> None:
    peer = house.peer()
    refuses(peer.start("register", "1", False), "register can't be called after register")
    assert peer.ask("ping") is None


def test_a_method_that_does_not_exist(house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = house.peer()
    refuses(peer.start("shutdown"), "there is no method 'shutdown'")
    assert log_lines(caplog) == ["peer: there is no method 'shutdown'"]
    assert peer.ask("ping") is None


@pytest.mark.parametrize("name", ["__class__", "drop", "_end", "zeoVerify", "openBlob", ""])
def test_nothing_but_the_table_can_be_called(house: MemoryHouse, name: str) -> None:
    peer = house.peer()
    refuses(peer.start(name), "there is no method")


def test_a_one_way_method_that_does_not_exist(house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = house.peer()
    peer.one_way("shutdown")
    assert peer.dropped
    assert log_lines(caplog) == ["peer dropped: there is no method 'shutdown'"]


@pytest.mark.parametrize("one_way", [False, True])
def test_a_method_whose_name_is_endless_and_full_of_line_breaks(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, one_way: bool
) -> None:
    peer = house.peer()
    name = "a\nCRITICAL everything is fine\n" * 1000
    if one_way:
        peer.one_way(name)
    else:
        peer.start(name)
    (line,) = log_lines(caplog)
    assert "\n" not in line
    assert len(line) < 300


@codings
@pytest.mark.parametrize("name", list(SERVER_METHODS))
def test_wrong_arguments(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, name: str, coding: str
) -> None:
    peer = Peer(house, coding=coding)
    if SERVER_METHODS[name].phase is Phase.REGISTERED:
        peer.register()
    caplog.clear()
    refuses(peer.start(name, *range(20)), f"{name} takes (", "not 20 arguments")
    assert len(log_lines(caplog)) == 1
    assert not peer.dropped


ODD_ARGUMENTS: list[Any] = [None, 7, "text", {"a": 1}, {}, [[], {}], ["x" * 65], [None], 1.5, b"bytes"]


@codings
@pytest.mark.parametrize("args", ODD_ARGUMENTS, ids=repr)
@pytest.mark.parametrize("name", ["storea", "vote", "loadBefore", "tpc_begin"])
def test_arguments_of_another_shape(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, name: str, coding: str, args: Any
) -> None:
    peer = Peer(house, coding=coding).register()
    call = Call(name)
    peer.send(peer.connection.call(call, name, args))
    peer.read()
    refuses(call, name)
    assert len(log_lines(caplog)) == 1
    assert peer.ask("ping") is None


@codings
@pytest.mark.parametrize("args", ODD_ARGUMENTS, ids=repr)
@pytest.mark.parametrize("name", ["storea", "undoa", "vote", "loadBefore", "tpc_begin"])
def test_one_way_arguments_of_another_shape_end_the_connection(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, name: str, coding: str, args: Any
) -> None:
    peer = Peer(house, coding=coding).register()
    peer.send(peer.connection.one_way(name, args))
    assert peer.dropped
    (line,) = log_lines(caplog)
    assert line.startswith(f"peer dropped: {name}")
    assert house.hosted.transactions.active == 0


@pytest.mark.parametrize("name", ["vote", "tpc_finish"])
def test_what_has_an_answer_is_not_called_one_way(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    peer = house.peer()
    peer.begin()
    peer.one_way(name, 1)
    assert peer.dropped
    assert log_lines(caplog) == [f"peer dropped: {name} was called one-way, but has an answer"]
    assert house.hosted.transactions.active == 0


@pytest.mark.parametrize("name", ["ping", "lastTransaction", "get_info", "history", "undoLog"])
def test_an_answer_that_nobody_wants_is_not_sent(file_house: MemoryHouse, name: str) -> None:
    peer = file_house.peer()
    peer.commit(A)
    args = (A,) if name == "history" else ()
    peer.read()
    peer.one_way(name, *args)
    file_house.slow.run_all()
    assert peer.read() == []
    assert not peer.dropped


# One-way operations: what is wrong with them shows at the vote --------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("storea", (b"short", NO_TID, b"data")),
        ("storea", (A, NO_TID, "text")),
        ("restorea", (A, NO_TID, 7, None)),
        ("deleteObject", (A, None)),
        ("checkCurrentSerialInTransaction", (None, NO_TID)),
        ("undoa", (17,)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_operation_fails_the_vote(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, name: str, args: tuple[Any, ...]
) -> None:
    peer = house.peer()
    peer.begin()
    peer.one_way(name, *args, 1)
    refuses(peer.start("vote", 1), name)
    assert len(log_lines(caplog)) == 1
    assert house.hosted.transactions.active == 0
    assert peer.commit(A) == house.hosted.visible.tid


def test_an_operation_without_a_transaction_fails_the_vote(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.store(A, id=5)
    with pytest.raises(StorageTransactionError, match="before tpc_begin"):
        peer.ask("vote", 5)


def test_too_many_transactions_end_the_connection(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    peer = house.peer()
    for id in range(limits.TRANSACTIONS_PER_CONNECTION):
        peer.begin(id)
    assert not peer.dropped
    peer.begin("one more")
    assert peer.dropped
    assert log_lines(caplog) == ["peer dropped: more than 64 transactions on one connection"]
    assert house.hosted.transactions.active == 0


@pytest.mark.parametrize("wrong", [False, True], ids=["operations", "wrong operations"])
def test_too_many_unknown_transactions_end_the_connection(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, wrong: bool
) -> None:
    peer = house.peer()
    for id in range(limits.TRANSACTIONS_PER_CONNECTION + 1):
        assert not peer.dropped
        peer.one_way("storea", A, b"short" if wrong else NO_TID, b"data", id)
    assert peer.dropped
    assert ("serial" if wrong else "more than 64 transactions") in log_lines(caplog)[0]
    assert len(log_lines(caplog)) == 1
    assert house.hosted.transactions.active == 0
