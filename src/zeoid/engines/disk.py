"""The disk, as the commit journal and the data file use it: what can be written, and when it is durable.

Owns the calls to the system, so that tests can put a disk in their place that loses what was not synced, or
fails (`zeoid.testing.disk`). Knows no format. Every method raises OSError as the system gives it.

What durable means: bytes of a file once `sync` returned after they were written; that a name leads to a file
or a directory once `sync_directory` returned after `open`, `rename`, `link`, `mkdir`, `unlink` or `rmdir`;
all of it once `sync_all` returned.
"""

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable

from zeoid import system

#: "Don't change the file's length", from linux/falloc.h.
_KEEP_SIZE = 1

#: A path, as the system takes one.
StrPath = str | os.PathLike[str]
_Fallocate = Callable[[int, int, int, int], int]


class Disk:
    """The real one."""

    def open(self, path: StrPath, *, create: bool = False, read_only: bool = False) -> int:
        """A file descriptor, which a child process does not inherit. What is in the file stays."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        return os.open(path, flags | os.O_CREAT if create else flags, 0o666)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """*size* bytes from *offset* on; fewer only at the file's end."""
        data = os.pread(fd, size, offset)
        while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
            data += more
        return data

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of *data*. When this raises, any part of it may be written."""
        written = os.pwrite(fd, data, offset)
        while written < len(data):
            data, offset = memoryview(data)[written:], offset + written
            written = os.pwrite(fd, data, offset)

    def sync(self, fd: int) -> None:
        """Make durable what was written to the file, and its length. After a failure nobody can know which
        of it is, and a second call that succeeds proves nothing."""
        getattr(os, "fdatasync", os.fsync)(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def rename(self, source: StrPath, target: StrPath) -> None:
        """*target* is replaced if it exists."""
        os.replace(source, target)

    def link(self, source: StrPath, target: StrPath) -> None:
        """Give a file one more name, which nothing else may have."""
        os.link(source, target)

    def unlink(self, path: StrPath) -> None:
        os.unlink(path)

    def exists(self, path: StrPath) -> bool:
        return os.path.exists(path)

    def listdir(self, path: StrPath) -> list[str]:
        return os.listdir(path)

    def mkdir(self, path: StrPath, mode: int = 0o777) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: StrPath) -> None:
        """It must be empty."""
        os.rmdir(path)

    def make_read_only(self, fd: int, readers: int) -> None:
        """Nobody may write to the file; it may be read by those whose bits *readers* has, too."""
        if hasattr(os, "fchmod"):  # Windows has it since Python 3.13 only
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & 0o555 | readers & 0o444)

    def sync_directory(self, path: StrPath) -> None:
        """Make durable which names the directory has, and which files they lead to."""
        if not hasattr(os, "O_DIRECTORY"):  # Windows can't open a directory, and needs no such call
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync_all(self, path: StrPath) -> None:
        """Make durable all that was written and named on the file system that *path* is on."""
        syncfs = system.function("syncfs")
        if syncfs is None:
            getattr(os, "sync", int)()
            return
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            system.raise_unless_done(syncfs(fd))
        finally:
            os.close(fd)

    def start_writeback(self, fd: int, start: int, length: int) -> bool:
        """Have the system begin to write these bytes to the disk. Only a `sync` makes them durable, which has
        less to do then. False: it can't be told to."""
        return system.begin_writeback(fd, start, length)

    def wait_for_writeback(self, fd: int, start: int, length: int) -> None:
        """Wait until it has, so that not too much is under way. An OSError is that of a failed `sync`."""
        system.wait_for_writeback(fd, start, length)

    def forget_cached(self, fd: int, start: int, length: int) -> None:
        """Have the system give back the memory in which it keeps these bytes, as far as they are on the disk.

        What is read of them comes from the disk then. Where the system can't be told to, it does as it likes.
        """
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is advice
                os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)

    def free_bytes(self, fd: int) -> int:
        """What a process without privileges may still take on the file's disk. Unknown counts as much."""
        if not hasattr(os, "fstatvfs"):
            return 1 << 62
        system = os.fstatvfs(fd)
        return system.f_bavail * system.f_frsize

    def reserve(self, fd: int, start: int, length: int) -> None:
        """See that the file system has room for the bytes from *start* to *start* + *length*.

        The file keeps its length. OSError with ENOSPC when there is no room, with EFBIG when this process
        may not write a file that long. Where room can't be reserved, it is looked up whether there is some.
        """
        if length <= 0:
            return
        _check_file_limit(start + length)
        fallocate = _fallocate()
        problem = fallocate(fd, _KEEP_SIZE, start, length) if fallocate else errno.ENOSYS
        while problem == errno.EINTR and fallocate:
            problem = fallocate(fd, _KEEP_SIZE, start, length)
        if problem in system.CANNOT:
            problem = 0 if self.free_bytes(fd) >= length else errno.ENOSPC
        if problem:
            raise OSError(problem, os.strerror(problem))


def _check_file_limit(size: int) -> None:
    """EFBIG beyond RLIMIT_FSIZE, which Linux does not look at while the file keeps its length."""
    try:
        import resource
    except ImportError:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


@functools.cache
def _fallocate() -> _Fallocate | None:
    """The system's fallocate, returning an error number or 0; None where there is none."""
    import ctypes

    # By the first name its offsets have 64 bits everywhere; a library without it has 64 bits by the other.
    function = system.function("fallocate64", "fallocate")
    if function is None:
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def fallocate(fd: int, mode: int, start: int, length: int) -> int:
        return ctypes.get_errno() if function(fd, mode, start, length) else 0

    return fallocate
