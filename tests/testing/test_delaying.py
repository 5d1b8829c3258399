"""The proxy that makes a way longer: everything arrives, in order, and no earlier than it should."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from zeoid.testing import DelayingProxy

DEADLINE_S = 10.0


@pytest.fixture
def echo() -> Iterator[socket.socket]:
    """A server that sends back what it gets, one connection after the other, and the end as well."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def connected(proxy: DelayingProxy) -> socket.socket:
    return socket.create_connection(proxy.address, DEADLINE_S)


def test_a_round_trip_takes_as_long_as_it_should(echo: socket.socket) -> None:
    with DelayingProxy(echo.getsockname(), 0.05) as proxy, connected(proxy) as client:
        began_s = time.monotonic()
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        assert time.monotonic() - began_s >= 0.1


def test_what_is_sent_together_arrives_together(echo: socket.socket) -> None:
    """The delay is the way's, not each message's."""
    with DelayingProxy(echo.getsockname(), 0.1) as proxy, connected(proxy) as client:
        began_s = time.monotonic()
        for _ in range(100):
            client.sendall(b"x")
        got = 0
        while got < 100:
            got += len(client.recv(100))
        assert time.monotonic() - began_s < 100 * 0.2


def test_much_arrives_whole_and_then_the_end(echo: socket.socket) -> None:
    sent = bytes(range(256)) * 8_000
    with DelayingProxy(echo.getsockname(), 0.001) as proxy, connected(proxy) as client:

        def send() -> None:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got = b"".join(iter(lambda: client.recv(65536), b""))
        sender.join()
    assert got == sent


def test_nobody_behind_it(echo: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    with DelayingProxy(address, 0.001) as proxy, connected(proxy) as client:
        assert client.recv(1) == b""


def test_closing_breaks_what_is_open(echo: socket.socket) -> None:
    proxy = DelayingProxy(echo.getsockname(), 0.001)
    with connected(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        proxy.close()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
