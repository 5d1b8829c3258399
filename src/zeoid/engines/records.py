"""The records of an open FileStorage's data file, read one by one.

Owns the way from an object to its records (the newest one by the storage's index, older ones by the chain of
positions in them), to the data of one that only refers to another, and from a tid to its transaction. The
bytes are `datafile`'s. Reads with positioned reads, each under the storage's lock: a pack replaces index and
file under it. Positions are good for one file only, so a header knows its file, and what is asked of it later
raises FileReplaced; `DataFile.steadily` then starts again.

How a transaction is found: FileStorage keeps no index of tids, but tids increase, and each transaction ends
with its length, so they can be walked from the end. That is done for what is recent. Further back the file
is bisected: a record header that is met by searching somewhere in the middle, and that the index vouches for,
tells where its transaction begins. Data of an object may look like a record, but nothing vouches for it.
"""

import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from ZODB.FileStorage.format import CorruptedError

from zeoid.engines.datafile import LENGTH, MAGIC_BYTES, RECORD_HEADER, TRANSACTION_HEADER

_Result = TypeVar("_Result")
#: A record's header with the length or position that follows it: no record is shorter.
_HEADER_BYTES = RECORD_HEADER.size + LENGTH.size
#: What is read at once when transactions are walked; a range that is not longer is not bisected any further.
_BLOCK_BYTES = 1024 * 1024
#: What is read at once in search of a record header.
_PROBE_BYTES = 64 * 1024
#: The newest revisions of an object among which a record found by searching must be.
_VOUCHING_REVISIONS = 100
#: After so many that were none, the search is given up.
_PROBE_ATTEMPTS = 200
#: What follows the tid in a record's header: positions and a length below 2**48, and two unused bytes.
_AFTER_TID = rb"\0\0.{6}\0\0.{6}\0\0\0\0"
_TID_OFFSET = _TID_BYTES = 8


class FileReplaced(Exception):
    """A pack has replaced the file in which a position was found."""


class RecordHeader(NamedTuple):
    """One revision of an object. Positions are 0 where there is nothing."""

    position: int
    oid: bytes
    tid: bytes
    previous: int
    transaction: int
    size: int
    #: Where the record with the same data is, if this one has none: 0 when the object ceases to be.
    back: int
    #: The file that the positions are in.
    file: Any

    @property
    def end(self) -> int:
        return self.position + RECORD_HEADER.size + (self.size or LENGTH.size)


class DataFile:
    """See the module. CorruptedError where the file has not what it should have."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def steadily(self, look: Callable[[], _Result]) -> _Result:
        """What *look* finds, in one and the same file."""
        while True:
            try:
                return look()
            except FileReplaced:
                continue  # there is one new file for each pack that ends

    def newest(self, oid: bytes) -> RecordHeader | None:
        """The record of the current revision, or of the deletion."""
        with self._storage._lock:
            position = self._storage._index.get(oid)
            return self._header(self._storage._file, position, oid) if position else None

    def revision(self, oid: bytes, tid: bytes) -> RecordHeader | None:
        """The record of *oid* that transaction *tid* wrote."""
        with self._storage._lock:
            header = self.newest(oid)
            while header is not None and header.tid > tid:
                header = self.previous(header)
            return header if header is not None and header.tid == tid else None

    def previous(self, header: RecordHeader) -> RecordHeader | None:
        """The record of the revision before this one."""
        return self._header(header.file, header.previous, header.oid) if header.previous else None

    def source(self, header: RecordHeader) -> RecordHeader | None:
        """The record that has its data, itself if it has; None if the object ceases to be."""
        with self._storage._lock:
            while not header.size:
                if not header.back:
                    return None
                header = self._header(header.file, header.back, header.oid)
            return header

    def data(self, header: RecordHeader) -> bytes | None:
        """Its data; None if the object ceases to be."""
        source = self.source(header)
        if source is None:
            return None
        return self._read(source.file, source.position + RECORD_HEADER.size, source.size)

    def transaction(self, tid: bytes) -> tuple[bytes, list[RecordHeader]] | None:
        """The status of the transaction *tid*, and its records in order; None if there is none."""
        return self.steadily(lambda: self._transaction(tid))

    def _transaction(self, tid: bytes) -> tuple[bytes, list[RecordHeader]] | None:
        with self._storage._lock:
            file, end = self._storage._file, self._storage._pos
        start = self._find(file, tid, end)
        if start is None:
            return None
        header = self._read(file, start, TRANSACTION_HEADER.size)
        return TRANSACTION_HEADER.unpack(header)[2], list(self._records(file, start))

    def _records(self, file: Any, start: int) -> Iterator[RecordHeader]:
        """The records of the transaction that begins there."""
        header = self._read(file, start, TRANSACTION_HEADER.size)
        _, length, _, *meta_bytes = TRANSACTION_HEADER.unpack(header)
        position, end = start + TRANSACTION_HEADER.size + sum(meta_bytes), start + length
        while position < end:
            record = self._header(file, position)
            yield record
            position = record.end
        if position > end:
            raise CorruptedError(f"the last record of the transaction at {start} is longer than that")

    def last_transactions(self, most: int, most_records: int) -> list[tuple[bytes, list[bytes]]]:
        """(tid, oids) of the newest transactions, oldest first: so many, with so many records together."""
        return self.steadily(lambda: self._last_transactions(most, most_records))

    def _last_transactions(self, most: int, most_records: int) -> list[tuple[bytes, list[bytes]]]:
        with self._storage._lock:
            file, end = self._storage._file, self._storage._pos
        found: list[tuple[bytes, list[bytes]]] = []
        for start, tid in self._backwards(file, MAGIC_BYTES, end):
            if len(found) >= most:
                break
            oids = [header.oid for header in islice(self._records(file, start), most_records + 1)]
            most_records -= len(oids)
            if most_records < 0:
                break
            found.append((tid, list(dict.fromkeys(oids))))
        return found[::-1]

    # Finding a transaction ------------------------------------------------------------------------

    def _find(self, file: Any, tid: bytes, end: int) -> int | None:
        """Where the transaction *tid* begins, in the file whose last transaction ends at *end*."""
        low, high, high_tid = MAGIC_BYTES, end, b""
        for start, found in self._backwards(file, low, end):
            if found <= tid:
                return start if found == tid else None
            high, high_tid = start, found
            if end - start > _BLOCK_BYTES:
                break
        if high == low:
            return None
        low_tid = self._read(file, low, _TID_BYTES)
        # A transaction begins at each of both. If the one that is looked for is there at all, it is the first
        # of them or begins between.
        while high - low > _BLOCK_BYTES:
            between = self._between(file, low, low_tid, high, high_tid)
            if between is None:
                break
            if between[1] <= tid:
                low, low_tid = between
            else:
                high, high_tid = between
        for start, found in self._backwards(file, low, high):
            if found <= tid:
                return start if found == tid else None
        return None

    def _backwards(self, file: Any, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Position and tid of the transactions that fill the file between, the last one first."""
        block, base = b"", end
        while end > start:
            if end - LENGTH.size < base:
                base = max(start, end - _BLOCK_BYTES)
                block = self._read(file, base, end - base)
            (length,) = LENGTH.unpack_from(block, end - LENGTH.size - base)
            begin = end - LENGTH.size - length
            if length < TRANSACTION_HEADER.size or begin < start:
                raise CorruptedError(f"no transaction ends at {end}")
            if begin >= base:
                header = block[begin - base : begin - base + TRANSACTION_HEADER.size]
            else:
                header = self._read(file, begin, TRANSACTION_HEADER.size)
            tid, again, *_ = TRANSACTION_HEADER.unpack(header)
            if again != length:
                raise CorruptedError(f"the lengths of the transaction at {begin} differ")
            yield begin, tid
            end = begin

    def _between(
        self, file: Any, low: int, low_tid: bytes, high: int, high_tid: bytes
    ) -> tuple[int, bytes] | None:
        """Position and tid of a transaction near the middle between two; None if none is easily found."""
        middle = (low + high) // 2
        pattern = re.compile(_any_between(low_tid, high_tid) + _AFTER_TID, re.DOTALL)
        attempts = _PROBE_ATTEMPTS
        for base in range(middle, min(middle + _BLOCK_BYTES, high - _HEADER_BYTES), _PROBE_BYTES):
            block = self._read(file, base, min(_PROBE_BYTES + _HEADER_BYTES, high - base))
            for at in _like_headers(block, pattern):
                oid, tid, _, start, _, _ = RECORD_HEADER.unpack_from(block, at)
                position = base + at
                attempts -= 1
                if attempts < 0:
                    return None
                if (
                    low_tid < tid < high_tid
                    and self._is_record(file, position, oid)
                    and self._read(file, start, len(tid)) == tid
                ):
                    return start, tid
        return None

    def _is_record(self, file: Any, position: int, oid: bytes) -> bool:
        """Whether one of the newest records of *oid* is there."""
        with self._storage._lock:
            header = self.newest(oid)
            for _ in range(_VOUCHING_REVISIONS):
                if header is None or header.position <= position:
                    break
                header = self.previous(header)
        return header is not None and header.position == position and header.file is file

    # Reading --------------------------------------------------------------------------------------

    def _header(self, file: Any, position: int, oid: bytes | None = None) -> RecordHeader:
        fixed = self._read(file, position, _HEADER_BYTES)
        owner, tid, previous, transaction, _, size = RECORD_HEADER.unpack_from(fixed)
        back = 0
        if not size:
            (back,) = LENGTH.unpack_from(fixed, RECORD_HEADER.size)
        if oid is not None and owner != oid:
            raise CorruptedError(f"there is no record of object {oid.hex()} at {position}")
        if not max(previous, transaction, back) < position:
            # Following one that is not further ahead might never end.
            raise CorruptedError(f"the record at {position} refers to what is behind it")
        return RecordHeader(position, owner, tid, previous, transaction, size, back, file)

    def _read(self, file: Any, position: int, size: int) -> bytes:
        with self._storage._lock:
            if self._storage._file is not file:
                raise FileReplaced
            if position + size > self._storage._pos:
                raise CorruptedError(f"the data file ends before byte {position + size}")
            data = os.pread(file.fileno(), size, position)
        if len(data) < size:
            raise CorruptedError(f"the data file ends before byte {position + size}")
        return data


def _any_between(low: bytes, high: bytes) -> bytes:
    """A pattern of the strings between two different ones of one length, and of not too many others."""
    at = next(index for index, byte in enumerate(low) if byte != high[index])
    return re.escape(low[:at]) + b"[\\x%02x-\\x%02x].{%d}" % (low[at], high[at], len(low) - at - 1)


def _like_headers(block: bytes, pattern: re.Pattern[bytes]) -> Iterator[int]:
    """Where in *block* a record's header might be, if *pattern* is found at its tid."""
    match = pattern.search(block, _TID_OFFSET)
    while match is not None:
        at = match.start() - _TID_OFFSET
        if at + RECORD_HEADER.size <= len(block):
            yield at
        match = pattern.search(block, match.start() + 1)
