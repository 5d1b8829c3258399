"""Blob connections: sockets that the event loop has handed over, each served by a thread.

    a token is     event                                      becomes
    given          a connection is opened with it             used: it opens no other one
    given          `BLOB_TOKEN_S` pass, or its session ends    –

    a connection   event                                      becomes
    queued         a thread is free                           new, once it has said `ok`
    new, idle      a request                                  busy
    busy           the request is done                        idle, or closed if others are queued
    idle           others are queued, and it is so longest    closed
    any            its session ends                           closed; what it was doing is given up
    new            no request within `HANDSHAKE_TIMEOUT_S`    closed
    idle, busy     nothing moves for `BLOB_STREAM_IDLE_S`     closed

So a blob takes nothing of the event loop's time, and the kernel carries it from a file to the socket. Owns
the tokens, those sockets and what is done on them. What was taken is `staged`'s business, what may be seen
`visible`'s.
"""

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from ZODB.POSException import POSError, ReadOnlyError, StorageError

from zeoid import limits
from zeoid.errors import InvalidCall, PeerError
from zeoid.ports import Clock
from zeoid.security.pipes import Pipe
from zeoid.server.hosted import Hosted
from zeoid.server.staged import Arrival, Staged, refuse_large
from zeoid.wire import streams as wire
from zeoid.wire.streams import Get, Put

log = logging.getLogger("zeoid.server")

#: Calls a function on the event loop, from another thread.
OnLoop = Callable[[Callable[[], None]], object]
#: What a client is told of; anything else is a fault in the server.
_TOLD = (POSError, InvalidCall, OSError)


class Grant:
    """What the blob connections of a session may do, and what they have brought."""

    def __init__(self, hosted: Hosted, read_only: bool, label: str, *, encrypted: bool = False) -> None:
        self.hosted = hosted
        self.read_only = read_only
        self.label = label
        #: Whether they must be encrypted.
        self.encrypted = encrypted
        self.staged = Staged()

    def over(self, id: Any) -> None:
        """A transaction of the session is over. To be called on the loop."""
        if type(id) is bytes and self.hosted.engine.has_blobs:
            self.hosted.discard(self.staged.forget(id))


class Streams:
    """All of a server. On the loop: `token`, `redeem`, `serve`, `end`."""

    def __init__(
        self,
        submit: Callable[[Callable[[], None]], object],
        clock: Clock,
        *,
        most: int = limits.BLOB_STREAMS,
        idle_s: float = limits.BLOB_STREAM_IDLE_S,
    ) -> None:
        """*submit* has a function called in one of *most* threads, or later when one is free."""
        self._submit = submit
        self._monotonic = clock.monotonic
        self._most = most
        self.idle_s = idle_s
        #: With the time at which each is too old, oldest first.
        self._tokens: dict[bytes, tuple[Grant, float]] = {}
        #: Guards what follows.
        self._lock = threading.Lock()
        self._of: dict[Grant, set[Stream]] = {}
        #: How many there are, queued ones too; and those without a request, longest first.
        self._count = 0
        self._idle: dict[Stream, None] = {}

    def token(self, grant: Grant) -> bytes:
        """What opens one blob connection. InvalidCall if the client has too many."""
        now_s = self._monotonic()
        for token, (_, until_s) in list(self._tokens.items()):
            if until_s > now_s:
                break
            del self._tokens[token]
        if sum(owner is grant for owner, _ in self._tokens.values()) >= limits.BLOB_TOKENS_PER_CONNECTION:
            raise InvalidCall(f"{limits.BLOB_TOKENS_PER_CONNECTION} blob connections are about to be opened")
        token = secrets.token_bytes(wire.TOKEN_BYTES)
        self._tokens[token] = grant, now_s + limits.BLOB_TOKEN_S
        return token

    def redeem(self, token: bytes) -> Grant | None:
        """Whose token this is, if it is good; it no longer is."""
        grant, until_s = self._tokens.pop(token, (None, 0.0))
        return grant if until_s > self._monotonic() else None

    def serve(self, pipe: Pipe, grant: Grant, on_loop: OnLoop) -> None:
        """Serve a blob connection, whose socket is ours from now on."""
        stream = Stream(self, pipe, grant, on_loop)
        longest = None
        with self._lock:
            of_grant = self._of.setdefault(grant, set())
            refused = len(of_grant) >= self._most or self._count >= limits.BLOB_STREAMS_IN_ALL
            if not refused:
                of_grant.add(stream)
                self._count += 1
                if self._count > self._most and self._idle:
                    longest = next(iter(self._idle))
                    del self._idle[longest]
            elif not of_grant:
                del self._of[grant]
        if refused:
            log.warning("%s has too many blob connections, or all together have", grant.label)
            stream.close()
            return
        if longest is not None:
            longest.shut()
        self._submit(stream.run)

    @property
    def busy(self) -> bool:
        """Whether there are any that have not ended."""
        return self._count > 0

    def end(self, grant: Grant) -> None:
        """The session is over, and with it its blob connections and what nobody attached."""
        self._tokens = {token: given for token, given in self._tokens.items() if given[0] is not grant}
        with self._lock:
            streams = list(self._of.get(grant, ()))
        for stream in streams:  # first, so that none says that a transaction is over: it is to be tried again
            stream.shut()
        grant.hosted.discard(grant.staged.close())

    # What streams say ---------------------------------------------------------------------------------

    def rests(self, stream: "Stream") -> bool:
        """It waits for another request. False: it is to end, for one that is queued."""
        with self._lock:
            if self._count > self._most:
                return False
            self._idle[stream] = None
            return True

    def works(self, stream: "Stream") -> None:
        """A request has come."""
        with self._lock:
            self._idle.pop(stream, None)

    def ended(self, stream: "Stream") -> None:
        with self._lock:
            self._idle.pop(stream, None)
            self._count -= 1
            of_grant = self._of[stream.grant]
            of_grant.discard(stream)
            if not of_grant:
                del self._of[stream.grant]

    def monotonic(self) -> float:
        return self._monotonic()


class Stream:
    """One blob connection: `run` is its thread. `shut` may be called by any other one."""

    def __init__(self, streams: Streams, pipe: Pipe, grant: Grant, on_loop: OnLoop) -> None:
        self.grant = grant
        self._streams = streams
        self._pipe = pipe
        self._on_loop = on_loop
        self._incoming = wire.Incoming()
        self._is_new = True
        #: The socket's number may be another file's once it is closed.
        self._closing = threading.Lock()
        self._closed = False

    def run(self) -> None:
        """Serve it until it ends. Raises nothing."""
        try:
            self._pipe.settimeout(self._streams.idle_s)
            self._pipe.send(wire.reply(wire.OK))
            while (payload := self._next_frame()) is not None:
                wanted = wire.request_of(payload)
                if isinstance(wanted, Get):
                    self._get(wanted)
                else:
                    self._put(wanted)
        except PeerError as problem:
            log.warning("%s: its blob connection is closed: %s", self.grant.label, problem)
        except OSError as problem:
            log.info("%s: its blob connection is closed: %s", self.grant.label, problem.strerror or problem)
        except Exception:
            log.exception("%s: a fault in the server; its blob connection is closed", self.grant.label)
        finally:
            self.close()
            self._streams.ended(self)

    def shut(self) -> None:
        """End the stream, which wakes its thread."""
        with self._closing:
            if not self._closed:
                self._pipe.shutdown()

    def close(self) -> None:
        with self._closing:
            self._closed = True
            self._pipe.close()

    def _next_frame(self) -> bytes | None:
        """The next request; None when it is time to end."""
        monotonic, incoming = self._streams.monotonic, self._incoming
        wait_s = self._streams.idle_s
        if self._is_new:
            self._is_new = False
            wait_s = min(wait_s, limits.HANDSHAKE_TIMEOUT_S)
        elif not self._streams.rests(self):
            return None
        deadline_s = monotonic() + wait_s
        payload = None
        while payload is None:
            # Whoever sends byte by byte gains no time by it.
            self._pipe.settimeout(max(0.001, deadline_s - monotonic()))
            data = bytearray(incoming.wants)
            try:
                count = self._pipe.receive_into(memoryview(data))
            except TimeoutError:
                count = 0
            self._streams.works(self)
            if not count:
                if incoming.between:
                    return None
                raise PeerError("a request that breaks off")
            payload = incoming.receive(bytes(data[:count]))
        self._pipe.settimeout(self._streams.idle_s)
        return payload

    def _fault(self, problem: Exception) -> None:
        if not isinstance(problem, POSError | InvalidCall):
            log.error("%s: a blob could not be read", self.grant.label, exc_info=problem)
            problem = StorageError(f"the blob can't be read: {problem}")
        self._pipe.send(wire.fault(problem))

    # Downloads ------------------------------------------------------------------------------------

    def _get(self, get: Get) -> None:
        try:
            file = self._open(get)
        except _TOLD as problem:
            self._fault(problem)
            return
        with file:
            size_bytes = os.fstat(file.fileno()).st_size
            if get.offset > size_bytes:
                self._fault(InvalidCall(f"the blob has {size_bytes:,} bytes only"))
                return
            self._pipe.send(wire.size(size_bytes))
            left = size_bytes - get.offset
            if self._pipe.send_file(file.fileno(), get.offset, left) != left:
                raise OSError("the file of a blob became shorter")

    def _open(self, get: Get) -> BinaryIO:
        visible = self.grant.hosted.visible
        if get.serial > visible.tid:
            # The client may have been told of it by what the loop is doing, before that makes it visible.
            turned = threading.Event()
            with contextlib.suppress(RuntimeError):  # there is no loop any more
                self._on_loop(turned.set)
                turned.wait(self._streams.idle_s)
        return visible.open_blob(get.oid, get.serial)

    # Uploads --------------------------------------------------------------------------------------

    def _put(self, put: Put) -> None:
        problem: Exception | None = None
        arrival: Arrival | None = None
        grant = self.grant
        try:
            try:
                if grant.read_only or grant.hosted.read_only:
                    raise ReadOnlyError()
                refuse_large(put.size_bytes, grant.hosted.blob_bytes)
                arrival = Arrival(
                    grant.staged, grant.hosted.engine, put.transaction, put.name, put.size_bytes
                )
            except _TOLD as refusal:
                problem = refusal
            if not put.small:
                if problem is not None:
                    self._fault(problem)
                    return
                self._pipe.send(wire.reply(wire.GO))
            problem = self._take(put.size_bytes, arrival, problem)
            if problem is None:
                self._pipe.send(wire.reply(wire.DONE))
            else:
                self._fault(problem)
        finally:
            if arrival is not None:
                arrival.end()

    def _take(self, size_bytes: int, arrival: Arrival | None, problem: Exception | None) -> Exception | None:
        """Read a blob, and keep it unless there is a *problem*. What is to be told instead of `done`."""
        buffer = memoryview(bytearray(min(size_bytes, limits.BLOB_PIECE_BYTES)))
        left = size_bytes
        discard_bytes = limits.BLOB_DISCARD_BYTES
        while left:
            piece = buffer[: min(left, len(buffer))]
            self._fill(piece)
            left -= len(piece)
            if problem is None and arrival is not None:
                try:
                    arrival.write(piece)
                except _TOLD as failure:
                    problem = failure
            elif (discard_bytes := discard_bytes - len(piece)) < 0:
                raise OSError(f"too much comes of a blob that can't be stored: {problem}")
        if problem is None and arrival is not None:
            try:
                arrival.complete()
            except _TOLD as failure:
                problem = failure
        return problem

    def _fill(self, piece: memoryview) -> None:
        while piece:
            count = self._pipe.receive_into(piece)
            if not count:
                raise PeerError("a blob that breaks off")
            piece = piece[count:]
