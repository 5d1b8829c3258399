"""The blobs that one client asks for, as stock clients do: in chunks, with the reply behind them.

A thread opens the file, reads a piece of it and encodes the messages; the loop only writes them. The next
piece is read when the client has taken so much that little waits to be sent. So other replies never wait
behind more than that, a blob takes no memory, and a client that reads slowly slows nobody else. A few blobs
are sent at a time, piece by piece in turn; the others wait for them.

Owns which blobs are being sent to one client. Must not know sockets, nor what a client may see.
"""

from collections import deque
from collections.abc import Callable
from typing import BinaryIO

from zeoid import limits
from zeoid.server.clients import RunInThread

_PIECE_BYTES = 4 * limits.BLOB_CHUNK_BYTES


class Downloads:
    """*caller* makes what makes the bytes of one-way calls, in a thread; *write* sends them on their way."""

    def __init__(self, caller: Callable[[], Callable[..., bytes]], write: Callable[[bytes], None]) -> None:
        self._caller = caller
        self._write = write
        self._active: list[_Download] = []
        self._waiting: deque[_Download] = deque()
        self._paused = False
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether no more can wait."""
        return len(self._waiting) >= limits.BLOB_DOWNLOADS_WAITING

    def begin(
        self,
        run: RunInThread,
        opener: Callable[[], BinaryIO],
        oid: bytes,
        serial: bytes,
        ended: Callable[[BaseException | None], None],
    ) -> None:
        """Send the blob that *opener* opens, then call *ended*, whose reply follows it."""
        self._waiting.append(_Download(run, self._caller, opener, (oid, serial), ended))
        self._fill()

    def pause(self) -> None:
        """Much waits to be sent already."""
        self._paused = True

    def resume(self) -> None:
        """Little does."""
        self._paused = False
        for download in list(self._active):
            self._next(download)

    def close(self) -> None:
        """The connection is gone."""
        self._closed = True
        self._waiting.clear()
        for download in self._active:
            if not download.in_thread:
                download.run(download.close, lambda *_: None)

    def _fill(self) -> None:
        while self._waiting and len(self._active) < limits.BLOB_DOWNLOADS_PER_CONNECTION:
            download = self._waiting.popleft()
            self._active.append(download)
            self._next(download)

    def _next(self, download: "_Download") -> None:
        if self._paused or self._closed or download.in_thread:
            return
        download.in_thread = True

        def done(piece: tuple[bytes, bool] | None, problem: BaseException | None) -> None:
            download.in_thread = False
            if self._closed:
                if not download.is_closed:
                    download.run(download.close, lambda *_: None)
                return
            data, is_last = piece or (b"", True)
            if data:
                self._write(data)
            if not is_last:
                self._next(download)
                return
            self._active.remove(download)
            download.ended(problem)
            self._fill()

        download.run(download.piece, done)


class _Download:
    def __init__(
        self,
        run: RunInThread,
        caller: Callable[[], Callable[..., bytes]],
        opener: Callable[[], BinaryIO],
        name: tuple[bytes, bytes],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self.run = run
        self.ended = ended
        self.in_thread = False
        self.is_closed = False
        self._caller = caller
        self._encode: Callable[..., bytes] | None = None
        self._open = opener
        self._name = name
        self._file: BinaryIO | None = None

    def piece(self) -> tuple[bytes, bool]:
        """The next messages, and whether they are the last. If it raises, the file is closed."""
        encode = self._encode = self._encode or self._caller()
        messages = []
        try:
            if self._file is None:
                self._file = self._open()
                messages.append(encode("receiveBlobStart", *self._name))
            data = self._file.read(_PIECE_BYTES)
        except BaseException:
            self.close()
            raise
        for begin in range(0, len(data), limits.BLOB_CHUNK_BYTES):
            chunk = data[begin : begin + limits.BLOB_CHUNK_BYTES]
            messages.append(encode("receiveBlobChunk", *self._name, chunk))
        is_last = len(data) < _PIECE_BYTES
        if is_last:
            self.close()
            messages.append(encode("receiveBlobStop", *self._name))
        return b"".join(messages), is_last

    def close(self) -> None:
        self.is_closed = True
        file, self._file = self._file, None
        if file is not None:
            file.close()
