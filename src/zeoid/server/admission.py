"""Who gets in, and how many: the rules of a server, its places, and what is said of those who are refused.

    a connection   event                                   becomes
    –              is accepted                             a newcomer
    newcomer       others are too many, of its address     closed, if it has been here longest of these
                   or in all
    newcomer       `register`, and there is a place left   settled
                   for its identity, and in all
    newcomer       `register`, and there is none           told so, and closed
    any            it ends                                 –

A newcomer is closed for another one, rather than the other one refused: whoever means to come in is through
in a moment, whoever only takes up room is oldest. So a flood of half-open connections keeps nobody out.

Addresses count without their ports, and those of IPv6 by their first 64 bits: who has one has all the others.

Owns the counts. Must not know sockets, nor how somebody proves who they are.
"""

import hashlib
import ipaddress
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from zeoid import limits
from zeoid.errors import Crowded
from zeoid.security import audit
from zeoid.security.audit import Event
from zeoid.security.identity import Peer
from zeoid.security.roles import Policy

if TYPE_CHECKING:
    from zeoid.server.hosted import Hosted

log = logging.getLogger("zeoid.server")


def host_of(where: str) -> str:
    """What counts as one address: of `192.0.2.7:51234`, `[2001:db8::1]:51234`, or a local client."""
    host = where.rpartition(":")[0] or where
    if host.startswith("["):
        try:
            address = ipaddress.IPv6Address(host.strip("[]").partition("%")[0])
        except ValueError:
            return host
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if not address.is_loopback:
            return str(ipaddress.IPv6Network((address, 64), strict=False))
    return host


class Told:
    """How often something is told of those who are refused: nobody can fill a log.

    So many lines a minute of one connection, of one address, and of all together; after that, how many more
    there were.
    """

    def __init__(
        self,
        monotonic: Callable[[], float],
        *,
        per_address: int = limits.REFUSALS_TOLD_PER_ADDRESS,
        of_all: int = limits.REFUSALS_TOLD,
        addresses: int = limits.REFUSALS_ADDRESSES,
    ) -> None:
        self._monotonic = monotonic
        self._per_address = per_address
        self._of_all = of_all
        self._addresses = addresses
        self._since_s = monotonic()
        #: Another number when counting begins anew.
        self.minute = 0
        #: Of each address, what was told, and what was not.
        self._told: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()

    def may(self, where: str, lines_before: int = 0) -> bool:
        """Whether one more line may be written of what is at this address. It counts, written or not.

        *lines_before*: of the same connection, in this minute."""
        host = host_of(where)
        if host not in self._untold and len(self._untold) >= self._addresses:
            host = _OTHERS
        may = (
            lines_before < limits.REFUSALS_TOLD_PER_CONNECTION
            and self._told[host] < self._per_address
            and self._told.total() < self._of_all
        )
        (self._told if may else self._untold)[host] += 1
        return may

    def more(self) -> tuple[int, str, int] | None:
        """To be asked now and then: once a minute, how many were not told, most of which address, how many.

        None if it is not time, or there are none.
        """
        if self._monotonic() - self._since_s < limits.REFUSALS_MINUTE_S:
            return None
        self._since_s = self._monotonic()
        self.minute += 1
        untold = self._untold
        self._told, self._untold = Counter(), Counter()
        if not untold:
            return None
        ((host, count),) = untold.most_common(1)
        return untold.total(), host, count


#: In the place of an address.
_OTHERS = "other addresses"


class Places:
    """The connections of a server: how many there may be. They are whatever the caller has for one."""

    def __init__(
        self,
        *,
        most: int = limits.CONNECTIONS,
        each: int = limits.CONNECTIONS_PER_IDENTITY,
        newcomers: int = limits.NEWCOMERS,
        newcomers_each: int = limits.NEWCOMERS_PER_ADDRESS,
    ) -> None:
        self._most = most
        self._each = each
        self._newcomers_most = newcomers
        self._newcomers_each = newcomers_each
        #: By the time at which they came.
        self._newcomers: dict[object, str] = {}
        self._newcomers_of: dict[str, dict[object, None]] = {}
        self._settled: dict[object, str] = {}
        self._settled_of: Counter[str] = Counter()

    def come(self, connection: object, where: str) -> object | None:
        """It was accepted. The newcomer that has to go for it, if there are too many."""
        host = host_of(where)
        self._newcomers[connection] = host
        of_host = self._newcomers_of.setdefault(host, {})
        of_host[connection] = None
        if len(of_host) > self._newcomers_each:
            return next(iter(of_host))
        if len(self._newcomers) > self._newcomers_most:
            return next(iter(self._newcomers))
        return None

    def settle(self, connection: object, who: str) -> None:
        """It registers, as *who*: a name, or an address where there is none. Crowded if there is no place."""
        if len(self._settled) >= self._most:
            raise Crowded(f"this server has {self._most:,} connections, and takes no more")
        if self._settled_of[who] >= self._each:
            raise Crowded(f"{who} has {self._each:,} connections, and may have no more")
        self._leave_newcomers(connection)
        self._settled[connection] = who
        self._settled_of[who] += 1

    def leave(self, connection: object) -> None:
        """It has ended. Without effect if it has left already."""
        self._leave_newcomers(connection)
        who = self._settled.pop(connection, None)
        if who is not None:
            self._settled_of[who] -= 1
            if not self._settled_of[who]:
                del self._settled_of[who]

    def who(self, connection: object) -> str:
        """Whose connection it is, as it was settled; before that its address."""
        return self._settled.get(connection) or self._newcomers.get(connection, "")

    def _leave_newcomers(self, connection: object) -> None:
        host = self._newcomers.pop(connection, None)
        if host is not None:
            of_host = self._newcomers_of[host]
            del of_host[connection]
            if not of_host:
                del self._newcomers_of[host]


class Admission:
    """All of a server: the rules, its places, and who failed to get in."""

    def __init__(
        self,
        policy: Policy,
        monotonic: Callable[[], float],
        *,
        places: Places | None = None,
        per_address: int = limits.FAILED_LOGINS_PER_MINUTE,
        of_all: int = limits.FAILED_LOGINS_OF_ALL_PER_MINUTE,
        addresses: int = limits.FAILED_LOGIN_ADDRESSES,
    ) -> None:
        self.policy = policy
        self.places = places or Places()
        #: What may be written to the log, and to the audit log.
        self.told = Told(monotonic)
        self.audited = Told(monotonic)
        self._monotonic = monotonic
        self._per_address = per_address
        self._of_all = of_all
        self._addresses = addresses
        self._minute = 0
        self._failures = 0
        #: What was shown in vain. A program that shows one and the same again and again is no guesser, and
        #: does not lock out others on its host.
        self._shown: dict[str, set[bytes]] = {}

    def tick(self, storages: "Mapping[str, Hosted]") -> None:
        """To be called now and then: sessions end that came in with other rights than they have by now."""
        if self.policy.look():
            for session in [session for hosted in storages.values() for session in hosted.clients]:
                session.recheck()
        if more := self.told.more():
            count, host, of_host = more
            log.warning(
                "%s more refusals were not logged one by one; %s had most of all, %s", count, host, of_host
            )
        if more := self.audited.more():
            count, host, of_host = more
            audit.tell(Event.REFUSED_MORE, Peer(host), count=count, of_where=of_host)

    def is_refused(self, where: str) -> bool:
        """Whether what is at this address has failed too often to be heard at this time."""
        minute = int(self._monotonic() // 60)
        if minute != self._minute:
            self._minute, self._failures = minute, 0
            self._shown.clear()
        failed = len(self._shown.get(host_of(where), ()))
        return failed >= (self._per_address if self._failures < self._of_all else 1)

    def failed(self, where: str, token: str) -> None:
        """To be called after `is_refused`."""
        host = host_of(where)
        shown = self._shown.get(host)
        if shown is None:
            while len(self._shown) >= self._addresses:
                del self._shown[next(iter(self._shown))]
            shown = self._shown[host] = set()
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        if digest not in shown:
            shown.add(digest)
            self._failures += 1
