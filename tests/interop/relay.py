"""A relay between clients and a server: it can be cut, and it listens to how the two greet each other.

Owns sockets and threads on loopback, and what both sides sent before anything else: the first frame of each
direction. Must not know the protocol beyond that a frame starts with its length.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

from tests.peers import Address

READ_BYTES = 1 << 16
CONNECT_S = 5.0
JOIN_S = 10.0


class Direction:
    """One of the two directions of a connection, with the payload of its first frame."""

    def __init__(self) -> None:
        self._head = b""

    def saw(self, data: bytes) -> None:
        if len(self._head) < 4 + self._size():
            self._head += data

    def _size(self) -> int:
        return int.from_bytes(self._head[:4]) if len(self._head) >= 4 else READ_BYTES

    @property
    def greeting(self) -> bytes:
        return self._head[4 : 4 + self._size()]


class Relay:
    """Passes bytes on, both ways, until it is cut; after `restore` it does so again, at the same address."""

    def __init__(self, server: Address) -> None:
        self.offers: list[Direction] = []
        """What the server said first, by connection."""
        self.answers: list[Direction] = []
        """What the client said first, by connection."""
        assert not isinstance(server, str), "for TCP only"
        self._server = server
        self._port = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.restore()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()

    @property
    def address(self) -> Address:
        return "127.0.0.1", self._port

    def restore(self) -> None:
        assert self._listener is None
        self._listener = listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        self._run(self._accept, listener)

    def cut(self) -> None:
        """Close every connection and refuse new ones."""
        if self._listener is None:
            return
        with self._lock:
            listener, self._listener = self._listener, None
            # A thread that waits in a socket's call is woken by a shutdown, not by a close.
            for each in {listener, *self._sockets}:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(JOIN_S)
            assert not thread.is_alive(), thread
        self._threads.clear()

    def _run(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="relay", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._server, CONNECT_S)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            if self._listener is None:
                client.close()
                server.close()
                return
            self._sockets |= {client, server}
        self.offers.append(offer := Direction())
        self.answers.append(answer := Direction())
        self._run(self._pass_on, server, client, offer)
        self._run(self._pass_on, client, server, answer)

    def _pass_on(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(READ_BYTES):
                direction.saw(data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._sockets.discard(source)
        source.close()
