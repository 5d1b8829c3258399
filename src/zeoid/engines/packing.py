"""FileStorage's own packer, watched: how far it has come, whether it is to go on, and whom it holds up.

    phase      what the packer does                                          share of the time
    reading    goes through the file once: what is where at the pack time    by bytes
    tracing    from the root to every object that can be reached             by objects
    copying    goes through the file again, and writes what is to stay       by bytes
    replacing  the file is put in the other's place; no way back

Owns these phases, and how much of the work is done while others commit. How a file is read and what stays is
the business of ZODB's packer: its classes read every header by one of two methods, and that is where it is
watched. Must not know what is written to the journal when the file is replaced.
"""

from collections.abc import Callable
from typing import Any

from ZODB.FileStorage.format import FileStorageFormatter
from ZODB.FileStorage.fspack import GC, FileStoragePacker

from zeoid import limits
from zeoid.ports import PackProgress, PackStep

#: What the phases take of the time, about: measured with a million objects of 300 bytes, of which most stay.
_SHARES = {"reading": 15, "tracing": 55, "copying": 30}


class Unwatched:
    """The progress of a pack that nobody looks at, and nobody cancels."""

    def report(self, step: PackStep) -> None: ...

    def begin_replacing(self) -> None: ...


UNWATCHED = Unwatched()


def pack(
    storage: Any, referencesf: Any, stop: bytes, gc: bool, progress: PackProgress, sync: Callable[[], None]
) -> tuple[int, Any] | None:
    """As FileStorage's packer: (length, index) of the file that it made, and then the commit lock is held.

    None if there was nothing to remove. *sync* makes durable what was written to that file. What *progress*
    raises comes out of here, with the lock free.
    """
    packer = _Packer(storage, referencesf, stop, gc, progress, sync)
    try:
        length = packer.pack()
        return None if length is None else (length, packer.index)
    finally:
        packer.close()


class _Watch:
    """How far a packer has come."""

    def __init__(self, progress: PackProgress, objects: int, size_bytes: int, traces: bool) -> None:
        self._progress = progress
        self._shares = {phase: share for phase, share in _SHARES.items() if traces or phase != "tracing"}
        self._done = dict.fromkeys(self._shares, 0.0)
        self._left = limits.PACK_REPORT_RECORDS
        self.phase = "reading"
        self.position = 0
        self.size_bytes = size_bytes
        #: That are to stay, as far as is known, and that there are.
        self.objects = 0
        self.objects_total = objects

    def enter(self, phase: str, position: int = 0) -> None:
        self.phase = phase
        self.position = position
        self._report()

    def leave(self) -> None:
        """The phase has come to its end, also if it was shorter than it seemed."""
        self._done[self.phase] = 1.0

    def at(self, position: int) -> None:
        """A header there is read; now and then an earlier one is looked up."""
        if self.position < position:
            self.position = position
        self._left -= 1
        if not self._left:
            self._report()

    def _report(self) -> None:
        self._left = limits.PACK_REPORT_RECORDS
        phase, position = self.phase, self.position
        objects = min(self.objects, self.objects_total)
        part, whole = (objects, self.objects_total) if phase == "tracing" else (position, self.size_bytes)
        self._done[phase] = max(self._done[phase], min(1.0, part / whole if whole else 1.0))
        shares = self._shares
        done = sum(share * self._done[each] for each, share in shares.items()) / sum(shares.values())
        of_file = (0, 0) if phase == "tracing" else (position, self.size_bytes)
        self._progress.report(PackStep(phase, 100 * done, objects, self.objects_total, *of_file))


class _Watched(FileStorageFormatter):  # type: ignore[misc]
    """Reads a file's headers, as either part of the packer does."""

    _watch: _Watch

    def _read_data_header(self, pos: int, oid: bytes | None = None, _file: Any = None) -> Any:
        self._watch.at(pos)
        return super()._read_data_header(pos, oid, _file)

    def _read_txn_header(self, pos: int, tid: bytes | None = None) -> Any:
        self._watch.at(pos)
        return super()._read_txn_header(pos, tid)


class _Collector(_Watched, GC):  # type: ignore[misc]
    """What finds out which records are to stay."""

    def __init__(self, watch: _Watch, *given: Any) -> None:
        super().__init__(*given)
        self._watch = watch

    def buildPackIndex(self) -> None:
        watch = self._watch
        watch.enter("reading")
        super().buildPackIndex()
        watch.objects_total = len(self.oid2curpos)
        watch.objects = 0 if self.gc else watch.objects_total

    def findReachableAtPacktime(self, roots: Any) -> None:
        # Once for the root, then again for each old revision that a later transaction refers to.
        watch = self._watch
        before = watch.phase, watch.position
        watch.enter("tracing")
        super().findReachableAtPacktime(roots)
        watch.leave()
        watch.enter(*before)

    def findrefs(self, pos: int) -> Any:
        self._watch.objects += 1
        return super().findrefs(pos)


class _Packer(_Watched, FileStoragePacker):  # type: ignore[misc]
    """What writes the records that are to stay to a new file."""

    def __init__(
        self, storage: Any, referencesf: Any, stop: bytes, gc: bool, progress: PackProgress, sync: Any
    ) -> None:
        super().__init__(storage, referencesf, stop, gc)
        self._watch = _Watch(progress, len(storage), self.file_end, gc)
        self.gc = _Collector(self._watch, self._file, self.file_end, stop, gc, referencesf)
        self._commit_lock: Any = storage._commit_lock
        self._sync = sync

    def copyToPacktime(self) -> tuple[int, int]:
        self._watch.leave()
        self._watch.enter("copying")
        positions: tuple[int, int] = super().copyToPacktime()
        self._sync_copy()
        return positions

    def copyRest(self, ipos: int) -> None:
        """All that came after the pack time, most of it while others commit.

        ZODB's packer lets go of the commit lock for each transaction and takes it again, so that whoever
        waits for it rarely comes in between, until the whole rest is copied.
        """
        lock = self._commit_lock
        lock.release()
        self._commit_lock = _NoLock()  # what fails from here on finds it free
        for _ in range(limits.PACK_ROUNDS):
            end = self._storage._pos
            if end - ipos <= limits.PACK_LAST_BYTES:
                break
            self._watch.size_bytes = end
            while ipos < end:
                ipos = self.copyOne(ipos)
            self._sync_copy()
        lock.acquire()
        self._watch.size_bytes = self._storage._pos  # that is all: nobody adds to it now
        try:
            super().copyRest(ipos)
        except BaseException:
            lock.release()
            raise
        self._commit_lock = lock
        self.locked = True

    def _sync_copy(self) -> None:
        """Ahead of the sync for which everybody waits."""
        self._tfile.flush()
        self._sync()


class _NoLock:
    """In the place of a lock that somebody else sees to."""

    def acquire(self) -> None: ...

    def release(self) -> None: ...
