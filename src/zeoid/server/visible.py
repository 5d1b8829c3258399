"""One storage as clients may see it: everything up to the one visible tid, nothing beyond.

A transaction may already be in the engine while its invalidations are not yet on their way. Until they are,
no reply may reveal it. So everything that reads goes through here. Owns the visible tid.
"""

from base64 import decodebytes
from binascii import Error as Base64Error
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from ZODB.POSException import POSKeyError, StorageError

from zeoid import limits, system
from zeoid.model import MAX_TID, Revision, tid_after
from zeoid.ports import Engine, TransactionRecord


class Visible:
    """The engine's reading side, bounded by `tid`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tid = engine.last_tid()
        self._beyond: bytes = tid_after(self._tid)

    @property
    def tid(self) -> bytes:
        """The newest tid that clients may see."""
        return self._tid

    def advance(self, tid: bytes) -> None:
        """The invalidations of *tid* are queued to every client."""
        if tid <= self._tid:
            raise AssertionError("the visible tid only grows")
        self._beyond = tid_after(tid)
        self._tid = tid

    def load_before(self, oid: bytes, tid: bytes) -> Revision | None:
        beyond = self._beyond
        revision = self._engine.load_before(oid, tid if tid < beyond else beyond)
        if revision is not None and revision[2] is not None and revision[2] > self._tid:
            return revision[0], revision[1], None
        return revision

    def load_before_many(self, oids: Sequence[bytes], tid: bytes) -> list[Revision | None]:
        """As `load_before` for each, as far as it goes in one reply. None for what there is not."""
        beyond, last = self._beyond, self._tid
        revisions = self._engine.load_before_many(
            oids, tid if tid < beyond else beyond, limits.BULK_LOAD_BYTES
        )
        return [
            (revision[0], revision[1], None)
            if revision is not None and revision[2] is not None and revision[2] > last
            else revision
            for revision in revisions
        ]

    def load_serial(self, oid: bytes, serial: bytes) -> bytes:
        if serial > self._tid:
            raise POSKeyError(oid)
        return self._engine.load_serial(oid, serial)

    def open_blob(self, oid: bytes, serial: bytes) -> BinaryIO:
        if serial > self._tid:
            raise POSKeyError(oid)
        file = self._engine.open_blob(oid, serial)
        if system.is_scarce(file.fileno()):
            file.close()
            raise StorageError("the server has too many open files")
        return file

    def current_tid(self, oid: bytes) -> bytes:
        try:
            tid = self._engine.current_tid(oid)
        except POSKeyError:
            tid = MAX_TID  # it is deleted, but maybe only by a transaction that is not visible yet
        if tid <= self._tid:
            return tid
        revision = self._engine.load_before(oid, self._beyond)
        if revision is None:
            raise POSKeyError(oid)
        return revision[1]

    def history(self, oid: bytes, size: int) -> list[dict[str, Any]]:
        last = self._tid
        size = min(size, limits.UNDO_ENTRIES)
        entries = [entry for entry in self._engine.history(oid, size + 1) if entry["tid"] <= last]
        return entries[:size]

    def record_iternext(self, following: bytes | None) -> tuple[bytes, bytes, bytes, bytes | None]:
        while True:
            try:
                oid, tid, data, after = self._engine.record_iternext(following)
            except POSKeyError as problem:
                # As FileStorage says that it met a deleted object; see above.
                (oid,), tid, data = problem.args, MAX_TID, b""
                after = self._oid_after(oid)
            if tid <= self._tid:
                return oid, tid, data, after
            revision = self._engine.load_before(oid, self._beyond)
            if revision is not None:
                return oid, revision[1], revision[0], after
            if after is None:
                raise POSKeyError(oid)
            following = after

    def _oid_after(self, oid: bytes) -> bytes | None:
        try:
            return self._engine.record_iternext(tid_after(oid))[0]
        except POSKeyError as problem:
            following: bytes = problem.args[0]
            return following
        except ValueError:
            return None

    def undo_log(self, first: int, last: int) -> list[dict[str, Any]]:
        bound = self._tid
        return _up_to(bound, self._engine.undo_log(first, _bounded(first, last)))

    def undo_info(self, first: int, last: int, specification: dict[str, Any] | None) -> list[dict[str, Any]]:
        bound = self._tid
        return _up_to(bound, self._engine.undo_info(first, _bounded(first, last), specification))

    def iterate(self, start: bytes | None, stop: bytes | None) -> Iterator[TransactionRecord]:
        last = self._tid
        return self._engine.iterate(start, last if stop is None else min(stop, last))


def _bounded(first: int, last: int) -> int:
    """*last*, or less: where it is negative, it is how many are wanted."""
    if last < 0:
        return max(last, -limits.UNDO_ENTRIES)
    return min(last, first + limits.UNDO_ENTRIES)


def _up_to(bound: bytes, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if _undo_tid(entry["id"]) <= bound]


def _undo_tid(transaction_id: bytes) -> bytes:
    """The tid in an undo log's id, as FileStorage makes them. Others' ids tell nothing."""
    try:
        tid = decodebytes(transaction_id + b"\n")
    except (Base64Error, TypeError):
        return b""
    return tid if len(tid) == 8 else b""
