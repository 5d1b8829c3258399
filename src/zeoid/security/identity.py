"""Who is at the other end of a connection, as far as the connection itself tells.

Owns these values only. How a certificate is checked is `tls`' business, what somebody may do is `roles`'.
"""

from typing import Final

from zeoid import limits
from zeoid.model import frozen

#: Where whoever connects to a unix socket is.
LOCAL: Final = "local client"


def printable(name: str) -> str:
    """A name that others have chosen, as it may stand in a line of a log."""
    return "".join(c if c.isprintable() else "?" for c in name[: limits.AUDIT_CHARACTERS])


@frozen
class Peer:
    """The other end of a connection that was accepted."""

    #: Its address, for logs and for people.
    where: str
    #: Whether nobody but those who may do everything can be there: a unix socket or a loopback address
    #: without TLS, or any address that was opened with `--insecure`.
    trusted: bool = True
    #: Whether what it says is encrypted.
    encrypted: bool = False
    #: Its certificate in DER, verified. None if it has shown none.
    certificate: bytes | None = None

    @property
    def is_private(self) -> bool:
        """Whether nobody in between can read what it says."""
        return self.encrypted or self.where == LOCAL
