"""The audit log: who connected, who was refused, and who did what cannot be undone in silence.

One line for each event, a JSON object in ASCII. Whatever names and reasons contain, JSON quotes it: no client
can begin a line of its own, or change what a terminal shows. Programs read it as it is; of key=value pairs
that can be said only where no value has spaces, quotes or equals signs.

Owns the logger `zeoid.audit`, the events and their form. They go where a handler was put for this very
logger, as `to_file` does, and nowhere else: the server's own log says it in its own words. Tokens never come
here.
"""

import json
import logging
import os
import time
from enum import Enum
from typing import Any

from zeoid import limits
from zeoid.security.identity import Peer
from zeoid.security.roles import Identity

log = logging.getLogger("zeoid.audit")
log.propagate = False
log.setLevel(logging.INFO)
log.addHandler(logging.NullHandler())


class Event(Enum):
    """What is told."""

    CONNECTED = "connected"
    REFUSED = "refused"
    REFUSED_MORE = "refused more"
    AUTHENTICATED = "authenticated"
    PACKED = "packed"
    PACK_CANCELLED = "pack cancelled"
    UNDID = "undid"
    CHECKPOINT = "checkpoint"
    REVOKED = "revoked"
    DISCONNECTED = "disconnected"


def tell(event: Event, peer: Peer, identity: Identity | None = None, **details: Any) -> None:
    """*details*: text, numbers, flags, bytes (told in hexadecimal), and lists of these."""
    entry: dict[str, Any] = {"time": _time(time.time()), "event": event.value, "where": peer.where}
    if identity is not None:
        entry["name"] = identity.name
        entry["how"] = identity.how.value
        storage = details.get("storage")
        role = None if storage is None else identity.role(storage)
        if role is not None:
            entry["role"] = role.value
    entry |= details
    line = json.dumps({key: _plain(value) for key, value in entry.items()})
    log.info("%s", line.replace("\x7f", "\\u007f"))  # the only control character that JSON leaves as it is


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03}Z"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value[: limits.AUDIT_CHARACTERS].hex()
    if isinstance(value, str):
        return value[: limits.AUDIT_CHARACTERS]
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value[: limits.AUDIT_ENTRIES]]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


class AuditFile(logging.FileHandler):
    """A file that gets every event; only its owner can read it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, mode="a", encoding="ascii")
        self.setFormatter(logging.Formatter("%(message)s"))

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding="ascii", opener=_private)

    def reopen(self) -> None:
        """Go on in a new file, after the old one was renamed. The old one is kept if that can't be."""
        stream = self._open()
        self.acquire()
        try:
            before, self.stream = self.stream, stream
        finally:
            self.release()
        if before is not None:
            before.close()

    def close(self) -> None:
        """Nothing is told to it any more."""
        log.removeHandler(self)
        super().close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def to_file(path: str | os.PathLike[str]) -> AuditFile:
    """Have every event of this process told to a file as well. OSError if it can't be opened."""
    file = AuditFile(path)
    log.addHandler(file)
    return file
