"""What clients do that mean harm: each attack goes on as long as its context lasts, and then is gone.

Owns the attacks, by name. `connect` makes a client that is not registered, over TLS or not; what is looked at
meanwhile is the caller's business. Whatever a server does to an attacker is no failure.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ZODB.utils import p64

from tests.server.sockets import RawClient
from zeoid import limits
from zeoid.model import MAX_TID, NO_TID

#: What an attacker meets, and takes no notice of.
MET = (OSError, EOFError, AssertionError, Exception)
RECORD = b"x" * 1_000_000
#: Objects that have large records: see `prepare`.
LARGE = [p64(number) for number in range(10_000, 10_010)]


@dataclass
class Target:
    """A server: where it is, and the certificates that an attacker may have."""

    address: tuple[str, int]
    #: None: it has no TLS.
    context: ssl.SSLContext | None = None
    #: Sessions that were given, to be taken up again.
    sessions: list[ssl.SSLSession] = field(default_factory=list)

    def tcp(self) -> socket.socket:
        return socket.create_connection(self.address, 30)

    def connect(self) -> RawClient:
        """A client that has done nothing beyond TLS."""
        client = RawClient(self.address)
        if self.context is not None:
            try:
                client.socket = self.context.wrap_socket(client.socket, server_hostname="localhost")
            except BaseException:
                client.socket.close()
                raise
        return client

    def register(self) -> RawClient:
        client = self.connect()
        try:
            return client.register()
        except BaseException:
            client.socket.close()
            raise


Attack = Callable[[Target, int], contextlib.AbstractContextManager[None]]


def prepare(target: Target) -> None:
    """Commit what attacks ask for."""
    with target.register() as client:
        for oid in LARGE:
            with contextlib.suppress(KeyError):
                client.call("getTid", oid)
                continue
            client.commit(oid, RECORD)


@contextlib.contextmanager
def _held(make: Callable[[], RawClient | socket.socket], count: int) -> Iterator[list[RawClient]]:
    """So many connections, as far as they can be had; they stay open."""
    made: list[RawClient | socket.socket] = []
    try:
        for _ in range(count):
            with contextlib.suppress(*MET):
                made.append(make())
        yield [each for each in made if isinstance(each, RawClient)]
    finally:
        for each in made:
            (each.socket if isinstance(each, RawClient) else each).close()


@contextlib.contextmanager
def _flood(work: Callable[[], None], threads: int) -> Iterator[None]:
    """Do it again and again, in threads; at least once in each."""
    ending = threading.Event()

    def run() -> None:
        while True:
            with contextlib.suppress(*MET):
                work()
            begun.release()
            if ending.is_set():
                return

    begun = threading.Semaphore(0)
    running = [threading.Thread(target=run, name="attacker", daemon=True) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        for _ in range(threads):
            begun.acquire(timeout=60)
        yield
    finally:
        ending.set()
        for thread in running:
            thread.join(60)


def _send_what_goes(client: RawClient, data: bytes) -> None:
    """Send it as far as the server takes it, and wait for nothing."""
    client.socket.settimeout(0.2)
    with contextlib.suppress(*MET):
        client.send(data)


# Those that are nobody yet ----------------------------------------------------------------------------


@contextlib.contextmanager
def half_open(target: Target, count: int) -> Iterator[None]:
    """They connect, and say nothing."""
    with _held(target.tcp, count):
        yield


def _hello() -> bytes:
    """How a client begins with TLS."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@contextlib.contextmanager
def half_a_handshake(target: Target, count: int) -> Iterator[None]:
    """They begin with TLS, and stop: after half of their first message, or after the server's answer."""
    hello = _hello()
    which = iter(range(count))

    def make() -> socket.socket:
        sock = target.tcp()
        sock.sendall(hello if next(which) % 2 else hello[:100])
        return sock

    with _held(make, count):
        yield


@contextlib.contextmanager
def unregistered(target: Target, count: int) -> Iterator[None]:
    """They do all that comes before, and never register."""
    with _held(lambda: target.connect().shake_hands(), count):
        yield


@contextlib.contextmanager
def slow(target: Target, count: int) -> Iterator[None]:
    """They send byte by byte: TLS, the answer to the offer, and what comes after they have registered."""
    hello = _hello()
    states: list[tuple[socket.socket, bytes]] = []
    for number in range(count):
        with contextlib.suppress(*MET):
            if number % 3 == 0:
                states.append((target.tcp(), hello if target.context else b"\0\0\xff\0" + bytes(0xFF00)))
            elif number % 3 == 1:
                states.append((target.connect().socket, b"\0\0\xff\0" + bytes(0xFF00)))
            else:
                states.append((target.register().socket, b"\0\xff\0\0" + bytes(0x10000)))
    position = 0

    def drip() -> None:
        nonlocal position
        for sock, data in states:
            with contextlib.suppress(*MET):
                sock.sendall(data[position % len(data) :][:1])
        position += 1

    try:
        with _flood(drip, 1):
            yield
    finally:
        for sock, _ in states:
            sock.close()


@contextlib.contextmanager
def handshakes(target: Target, count: int) -> Iterator[None]:
    """A TLS handshake, and another one."""

    def work() -> None:
        target.connect().socket.close()

    with _flood(work, count):
        yield


@contextlib.contextmanager
def resumed_handshakes(target: Target, count: int) -> Iterator[None]:
    """Each takes up the session of one before, and is given tickets for more."""
    assert target.context is not None
    with target.register() as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        session = client.socket.session

    def work() -> None:
        assert target.context is not None
        with target.tcp() as plain:
            target.context.wrap_socket(plain, server_hostname="localhost", session=session).close()

    with _flood(work, count):
        yield


@contextlib.contextmanager
def guesses(target: Target, count: int) -> Iterator[None]:
    """Tokens that are made up."""

    def work() -> None:
        with target.connect() as client:
            client.shake_hands()
            client.call("authenticate", f"zeoid_guess_{secrets.token_hex(32)}")

    with _flood(work, count):
        yield


@contextlib.contextmanager
def garbage(target: Target, count: int) -> Iterator[None]:
    """Something else than the protocol, whose every connection is worth a line in the log."""

    def work() -> None:
        with target.connect() as client:
            client.send(b"GET / HTTP/1.1\r\n\r\n")
            client.read_to_end()

    with _flood(work, count):
        yield


# Those that have registered ---------------------------------------------------------------------------


@contextlib.contextmanager
def long_messages(target: Target, count: int, size_bytes: int = 16 * 1024 * 1024) -> Iterator[None]:
    """The larger part of a message as long as may be, the end of which never comes."""
    length = limits.FRAME_BYTES.to_bytes(4, "big")
    with _held(target.register, count) as clients:
        for client in clients:
            _send_what_goes(client, length + bytes(size_bytes))
        yield


@contextlib.contextmanager
def bombs(target: Target, count: int) -> Iterator[None]:
    """Messages that are much larger in memory than on their way."""
    size = 4 * 1024 * 1024
    empty_maps = b"\x94\x01\x00\xa4ping\xdd" + size.to_bytes(4, "big") + b"\x80" * size
    message = len(empty_maps).to_bytes(4, "big") + empty_maps

    def work() -> None:
        with target.register() as client:
            client.send(message)
            client.read_to_end()

    with _flood(work, count):
        yield


def _deaf(name: str, *args: object) -> Attack:
    """Calls whose answers nobody reads."""

    @contextlib.contextmanager
    def attack(target: Target, count: int) -> Iterator[None]:
        with _held(target.register, count) as clients:
            for client in clients:
                if name == "iterator":
                    client.call("iterator_start", None, None)
                    client.call("iterator_next", 0)
                    calls = [client.connection.call("slot", "iterator_next", (0,)) for _ in range(2000)]
                else:
                    calls = [client.connection.call("slot", name, args) for _ in range(2000)]
                _send_what_goes(client, b"".join(calls))
            yield

    attack.__doc__ = f"{name}, again and again, and nobody reads the answers."
    return attack


@contextlib.contextmanager
def endless_uploads(target: Target, count: int) -> Iterator[None]:
    """Blobs that never end."""

    def work() -> None:
        with target.register() as client:
            client.one_way("storeBlobStart")
            chunk = client.connection.one_way("storeBlobChunk", (bytes(59_000),))
            for _ in range(100):
                client.send(chunk)

    with _flood(work, count):
        yield


@contextlib.contextmanager
def never_voted(target: Target, count: int) -> Iterator[None]:
    """As many transactions as may be begun, each with records, and that is all."""
    with _held(target.register, count) as clients:
        for client in clients:
            begun = []
            for id in range(limits.TRANSACTIONS_PER_CONNECTION):
                begun.append(client.connection.one_way("tpc_begin", (id, b"", b"", {}, None, " ")))
                begun.append(client.connection.one_way("storea", (p64(20_000 + id), NO_TID, RECORD, id)))
            _send_what_goes(client, b"".join(begun))
        yield


@contextlib.contextmanager
def never_finished(target: Target, count: int) -> Iterator[None]:
    """Votes on objects that others want, too."""

    def work() -> None:
        with target.register() as client:
            client.prepare(p64(30_000), b"never")
            client.read_to_end()

    with _flood(work, count):
        yield


@contextlib.contextmanager
def wrong_calls(target: Target, count: int) -> Iterator[None]:
    """Calls that can't be: each is worth a line in the log."""

    def work() -> None:
        with target.register() as client:
            calls = [client.start("nosuch") for _ in range(500)]
            for call in calls:
                with contextlib.suppress(TypeError):
                    client.answer(call)

    with _flood(work, count):
        yield


@contextlib.contextmanager
def pings(target: Target, count: int) -> Iterator[None]:
    """As many calls as go into the sockets."""

    def work() -> None:
        with target.register() as client:
            message = client.connection.call("slot", "lastTransaction", ())
            for _ in range(20):
                client.send(message * 2000)
                left = 2000 * 20  # each answer is at least so long
                while left > 0 and (data := client.socket.recv(1 << 20)):
                    left -= len(data)

    with _flood(work, count):
        yield


#: Attacks of those who are nobody, and of those who have registered.
NEWCOMERS: dict[str, Attack] = {
    "half open": half_open,
    "half a handshake": half_a_handshake,
    "unregistered": unregistered,
    "garbage": garbage,
}
MEMBERS: dict[str, Attack] = {
    "byte by byte": slow,
    "long messages": long_messages,
    "bombs": bombs,
    "deaf loads": _deaf("loadBefore", LARGE[0], MAX_TID),
    "deaf bulk loads": _deaf("loadBeforeMany", LARGE, MAX_TID),
    "deaf iterators": _deaf("iterator"),
    "deaf undo logs": _deaf("undoInfo", 0, -(2**31), None),
    "deaf histories": _deaf("history", LARGE[0], 2**31),
    "endless uploads": endless_uploads,
    "never voted": never_voted,
    "never finished": never_finished,
    "wrong calls": wrong_calls,
    "pings": pings,
}
WITH_TLS: dict[str, Attack] = {
    "handshakes": handshakes,
    "resumed handshakes": resumed_handshakes,
    "guessed tokens": guesses,
}
