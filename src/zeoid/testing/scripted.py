"""A storage server that follows a script: which bytes are sent, in which segments, in which order.

Owns sockets on this machine, and no thread: a connection is accepted, a call is read, bytes are sent only
when the script says so. A client that is not read from is a client whose server does not read. Every wait has
a deadline; when something else happens than the script expects, it is an AssertionError that tells what.
Must not know clients or storages: it is the other end of whatever speaks the protocol.
"""

import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Final

from zeoid.errors import PeerError
from zeoid.model import frozen, tid_before
from zeoid.wire.codec import ONE_WAY, MessageId
from zeoid.wire.connection import ServerConnection

#: How long a script waits for a connection, a call or the end of a connection, unless it says otherwise.
TIMEOUT_S: Final = 10.0
#: What `welcome` says of the storage.
INFO: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "length": 0,
        "size": 0,
        "name": "scripted",
        "supportsUndo": False,
        "supports_record_iternext": False,
        "interfaces": (),
    }
)
_READ_BYTES: Final = 64 * 1024
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


@frozen
class Call:
    """A call by the client."""

    message_id: MessageId
    one_way: bool
    name: str
    args: tuple[Any, ...]


class ScriptedConnection:
    """One connection of a client, from the server's end.

    Made by `ScriptedServer.accept`, or with one end of a `socket.socketpair`, which it owns from then on.

    `reply`, `fault`, `call` and `invalidation` make the bytes of a message; `send` sends any number of them,
    and any other bytes, in one segment.
    """

    def __init__(self, sock: socket.socket, *, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        #: M5 or Z5, once the client has answered the offer.
        self.protocol = ""
        self._sock = sock
        self._connection = ServerConnection("Z5")
        self._calls: deque[Call] = deque()
        self._ended = ""

    def __enter__(self) -> "ScriptedConnection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The usual beginnings -------------------------------------------------------------------------

    def offer(self, coding: str = "Z5") -> str:
        """Offer a coding, as a server does first of all, and wait for the answer: M5 or Z5."""
        self._connection = ServerConnection(coding)
        self.send(self._connection.offer)
        deadline_s = time.monotonic() + self.timeout_s
        while not self._connection.protocol:
            if not self._read(deadline_s):
                raise AssertionError(f"the client did not answer the offer: {self._silence()}")
        self._connection.registered()  # what the client may send is not this end's to limit
        self.protocol = self._connection.protocol
        return self.protocol

    def welcome(
        self,
        tid: bytes,
        *,
        coding: str = "Z5",
        info: Mapping[str, Any] = INFO,
        missed: tuple[bytes, Sequence[bytes]] | None = None,
        extensions: Sequence[str] = (),
    ) -> Call:
        """Go through all that a client asks before it uses a connection; its call of `register`.

        tid: the last transaction.
        missed: the answer to `getInvalidations`, if the client has been here before: the last tid and the
            oids that it missed; None for "too much to tell".
        extensions: the methods that this server knows beyond ZEO's.
        """
        self.offer(coding)
        register = self.expect("register")
        self.answer(register, tid)
        call = self.expect_after_same_history("getInvalidations", "get_info")
        if call.name == "getInvalidations":
            self.answer(call, missed)
            call = self.expect("get_info")
        self.answer(call, {**info, "extensions": list(extensions)} if extensions else dict(info))
        return register

    def expect_after_same_history(self, *names: str) -> Call:
        """The next call, which has one of *names*. If the client asks before it whether the last revision
        that it has seen is there, it is."""
        call = self.expect("loadBefore", *names)
        if call.name == "loadBefore":
            self.answer(call, (b"", tid_before(call.args[1]), None))
            call = self.expect(*names)
        return call

    # What the client does -------------------------------------------------------------------------

    def expect(self, *names: str, timeout_s: float | None = None) -> Call:
        """The next call, waited for if need be. It must have one of *names*, if any are given."""
        wanted = " or ".join(names) or "a call"
        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while not self._calls:
            if not self._read(deadline_s):
                raise AssertionError(f"instead of {wanted}: {self._silence()}")
        call = self._calls.popleft()
        if names and call.name not in names:
            raise AssertionError(f"instead of {wanted}: {call}")
        return call

    def expect_end(self, timeout_s: float | None = None) -> list[Call]:
        """Wait until the client has closed the connection; the calls that came before that."""
        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while not self._ended:
            if not self._read(deadline_s) and not self._ended:
                raise AssertionError(f"instead of the end of the connection: {self._silence()}")
        calls = list(self._calls)
        self._calls.clear()
        return calls

    def _read(self, deadline_s: float) -> bool:
        """Wait for bytes; False at the end of the connection and after the deadline."""
        if self._ended:
            return False
        self._sock.settimeout(max(0.001, deadline_s - time.monotonic()))
        try:
            data = self._sock.recv(_READ_BYTES)
        except TimeoutError:
            return False
        except OSError as problem:
            self._ended = str(problem)
            return False
        if not data:
            self._ended = "the client closed the connection"
            return False
        try:
            messages = self._connection.receive(data)
        except PeerError as problem:
            raise AssertionError(f"the client broke the protocol: {problem}") from problem
        self._calls += [Call(number, flag == ONE_WAY, name, args) for number, flag, name, args in messages]
        return True

    def _silence(self) -> str:
        return self._ended or "nothing came in time"

    # What the server does -------------------------------------------------------------------------

    def reply(self, call: Call, value: Any) -> bytes:
        """The bytes of the reply to *call*."""
        return self._connection.reply(call.message_id, value)

    def fault(self, call: Call, problem: BaseException) -> bytes:
        """The bytes of a reply that says that *call* failed."""
        return self._connection.fault(call.message_id, problem)

    def call(self, name: str, *args: Any) -> bytes:
        """The bytes of a one-way call to the client."""
        return self._connection.call(name, *args)

    def invalidation(self, tid: bytes, oids: Sequence[bytes]) -> bytes:
        """The bytes that tell the client that another one committed *tid*, which wrote *oids*."""
        return self.call("invalidateTransaction", tid, list(oids))

    def send(self, *parts: bytes) -> None:
        """Send all *parts*, which may be any bytes, in one write."""
        self._sock.settimeout(self.timeout_s)
        try:
            self._sock.sendall(b"".join(parts))
        except TimeoutError:
            raise AssertionError("the client does not read what it is sent") from None

    def answer(self, call: Call, value: Any) -> None:
        """Send the reply to *call*."""
        self.send(self.reply(call, value))

    def end_stream(self) -> None:
        """Tell the client that nothing more will be sent, but go on reading."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection in good order: what was sent arrives."""
        self.end_stream()
        self._sock.close()

    def reset(self) -> None:
        """Break the connection off, as a crash of the server's machine does. What was sent may be lost."""
        if self._sock.family != getattr(socket, "AF_UNIX", None):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._sock.close()


class ScriptedServer:
    """Listens on a port of the loopback interface, or on a unix socket, and leaves all else to the script.

    path: where to make a unix socket; a free port is taken if it is left out.
    timeout_s: how long the script waits for anything.

    A context manager; at its end everything is closed.
    """

    def __init__(self, *, path: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._listener: socket.socket | None = None
        self._connections: list[ScriptedConnection] = []
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            #: What a client is given: (host, port), or the path of a unix socket.
            self.address: Any = self._listener.getsockname()[:2]
        else:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(path)
            self._listener.listen()
            self.address = path

    def __enter__(self) -> "ScriptedServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def accept(self, timeout_s: float | None = None) -> ScriptedConnection:
        """The next connection, waited for if need be. It is closed with the server."""
        if self._listener is None:
            raise AssertionError("the server does not listen")
        self._listener.settimeout(self.timeout_s if timeout_s is None else timeout_s)
        try:
            sock, _ = self._listener.accept()
        except TimeoutError:
            raise AssertionError("nobody connected in time") from None
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = ScriptedConnection(sock, timeout_s=self.timeout_s)
        self._connections.append(connection)
        return connection

    def stop_listening(self) -> None:
        """From now on connections are refused. Those that are open stay open."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def listen_again(self) -> None:
        """Listen at the same port again, after `stop_listening`."""
        if self._listener is None:
            if isinstance(self.address, str):
                raise AssertionError("a unix socket can't be listened on again")
            self._listener = socket.create_server(self.address)

    def close(self) -> None:
        """Close everything."""
        self.stop_listening()
        for connection in self._connections:
            connection.close()
