"""One transaction of a client on its way to the server, from tpc_begin to tpc_finish or tpc_abort.

Owns what is sent for it and when, and what became of it. A `Commit` is the transaction; how it is put to the
server is one of two ways, which have the same methods:

 - `Stock`: ZEO's one-way messages (begin, store …), gathered and sent in front of the vote at the latest.
 - `Extended`: the operations themselves are gathered, and go with the vote in one message, `tpc_prepare`. The
   transaction has an id that is unique in the world, so that its outcome can be asked for.

Either way a small transaction takes two round trips. It belongs to one connection: when that is lost, the
transaction fails, whatever connection comes next. Only what became of it is asked of the next one:

    the connection is lost        outcome         the committer gets
    before tpc_finish             not asked       Disconnected: it is not committed
    while tpc_finish is awaited   a tid           the tid: it is committed
    while tpc_finish is awaited   None            Disconnected: it is not committed, and never will be
    while tpc_finish is awaited   can't be had    OutcomeUnknown
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ZODB.POSException import ConflictError, POSError, UndoError, Unsupported

from zeoid import limits
from zeoid.client.attachments import Attachments, BlobFile
from zeoid.client.channel import Channel
from zeoid.client.streams import Streams
from zeoid.client.transfers import upload
from zeoid.errors import ClientError, Disconnected, OutcomeUnknown, ServerError, TimedOut, UnsendableValue
from zeoid.wire.messages import ATTACH, CHECK_CURRENT, DATA, DELETE, OID, RESTORE, STORE, TID, UNDO

#: (oid, committed serial, serial that was read, new data) → resolved data, or ConflictError
Resolve = Callable[[bytes, bytes, bytes, bytes], bytes]
#: Gets the tid, in the order of the server's stream.
Applied = Callable[[bytes], None]
#: (kind, oid, serial, data, same_as), as `tpc_prepare` takes them
Operation = tuple[int, bytes | None, bytes | None, bytes | None, bytes | None]
#: (user, description, extension, tid, status)
Beginning = tuple[Any, Any, dict[str, Any], bytes | None, str]

_STOCK_NAMES = {
    STORE: "storea",
    RESTORE: "restorea",
    DELETE: "deleteObject",
    CHECK_CURRENT: "checkCurrentSerialInTransaction",
    UNDO: "undoa",
}
#: What an operation takes in a message besides its data.
_OPERATION_BYTES = 40
#: What a user wrote about a transaction is told with an error up to this length.
_TOLD_CHARACTERS = 200


class _Way:
    """What both ways of putting a transaction to the server have in common."""

    #: Whether the server has no blobs any more after a vote that met conflicts.
    loses_blobs = False

    def __init__(self, id: Any, channel: Channel, timeout_s: float) -> None:
        #: The transaction's id on the wire.
        self.id = id
        self.channel = channel
        self.timeout_s = timeout_s
        #: Whether the server may have heard of it.
        self.sent = False
        self._gathered_bytes = 0

    def begin(self, beginning: Beginning) -> None:
        raise NotImplementedError

    def add(self, operation: Operation) -> None:
        """Gather it. What can't be sent is refused at once, and the transaction is no worse for it."""
        raise NotImplementedError

    def vote(self) -> Any:
        """Send what was gathered, and ask for the vote; its answers."""
        raise NotImplementedError

    def attach(self, oid: bytes, serial: bytes | None, data: bytes, file: BlobFile) -> None:
        """Send the blob of an object that was stored: now, so that whoever stores it hears of a failure."""
        before = self._take_gathered()
        self.sent = True
        if file.shared_name is None:
            upload(self.channel, file.path, (oid, serial, data, self.id), self.timeout_s, before)
        else:
            args = oid, serial, data, file.shared_name, self.id
            self.channel.send(before + self.channel.encode_one_way("storeBlobShared", args), self.timeout_s)

    def _take_gathered(self) -> bytes:
        """The messages that were not sent yet; they count as sent from now on."""
        raise NotImplementedError

    def _check_size(self, what: str, message: bytes) -> None:
        if len(message) > limits.FRAME_BYTES:
            size = f"a message of {len(message):,} bytes; the limit is {limits.FRAME_BYTES:,}"
            raise ClientError(f"{what}: {size}")


class Stock(_Way):
    """As every ZEO server understands it: a one-way message for each operation."""

    #: It puts them into the storage at the first vote, whatever comes of that.
    loses_blobs = True

    def __init__(self, id: int, channel: Channel, timeout_s: float) -> None:
        super().__init__(id, channel, timeout_s)
        self._gathered: list[bytes] = []

    def begin(self, beginning: Beginning) -> None:
        self._append(self.channel.encode_one_way("tpc_begin", (self.id, *beginning)))

    def add(self, operation: Operation) -> None:
        kind, oid, serial, data, same_as = operation
        name = _STOCK_NAMES[kind]
        args: tuple[Any, ...]
        if kind == STORE:
            args = oid, serial, data, self.id
        elif kind == RESTORE:
            args = oid, serial, data, same_as, self.id
        elif kind == UNDO:
            args = data, self.id
        else:
            args = oid, serial, self.id
        message = self.channel.encode_one_way(name, args)
        self._check_size(name, message)
        self._append(message)

    def _append(self, message: bytes) -> None:
        self._gathered.append(message)
        self._gathered_bytes += len(message)
        if self._gathered_bytes > limits.GATHER_BYTES:
            self.sent = True
            self.channel.send(self._take_gathered(), self.timeout_s)

    def _take_gathered(self) -> bytes:
        gathered = b"".join(self._gathered)
        self._gathered.clear()
        self._gathered_bytes = 0
        return gathered

    def vote(self) -> Any:
        self.sent = True
        return self.channel.call("vote", (self.id,), self.timeout_s, before=self._take_gathered())


class Extended(_Way):
    """As a server understands it that has `tpc_prepare`: all operations with the vote, in one message."""

    def __init__(self, id: bytes, channel: Channel, timeout_s: float, streams: Streams | None = None) -> None:
        super().__init__(id, channel, timeout_s)
        self._streams = streams
        self._beginning: Beginning | None = None
        self._operations: list[Operation] = []

    def begin(self, beginning: Beginning) -> None:
        if beginning[2]:
            # It holds whatever an application put there. If that can't be sent, now is the time to say so.
            self.channel.encode_one_way("tpc_operate", (self.id, beginning, ()))
        self._beginning = beginning

    def add(self, operation: Operation) -> None:
        data = operation[3]
        size_bytes = _OPERATION_BYTES
        if data is not None:
            if type(data) is not bytes:
                raise UnsendableValue(f"the data of a record must be bytes, not a {type(data).__qualname__}")
            size_bytes += len(data)
        most_bytes = min(limits.GATHER_BYTES, limits.FRAME_BYTES)
        if self._gathered_bytes + size_bytes > most_bytes and self._operations:
            self._send_piece()
        self._operations.append(operation)
        self._gathered_bytes += size_bytes
        if size_bytes > most_bytes:
            # It goes alone, and at once: if it is too large for a message its caller is told.
            try:
                self._send_piece()
            except BaseException:
                self._operations.clear()
                self._gathered_bytes = 0
                raise

    def _send_piece(self) -> None:
        """Send what was gathered, ahead of the vote."""
        message = self._piece()
        self.sent = True
        self.channel.send(message, self.timeout_s)
        self._was_sent()

    def _piece(self) -> bytes:
        message = self.channel.encode_one_way("tpc_operate", self._args())
        self._check_size("the operation", message)
        return message

    def _take_gathered(self) -> bytes:
        if self._beginning is None and not self._operations:
            return b""
        message = self._piece()
        self._was_sent()
        return message

    def _args(self) -> tuple[bytes, Beginning | None, list[Operation]]:
        return self.id, self._beginning, self._operations

    def attach(self, oid: bytes, serial: bytes | None, data: bytes, file: BlobFile) -> None:
        self.sent = True
        if self._streams and (name := self._streams.send(self.channel, self.id, file.path)):
            self.add((ATTACH, oid, None, name, None))
        else:
            super().attach(oid, serial, data, file)

    def _was_sent(self) -> None:
        self._beginning = None
        self._operations.clear()
        self._gathered_bytes = 0

    def vote(self) -> Any:
        self.sent = True
        answers = self.channel.call("tpc_prepare", self._args(), self.timeout_s)
        self._was_sent()
        return answers


class Commit:
    """See the module. *after*: the last tid that was known when it began; *label*: the client's name."""

    def __init__(self, transaction: Any, way: Stock | Extended, after: bytes, label: str = "") -> None:
        self.transaction = transaction
        self._way = way
        self._after = after
        self._label = label
        self._undoes = False
        #: What the transaction writes; None where the server knows the data better than we do.
        self.written: dict[bytes, bytes | None] = {}
        self.blobs = Attachments(way.attach)

    def begin(self, tid: bytes | None, status: str) -> None:
        of = self.transaction
        self._way.begin((of.user, of.description, dict(of.extension), tid, status))

    def operate(
        self,
        kind: int,
        oid: bytes | None,
        serial: bytes | None,
        data: bytes | None = None,
        same_as: bytes | None = None,
    ) -> None:
        """Do this to an object, as part of the transaction."""
        self.check_alive()
        self._way.add((kind, oid, serial, data, same_as))
        if kind == UNDO:
            self._undoes = True
        elif kind != CHECK_CURRENT:
            assert oid is not None
            self.written[oid] = data if kind == STORE else None

    def store_blob(self, operation: Operation, file: BlobFile, filename: str) -> None:
        """Store or restore an object with the blob in *filename*, which becomes *file*, the transaction's."""
        if operation[0] == RESTORE and not isinstance(self._way, Extended):
            raise Unsupported(f"{self._way.channel.peer} can't take copies of blobs: ZEO has no way to")
        self.check_alive()
        self.blobs.add(operation, file)
        file.take(filename)
        self.operate(*operation)
        self.blobs.send_last()

    def check_alive(self) -> None:
        """Disconnected if nothing can come of it any more."""
        if not self._way.channel.alive:
            raise Disconnected("the connection was lost during this transaction; begin it again")

    # The vote -------------------------------------------------------------------------------------

    def vote(self, resolve: Resolve) -> list[bytes]:
        """Prepare it. The oids whose data is another than was stored, by resolution or undo.

        When a conflict can't be resolved, UndoError if it comes from an undo, or else ConflictError, which
        says what the transaction was doing.
        """
        try:
            return self._vote(resolve)
        except ConflictError as problem:
            self._explain(problem)
            raise

    def _vote(self, resolve: Resolve) -> list[bytes]:
        stored = frozenset(self.written) if self._undoes else frozenset()
        changed: dict[bytes, None] = {}
        for _ in range(limits.RESOLUTION_ROUNDS):
            conflict: dict[str, Any] = {}
            for answer in self._answers():
                if isinstance(answer, dict):
                    conflict = answer
                    oid = self._resolve(answer, resolve, stored)
                else:
                    oid = answer
                changed[oid] = None
                self.written[oid] = None
            if not conflict:
                return list(changed)
            if self._way.loses_blobs:
                self.blobs.send_again(conflict)
        raise self._unresolved(conflict, stored)

    def _answers(self) -> Sequence[Any]:
        self.check_alive()
        answers: Any = self._way.vote() or ()
        if type(answers) not in (list, tuple) or not all(map(_is_answer, answers)):
            raise ServerError("the server answered the vote with what is no list of objects")
        checked: Sequence[Any] = answers
        return checked

    def _resolve(self, conflict: dict[str, Any], resolve: Resolve, stored: Collection[bytes]) -> bytes:
        oid: bytes = conflict["oid"]
        committed, read = conflict["serials"]
        try:
            data = resolve(oid, committed, read, conflict["data"])
        except ConflictError:
            if self._is_of_undo(oid, stored):
                raise UndoError("it was changed later, and the changes can't be merged", oid) from None
            raise
        self._way.add((STORE, oid, committed, data, None))
        return oid

    def _unresolved(self, conflict: dict[str, Any], stored: Collection[bytes]) -> POSError:
        oid = conflict["oid"]
        text = f"still in conflict after {limits.RESOLUTION_ROUNDS} rounds"
        if self._is_of_undo(oid, stored):
            return UndoError(text, oid)
        return ConflictError(text, oid=oid, serials=tuple(conflict["serials"]))

    def _is_of_undo(self, oid: bytes, stored: Collection[bytes]) -> bool:
        return self._undoes and oid not in stored

    def _explain(self, problem: ConflictError) -> None:
        """Have its text say what the transaction was doing. What it says of the object comes from ZODB."""
        doing = [
            f"{what} {text!r}"
            for what, text in (
                ("user", _told(self.transaction.user)),
                ("transaction", _told(self.transaction.description)),
                ("client", _told(self._label)),
            )
            if text
        ]
        if doing and hasattr(problem, "message"):  # what a server says of a conflict of BTrees has none
            problem.message = ", ".join([problem.message, *doing])

    # The end --------------------------------------------------------------------------------------

    def finish(self, applied: Applied) -> bytes:
        """Commit it. *applied* gets the tid in the order of the server's stream.

        OutcomeUnknown when the connection is lost before the reply came; it is closed then in any case.
        """

        def hook(_: Any, tid: Any) -> bytes:
            if not TID.test(tid):
                raise ServerError("the server did not commit the transaction, and did not say why")
            self.blobs.place(tid)
            applied(tid)
            checked: bytes = tid
            return checked

        self.check_alive()
        channel = self._way.channel
        try:
            tid: bytes = channel.call("tpc_finish", (self._way.id,), self._way.timeout_s, hook=hook)
        except TimedOut as problem:
            # The reply must not be missed if it comes: everything is verified anew.
            channel.close(problem)
            raise OutcomeUnknown(f"the transaction may or may not be committed: {problem}") from None
        except Disconnected as problem:
            raise OutcomeUnknown(f"the transaction may or may not be committed: {problem}") from None
        except POSError:
            raise  # the server's answer
        except BaseException:
            # Interrupted: if the reply comes nobody will apply it, and nobody else tells us what we wrote.
            channel.close(Disconnected("a thread was interrupted while it finished a transaction"))
            raise
        return tid

    def outcome(
        self,
        unknown: OutcomeUnknown,
        repeatedly: Callable[[Callable[[Channel, float], Any]], Any],
        learned: Applied,
    ) -> bytes:
        """The tid after all, though the reply to `finish` was lost: the connections to come are asked for it.

        *repeatedly* does something on the next connection until one answers or it is too late. Disconnected
        when the transaction is not committed; *unknown* when that can't be found out.
        """
        if "outcome" not in self._way.channel.extensions or not isinstance(self._way, Extended):
            raise unknown

        def hook(_: Any, tid: Any) -> Any:
            if tid is not None:
                if not TID.test(tid):
                    raise ServerError("the server answered with what is no outcome")
                self.blobs.place(tid)
                learned(tid)
            return tid

        def ask(channel: Channel, left_s: float) -> Any:
            if "outcome" not in channel.extensions:
                raise ServerError(f"{channel.peer} can't be asked for its outcome")
            return channel.call("outcome", (self._way.id, self._after), left_s, hook=hook)

        try:
            tid: bytes | None = repeatedly(ask)
        except POSError as problem:
            raise OutcomeUnknown(f"{unknown}; then: {problem}") from problem
        if tid is None:
            raise Disconnected(
                "the connection was lost, and the transaction was not committed: begin it anew"
            )
        return tid

    def abort(self) -> None:
        """Forget it. The server forgets it by itself when the connection is lost."""
        way = self._way
        if way.sent and way.channel.alive:
            with contextlib.suppress(Disconnected):
                way.channel.send(way.channel.encode_one_way("tpc_abort", (way.id,)), way.timeout_s)


def _told(text: Any) -> str:
    """*text*, which is an application's, on one line."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    line = " ".join(str(text or "").split())
    return line if len(line) <= _TOLD_CHARACTERS else f"{line[:_TOLD_CHARACTERS]}…"


def _is_answer(answer: Any) -> bool:
    """Whether it is an oid whose data was changed, or a conflict."""
    if type(answer) is not dict:
        return OID.test(answer)
    serials: Any = answer.get("serials")
    return (
        OID.test(answer.get("oid"))
        and type(serials) in (list, tuple)
        and len(serials) == 2
        and all(map(TID.test, serials))
        and DATA.test(answer.get("data"))
    )
