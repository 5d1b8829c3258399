"""One connection to a server, used by many threads: the socket, who reads it, and whose reply has come.

A call is one send and one receive on the calling thread. Of the threads that wait, one is the *reader*: it
reads the socket and delivers everything it meets in the order of the stream, the others' replies and the
server's invalidations included. When its own reply has come it hands the role to another thread that
waits. When nobody waits the role is free; a background thread takes it after a moment of idleness
(`attend`) and gives it back as soon as a foreground call has had its reply.

    role            event                            becomes
    free            a thread waits for its reply     that thread's
    free            `attend`, and idle               the background's
    a thread's      its reply came, others wait      one of the others'
    a thread's      its reply came, nobody waits     free
    background's    it delivered a thread's reply    one of the waiting threads', or free

Invariants:
 1. Only the holder of the role reads the socket and delivers, so deliveries are in stream order.
 2. Whoever leaves the role passes it on or sets it free; a waiting thread is woken by its reply, by the
    role, by the end of the channel or by its deadline.
 3. A reader that is interrupted (a signal, a gevent kill) ends the channel: a half-read stream is never
    left to others. So does a writer that is interrupted within a frame.
 4. A dead channel stays dead. What was under way on it raises Disconnected.

Long because who sends, who reads and who waits hold these invariants together; the socket is `stream`'s.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zeoid import limits
from zeoid.addresses import Address, TcpAddress, UnixAddress
from zeoid.client.stream import Stream
from zeoid.client.tls_stream import TlsStream
from zeoid.errors import Disconnected, PeerError, TimedOut, ZeoidError
from zeoid.wire import faults
from zeoid.wire.codec import FAULT
from zeoid.wire.connection import ClientConnection, State

if TYPE_CHECKING:
    from zeoid.security.tls import ClientContexts

log = logging.getLogger("zeoid.client")
_monotonic = time.monotonic
#: Ample for a thread that sends on a stream that was shut down to notice.
_LET_GO_S = 0.1

#: Called with the context of a call and the value of its reply, by the thread that delivers it, in stream
#: order; returns what the caller gets.
Hook = Callable[[Any, Any], Any]
#: Called with the name and the args of a one-way call by the server, in stream order.
OnCall = Callable[[str, Any], None]


class Waiter:
    """A call without a reply yet."""

    hook: Hook | None = None
    context: Any = None
    done = False
    promoted = False
    value: Any = None
    problem: BaseException | None = None
    wake: "threading.Lock | None" = None
    #: Those of other threads, which are done when this call has its reply.
    followers: "list[Waiter] | None" = None
    #: Its own thread has given it up: it will have no reply.
    forgotten = False


_READER = "reader"


class Channel:
    """See the module. Made with a connected socket, which it owns from then on."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        coding: str | None = None,
        peer: str = "",
        address: Address | None = None,
        certificates: "ClientContexts | None" = None,
    ) -> None:
        """With *certificates* a connection to a TCP *address* has TLS. ClientError if it can't have."""
        self.peer = peer
        if certificates is not None and isinstance(address, TcpAddress):
            self._stream: Stream = TlsStream(sock, peer, address, certificates)
        else:
            self._stream = Stream(sock, peer)
        self._connection = ClientConnection(coding)
        #: The calls that have no reply yet: empty unless other threads use the channel, too.
        self.pending: Mapping[Any, Waiter] = self._connection.pending
        self._on_call: OnCall | None = None
        self._early: list[tuple[str, Any]] = []
        self._send_lock = threading.Lock()
        #: Whoever sends a blob has this: a server takes one at a time.
        self.blob_lock = threading.Lock()
        #: How much of blobs has come. All replies stand behind a blob: while this grows no deadline passes.
        self.blob_bytes = 0
        #: Guards what follows but for `_role`, which changes hands in single steps of a dictionary.
        self._roles = threading.Lock()
        self._role: dict[str, Waiter] = {}
        self._waiting: dict[Waiter, None] = {}
        self._uses = 0
        self._seen_uses = 0
        self._seen_s = _monotonic()
        self._dead: BaseException | None = None
        self._on_death: Callable[[BaseException], None] | None = None
        #: Whether calls can be made. Once it is not it never will be.
        self.alive = True
        #: What the server knows beyond ZEO's methods, as far as whoever opened this has found out.
        self.extensions: frozenset[str] = frozenset()
        #: Where the server is, for those who open another connection to it.
        self.address = address
        #: What such a connection needs, if it is to be encrypted, too.
        self.certificates = certificates

    @property
    def encrypted(self) -> bool:
        """Whether nobody in between can read what is sent: also that of a unix socket is not in the clear."""
        return self.certificates is not None or isinstance(self.address, UnixAddress)

    # Opening --------------------------------------------------------------------------------------

    def shake_hands(self, timeout_s: float) -> None:
        """Read the server's offer and answer it. Disconnected, TimedOut or PeerError if it fails."""
        deadline_s = _monotonic() + timeout_s
        try:
            self._stream.open(deadline_s)
            while self._connection.state is State.WAITING:
                data = self._stream.receive(deadline_s)
                if data is None:
                    raise TimedOut(f"no offer from {self.peer} within {timeout_s:g} s")
                if not data:
                    raise Disconnected(f"{self.peer} closed the connection")
                self._deliver(data, None)
        except BaseException as problem:
            self._die(problem)
            raise
        self.send(self._connection.take_answer(), timeout_s)

    def listen(self, on_call: OnCall, on_death: Callable[[BaseException], None]) -> list[tuple[str, Any]]:
        """From now on the server's calls go to *on_call*; those that came before this are returned.

        To be called by the only thread that uses the channel so far. *on_death* is called once.
        """
        self._on_death = on_death
        self._on_call = on_call
        early, self._early = self._early, []
        return early

    @property
    def sends(self) -> int:
        """Grows with everything that is sent."""
        return self._uses

    @property
    def protocol(self) -> str:
        """M5 or Z5."""
        return self._connection.protocol

    @property
    def offered(self) -> str:
        """What the server offered: M5, Z5, or nothing yet."""
        return self._connection.offered

    # Calling --------------------------------------------------------------------------------------

    def call(
        self,
        name: str,
        args: tuple[Any, ...],
        timeout_s: float,
        *,
        hook: Hook | None = None,
        context: Any = None,
        before: bytes = b"",
    ) -> Any:
        """Call the server and wait for the reply. *before* is sent in front, in the same write.

        Raises what the server answered; TimedOut after *timeout_s*; Disconnected when the channel dies.
        """
        deadline_s = _monotonic() + timeout_s
        waiter = Waiter()
        waiter.hook = hook
        waiter.context = context
        try:
            if self._dead is not None or not self._send_lock.acquire(False):
                self._acquire_sending(deadline_s)
            try:
                message = self._connection.call(waiter, name, args)
                self._send(before + message if before else message, deadline_s)
            finally:
                self._send_lock.release()
                if self._dead is not None:
                    self._close_socket()
        except BaseException as problem:
            self._not_sent(problem)
            raise
        # What `_await` does, for the one case that nearly every load is: nobody else reads.
        try:
            if self._role.setdefault(_READER, waiter) is waiter:
                self._read(waiter, deadline_s)
        except BaseException as problem:
            self._interrupted(waiter, problem)
            raise
        if waiter.done and waiter.problem is None:
            return waiter.value
        return self._await(waiter, deadline_s, timeout_s)

    def call_all(
        self,
        name: str,
        all_args: Sequence[tuple[Any, ...]],
        timeout_s: float,
        hook: Hook,
        contexts: Sequence[Any],
    ) -> list[Any]:
        """Send all calls before waiting for their replies. Values, or the exceptions, in order."""
        deadline_s = _monotonic() + timeout_s
        waiters = self.begin(name, all_args, timeout_s, hook, contexts)
        results = []
        for waiter in waiters:
            try:
                results.append(self._await(waiter, deadline_s, timeout_s))
            except Disconnected:
                raise
            except Exception as problem:
                if problem is not waiter.problem:
                    raise  # an interruption
                results.append(problem)
        return results

    def begin(
        self,
        name: str,
        all_args: Sequence[tuple[Any, ...]],
        timeout_s: float,
        hook: Hook,
        contexts: Sequence[Any],
    ) -> list[Waiter]:
        """Send calls. Whoever reads the connection delivers the replies, whether anyone waits or not."""
        waiters = [Waiter() for _ in contexts]
        for waiter, context in zip(waiters, contexts, strict=True):
            waiter.hook = hook
            waiter.context = context

        def encode() -> bytes:
            make = self._connection.call
            return b"".join(
                [make(waiter, name, args) for waiter, args in zip(waiters, all_args, strict=True)]
            )  # fmt: skip

        self._transmit(encode, _monotonic() + timeout_s)
        return waiters

    def encode_one_way(self, name: str, args: tuple[Any, ...]) -> bytes:
        """The bytes of a one-way call, to be sent with `send` or in front of a call."""
        try:
            with self._send_lock:
                self._raise_if_dead()
                return self._connection.one_way(name, args)
        finally:
            if self._dead is not None:
                self._close_socket()

    def send(self, data: bytes, timeout_s: float) -> None:
        """Write whole messages."""
        self._transmit(lambda: data, _monotonic() + timeout_s)

    def _transmit(self, encode: Callable[[], bytes], deadline_s: float) -> None:
        """Write the messages that *encode* makes, which it does holding the send lock."""
        try:
            self._acquire_sending(deadline_s)
            try:
                self._send(encode(), deadline_s)
            finally:
                self._send_lock.release()
                if self._dead is not None:
                    self._close_socket()
        except BaseException as problem:
            self._not_sent(problem)
            raise

    def _acquire_sending(self, deadline_s: float) -> None:
        if self._dead is not None:
            self._raise_if_dead()
        if not self._send_lock.acquire(False) and not self._send_lock.acquire(
            timeout=max(0.0, deadline_s - _monotonic())
        ):
            # Whoever holds the lock for so long is stuck, or was killed within: start anew.
            problem = TimedOut(f"{self.peer} does not read what it is sent")
            self._die(problem)
            raise problem

    def _not_sent(self, problem: BaseException) -> None:
        """Sending failed. What is none of our errors came from outside, and may leave the lock behind."""
        if not isinstance(problem, ZeoidError):
            self._die(problem)
            # Whoever else is sending fails at once and lets go; if nobody does, this thread has the lock.
            self._send_lock.acquire(timeout=_LET_GO_S)
            self._send_lock.release()
            self._close_socket()

    def _send(self, data: bytes, deadline_s: float) -> None:
        """Write all of *data*, holding the send lock. Whatever goes wrong within it ends the channel."""
        try:
            self._stream.send(data, deadline_s)
        except BaseException as problem:
            self._die(problem)
            if isinstance(problem, OSError) and _of_the_connection(problem):
                self._raise_if_dead()
            raise
        self._uses += 1

    # Waiting and reading --------------------------------------------------------------------------

    def _wait(self, waiter: Waiter, deadline_s: float) -> None:
        """Return when its reply is there, and at the deadline; it may be waited for again."""
        try:
            if self._take_role_or_queue(waiter) or (
                waiter.wake is not None and self._sleep(waiter, deadline_s)
            ):
                self._read(waiter, deadline_s)
        except BaseException as problem:
            self._interrupted(waiter, problem)
            raise

    def _await(self, waiter: Waiter, deadline_s: float, timeout_s: float) -> Any:
        if not waiter.done:
            self._wait(waiter, deadline_s)
            seen_bytes = 0
            while not waiter.done and self._dead is None and self.blob_bytes != seen_bytes:
                seen_bytes = self.blob_bytes
                self._wait(waiter, _monotonic() + timeout_s)
        if not waiter.done:
            self._raise_if_dead()
            self._forget(waiter)
            raise TimedOut(f"no reply from {self.peer} within {timeout_s:g} s")
        if waiter.problem is not None:
            raise waiter.problem
        return waiter.value

    def _take_role_or_queue(self, waiter: Waiter) -> bool:
        """True when the role was free and is this thread's now; otherwise the waiter can be woken."""
        with self._roles:
            if waiter.done or self._dead is not None:
                return False
            waiter.promoted = False
            waiter.wake = threading.Lock()
            waiter.wake.acquire()
            # In this order: whoever leaves the role looks at those who wait only after that.
            self._waiting[waiter] = None
            if self._role.setdefault(_READER, waiter) is not waiter:
                return False
            del self._waiting[waiter]
            return True

    def _sleep(self, waiter: Waiter, deadline_s: float) -> bool:
        """Wait until woken or late; True when woken to take the role."""
        assert waiter.wake is not None
        waiter.wake.acquire(timeout=max(0.0, deadline_s - _monotonic()))
        with self._roles:
            self._waiting.pop(waiter, None)
            return waiter.promoted  # also if it is done by now, so that the role is passed on

    def _interrupted(self, waiter: Waiter, problem: BaseException) -> None:
        """An exception came from outside while this thread waited. Leave nothing to it that others need."""
        with self._roles:
            self._waiting.pop(waiter, None)
        if self._role.get(_READER) is waiter:
            self._die(problem)
            self._role.pop(_READER, None)
            self._pass_on()
            self._close_socket()
        elif not self._role:
            self._pass_on()  # it may have come just before the others were told
        self._forget(waiter)

    def _forget(self, waiter: Waiter) -> None:
        waiter.forgotten = True
        self._connection.forget(waiter)
        self._wake_followers(waiter)

    def under_way(self) -> list[Waiter]:
        """The calls that have no reply yet."""
        waiters: list[Waiter] = self._connection.slots()
        return waiters

    def follow(self, waiter: Waiter, timeout_s: float) -> bool:
        """Wait for the reply to another thread's call. False: there is none, or a problem.

        TimedOut after *timeout_s*.
        """
        deadline_s = _monotonic() + timeout_s
        own = Waiter()
        with self._roles:
            waiter.followers = [*(waiter.followers or ()), own]
        # Its thread may give up while this one reads, or be interrupted: look again now and then.
        while not (waiter.done or waiter.forgotten or self._dead is not None):
            now_s = _monotonic()
            if now_s >= deadline_s:
                raise TimedOut(f"no reply from {self.peer} within {timeout_s:g} s")
            self._wait(own, min(deadline_s, now_s + limits.FOLLOW_TICK_S))
        return waiter.done and waiter.problem is None

    def _wake_followers(self, waiter: Waiter) -> None:
        with self._roles:
            followers, waiter.followers = waiter.followers, None
        for follower in followers or ():
            self._finish(follower)

    def _read(self, waiter: Waiter, deadline_s: float, *, idle: bool = False) -> None:
        """Read and deliver, holding the role, until *waiter* has its reply; then pass the role on.

        The background (*idle*) reads until any thread has had its reply.
        """
        try:
            while not waiter.done and self._dead is None:
                data = self._stream.receive(deadline_s, idle=idle)
                if data is None:
                    break
                if not data:
                    raise Disconnected(f"{self.peer} closed the connection")
                try:
                    woke = self._deliver(data, waiter)
                except Exception as problem:
                    if not isinstance(problem, PeerError):
                        log.exception("%s: a fault while its messages were applied", self.peer)
                    self._die(problem)
                    break
                if woke and idle:
                    break
        except BaseException as problem:
            self._die(problem)
            if not _of_the_connection(problem):
                raise
        finally:
            if waiter.followers is not None and not waiter.done:
                # They are to ask by themselves, and not to wait for it in this thread's place.
                waiter.forgotten = True
                self._wake_followers(waiter)
            self._role.pop(_READER, None)
            if self._waiting:
                self._pass_on()
            if self._dead is not None:
                self._close_socket()

    def _pass_on(self) -> None:
        """Give the role, which is free, to a thread that waits, unless one that just came has taken it.

        That one will pass it on in its turn. No call up to the release: neither another thread nor an
        interruption can come in between.
        """
        with self._roles:
            for waiter in self._waiting:
                if not self._role:
                    self._role[_READER] = waiter
                    del self._waiting[waiter]
                    waiter.promoted = True
                    assert waiter.wake is not None
                    waiter.wake.release()
                return

    def _deliver(self, data: bytes, reader: Any) -> bool:
        """Hand everything in *data* to whom it is for, in order; True if a waiting thread got its reply.

        *reader*: the waiter whose thread does this, if there is one.
        """
        woke = False
        for slot, flag, name, args in self._connection.receive(data):
            if slot is None:
                if self._on_call is None:
                    self._early.append((name, args))
                else:
                    self._on_call(name, args)
                continue
            try:
                if flag == FAULT:
                    slot.problem = faults.rebuild(args)
                elif slot.hook is None:
                    slot.value = args
                else:
                    slot.value = slot.hook(slot.context, args)
            except BaseException as problem:
                # Never let an interrupted delivery look like a reply.
                slot.problem = (
                    problem if isinstance(problem, Exception) else Disconnected("the reader was interrupted")
                )
                raise
            finally:
                if slot is reader:
                    slot.done = True  # no other thread looks at it
                else:
                    woke = True
                    self._finish(slot)
                if slot.followers is not None:
                    self._wake_followers(slot)
        return woke

    def _finish(self, waiter: Waiter) -> None:
        """Its reply is there: wake its thread if it sleeps."""
        with self._roles:
            waiter.done = True
            if waiter in self._waiting:  # no call up to the release: an interruption can't come in between
                del self._waiting[waiter]
                assert waiter.wake is not None
                waiter.wake.release()

    # The background -------------------------------------------------------------------------------

    def attend(self, turn_s: float) -> None:
        """The background's turn: read while no thread does, for at most about *turn_s*.

        Returns without reading when there was a foreground call since the last time.
        """
        if self._uses != self._seen_uses:
            self._seen_uses = self._uses
            self._seen_s = _monotonic()
            return
        self._read_if_free(_monotonic() + turn_s)

    def drain(self) -> None:
        """Deliver what has already arrived, unless another thread is reading anyway."""
        self._read_if_free(0.0)

    def _read_if_free(self, deadline_s: float) -> None:
        background = Waiter()
        try:
            if self._dead is None and self._role.setdefault(_READER, background) is background:
                self._read(background, deadline_s, idle=True)
        except BaseException as problem:
            self._interrupted(background, problem)
            raise

    def beat(self) -> None:
        """Send a heartbeat if nothing was sent for a while, as `attend` has seen."""
        now_s = _monotonic()
        if now_s - self._seen_s >= limits.HEARTBEAT_S and self._send_lock.acquire(False):
            try:
                uses = self._uses
                self._send(self._connection.heartbeat(), now_s + limits.HEARTBEAT_S)
                self._uses = uses
                self._seen_s = now_s
            except Disconnected:
                pass
            finally:
                self._send_lock.release()
                if self._dead is not None:
                    self._close_socket()

    # The end --------------------------------------------------------------------------------------

    def close(self, reason: BaseException | None = None) -> None:
        """End the channel; whoever waits gets Disconnected."""
        self._die(reason or Disconnected("the storage was closed"))

    def _die(self, problem: BaseException) -> None:
        with self._roles:
            if self._dead is not None:
                return
            self._dead = problem
            self.alive = False
        self._stream.shutdown()  # wakes whoever reads it
        with self._roles:
            waiting = list(self._waiting)
            self._waiting.clear()
            for waiter in waiting:
                assert waiter.wake is not None
                waiter.wake.release()
        for waiter in self.under_way():
            self._wake_followers(waiter)
        self._close_socket()
        if self._on_death is not None:
            self._on_death(problem)

    def _close_socket(self) -> None:
        """Close it as soon as no thread is using it: its number may be another file's afterwards."""
        if not self._role and self._send_lock.acquire(False):
            try:
                self._stream.close()
            finally:
                self._send_lock.release()

    def abandon(self) -> None:
        """Forget a connection that belongs to the process this one was forked from: no byte is sent."""
        self._dead = Disconnected("the connection belongs to the parent process")
        self.alive = False
        self._stream.close()

    def _raise_if_dead(self) -> None:
        if self._dead is None:
            return
        if isinstance(self._dead, Disconnected):
            raise Disconnected(*self._dead.args)  # if it is a TimedOut, it is that of another call
        raise Disconnected(f"the connection to {self.peer} was lost: {self._dead}") from self._dead


def _of_the_connection(problem: BaseException) -> bool:
    """Whether it is the connection's own end, and not an interruption, such as an alarm's TimeoutError."""
    return isinstance(problem, Disconnected) or (isinstance(problem, OSError) and problem.errno is not None)
