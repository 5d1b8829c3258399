"""New object ids, asked of the server in handfuls. Owns what was not given out yet."""

import threading
from collections.abc import Callable
from typing import Any, Final

from zeoid.client.link import Link
from zeoid.errors import ServerError
from zeoid.wire.messages import OIDS

_HANDFUL: Final = 100


class NewOids:
    """See the module. Safe for use by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[bytes] = []
        self._generation = 0

    def take(self, link: Link, read: Callable[..., Any]) -> bytes:
        """An oid that was never used; *read* calls the server."""
        with self._lock:
            if not self._left or self._generation != link.generation:
                # Oids of an earlier connection are dropped: that server may have been another.
                generation = link.generation
                oids = read("new_oids", _HANDFUL)
                if not oids or not OIDS.test(oids):
                    raise ServerError("the server gave no object ids")
                self._left = list(reversed(oids))
                self._generation = generation
            return self._left.pop()
