"""One transaction of a client on its way to the server, from tpc_begin to tpc_finish or tpc_abort.

Its one-way messages (begin, store …) are gathered and sent in one write, in front of the vote at the latest,
so that a small transaction takes two round trips. It belongs to one connection: when that is lost, the
transaction fails, whatever connection comes next.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from ZODB.POSException import ConflictError, POSError

from zeoid import limits
from zeoid.client.channel import Channel
from zeoid.errors import ClientError, Disconnected, OutcomeUnknown, ServerError, TimedOut
from zeoid.wire.messages import DATA, OID, TID

#: (oid, committed serial, serial that was read, new data) → resolved data, or ConflictError
Resolve = Callable[[bytes, bytes, bytes, bytes], bytes]


class Commit:
    """See the module. *number* is the transaction's id on the wire."""

    def __init__(self, transaction: Any, number: int, channel: Channel, timeout_s: float) -> None:
        self.transaction = transaction
        self.channel = channel
        self._number = number
        self._timeout_s = timeout_s
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._sent = False
        #: What the transaction writes; None where the server knows the data better than we do.
        self.written: dict[bytes, bytes | None] = {}

    def add(self, name: str, *args: Any) -> None:
        """A one-way message about this transaction, whose id is the last argument."""
        self._check_alive()
        message = self.channel.encode_one_way(name, (*args, self._number))
        if len(message) > limits.FRAME_BYTES:
            size = f"a message of {len(message):,} bytes; the limit is {limits.FRAME_BYTES:,}"
            raise ClientError(f"{name}: {size}")
        self._append(message)

    def begin(self, user: Any, description: Any, extension: Any, tid: bytes | None, status: str) -> None:
        args = (self._number, user, description, extension, tid, status)
        self._append(self.channel.encode_one_way("tpc_begin", args))

    def _append(self, message: bytes) -> None:
        self._gathered.append(message)
        self._gathered_bytes += len(message)
        if self._gathered_bytes > limits.GATHER_BYTES:
            self._sent = True
            self.channel.send(self._take_gathered(), self._timeout_s)

    def _take_gathered(self) -> bytes:
        gathered = b"".join(self._gathered)
        self._gathered.clear()
        self._gathered_bytes = 0
        return gathered

    def _check_alive(self) -> None:
        if not self.channel.alive:
            raise Disconnected("the connection was lost during this transaction; begin it again")

    def vote(self, resolve: Resolve) -> list[bytes]:
        """Prepare it. The oids whose data is another than was stored, by resolution or undo.

        ConflictError when a conflict can't be resolved.
        """
        changed: dict[bytes, None] = {}
        for _ in range(limits.RESOLUTION_ROUNDS):
            conflicts = False
            for answer in self._vote():
                if isinstance(answer, dict):
                    conflicts = True
                    oid = answer["oid"]
                    committed, read = answer["serials"]
                    data = resolve(oid, committed, read, answer["data"])
                    self.add("storea", oid, committed, data)
                else:
                    oid = answer
                changed[oid] = None
                self.written[oid] = None
            if not conflicts:
                return list(changed)
        raise ConflictError(f"still in conflict after {limits.RESOLUTION_ROUNDS} rounds", oid=oid)

    def _vote(self) -> Sequence[Any]:
        self._check_alive()
        self._sent = True
        gathered = self._take_gathered()
        answers: Any = self.channel.call("vote", (self._number,), self._timeout_s, before=gathered) or ()
        if type(answers) not in (list, tuple) or not all(map(_is_answer, answers)):
            raise ServerError("the server answered the vote with what is no list of objects")
        checked: Sequence[Any] = answers
        return checked

    def finish(self, applied: Callable[[bytes], None]) -> bytes:
        """Commit it. *applied* gets the tid in the order of the server's stream.

        OutcomeUnknown when the connection is lost before the reply came.
        """

        def hook(_: Any, tid: Any) -> bytes:
            if type(tid) is not bytes or len(tid) != 8:
                raise ServerError("the server did not commit the transaction, and did not say why")
            applied(tid)
            return tid

        self._check_alive()
        try:
            tid: bytes = self.channel.call("tpc_finish", (self._number,), self._timeout_s, hook=hook)
        except TimedOut as problem:
            # The reply must not be missed if it comes: everything is verified anew.
            self.channel.close(problem)
            raise OutcomeUnknown(f"the transaction may or may not be committed: {problem}") from None
        except Disconnected as problem:
            raise OutcomeUnknown(f"the transaction may or may not be committed: {problem}") from None
        except POSError:
            raise  # the server's answer
        except BaseException:
            # Interrupted: if the reply comes nobody will apply it, and nobody else tells us what we wrote.
            self.channel.close(Disconnected("a thread was interrupted while it finished a transaction"))
            raise
        return tid

    def abort(self) -> None:
        """Forget it. The server forgets it by itself when the connection is lost."""
        if self._sent and self.channel.alive:
            with contextlib.suppress(Disconnected):
                self.channel.send(self.channel.encode_one_way("tpc_abort", (self._number,)), self._timeout_s)


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
