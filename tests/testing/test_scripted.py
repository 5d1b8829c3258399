"""The scripted server that Zeoid ships for tests: it does what the script says, and tells what it missed."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import ZEO.ClientStorage
from ZODB.POSException import POSKeyError

import zeoid
from zeoid.errors import PeerError
from zeoid.testing import Call, ScriptedConnection, ScriptedServer
from zeoid.wire.connection import ClientConnection

OID, T1, T2 = b"\0" * 7 + b"\1", b"\3" * 8, b"\4" * 8


@pytest.fixture
def ends() -> Any:
    """A connection, and a client at its other end that can only send and receive."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    with ScriptedConnection(ours, timeout_s=5) as connection, theirs:
        yield connection, theirs


def shaken(ends: Any, coding: str = "M5") -> ClientConnection:
    """The client's law, after the handshake."""
    connection, sock = ends
    client = ClientConnection(coding)
    offering = threading.Thread(target=connection.offer, daemon=True)
    offering.start()
    client.receive(sock.recv(100))
    sock.sendall(client.take_answer())
    offering.join(5)
    assert connection.protocol == coding
    return client


def test_the_example_of_the_documentation() -> None:
    def in_a_thread(function: Any, *args: Any) -> Any:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(function(*args)), daemon=True)
        thread.start()
        return thread, results

    oid, tid, later_tid = OID, T1, T2
    with ScriptedServer() as server:
        storage = zeoid.ClientStorage(server.address, wait=False)
        connection = server.accept()
        connection.welcome(tid)
        thread, results = in_a_thread(storage.load, oid)
        load = connection.expect("loadBefore")
        connection.send(
            connection.invalidation(later_tid, [oid]),
            connection.reply(load, (b"data", tid, None)),
        )
        thread.join(5)
        assert results == [(b"data", tid)]
        assert storage.lastTransaction() == later_tid
        storage.close()


@pytest.mark.parametrize("coding", ["M5", "Z5"])
def test_calls_arrive_in_order_with_all_that_belongs_to_them(ends: Any, coding: str) -> None:
    connection, sock = ends
    client = shaken(ends, coding)
    sock.sendall(client.one_way("tpc_begin", (1, b"u")) + client.heartbeat())
    sock.sendall(client.call("slot", "vote", (1,)))
    begin, vote = connection.expect(), connection.expect("vote", "tpc_finish")
    assert begin == Call(0, True, "tpc_begin", (1, b"u"))
    assert (vote.name, vote.args, vote.one_way) == ("vote", (1,), False)
    connection.answer(vote, [OID])
    ((slot, _, _, value),) = client.receive(sock.recv(1000))
    assert (slot, list(value)) == ("slot", [OID])


def test_everything_in_one_segment(ends: Any) -> None:
    connection, sock = ends
    client = shaken(ends)
    sock.sendall(client.call("first", "ping", ()) + client.call("second", "ping", ()))
    first, second = connection.expect(), connection.expect()
    connection.send(
        connection.fault(second, POSKeyError(OID)),
        connection.invalidation(T2, [OID]),
        connection.call("info", {"size": 1}),
        connection.reply(first, None),
        b"\0\0",
    )
    received = client.receive(sock.recv(1000))
    assert [delivery[0] for delivery in received] == ["second", None, None, "first"]
    assert [delivery[2] for delivery in received[1:3]] == ["invalidateTransaction", "info"]


def test_waiting_for_what_does_not_come(ends: Any) -> None:
    connection, _ = ends
    shaken(ends)
    with pytest.raises(AssertionError, match="instead of vote: nothing came in time"):
        connection.expect("vote", timeout_s=0.05)
    with pytest.raises(AssertionError, match="instead of the end of the connection: nothing came in time"):
        connection.expect_end(timeout_s=0.05)


def test_another_call_than_expected(ends: Any) -> None:
    connection, sock = ends
    client = shaken(ends)
    sock.sendall(client.call("slot", "ping", (1,)))
    with pytest.raises(AssertionError, match=r"instead of vote or tpc_finish: Call\(.*'ping'.*\(1,\)"):
        connection.expect("vote", "tpc_finish")


def test_the_end_instead_of_a_call(ends: Any) -> None:
    connection, sock = ends
    shaken(ends)
    sock.close()
    with pytest.raises(AssertionError, match="instead of a call: the client closed the connection"):
        connection.expect()
    assert connection.expect_end() == []


def test_the_calls_before_the_end(ends: Any) -> None:
    connection, sock = ends
    client = shaken(ends)
    sock.sendall(client.call("slot", "ping", ()) + client.one_way("bye", ()))
    sock.close()
    assert [call.name for call in connection.expect_end()] == ["ping", "bye"]


def test_a_client_that_does_not_answer_the_offer(ends: Any) -> None:
    connection, sock = ends
    connection.timeout_s = 0.05
    with pytest.raises(AssertionError, match="did not answer the offer: nothing came in time"):
        connection.offer()
    sock.close()
    with pytest.raises((AssertionError, OSError)):
        connection.offer()


def test_a_client_that_breaks_the_protocol(ends: Any) -> None:
    connection, sock = ends
    shaken(ends)
    sock.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(AssertionError, match="the client broke the protocol") as failure:
        connection.expect()
    assert isinstance(failure.value.__cause__, PeerError)


def test_a_client_that_does_not_read(ends: Any) -> None:
    connection, _ = ends
    shaken(ends)
    connection.timeout_s = 0.05
    with pytest.raises(AssertionError, match="the client does not read"):
        connection.send(b"x" * 10_000_000)


def test_large_messages_both_ways(ends: Any) -> None:
    """The script is not the one who limits what a client sends."""
    connection, sock = ends
    client = shaken(ends)
    data = b"x" * 300_000
    sending = threading.Thread(target=sock.sendall, args=(client.call("slot", "echo", (data,)),), daemon=True)
    sending.start()
    call = connection.expect("echo")
    assert call.args == (data,)
    sending.join(5)
    answering = threading.Thread(target=connection.answer, args=(call, data), daemon=True)
    answering.start()
    received: list[Any] = []
    while not received:
        received = client.receive(sock.recv(100_000))
    assert received[0][3] == data
    answering.join(5)


def test_what_closing_and_resetting_look_like() -> None:
    with ScriptedServer() as server:
        for end, seen in [("close", b""), ("end_stream", b""), ("reset", None)]:
            with socket.create_connection(server.address, 5) as sock:
                connection = server.accept()
                connection.send(b"last words")
                assert sock.recv(100) == b"last words"
                getattr(connection, end)()
                if seen is None:
                    with pytest.raises(ConnectionResetError):
                        sock.recv(100)
                else:
                    assert sock.recv(100) == seen


def test_a_server_that_goes_and_comes_back() -> None:
    with ScriptedServer(timeout_s=0.05) as server:
        with pytest.raises(AssertionError, match="nobody connected in time"):
            server.accept()
        server.stop_listening()
        server.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.address, 5)
        with pytest.raises(AssertionError, match="does not listen"):
            server.accept()
        server.listen_again()
        server.listen_again()
        with socket.create_connection(server.address, 5):
            server.accept()


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with ScriptedServer(path=path) as server, socket.socket(socket.AF_UNIX) as sock:
        assert server.address == path
        sock.connect(path)
        connection = server.accept()
        connection.send(b"hello")
        assert sock.recv(100) == b"hello"
        connection.reset()
        assert sock.recv(100) == b""
        server.stop_listening()
        with pytest.raises(AssertionError):
            server.listen_again()


def test_the_end_of_the_server_is_the_end_of_its_connections() -> None:
    with ScriptedServer() as server:
        sock = socket.create_connection(server.address, 5)
        server.accept()
    with sock:
        assert sock.recv(100) == b""


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_stock_client_is_content_with_it() -> None:
    """It is the protocol that is spoken, not a dialect."""
    with ScriptedServer() as server:
        opened: list[Any] = []
        opening = threading.Thread(
            target=lambda: opened.append(ZEO.ClientStorage.ClientStorage(server.address, wait_timeout=10)),
            daemon=True,
        )
        opening.start()
        connection = server.accept()
        connection.offer("M5")
        connection.answer(connection.expect("register"), T1)
        while not opened:
            call = connection.expect("get_info", "getInvalidations", "lastTransaction")
            connection.answer(call, {"interfaces": (), "name": "x"} if call.name == "get_info" else T1)
            opening.join(0.5)
        assert opened[0].lastTransaction() == T1
        opened[0].close()
