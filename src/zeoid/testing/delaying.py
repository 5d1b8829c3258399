"""A link that takes its time: a proxy in front of a server that passes bytes on some milliseconds later.

For trying out on one machine what a client is like that is far away from its server. What is sent in one go
arrives in one go: the link has a delay, but any bandwidth. As a program: `python -m zeoid.testing.delaying
HOST:PORT DELAY_MS` prints the address at which it listens, and runs until it is killed.
"""

import contextlib
import queue
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Final, Self

_READ_BYTES: Final = 1 << 18
_CONNECT_S: Final = 10.0


class DelayingProxy:
    """Listens at `address`, on loopback; each way takes *delay_s* seconds, a round trip twice that."""

    def __init__(self, target: tuple[str, int], delay_s: float) -> None:
        """OSError if it can't listen."""
        self._target = target
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="delaying proxy", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and break all connections at once."""
        with self._lock:
            self._closed = True
            sockets = [self._listener, *self._sockets]
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, _CONNECT_S)
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self._closed:
                    near.close()
                    far.close()
                    return
                self._sockets |= {near, far}
            self._pass_on(near, far)
            self._pass_on(far, near)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        """Have what *source* sends arrive at *target*, later. b"" is its end."""
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def read() -> None:
            data = b"begin"
            while data:
                try:
                    data = source.recv(_READ_BYTES)
                except OSError:
                    data = b""
                under_way.put((time.monotonic() + self._delay_s, data))

        def write() -> None:
            while True:
                due_s, data = under_way.get()
                wait_s = due_s - time.monotonic()
                if wait_s > 0:
                    time.sleep(wait_s)
                try:
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                    target.sendall(data)
                except OSError:
                    with contextlib.suppress(OSError):
                        source.shutdown(socket.SHUT_RD)
                    return

        for work in (read, write):
            threading.Thread(target=work, name="delaying proxy", daemon=True).start()


def main(address: str, delay_ms: str) -> None:
    host, _, port = address.rpartition(":")
    proxy = DelayingProxy((host, int(port)), float(delay_ms) / 1000)
    print(f"listening on {proxy.address[0]}:{proxy.address[1]}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
