"""What the system's own library can do and Python's can't, where it has it.

Owns how such a function is found and called. Knows nothing of files' formats, nor why anybody wants this.
"""

import contextlib
import errno
import functools
import os
import socket
import sys
from typing import Any, Final

from zeoid import limits

#: What a file system says that can't do it.
CANNOT: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ESPIPE)
#: "Begin to write", and "wait before and after", from linux/fs.h.
_BEGIN, _BEGIN_AND_WAIT = 2, 7


@functools.cache
def function(*names: str) -> Any:
    """The first of these functions that the system's library has, returning 0 or setting errno; else None."""
    import ctypes

    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None
    found = next((found for name in names if (found := getattr(library, name, None))), None)
    if found is not None:
        found.restype = ctypes.c_int
    return found


def raise_unless_done(result: int) -> None:
    """OSError if *result* says so."""
    if result:
        import ctypes

        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def is_scarce(fd: int) -> bool:
    """Whether hardly any more files and sockets may be opened, now that *fd* is one.

    A new one gets the lowest number that is free. To be asked of what others cause to be opened: what must
    not fail, as a sync of a directory that has to be opened for it, needs the rest.
    """
    try:
        import resource
    except ImportError:
        return False
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most != resource.RLIM_INFINITY and fd >= most - min(limits.DESCRIPTORS_KEPT, most // 2)


def allow_more_files() -> None:
    """Let this process open as many files as it may allow itself."""
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not every system means what it says here
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


#: Where the system's `struct tcp_info` has the milliseconds since data came last (linux/tcp.h) …
_LAST_DATA_RECEIVED: Final = 52
#: … and what it has up to that.
_TCP_INFO_BYTES: Final = 56


def silent_s(sock: socket.socket) -> float | None:
    """For how long nothing has come on a TCP connection. None: the system can't tell."""
    if sys.platform != "linux" or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return None
    if len(info) < _TCP_INFO_BYTES:
        return None
    return int.from_bytes(info[_LAST_DATA_RECEIVED:_TCP_INFO_BYTES], sys.byteorder) / 1000


def begin_writeback(fd: int, start: int, length: int) -> bool:
    """Have the system begin to write these bytes of a file to the disk. False: it can't be told to."""
    return _write_back(fd, start, length, _BEGIN)


def wait_for_writeback(fd: int, start: int, length: int) -> None:
    """Wait until it has. An OSError is that of a failed sync."""
    _write_back(fd, start, length, _BEGIN_AND_WAIT)


def _write_back(fd: int, start: int, length: int, flags: int) -> bool:
    sync_file_range = function("sync_file_range")
    if sync_file_range is None:
        return False
    import ctypes

    done = sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(length), ctypes.c_uint(flags))
    if done and ctypes.get_errno() in CANNOT:
        return False
    raise_unless_done(done)
    return True
