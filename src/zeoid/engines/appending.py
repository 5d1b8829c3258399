"""Writing to a data file: the commit journal first, then the file itself, now and then a checkpoint.

    what happens                          journal               data file             then
    a batch is committed                  Batch, synced         appended              it counts
    a very large transaction is committed Direct, synced        appended, synced
                                          Base, synced                                it counts
    checkpoint                            Base, synced          synced before that    segments are reused
    a pack is about to replace the file   Base of either file   both synced before
    a pack has replaced the file          Base                  directory synced

Blobs get their final names before the transaction is appended to the data file, so that who sees it finds
them, or, with a very large one, before its Base. Before any Base these names are synced, after it the staged
ones go.

Owns the order of these writes, and the room that prepared transactions were promised in the data file. The
journal's format is `journal`'s, the data file's `datafile`'s, the files of blobs are `blobs`'s; opening after
a crash is `recovery`'s business.

Invariants:
 1. What counts as committed is durable: in the journal, after the newest Base, or in the data file before it.
 2. The data file beyond the newest Base has nothing but what the journal has, too, and a tail that a crash
    may leave of a transaction that does not count.
 3. Everything that writes holds FileStorage's commit lock, which a pack also takes, so that a Base tells the
    length that the file has when it is written.
 4. After an error in a write or a sync nothing is written any more: what is on the disk can't be known.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from zeoid import limits
from zeoid.engines.blobs import BlobDirectory
from zeoid.engines.datafile import lay_out, tid_that_ends_at
from zeoid.engines.disk import Disk
from zeoid.engines.journal import Base, Batch, Direct, Journal, LoggedTransaction, OidMark, Place
from zeoid.engines.records import DataFile
from zeoid.model import frozen

#: So much is put together for one write.
_PIECE_BYTES = 1024 * 1024


class Appender:
    """Writes to one open FileStorage's data file, and to the journal beside it."""

    def __init__(
        self, storage: Any, journal: Journal, disk: Disk, blobs: BlobDirectory | None = None
    ) -> None:
        self._storage = storage
        self.journal = journal
        self.blobs = blobs
        self.disk = disk
        self.data_file = DataFile(storage)
        self._room = threading.Lock()
        self._promised_bytes = 0
        self._promised_to_journal_bytes = 0
        self._reserved: tuple[Any, int] = (None, 0)
        #: Whether the data file's name may lead to either of two files, after a crash.
        self._replaced = False
        #: Why nothing can be written any more; empty while all is well.
        self.failure = ""

    # Room -----------------------------------------------------------------------------------------

    def promise(self, size_bytes: int) -> None:
        """See to it that so much more can be written. OSError says why that can't be."""
        with self._room:
            storage = self._storage
            file, end = self._reserved
            wanted = storage._pos + self._promised_bytes + size_bytes
            if file is not storage._file or wanted > end:
                with storage._lock:  # a pack holds it while it replaces the file
                    self._reserve(wanted)
            if size_bytes <= limits.BATCH_BYTES:
                self.journal.reserve(self._promised_to_journal_bytes + size_bytes)
                self._promised_to_journal_bytes += size_bytes
            self._promised_bytes += size_bytes

    def _reserve(self, wanted: int) -> None:
        """Have room in the file up to this position."""
        file, position = self._storage._file, self._storage._pos
        end = wanted + limits.RESERVE_BYTES
        try:
            self.disk.reserve(file.fileno(), position, end - position)
        except OSError:
            end = wanted  # there may be room for this one, if not for more
            self.disk.reserve(file.fileno(), position, end - position)
        self._reserved = file, end

    def take_back(self, *sizes_bytes: int) -> None:
        """What was promised has been written, or never will be."""
        with self._room:
            for size_bytes in sizes_bytes:
                self._promised_bytes -= size_bytes
                if size_bytes <= limits.BATCH_BYTES:
                    self._promised_to_journal_bytes -= size_bytes

    # Committing -----------------------------------------------------------------------------------

    def commit(self, transactions: tuple[LoggedTransaction, ...], size_bytes: int) -> None:
        """Make them durable, and readable in the storage. OSError: see invariant 4.

        *size_bytes*: what was promised for them all.
        """
        # As `_writing`, without its generators: this is on the way of every commit.
        self._storage._commit_lock.acquire()
        try:
            if self.failure:
                raise OSError(self.failure)
            if len(transactions) == 1 and size_bytes > limits.BATCH_BYTES:
                self._commit_directly(transactions[0])
            else:
                self.journal.append(Batch(transactions))
                self._append(transactions)
        except BaseException as problem:
            self._fail(problem)
            raise
        finally:
            self._storage._commit_lock.release()

    def _commit_directly(self, transaction: LoggedTransaction) -> None:
        tail = self._lay_out([transaction])
        place = Place(tail.end, transaction.tid)
        length = tail.end - tail.start
        blobs = transaction.blobs
        self.journal.append(Direct(transaction.tid, transaction.id, tail.start, length, blobs))
        self._write(tail)
        self.disk.sync(self._storage._file.fileno())
        if self.blobs is not None and blobs:
            self.blobs.place(transaction.tid, blobs)
        self._state(place)
        self._reveal(tail)

    def _append(self, transactions: Sequence[LoggedTransaction], *, again: bool = False) -> None:
        """*again*: a crash may have come at any point of this before."""
        tail = self._lay_out(transactions)
        if self.blobs is not None:
            place = self.blobs.place_again if again else self.blobs.place
            for transaction in transactions:
                if transaction.blobs:
                    place(transaction.tid, transaction.blobs)
        self._write(tail)
        self._reveal(tail)

    def _lay_out(self, transactions: Sequence[LoggedTransaction]) -> "_Tail":
        """What is to be written behind the file's end."""
        start = end = self._storage._pos
        parts: list[bytes] = []
        index: dict[bytes, int] = {}
        for transaction in transactions:
            status = transaction.status.encode("ascii")
            meta = transaction.user, transaction.description, transaction.extension
            laid_out = lay_out(end, transaction.tid, status, *meta, self._places(transaction))
            parts += laid_out.parts
            index.update(laid_out.index)
            end += laid_out.length
        return _Tail(start, end, parts, index, transactions[-1].tid)

    def _write(self, tail: "_Tail") -> None:
        """Who reads the file meanwhile finds a last transaction longer than the file, and stops there."""
        file, position = self._storage._file.fileno(), tail.start
        if tail.end - position <= _PIECE_BYTES:
            self.disk.pwrite(file, b"".join(tail.parts), position)
            return
        for piece in _pieces(tail.parts):
            self.disk.pwrite(file, piece, position)
            position += len(piece)

    def _reveal(self, tail: "_Tail") -> None:
        """Make it known to the storage."""
        storage = self._storage
        index = storage._index
        trees = index._data  # see `filestorage`: its own way in takes five calls
        with storage._lock:
            storage._pos = tail.end
            for oid, position in tail.index.items():
                tree = trees.get(oid[:6])
                if tree is None:
                    index[oid] = position
                else:
                    tree[oid[6:]] = position.to_bytes(6, "big")
            storage._ltid = tail.last_tid

    def _places(self, transaction: LoggedTransaction) -> list[tuple[bytes, int, bytes | None, int]]:
        """The records with what they refer to in the file."""
        places: list[tuple[bytes, int, bytes | None, int]] = []
        trees = self._storage._index._data
        for record in transaction.records:
            oid, data = record.oid, record.data
            tree = trees.get(oid[:6])
            place = None if tree is None else tree.get(oid[6:])
            previous = 0 if place is None else int.from_bytes(place, "big")
            if record.same_as is not None:
                same = self.data_file.revision(oid, record.same_as)
                if same is not None:
                    places.append((oid, previous, None, same.position))
                    continue
            places.append((oid, previous, data, 0))
        return places

    # Checkpoints ----------------------------------------------------------------------------------

    def checkpoint(self) -> bytes:
        """Have the data file durable by itself; the tid that it reaches."""
        # Most of the work is done while others commit; what they add meanwhile is little.
        with self._guarded():
            with self._storage._lock:  # a pack holds it while it replaces the file
                file = self.disk.open(self._storage._file_name, create=False, read_only=False)
            try:
                self.disk.sync(file)
            finally:
                self.disk.close(file)
            if self.blobs is not None:
                self.blobs.sync_names()
        with self._writing():
            reached = self._settle()
        if self.blobs is not None:
            self.blobs.remove_settled()
        return reached

    def _settle(self) -> bytes:
        """As `checkpoint`, holding the commit lock."""
        self.disk.sync(self._storage._file.fileno())
        place = self._place()
        self._state(place)
        return place.tid

    def _state(self, *places: Place, before: Sequence[OidMark] = ()) -> None:
        """Say that the data file is durable so far; under its name, too, if a pack has just replaced it.

        No Base is written anywhere else, so that none leaves a blob behind.
        """
        if self._replaced:
            self.disk.sync_directory(os.path.dirname(self._storage._file_name))
            self._replaced = False
        if self.blobs is not None:
            self.blobs.sync_names()
        self.journal.append(*before, Base(places))
        if self.blobs is not None:
            self.blobs.settle()

    def _place(self) -> Place:
        storage = self._storage
        return place_of(self.disk, storage._file.fileno(), storage._pos)

    def sync_file(self, path: str) -> None:
        """Have a file durable that is not in use yet. If that fails, it is only that file that is spoilt."""
        file = self.disk.open(path, create=False, read_only=False)
        try:
            self.disk.sync(file)
        finally:
            self.disk.close(file)

    def discard(self, path: str) -> None:
        """Remove what a pack has made, if it has come so far, and if possible."""
        with contextlib.suppress(OSError):
            if self.disk.exists(path):
                self.disk.unlink(path)

    def settle_either(self, packed_path: str, length: int) -> None:
        """A pack has made *packed_path*, and will replace the data file by it. The commit lock is held."""
        storage, disk = self._storage, self.disk
        with self._guarded():
            file = disk.open(packed_path, create=False, read_only=False)
            try:
                disk.sync(file)
                packed = place_of(disk, file, length)
            finally:
                disk.close(file)
            disk.sync(storage._file.fileno())
            index = f"{storage._file_name}.index"
            if disk.exists(index):  # if a crash brought it back later, it might seem to fit the other file
                disk.unlink(index)
            disk.sync_directory(os.path.dirname(packed_path))
            # The object with the highest oid may be gone after this, and its oid is not to be another's.
            self._state(self._place(), packed, before=[OidMark(storage._oid)])
            self._replaced = True

    def settle_packed(self) -> None:
        """The data file was replaced, unless there was nothing to pack."""
        with self._writing():
            self._settle()
        if self.blobs is not None:
            self.blobs.remove_settled()

    def replay(self, transactions: Sequence[LoggedTransaction], withdrawn: Sequence[Direct] = ()) -> None:
        """Write what the journal has and the data file has not, take back blobs of what is not committed, and
        settle."""
        with self._writing():
            for direct in withdrawn:
                if self.blobs is not None:
                    self.blobs.withdraw(direct.tid, direct.blobs)
            for transaction in transactions:
                self._append([transaction], again=True)
                self._storage.set_max_oid(max((each.oid for each in transaction.records), default=b""))
            self._settle()

    def note_oids(self, mark: bytes) -> None:
        """Oids up to *mark* may be handed out."""
        with self._guarded():
            self.journal.append(OidMark(mark))

    def close(self) -> None:
        """Settle, unless that can't be, and give back the room that was reserved."""
        storage = self._storage
        try:
            if not self.failure:
                self.checkpoint()
                self.disk.truncate(storage._file.fileno(), storage._pos)
        finally:
            self.journal.close()

    def sync_index(self) -> None:
        """Make durable the index that FileStorage wrote as it was closed: a part of one may look like one."""
        with contextlib.suppress(OSError):
            self.sync_file(f"{self._storage._file_name}.index")
            self.disk.sync_directory(os.path.dirname(self._storage._file_name))

    # ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong within is the last thing that is written."""
        if self.failure:
            raise OSError(self.failure)
        try:
            yield
        except BaseException as problem:
            self._fail(problem)
            raise

    def _fail(self, problem: BaseException) -> None:
        self.failure = self.failure or f"{type(problem).__name__}: {problem}"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._storage._commit_lock, self._guarded():
            yield


@frozen
class _Tail:
    """Transactions as they will stand at the file's end."""

    start: int
    end: int
    parts: list[bytes]
    index: dict[bytes, int]
    last_tid: bytes


def place_of(disk: Disk, file: int, length: int) -> Place:
    """The end of a data file that is *length* bytes long."""
    tid = tid_that_ends_at(lambda position, size: disk.pread(file, size, position), length)
    if tid is None:
        raise OSError(f"no transaction ends at byte {length:,} of the data file")
    return Place(length, tid)


def _pieces(parts: Sequence[bytes]) -> Iterator[bytes]:
    """*parts*, joined to pieces that are worth a write."""
    gathered: list[bytes] = []
    size = 0
    for part in parts:
        gathered.append(part)
        size += len(part)
        if size >= _PIECE_BYTES:
            yield b"".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)
