"""The connection of a client storage: making it, verifying it, keeping it, making it again.

    state        event                                        becomes
    CONNECTING   an address answered, was verified            READY
    CONNECTING   none did                                     CONNECTING, after a wait with jitter
    READY        the connection was lost                      CONNECTING
    READY        (fallback) a writable server was found       CONNECTING, with that one first
    any          close                                        CLOSED

A background thread, the keeper, does all of it, and reads the socket while no other thread does. It is a
daemon: a storage that nobody closed keeps no process alive. Owns the threads and the addresses; what a
message means is the view's business.
"""

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from ZODB.POSException import POSError, ReadOnlyError

from zeoid import limits
from zeoid.addresses import Address
from zeoid.client.channel import Channel
from zeoid.client.entering import authenticate, register
from zeoid.client.stream import connect
from zeoid.client.verifying import Verifier
from zeoid.client.view import View
from zeoid.errors import ClientError, Disconnected, PeerError, TimedOut, ZeoidError
from zeoid.wire.messages import CLIENT_METHODS, EXTENSIONS

if TYPE_CHECKING:
    from zeoid.security.tls import ClientContexts

log = logging.getLogger("zeoid.client")


class State(Enum):
    """See the table above."""

    CONNECTING = "trying to connect"
    READY = "connected"
    CLOSED = "closed"


class Access(Enum):
    """What a client wants of a server."""

    WRITE = "write"
    READ = "read"
    #: Write, but rather read than nothing.
    FALLBACK = "write, or else read"


class Link:
    """Keeps one verified connection to one of several servers."""

    def __init__(
        self,
        addresses: Sequence[Address],
        storage: str,
        view: View,
        *,
        access: Access,
        timeout_s: float,
        coding: str | None,
        label: str,
        certificates: "ClientContexts | None",
        token: str,
        jitter: Callable[[], float],
        on_connected: Callable[[dict[str, Any]], None],
        on_info: Callable[[dict[str, Any]], None],
        on_blob: Callable[[Channel, str, tuple[Any, ...]], None],
    ) -> None:
        self.addresses = tuple(addresses)
        self.view = view
        self._storage = storage
        self._access = access
        self._connect_timeout_s = min(limits.CONNECT_TIMEOUT_S, timeout_s)
        self._coding = coding
        self._label = label
        self._certificates = certificates
        self._token = token
        self._jitter = jitter
        self._on_connected = on_connected
        self._on_info = on_info
        self._on_blob = on_blob
        self._reset(State.CONNECTING)

    def _reset(self, state: State) -> None:
        self._changed = threading.Condition()
        self._state = state
        #: The verified connection, if there is one at this moment.
        self.ready: Channel | None = None
        #: Everything that is open, or being opened.
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()
        self._found_writer: tuple[Channel, Address, bytes] | None = None
        self._seeking = False
        self._plain: set[Address] = set()
        self._failure: BaseException | None = None
        #: What the log was last told of each address, so that it is not told again and again.
        self._told: dict[Address, str] = {}
        self._refusal: ClientError | None = None
        self._verifier = Verifier(self.view, self.addresses, self._connect_timeout_s)
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        #: Grows with every connection, so that what belongs to an old one can be told.
        self.generation = getattr(self, "generation", 0) + 1
        self.peer: Address | None = None
        self.read_only = self._access is Access.READ

    # What the storage uses ------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._state

    def describe(self) -> str:
        """The state in words, for people."""
        if self._state is State.READY:
            return f"connected to {self.peer}{', read-only' if self.read_only else ''}"
        if self._state is State.CLOSED:
            return "closed"
        return f"trying to connect to {self._names()}"

    def start(self) -> None:
        """Begin to connect. Harmless when that was done already."""
        with self._changed:
            if self._thread is None and self._state is not State.CLOSED:
                self._thread = threading.Thread(target=self._keep, name=f"zeoid {self._names()}", daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait for the first connection. A refusal by every server is raised at once."""
        self.start()
        with self._changed:
            self._changed.wait_for(
                lambda: self._state is not State.CONNECTING or self._refusal is not None, timeout_s
            )
            if self._state is State.CONNECTING:
                raise self._refusal or self._no_connection(timeout_s)

    def channel(self, timeout_s: float) -> Channel:
        """The verified connection, waited for if need be. Disconnected when it does not come."""
        channel = self.ready
        if channel is not None:
            return channel
        self.start()
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self._state is State.CLOSED, timeout_s)
            if self.ready is not None:
                return self.ready
        if self.closed:
            raise Disconnected("the storage is closed")
        raise self._no_connection(timeout_s)

    def _no_connection(self, timeout_s: float) -> TimedOut:
        reason = str(self._failure or self._names())
        return TimedOut(f"no connection to a storage server within {timeout_s:g} s: {reason}")

    @property
    def closed(self) -> bool:
        return self._state is State.CLOSED

    def close(self) -> None:
        """Close the connection and end the threads. Idempotent."""
        with self._changed:
            self._state = State.CLOSED
            self.ready = self._found_writer = None
            channels = list(self._channels)
            thread = self._thread
            self._changed.notify_all()
        self._wake.set()
        for channel in channels:
            channel.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join(limits.CLOSE_TIMEOUT_S)

    def after_fork(self) -> None:
        """In a forked child: the parent's connection and threads are not ours."""
        channels = list(self._channels)
        self._reset(State.CLOSED if self._state is State.CLOSED else State.CONNECTING)
        for channel in channels:
            channel.abandon()

    def _names(self) -> str:
        return ", ".join(map(str, self.addresses))

    # The keeper -----------------------------------------------------------------------------------

    def _keep(self) -> None:
        wait_s = limits.RECONNECT_FIRST_S
        while not self.closed:
            channel = self._connect()
            if channel is not None:
                connected_s = time.monotonic()
                while channel.alive and not self.closed:
                    self._wake.wait(limits.IDLE_BEFORE_BACKGROUND_S)
                    channel.beat()
                    channel.attend(limits.HEARTBEAT_S)
                if time.monotonic() - connected_s > wait_s or self._found_writer is not None:
                    wait_s = limits.RECONNECT_FIRST_S
                    continue  # it was a good connection: try at once
            self._wake.wait(wait_s * (0.5 + self._jitter()))
            wait_s = min(2 * wait_s, limits.RECONNECT_LAST_S)

    def _connect(self) -> Channel | None:
        """Try what was found, then every address once; the connection, verified and in use, or None."""
        readable: tuple[Channel, Address, bytes] | None = None
        refusals: list[ClientError] = []
        with self._changed:
            found, self._found_writer = self._found_writer, None
        if found is not None and self._take(*found):
            return self.ready
        for address in self.addresses:
            if self.closed:
                break
            try:
                channel, tid, writable = self._open(address, self._access)
            except Exception as problem:  # whatever a server says, the keeper goes on
                self._note_failure(address, problem)
                if isinstance(problem, ClientError) and not isinstance(problem, Disconnected):
                    refusals.append(problem)
                continue
            if writable or self._access is Access.READ:
                if self._take(channel, address, tid):
                    if readable is not None:
                        readable[0].close()
                    return self.ready
            elif readable is None:
                readable = channel, address, tid
            else:
                channel.close()
        if readable is not None and self._take(*readable, read_only=True):
            return self.ready
        if len(refusals) == len(self.addresses):
            with self._changed:
                self._refusal = refusals[0]
                self._changed.notify_all()
        return None

    def _note_failure(self, address: Address, problem: BaseException) -> None:
        text = _reason(problem)
        text = text if str(address) in text else f"{address}: {text}"
        if self._told.get(address) != text:
            self._told[address] = text
            expected = isinstance(problem, (OSError, ZeoidError, POSError))
            log.warning("%s", text, exc_info=None if expected else problem)
        self._failure = Disconnected(text)

    def _open(self, address: Address, access: Access) -> tuple[Channel, bytes, bool]:
        """A registered connection, the server's last tid, and whether it may write."""
        log.log(logging.DEBUG if self._failure else logging.INFO, "trying to connect to %s", address)
        coding = self._coding or ("Z5" if address in self._plain else "M5")
        channel = Channel(
            connect(address, self._connect_timeout_s),
            coding=coding,
            peer=str(address),
            address=address,
            certificates=self._certificates,
        )
        with self._changed:
            self._channels.add(channel)
            closed = self.closed
        try:
            if closed:
                raise Disconnected("the storage is closed")
            try:
                channel.shake_hands(self._connect_timeout_s)
            except PeerError as problem:  # it speaks something else, and will not change that soon
                raise ClientError(f"no connection to {channel.peer}: {problem}") from problem
            if self._token:
                authenticate(channel, self._token, self._connect_timeout_s)
            try:
                tid = register(channel, self._storage, access is Access.READ, self._connect_timeout_s)
            except TimedOut:
                raise
            except Disconnected:
                if coding == "M5" and channel.offered == "Z5":
                    # A stock server that has no msgpack: it can't read the answer M5. Z5 next time.
                    self._plain.add(address)
                raise
            except ReadOnlyError:
                if access is not Access.FALLBACK:
                    raise
                tid = register(channel, self._storage, True, self._connect_timeout_s)
                return channel, tid, False
        except BaseException:
            channel.close()
            raise
        return channel, tid, access is not Access.READ

    # Taking it into use ---------------------------------------------------------------------------

    def _take(self, channel: Channel, address: Address, tid: bytes, read_only: bool = False) -> bool:
        """Verify a registered connection and use it from now on. False, and it is closed, if it won't do."""
        try:
            self._verifier.verify(channel, address, tid)
            info = channel.call("get_info", (), self._connect_timeout_s)
            if self._label:
                channel.send(
                    channel.encode_one_way("set_client_label", (self._label,)), self._connect_timeout_s
                )
            self._on_connected(info)
            channel.extensions = _extensions(info)
            on_call = partial(self._on_call, channel)
            for name, args in channel.listen(on_call, partial(self._lost, channel)):
                self._on_early_call(channel, name, args)
        except Exception as problem:
            self._note_failure(address, problem)
            channel.close()
            return False
        with self._changed:
            if self._state is State.CLOSED or not channel.alive:
                channel.close()
                return False
            self.peer = address
            self.read_only = read_only or self._access is Access.READ
            self.generation += 1
            self.ready = channel
            self._state = State.READY
            self._failure = self._refusal = None
            self._changed.notify_all()
        # Whoever was told that it is gone, at this level, must be told that it is back.
        level = logging.WARNING if self._told else logging.INFO
        self._told.clear()
        log.log(level, "connected to %s, storage %r, protocol %s", address, self._storage, channel.protocol)
        if read_only and self._access is Access.FALLBACK:
            self._seek_writer()
        return True

    def _on_call(self, channel: Channel, name: str, args: Any) -> None:
        """The server calls; in stream order."""
        method = CLIENT_METHODS.get(name)
        if method is None:
            raise PeerError(f"the server called {name[:100]!r}, which there is not")
        if name == "invalidateTransaction":
            self.view.invalidate(*method.check(args))
        elif name == "info":
            (info,) = method.check(args)
            self._on_info(info)
        else:
            self._on_blob(channel, name, method.check(args))

    def _on_early_call(self, channel: Channel, name: str, args: Any) -> None:
        """The server called while the connection was being verified, which may have covered this call."""
        if name != "invalidateTransaction" or CLIENT_METHODS[name].check(args)[0] > self.view.last_tid():
            self._on_call(channel, name, args)

    def _lost(self, channel: Channel, problem: BaseException) -> None:
        with self._changed:
            if self.ready is channel:
                self._state = State.CONNECTING
                self.ready = None
                reason = _reason(problem)
                assert self.peer is not None
                self._told[self.peer] = reason
                log.warning("disconnected from %s: %s", self.peer, reason)
                self._changed.notify_all()
            self._wake.set()
            if not self.closed:
                self._wake.clear()

    # Fallback -------------------------------------------------------------------------------------

    def _seek_writer(self) -> None:
        """Look for a writable server in the background, for as long as we have a read-only one."""
        with self._changed:
            if self._seeking:
                return
            self._seeking = True
        name = f"zeoid seeks a writer: {self._names()}"
        threading.Thread(target=self._seek, name=name, daemon=True).start()

    def _seek(self) -> None:
        while True:
            self._wake.wait(limits.WRITER_POLL_S * (0.5 + self._jitter()))
            with self._changed:
                if self.closed or (self._state is State.READY and not self.read_only):
                    self._seeking = False
                    return
                if self._state is not State.READY:
                    continue  # the keeper is looking, too
            for address in self.addresses:
                with contextlib.suppress(Exception):  # whatever a server says, the search goes on
                    channel, tid, _ = self._open(address, Access.WRITE)
                    self._offer_writer(channel, address, tid)
                    break

    def _offer_writer(self, channel: Channel, address: Address, tid: bytes) -> None:
        """A writable server was found: the keeper takes it instead of the read-only one."""
        with self._changed:
            old = self.ready
            if self.closed:
                old = None
            else:
                self._found_writer = channel, address, tid
        if old is None:
            channel.close()
        else:
            log.info("found a writable server, %s", address)
            old.close(Disconnected("a writable server was found"))


def _extensions(info: dict[str, Any]) -> frozenset[str]:
    """Those that we know as well."""
    names = info.get("extensions", ())
    if type(names) not in (list, tuple):
        raise PeerError("its extensions are no list")
    return frozenset(name for name in EXTENSIONS if name in names)


def _reason(problem: BaseException) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror.lower()
    if isinstance(problem, ReadOnlyError):
        return "it is read-only"
    return str(problem) or type(problem).__name__
