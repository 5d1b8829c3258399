"""Reading all transactions of a storage, in order, so that nothing that is missing goes unnoticed.

Owns what iterating over any ZODB storage takes: errors that say where they came up, and that a storage that
ends early is found out. FileStorage stops at a damaged place as if the file ended there, and says so in its
log at most; any other storage must reach the transaction that it calls its last one. Must not know who reads,
nor where storages come from.
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO

from persistent.TimeStamp import TimeStamp
from ZODB.blob import is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage, IStorageIteration
from ZODB.POSException import POSKeyError
from ZODB.utils import p64, u64

from zeoid import limits
from zeoid.admin.datafiles import DataFile
from zeoid.errors import ConfigurationError, CopyFailed
from zeoid.model import NO_TID

#: Where FileStorage tells of damage that it does not raise.
_FILESTORAGE_LOG = "ZODB.FileStorage"


def shown(tid: bytes) -> str:
    """A tid as people and tools read it: its digits, and its time."""
    return f"{tid.hex()} ({TimeStamp(tid)} UTC)"


def why(problem: BaseException) -> str:
    """An error of any library on one line, with its kind."""
    return " ".join(f"{type(problem).__name__}: {problem}".split()).removesuffix(":")


def _after(tid: bytes) -> str:
    return f"after transaction {shown(tid)}" if tid != NO_TID else "before its first transaction"


class Transaction:
    """One transaction; iterating over it gives its records, once, and before the next one is asked for."""

    __slots__ = ("_records", "meta", "status", "tid")

    def __init__(self, record: Any, records: Iterator[Any]) -> None:
        self.tid: bytes = record.tid
        self.status: str = record.status
        #: The extension stays as it is pickled: it may name classes that are not here.
        self.meta = TransactionMetaData(record.user, record.description, record.extension_bytes)
        self._records = records

    def __iter__(self) -> Iterator[Any]:
        return self._records


class Reading:
    """An open storage as a sequence of transactions; *name* is what users call it.

    A context manager, in which FileStorage's complaints about the file become errors.
    """

    def __init__(self, storage: Any, name: str) -> None:
        if not IStorageIteration.providedBy(storage) and not hasattr(storage, "iterator"):
            raise ConfigurationError(f"{name} can't be read as a whole: it has no iterator over transactions")
        self.storage = storage
        self.name = name
        #: A history-free RelStorage keeps the newest revision of each object, and nothing of transactions.
        self.keeps_history: bool = getattr(storage, "keep_history", True) is not False
        self.has_blobs: bool = IBlobStorage.providedBy(storage)
        self._complaint = ""
        self._data_file: DataFile | None = None
        try:
            if isinstance(storage, FileStorage):
                self._data_file = DataFile(storage, name)
                self.last_tid: bytes = self._data_file.last_tid
            else:
                self.last_tid = storage.lastTransaction() or NO_TID
        except ConfigurationError:
            raise
        except Exception as problem:
            raise ConfigurationError(f"{name} can't be read: {why(problem)}") from problem

    def __enter__(self) -> "Reading":
        if self._data_file is not None:
            logging.getLogger(_FILESTORAGE_LOG).addFilter(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(_FILESTORAGE_LOG).removeFilter(self._hear)

    def _hear(self, record: logging.LogRecord) -> bool:
        """Take what is logged about our file for ourselves."""
        text = record.getMessage()
        if record.levelno < logging.WARNING or self._data_file is None or self._data_file.path not in text:
            return True
        self._complaint = self._complaint or text
        return False

    @property
    def size_bytes(self) -> int | None:
        """The size of the data file that records tell their position in; None where there is none."""
        return int(self.storage.getSize()) if self._data_file is not None else None

    def transactions(
        self, start: bytes | None = None, stop: bytes | None = None
    ) -> Generator[Transaction, None, None]:
        """Those from *start* to *stop*, both included; to the last one there is now if it is left out.

        CopyFailed when one can't be read, is not later than the one before, or the last one is missing.
        """
        stop = self.last_tid if stop is None else stop
        tid = NO_TID

        def where() -> str:
            return _after(tid)

        with self._iterator(start, stop) as records:
            for record in self._checked(records, where):
                if record.tid <= tid:
                    raise CopyFailed(f"{self.name}: {shown(record.tid)} is not later, though {where()}")
                if record.tid > stop:
                    break
                tid = record.tid
                yield Transaction(record, self._records(record))
                if tid == stop:
                    break  # what follows may be half written
        if tid < stop == self.last_tid:
            raise CopyFailed(f"{self.name} ends {where()}, but its last transaction is {shown(stop)}")
        if stop == self.last_tid and self._data_file is not None and self._data_file.damaged_end:
            raise CopyFailed(f"{self.name} is damaged {where()}: {self._data_file.damaged_end}")

    @contextlib.contextmanager
    def _iterator(self, start: bytes | None, stop: bytes) -> Iterator[Any]:
        try:
            if stop == NO_TID:
                iterator: Any = ()
            elif self._data_file is not None:
                iterator = self._data_file.iterator(start, stop)
            else:
                iterator = self.storage.iterator(start, stop)
        except CopyFailed:
            raise
        except Exception as problem:
            raise CopyFailed(f"{self.name} can't be read: {why(problem)}") from problem
        try:
            yield iterator
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    def _records(self, transaction: Any) -> Iterator[Any]:
        return self._checked(transaction, lambda: f"in transaction {shown(transaction.tid)}")

    def _checked(self, items: Any, where: Callable[[], str]) -> Iterator[Any]:
        """What iterating over *items* gives; CopyFailed where it fails or FileStorage complains."""
        try:
            iterator = iter(items)
            while True:
                item = next(iterator, None)
                if self._complaint:
                    break
                if item is None:
                    return
                yield item
        except CopyFailed:
            raise
        except Exception as problem:
            raise CopyFailed(
                f"{self.name} is damaged or can't be read {where()}: {why(problem)}"
            ) from problem
        raise CopyFailed(f"{self.name} is damaged {where()}: {self._complaint}")

    def current_tid(self, oid: bytes) -> bytes | None:
        """The tid of the newest revision of an object; None if it is not there, or deleted."""
        try:
            found = self.storage.loadBefore(oid, p64(u64(self.last_tid) + 1))
        except POSKeyError:
            return None
        except Exception as problem:
            raise CopyFailed(f"{self.name}: object {oid.hex()} can't be read: {why(problem)}") from problem
        return None if found is None else found[1]

    @contextlib.contextmanager
    def blob(self, record: Any) -> Iterator[Iterator[bytes] | None]:
        """The pieces of the blob whose record this is, None if its file is missing.

        CopyFailed if it can't be read, or the storage was opened without its blobs.
        """
        what = f"object {record.oid.hex()} of transaction {shown(record.tid)}"
        if not self.has_blobs:
            raise CopyFailed(f"{what} is a blob, and {self.name} was opened without a blob directory")
        try:
            file = self.storage.openCommittedBlobFile(record.oid, record.tid)
        except (POSKeyError, FileNotFoundError):
            yield None
            return
        except Exception as problem:
            raise CopyFailed(f"{self.name}: the blob of {what} can't be read: {why(problem)}") from problem
        with file:
            yield self._pieces(file, what)

    def _pieces(self, file: BinaryIO, what: str) -> Iterator[bytes]:
        try:
            while piece := file.read(limits.COPY_PIECE_BYTES):
                yield piece
        except OSError as problem:
            raise CopyFailed(f"{self.name}: the blob of {what} can't be read: {why(problem)}") from problem


def is_blob(record: Any) -> bool:
    """Whether the record's object is a blob, whose bytes are in a file of their own."""
    return bool(is_blob_record(record.data))
