"""A stream with TLS. Owns how the two threads that may use it share OpenSSL's object.

One thread sends while another receives, and OpenSSL's object is one thread's at a time: a lock is held
while bytes are encrypted or decrypted, never while the network is waited for. Senders come one after another
(the channel's send lock sees to that), and only they take what is to be sent, so it leaves in the order in
which it was encrypted. What receiving makes our side say, such as an answer to new keys, leaves with the next
message.

Nothing is said at the end: messages have lengths, so that one that was cut is noticed without a word from
TLS, and a forked child that closes its copy must say nothing for its parent.
"""

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

from zeoid import limits
from zeoid.addresses import TcpAddress
from zeoid.client.stream import Stream, connect
from zeoid.errors import ClientError, ConfigurationError, Disconnected, EncryptionError, TimedOut
from zeoid.security.pipes import TlsPipe

if TYPE_CHECKING:
    from zeoid.security.end import End
    from zeoid.security.tls import ClientContexts

_monotonic = time.monotonic


class TlsStream(Stream):
    """See the module. `open` comes first. One thread may send while another receives."""

    def __init__(
        self, sock: socket.socket, peer: str, address: TcpAddress, certificates: "ClientContexts"
    ) -> None:
        """ClientError, and the socket is closed: the address has no name that a certificate could have."""
        try:
            self._end: End = certificates.end(address)
        except EncryptionError as problem:
            sock.close()
            raise ClientError(f"no TLS with {peer}: {problem}") from problem
        super().__init__(sock, peer)
        self._address = address
        self._certificates = certificates
        self._lock = threading.Lock()
        #: Whether the server has said something. Before that it may be about to refuse us.
        self._heard = False

    def open(self, deadline_s: float) -> None:
        """Shake hands. ClientError: one side refuses the other; TimedOut, Disconnected, OSError."""
        end = self._end
        try:
            super().send(end.output(), deadline_s)
            while not end.ready:
                data = super().receive(deadline_s)
                if data is None:
                    raise TimedOut(f"no TLS handshake with {self._peer} in time: does the server have TLS?")
                if not data:
                    raise Disconnected(f"{self._peer} closed the connection within the TLS handshake")
                end.shake_hands(data)
                if output := end.output():
                    super().send(output, deadline_s)
        except EncryptionError as problem:
            with contextlib.suppress(OSError, TimedOut):
                super().send(end.output(), deadline_s)  # which tells the server why
            raise self._refusal(problem) from problem

    def receive(self, deadline_s: float, *, idle: bool = False) -> bytes | None:
        if not self._heard:
            return self._hear(deadline_s, idle)
        end, lock = self._end, self._lock
        while True:
            data = super().receive(deadline_s, idle=idle)
            if not data:
                return data
            try:
                with lock:
                    plain = end.receive(data)
            except EncryptionError as problem:
                raise Disconnected(f"{self._peer}: {problem}") from problem
            if plain or end.finished:
                return plain

    def _hear(self, deadline_s: float, idle: bool) -> bytes | None:
        """Receive for the first time. A server that speaks TLS 1.3 refuses a certificate only now."""
        data: bytes | None = b""  # what came with the end of the handshake
        try:
            while True:
                with self._lock:
                    plain = self._end.receive(data or b"")
                if plain or self._end.finished:
                    break
                data = super().receive(deadline_s, idle=idle)
                if not data:
                    return data
        except EncryptionError as problem:
            raise self._refusal(problem) from problem
        self._heard = True
        self._certificates.remember(self._address, self._end)
        return plain

    def send(self, data: bytes, deadline_s: float) -> None:
        try:
            with self._lock:
                self._end.send(data)
                data = self._end.output()
        except EncryptionError as problem:
            raise Disconnected(f"{self._peer}: {problem}") from problem
        super().send(data, deadline_s)

    def _refusal(self, problem: EncryptionError) -> ClientError:
        text = str(problem)
        if self._end.met_other_name:
            text += f": {self._names_there()}"
        return ClientError(f"no TLS with {self._peer}: {text}")

    def _names_there(self) -> str:
        """What the server's certificate is for. The connection that met it is no longer there to tell."""
        from zeoid.security.tls import names_in

        names: list[str] = []
        with (
            contextlib.suppress(OSError, EncryptionError, ConfigurationError),
            connect(self._address, limits.TLS_NAMES_S) as sock,
        ):
            end = self._certificates.end_for_any_name(self._address)
            pipe = TlsPipe(sock, end)
            pipe.settimeout(limits.TLS_NAMES_S)
            pipe.shake_hands()
            names = names_in(end.certificate or b"")
        if not names:
            return "it is for no host"
        more = len(names) - limits.TLS_NAMES_TOLD
        told = ", ".join(names[: limits.TLS_NAMES_TOLD])
        return f"it is for {told}" + (f" and {more} more" if more > 0 else "")
