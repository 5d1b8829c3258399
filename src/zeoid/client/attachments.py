"""The blobs of one transaction: their files, from when they are stored to when it is over.

Owns who removes a file: each is placed when the transaction is committed, and discarded otherwise. Must not
know how a blob gets to the server, nor where its file is.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from ZODB.POSException import ConflictError

log = logging.getLogger("zeoid.client")


class BlobFile(Protocol):
    """The file of a blob that a transaction stores."""

    path: str
    #: Its name in the directory that the server shares with us; None if the server must be sent the content.
    shared_name: str | None

    def take(self, filename: str) -> None:
        """Take the file that the application wrote. ClientError if that fails."""

    def place(self, tid: bytes) -> None:
        """It was committed as *tid*. Raises nothing."""

    def discard(self, sent: bool) -> None:
        """It was not committed; the server may have been *sent* it. OSError, unless it was never taken."""


#: Sends (oid, serial, data, file) to the server.
Send = Callable[[bytes, bytes | None, bytes, BlobFile], None]


class Attachments:
    """See the module."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._blobs: list[tuple[bytes, bytes | None, bytes, BlobFile]] = []
        #: How many of them the server may have heard of.
        self._sent = 0

    def add(self, operation: tuple[Any, ...], file: BlobFile) -> None:
        """The record of *operation* has this blob. Its file will be discarded, whatever fails next."""
        _, oid, serial, data, _ = operation
        self._blobs.append((oid, serial, data, file))

    def send_last(self) -> None:
        """Send the one that was added last."""
        self._sent = len(self._blobs)
        self._send(*self._blobs[-1])

    def send_again(self, conflict: dict[str, Any]) -> None:
        """The server has lost them in a vote, whose conflicts were resolved."""
        for blob in self._blobs:
            if blob[3].shared_name is not None:
                # The server has moved the file to where another transaction than this one would have it.
                text = "the conflict can be resolved, but not together with blobs in a shared directory"
                raise ConflictError(text, oid=conflict["oid"], serials=tuple(conflict["serials"]))
            self._send(*blob)

    def place(self, tid: bytes) -> None:
        """The transaction was committed as *tid*."""
        blobs, self._blobs = self._blobs, []
        times = Counter(oid for oid, _, _, _ in blobs)
        for oid, _, _, file in blobs:
            if times[oid] == 1:
                file.place(tid)
            else:
                _discard(file, sent=True)  # of two blobs of one object the server says which one counts

    def discard(self) -> None:
        """It is over: what was not committed goes. Harmless when that was done already."""
        blobs, self._blobs = self._blobs, []
        for number, (_, _, _, file) in enumerate(blobs):
            _discard(file, sent=number < self._sent)


def _discard(file: BlobFile, sent: bool) -> None:
    try:
        file.discard(sent)
    except OSError as problem:
        log.warning("the file of a blob could not be removed: %s", problem)
