"""Opening a storage for a server, and saying in one line what went wrong if it can't be."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zc.lockfile import LockError
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileStorageError
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSError

from zeoid.engines.filestorage import FileStorageEngine
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ConfigurationError


def open_filestorage(path: str | os.PathLike[str], *, read_only: bool = False) -> StorageEngine:
    """The engine on the data file *path*, which is made unless it exists or *read_only* is asked for.

    ConfigurationError when the file can't be used, saying why.
    """
    file = Path(path)
    return open_storage(str(file), lambda: _open_file(file, read_only))


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


def _open_file(path: Path, read_only: bool) -> Any:
    check_data_file(path, read_only)
    storage = FileStorage.__new__(FileStorage)
    try:
        storage.__init__(str(path), read_only=read_only)
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


def engine_of(storage: Any) -> StorageEngine:
    """The engine that fits an open ZODB storage."""
    return FileStorageEngine(storage) if type(storage) is FileStorage else StorageEngine(storage)


def open_storage(name: str, opener: Callable[[], Any]) -> StorageEngine:
    """The engine on the ZODB storage that *opener* opens; *name* says which in an error."""
    try:
        return engine_of(opener())
    except LockError:
        why = f"{name} is in use by another process, which holds its lock file; stop that one first"
    except OSError as problem:
        why = f"can't open {name}: {problem.strerror or problem}"
    except (FileStorageError, POSError, ValueError) as problem:
        why = f"can't open {name}: {type(problem).__name__}: {problem}. Is it a storage's data file?"
    # Not in the except clause: the error would keep what was half opened open.
    raise ConfigurationError(" ".join(why.split()))
