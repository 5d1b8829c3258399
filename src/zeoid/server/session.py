"""One connection of a client: its handshake, its calls, its replies. No I/O of its own.

What happens to a session, and what follows:

    receive(data)   handshake, or calls carried out in order, their replies written in one piece
    answer, refuse  the hosted storage answers a vote or a finish, at once, so that the reply stands in the
                    stream where the commit happened
    tell            a one-way call, such as an invalidation; it keeps its place among the replies
    (a read ends)   its reply is sent, unless it may be out of date by now: then it is read again
    pause, resume   the client does not read its replies, or does again; calls wait meanwhile
    hold_blobs      something waits to be sent: no more pieces of blobs, so that other replies go between them
    send_blobs      hardly anything waits any more
    drop(reason)    the connection is closed from our side
    lost(reason)    the connection is gone; transactions are given up, iterators closed

Owns the order of what is written. Must not know sockets: a `Wire` takes bytes and can be closed. Long because
all kinds of calls and replies share that order; what they do is done elsewhere.
"""

import contextlib
import json
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
    UndoError,
    Unsupported,
)

from zeoid import limits
from zeoid.commit.actions import State as TransactionState
from zeoid.commit.actions import Transaction
from zeoid.commit.gathering import size_of
from zeoid.errors import Crowded, Forbidden, InvalidCall, PackCancelled, PeerError, TooLarge, UnsendableValue
from zeoid.security.audit import Event
from zeoid.security.identity import Peer, printable
from zeoid.security.roles import NOBODY
from zeoid.server.authority import Authority
from zeoid.server.clients import Announcement, Done, House, Wire
from zeoid.server.downloads import Downloads
from zeoid.server.hosted import Hosted
from zeoid.server.iterators import Iterators
from zeoid.server.methods import (
    ANSWERED_LATER,
    LATER,
    NAMED_FIRST,
    OPERATIONS,
    Download,
    Outcome,
    Pack,
    Read,
    Slow,
)
from zeoid.server.reads import Reads
from zeoid.server.streams import Grant
from zeoid.server.uploads import Uploads
from zeoid.wire.codec import Message, MessageId
from zeoid.wire.connection import ServerConnection, State
from zeoid.wire.loads import REQUEST_BYTES as LOAD_BYTES
from zeoid.wire.loads import reply as reply_to_load
from zeoid.wire.messages import TRANSACTION, Access

log = logging.getLogger("zeoid.server")
_ASKED = State.ASKED
_FINISHING = TransactionState.FINISHING
_HANDED_OVER = State.HANDED_OVER

#: Errors that are part of normal life: the client is told, the log is not.
_EXPECTED = (ConflictError, POSKeyError, ReadOnlyError, UndoError, StorageTransactionError, Unsupported)
#: … and what is told in a line.
_ITS_OWN_FAULT = (InvalidCall, Forbidden, TooLarge)


class Session:
    """The server's side of one connection."""

    def __init__(self, house: House, wire: Wire, peer: Peer, *, offer: str = "Z5") -> None:
        self._house = house
        self._wire = wire
        self._connection = ServerConnection(offer)
        self._encrypted = peer.encrypted
        self.authority = Authority(house.admission, peer)
        self._handlers = self.authority.handlers
        self._peer = self.authority.told
        self._calls: deque[Message] = deque()
        self._paused = False
        self._gathered: list[bytes] | None = None
        self._gathered_bytes = 0
        self._held = False
        self._awaited: dict[Any, MessageId] = {}
        #: Requests that take long: all, those that threads have, and those that are to come after them.
        self._slow = 0
        self._slow_at_once = 0
        self._slow_waiting: deque[tuple[Callable[[], Any], Done]] = deque()
        #: Objects of bulk loads since it was this session's turn. After so many it is that of others.
        self.bulk_loads = 0
        self._waits_for_turn = False
        self._reads = Reads(self._read_ended)
        #: There are none before the first blob.
        self._uploads: Uploads | None = None
        self._downloads = Downloads(self._connection.caller, self._write)
        #: The storage that this client registered for. There is none before that.
        self.hosted: Hosted
        #: What blob connections of this client may do.
        self.grant: Grant
        self.registered = False
        self._answers_loads = False
        self._closed = False
        self.label = self._peer
        self.read_only = False
        self.iterators = Iterators()
        wire.write(self._connection.offer)

    # What comes in --------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Bytes from the client. Never raises: what is wrong ends this connection and no other."""
        if self._closed or (self._answers_loads and len(data) == LOAD_BYTES and self._answer_load(data)):
            return
        try:
            self._calls.extend(self._connection.receive(data))
        except PeerError as problem:
            self._work()  # what came before it
            self.drop(str(problem))
        else:
            self._work()

    def _answer_load(self, data: bytes) -> bool:
        """Whether *data* was a load and nothing else, and is answered: the short way of nearly all calls.

        It leads past nothing but the dispatch. What is not plain sailing takes the long way, from the start.
        """
        load = self._connection.receive_load(data)
        if load is None or self._calls or self._paused or self._gathered is not None:
            return False
        message_id, oid, tid = load
        hosted = self.hosted
        try:
            revision = hosted.visible.load_before(oid, tid)
        except Exception:
            return False
        hosted.counts.loads += 1
        reply = reply_to_load(message_id, revision)
        if reply is None:
            self._reply(message_id, "loadBefore", revision)
        else:
            self._send(reply)
        return True

    @property
    def held_bytes(self) -> int:
        """What is in memory of what it sent, but for its transactions."""
        held = self._connection.pending_bytes
        if self._calls:
            held += size_of(self._calls[0])  # what came behind it came in one segment with its end
        if self._uploads is not None:
            held += self._uploads.queued_bytes
        return held

    def pause(self) -> None:
        """The client does not read its replies: carry out no more calls until it does."""
        self._paused = True

    def resume(self) -> None:
        """The client has read its replies."""
        self._paused = False
        self._go_on()

    def hold_blobs(self) -> None:
        """Something waits to be sent: it is enough to keep the client busy."""
        self._downloads.pause()

    def send_blobs(self) -> None:
        """There is nearly nothing left to send."""
        self._downloads.resume()

    def _go_on(self) -> None:
        if self._gathered is None and not self._closed:
            self._work()

    def _work(self) -> None:
        """Carry out the calls that have arrived, in order."""
        calls = self._calls
        self.bulk_loads = 0
        if not self._held:
            self._gathered = []
        left = max(0, len(calls) - limits.CALLS_PER_TURN)
        try:
            while len(calls) > left and not self._paused and not self._closed:
                if self._reads.full:
                    self._wire.stop_reading()
                    left = 0
                    break
                self._call(*calls.popleft())
                if self.bulk_loads >= limits.BULK_LOAD_OIDS and calls:
                    left = len(calls)
            if left and len(calls) == left and not self._paused and not self._closed:
                self._let_others_go_first()
            if self._connection.state is _ASKED:
                self._report_status()
            elif self._connection.state is _HANDED_OVER:
                self._hand_over()
        except Exception:
            log.exception("%s: a fault in the server; the connection is closed", self.label)
            self.drop("internal error")
        finally:
            if not self._held:
                self._flush()

    def _let_others_go_first(self) -> None:
        """What this client asked for keeps the loop busy: go on after a look at the other connections."""
        if not self._waits_for_turn:
            self._waits_for_turn = True
            self._wire.stop_reading()
            self._wire.soon(self._take_turn)

    def _take_turn(self) -> None:
        self._waits_for_turn = False
        self._go_on()
        if not self._waits_for_turn:
            self._read_on()

    def _call(self, message_id: MessageId, flag: int, name: str, args: Any) -> None:
        one_way = flag != 0
        try:
            handler = self._handlers.get(name)
            if handler is None:
                raise InvalidCall(f"there is no method {name[:100]!r}")
            check, carry_out, after_register, answered_later = handler
            if self.registered is not after_register:
                when = "after" if self.registered else "before"
                raise InvalidCall(f"{name} can't be called {when} register")
            args = check(args)
            if answered_later:
                if one_way:
                    raise InvalidCall(f"{name} was called one-way, but has an answer")
                self._await_answer(args[0], message_id)
            result = carry_out(self, *args)
        except Exception as problem:
            if name in ANSWERED_LATER:
                self._withdraw(message_id)
            self._failed(message_id, one_way, name, args, problem)
            return
        kind = type(result)
        if kind is Slow:
            self._run_slow(message_id, one_way, name, result)
        elif kind is Read:
            self._reads.begin(self.hosted, result, (message_id, one_way, name))
        elif kind is Download:
            self._download(message_id, one_way, result)
        elif kind is Pack:
            self._pack(message_id, one_way, result)
        elif kind is Outcome:
            self._ask_outcome(message_id, one_way, result)
        elif result is not LATER and not one_way:
            self._reply(message_id, name, result)

    def _failed(self, message_id: MessageId, one_way: bool, name: str, args: Any, problem: Exception) -> None:
        """Say so: in the reply and in the log, at the vote, or by closing the connection."""
        if one_way and self._breaks(name, args, problem):
            return
        if isinstance(problem, Forbidden):
            self.authority.tell(Event.REFUSED, reason=str(problem))
        gets_in = self.registered or not isinstance(problem, Forbidden)
        if isinstance(problem, Crowded):
            self.authority.tell(Event.REFUSED, reason=str(problem))
        elif not (isinstance(problem, _ITS_OWN_FAULT) and (one_way or not gets_in)):
            self._log_failure(name, problem)
        if not one_way:
            self._fault(message_id, problem)
            if isinstance(problem, Crowded):
                self.drop(str(problem))
            elif not gets_in:
                self.drop(f"it did not get in: {problem}")
        else:
            self.drop(str(problem) or f"{name} failed and can't be answered: {problem!r}")

    def _log_failure(self, name: str, problem: Exception) -> None:
        if isinstance(problem, _EXPECTED) or not self.authority.may_tell():
            return
        if isinstance(problem, _ITS_OWN_FAULT):
            log.warning("%s: %s", self.label, problem)
        elif type(problem) is StorageError:  # its own words are enough
            log.error("%s: %s failed: %s", self.label, name, printable(str(problem)))
        else:
            log.error("%s: %s failed", self.label, name, exc_info=problem)

    def _breaks(self, name: str, args: Any, problem: Exception) -> bool:
        """Whether the call was an operation of a transaction, whose vote will fail with *problem* now."""
        if name not in OPERATIONS or not self.registered:
            return False
        if type(args) not in (tuple, list) or not args:
            return False
        id = args[0] if name in NAMED_FIRST else args[-1]
        if not TRANSACTION.test(id):
            return False
        try:
            self.hosted.transactions.break_(self, id, problem)
        except StorageTransactionError:
            return False
        return True

    def authenticate(self, token: str) -> str:
        name = self.authority.authenticate(token)
        self._handlers = self.authority.handlers
        self.label = self._peer = self.authority.told
        log.info("%s has shown a token", self.label)
        return name

    def register(self, storage: str, read_only: bool) -> bytes:
        granted = self.authority.enter(storage, self._house.storages)
        hosted = self._house.storages[storage]
        may_write = Access.WRITE in granted
        if not read_only and (hosted.read_only or not may_write):
            raise ReadOnlyError()
        self._house.admission.places.settle(self._wire, self.authority.key)
        self.read_only = read_only
        self.hosted = hosted
        self.grant = Grant(hosted, read_only or not may_write, self._peer, encrypted=self._encrypted)
        self.registered = True
        self.authority.entered(storage, granted, read_only=read_only)
        self._handlers = self.authority.handlers
        # Nobody is registered who may not read.
        self._answers_loads = hosted.engine.inline
        self._connection.registered()
        hosted.clients.add(self)
        log.info(
            "%s connected to storage %r %s, protocol %s",
            self.label, storage, "read-only" if read_only else "for writing", self._connection.protocol,
        )  # fmt: skip
        return hosted.visible.tid

    def set_label(self, label: str) -> None:
        printable = "".join(c if c.isprintable() else "?" for c in label[:200])
        if self.authority.may_tell():
            log.info("%s is labelled %s", self.label, printable)
        self.label = f"{printable} {self._peer}"

    def recheck(self) -> None:
        """The rules have changed. Who has other rights by them than it came in with has to come in again."""
        if not self._closed and self.authority.has_changed:
            self.authority.tell(Event.REVOKED)
            self.drop("it has other rights now, and has to connect again")

    def _report_status(self) -> None:
        if self.authority.identity is NOBODY:
            self.authority.tell(Event.REFUSED, reason="its status is told to those only whom it knows")
            self.drop("it wants to know the server's status, and does not say who it is")
            return
        may_read = self.authority.may_read
        status = {name: hosted.status() for name, hosted in self._house.storages.items() if may_read(name)}
        payload = json.dumps(status).encode("ascii")
        self._write(len(payload).to_bytes(4, "big") + payload)
        self.drop("")

    def _hand_over(self) -> None:
        grant = self._house.streams.redeem(self._connection.token)
        if grant is None:
            self.drop("what it wants to open a blob connection with is not good, or no longer")
        elif grant.encrypted and not self._encrypted:
            self.drop("its blob connection is not encrypted, as the connection that it belongs to is")
        elif not self._closed:
            self._wire.hand_over(grant)
            self._closed = True

    def open_blob_connection(self) -> bytes:
        """What the client is to open one with."""
        return self._house.streams.token(self.grant)

    # Work in threads ------------------------------------------------------------------------------

    def _run_slow(self, message_id: MessageId, one_way: bool, name: str, slow: Slow) -> None:
        if self._slow >= limits.SLOW_REQUESTS_PER_CONNECTION:
            problem = InvalidCall(f"{name}: {self._slow} requests of this connection are under way")
            self._failed(message_id, one_way, name, (), problem)
            return
        self._slow += 1

        def done(value: Any, problem: BaseException | None) -> None:
            self._slow -= 1
            self._slow_at_once -= 1
            self._begin_slow()
            if self._closed:
                if not self._slow:
                    self.iterators.close()
            elif isinstance(problem, Exception):
                self._failed(message_id, one_way, name, (), problem)
            elif not one_way:
                self._reply(message_id, name, value)

        self._slow_waiting.append((slow.work, done))
        self._begin_slow()

    def _begin_slow(self) -> None:
        """Not all of them at once: others' are to find a thread, too."""
        while self._slow_waiting and self._slow_at_once < limits.SLOW_REQUESTS_AT_ONCE:
            self._slow_at_once += 1
            self.hosted.run_reading(*self._slow_waiting.popleft())

    def _read_ended(
        self, call: tuple[MessageId, bool, str], value: Any, problem: Exception | None, was_full: bool
    ) -> None:
        message_id, one_way, name = call
        if self._closed:
            return
        if problem is not None:
            self._failed(message_id, one_way, name, (), problem)
        elif not one_way:
            self._reply(message_id, name, value)
        if was_full and not self._closed:
            self._wire.read_on()
            self._go_on()

    # Blobs ----------------------------------------------------------------------------------------

    @property
    def has_uploads(self) -> bool:
        return self._uploads is not None

    @property
    def uploads(self) -> Uploads:
        if self._uploads is None:
            self._uploads = Uploads(self, self._wire.stop_reading, self._read_on)
        return self._uploads

    def _read_on(self) -> None:
        if not self._closed:
            self._wire.read_on()

    def vote_after_uploads(self, id: Any) -> None:
        def vote() -> None:
            try:
                self.hosted.vote(self, id)
            except StorageError as problem:
                self._refuse(id, problem)

        self.uploads.before_vote(id, vote)

    def abort_uploads(self, id: Any) -> None:
        if self.uploads.forget(id):
            self._refuse(id, StorageTransactionError("the transaction was aborted before it was voted on"))

    def _download(self, message_id: MessageId, one_way: bool, wanted: Download) -> None:
        hosted, oid, serial = self.hosted, wanted.oid, wanted.serial
        if self._downloads.full:
            problem = InvalidCall("sendBlob: too many blobs of this connection wait to be sent")
            self._failed(message_id, one_way, "sendBlob", (), problem)
            return

        def ended(problem: BaseException | None) -> None:
            if isinstance(problem, Exception):
                self._failed(message_id, one_way, "sendBlob", (), problem)
            elif not one_way:
                self._reply(message_id, "sendBlob", None)

        opener = partial(hosted.visible.open_blob, oid, serial)
        self._downloads.begin(hosted.run_with_blobs, opener, oid, serial, ended)

    def _pack(self, message_id: MessageId, one_way: bool, pack: Pack) -> None:
        hosted = self.hosted
        refusal: Exception | None = None
        if self.read_only or hosted.read_only:
            refusal = ReadOnlyError()
        elif hosted.packing:
            refusal = StorageError("a pack of this storage is under way")
        if refusal is not None:
            self._failed(message_id, one_way, "pack", (), refusal)
            return
        log.info("%s packs storage %r", self.label, hosted.name)
        answer_later = pack.wait and not one_way

        def done(problem: BaseException | None) -> None:
            self.authority.tell(
                Event.PACKED, pack_time=pack.time, problem=None if problem is None else str(problem)
            )
            if problem is None:
                log.info("%s has packed storage %r", self.label, hosted.name)
            elif isinstance(problem, PackCancelled):
                log.info("the pack of storage %r was cancelled", hosted.name)
                problem = StorageError(str(problem))  # which stock clients know
            else:
                log.error("%s could not pack storage %r: %s", self.label, hosted.name, problem)
            if answer_later and not self._closed:
                if isinstance(problem, Exception):
                    self._fault(message_id, problem)
                else:
                    self._reply(message_id, "pack", None)

        self._house.pack(hosted, pack.time, done)
        if not answer_later and not one_way:
            self._reply(message_id, "pack", None)

    def _ask_outcome(self, message_id: MessageId, one_way: bool, asked: Outcome) -> None:
        def decided(tid: bytes | None) -> None:
            if not self._closed and not one_way:
                self._reply(message_id, "outcome", tid)

        try:
            self.hosted.outcome(asked.id, asked.after, decided)
        except StorageError as problem:
            self._failed(message_id, one_way, "outcome", (), problem)

    # What goes out --------------------------------------------------------------------------------

    def _await_answer(self, id: Any, message_id: MessageId) -> None:
        """The reply to this call about transaction *id* will come from the hosted storage."""
        if id in self._awaited:
            raise StorageTransactionError("an earlier call about this transaction has no answer yet")
        self._awaited[id] = message_id

    def _withdraw(self, message_id: MessageId) -> None:
        self._awaited = {id: waiting for id, waiting in self._awaited.items() if waiting != message_id}

    def answer(self, transaction: Transaction, value: Any) -> None:
        message_id = self._awaited.pop(transaction.id, None)
        if message_id is not None and not self._closed:
            self._reply(message_id, "vote", value)
        if transaction.state is _FINISHING:
            self.grant.over(transaction.id)
            self.authority.committed(transaction.id, value)

    def refuse(self, transaction: Transaction, problem: Exception) -> None:
        self._refuse(transaction.id, problem)

    def _refuse(self, id: Any, problem: Exception) -> None:
        message_id = self._awaited.pop(id, None)
        if message_id is not None and not self._closed:
            self._failed(message_id, False, "vote", (), problem)
        self.over(id)

    def over(self, id: Any) -> None:
        """A transaction is over, and is not committed."""
        self.grant.over(id)
        self.authority.over(id)

    def tell(self, announcement: Announcement) -> None:
        if self._closed:
            return
        coding = self._connection.protocol
        data = announcement.encoded.get(coding)
        if data is None:
            data = self._connection.call(announcement.name, *announcement.args)
            announcement.encoded[coding] = data
        self._write(data)

    def hold(self) -> None:
        """Gather what is written from now on, until `let_go`."""
        if self._gathered is None and not self._closed:
            self._gathered = []
            self._held = True

    def let_go(self) -> None:
        if self._held:
            self._held = False
            self._flush()

    def _flush(self) -> None:
        gathered, self._gathered, self._gathered_bytes = self._gathered, None, 0
        if gathered and not self._closed:
            self._send(b"".join(gathered))

    def _reply(self, message_id: MessageId, name: str, value: Any) -> None:
        try:
            data = self._connection.reply(message_id, value)
        except UnsendableValue as problem:
            self._failed(message_id, False, name, (), InvalidCall(f"{name}: {problem}"))
        else:
            if len(data) > limits.FRAME_BYTES:
                too_large = StorageError(f"{name}: a reply of {len(data):,} bytes is too large to be sent")
                self._failed(message_id, False, name, (), too_large)
            else:
                self._write(data)

    def _fault(self, message_id: MessageId, problem: Exception) -> None:
        try:
            data = self._connection.fault(message_id, problem)
        except UnsendableValue:
            data = self._connection.fault(message_id, StorageError(ascii(problem)))
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._gathered is None:
            self._send(data)
            return
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes > limits.GATHER_BYTES:
            gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
            self._send(b"".join(gathered))

    def _send(self, data: bytes) -> None:
        """To the wire. If that breaks now, it is this client that is lost: whoever caused it goes on."""
        try:
            self._wire.write(data)
        except Exception as problem:
            self.lost(f"{type(problem).__name__}: {problem}")
            with contextlib.suppress(Exception):
                self._wire.close()

    # The end --------------------------------------------------------------------------------------

    def drop(self, reason: str) -> None:
        """Close the connection after what has been written so far. An empty *reason* is not logged."""
        if self._closed:
            return
        if reason and self.authority.may_tell():
            log.warning("%s dropped: %s", self.label, reason)
        gathered, self._gathered = self._gathered, None
        if gathered:
            self._send(b"".join(gathered))
        if not self._closed:
            self._wire.close()
            self._end()

    def lost(self, reason: str) -> None:
        """The connection is gone."""
        if self._closed:
            return
        if self.registered:
            log.info("%s disconnected%s", self.label, f": {reason}" if reason else "")
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._answers_loads = False
        self._connection.close()
        self._calls.clear()
        self._slow -= len(self._slow_waiting)
        self._slow_waiting.clear()
        if not self._slow:
            self.iterators.close()
        self._downloads.close()
        if self._uploads is not None:
            self._uploads.close()
        if self.registered:
            self._house.admission.places.leave(self._wire)
            self.authority.tell(Event.DISCONNECTED)
            self._house.streams.end(self.grant)
            self.hosted.disconnected(self)
