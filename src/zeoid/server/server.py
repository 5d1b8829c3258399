"""The storage server: storages under names, listeners, connections, threads for slow work, a clean stop.

Runs on one asyncio event loop (uvloop where it is installed). Owns every socket, timer and thread of the
server; what a connection means is the session's business, what a transaction does the hosted storage's.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, cast

from zeoid import limits, system
from zeoid.addresses import Address, TcpAddress, UnixAddress
from zeoid.errors import ConfigurationError
from zeoid.ports import Clock, Engine
from zeoid.security.identity import Peer
from zeoid.security.roles import Policy
from zeoid.server import listening
from zeoid.server.authority import Admission
from zeoid.server.clients import Done, RunInThread
from zeoid.server.hosted import Hosted
from zeoid.server.session import Session
from zeoid.server.streams import Grant, Streams

log = logging.getLogger("zeoid.server")


class SystemClock:
    """The computer's own time. Without methods in between: each commit asks several times."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)


class _Transport(asyncio.Protocol):
    """A connection's bytes: between the event loop and a session. Owns back pressure."""

    def __init__(self, server: "StorageServer") -> None:
        self._server = server
        self._session: Session | None = None
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
        peer = Peer(listening.where(transport))
        self._session = Session(self._server, self, peer, offer=self._server.offer)
        self._deadline = asyncio.get_running_loop().call_later(
            self._server.handshake_timeout_s, self._too_slow
        )

    def _too_slow(self) -> None:
        if self._session is not None and not self._session.registered:
            self._session.drop(f"did not register within {self._server.handshake_timeout_s:g} s")

    def data_received(self, data: bytes) -> None:
        assert self._session is not None
        self._session.receive(data)

    def connection_lost(self, problem: Exception | None) -> None:
        self._writable = False
        if self._deadline is not None:
            self._deadline.cancel()
        self._server.connections.discard(self)
        if self._session is not None:
            self._session.lost(str(problem) if problem else "")
            self._session = None

    def pause_writing(self) -> None:
        self._busy_sending = True
        if self._session is not None:
            self._session.hold_blobs()
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
            if self._session is not None:
                self._session.pause()
        if waiting_bytes > limits.OUTPUT_LIMIT_BYTES:
            self._give_up()

    def resume_writing(self) -> None:
        self._busy_sending = False
        if self._slow_reader:
            self._slow_reader = False
            if self._session is not None:
                self._session.resume()
            self._resume_reading()
        if self._session is not None and not self._busy_sending:
            self._session.send_blobs()

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
        if self._session is not None and self._transport is not None:
            session, self._session = self._session, None
            asyncio.get_running_loop().call_soon(session.drop, "it does not read what it is sent")
            self.abort()

    def hand_over(self, grant: Grant) -> None:
        transport = self._transport
        assert transport is not None
        transport.pause_reading()
        # Both lead to the same connection, which stays open when the loop closes its own.
        sock = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self.abort()
        self._server.streams.serve(sock, grant, asyncio.get_running_loop().call_soon_threadsafe)

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


class StorageServer:
    """Serves storages to clients.

    *storages* maps names (by convention "1", "2", …) to engines; the server closes them when it stops.
    Everything but the constructor must be called on the event loop's thread.
    """

    def __init__(
        self,
        storages: Mapping[str, Engine],
        *,
        read_only: bool = False,
        offer: str = "Z5",
        transaction_timeout_s: float = limits.TRANSACTION_TIMEOUT_S,
        handshake_timeout_s: float = limits.HANDSHAKE_TIMEOUT_S,
        invalidation_log_transactions: int = limits.INVALIDATION_LOG_TRANSACTIONS,
        resolve_conflicts: bool = False,
        clock: Clock | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.offer = offer
        self.admission = Admission(policy or Policy(), (clock or SystemClock()).monotonic)
        self.handshake_timeout_s = handshake_timeout_s
        self.connections: set[_Transport] = set()
        self.addresses: list[Address] = []
        self._listeners: list[asyncio.Server] = []
        self._sockets_made: list[tuple[str, int]] = []
        self._slow = ThreadPoolExecutor(limits.SLOW_REQUEST_THREADS, "zeoid-slow")
        self._threads: list[ThreadPoolExecutor] = [self._slow]
        self._with_blobs: ThreadPoolExecutor | None = None
        blob_connections = self._thread("zeoid-blob-connection", limits.BLOB_STREAMS)
        self.streams = Streams(blob_connections.submit, clock or SystemClock())
        self._stopping: asyncio.Event | None = None
        self._stop_asked = False
        self._failure = ""
        self._closed = False
        self._refusing = False
        self.storages: dict[str, Hosted] = {}
        for name, engine in storages.items():
            if resolve_conflicts:
                engine.resolve_conflicts()
            commit_thread = self._thread(f"zeoid-commit-{name}")
            run_with_blobs: RunInThread | None = None
            if engine.has_blobs:
                run_with_blobs = partial(self._in_thread, self._blob_threads())
            run_reading: RunInThread | None = None
            if not engine.inline:
                readers = self._thread(f"zeoid-read-{name}", limits.READ_THREADS)
                run_reading = partial(self._in_thread, readers)
            self.storages[name] = Hosted(
                name,
                engine,
                clock or SystemClock(),
                partial(self._in_thread, commit_thread),
                partial(self._in_thread, self._slow),
                lambda: len(self.connections) <= 1,
                self._fail,
                run_reading=run_reading,
                run_with_blobs=run_with_blobs,
                read_only=read_only,
                transaction_timeout_s=transaction_timeout_s,
                invalidation_log_transactions=invalidation_log_transactions,
            )

    def _thread(self, name: str, threads: int = 1) -> ThreadPoolExecutor:
        executor = ThreadPoolExecutor(threads, name)
        self._threads.append(executor)
        return executor

    def _blob_threads(self) -> ThreadPoolExecutor:
        """All storages' blobs are read and written in these."""
        if self._with_blobs is None:
            self._with_blobs = self._thread("zeoid-blobs", limits.BLOB_THREADS)
        return self._with_blobs

    # Listening ------------------------------------------------------------------------------------

    async def listen(self, address: Address) -> Address:
        """Begin to accept connections; the address with the port that was chosen if it was 0."""
        loop = asyncio.get_running_loop()
        try:
            if isinstance(address, UnixAddress):
                listening.clear_stale_socket(address.path)
                server = await loop.create_unix_server(self._connection, address.path)
                made = os.stat(address.path)
                self._sockets_made.append((address.path, made.st_ino))
                bound: Address = address
            else:
                hosts = await listening.hosts(address)
                server = await loop.create_server(self._connection, hosts, address.port, reuse_address=True)
                names = [sock.getsockname() for sock in server.sockets]
                for name in names[1:]:
                    log.info("listening on %s", TcpAddress(name[0], name[1]))
                bound = TcpAddress(names[0][0], names[0][1])
        except (OSError, UnicodeError) as problem:  # the latter for a name that can't be looked up
            raise ConfigurationError(f"can't listen on {address}: {listening.why(problem)}") from None
        self._listeners.append(server)
        self.addresses.append(bound)
        log.info("listening on %s", bound)
        return bound

    def _connection(self) -> _Transport:
        return _Transport(self)

    def refuses(self, fd: int) -> bool:
        """Whether a connection can't be served, because of what is open already."""
        refuses = system.is_scarce(fd)
        if refuses and not self._refusing:
            log.warning("no more connections are taken: too many files and sockets are open (`ulimit -n`)")
        self._refusing = refuses
        return refuses

    # Running --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop`. ConfigurationError or StorageFailure ends it with the reason."""
        self._stopping = asyncio.Event()
        if self._stop_asked:
            self._stopping.set()
        ticking = asyncio.get_running_loop().create_task(self._tick())
        try:
            await self._stopping.wait()
        finally:
            ticking.cancel()
            await self._close()
        if self._failure:
            raise StorageFailure(self._failure)

    def stop(self) -> None:
        """Let `run` return, also if it has not begun. May be called from a signal handler of the loop."""
        self._stop_asked = True
        if self._stopping is not None:
            self._stopping.set()

    def _fail(self, reason: str) -> None:
        log.critical("%s. The server stops: it must not guess what is on the disk", reason)
        self._failure = reason
        self.stop()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(limits.TICK_S)
            self.admission.follow_rules(self.storages)
            for hosted in self.storages.values():
                try:
                    hosted.tick()
                except Exception:
                    log.exception("storage %r: a fault in the server", hosted.name)

    def _cancel_packs(self) -> None:
        for hosted in self.storages.values():
            if hosted.packing and (refusal := hosted.packs.cancel("the server, which stops,")):
                log.warning("waiting for the pack of storage %r to end: %s", hosted.name, refusal)

    async def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._cancel_packs()
        for connection in list(self.connections):
            connection.close()
        deadline = time.monotonic() + limits.STOP_TIMEOUT_S
        while self.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        for path, inode in self._sockets_made:
            # Only our own: another server may have taken the place meanwhile.
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        # The loop goes on meanwhile: a pack may wait for a transaction that has yet to be abandoned, and the
        # thread of a blob connection for its session to end, or for the loop to turn.
        while self.connections or self.streams.busy or any(map(_is_busy, self.storages.values())):
            await asyncio.sleep(0.01)
        self._closed = True
        for thread in self._threads:
            thread.shutdown(wait=True)
        for hosted in self.storages.values():
            try:
                hosted.engine.close()
            except OSError as problem:
                self._failure = f"storage {hosted.name!r} could not be closed: {problem}"
                log.critical("%s. Nothing that was acknowledged is lost: it is in the journal", self._failure)
        log.info("stopped")

    # What sessions need ---------------------------------------------------------------------------

    def pack(self, hosted: Hosted, time: float, done: Callable[[BaseException | None], None]) -> None:
        thread = self._thread(f"zeoid-pack-{hosted.name}")
        progress = hosted.pack_begins(time)

        def landed(_: Any, problem: BaseException | None) -> None:
            hosted.pack_ended(problem)
            self._threads.remove(thread)
            thread.shutdown(wait=False)
            done(problem)

        self._in_thread(thread, lambda: hosted.packs.run(progress), landed)

    def _in_thread(self, thread: Executor, work: Callable[[], Any], done: Done) -> None:
        loop = asyncio.get_running_loop()

        def run() -> None:
            value: Any = None
            problem: BaseException | None = None
            try:
                value = work()
            except BaseException as caught:
                problem = caught
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(land, value, problem)

        def land(value: Any, problem: BaseException | None) -> None:
            if not self._closed:
                done(value, problem)

        thread.submit(run)


def _is_busy(hosted: Hosted) -> bool:
    return hosted.packing or hosted.busy


class StorageFailure(Exception):
    """A storage failed in a way that makes it unsafe to go on."""


def open_event_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """The event loop to use: uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


OnLoop = Callable[[asyncio.AbstractEventLoop], None]


def serve_forever(
    server: StorageServer,
    addresses: Sequence[Address],
    *,
    on_loop: OnLoop = lambda loop: None,
    on_ready: OnLoop = lambda loop: None,
) -> None:
    """Listen on *addresses* and serve until stopped.

    *on_loop* is called on the loop before anything else happens there, *on_ready* once all are listening.
    """

    async def main() -> None:
        on_loop(asyncio.get_running_loop())
        try:
            for address in addresses:
                await server.listen(address)
            on_ready(asyncio.get_running_loop())
        except BaseException:
            server._failure = ""
            await server._close()
            raise
        await server.run()

    with asyncio.Runner(loop_factory=open_event_loop()) as runner:
        runner.run(main())
