"""Verification: what is known of a database is brought up to a server, when a connection is made.

    the server's last transaction, against ours       what is done
    we know none                                      nothing is known, nothing can be stale
    the same                                          nothing
    newer, and the server tells what was written      that is forgotten
    newer, and it can't tell any more                 what is current is forgotten
    older                                             refused (`Behind`), for a while: it may be late
    older for long, or ours can't be found there      the database was restored: everything is forgotten

"Ours" is our own last tid, or what others have told the object cache that we share with them. Invalidations
that arrive meanwhile are applied afterwards. Owns how long a server may be behind.
"""

import logging
import time
from collections.abc import Sequence

from ZODB.POSException import POSKeyError

from zeoid import limits
from zeoid.addresses import Address
from zeoid.client.channel import Channel
from zeoid.client.view import View
from zeoid.errors import ClientError, PeerError
from zeoid.model import NO_TID, tid_after
from zeoid.wire.messages import CLIENT_METHODS

log = logging.getLogger("zeoid.client")


class Behind(ClientError):
    """The server's last transaction is older than one that this client, or its cache, has seen."""


class Verifier:
    """Verifies one view against whatever servers are found."""

    def __init__(self, view: View, addresses: Sequence[Address], timeout_s: float) -> None:
        self._view = view
        self._address_count = len(set(addresses))
        self._timeout_s = timeout_s
        #: Since when each server is behind.
        self._behind: dict[Address, float] = {}

    def verify(self, channel: Channel, address: Address, server_tid: bytes) -> None:
        """Bring the view up to the server, whose last transaction was *server_tid* when it was registered."""
        view = self._view
        known, witness = view.known()
        if server_tid < known:
            # It was registered while another connection went on, or it is catching up: what about now?
            server_tid = tid_of(channel.call("lastTransaction", (), self._timeout_s))
        if known == NO_TID:
            view.begin(server_tid)
        elif server_tid < known:
            self._refuse_who_is_late(channel, address, server_tid, known)
            log.warning(
                "%s: its last transaction is %s, and %s was seen before. Its database must have been "
                "restored from a back-up: the object cache is emptied",
                channel.peer, server_tid.hex(), known.hex(),
            )  # fmt: skip
            view.restored(server_tid)
        elif not self._has(channel, known, witness):
            log.warning(
                "%s: the transaction %s that was seen before can't be found in its database, which may be "
                "restored from a back-up: the object cache is emptied", channel.peer, known.hex(),
            )  # fmt: skip
            view.restored(server_tid)
        elif server_tid > known:
            self._catch_up(channel, known, server_tid)
        elif view.last_tid() == NO_TID:
            view.begin(server_tid)
        self._behind.clear()

    def _refuse_who_is_late(
        self, channel: Channel, address: Address, server_tid: bytes, known: bytes
    ) -> None:
        """Raise Behind, unless that was done for so long that no server will ever come to where we are.

        A server that gets its transactions from another one may be late. If none is, or one that is not can't
        be reached for long, the database was restored from a back-up: no site may be down because of that.
        """
        now_s = time.monotonic()
        self._behind.setdefault(address, now_s)
        everyone = len(self._behind) == self._address_count
        wait_s = limits.BEHIND_S if everyone else limits.BEHIND_OTHERS_GONE_S
        if now_s - min(self._behind.values()) < wait_s:
            raise Behind(
                f"{channel.peer} is behind: its last transaction is {server_tid.hex()}, and {known.hex()} "
                f"was seen before. If that stays so for {wait_s:g} s its database was restored from a back-up"
            )

    def _has(self, channel: Channel, tid: bytes, oid: bytes | None) -> bool:
        """Whether the server's history is ours up to *tid*, in which *oid* was written, if that is known.

        False also if that revision was packed away since then.
        """
        if oid is None:
            return True
        try:
            revision = channel.call("loadBefore", (oid, tid_after(tid)), self._timeout_s)
        except POSKeyError:
            return False
        return type(revision) is tuple and len(revision) == 3 and revision[1] == tid

    def _catch_up(self, channel: Channel, known: bytes, server_tid: bytes) -> None:
        missed = channel.call("getInvalidations", (known,), self._timeout_s)
        if missed is None:
            log.warning("%s: too much was missed, what the object cache had is forgotten", channel.peer)
            self._view.start_over(server_tid)
        else:
            tid, oids = CLIENT_METHODS["invalidateTransaction"].check(missed)
            self._view.catch_up(known, max(tid, server_tid), oids)


def tid_of(value: object) -> bytes:
    """*value*, which a server gave as its last transaction. PeerError if it is none."""
    if type(value) is not bytes or len(value) != 8:
        raise PeerError("its last transaction is no tid")
    return value
