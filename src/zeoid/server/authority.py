"""What the peer of a session may do: who it is, which calls that leaves, and what the audit log hears of it.

    a session's peer   event                                  becomes
    nobody             shows a token that is good             known
    nobody             calls anything else                    told so, and dropped
    nobody, known      shows a token that is no good          told so, and dropped
    known              `register`, and it may read there      registered, with the calls of its role
    registered         other rights follow from the rules     dropped: it may come back, and has those then

`handlers` has the calls for each set of rights, made once: a session looks up a call in a table that has
refusals in the place of what it may not do, so what it may do takes no longer for that.

Who fails to get in is counted by `admission`. Must not know where rights come from, nor what a method does.
"""

import base64
import binascii
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from zeoid import limits
from zeoid.errors import Forbidden, InvalidCall
from zeoid.security import audit
from zeoid.security.audit import Event
from zeoid.security.identity import Peer, printable
from zeoid.security.roles import EVERYTHING, NOBODY, NOTHING
from zeoid.server.admission import Admission, host_of
from zeoid.server.methods import ANSWERED_LATER, METHODS
from zeoid.wire.messages import SERVER_METHODS, Access, Method, Phase

if TYPE_CHECKING:
    from zeoid.server.session import Session

#: The check of a call's arguments, what carries it out, whether it needs register, and whether its answer
#: comes later.
Handler = tuple[Callable[[Any], tuple[Any, ...]], Callable[..., Any], bool, bool]


@functools.cache
def handlers(granted: frozenset[Access] | None) -> Mapping[str, Handler]:
    """What carries out each method for whoever has these rights. None: for nobody, who may say who it is."""
    table: dict[str, Handler] = {}
    for name, method in SERVER_METHODS.items():
        after_register = method.phase is Phase.REGISTERED
        if method.access is None:
            # What needs nothing is for those who are not registered yet. So no oversight opens a method.
            allowed = not after_register
        else:
            allowed = granted is not None and method.access in granted
        if allowed:
            table[name] = method.check, METHODS[name], after_register, name in ANSWERED_LATER
        else:
            table[name] = _unchecked, functools.partial(_refuse, method), granted is not None, False
    return table


def _unchecked(args: Any) -> tuple[Any, ...]:
    """Whoever may not call a method is not told what is wrong with the arguments."""
    return ()


def _refuse(method: Method, session: "Session") -> None:
    raise session.authority.refusal(method)


class Authority:
    """The peer of one session."""

    def __init__(self, admission: Admission, peer: Peer) -> None:
        self.peer = peer
        self._admission = admission
        self.identity = admission.policy.identify(peer)
        self.granted: frozenset[Access] = NOTHING
        self._storage: str | None = None
        #: What was asked to be told of it, in this minute.
        self._lines = 0
        self._minute = 0
        #: What transactions that are under way undo.
        self._undone: dict[Hashable, list[bytes]] = {}

    @property
    def told(self) -> str:
        """Who it is, for the log."""
        name = printable(self.identity.name)
        return f"{name} at {self.peer.where}" if name else self.peer.where

    @property
    def key(self) -> str:
        """Whose its connections are, where they are counted: its name's, or its address's if it has none."""
        return self.identity.name or host_of(self.peer.where)

    @property
    def handlers(self) -> Mapping[str, Handler]:
        if self._storage is not None:
            return handlers(self.granted)
        return handlers(None if self.identity is NOBODY else EVERYTHING)

    def refusal(self, method: Method) -> Forbidden:
        if self.identity is NOBODY or self._storage is None or method.access is None:
            return Forbidden(f"{method.name}: this server wants a certificate or a token first")
        return Forbidden(
            f"{method.name} needs the role {method.access.value}; {self.identity.told(self._storage)}"
        )

    # Getting in -----------------------------------------------------------------------------------

    def authenticate(self, token: str) -> str:
        """The name that the token has. Forbidden if it is no good, or was said where others hear it."""
        where = self.peer.where
        if not self.peer.is_private:
            raise Forbidden("a token must not be sent in the clear. Others may have read it: revoke it")
        if self._admission.is_refused(where):
            raise Forbidden("too many tokens from this address were no good: wait a minute")
        try:
            self.identity = self._admission.policy.identify(self.peer, token)
        except Forbidden:
            self._admission.failed(where, token)
            raise
        self.tell(Event.AUTHENTICATED)
        return self.identity.name

    def enter(self, storage: str, names: Mapping[str, object]) -> frozenset[Access]:
        """What may be done with a storage. InvalidCall if that is nothing, or if there is none.

        Both in the same words: who may not read a storage does not learn that there is one.
        """
        self.identity = self._admission.policy.renew(self.peer, self.identity)
        granted = self.identity.may(storage)
        if storage in names and Access.READ in granted:
            return granted
        if granted == EVERYTHING:
            known = ", ".join(map(repr, sorted(names)))
            raise InvalidCall(f"unknown storage: {storage[:100]!r}; this server has {known}")
        readable = sorted(name for name in names if Access.READ in self.identity.may(name))
        known = ", ".join(map(repr, readable)) or "none"
        who = printable(self.identity.name) or "this client"
        self.tell(Event.REFUSED, storage=storage, reason="there is no such storage, or it may not be read")
        raise InvalidCall(f"unknown storage: {storage[:100]!r}; {who} may use {known}")

    def entered(self, storage: str, granted: frozenset[Access], *, read_only: bool) -> None:
        self._storage = storage
        self.granted = granted
        self.tell(Event.CONNECTED, access="read" if read_only else "write")

    def may_tell(self) -> bool:
        """Whether the server's log may have another line about what is wrong with it."""
        told = self._admission.told
        if told.minute != self._minute:
            self._minute, self._lines = told.minute, 0
        self._lines += 1
        return told.may(self.peer.where, self._lines - 1)

    def may_read(self, storage: str) -> bool:
        return Access.READ in self.identity.may(storage)

    @property
    def has_changed(self) -> bool:
        """Whether the rules that hold now give other rights than those it came in with."""
        if self._storage is None:
            return False
        return self._admission.policy.renew(self.peer, self.identity).may(self._storage) != self.granted

    # What the audit log hears ---------------------------------------------------------------------

    def tell(self, event: Event, **details: Any) -> None:
        if event is Event.REFUSED and not self._admission.audited.may(self.peer.where):
            return
        if self._storage is not None:
            details = {"storage": self._storage, **details}
        audit.tell(event, self.peer, self.identity, **details)

    def undoes(self, id: Hashable, transaction_id: bytes) -> None:
        """A transaction has an undo of another, which counts when it is committed."""
        of_id = self._undone.setdefault(id, [])
        if len(of_id) < limits.AUDIT_ENTRIES:
            of_id.append(transaction_id)

    def committed(self, id: Hashable, tid: object) -> None:
        undone = self._undone.pop(id, None)
        if undone:
            self.tell(Event.UNDID, tid=tid, undone=[_tid_of(each) for each in undone])

    def over(self, id: Hashable) -> None:
        """A transaction was given up."""
        self._undone.pop(id, None)


def _tid_of(transaction_id: bytes) -> bytes:
    """The tid in what the undo log calls a transaction, which FileStorage writes in base64."""
    try:
        tid = base64.b64decode(transaction_id + b"=", validate=False)
    except (binascii.Error, ValueError):
        return transaction_id
    return tid if len(tid) == 8 else transaction_id
