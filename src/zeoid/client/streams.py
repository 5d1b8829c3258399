"""Blob connections of a client storage: blobs travel there, beside the connection for everything else.

    a blob connection is   event                                        becomes
    –                      a blob is to travel, and none is idle        opened, with a token
    opened                 the server closes it, or says nothing for    closed: for `BLOB_CONNECTION_AGAIN_S`
                           `BLOB_CONNECTION_WAIT_S`                     blobs go as messages
    opened, idle           a request                                    busy
    busy                   the request is done, or answered by a fault  idle
    busy                   anything else ends the request               closed
    idle                   for `BLOB_CONNECTION_IDLE_S`                 closed
    idle                   the connection that it belongs to is lost    closed

A server may close an idle one at any time: a request that ends without an answer on one that was idle is made
again. Owns these sockets, and how long they are kept. Must not know transactions, nor where files are.
"""

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import BinaryIO

from zeoid import limits
from zeoid.addresses import Address, TcpAddress
from zeoid.cache.blobs import Part
from zeoid.client.channel import Channel
from zeoid.client.stream import connect
from zeoid.errors import ClientError, Disconnected, EncryptionError, PeerError, ServerError, TimedOut
from zeoid.security.pipes import Pipe, TlsPipe
from zeoid.wire import streams as wire
from zeoid.wire.codec import codec_for
from zeoid.wire.streams import Get, Put

log = logging.getLogger("zeoid.client")
_monotonic = time.monotonic


class _Unanswered(Disconnected):
    """The connection ended before the server answered."""


class _NoneToBeHad(Exception):
    """Too many are under way in the server, or something in between lets none through."""


class _Line:
    """One blob connection, to the server that *channel* leads to; used by one thread at a time."""

    def __init__(self, channel: Channel, timeout_s: float, moved: Callable[[], None]) -> None:
        self.channel = channel
        #: Whether it waits for a request, and since when.
        self.idle = False
        self.idle_since_s = 0.0
        self._timeout_s = timeout_s
        #: Nothing may take longer to move.
        self._patience_s = timeout_s
        self._moved = moved
        self._pipe: Pipe | None = None
        self._closing = threading.Lock()

    def open(self) -> None:
        """_NoneToBeHad, PeerError; Disconnected, TimedOut if the connection to the server is lost."""
        channel = self.channel
        token = channel.call("blob_token", (), self._timeout_s)
        if type(token) is not bytes or len(token) != wire.TOKEN_BYTES or channel.address is None:
            raise ServerError("the server gave no token for a blob connection")
        self._patience_s = min(limits.BLOB_CONNECTION_WAIT_S, self._timeout_s)
        try:
            self._pipe = pipe = self._connect(channel.address)
            pipe.settimeout(self._patience_s)
            codec_for(self._frame(wire.Incoming()))  # checks that it is a server; the coding is no matter
            self._send(wire.answer(token))
            wire.answer_to(self._frame(wire.Incoming()), wire.OK)
        except (OSError, Disconnected, EncryptionError) as problem:
            raise _NoneToBeHad(f"{channel.peer} takes up no blob connection: {problem}") from problem
        self._patience_s = self._timeout_s
        pipe.settimeout(self._patience_s)
        self.idle = True

    def _connect(self, address: Address) -> Pipe:
        certificates = self.channel.certificates
        sock = connect(address, self._patience_s)
        if certificates is None or not isinstance(address, TcpAddress):
            return Pipe(sock)
        try:
            pipe = TlsPipe(sock, certificates.end(address))
            self._pipe = pipe  # for who ends it
            pipe.shake_hands()
        except BaseException:
            sock.close()
            raise
        return pipe

    def get(self, oid: bytes, serial: bytes, part: Part) -> None:
        """Have the rest of a blob sent into *part*. Raises what the server answered."""
        offset = part.size_bytes
        size_bytes = self._ask(Get(oid, serial, offset), wire.SIZE)
        if size_bytes < offset:
            raise PeerError("a blob that became shorter")
        buffer = memoryview(bytearray(limits.BLOB_PIECE_BYTES))
        left = size_bytes - offset
        while left and part.problem is None:
            count = self._receive_into(buffer[: min(left, len(buffer))])
            part.write(buffer[:count])
            left -= count
        if not left:
            part.end()
            self.idle = True

    def put(self, put: Put, file: BinaryIO) -> None:
        """Send a blob. Raises what the server answered."""
        if not put.small:
            self._ask(put, wire.GO)
        else:
            self.idle = False
            self._send(wire.request(put))
        try:
            self._send_file(file.fileno(), put.size_bytes)
        except OSError as problem:
            raise self._lost(problem) from problem
        self._answer(wire.DONE)
        self.idle = True

    def _ask(self, wanted: Get | Put, expected: str) -> int:
        self.idle = False
        self._send(wire.request(wanted))
        return self._answer(expected)

    def _answer(self, expected: str) -> int:
        payload = self._frame(wire.Incoming())
        try:
            return wire.answer_to(payload, expected)
        except PeerError:
            raise
        except Exception:
            self.idle = True  # a fault: it waits for the next request
            raise

    # Bytes ------------------------------------------------------------------------------------------

    def _receive_into(self, buffer: memoryview) -> int:
        assert self._pipe is not None
        try:
            count = self._pipe.receive_into(buffer)
        except OSError as problem:
            raise self._lost(problem) from problem
        if not count:
            raise _Unanswered(f"{self.channel.peer} closed a blob connection")
        self._moved()
        return count

    def _frame(self, incoming: wire.Incoming) -> bytes:
        while True:
            data = bytearray(incoming.wants)
            count = self._receive_into(memoryview(data))
            payload = incoming.receive(bytes(data[:count]))
            if payload is not None:
                return payload

    def _send(self, data: bytes) -> None:
        assert self._pipe is not None
        try:
            self._pipe.send(data)
        except OSError as problem:
            raise self._lost(problem) from problem

    def _send_file(self, file: int, size_bytes: int) -> None:
        assert self._pipe is not None
        if self._pipe.send_file(file, 0, size_bytes, self._moved) != size_bytes:
            raise ClientError("the file of a blob became shorter while it was sent")

    def _lost(self, problem: OSError) -> Disconnected:
        if isinstance(problem, TimeoutError) and problem.errno is None:
            return TimedOut(
                f"{self.channel.peer}: nothing moved on a blob connection for {self._patience_s:g} s"
            )
        reason = problem.strerror or problem
        return _Unanswered(f"{self.channel.peer}: a blob connection was lost: {reason}")

    # The end ----------------------------------------------------------------------------------------

    def shut(self) -> None:
        """End it, waking the thread that uses it, which closes it."""
        with self._closing:
            if self._pipe is not None:
                self._pipe.shutdown()

    def close(self) -> None:
        self.idle = False
        with self._closing:
            if self._pipe is not None:
                self._pipe.close()

    def abandon(self) -> None:
        """In a forked child: the connection is the parent's, and so is the lock."""
        self.idle = False
        if self._pipe is not None:
            self._pipe.close()

    def __del__(self) -> None:
        if self._pipe is not None:  # an interruption may leave it to nobody
            self._pipe.close()


def _lead_to(channel: Channel) -> bool:
    """Whether the server has them."""
    return "blob_token" in channel.extensions and channel.address is not None


class Streams:
    """The blob connections of a storage."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._reset()

    def _reset(self) -> None:
        self._freed = threading.Condition()
        #: All of them. One that an interrupted thread has left goes by itself.
        self._lines: weakref.WeakSet[_Line] = weakref.WeakSet()
        #: Idle longest first.
        self._idle: list[_Line] = []
        self._moves = 0
        #: To a server that had none no new one is tried before that.
        self._none_for: Channel | None = None
        self._none_until_s = 0.0
        self._closer: threading.Thread | None = None
        self._closed = False

    def fetch(self, channel: Channel, oid: bytes, serial: bytes, part: Part) -> bool:
        """Have a blob in *part*, or the rest of it. False if there is no blob connection to be had.

        POSKeyError and what else the server answers; Disconnected, TimedOut when nothing moved.
        """
        if not _lead_to(channel):
            return False
        if not part.size_bytes:
            part.begin()  # a file of long ago may be in it
            answer = channel.call("blob_load", (oid, serial, limits.BLOB_INLINE_BYTES), self._timeout_s)
            if type(answer) not in (tuple, list) or len(answer) != 2:
                raise ServerError("the server answered with what is no blob")
            data = answer[1]
            if data is not None:
                if type(data) is not bytes or len(data) != answer[0]:
                    raise ServerError("the server answered with what is no blob")
                part.write(data)
                part.end()
                return True
        return self._request(channel, lambda line: line.get(oid, serial, part))

    def send(self, channel: Channel, transaction: bytes, path: str) -> bytes | None:
        """Send the file at *path* for a transaction, and by which name it is to be attached. None if there is
        no blob connection to be had.

        Raises what the server answers; Disconnected, TimedOut; ClientError if the file can't be read.
        """
        if not _lead_to(channel):
            return None
        name = b""

        def put(line: _Line) -> None:
            nonlocal name
            name = os.urandom(16)  # whatever the server has by another one
            line.put(Put(transaction, name, os.fstat(file.fileno()).st_size), file)

        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(open(path, "rb", buffering=0))
            except OSError as problem:
                raise ClientError(f"the blob {os.path.basename(path)} can't be read: {problem}") from problem
            return name if self._request(channel, put) else None

    def _request(self, channel: Channel, make: Callable[[_Line], None]) -> bool:
        """Whether there was a connection to make it on."""
        while True:
            taken = self._take(channel)
            if taken is None:
                return False
            line, is_new = taken
            try:
                if is_new:
                    line.open()
                make(line)
                return True
            except _Unanswered:
                if is_new:
                    # Its end may be that of the whole server: then whoever tries again is to know it.
                    channel.call("ping", (), self._timeout_s)
                    raise
            except _NoneToBeHad as problem:
                log.info("%s; its blobs go over the client's own connection", problem)
                self._none_until_s = _monotonic() + limits.BLOB_CONNECTION_AGAIN_S
                self._none_for = channel
                return False
            except PeerError as problem:
                raise Disconnected(f"{channel.peer}: {problem}") from problem
            finally:
                self._give_back(line)

    def _take(self, channel: Channel) -> tuple[_Line, bool] | None:
        """An idle one, or one that is still to be opened; waits while there are too many.

        None: the server took up none a moment ago.
        """
        with self._freed:
            moves, moved_s = self._moves, _monotonic()
            while True:
                if self._closed:
                    raise Disconnected("the storage is closed")
                for line in self._idle:
                    if line.channel is not channel:
                        line.close()
                        self._lines.discard(line)
                self._idle = [line for line in self._idle if line.channel is channel]
                if self._idle:
                    return self._idle.pop(), False
                if self._none_for is channel and _monotonic() < self._none_until_s:
                    return None
                if len(self._lines) < limits.BLOB_CONNECTIONS:
                    line = _Line(channel, self._timeout_s, self._note_move)
                    self._lines.add(line)
                    return line, True
                self._freed.wait(min(limits.RECEIVE_TICK_S, self._timeout_s))
                if self._moves != moves:
                    moves, moved_s = self._moves, _monotonic()
                elif _monotonic() - moved_s >= self._timeout_s:
                    raise TimedOut("other blobs take all blob connections, and get nowhere")

    def _note_move(self) -> None:
        self._moves += 1

    def _give_back(self, line: _Line) -> None:
        if not line.idle or not line.channel.alive:
            line.close()
        with self._freed:
            if line.idle and not self._closed:
                line.idle_since_s = _monotonic()
                self._idle.append(line)
                if self._closer is None:
                    self._closer = threading.Thread(target=self._close_idle, name="zeoid blobs", daemon=True)
                    self._closer.start()
            else:
                line.close()
                self._lines.discard(line)
            self._freed.notify_all()

    def _close_idle(self) -> None:
        """In a thread of its own, which lives while there are idle ones."""
        with self._freed:
            while self._idle:
                left_s = self._idle[0].idle_since_s + limits.BLOB_CONNECTION_IDLE_S - _monotonic()
                if left_s > 0:
                    self._freed.wait(left_s)
                else:
                    line = self._idle.pop(0)
                    line.close()
                    self._lines.discard(line)
            self._closer = None

    def close(self) -> None:
        """What is under way raises Disconnected."""
        with self._freed:
            self._closed = True
            for line in self._idle:
                line.close()
                self._lines.discard(line)
            self._idle.clear()
            for line in list(self._lines):
                line.shut()
            self._freed.notify_all()

    def after_fork(self) -> None:
        """In a forked child: they are the parent's."""
        closed = self._closed
        for line in list(self._lines):
            line.abandon()
        self._reset()
        self._closed = closed
