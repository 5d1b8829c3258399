"""Connections that were accepted: between the event loop and a session, plain or with TLS.

    with TLS     event                                           becomes
    accepted     the handshake, which a thread does, is done     in use: it has a session now
    accepted     what comes is no TLS, or none that will do      closed, after one line in the log
    accepted     nothing comes for `TLS_SILENCE_S`               closed, likewise
    accepted     `handshake_timeout_s` pass                      closed, likewise
    in use       it becomes a blob connection                    handed over, with its `End`
    in use       its certificate is revoked                      closed

Owns back pressure, and who is told to be at the other end. What a connection means is the session's business,
what TLS says `End`'s.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from zeoid import limits, system
from zeoid.errors import EncryptionError
from zeoid.security.identity import Peer
from zeoid.security.pipes import Pipe, TlsPipe
from zeoid.server import listening
from zeoid.server.session import Session
from zeoid.server.streams import Grant

if TYPE_CHECKING:
    from zeoid.security.tls import ServerContexts
    from zeoid.server.server import StorageServer

log = logging.getLogger("zeoid.server")

#: A fatal alert, "handshake failure": it tells whoever speaks no TLS, and knows one, what is spoken here.
_WANTS_TLS = b"\x15\x03\x03\x00\x02\x02\x28"


class Transport(asyncio.Protocol):
    """A connection's bytes: between the event loop and a session. Owns back pressure."""

    def __init__(self, server: "StorageServer") -> None:
        self._server = server
        self.session: Session | None = None
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._slow_reader = False
        #: The session has more to do than it is willing to keep.
        self._full_session = False
        self._writable = False
        #: More is waiting to be sent than blobs should add to.
        self._busy_sending = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._transport = transport
        self._writable = True
        transport.set_write_buffer_limits(high=limits.BLOB_OUTPUT_BYTES, low=limits.BLOB_OUTPUT_BYTES // 4)
        sock = transport.get_extra_info("socket")
        if sock is not None and self._server.refuses(sock.fileno()):
            self.abort()
            return
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.connections.add(self)
        where = listening.where(transport)
        self._begin(where)
        longest = self._server.admission.places.come(self, where)
        if isinstance(longest, Transport):
            longest.shed("too many others came before it has registered")
        self._deadline = asyncio.get_running_loop().call_later(
            self._server.handshake_timeout_s, self._too_slow
        )

    def _begin(self, where: str) -> None:
        self._use(Peer(where))

    def _use(self, peer: Peer) -> None:
        self.session = Session(self._server, self, peer, offer=self._server.offer)

    def _too_slow(self) -> None:
        if self.session is not None and not self.session.registered:
            self.session.drop(f"did not register within {self._server.handshake_timeout_s:g} s")

    def data_received(self, data: bytes) -> None:
        assert self.session is not None
        self.session.receive(data)
        if len(data) >= limits.HELD_PIECE_BYTES:
            self._server.watch.comes(len(data))

    def connection_lost(self, problem: Exception | None) -> None:
        self._writable = False
        if self._deadline is not None:
            self._deadline.cancel()
        self._server.connections.discard(self)
        self._server.admission.places.leave(self)
        if self.session is not None:
            self.session.lost(str(problem) if problem else "")
            self.session = None

    def pause_writing(self) -> None:
        self._busy_sending = True
        if self.session is not None:
            self.session.hold_blobs()
        self._look_at_output()

    def _look_at_output(self) -> None:
        """A peer that does not read its replies gets no more of its requests read."""
        transport = self._transport
        if transport is None:
            return
        waiting_bytes = transport.get_write_buffer_size()
        if waiting_bytes > limits.OUTPUT_HIGH_WATER_BYTES and not self._slow_reader:
            self._slow_reader = True
            if not transport.is_closing():
                transport.pause_reading()
            if self.session is not None:
                self.session.pause()
        if waiting_bytes > limits.OUTPUT_LIMIT_BYTES:
            self._give_up()

    def resume_writing(self) -> None:
        self._busy_sending = False
        if self._slow_reader:
            self._slow_reader = False
            if self.session is not None:
                self.session.resume()
            self._resume_reading()
        if self.session is not None and not self._busy_sending:
            self.session.send_blobs()

    def stop_reading(self) -> None:
        self._full_session = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def read_on(self) -> None:
        self._full_session = False
        self._resume_reading()

    def soon(self, callback: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(callback)

    def _resume_reading(self) -> None:
        if self._transport is None or self._transport.is_closing() or self._is_full():
            return
        if not self._slow_reader and not self._full_session:
            self._transport.resume_reading()

    def _is_full(self) -> bool:
        assert self._transport is not None
        return self._transport.get_write_buffer_size() > limits.OUTPUT_HIGH_WATER_BYTES

    # What a session needs of it

    def write(self, data: bytes) -> None:
        transport = self._transport
        if not self._writable or transport is None:
            return
        transport.write(data)
        if self._busy_sending:
            self._look_at_output()

    def _give_up(self) -> None:
        """The peer reads so little that what waits for it would fill the memory."""
        if self.session is not None and self._transport is not None:
            session, self.session = self.session, None
            asyncio.get_running_loop().call_soon(session.drop, "it does not read what it is sent")
            self.abort()

    # What is looked at now and then

    def held_bytes(self) -> int:
        transport, session = self._transport, self.session
        held = 0 if transport is None else transport.get_write_buffer_size()
        return held if session is None else held + session.held_bytes

    def silent_s(self) -> float | None:
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        return None if sock is None else system.silent_s(sock)

    def shed(self, reason: str) -> None:
        if self.session is not None:
            self.session.drop(reason)
        self.abort()

    def hand_over(self, grant: Grant) -> None:
        transport = self._transport
        assert transport is not None
        transport.pause_reading()
        # Both lead to the same connection, which stays open when the loop closes its own.
        sock = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self.abort()
        self._server.streams.serve(self._pipe(sock), grant, asyncio.get_running_loop().call_soon_threadsafe)

    def _pipe(self, sock: socket.socket) -> Pipe:
        return Pipe(sock)

    def close(self) -> None:
        self._writable = False
        if self._transport is not None:
            self._transport.close()
            # A peer that reads nothing must not keep what it was sent for ever.
            asyncio.get_running_loop().call_later(limits.STOP_TIMEOUT_S, self._transport.abort)

    def abort(self) -> None:
        self._writable = False
        if self._transport is not None:
            self._transport.abort()


class TlsTransport(Transport):
    """The same with TLS: there is no session before its handshake is done."""

    def __init__(self, server: "StorageServer", contexts: "ServerContexts") -> None:
        super().__init__(server)
        self._end = contexts.end()
        self._contexts = contexts
        self._where = ""
        self._silence: asyncio.TimerHandle | None = None
        self._certificate: bytes | None = None
        #: Whether the end is somebody else's, or nobody's.
        self._is_given = False
        self._refused = False
        #: What has come of the handshake, and whether the thread that does it has some of that: nobody else
        #: may use the end meanwhile.
        self._arrived: list[bytes] = []
        self._shaking = False

    def _begin(self, where: str) -> None:
        self._where = where
        silence_s = min(limits.TLS_SILENCE_S, self._server.handshake_timeout_s / 2)
        self._silence = asyncio.get_running_loop().call_later(silence_s, self._too_silent)

    def _too_slow(self) -> None:
        if self.session is not None:
            super()._too_slow()
        elif not self._refused:
            self._refuse(f"no TLS handshake within {self._server.handshake_timeout_s:g} s")

    def _too_silent(self) -> None:
        silent = not self._shaking and not self._end.begun
        if silent and not self._refused and self._writable and self._transport is not None:
            self._transport.write(_WANTS_TLS)
            self._refuse("it says nothing, as a client without TLS does")

    def data_received(self, data: bytes) -> None:
        if self.session is not None:
            try:
                plain = self._end.receive(data)
            except EncryptionError as problem:
                self.session.drop(str(problem))
                return
            if self._end.has_output:
                self._flush()
            if plain:
                self.session.receive(plain)
                if len(plain) >= limits.HELD_PIECE_BYTES:
                    self._server.watch.comes(len(plain))
            elif self._end.finished:
                self.close()
        elif not self._refused:
            self._arrived.append(data)
            if not self._shaking:
                self._shake_hands()

    def _shake_hands(self) -> None:
        """Have a thread see to what has come: it takes as long as twenty loads, and a flood may come."""
        data = b"".join(self._arrived)
        self._arrived.clear()
        self._shaking = True
        if self._transport is not None:
            self._transport.pause_reading()
        self._server.shake_hands(lambda: self._end.receive(data) if self._writable else b"", self._shaken)

    def _shaken(self, plain: bytes, problem: BaseException | None) -> None:
        self._shaking = False
        transport, end = self._transport, self._end
        if transport is None or not self._writable:
            if self not in self._server.connections:
                self._release()
            return
        if problem is not None:
            self._refuse(str(problem) if isinstance(problem, EncryptionError) else repr(problem))
            return
        if end.ready:
            self._welcome(plain)
        else:
            self._flush()
        if self._writable:
            self._resume_reading()
        if self._arrived:
            data = b"".join(self._arrived)
            self._arrived.clear()
            self.data_received(data)

    def _welcome(self, plain: bytes) -> None:
        """The handshake is done."""
        certificate = self._end.certificate
        refusal = self._contexts.refusal(certificate)
        if refusal:
            self._refuse(refusal)
            return
        self._certificate = certificate
        # What the session writes now goes with the end of the handshake.
        self._use(Peer(self._where, trusted=False, encrypted=True, certificate=certificate))
        if plain and self.session is not None:
            self.session.receive(plain)

    def shed(self, reason: str) -> None:
        if self.session is None and not self._refused:
            self._refused = True
            if self._may_tell():
                log.warning("%s refused: %s", self._where, reason)
        super().shed(reason)

    def _may_tell(self) -> bool:
        return self._server.admission.told.may(self._where)

    def _refuse(self, reason: str) -> None:
        self._refused = True
        if self._may_tell():
            log.warning("%s refused: %s", self._where, reason)
        self._flush()  # which tells the other end why
        self.close()

    def _flush(self) -> None:
        """Send what TLS has to say by itself."""
        if self._shaking:
            return
        transport, output = self._transport, self._end.output()
        if output and self._writable and transport is not None:
            transport.write(output)
            if self._busy_sending:
                self._look_at_output()

    def write(self, data: bytes) -> None:
        transport = self._transport
        if not self._writable or transport is None:
            return
        end = self._end
        end.send(data)
        transport.write(end.output())
        if self._busy_sending:
            self._look_at_output()

    def connection_lost(self, problem: Exception | None) -> None:
        if self._silence is not None:
            self._silence.cancel()
        if self.session is None and not self._refused and self._end.begun and self._may_tell():
            log.info("%s broke off within the TLS handshake", self._where)
        super().connection_lost(problem)
        if not self._shaking:
            self._release()

    def drop_if_revoked(self) -> None:
        """End it if its certificate is not good any more."""
        if (
            self.session is not None
            and self._certificate is not None
            and self._contexts.is_revoked(self._certificate)
        ):
            self.session.drop("its certificate was revoked")

    def _pipe(self, sock: socket.socket) -> Pipe:
        self._is_given = True
        return TlsPipe(sock, self._end)

    def _release(self) -> None:
        """The connection is gone, and with it what TLS needs of memory, unless it is a blob connection's."""
        if not self._is_given:
            self._is_given = True
            self._end.release()

    def close(self) -> None:
        if self._writable and not self._shaking and self._end.ready:
            self._end.close()
            self._flush()
        super().close()
