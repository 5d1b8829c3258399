"""A data file that is read while it may be damaged, or belong to a process that commits.

Owns what FileStorage does not tell of its file: which transaction is the last whole one, whether what follows
is damage, and where the transactions from a tid on begin. (FileStorage looks for those from the end of the
file, and fails when that is not the end of a transaction.) Must not know what the transactions are read for.
"""

import os
from typing import Any, BinaryIO

from ZODB.FileStorage import FileIterator, FileStorage

from zeoid.engines.datafile import (
    LENGTH,
    MAGIC_BYTES,
    TRANSACTION_HEADER,
    UNFINISHED,
    tid_that_ends_at,
)
from zeoid.errors import ConfigurationError, CopyFailed
from zeoid.model import NO_TID


class DataFile:
    """The file of an open FileStorage, as far as that found whole transactions in it when it was opened."""

    def __init__(self, storage: FileStorage, name: str) -> None:
        self.path: str = storage.getName()
        self._name = name
        self._end: int = storage._pos
        with open(self.path, "rb") as file:

            def read(position: int, size: int) -> bytes:
                file.seek(position)
                return file.read(size)

            last = tid_that_ends_at(read, self._end)
            if last is None:
                raise ConfigurationError(f"{name} is damaged: no transaction ends at {self._end}")
            #: FileStorage's own answer may be one that another process is just committing, or a damaged one.
            self.last_tid: bytes = last
            #: What is wrong behind the last transaction; empty if nothing is.
            self.damaged_end = ""
            if not _may_follow(file, self._end, last):
                self.damaged_end = (
                    f"no transaction begins at {self._end}, where FileStorage takes the file to end"
                )

    def iterator(self, start: bytes | None, stop: bytes) -> Any:
        """FileStorage's iterator over the transactions from *start* to *stop*."""
        return FileIterator(self.path, None, stop, self._beginning(start or NO_TID))

    def _beginning(self, start: bytes) -> int:
        """Where the first transaction begins whose tid is not before *start*.

        Found from the end, where copies go on. A damaged tid may end the search too soon.
        """
        if start == NO_TID:
            return MAGIC_BYTES
        position = self._end
        with open(self.path, "rb") as file:
            while position > MAGIC_BYTES:
                file.seek(position - LENGTH.size)
                (length,) = LENGTH.unpack(file.read(LENGTH.size))
                begin = position - LENGTH.size - length
                if begin < MAGIC_BYTES or length < TRANSACTION_HEADER.size:
                    raise CopyFailed(f"{self._name} is damaged: no transaction ends at {position}")
                file.seek(begin)
                if file.read(len(start)) < start:
                    break
                position = begin
        return position


def _may_follow(file: BinaryIO, end: int, last: bytes) -> bool:
    """Whether a data file ends at *end*, or what follows may be of a process that commits at this time."""
    file.seek(end)
    header = file.read(TRANSACTION_HEADER.size)
    if len(header) < TRANSACTION_HEADER.size:
        return True
    tid, length, status, *_ = TRANSACTION_HEADER.unpack(header)
    if status == UNFINISHED:
        return True
    if tid <= last or end + length + LENGTH.size > os.fstat(file.fileno()).st_size:
        return False
    file.seek(end + length)
    return file.read(LENGTH.size) == LENGTH.pack(length)
