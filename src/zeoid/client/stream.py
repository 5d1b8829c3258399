"""A socket, connected, as a stream of bytes with deadlines. Owns how a thread waits for the network.

Reading has two ways to wait. The short one is a receive that blocks in the kernel, with the socket's own
time-out as a tick after which the deadline is looked at: one system call for a reply. The long one asks
`poll` first, which keeps deadlines to the millisecond; it serves short deadlines, the background, and sockets
whose methods are not Python's own (gevent's, which wait in their own way).
"""

import contextlib
import select
import socket
import struct
import sys
import time

from zeoid import limits
from zeoid.addresses import Address, TcpAddress, UnixAddress
from zeoid.errors import TimedOut

_monotonic = time.monotonic


class Stream:
    """See the module. One thread may send while another receives."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._blocks = sys.platform == "linux" and type(sock).recv is _SOCKET_RECEIVE
        self._send_flags = 0
        if self._blocks:
            sock.setblocking(True)
            tick = struct.pack("@ll", int(limits.RECEIVE_TICK_S), 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
            self._send_flags = socket.MSG_DONTWAIT
        else:
            sock.setblocking(False)

    def open(self, deadline_s: float) -> None:
        """What comes before the first message: nothing, here."""

    def receive(self, deadline_s: float, *, idle: bool = False) -> bytes | None:
        """The next bytes; none at the end of the stream; None after the deadline. OSError if it broke.

        *idle*: nobody waits for these, so rest as long as possible.
        """
        while True:
            left_s = deadline_s - _monotonic()
            if (left_s < limits.RECEIVE_TICK_S or idle or not self._blocks) and not self._readable.poll(
                left_s * 1000 if left_s > 0 else 0
            ):
                return None
            try:
                return self._sock.recv(limits.READ_BYTES)
            except BlockingIOError:
                continue  # the tick has passed, or poll was mistaken

    def send(self, data: bytes, deadline_s: float) -> None:
        """Write all of *data*. TimedOut or OSError: some of it may have been sent."""
        try:
            sent = self._sock.send(data, self._send_flags)
        except BlockingIOError:
            sent = 0
        if sent != len(data):
            self._send_rest(memoryview(data)[sent:], deadline_s)

    def _send_rest(self, rest: memoryview, deadline_s: float) -> None:
        writable = select.poll()
        writable.register(self._sock, select.POLLOUT)
        while rest:
            if not writable.poll(max(0.0, deadline_s - _monotonic()) * 1000):
                raise TimedOut(f"{self._peer} does not read what it is sent")
            try:
                rest = rest[self._sock.send(rest, self._send_flags) :]
            except BlockingIOError:
                continue

    def shutdown(self) -> None:
        """End the stream in both directions, waking whoever waits for it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back, without a word to the peer beyond what the system says."""
        self._sock.close()


#: Python's own receive. A library that replaces sockets (gevent) brings another.
_SOCKET_RECEIVE = super(socket.socket, socket.socket).recv


def connect(address: Address, timeout_s: float) -> socket.socket:
    """A socket connected to *address* within *timeout_s*, that notices a peer which vanishes. OSError."""
    if isinstance(address, UnixAddress):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address.path)
        except BaseException:
            sock.close()
            raise
        return sock
    assert isinstance(address, TcpAddress)
    sock = socket.create_connection((address.host, address.port), timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    user_timeout = getattr(socket, "TCP_USER_TIMEOUT", None)
    if user_timeout is not None:
        sock.setsockopt(socket.IPPROTO_TCP, user_timeout, limits.UNACKNOWLEDGED_MS)
    return sock
