"""One tree of errors that says whose fault it was: the peer's, the connection's, the user's or the disk's.

What an application meets through ZODB is always one of ZODB's own errors too, so that what retries
ZODB's errors (a publisher, `transaction.attempts`) retries these.
"""

from transaction.interfaces import TransientError
from ZODB.POSException import StorageError


class ZeoidError(Exception):
    """The root of everything that Zeoid raises by itself."""


class PeerError(ZeoidError):
    """The peer sent what the protocol does not allow. The connection can't go on."""


class FrameTooLarge(PeerError):
    """A message's length prefix exceeds the limit; nothing of the message was read."""


class UndecodableMessage(PeerError):
    """A message is no valid M5 or Z5, or holds what a message must not hold."""


class UnknownProtocol(PeerError):
    """The peer speaks another protocol, or another version of it."""


class EncryptionError(PeerError):
    """The other end speaks no TLS, none that will do, or is not who it should be. The message is one line."""


class InvalidCall(ZeoidError):
    """A call that can't be carried out: no such method, wrong arguments, or not at this time.

    The connection goes on where the call expects a reply, which tells the caller.
    """


class TooLarge(ZeoidError, StorageError):  # type: ignore[misc]
    """A transaction or a blob is larger than a server takes."""


class Crowded(ZeoidError, StorageError):  # type: ignore[misc]
    """A server has no place for another connection, by its limits. Later it may have: clients try again."""


class UnsendableValue(ZeoidError):
    """A value that the protocol can't carry, such as an object of an application's class."""


class ConfigurationError(ZeoidError):
    """Something that whoever starts the program must mend. The message is one line and says how."""


class CopyFailed(ZeoidError):
    """Copying a database, or comparing two, can't go on. The message is one line and says where."""


class PackCancelled(ZeoidError):
    """A pack was given up, because somebody asked for that. The storage is as it was before."""


class ClientError(ZeoidError, StorageError):  # type: ignore[misc]
    """Base of what a client storage raises by itself."""


class Disconnected(ClientError, TransientError):  # type: ignore[misc]
    """There is no connection to a storage server, or it was lost before the reply came."""


class TimedOut(Disconnected):
    """A deadline passed before the reply came. The server may still be doing what it was asked to do."""


class OutcomeUnknown(ClientError):
    """The connection was lost while a transaction was being finished: it may or may not be committed.

    No TransientError, on purpose: what retries those by itself could do the same thing twice.
    """


class ServerError(ClientError):
    """The server reported an error that has no counterpart among ZODB's own; the message names it."""


class Forbidden(ClientError):
    """Whoever is connected may not do this. The message says what it needs, and what they have."""


def not_stored(problem: BaseException) -> StorageError:
    """What a client is told when a blob met this failure of the server's disk."""
    why = (isinstance(problem, OSError) and problem.strerror) or repr(problem)
    return StorageError(f"a blob can't be stored: {why}")
