"""How large a hosted storage is, as clients are told: when it has changed, if not at every commit.

Owns when the engine is asked, and what was told last: one that may have to wait is asked in a thread.
"""

import logging
from typing import TYPE_CHECKING

from zeoid import limits
from zeoid.server.clients import Announcement

if TYPE_CHECKING:
    from zeoid.server.hosted import Hosted

log = logging.getLogger("zeoid.server")


class Sizes:
    """The size of one storage: objects, and bytes."""

    def __init__(self, hosted: "Hosted") -> None:
        self._hosted = hosted
        engine = hosted.engine
        self._size = self._told = (engine.count(), engine.size_bytes())
        self._due_s = 0.0
        #: Up to where it was asked for, where the engine may have to wait.
        self._asked_at = hosted.visible.tid

    def known(self) -> tuple[int, int]:
        """Objects and bytes; as they were told last, where the engine may have to wait."""
        engine = self._hosted.engine
        if engine.inline:
            self._size = (engine.count(), engine.size_bytes())
        return self._size

    def tick(self) -> None:
        """Time has passed: maybe to tell it."""
        if self._hosted.clock.monotonic() >= self._due_s:
            self.tell()

    def tell(self) -> None:
        hosted, engine = self._hosted, self._hosted.engine
        if engine.inline:
            self._due_s = hosted.clock.monotonic() + limits.INFO_S
            self._sized(self.known(), None)
        elif self._asked_at != hosted.visible.tid:
            self._due_s = hosted.clock.monotonic() + limits.FOREIGN_INFO_S
            self._asked_at = hosted.visible.tid
            hosted.run_reading(lambda: (engine.count(), engine.size_bytes()), self._sized)

    def _sized(self, size: tuple[int, int] | None, problem: BaseException | None) -> None:
        hosted = self._hosted
        if size is None:
            log.warning("storage %r can't tell its size: %s", hosted.name, problem)
            return
        self._size = size
        if size[1] != self._told[1] and hosted.clients:
            self._told = size
            announcement = Announcement("info", {"length": size[0], "size": size[1]})
            for client in list(hosted.clients):
                client.tell(announcement)
