"""The blobs that one client sends, as stock clients do: begun, in chunks, ended with their object's record.

    state   event                        becomes
    -       storeBlobStart               OPEN
    OPEN    storeBlobChunk               OPEN: queued for a thread, which writes large pieces
    OPEN    storeBlobEnd                 ENDED: the object's record joins the transaction
    OPEN    storeBlobStart               ABANDONED: a client gave it up in the middle. A new one is OPEN
    OPEN    the disk is full, or fails   BROKEN: chunks are dropped; its end breaks the transaction
    ENDED   it is durable                its blob joins the transaction, whose it is from then on
    ENDED   the disk is full, or fails   BROKEN: it breaks the transaction
    any     abort, connection lost       ABANDONED: nothing of it stays, once its thread is done with it

A vote waits until no blob of its transaction is ENDED any more. A file is written by one thread at a time,
and nothing of size is done on the loop.

Owns what has arrived and is no transaction's yet. Must not know how messages are written, nor files.
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from ZODB.POSException import POSError, ReadOnlyError, StorageTransactionError

from zeoid import limits
from zeoid.errors import InvalidCall, TooLarge, not_stored
from zeoid.model import AttachBlob, Restore, StagedBlob, Store
from zeoid.ports import BlobWriter
from zeoid.server.hosted import Hosted
from zeoid.server.staged import refuse_large

if TYPE_CHECKING:
    from zeoid.server.session import Session


class Uploads:
    """Those of one session. *stop_reading* and *read_on* say when more has come than can be written."""

    def __init__(
        self, session: "Session", stop_reading: Callable[[], None], read_on: Callable[[], None]
    ) -> None:
        self._session = session
        self._stop_reading = stop_reading
        self._read_on = read_on
        self._open: _Upload | None = None
        #: For each transaction those that are ENDED, and what waits for them.
        self._ended: dict[Hashable, list[_Upload]] = {}
        self._held: dict[Hashable, Callable[[], None]] = {}
        #: What has come and is not written yet; each message counts for something, too.
        self.queued_bytes = 0
        self._full = False

    # What the client says ---------------------------------------------------------------------------

    def begin(self) -> None:
        if self._session.read_only:
            raise ReadOnlyError()
        if self._open is not None:
            self._open.abandon()
        self._open = _Upload(self, self._session.hosted)

    def chunk(self, data: bytes) -> None:
        if self._open is None:
            raise InvalidCall("storeBlobChunk: no blob was begun")
        self._open.add(data)
        self._stop_if_full()

    def end(self, record: Store, id: Hashable) -> None:
        """The open one is the object's whose record this is."""
        upload, self._open = self._open, None
        if upload is None:
            raise InvalidCall("storeBlobEnd: no blob was begun")
        try:
            self._note(record, id)
        except BaseException:
            upload.abandon()
            raise
        self._follow(upload, record.oid, id)
        upload.end()
        self._stop_if_full()

    def take(self, record: Store, filename: str, id: Hashable) -> None:
        """The object's blob is in the directory that the client shares."""
        if self._session.read_only:
            raise ReadOnlyError()
        self._note(record, id)
        hosted = self._session.hosted
        upload = _Upload(self, hosted)
        self._follow(upload, record.oid, id)
        upload.take(lambda: hosted.engine.take_shared_blob(record.oid, filename))
        self._stop_if_full()

    def before_vote(self, id: Hashable, vote: Callable[[], None]) -> None:
        """Call *vote* when all blobs of the transaction have joined it, or have broken it."""
        if id not in self._ended:
            vote()
        elif id in self._held:
            raise StorageTransactionError("the transaction was voted on already")
        else:
            self._held[id] = vote

    def forget(self, id: Hashable) -> bool:
        """The transaction is aborted. Whether a vote was waiting, which has no answer now."""
        for upload in self._ended.pop(id, ()):
            upload.abandon()
        return self._held.pop(id, None) is not None

    def close(self) -> None:
        """The connection is gone."""
        if self._open is not None:
            self._open.abandon()
        self._open = None
        for id in list(self._ended):
            self.forget(id)

    # ------------------------------------------------------------------------------------------------

    def _stop_if_full(self) -> None:
        if self.queued_bytes > limits.BLOB_QUEUE_BYTES:
            self._full = True
            self._stop_reading()  # again, if somebody else has read on meanwhile

    def _note(self, record: Store, id: Hashable) -> None:
        """Stock clients have sent it already, as any other record."""
        transactions = self._session.hosted.transactions
        transaction = transactions.find(self._session, id)
        operations = [] if transaction is None else transaction.operations
        if any(isinstance(each, Store | Restore) and each.oid == record.oid for each in reversed(operations)):
            return
        transactions.operate(self._session, id, record)

    def _follow(self, upload: "_Upload", oid: bytes, id: Hashable) -> None:
        upload.oid, upload.id = oid, id
        self._ended.setdefault(id, []).append(upload)

    def written(self, upload: "_Upload", blob: StagedBlob | None) -> None:
        """A thread has come back: *blob* is there when it is durable."""
        if self._full and self.queued_bytes * 4 <= limits.BLOB_QUEUE_BYTES:
            self._full = False
            self._read_on()
        if blob is None and upload.problem is None:
            return
        waiting = self._ended.get(upload.id)
        if waiting is None or upload not in waiting:
            return  # it is OPEN, and says so when it ends
        self._join(upload, blob)
        waiting.remove(upload)
        if not waiting:
            del self._ended[upload.id]
            vote = self._held.pop(upload.id, None)
            if vote is not None:
                vote()

    def _join(self, upload: "_Upload", blob: StagedBlob | None) -> None:
        transactions, id = self._session.hosted.transactions, upload.id
        try:
            if blob is None:
                assert upload.problem is not None
                transactions.break_(self._session, id, upload.problem)
            else:
                transactions.operate(self._session, id, AttachBlob(upload.oid, blob))
                return
        except StorageTransactionError:
            pass  # it is over: it has expired, say
        if blob is not None:
            self._session.hosted.discard([blob])


class _Upload:
    """One blob on its way to the disk. Its *uploads* are told when a thread has come back."""

    def __init__(self, uploads: Uploads, hosted: Hosted) -> None:
        self._uploads = uploads
        self._hosted = hosted
        self._writer: BlobWriter | None = None
        self._pieces: list[bytes] = []
        #: What they count for.
        self._pieces_bytes = 0
        #: Of the blob, so far.
        self._size_bytes = 0
        #: Why nothing will come of it.
        self.problem: POSError | None = None
        self.oid = b""
        self.id: Hashable = None
        self._is_ended = False
        self._is_abandoned = False
        self._in_thread = False

    def add(self, data: bytes) -> None:
        if self.problem is not None:
            return
        self._size_bytes += len(data)
        try:
            refuse_large(self._size_bytes, self._hosted.blob_bytes)
        except TooLarge as problem:
            self.abandon()
            self.problem = problem
        else:
            self._queue(data)

    def end(self) -> None:
        self._is_ended = True
        if self.problem is not None:
            self._uploads.written(self, None)
        else:
            self._queue(b"")

    def take(self, work: Callable[[], StagedBlob]) -> None:
        """It comes from elsewhere, whole."""
        self._is_ended = True
        self._uploads.queued_bytes += limits.BLOB_MESSAGE_BYTES
        self._run(work, limits.BLOB_MESSAGE_BYTES)

    def _queue(self, data: bytes) -> None:
        if data:
            self._pieces.append(data)
        size_bytes = len(data) + limits.BLOB_MESSAGE_BYTES
        self._pieces_bytes += size_bytes
        self._uploads.queued_bytes += size_bytes
        self._go_on()

    def abandon(self) -> None:
        self._is_abandoned = True
        self._uploads.queued_bytes -= self._pieces_bytes
        self._pieces, self._pieces_bytes = [], 0
        writer = self._writer
        if not self._in_thread and writer is not None:
            self._writer = None
            self._hosted.run_with_blobs(writer.abandon, lambda *_: None)

    def _go_on(self) -> None:
        if self._in_thread or not (self._is_ended or self._pieces_bytes >= limits.BLOB_PIECE_BYTES):
            return
        pieces, size_bytes, is_last = self._pieces, self._pieces_bytes, self._is_ended
        self._pieces, self._pieces_bytes = [], 0

        def write() -> StagedBlob | None:
            if self._writer is None:
                self._writer = self._hosted.engine.stage_blob()
            for piece in pieces:
                self._writer.write(piece)
            return self._writer.complete() if is_last else None

        self._run(write, size_bytes)

    def _run(self, work: Callable[[], StagedBlob | None], size_bytes: int) -> None:
        self._in_thread = True

        def guarded() -> StagedBlob | None:
            try:
                return work()
            except BaseException:
                if self._writer is not None:
                    self._writer.abandon()
                raise

        def done(blob: StagedBlob | None, problem: BaseException | None) -> None:
            self._in_thread = False
            self._uploads.queued_bytes -= size_bytes
            if problem is not None or blob is not None:
                self._writer = None
            if problem is not None:
                self.problem = problem if isinstance(problem, POSError) else not_stored(problem)
            if self._is_abandoned and blob is not None:
                self._hosted.discard([blob])
                blob = None
            if self._is_abandoned or problem is not None:
                self.abandon()
            elif blob is None:
                self._go_on()
            self._uploads.written(self, blob)

        self._hosted.run_with_blobs(guarded, done)
