"""Keeps a directory of blob files below its bound, and removes what killed processes left in it.

Owns when it is cleaned and in which order. Whether a file may be removed is `blobs`'s to say. Must not know
who uses the directory, nor where blobs come from.

One process cleans at a time, ZEO's clients included: whoever has `check_size.lock` locked. Another one that
wants to leaves `check_size.attempt`, and it is done once more.

The bound is soft: what was handed out in the last `BLOB_GRACE_S` stays (in the last `BLOB_SHORT_GRACE_S`,
once there is twice as much as the bound). What had to stay is looked at again later.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from zeoid import limits
from zeoid.cache.blobs import PART, BlobCache

log = logging.getLogger("zeoid.client")

_LOCK: Final = "check_size.lock"
_ATTEMPT: Final = "check_size.attempt"
_SUFFIX: Final = ".blob"
_NS: Final = 1_000_000_000


class _File(NamedTuple):
    atime_ns: int
    size_bytes: int
    path: str


class Cleaner:
    """Cleans *cache* when it has grown by *step_bytes*, down to *bound_bytes* less that.

    The work is done in a thread that ends with it.
    """

    def __init__(
        self,
        cache: BlobCache,
        bound_bytes: int,
        step_bytes: int,
        *,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._cache = cache
        self._bound_bytes = bound_bytes
        self._step_bytes = step_bytes
        self._now_ns = now_ns
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: the thread is the parent's."""
        self._lock = threading.Lock()
        self._closing = False
        #: There is more to do for the thread.
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._added_bytes = 0

    def added(self, size_bytes: int) -> None:
        """So much has come. Cheap, and never raises."""
        with self._lock:
            self._added_bytes += size_bytes
            if self._added_bytes < self._step_bytes:
                return
        self.start()

    def start(self) -> None:
        """Clean in the background, unless it was closed."""
        with self._lock:
            self._added_bytes = 0
            self._wake.set()
            if self._thread is None and not self._closing:
                thread = threading.Thread(target=self._run, name="zeoid cleans blobs", daemon=True)
                try:
                    thread.start()
                except RuntimeError as problem:  # no more threads, or the interpreter ends
                    log.warning("the blobs can't be cleaned now: %s", problem)
                else:
                    self._thread = thread

    def close(self, timeout_s: float) -> None:
        self._closing = True
        self._wake.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        wait_s: float | None = None
        while True:
            with self._lock:
                if self._closing or (wait_s is None and not self._wake.is_set()):
                    self._thread = None
                    return
            self._wake.wait(wait_s)
            self._wake.clear()
            try:
                wait_s = None if self._closing else self.clean()
            except OSError as problem:
                wait_s = None
                log.warning("the blobs could not be cleaned: %s", self._cache.failure(problem))

    # The work -------------------------------------------------------------------------------------

    def clean(self) -> float | None:
        """Clean once. Seconds after which it should be done again, because what is too much had to stay."""
        attempt = os.path.join(self._cache.directory, _ATTEMPT)
        with self._only_one() as alone:
            if not alone:
                with open(attempt, "w"):
                    return None
            while True:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(attempt)
                wait_s = self._pass()
                if not os.path.exists(attempt) or self._closing:
                    return wait_s

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[bool]:
        file = open(os.path.join(self._cache.directory, _LOCK), "a")  # noqa: SIM115 - closed below
        try:
            yield self._cache.locked(file.fileno(), exclusive=True)
        finally:
            file.close()

    def _pass(self) -> float | None:
        self._cache.remove_leftovers()
        files = list(self._scan())
        total_bytes = sum(file.size_bytes for file in files)
        now_ns = self._now_ns()
        much = total_bytes > 2 * self._bound_bytes
        grace_s = limits.BLOB_SHORT_GRACE_S if much else limits.BLOB_GRACE_S
        before_ns = now_ns - int(grace_s * _NS)
        # A time in the future is no time: such files go first.
        files.sort(key=lambda file: 0 if file.atime_ns > now_ns else file.atime_ns)
        target_bytes = self._bound_bytes - self._step_bytes
        begin_bytes = total_bytes
        for file in files:
            if total_bytes <= target_bytes or before_ns < file.atime_ns <= now_ns or self._closing:
                break
            if self._cache.remove(file.path, file.atime_ns, before_ns):
                total_bytes -= file.size_bytes
        if total_bytes != begin_bytes:
            log.debug("blobs: removed %d of %d bytes", begin_bytes - total_bytes, begin_bytes)
        return grace_s if total_bytes > self._bound_bytes else None

    def _scan(self) -> Iterator[_File]:
        """The blobs that are here. What killed processes left is removed on the way."""
        old_s = self._now_ns() / _NS - limits.BLOB_LEFTOVER_S
        for directory in _entries(self._cache.directory):
            if directory.name.isdigit():
                for entry in _entries(directory.path):
                    if self._closing:
                        return
                    with contextlib.suppress(FileNotFoundError):  # removed, or placed, meanwhile
                        if entry.name.endswith(_SUFFIX):
                            found = entry.stat(follow_symlinks=False)
                            yield _File(found.st_atime_ns, found.st_size, entry.path)
                        elif entry.name.endswith(PART) and entry.stat().st_mtime < old_s:
                            self._cache.remove_part(entry.path)


def _entries(directory: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
