"""Blobs beside a data file: how a file becomes durable, before its transaction and with it.

    a blob is     its names on the disk                            then
    arriving      staged                                           complete: its content is durable
    staged        staged; content durable                          promised: the name is durable, too
    promised      staged, durable                                  placed, when its transaction counts
    placed        staged, durable; final                           settled by a checkpoint
    settled       final, durable                                   the staged name is removed
    discarded     none; a crash may bring the staged name back     swept when the storage is opened

A *staged* name is random, in the directory `.staged`; the *final* one is the object's and the transaction's,
as `blob_layout` has it. The final one is a link, made without a sync: until a checkpoint has made it durable,
the journal, which knows both names, and the staged name are enough to make it again. So a commit waits for no
sync of a blob. Where a file system has no links, the file is renamed, and a recovery finds it by either name.

Owns the files of a blob directory, and which of its names are durable. Must not know what a transaction is,
nor the journal's bytes: `appending` says when, `recovery` what was left undone.

Invariants:
 1. Who was promised: content and staged name are durable, and there is a directory for the final name.
 2. A final name is made when its transaction counts, and no other time. (A very large one does not count yet:
    `withdraw` takes its names back.)
 3. A staged name is removed after the final one became durable, or when the blob is nobody's.
 4. A file that has a final name is never written to again.
 5. Directories are made and removed, and final names made in them, by one thread at a time.
"""

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterable, Sequence
from typing import BinaryIO, Final

from ZODB.POSException import POSKeyError, StorageError

from zeoid.engines.blob_layout import BlobLayout, make_directories, tid_of
from zeoid.engines.disk import Disk
from zeoid.engines.journal_format import BLOB_NAME_BYTES, LoggedBlob
from zeoid.engines.staging import StagedFile
from zeoid.errors import ConfigurationError
from zeoid.model import StagedBlob

STAGED: Final = ".staged"
#: What a file system says that has no links, or no more for this file, or not between these directories.
_CANNOT_LINK: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
#: A file that has more names is copied instead: there must be room for the final name.
_MOST_LINKS: Final = 30_000
#: If names were made in more directories than this, all of the file system is synced instead.
_MOST_SYNCS: Final = 200
_COPY_BYTES: Final = 1024 * 1024
#: What a client that shares the directory may call the file that it hands over ends so, and has one more
#: character at most.
_SHARED_SUFFIX: Final = ".tmp"


class BlobDirectory:
    """The blobs of one storage. Its methods may be called by any thread."""

    def __init__(self, layout: BlobLayout, disk: Disk, owner: bytes) -> None:
        """*owner* is the name of the journal: staged files of another one are left alone."""
        self.path = layout.root
        self._layout = layout
        self._disk = disk
        self._staged = os.path.join(layout.root, STAGED)
        self._prefix = _prefix(owner)
        #: Invariant 5. Guards what follows, too.
        self._names = threading.Lock()
        self._unsynced: dict[str, None] = {}
        self._placed: list[bytes] = []
        self._settled: list[bytes] = []
        #: Held while final names are made durable, and while staged ones are.
        self._syncing = threading.Lock()
        self._staging = threading.Lock()
        #: Promises so far, and how many of them are kept by the syncs that are done.
        self._promises = 0
        self._kept = 0
        #: Why no staged name, or no final one, can be known to be durable any more.
        self._promise_failure = ""
        self._failure = ""

    def begin(self, durable: bool = False) -> None:
        """Have a directory to stage in. ConfigurationError if that is on another file system.

        *durable*: what is in the directory was written by nobody who left it to the system when that is
        durable, as ZODB's own storages do.
        """
        is_new = not self._disk.exists(self._staged)
        if is_new or not durable:
            self._disk.sync_all(self.path)
        if is_new:
            self._disk.mkdir(self._staged, 0o700)
            self._disk.sync_directory(self.path)
        if os.stat(self._staged).st_dev != os.stat(self.path).st_dev:
            raise ConfigurationError(
                f"{self._staged} is on another file system than {self.path}, which can't have links to it"
            )

    # Staging ----------------------------------------------------------------------------------------

    def stage(self, size_bytes: int | None = None) -> StagedFile:
        """A file to write a blob to, with room for *size_bytes* if that is known. OSError: there is none."""
        name = secrets.token_bytes(BLOB_NAME_BYTES)
        readers = os.stat(self.path).st_mode
        return StagedFile(self._disk, self._staged_path(name), name, readers, size_bytes)

    def stage_revision(self, oid: bytes, tid: bytes) -> StagedBlob:
        """A blob with the content of one that is here. POSKeyError if it isn't; OSError."""
        source = self._layout.file(oid, tid)
        name = secrets.token_bytes(BLOB_NAME_BYTES)
        try:
            told = os.stat(source)
            if told.st_nlink <= _MOST_LINKS:
                self._disk.link(source, self._staged_path(name))
                return StagedBlob(name, told.st_size)
        except FileNotFoundError:
            raise POSKeyError(oid, tid) from None
        except OSError as problem:
            if problem.errno not in _CANNOT_LINK:
                raise
        return self._copied(source, told.st_size)

    def _copied(self, source: str, size_bytes: int) -> StagedBlob:
        copy = self.stage(size_bytes)
        file = self._disk.open(source, read_only=True)
        try:
            while piece := self._disk.pread(file, _COPY_BYTES, copy.size_bytes):
                copy.write(piece)
            return copy.complete()
        except BaseException:
            copy.abandon()
            raise
        finally:
            self._disk.close(file)

    def take_shared(self, oid: bytes, filename: str) -> StagedBlob:
        """Take over what a client that shares the directory left beside the object's revisions.

        StorageError if *filename* is no such file's; OSError.
        """
        if not _is_shared_name(filename):
            raise StorageError(f"no client may hand over a file that it calls {filename!r}")
        theirs = os.path.join(self._layout.directory(oid), filename)
        name = secrets.token_bytes(BLOB_NAME_BYTES)
        ours = self._staged_path(name)
        try:
            _refuse_unless_plain(theirs, filename)
            self._disk.rename(theirs, ours)
        except FileNotFoundError:
            raise StorageError(f"there is no file {filename!r} to hand over") from None
        try:
            _refuse_unless_plain(ours, filename)  # it may have been another one a moment ago
            file = self._disk.open(ours, read_only=True)
            try:
                self._disk.make_read_only(file, os.stat(self.path).st_mode)
                self._disk.sync(file)
                return StagedBlob(name, self._disk.size(file))
            finally:
                self._disk.close(file)
        except BaseException:
            with contextlib.suppress(OSError):
                self._disk.unlink(ours)
            raise

    def promise(self, blobs: Sequence[LoggedBlob]) -> None:
        """Have their staged names durable, and directories for the final ones. OSError: they can't be had."""
        with self._names:
            for blob in blobs:
                make_directories(self._disk, self._layout.directory(blob.oid))
            self._promises += 1
            mine = self._promises
        with self._staging:  # one sync is for all who came while the one before it was under way
            if self._kept >= mine:
                return
            if self._promise_failure:
                raise OSError(errno.EIO, self._promise_failure)
            reached = self._promises
            try:
                self._disk.sync_directory(self._staged)
            except BaseException as problem:
                # Which names are durable can't be known any more, whatever a second sync says.
                self._promise_failure = f"no blob can be taken after {type(problem).__name__}: {problem}"
                raise
            self._kept = reached

    def discard(self, names: Iterable[bytes], oids: Iterable[bytes] = ()) -> None:
        """Give up staged files, and directories that were made for these objects and are empty.

        To be called beside the loop: removing a large file takes long. What can't be removed is swept when
        the storage is opened.
        """
        for name in names:
            with contextlib.suppress(OSError):
                self._disk.unlink(self._staged_path(name))
        for oid in oids:
            with self._names, contextlib.suppress(OSError):
                self._disk.rmdir(self._layout.directory(oid))

    # Committing -------------------------------------------------------------------------------------

    def place(self, tid: bytes, blobs: Sequence[LoggedBlob]) -> None:
        """Give promised blobs the names by which they are found, now that *tid* counts. OSError."""
        with self._names:
            for blob in blobs:
                self._place(self._staged_path(blob.name), blob.oid, tid)
                self._placed.append(blob.name)

    def _place(self, staged: str, oid: bytes, tid: bytes) -> None:
        final = self._layout.file(oid, tid)
        directory = os.path.dirname(final)
        try:
            self._link(staged, final)
        except FileNotFoundError:  # it became empty by a pack, or by somebody else's giving up
            make_directories(self._disk, directory)
            self._link(staged, final)
        except FileExistsError:
            # No transaction had this tid, so nobody reads what is there: a data file from a back-up has taken
            # the place of the one that knew it.
            self._disk.unlink(final)
            self._link(staged, final)
        self._touch(directory)

    def _link(self, staged: str, final: str) -> None:
        try:
            self._disk.link(staged, final)
        except OSError as problem:
            if problem.errno not in _CANNOT_LINK:
                raise
            # From now on there is one name only: the way to it must be durable before, and it must be itself
            # before a promise to somebody else makes durable that the staged one is gone.
            directory = os.path.dirname(final)
            for each in self._layout.above(directory):
                self._disk.sync_directory(each)
            with self._staging:
                self._disk.rename(staged, final)
                self._disk.sync_directory(directory)

    def _touch(self, directory: str) -> None:
        """A name was made or removed there. Who made the directories above it may not have synced them."""
        for each in self._layout.above(directory):
            self._unsynced[each] = None

    def sync_names(self) -> None:
        """Have every name durable that was made so far. OSError: nobody knows which are, now and later."""
        with self._syncing:
            if self._failure:
                raise OSError(errno.EIO, self._failure)
            with self._names:
                directories, self._unsynced = self._unsynced, {}
            try:
                if len(directories) > _MOST_SYNCS:
                    self._disk.sync_all(self.path)
                    return
                for directory in directories:
                    with contextlib.suppress(FileNotFoundError):  # removed, as there was nothing in it
                        self._disk.sync_directory(directory)
            except BaseException as problem:
                self._failure = f"no blob can be committed after {type(problem).__name__}: {problem}"
                raise

    def settle(self) -> None:
        """The names of all that was placed are durable, and nobody will ask for the staged ones again."""
        with self._names:
            self._settled += self._placed
            self._placed = []

    def remove_settled(self) -> None:
        """Remove the staged names of what is settled."""
        with self._names:
            settled, self._settled = self._settled, []
        self.discard(settled)

    # Packing ----------------------------------------------------------------------------------------

    def revisions(self, oid: bytes) -> list[bytes]:
        """The tids of the blobs that the object has."""
        try:
            names = self._disk.listdir(self._layout.directory(oid))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [tid for tid in map(tid_of, names) if tid is not None]

    def remove(self, oid: bytes, tid: bytes, old: str | None) -> None:
        """Remove a blob that has no record any more, or move it to its place in the directory *old*."""
        final = self._layout.file(oid, tid)
        directory = os.path.dirname(final)
        if not self._disk.exists(final):
            return
        target = "" if old is None else old + final[len(self.path) :]
        if not target or self._disk.exists(target):
            self._disk.unlink(final)  # takes long for a large one, so nobody waits for that
        else:
            make_directories(self._disk, os.path.dirname(target))
            self._disk.rename(final, target)
        with self._names:
            self._touch(directory)
            for each in self._layout.above(directory)[:-1]:
                try:
                    self._disk.rmdir(each)
                except OSError:  # there is something in it
                    break

    # Reading ----------------------------------------------------------------------------------------

    def open(self, oid: bytes, tid: bytes) -> BinaryIO:
        """The blob of this revision. POSKeyError if there is none. Once open it survives a pack."""
        try:
            return open(self._layout.file(oid, tid), "rb")
        except FileNotFoundError:
            raise POSKeyError(oid, tid) from None

    # After a crash ----------------------------------------------------------------------------------

    def missing(self, tid: bytes, blobs: Sequence[LoggedBlob]) -> str:
        """What is wrong with committed blobs whose final names may not be durable; empty if nothing is."""
        for blob in blobs:
            staged, final = self._staged_path(blob.name), self._layout.file(blob.oid, tid)
            if not self._disk.exists(final):
                if not self._disk.exists(staged):
                    return f"neither {final} nor {staged} is there"
            elif self._disk.exists(staged) and not self._is_same(staged, final):
                return f"{final} is not what was committed, which is {staged}"
        return ""

    def _is_same(self, one: str, other: str) -> bool:
        if os.path.samefile(one, other):
            return True
        files = [self._disk.open(path, read_only=True) for path in (one, other)]
        try:
            sizes = [self._disk.size(file) for file in files]
            return sizes[0] == sizes[1] and all(
                self._disk.pread(files[0], _COPY_BYTES, at) == self._disk.pread(files[1], _COPY_BYTES, at)
                for at in range(0, sizes[0], _COPY_BYTES)
            )
        finally:
            for file in files:
                self._disk.close(file)

    def place_again(self, tid: bytes, blobs: Sequence[LoggedBlob]) -> None:
        """As `place`, with what `missing` finds nothing wrong with: some of it may be in place."""
        for blob in blobs:
            if not self._disk.exists(self._layout.file(blob.oid, tid)):
                self.place(tid, [blob])
            else:
                with self._names:
                    self._touch(self._layout.directory(blob.oid))

    def withdraw(self, tid: bytes, blobs: Sequence[LoggedBlob]) -> None:
        """Take back all names of blobs of a transaction that is not committed."""
        for blob in blobs:
            with self._names:
                with contextlib.suppress(FileNotFoundError):
                    self._disk.unlink(self._layout.file(blob.oid, tid))
                directory = self._layout.directory(blob.oid)
                if self._disk.exists(directory):
                    self._touch(directory)
        self.discard([blob.name for blob in blobs], [blob.oid for blob in blobs])

    def sweep(self) -> None:
        """Remove all staged files of this journal's, when none of them is anybody's."""
        for name in self._disk.listdir(self._staged):
            if name.startswith(self._prefix):
                self._disk.unlink(os.path.join(self._staged, name))

    def _staged_path(self, name: bytes) -> str:
        return os.path.join(self._staged, self._prefix + name.hex())


def set_staged_aside(path: str, disk: Disk, owner: bytes, suffix: str) -> str | None:
    """Move what was staged for the journal *owner* out of the way; where it is now, None if nothing was."""
    staged = os.path.join(path, STAGED)
    names = disk.listdir(staged) if disk.exists(staged) else []
    names = [name for name in names if name.startswith(_prefix(owner))]
    if not names:
        return None
    aside = f"{staged}.{suffix}"
    disk.mkdir(aside, 0o700)
    for name in names:
        disk.rename(os.path.join(staged, name), os.path.join(aside, name))
    for directory in (aside, staged, path):
        disk.sync_directory(directory)
    return aside


def _prefix(owner: bytes) -> str:
    return f"{owner[:4].hex()}-"


def _is_shared_name(filename: str) -> bool:
    """Whether it names a file in the very directory, one that isn't a revision."""
    if not filename.isascii() or "\0" in filename or os.path.basename(filename) != filename:
        return False
    ending = filename if filename.endswith(_SHARED_SUFFIX) else filename[:-1]
    return ending.endswith(_SHARED_SUFFIX) and filename != _SHARED_SUFFIX


def _refuse_unless_plain(path: str, filename: str) -> None:
    """What has another name, or is a link, could be written to later by somebody else."""
    told = os.lstat(path)
    if not stat.S_ISREG(told.st_mode) or told.st_nlink != 1:
        raise StorageError(f"{filename!r} is not a plain file with one name")
