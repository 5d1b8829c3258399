"""The blob files that a client keeps on its disk, shared by the processes of one user on one machine.

Owns the directory: its layout (that of ZEO's client, so that either can go on with the other's files), who
may write a file, when one may be removed. Must not know where blobs come from.

    <oid % 997>/<oid // 997>.<tid>.blob         a blob; its time of access says when it was last handed out
    <oid % 997>/<oid // 997>.<tid>.blob.part    one on its way here
    tmp/zeoid-<random>                          one that a transaction of this client stores

Invariants:
 1. A name that ends in `.blob` is a whole blob: it appears by a rename, and its content never changes.
 2. One process at a time fills a `.part`: whoever has it locked (`flock`), as long as it has that name. The
    lock ends with its owner, so nothing is ever stale.
 3. What was just handed out is not removed. Handing out holds a shared lock on the blob's own file while it
    sets the time of access; removing holds an exclusive one while it looks at that time. Both look whether
    the name still leads to the file that they have locked.

Where files can't be locked (some network file systems) each process downloads for itself, and the time of
access alone protects a file.
"""

import contextlib
import logging
import os
import stat
import threading
import time
from binascii import hexlify
from collections.abc import Callable
from typing import Final

from ZODB import blob as zodb_blob

from zeoid import limits, system
from zeoid.errors import ClientError, ConfigurationError, TimedOut

log = logging.getLogger("zeoid.client")

LAYOUT: Final = "zeocache"
PART: Final = ".part"
#: What a process makes in `tmp` begins so; `zodb` has its own files there.
OURS: Final = "zeoid-"
_DIRECTORIES: Final = 997
_CLOEXEC: Final = getattr(os, "O_CLOEXEC", 0)
_BINARY: Final = getattr(os, "O_BINARY", 0)


class _Layout:
    """Where a blob is, for ZODB's `FilesystemHelper`."""

    def oid_to_path(self, oid: bytes) -> str:
        return str(int.from_bytes(oid, "big") % _DIRECTORIES)

    def getBlobFilePath(self, oid: bytes, tid: bytes) -> str:
        name = f"{int.from_bytes(oid, 'big') // _DIRECTORIES}.{hexlify(tid).decode('ascii')}.blob"
        return os.path.join(self.oid_to_path(oid), name)


class Taken:
    """The file of a blob that a transaction stores: it is taken, then placed or discarded.

    It has its name before there is a file, so that whoever has to discard it knows of it in time.
    """

    #: Its name, if the server takes the file itself from the directory that it shares with us.
    shared_name: str | None = None

    def __init__(self, cache: "BlobCache", oid: bytes, path: str) -> None:
        self.path = path
        self._oid = oid
        self._cache = cache

    def take(self, filename: str) -> None:
        """Take the file that the application wrote. ClientError if that fails; then it stays where it is."""
        try:
            zodb_blob.rename_or_copy_blob(filename, self.path, chmod=False)
            zodb_blob.set_not_writable(self.path)
        except OSError as problem:
            self.discard()
            raise self._cache.failure(problem) from problem

    def place(self, tid: bytes) -> None:
        """It was committed as *tid*: have it where it is looked for. If that fails it is downloaded."""
        target = self._cache.path_of(self._oid, tid)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            size_bytes = os.stat(self.path).st_size
            os.utime(self.path)
            os.replace(self.path, target)
        except OSError as problem:
            log.warning("a blob could not be kept: %s", problem)
            self.discard()
        else:
            self._cache.added(size_bytes)

    def discard(self, sent: bool = False) -> None:
        """It was not committed. It is ours in any case, whether the server was *sent* it or not."""
        with contextlib.suppress(FileNotFoundError):
            zodb_blob.remove_committed(self.path)


class Part:
    """A blob on its way into the cache. Whoever has it fills it from the beginning, places it, and closes it.

    A failure of the disk is remembered in `problem`: whoever writes is not the one who wants the blob.
    """

    _open = False

    def __init__(self, cache: "BlobCache", fd: int, name: str, target: str) -> None:
        self._cache = cache
        self._fd = fd
        self._name = name
        self._target = target
        #: Writing comes from the thread that reads the connection; closing from the one that waits for it.
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.problem: OSError | None = None
        #: Whether all of it is here.
        self.complete = False
        self.size_bytes = 0
        #: So much of it is on its way to the disk.
        self._begun_bytes = 0
        #: And so much is there for sure.
        self._waited_bytes = 0
        #: Never goes back, so that whoever waits can see that something comes.
        self.received_bytes = 0
        self._open = True

    def begin(self) -> None:
        """Now it comes, from its beginning."""
        with self._lock:
            if self._open:
                self.problem, self.complete = None, False
                self.size_bytes = self._begun_bytes = self._waited_bytes = 0
                try:
                    os.ftruncate(self._fd, 0)
                    os.lseek(self._fd, 0, os.SEEK_SET)
                except OSError as problem:
                    self.problem = problem

    def write(self, data: bytes | memoryview) -> None:
        with self._lock:
            self.received_bytes += len(data)
            if self._open and self.problem is None:
                try:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[os.write(self._fd, rest) :]
                    self.size_bytes += len(data)
                    self._begin_writeback()
                except OSError as problem:
                    self.problem = problem

    def _begin_writeback(self) -> None:
        """Left to itself, the system may put all of a large blob on the disk at once, for which all who wait
        for this disk would wait: a server, say."""
        begun = self._begun_bytes
        ready = self.size_bytes - begun
        if ready >= limits.BLOB_WRITEBACK_BYTES:
            system.begin_writeback(self._fd, begun, ready)
            if begun:  # no more than two steps are in the disk's queue: others wait behind them
                system.wait_for_writeback(self._fd, self._waited_bytes, begun - self._waited_bytes)
            self._waited_bytes, self._begun_bytes = begun, self.size_bytes

    def end(self) -> None:
        """All of it has come."""
        self.complete = True

    def place(self) -> None:
        """Make it the blob. ClientError if the disk failed."""
        try:
            if self.problem is not None:
                raise self.problem
            zodb_blob.set_not_writable(self._name)
            os.utime(self._name)  # it may be a file of long ago, whose writer was killed
            os.replace(self._name, self._target)
        except OSError as problem:
            raise self._cache.failure(problem) from problem
        self._cache.added(self.size_bytes)

    def close(self) -> None:
        """Give it up. What was not placed is gone."""
        if self._process != os.getpid():
            return  # it is the parent's, whose files `after_fork` has closed
        with self._lock:
            if self._open:
                self._open = False
                with contextlib.suppress(OSError):
                    if _is_at(self._fd, self._name):
                        zodb_blob.remove_committed(self._name)
                self._cache.let_go(self._fd)

    def __del__(self) -> None:
        # A thread that is interrupted at the wrong moment must not leave a lock behind.
        if self._open:
            self.close()


class BlobCache:
    """See the module.

    directory: an absolute path; made if it does not exist. ConfigurationError if it can't be used.
    added: told the size of every blob that has come.
    now_ns, pause: the time, and how to wait for a moment.
    """

    def __init__(
        self,
        directory: str,
        *,
        now_ns: Callable[[], int] = time.time_ns,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self.directory = directory
        self.added: Callable[[int], object] = lambda size_bytes: None
        self._now_ns = now_ns
        self._pause = pause
        #: What is open and locked: a forked child would hold the locks for ever.
        self._fds: set[int] = set()
        if LAYOUT not in zodb_blob.LAYOUTS:
            zodb_blob.LAYOUTS[LAYOUT] = _Layout()
        try:
            self._prepare()
        except OSError as problem:
            reason = problem.strerror or problem
            raise ConfigurationError(f"the blob directory {directory} can't be used: {reason}") from problem
        self.fshelper = zodb_blob.FilesystemHelper(directory, LAYOUT)

    def _prepare(self) -> None:
        temporary = os.path.join(self.directory, "tmp")
        os.makedirs(temporary, exist_ok=True)
        marker = os.path.join(self.directory, zodb_blob.LAYOUT_MARKER)
        layout = ""
        with contextlib.suppress(FileNotFoundError), open(marker) as file:
            layout = file.read().strip()
        is_of_server = any(name.startswith("0x") for name in os.listdir(self.directory))
        if layout not in ("", LAYOUT) or is_of_server:
            raise ConfigurationError(
                f"{self.directory} is the blob directory of a server, not a cache: give another one,"
                " or say shared_blob_dir"
            )
        probe = os.path.join(temporary, OURS + os.urandom(8).hex())
        with open(probe, "w") as file:
            file.write(LAYOUT)
        self._has_locks = _can_lock(probe)
        if not self._has_locks:
            log.warning("files in %s can't be locked: every process downloads for itself", self.directory)
        if layout:
            os.unlink(probe)
        else:
            os.replace(probe, marker)
        self.remove_leftovers()

    def path_of(self, oid: bytes, tid: bytes) -> str:
        path: str = self.fshelper.getBlobFilename(oid, tid)
        return path

    def failure(self, problem: OSError) -> ClientError:
        """What to raise: it is this disk's fault, not the server's."""
        return ClientError(f"the blob directory {self.directory}: {problem.strerror or problem}")

    # What is here ---------------------------------------------------------------------------------

    def hold(self, path: str) -> int | None:
        """The blob at *path*, open: it is not removed until `let_go`, nor soon after. None: it is not here.

        None, too, if somebody who is about to remove it does not get on with it. ClientError if it can't be
        read.
        """
        try:
            for _ in range(limits.BLOB_LOCK_TRIES):
                found = self._try(path)
                if found != _BUSY:
                    return found
                self._pause(limits.BLOB_LOCK_POLL_S)
        except OSError as problem:
            raise self.failure(problem) from problem
        return None

    def _try(self, path: str) -> int | None:
        """As `hold`, without waiting; _BUSY while somebody may be removing it."""
        while True:
            try:
                fd = self._open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                if not self.locked(fd, exclusive=False):
                    self.let_go(fd)
                    return _BUSY
                if _is_at(fd, path):
                    self._touch(fd)
                    return fd
            except BaseException:
                self.let_go(fd)
                raise
            self.let_go(fd)

    def _touch(self, fd: int) -> None:
        with contextlib.suppress(PermissionError):  # another user's: it is protected less
            os.utime(fd, ns=(self._now_ns(), os.fstat(fd).st_mtime_ns))

    def _open(self, path: str, flags: int) -> int:
        fd = os.open(path, flags | _CLOEXEC | _BINARY, 0o600)
        self._fds.add(fd)
        return fd

    def let_go(self, fd: int) -> None:
        # In this order: a child forked in between has one file too many, and closes none of somebody else.
        self._fds.discard(fd)
        os.close(fd)

    def remove(self, path: str, atime_ns: int, before_ns: int) -> bool:
        """Remove the blob at *path* if its time of access is *atime_ns* still, and not after *before_ns*.

        A time of access in the future says nothing. False if it stays.
        """
        try:
            fd = self._open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            if not self.locked(fd, exclusive=True):
                return False
            now_ns = os.fstat(fd).st_atime_ns
            if now_ns != atime_ns or before_ns < now_ns <= self._now_ns() or not _is_at(fd, path):
                return False
            zodb_blob.remove_committed(path)
            return True
        finally:
            self.let_go(fd)

    def remove_leftovers(self) -> None:
        """Remove from `tmp` what transactions of processes that were killed have left."""
        old_s = self._now_ns() / 1e9 - limits.BLOB_LEFTOVER_S
        with os.scandir(os.path.join(self.directory, "tmp")) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.startswith(OURS) and entry.stat(follow_symlinks=False).st_ctime < old_s:
                        zodb_blob.remove_committed(entry.path)

    def remove_part(self, name: str) -> None:
        """Remove what somebody who was killed in a download has left, unless it is being filled again."""
        with contextlib.suppress(FileNotFoundError):
            fd = self._open(name, os.O_RDWR)
            try:
                if self.locked(fd, exclusive=True) and _is_at(fd, name):
                    zodb_blob.remove_committed(name)
            finally:
                self.let_go(fd)

    # What comes -----------------------------------------------------------------------------------

    def part(self, path: str, timeout_s: float, stir: Callable[[], object] = lambda: None) -> Part | None:
        """The right to fill *path*; None if it is here now. Waits while another process does it.

        *stir* is called whenever that one has got on.
        TimedOut when that one gets nowhere for *timeout_s*; ClientError if the disk fails.
        """
        name = path + PART if self._has_locks else f"{path}.{os.urandom(8).hex()}{PART}"
        pause_s, seen_bytes, idle_s = limits.BLOB_LOCK_POLL_S, -1, 0.0
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            while True:
                part, size_bytes = self._try_part(name, path)
                if size_bytes is None:
                    return part
                if size_bytes != seen_bytes:
                    seen_bytes, idle_s = size_bytes, 0.0
                    stir()
                elif idle_s >= timeout_s:
                    raise TimedOut(f"another process that downloads {path} gets nowhere")
                self._pause(pause_s)
                idle_s += pause_s
                pause_s = min(2 * pause_s, limits.BLOB_PART_POLL_S)
        except OSError as problem:
            raise self.failure(problem) from problem

    def _try_part(self, name: str, path: str) -> tuple[Part | None, int | None]:
        """(what `part` returns, None), or (None, the size so far) while another process fills it."""
        while True:
            fd = self._open(name, os.O_RDWR | os.O_CREAT)
            part = None
            try:
                if not self.locked(fd, exclusive=True):
                    return None, os.fstat(fd).st_size
                if _is_at(fd, name):
                    found = self._try(path)
                    if found is None or found == _BUSY:
                        part = Part(self, fd, name, path)
                        return part, None
                    self.let_go(found)
                    zodb_blob.remove_committed(name)
                    return None, None
            finally:
                if part is None:
                    self.let_go(fd)

    def taken(self, oid: bytes) -> Taken:
        """For a blob that is to be stored: a name for its file, which is still to be taken."""
        return Taken(self, oid, os.path.join(self.fshelper.temp_dir, OURS + os.urandom(8).hex()))

    def after_fork(self) -> None:
        """In a forked child: what the parent has locked is the parent's."""
        for fd in list(self._fds):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds = set()

    def locked(self, fd: int, exclusive: bool) -> bool:
        """Lock an open file, where that can be done; False if it is locked already."""
        return not self._has_locks or _lock(fd, exclusive)


#: Instead of a file: somebody else has it locked.
_BUSY: Final = -1


def _lock(fd: int, exclusive: bool) -> bool:
    """Lock an open file against other openings of it, in this process, too. False if it is locked."""
    import fcntl

    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _can_lock(path: str) -> bool:
    """Whether a file that is open for reading can be locked, as network file systems don't always let one."""
    fd = os.open(path, os.O_RDONLY | _CLOEXEC | _BINARY)
    try:
        return _lock(fd, exclusive=True)
    except (OSError, ImportError):
        return False
    finally:
        os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    """Whether *path* leads to the open file *fd*."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return stat.S_ISREG(mine.st_mode) and (mine.st_dev, mine.st_ino) == (found.st_dev, found.st_ino)
