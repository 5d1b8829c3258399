"""Opening a storage for a server, and saying in one line what went wrong if it can't be."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from zc.lockfile import LockError, LockFile
from ZODB.blob import is_blob_record
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileStorageError
from ZODB.interfaces import IMVCCStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSError, POSKeyError
from ZODB.utils import p64, u64

from zeoid import limits
from zeoid.engines.appending import Appender, place_of
from zeoid.engines.blob_layout import SUFFIX, find_layout, make_layout
from zeoid.engines.blob_packing import remove_packed
from zeoid.engines.blobs import BlobDirectory
from zeoid.engines.disk import Disk
from zeoid.engines.filestorage import FileStorageEngine
from zeoid.engines.journal import Base, Contents, Journal
from zeoid.engines.polled import PolledEngine
from zeoid.engines.recovery import (
    Settled,
    check_belonging,
    check_complete,
    journal_directory,
    settle,
)
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ConfigurationError
from zeoid.model import MAX_TID, NO_TID
from zeoid.ports import Outcomes

log = logging.getLogger("zeoid.server")


def open_filestorage(
    path: str | os.PathLike[str],
    *,
    blob_dir: str | os.PathLike[str] | None = None,
    read_only: bool = False,
    disk: Disk | None = None,
) -> StorageEngine:
    """The engine on the data file *path*, which is made unless it exists or *read_only* is asked for.

    *blob_dir* is the directory of its blobs, which is made, too. ConfigurationError when the file can't be
    used, saying why.
    """
    file = Path(path)
    folder = None if blob_dir is None else os.path.abspath(blob_dir)
    return open_storage(
        str(file),
        lambda: open_data_file(file, read_only, folder),
        file,
        read_only,
        disk or Disk(),
        blob_dir=folder,
    )


def check_data_file(path: Path, read_only: bool) -> None:
    """ConfigurationError where FileStorage would say what is wrong badly, or would not say it."""
    if path.is_dir():
        raise ConfigurationError(f"{path} is a directory; name the data file, such as {path / 'Data.fs'}")
    if not path.parent.is_dir():
        raise ConfigurationError(f"the directory {path.parent} does not exist; make it first")
    if not path.exists():
        if read_only:
            raise ConfigurationError(f"{path} does not exist, and a read-only server does not make it")
        _refuse_interrupted_pack(path)
    elif path.is_file() and not path.stat().st_size:
        # FileStorage would take it for a new database, whatever was in it before.
        raise ConfigurationError(f"{path} is empty, which no data file is; remove it to begin a new database")


def _refuse_interrupted_pack(path: Path) -> None:
    """FileStorage would make a new database beside the old one if it died between the renames of a pack."""
    for left in (Path(f"{path}.old"), Path(f"{path}.pack")):
        if left.exists():
            raise ConfigurationError(
                f"{path} does not exist, but {left} does: a pack was interrupted, or the file was moved; "
                f"rename {left.name} to {path.name} to use it, or move it away to begin a new database"
            )


def _refuse_lonely_blobs(data_file: Path, blob_dir: str) -> None:
    """FileStorage would make a new database, and remove everything in the blob directory."""
    for folder, _, names in os.walk(blob_dir):
        found = next((name for name in names if name.endswith(SUFFIX)), None)
        if found is not None:
            raise ConfigurationError(
                f"{data_file} does not exist, but {blob_dir} has blobs, such as {Path(folder, found)}: put "
                "the data file back, or move the blobs away to begin a new database"
            )


def open_data_file(path: Path, read_only: bool, blob_dir: str | None = None) -> Any:
    """A FileStorage on *path*, which it makes unless *read_only*; if that fails, it leaves nothing open."""
    check_data_file(path, read_only)
    storage = FileStorage.__new__(FileStorage)
    try:
        storage.__init__(str(path), read_only=read_only, blob_dir=blob_dir)
    except BaseException:
        # Its constructor leaves open, and locked, what it had opened before it failed.
        for name in ("_file", "_files", "_tfile", "_lock_file"):
            opened = getattr(storage, name, None)
            if opened is not None:
                opened.close()
        raise
    return storage


def open_memory() -> StorageEngine:
    """An engine that keeps everything in memory and loses it at the end."""
    return StorageEngine(MappingStorage("memory"))


def engine_of(storage: Any, disk: Disk | None = None) -> StorageEngine:
    """The engine that fits an open ZODB storage. ConfigurationError where a journal had to be read first."""
    if type(storage) is not FileStorage or not hasattr(os, "pread"):
        if IMVCCStorage.providedBy(storage):
            return PolledEngine(storage)
        return StorageEngine(storage, inline=_answers_at_once(storage))
    disk = disk or Disk()
    path = storage._file_name
    if storage.isReadOnly():
        check_complete(path, disk)
        last_tid = storage.lastTransaction() or NO_TID
        blobs = BlobDirectory(find_layout(storage.blob_dir, disk), disk, b"") if storage.blob_dir else None
        return FileStorageEngine(storage, None, Outcomes(last_tid), storage._oid, blobs=blobs)
    return _continue(storage, Settled(check_belonging(path, disk)), disk)


def _answers_at_once(storage: Any) -> bool:
    """Whether it waits for no network, and for no other process."""
    if isinstance(storage, DemoStorage):
        return _answers_at_once(storage.base) and _answers_at_once(storage.changes)
    return type(storage) in (MappingStorage, FileStorage)


def _continue(storage: Any, settled: Settled, disk: Disk) -> FileStorageEngine:
    """The engine on a FileStorage and its journal, which fits it."""
    path = storage._file_name
    file = storage._file.fileno()
    storage._file.flush()
    disk.sync(file)
    disk.sync_directory(os.path.dirname(path))
    contents = settled.contents
    last_tid = storage.lastTransaction() or NO_TID
    if contents is None:
        base = Base((place_of(disk, file, storage._pos),))
        journal = Journal.create(
            journal_directory(path), disk, base, last_tid=last_tid, oid_mark=storage._oid, floor=last_tid
        )
        outcomes, oid_mark = Outcomes(last_tid), storage._oid
    else:
        journal = Journal.open(journal_directory(path), disk, contents)
        outcomes = Outcomes(max(contents.floor, _unknown_after(contents, last_tid)), contents.outcomes)
        oid_mark = contents.oid_mark
    try:
        blobs = None
        if storage.blob_dir:
            known = contents is not None and last_tid <= contents.last_tid
            blobs = BlobDirectory(find_layout(storage.blob_dir, disk), disk, journal.name)
            blobs.begin(durable=known)
        appender = Appender(storage, journal, disk, blobs)
        appender.replay(settled.replay, settled.withdrawn)
        if blobs is not None:
            blobs.sweep()
            remove_packed(blobs, storage, disk)
    except BaseException:
        journal.close()
        raise
    newest = max(last_tid, journal.last_tid)
    return FileStorageEngine(storage, appender, outcomes, oid_mark, newest, blobs)


def _unknown_after(contents: Contents, last_tid: bytes) -> bytes:
    """Whoever wrote to the data file without the journal knew nothing of ids."""
    return last_tid if last_tid > contents.last_tid else NO_TID


def open_storage(
    name: str,
    opener: Callable[[], Any],
    data_file: Path | None = None,
    read_only: bool = False,
    disk: Disk | None = None,
    *,
    blob_dir: str | None = None,
) -> StorageEngine:
    """The engine on the ZODB storage that *opener* opens; *name* says which in an error.

    *data_file*, and *blob_dir* if it has one, are given where it is a FileStorage: its journal is read before
    it is opened, and a new directory gets its layout.
    """
    disk = disk or Disk()
    try:
        journalled = not read_only and hasattr(os, "pread")
        settled = _settle(data_file, disk, blob_dir) if data_file is not None and journalled else None
        if blob_dir is not None:
            if data_file is not None and not data_file.exists():
                _refuse_lonely_blobs(data_file, blob_dir)
            (find_layout if read_only else make_layout)(blob_dir, disk)
        storage = opener()
        try:
            is_ours = type(storage) is FileStorage
            if settled is not None and is_ours:
                engine: StorageEngine = _continue(storage, settled, disk)
            else:
                engine = engine_of(storage, disk)
            if is_ours and not storage.blob_dir:
                _warn_of_blobs(engine, storage)
            return engine
        except BaseException:
            storage.close()
            raise
    except ConfigurationError:
        raise
    except LockError:
        why = _in_use(name)
    except OSError as problem:
        why = f"can't open {name}: {problem.strerror or problem}"
    except (FileStorageError, POSError, ValueError) as problem:
        why = f"can't open {name}: {type(problem).__name__}: {problem}. Is it a storage's data file?"
    except Exception as problem:
        # What a database's driver raises is of its own making. What Python raises is a mistake in a program.
        if type(problem).__module__ == "builtins":
            raise
        why = f"can't open {name}: {type(problem).__name__}: {problem}"
    # Not in the except clause: the error would keep what was half opened open.
    raise ConfigurationError(" ".join(why.split()))


def _warn_of_blobs(engine: StorageEngine, storage: Any) -> None:
    """Say so if it seems to have blobs, and isn't given their directory."""
    for oid in dict.fromkeys(_sampled(engine, storage)):
        with contextlib.suppress(POSKeyError):
            revision = engine.load_before(oid, MAX_TID)
            if revision is not None and is_blob_record(revision[0]):
                log.warning(
                    "%s has blobs, such as object %s, but no directory for them was given (--blob-dir, or "
                    "blob-dir in a configuration): clients can neither read nor store any, and an undo or a "
                    "pack leaves their files as they are",
                    engine.name, oid.hex(),
                )  # fmt: skip
                return


def _sampled(engine: StorageEngine, storage: Any) -> Iterator[bytes]:
    """Objects that were written last, and some from all over the file."""
    count = limits.BLOB_SAMPLE_RECORDS
    written = (oid for _, oids in reversed(engine.last_invalidations(count)) for oid in oids)
    yield from islice(written, count)
    with contextlib.suppress(ValueError):  # there is none beyond
        for number in range(count):
            yield storage._index.minKey(p64(u64(storage._oid) * number // count))


def _settle(data_file: Path, disk: Disk, blob_dir: str | None) -> Settled:
    """Have data file and journal agree, while nobody else has the file open."""
    path = os.path.abspath(data_file)
    if not disk.exists(journal_directory(path)):
        return Settled(None)
    with locked(path):
        return settle(path, disk, blob_dir)


def _in_use(name: str) -> str:
    return f"{name} is in use by another process, which holds its lock file; stop that one first"


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Nobody else has the data file *path* open for writing. ConfigurationError if somebody has."""
    lock = None
    with contextlib.suppress(LockError):
        lock = LockFile(f"{path}.lock")
    if lock is None:
        raise ConfigurationError(_in_use(path))
    try:
        yield
    finally:
        lock.close()
