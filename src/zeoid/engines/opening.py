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
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(f"{path} is a directory; name the data file, such as {path / 'Data.fs'}")
    if not path.parent.is_dir():
        raise ConfigurationError(f"the directory {path.parent} does not exist; make it first")
    if read_only and not path.exists():
        raise ConfigurationError(f"{path} does not exist, and a read-only server does not make it")
    return open_storage(str(path), lambda: FileStorage(str(path), read_only=read_only))


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
        raise ConfigurationError(
            f"{name} is in use by another process, which holds its lock file; stop that one first"
        ) from None
    except OSError as problem:
        raise ConfigurationError(f"can't open {name}: {problem.strerror or problem}") from None
    except (FileStorageError, POSError, ValueError) as problem:
        raise ConfigurationError(
            f"can't open {name}: {type(problem).__name__}: {problem}. Is it a storage's data file?"
        ) from None
