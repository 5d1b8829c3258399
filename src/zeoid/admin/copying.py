"""Copying one storage into another: transaction by transaction, with everything that belongs to it.

Owns the loop, what may be in its way, and that nothing half done stays: a transaction is in the destination
whole, or not at all, and the copy can be gone on with after any end. Must not know how storages are named or
opened, how progress is shown, or what asks it to stop: `tick` is called for every record and every piece of a
blob, and may raise.

ZODB's own copyTransactionsFrom can't be told to go on, copies a blob's record without the blob if that is
missing, and takes the end of a damaged file for the end of the data.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorageRestoreable, IStorageRestoreable
from ZODB.utils import u64

from zeoid import limits
from zeoid.admin.comparing import check_prefix
from zeoid.admin.reading import Reading, Transaction, is_blob, shown, why
from zeoid.errors import ConfigurationError, CopyFailed
from zeoid.model import NO_TID


@dataclass(slots=True)
class Tally:
    """What was copied so far; transactions count when they are committed, the rest as it goes."""

    transactions: int = 0
    records: int = 0
    blobs: int = 0
    size_bytes: int = 0
    #: The last transaction that the destination has; also one of an earlier, interrupted copy.
    last_tid: bytes = NO_TID
    #: How much of the source is done, from 0 to 1.
    share: float = 0.0
    missing_blobs: int = 0
    #: The first of them, as text.
    missing: list[str] = field(default_factory=list)


Tick = Callable[[Tally], None]


class Stopped(Exception):
    """What a `tick` raises to end the work: somebody asked for it."""


class Copying:
    """One copy from *source* to the open storage *destination*, whose name is *name*."""

    def __init__(
        self,
        source: Reading,
        destination: Any,
        name: str,
        tick: Tick,
        *,
        allow_missing_blobs: bool = False,
    ) -> None:
        self.tally = Tally()
        self._source = source
        self._destination = destination
        self._name = name
        self._tick = tick
        self._allow_missing_blobs = allow_missing_blobs
        self._first_tid: bytes = NO_TID
        self._size_bytes = source.size_bytes

    def prepare(self) -> bytes:
        """The tid after which to begin, NO_TID if the destination is empty.

        ConfigurationError if the destination can't be copied to, or has something else in it.
        """
        if not IStorageRestoreable.providedBy(self._destination):
            raise ConfigurationError(
                f"{self._name} can't be copied to: it can't store transactions as they were"
            )
        if self._destination.isReadOnly():
            raise ConfigurationError(f"{self._name} can't be copied to: it is read-only")
        there = Reading(self._destination, self._name)
        self.tally.last_tid = there.last_tid
        if there.last_tid != NO_TID and (
            differs := check_prefix(self._source, there, lambda: self._tick(self.tally))
        ):
            raise ConfigurationError(
                f"{self._name} is neither empty nor the beginning of {self._source.name}: {differs}"
            )
        return there.last_tid

    def run(self) -> None:
        """Copy what is missing.

        CopyFailed if source or destination fail. Whatever is raised, the destination has the whole
        transactions up to `tally.last_tid`.
        """
        after = self.tally.last_tid
        transactions = self._source.transactions(None if after == NO_TID else after)
        if after != NO_TID:
            # Whoever looks for a transaction in a damaged file may find another one, and pass some over.
            found = next(transactions, None)
            if found is None or found.tid != after:
                raise CopyFailed(
                    f"{self._source.name} is damaged: transaction {shown(after)} isn't found again"
                )
        for transaction in transactions:
            if self._first_tid == NO_TID:
                self._first_tid = transaction.tid
            self._copy(transaction)
        self.tally.share = 1.0
        self._tick(self.tally)

    def _copy(self, transaction: Transaction) -> None:
        meta = transaction.meta
        with contextlib.ExitStack() as stack:
            try:
                self._check_alone(transaction.tid)
                self._destination.tpc_begin(meta, transaction.tid, transaction.status)
                for record in transaction:
                    self._copy_record(record, meta, stack)
                    self._advance(transaction.tid, record)
                self._destination.tpc_vote(meta)
                self._destination.tpc_finish(meta)
            except Exception as problem:
                self._abort(meta)
                if isinstance(problem, CopyFailed | Stopped):
                    raise
                raise CopyFailed(
                    f"{self._name} failed at transaction {shown(transaction.tid)}: {why(problem)}"
                ) from problem
            except BaseException:
                self._abort(meta)
                raise
        self.tally.transactions += 1
        self.tally.last_tid = transaction.tid

    def _check_alone(self, tid: bytes) -> None:
        """Storages take a tid that is given to them as it is, even if it is not later than their last one.

        A data file is locked. (And FileStorage's lastTransaction is wrong until the next commit when it had
        to cut off what was not finished.)
        """
        if isinstance(self._destination, FileStorage):
            return
        last = self._destination.lastTransaction() or NO_TID
        if last >= tid:
            raise CopyFailed(
                f"somebody else writes to {self._name}: it has transaction {shown(last)}, and the next one "
                f"of {self._source.name} is {shown(tid)}"
            )

    def _abort(self, meta: Any) -> None:
        # What led to this is told; a storage that failed so that it can't abort forgets by itself.
        with contextlib.suppress(Exception):
            self._destination.tpc_abort(meta)

    def _copy_record(self, record: Any, meta: Any, stack: contextlib.ExitStack) -> None:
        if not is_blob(record) or not self._copy_blob(record, meta, stack):
            self._destination.restore(record.oid, record.tid, record.data, "", record.data_txn, meta)
        self.tally.records += 1
        self.tally.size_bytes += 0 if record.data is None else len(record.data)

    def _advance(self, tid: bytes, record: Any) -> None:
        """Say how far it is: by the position in a data file, or else by the time between first and last."""
        tally = self.tally
        if self._size_bytes:
            tally.share = min(getattr(record, "pos", 0) / self._size_bytes, 1.0)
        else:
            first, last = u64(self._first_tid), u64(self._source.last_tid)
            tally.share = (u64(tid) - first) / (last - first) if last > first else 0.0
        self._tick(tally)

    def _copy_blob(self, record: Any, meta: Any, stack: contextlib.ExitStack) -> bool:
        """Whether there was a blob to copy, together with its record."""
        with self._source.blob(record) as pieces:
            if pieces is None:
                self._miss(record)
                return False
            if not IBlobStorageRestoreable.providedBy(self._destination):
                raise CopyFailed(
                    f"object {record.oid.hex()} of transaction {shown(record.tid)} is a blob, and "
                    f"{self._name} can't take it; was it opened without a blob directory?"
                )
            # In the destination's own folder: it takes the file by renaming it.
            descriptor, path = tempfile.mkstemp(".tmp", "copy", self._destination.temporaryDirectory())
            stack.callback(_remove, path)
            with os.fdopen(descriptor, "wb") as copy:
                for piece in pieces:
                    copy.write(piece)
                    self.tally.size_bytes += len(piece)
                    self._tick(self.tally)
        self._destination.restoreBlob(record.oid, record.tid, record.data, path, record.data_txn, meta)
        self.tally.blobs += 1
        return True

    def _miss(self, record: Any) -> None:
        what = f"the blob of object {record.oid.hex()} in transaction {shown(record.tid)}"
        if not self._allow_missing_blobs:
            raise CopyFailed(
                f"{self._source.name}: {what} is missing; if it is lost, --allow-missing-blobs copies its "
                "record without it"
            )
        self.tally.missing_blobs += 1
        if len(self.tally.missing) < limits.COPY_TOLD:
            self.tally.missing.append(what)


def _remove(path: str) -> None:
    """Remove a blob's temporary file, if the storage did not take it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
