"""The reads of one session that are done in threads: where the storage may have to wait, and of small blobs.

While a read is under way others may commit, and their invalidations are written before its reply. A revision
that was overwritten meanwhile must not be told as the current one then: it is read again. Owns how many reads
are under way, and that rule. Must not know how replies are written.
"""

from collections.abc import Callable
from typing import Any

from ZODB.POSException import ReadConflictError, StorageError

from zeoid import limits
from zeoid.server.hosted import Hosted
from zeoid.server.methods import Read

#: Called with what was given to `begin`, the result or the exception, and whether there was no room before.
Ended = Callable[[Any, Any, Exception | None, bool], None]


class Reads:
    """Tells *ended* of each, on the loop."""

    def __init__(self, ended: Ended, most: int = limits.READS_PER_CONNECTION) -> None:
        self._ended = ended
        self._most = most
        self._under_way = 0

    @property
    def full(self) -> bool:
        """Whether one has to end before another may begin."""
        return self._under_way >= self._most

    def begin(self, hosted: Hosted, read: Read, call: Any, tries: int = 1) -> None:
        weight = max(1, len(read.oids))
        self._under_way += weight
        seen = hosted.visible.tid

        def done(value: Any, problem: BaseException | None) -> None:
            was_full = self.full
            self._under_way -= weight
            overtaken = None if problem is not None else hosted.changed_since(seen, read.oids)
            if overtaken is not None:
                if tries < limits.READ_TRIES:
                    self.begin(hosted, read, call, tries + 1)
                    return
                problem = ReadConflictError(oid=overtaken)
            if problem is None and (value is None or (type(value) is list and None in value)):
                hosted.look()  # others may have written more than was told of
            if isinstance(problem, Exception) or problem is None:
                self._ended(call, value, problem, was_full)
            else:
                self._ended(call, value, StorageError(repr(problem)), was_full)

        run = hosted.run_reading if read.oids else hosted.run_with_blobs
        run(read.work, done)
