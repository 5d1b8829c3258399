"""The packs of a storage: how far the one under way is, whether it is to be given up, how the last one ended.

    running ──► done, failed
       │ cancel, unless the engine is past the point of no return
       ▼
    running, cancelling ──► cancelled

Owns what `pack_status` tells. The engine reports from the thread that packs, all else happens on the event
loop's thread. Must not know how a pack is made.
"""

import logging
import threading
from typing import Any

from zeoid.errors import PackCancelled
from zeoid.ports import Clock, Engine, PackStep

log = logging.getLogger("zeoid.server")
#: Not before the pack has ended are it all.
_MOST_PERCENT = 99.9


class Pack:
    """One pack. The engine's `PackProgress`."""

    def __init__(self, number: int, time_s: float, size_bytes: int, begun_s: float, can_cancel: bool) -> None:
        self.number = number
        self.time_s = time_s
        self.size_before = size_bytes
        self.begun_s = begun_s
        self.can_cancel = can_cancel
        #: Known when it is done.
        self.size_after = 0
        self.step = PackStep("beginning", 0.0 if can_cancel else None)
        self._lock = threading.Lock()
        self._cancelled = False
        self._replacing = False

    # The engine's side, in its thread

    def report(self, step: PackStep) -> None:
        self.step = step
        if self._cancelled:
            raise PackCancelled("the pack was cancelled")

    def begin_replacing(self) -> None:
        with self._lock:
            if self._cancelled:
                raise PackCancelled("the pack was cancelled")
            self._replacing = True

    # The server's

    def cancel(self) -> str | None:
        """None, or why that can't be."""
        with self._lock:
            if not self.can_cancel:
                return "a pack of this storage can't be interrupted"
            if self._replacing:
                return "it is too late to cancel the pack: the file is being replaced"
            self._cancelled = True
        return None

    @property
    def cancelling(self) -> bool:
        return self._cancelled

    @property
    def replacing(self) -> bool:
        return self._replacing


class Packs:
    """The pack that is under way, or else the last one that this server made of its storage."""

    def __init__(self, name: str, engine: Engine, clock: Clock) -> None:
        self._name = name
        self._engine = engine
        self._clock = clock
        self._pack: Pack | None = None
        self._number = 0
        self._state = "none"
        self._seconds = 0.0
        self._error = ""

    def begin(self, time_s: float, size_bytes: int) -> Pack:
        # Also after a restart of the server it is no number that one had before.
        self._number = max(self._number + 1, int(self._clock.time() * 1000))
        engine = self._engine
        begun_s = self._clock.monotonic()
        self._pack = Pack(self._number, time_s, size_bytes, begun_s, engine.can_cancel_pack)
        self._state, self._seconds, self._error = "running", 0.0, ""
        return self._pack

    def run(self, pack: Pack) -> None:
        """Make it. In a thread: the engine may have to wait, also to tell its size."""
        self._engine.pack(pack.time_s, pack)
        pack.size_after = self._engine.size_bytes()

    def end(self, problem: BaseException | None) -> None:
        assert self._pack is not None
        self._seconds = self._clock.monotonic() - self._pack.begun_s
        if problem is None:
            self._state = "done"
        elif isinstance(problem, PackCancelled):
            self._state = "cancelled"
        else:
            self._state = "failed"
            self._error = f"{type(problem).__name__}: {problem}"

    def cancel(self, by: str) -> str | None:
        """Have the pack given up that is under way. None, or why that can't be."""
        if self._pack is None or self._state != "running":
            return "no pack of this storage is under way"
        refusal = self._pack.cancel()
        if refusal is None:
            log.info("%s cancels the pack of storage %r", by, self._name)
        return refusal

    def status(self) -> dict[str, Any]:
        pack = self._pack
        if pack is None:
            return {"number": 0, "state": "none"}
        running, step = self._state == "running", pack.step
        percent = None if step.percent is None else min(step.percent, _MOST_PERCENT)
        if self._state == "done":
            percent = 100.0
        return {
            "number": pack.number,
            "state": self._state,
            "time": pack.time_s,
            "phase": "replacing" if running and pack.replacing else step.phase,
            "percent": percent,
            "objects": step.objects,
            "objects_total": step.objects_total,
            "bytes": step.bytes,
            "bytes_total": step.bytes_total,
            "size_before": pack.size_before,
            "size_after": 0 if running else pack.size_after,
            "seconds": self._clock.monotonic() - pack.begun_s if running else self._seconds,
            "can_cancel": running and pack.can_cancel and not pack.replacing,
            "cancelling": running and pack.cancelling,
            "error": self._error,
        }
