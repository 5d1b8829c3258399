"""Blobs of a ZODB storage that keeps them by itself, for the engine that adapts it.

A blob is staged in the storage's directory for temporary files, and handed to it with its record. From then
on the file is the storage's, whatever becomes of the transaction; so it is handed over only when no conflict
is left that can be found before. Owns the staged files; knows nothing of what a storage does with one.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable
from typing import Any, BinaryIO, Final

from ZODB.interfaces import IBlobStorage
from ZODB.POSException import Unsupported

from zeoid.engines.disk import Disk
from zeoid.engines.journal_format import BLOB_NAME_BYTES
from zeoid.engines.staging import StagedFile
from zeoid.model import StagedBlob

_SUFFIX: Final = ".zeoid"


class StorageBlobs:
    """The blobs of *storage*. Unsupported from every method if it keeps none."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self._disk = Disk()

    def _folder(self) -> str:
        if not IBlobStorage.providedBy(self._storage):
            raise Unsupported(f"{self._storage.getName()} takes no blobs")
        folder: str = os.path.abspath(self._storage.temporaryDirectory())
        return folder

    def path(self, blob: StagedBlob) -> str:
        """Where it is staged."""
        return os.path.join(self._folder(), blob.name.hex() + _SUFFIX)

    def stage(self, size_bytes: int | None) -> StagedFile:
        folder = self._folder()
        name = secrets.token_bytes(BLOB_NAME_BYTES)
        path = os.path.join(folder, name.hex() + _SUFFIX)
        return StagedFile(self._disk, path, name, os.stat(folder).st_mode, size_bytes)

    def discard(self, blobs: Iterable[StagedBlob]) -> None:
        for blob in blobs:
            with contextlib.suppress(OSError):
                os.unlink(self.path(blob))

    def open(self, oid: bytes, serial: bytes, reader: Any = None) -> BinaryIO:
        """*reader*: an instance of the storage to read with."""
        self._folder()
        file: BinaryIO = (reader or self._storage).openCommittedBlobFile(oid, serial)
        return file
