"""The storage server: storages under names, listeners, connections, threads for slow work, a clean stop.

Runs on one asyncio event loop (uvloop where it is installed). Owns every socket, timer and thread of the
server; what a connection means is the session's business, what a transaction does the hosted storage's.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any

from zeoid import limits, system
from zeoid.addresses import Address, TcpAddress, UnixAddress
from zeoid.errors import ConfigurationError
from zeoid.ports import Clock, Engine
from zeoid.security.identity import LOCAL
from zeoid.security.roles import Policy
from zeoid.security.tls import ServerContexts, ServerTls
from zeoid.server import listening
from zeoid.server.admission import Admission, Places
from zeoid.server.clients import Done, RunInThread
from zeoid.server.hosted import Hosted
from zeoid.server.streams import Streams
from zeoid.server.transports import TlsTransport, Transport
from zeoid.server.watching import Watch

log = logging.getLogger("zeoid.server")


class SystemClock:
    """The computer's own time. Without methods in between: each commit asks several times."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)


class StorageServer:
    """Serves storages to clients.

    With *tls* every TCP address has it; unix sockets never do. Without, addresses that other machines
    reach are refused, unless it is to be *insecure*.

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
        tls: ServerTls | ServerContexts | None = None,
        policy: Policy | None = None,
        insecure: bool = False,
        max_connections: int = limits.CONNECTIONS,
        max_connections_each: int = limits.CONNECTIONS_PER_IDENTITY,
        max_memory_bytes: int = limits.HELD_BYTES,
        max_blob_bytes: int = limits.BLOB_BYTES,
        idle_s: float = limits.IDLE_S,
    ) -> None:
        self.offer = offer
        #: What TCP connections are made with, if they have TLS.
        self.certificates = ServerContexts(tls) if isinstance(tls, ServerTls) else tls
        self._insecure = insecure
        self.admission = Admission(
            policy or Policy(),
            (clock or SystemClock()).monotonic,
            places=Places(most=max_connections, each=max_connections_each),
        )
        self.handshake_timeout_s = handshake_timeout_s
        self.connections: set[Transport] = set()
        self.watch = Watch(
            self.connections,
            self.admission.places.who,
            self._transactions,
            held_bytes=max_memory_bytes,
            idle_s=idle_s,
        )
        self.addresses: list[Address] = []
        self._listeners: list[asyncio.Server] = []
        self._sockets_made: list[tuple[str, int]] = []
        self._slow = ThreadPoolExecutor(limits.SLOW_REQUEST_THREADS, "zeoid-slow")
        self._threads: list[ThreadPoolExecutor] = [self._slow]
        self._with_blobs: ThreadPoolExecutor | None = None
        self._with_tls: ThreadPoolExecutor | None = None
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
                blob_bytes=max_blob_bytes,
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
                sock = listening.private_socket(address.path)
                server = await loop.create_unix_server(self._connection, sock=sock)
                made = os.stat(address.path)
                self._sockets_made.append((address.path, made.st_ino))
                bound: Address = address
            else:
                hosts = await listening.hosts(address)
                if self.certificates is None and not self._insecure:
                    listening.refuse_open(address, hosts)
                make = self._connection if self.certificates is None else self._tls_connection
                server = await loop.create_server(make, hosts, address.port, reuse_address=True)
                names = [sock.getsockname() for sock in server.sockets]
                for name in names[1:]:
                    log.info("listening on %s", TcpAddress(name[0], name[1]))
                bound = TcpAddress(names[0][0], names[0][1])
        except (OSError, UnicodeError) as problem:  # the latter for a name that can't be looked up
            raise ConfigurationError(f"can't listen on {address}: {listening.why(problem)}") from None
        if isinstance(address, TcpAddress) and self.certificates is None and listening.is_open(hosts):
            log.warning("anybody who reaches %s can read and change everything: it has no TLS", bound)
        self._listeners.append(server)
        self.addresses.append(bound)
        log.info("listening on %s", bound)
        return bound

    def _connection(self) -> Transport:
        return Transport(self)

    def _tls_connection(self) -> Transport:
        assert self.certificates is not None
        return TlsTransport(self, self.certificates)

    def reload_certificates(self) -> None:
        """Read the files of certificates again, and end connections of those that were revoked."""
        if self.certificates is not None and self.certificates.reload():
            self._drop_revoked()

    def _drop_revoked(self) -> None:
        for connection in list(self.connections):
            if isinstance(connection, TlsTransport):
                connection.drop_if_revoked()

    def refuses(self, fd: int) -> bool:
        """Whether a connection can't be served, because of what is open already."""
        refuses = system.is_scarce(fd)
        if refuses and not self._refusing and self.admission.told.may(LOCAL):
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
            if self.certificates is not None and self.certificates.look():
                self._drop_revoked()
            self.admission.tick(self.storages)
            self.watch.tick()
            for hosted in self.storages.values():
                try:
                    hosted.tick()
                except Exception:
                    log.exception("storage %r: a fault in the server", hosted.name)

    def _transactions(self) -> Iterator[tuple[Any, int]]:
        """The sessions and sizes of those under way."""
        for hosted in self.storages.values():
            for transaction in hosted.transactions.all():
                yield transaction.owner, transaction.size_bytes

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

    def shake_hands(self, work: Callable[[], Any], done: Done) -> None:
        """A part of a TLS handshake, in the one thread that does them: others are served meanwhile."""
        if self._with_tls is None:
            self._with_tls = self._thread("zeoid-tls")
        self._in_thread(self._with_tls, work, done)

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
