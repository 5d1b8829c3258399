"""A blob that is arriving: written in large pieces, on its way to the disk all the time, durable at its end.

The system keeps what is written in memory, and puts it on the disk when it sees fit: with the next change of
any file's length, say, for which other transactions then wait. So it is told to begin early, and not much is
let pile up. And of a very large blob the system keeps only the beginning in memory: the rest would drive out
what is read all the time, and memory that it has to get for every step costs more time than the disk does.

Owns one file until it is complete. Knows neither its final name nor its transaction.
"""

import contextlib
import errno
import os

from zeoid import limits, system
from zeoid.engines.disk import Disk
from zeoid.model import StagedBlob

#: Where the system can't be told to begin, so many steps are synced together.
_STEPS_PER_SYNC = 4


class StagedFile:
    """Made with its first byte still to come. All of its methods belong beside the loop, one at a time.

    Whoever has one owes `complete`, or `abandon`, which is allowed at any time, after an error, too.
    """

    def __init__(self, disk: Disk, path: str, name: bytes, readers: int, size_bytes: int | None) -> None:
        """*readers*: the permission bits of those who may read it later. OSError: there is no file then."""
        self.name = name
        #: What was written so far.
        self.size_bytes = 0
        self._disk = disk
        self._path = path
        self._readers = readers
        self._reserved_bytes = size_bytes or 0
        self._pieces: list[bytes | memoryview] = []
        self._waiting_bytes = 0
        #: Up to here it is on its way to the disk.
        self._begun = 0
        self._is_complete = False
        self._file = disk.open(path, create=True)
        try:
            if system.is_scarce(self._file):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if size_bytes:
                self._check_room(size_bytes)  # before it is taken, if only for a moment, from transactions
                disk.reserve(self._file, 0, size_bytes)
            self._check_room()
        except BaseException:
            self.abandon()
            raise

    def write(self, data: bytes | memoryview) -> None:
        """Append *data*, which is not kept. OSError: the disk is full, or failed."""
        self.size_bytes += len(data)
        self._waiting_bytes += len(data)
        full = self._waiting_bytes >= limits.BLOB_PIECE_BYTES
        self._pieces.append(data if full else bytes(data))
        if full:
            self._flush()

    def _flush(self) -> None:
        begin = self.size_bytes - self._waiting_bytes
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._waiting_bytes = [], 0
        self._disk.pwrite(self._file, data, begin)
        step = limits.BLOB_WRITEBACK_BYTES
        while self.size_bytes - self._begun >= step:
            self._check_room()
            if self._disk.start_writeback(self._file, self._begun, step):
                before = self._begun - step
                if before >= 0:
                    self._disk.wait_for_writeback(self._file, before, step)
                if before >= limits.BLOB_CACHED_BYTES:
                    self._disk.forget_cached(self._file, before, step)
            elif self._begun % (_STEPS_PER_SYNC * step) == 0:
                self._disk.sync(self._file)
            self._begun += step

    def _check_room(self, more_bytes: int = 0) -> None:
        if self._disk.free_bytes(self._file) < limits.BLOB_FREE_BYTES + more_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def complete(self) -> StagedBlob:
        """Have all of it durable, but for its name. OSError: it is not, and never will be."""
        if self._pieces:
            self._flush()
        if self._reserved_bytes > self.size_bytes:
            self._disk.truncate(self._file, self.size_bytes)
        self._disk.make_read_only(self._file, self._readers)
        self._disk.sync(self._file)
        file, self._file = self._file, -1
        self._disk.close(file)
        self._is_complete = True
        return StagedBlob(self.name, self.size_bytes)

    def abandon(self) -> None:
        """Remove it, unless it is complete: then `BlobDirectory.discard` does."""
        if self._is_complete:
            return
        file, self._file = self._file, -1
        self._pieces = []
        if file >= 0:
            self._disk.close(file)
        with contextlib.suppress(OSError):
            self._disk.unlink(self._path)
