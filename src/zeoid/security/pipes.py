"""The socket of a blob connection, as a thread uses it: plain, or with TLS.

Both wait in the same way: no longer than the time that was set last without a byte that moves; then they
raise TimeoutError. Other OSErrors are the connection's own end, EncryptionError that of its TLS. One thread
at a time uses it; `shutdown` may be called by any other one.

Owns how bytes get from a file or a buffer to the socket and back. Must not know what they mean.
"""

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from zeoid import limits
from zeoid.errors import EncryptionError

if TYPE_CHECKING:
    from zeoid.security.end import End  # plain ones do without the module ssl

_monotonic = time.monotonic
_NOTHING_NEW = memoryview(b"")

#: `sendfile` takes no more at once.
_MOST_BYTES = 1 << 30


def _nothing() -> None:
    pass


class Pipe:
    """A plain one, whose bytes the kernel carries from a file to the socket. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def settimeout(self, timeout_s: float) -> None:
        """No byte may take longer to move."""
        self._sock.settimeout(timeout_s)

    def receive_into(self, buffer: memoryview) -> int:
        """At least one byte, no more than there is room for; 0 at the end of the stream."""
        return self._sock.recv_into(buffer)

    def send(self, data: bytes | memoryview) -> None:
        """All of *data*."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._sock.send(rest) :]

    def send_file(self, file: int, offset: int, size_bytes: int, moved: Callable[[], None] = _nothing) -> int:
        """A part of a file, by its descriptor; *moved* is called whenever some of it was sent.

        How much it was: less if the file ends before that.
        """
        sent = 0
        while sent < size_bytes:
            try:
                count = os.sendfile(
                    self._sock.fileno(), file, offset + sent, min(size_bytes - sent, _MOST_BYTES)
                )
            except BlockingIOError:
                self._wait_writable()
                continue
            if not count:
                break
            sent += count
            moved()
        return sent

    def _wait_writable(self) -> None:
        writable = select.poll()
        writable.register(self._sock, select.POLLOUT)
        timeout_s = self._sock.gettimeout()
        if not writable.poll(None if timeout_s is None else timeout_s * 1000):
            raise TimeoutError("timed out")

    def shutdown(self) -> None:
        """End the stream in both directions, waking whoever waits for it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


class TlsPipe(Pipe):
    """One with TLS: files are read and encrypted piece by piece.

    Whoever makes a part of a record come byte by byte gains no time by it.
    """

    def __init__(self, sock: socket.socket, end: "End") -> None:
        super().__init__(sock)
        self._end = end
        self._timeout_s = sock.gettimeout() or 0.0
        self._ciphertext = memoryview(bytearray(limits.TLS_PIECE_BYTES))

    def settimeout(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._sock.settimeout(timeout_s)

    def shake_hands(self) -> None:
        """To be called first, unless the end is ready. It takes no longer than the time that was set."""
        end = self._end
        deadline_s = _monotonic() + self._timeout_s
        try:
            self._flush()
            while not end.ready:
                read = self._read(deadline_s)
                if not read:
                    raise ConnectionResetError("the connection was closed within the TLS handshake")
                end.shake_hands(read)
                self._flush()
        except EncryptionError:
            with contextlib.suppress(OSError):
                self._flush()  # which tells the other end why
            raise
        finally:
            self._sock.settimeout(self._timeout_s)

    def receive_into(self, buffer: memoryview) -> int:
        end = self._end
        count = end.receive_into(_NOTHING_NEW, buffer)
        if count or end.finished:
            return count
        deadline_s = _monotonic() + self._timeout_s
        count = end.receive_into(self._ciphertext[: self._sock.recv_into(self._ciphertext)], buffer)
        if count:
            return count
        try:
            while not count and not end.finished and (read := self._read(deadline_s)):
                count = end.receive_into(read, buffer)
        finally:
            self._sock.settimeout(self._timeout_s)
        return count

    def _read(self, deadline_s: float) -> memoryview:
        self._sock.settimeout(max(0.001, deadline_s - _monotonic()))
        return self._ciphertext[: self._sock.recv_into(self._ciphertext)]

    def send(self, data: bytes | memoryview) -> None:
        self._end.send(data)
        self._flush()

    def _flush(self) -> None:
        output = self._end.output()
        if output:
            super().send(output)

    def send_file(self, file: int, offset: int, size_bytes: int, moved: Callable[[], None] = _nothing) -> int:
        sent = 0
        while sent < size_bytes:
            piece = os.pread(file, min(size_bytes - sent, limits.TLS_PIECE_BYTES), offset + sent)
            if not piece:
                break
            self.send(piece)
            sent += len(piece)
            moved()
        return sent
