"""The blobs of a client storage: storing, loading, opening, in each of the three ways to have them.

    `NoBlobs`       without a blob directory
    `CachedBlobs`   the directory is this client's cache; blobs go to and come from the server as messages
    `SharedBlobs`   the directory is the server's own, which both reach in the file system

Owns who downloads when several want the same blob, and what is asked of the server. What is in the cache is
`cache.blobs`' business, how a blob travels `transfers`'.
"""

import contextlib
import copy
import os
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from ZODB import blob as zodb_blob
from ZODB.POSException import POSError, POSKeyError, Unsupported

from zeoid import limits
from zeoid.cache.blobs import LAYOUT, OURS, BlobCache, Part
from zeoid.cache.cleaning import Cleaner
from zeoid.client.attachments import BlobFile
from zeoid.client.channel import Channel
from zeoid.client.committing import Commit, Operation
from zeoid.client.streams import Streams
from zeoid.client.transfers import Downloads
from zeoid.errors import ClientError, ConfigurationError, Disconnected, TimedOut

#: A verified connection to a server that has blobs, waited for at most so many seconds.
Connect = Callable[[float], Channel]


class NoBlobs:
    """See the module; the base of the others."""

    #: ZODB's idea of the directory.
    fshelper: Any = None
    #: Whether blobs can be stored and loaded.
    supported = False
    #: Where they travel, if the server knows how.
    streams: Streams | None = None

    def store(self, commit: Commit, operation: Operation, filename: str) -> None:
        """Store a blob with the record of *operation*. Its file is gone afterwards: it is the storage's."""
        raise self._refusal()

    def path(self, oid: bytes, serial: bytes) -> str:
        """The path of a blob, which is there. POSKeyError if there is no such blob."""
        raise self._refusal()

    def open(self, oid: bytes, serial: bytes, blob: Any = None) -> BinaryIO:
        """A blob, open for reading."""
        raise self._refusal()

    def temporary_directory(self) -> str:
        """Where a blob is written before it is stored, so that storing it is a rename."""
        raise self._refusal()

    def _refusal(self) -> Unsupported:
        return Unsupported("blobs need a directory on this machine: give the storage a blob_dir")

    def receive(self, channel: Channel, name: str, args: tuple[Any, ...]) -> None:
        """A message of a download."""

    def after_fork(self) -> None:
        """In a forked child: threads and locks are the parent's."""

    def close(self) -> None:
        """End what runs in the background. What is here can still be opened."""


class _Blobs(NoBlobs):
    supported = True

    def __init__(self, connect: Connect, timeout_s: float) -> None:
        self._connect = connect
        self._timeout_s = timeout_s

    def store(self, commit: Commit, operation: Operation, filename: str) -> None:
        commit.check_alive()
        self._connect(self._timeout_s)
        assert operation[1] is not None
        commit.store_blob(operation, self._file(operation[1]), filename)

    def _file(self, oid: bytes) -> BlobFile:
        """What the application's file becomes."""
        raise NotImplementedError

    def temporary_directory(self) -> str:
        directory: str = self.fshelper.temp_dir
        return directory


class _Shared:
    """A blob's file in the directory that the server reads: it takes the file from there, or removes it."""

    def __init__(self, path: str, directory: str) -> None:
        self.path = path
        self.shared_name: str | None = os.path.basename(path)
        self._directory = directory

    def take(self, filename: str) -> None:
        """Take the file that the application wrote. ClientError if that fails; then it stays where it is."""
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            zodb_blob.rename_or_copy_blob(filename, self.path)
        except OSError as problem:
            self.discard(sent=False)
            reason = problem.strerror or problem
            raise ClientError(f"the blob directory {self._directory}: {reason}") from problem

    def place(self, tid: bytes) -> None:
        """The server has done it."""

    def discard(self, sent: bool) -> None:
        """A file that the server was told of is the server's: it trips over one that is gone."""
        if not sent:
            with contextlib.suppress(FileNotFoundError):
                zodb_blob.remove_committed(self.path)


class SharedBlobs(_Blobs):
    """See the module. ConfigurationError if *directory* is not that of a server."""

    def __init__(self, directory: str, connect: Connect, timeout_s: float) -> None:
        super().__init__(connect, timeout_s)
        layout = ""
        try:
            with open(os.path.join(directory, zodb_blob.LAYOUT_MARKER)) as file:
                layout = file.read().strip()
        except FileNotFoundError:
            pass
        except OSError as problem:
            raise ConfigurationError(f"the blob directory {directory}: {problem.strerror}") from problem
        if layout not in zodb_blob.LAYOUTS or layout == LAYOUT:
            raise ConfigurationError(
                f"{directory} is no server's blob directory: is it mounted, was the server ever started?"
            )
        self.fshelper = zodb_blob.FilesystemHelper(directory, layout)

    def _file(self, oid: bytes) -> BlobFile:
        path = os.path.join(self.fshelper.getPathForOID(oid), f"{OURS}{os.urandom(8).hex()}.tmp-")
        return _Shared(path, self.fshelper.base_dir)

    def path(self, oid: bytes, serial: bytes) -> str:
        path: str = self.fshelper.getBlobFilename(oid, serial)
        if not os.path.exists(path):
            raise POSKeyError(oid)
        return path

    def open(self, oid: bytes, serial: bytes, blob: Any = None) -> BinaryIO:
        try:
            return _opened(self.path(oid, serial), blob)
        except FileNotFoundError:
            raise POSKeyError(oid) from None


class _Flight:
    """A download by one thread of this process, for which others wait."""

    def __init__(self) -> None:
        self.over = threading.Event()
        #: What the others get, too; None if they had better look for themselves.
        self.problem: Exception | None = None
        self.part: Part | None = None
        self._stirs = 0

    def stir(self) -> None:
        """It goes on, though not by this process."""
        self._stirs += 1

    @property
    def progress(self) -> int:
        part = self.part
        return self._stirs + (0 if part is None else part.received_bytes)


class CachedBlobs(_Blobs):
    """See the module."""

    def __init__(self, cache: BlobCache, cleaner: Cleaner | None, connect: Connect, timeout_s: float) -> None:
        super().__init__(connect, timeout_s)
        self._cache = cache
        self._cleaner = cleaner
        self.fshelper = cache.fshelper
        self.streams: Streams = Streams(timeout_s)
        self._reset()
        if cleaner is not None:
            cache.added = cleaner.added
            cleaner.start()

    def _reset(self) -> None:
        #: By path. A thread that finds none of its blob puts its own here, in a single step.
        self._flights: dict[str, _Flight] = {}
        self._downloads = Downloads()

    def after_fork(self) -> None:
        self._reset()
        self.streams.after_fork()
        self._cache.after_fork()
        if self._cleaner is not None:
            self._cleaner.after_fork()

    def close(self) -> None:
        self.streams.close()
        if self._cleaner is not None:
            self._cleaner.close(limits.CLOSE_TIMEOUT_S)

    def receive(self, channel: Channel, name: str, args: tuple[Any, ...]) -> None:
        self._downloads.receive(channel, name, args)

    def _file(self, oid: bytes) -> BlobFile:
        return self._cache.taken(oid)

    def path(self, oid: bytes, serial: bytes) -> str:
        path = self._cache.path_of(oid, serial)
        self._cache.let_go(self._hold(path, oid, serial))
        return path

    def open(self, oid: bytes, serial: bytes, blob: Any = None) -> BinaryIO:
        path = self._cache.path_of(oid, serial)
        held = self._hold(path, oid, serial)
        try:
            return _opened(path, blob)
        finally:
            self._cache.let_go(held)

    # Downloads ------------------------------------------------------------------------------------

    def _hold(self, path: str, oid: bytes, serial: bytes) -> int:
        """The blob's file, in the cache and protected until it is let go."""
        for _ in range(limits.BLOB_DOWNLOADS):
            held = self._cache.hold(path)
            if held is not None:
                return held
            self._have(path, oid, serial)
        raise ClientError(f"{path} is removed as fast as it is downloaded: the blob cache is too small")

    def _have(self, path: str, oid: bytes, serial: bytes) -> None:
        """Have the blob downloaded, by this thread or by one that is doing so already."""
        mine = _Flight()
        try:
            flight = self._flights.setdefault(path, mine)
            if flight is not mine:
                self._follow(flight)
            else:
                self._download(mine, path, oid, serial)
        except POSError as problem:
            if not isinstance(problem, Disconnected):
                mine.problem = problem
            raise
        finally:
            # Whatever ended it, an interruption, too: another thread may lead now.
            if self._flights.get(path) is mine:
                del self._flights[path]
            mine.over.set()

    def _follow(self, flight: _Flight) -> None:
        seen = -1
        while not flight.over.wait(self._timeout_s):
            if flight.progress == seen:
                raise TimedOut("another thread downloads this blob and gets nowhere")
            seen = flight.progress
        if flight.problem is not None:
            raise copy.copy(flight.problem)

    def _download(self, flight: _Flight, path: str, oid: bytes, serial: bytes) -> None:
        part = self._cache.part(path, self._timeout_s, flight.stir)
        if part is None:
            return
        flight.part = part
        try:
            for left in reversed(range(limits.BLOB_DOWNLOADS)):
                channel = self._connect(self._timeout_s)
                try:
                    if not self.streams.fetch(channel, oid, serial, part):
                        self._downloads.fetch(channel, oid, serial, part, self._timeout_s)
                    break
                except TimedOut:
                    raise
                except Disconnected:
                    if not left:
                        raise
            part.place()
        finally:
            part.close()


def _opened(path: str, blob: Any) -> BinaryIO:
    return open(path, "rb") if blob is None else zodb_blob.BlobFile(path, "r", blob)


def blobs_for(
    directory: Any,
    shared: bool,
    size_bytes: int | None,
    step_percent: int,
    connect: Connect,
    timeout_s: float,
) -> NoBlobs:
    """The blobs of a storage with these options. ConfigurationError if they are wrong."""
    if directory is None:
        return NoBlobs()
    try:
        path = os.path.abspath(os.fsdecode(directory))
    except TypeError:
        raise ConfigurationError(f"blob_dir must be a path, not {directory!r}") from None
    if shared:
        return SharedBlobs(path, connect, timeout_s)
    if size_bytes is not None and (not isinstance(size_bytes, int) or size_bytes < 0):
        raise ConfigurationError(f"blob_cache_size must be a number of bytes, not {size_bytes!r}")
    if not isinstance(step_percent, int | float) or not 0 <= step_percent < 100:
        raise ConfigurationError(f"blob_cache_size_check must be a percentage, not {step_percent!r}")
    cache = BlobCache(path)
    cleaner = None
    if size_bytes is not None:
        cleaner = Cleaner(cache, size_bytes, int(size_bytes * step_percent // 100))
    return CachedBlobs(cache, cleaner, connect, timeout_s)
