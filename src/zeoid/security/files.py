"""Files that are whole or not there, and a lock on the directory that has them.

Owns how such a file is written, by rename, and how two commands wait for each other. Must not know what is
in the files.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from zeoid import limits
from zeoid.errors import ConfigurationError

#: Only its owner can read it.
SECRET: Final = 0o600
PUBLIC: Final = 0o644
PRIVATE_DIRECTORY: Final = 0o700


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name. A crash may leave it; the next write removes it."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is durable with its name when this returns. OSError: the former one is untouched.

    One process at a time may do this for one path.
    """
    part = part_of(path)
    part.unlink(missing_ok=True)
    try:
        # The mode is there from the beginning: nobody else can have opened a secret file meanwhile.
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(file, "wb") as opened:
            os.chmod(part, mode)  # whatever the umask is
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory that only its owner can enter, with those above it, unless it is there."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the system can be told to."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def locked(directory: Path, timeout_s: float = limits.CERTIFICATES_LOCK_S) -> Iterator[None]:
    """Be the only one, of processes and threads, who changes what is in *directory*. ConfigurationError.

    The directory itself is what is locked, so that no file is left. The lock ends with the process, however
    that ends. Where there are no such locks nobody is kept out.
    """
    try:
        import fcntl  # noqa: F401 - whether there are any
    except ImportError:
        yield
        return
    try:
        opened = os.open(directory, os.O_RDONLY)
    except OSError as problem:
        raise ConfigurationError(f"{directory} can't be opened: {problem.strerror}") from None
    try:
        _lock(opened, directory, timeout_s)
        yield
    finally:
        os.close(opened)


def _lock(opened: int, directory: Path, timeout_s: float) -> None:
    import fcntl

    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise ConfigurationError(
                    f"another command is changing {directory}; try again when it has ended"
                ) from None
            time.sleep(limits.CERTIFICATES_LOCK_POLL_S)
        except OSError as problem:
            raise ConfigurationError(f"{directory} can't be locked: {problem.strerror}") from None
