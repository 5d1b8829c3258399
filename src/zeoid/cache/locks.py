"""Locks on files between processes, with a deadline. Owns nothing but the calls to the system.

A lock belongs to an opening of a file and ends with it, so also with its process, however that ends. A
process that is stopped keeps it: hence the deadlines. ImportError where the system has no such locks.
"""

import os
import time
from pathlib import Path

from zeoid import limits


def open_file(path: Path) -> int:
    """A file to lock, made if need be, which only this user can read. OSError, also if it is a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def lock(file: int, *, shared: bool, timeout_s: float) -> None:
    """Lock the file, against all others or only against those who want that. TimeoutError."""
    import fcntl

    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    deadline_s = 0.0
    while True:
        try:
            fcntl.flock(file, how)
            return
        except BlockingIOError:
            now_s = time.monotonic()
            deadline_s = deadline_s or now_s + timeout_s
            if now_s >= deadline_s:
                raise TimeoutError("another process has the lock") from None
            time.sleep(limits.SHARED_CACHE_LOCK_POLL_S)


def unlock(file: int) -> None:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_UN)
