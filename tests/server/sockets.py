"""The barest of clients: a socket, on which a test sends exactly the bytes that it wants sent.

Every wait has a deadline. Must not know what the tests expect.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from types import TracebackType
from typing import Any

import pytest
from ZODB.utils import p64

from tests.peers import wait_until
from tests.server.inmemory import Call
from zeoid.model import MAX_TID, NO_TID
from zeoid.wire import faults
from zeoid.wire.codec import FAULT
from zeoid.wire.connection import ClientConnection
from zeoid.wire.frames import frame

CALL_S = 30.0

Address = tuple[str, int] | str

#: What is written where it does not matter what.
FIRST = p64(1)


def connect(address: Address) -> socket.socket:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(CALL_S)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection(address, CALL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class RawClient:
    """A connection on which anything can be sent."""

    def __init__(self, address: Address) -> None:
        self.socket = connect(address)
        self.connection = ClientConnection("M5")
        local = self.socket.getsockname()
        #: As the server's log calls it.
        self.name = "local client" if isinstance(address, str) else _host_and_port(local)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_frame(self, payload: bytes) -> None:
        self.send(frame(payload))

    def read_frame(self) -> bytes:
        length = int.from_bytes(self._read_exactly(4), "big")
        return self._read_exactly(length)

    def _read_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError(f"the connection ended after {len(data)} of {count} bytes")
            data += part
        return bytes(data)

    def read_to_end(self) -> bytes:
        """Everything until the server closes the connection."""
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while part := self.socket.recv(65536):
                data += part
        return bytes(data)

    def shake_hands(self) -> RawClient:
        offer = self.read_frame()
        self.connection.receive(frame(offer))
        self.send(self.connection.take_answer())
        return self

    def register(self, storage: str = "1", read_only: bool = False) -> RawClient:
        self.shake_hands().call("register", storage, read_only)
        return self

    def start(self, name: str, *args: Any) -> Call:
        """Call, without waiting for the answer."""
        call = Call(name, args)
        self.send(self.connection.call(call, name, args))
        return call

    def one_way(self, name: str, *args: Any) -> None:
        self.send(self.connection.one_way(name, args))

    def call(self, name: str, *args: Any) -> Any:
        return self.answer(self.start(name, *args))

    def answer(self, call: Call) -> Any:
        while not call.answered:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError("the server closed the connection")
            for slot, flag, _, value in self.connection.receive(data):
                if slot is not None:
                    slot.answered = True
                    slot.value = value
                    slot.problem = faults.rebuild(value) if flag == FAULT else None
        return call.result

    def prepare(self, oid: bytes, data: bytes = b"data", serial: bytes = NO_TID, id: Any = 1) -> Any:
        self.one_way("tpc_begin", id, b"", b"", {}, None, " ")
        self.one_way("storea", oid, serial, data, id)
        return self.call("vote", id)

    def commit(self, oid: bytes, data: bytes = b"data", serial: bytes = NO_TID) -> bytes:
        assert not self.prepare(oid, data, serial)
        tid: bytes = self.call("tpc_finish", 1)
        return tid


def _host_and_port(name: Any) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Bystander:
    """A client that loads and commits all the time, in a thread: nothing must go wrong for it.

    All its objects are its own. Used as a context manager, which ends with the first problem that it had.
    """

    numbers = itertools.count(1_000_000)

    def __init__(self, address: Address, storage: str = "1", client: RawClient | None = None) -> None:
        """*client*: one that is connected already, such as over TLS."""
        self.rounds = 0
        self.problem: BaseException | None = None
        self._client = (client or RawClient(address)).register(storage)
        self._oid = p64(next(self.numbers))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bystander", daemon=True)

    def _work(self) -> None:
        serial = NO_TID
        try:
            while not self._ending.is_set():
                data = b"round %d" % self.rounds
                serial = self._client.commit(self._oid, data, serial)
                assert self._client.call("loadBefore", self._oid, MAX_TID) == (data, serial, None)
                self.rounds += 1
        except BaseException as problem:
            self.problem = problem

    def goes_on(self, rounds: int = 3) -> None:
        """See it do some more."""
        wanted = self.rounds + rounds
        wait_until(lambda: self.rounds >= wanted or self.problem, "another client is served", CALL_S)
        if self.problem is not None:
            raise self.problem

    def __enter__(self) -> Bystander:
        self._thread.start()
        self.goes_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(CALL_S)
        self._client.socket.close()
        assert not self._thread.is_alive()
        if error is None and self.problem is not None:
            raise self.problem


def commit(address: Address, oid: bytes = FIRST, storage: str = "1") -> bytes:
    with RawClient(address) as client:
        return client.register(storage).commit(oid)


def load(address: Address, oid: bytes = FIRST) -> Any:
    with RawClient(address) as client:
        return client.register().call("loadBefore", oid, MAX_TID)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
