"""A blob connection: what is said on it before and after the bytes of a blob. No I/O.

A connection becomes one in the handshake: its client answers the server's offer with `B5` and a token, which
it was given on the connection that it has already. From then on frames, each an array in msgpack, and the
plain bytes of blobs take turns:

    end     says                                        and then
    server  ["ok"]                                      it waits for a request
    client  ["get", oid, serial, offset]
    server  ["size", size]                              the blob from *offset* on; it waits for a request
    client  ["put", transaction, name, size]            the blob, if it is small (`BLOB_INLINE_BYTES`)
    server  ["go"], unless it is small                  the client sends the blob
    server  ["done"] when the blob is durable           it waits for a request
    server  ["fault", class, details] in the place      it waits for a request; of a small blob it has read
            of `size`, `go` or `done`                   what came

There is one request at a time, and whoever reads knows how many bytes may come: nothing is read too far.
Owns the frames and their limit. Must not know what becomes of a blob.
"""

from typing import Any, Final

import msgpack

from zeoid import limits
from zeoid.errors import FrameTooLarge, PeerError, UndecodableMessage
from zeoid.model import frozen
from zeoid.wire import faults
from zeoid.wire.frames import frame
from zeoid.wire.messages import BLOB_NAME, CLIENT_MADE, OID, TID

TOKEN_BYTES: Final = 16
_ANSWER: Final = b"B5"
_PREFIX_BYTES: Final = 4
#: No file is larger.
_MOST_BYTES: Final = (1 << 63) - 1
#: A fault whose details don't fit is told as text of this length.
_TOLD_CHARACTERS: Final = 500


def answer(token: bytes) -> bytes:
    """What a client writes when it has a server's offer."""
    return frame(_ANSWER + token)


def token_of(payload: bytes) -> bytes:
    """The token in a client's answer; empty if it is another answer."""
    if payload.startswith(_ANSWER) and len(payload) == len(_ANSWER) + TOKEN_BYTES:
        return payload[len(_ANSWER) :]
    return b""


class Incoming:
    """Cuts frames out of a stream of which no byte too many must be read."""

    def __init__(self, limit: int = limits.BLOB_FRAME_BYTES) -> None:
        self._limit = limit
        self._gathered = bytearray()
        self._length = -1

    @property
    def wants(self) -> int:
        """How many bytes may be read at most, at least one."""
        whole = _PREFIX_BYTES if self._length < 0 else self._length
        return whole - len(self._gathered)

    @property
    def between(self) -> bool:
        """Whether nothing has come of the next frame."""
        return self._length < 0 and not self._gathered

    def receive(self, data: bytes) -> bytes | None:
        """The frame that *data* completes, if it does. FrameTooLarge, before any of it is kept."""
        assert 0 < len(data) <= self.wants
        self._gathered += data
        if self.wants:
            return None
        if self._length < 0:
            self._length = int.from_bytes(self._gathered, "big")
            if not 0 < self._length <= self._limit:
                raise FrameTooLarge(f"a message of {self._length:,} bytes on a blob connection")
            self._gathered.clear()
            return None
        payload = bytes(self._gathered)
        self._gathered.clear()
        self._length = -1
        return payload


# Requests ---------------------------------------------------------------------------------------------


@frozen
class Get:
    """Send the blob that transaction *serial* wrote for *oid*, from *offset* on."""

    oid: bytes
    serial: bytes
    offset: int


@frozen
class Put:
    """Take a blob that *transaction* will attach by its *name*."""

    transaction: bytes
    name: bytes
    size_bytes: int

    @property
    def small(self) -> bool:
        """Whether it comes without being asked for."""
        return self.size_bytes <= limits.BLOB_INLINE_BYTES


def request(wanted: Get | Put) -> bytes:
    """The bytes of a request."""
    if isinstance(wanted, Get):
        return _frame("get", wanted.oid, wanted.serial, wanted.offset)
    return _frame("put", wanted.transaction, wanted.name, wanted.size_bytes)


def request_of(payload: bytes) -> Get | Put:
    """The request in a frame. PeerError if it is none."""
    match _array(payload):
        case ("get", oid, serial, offset) if OID.test(oid) and TID.test(serial) and _is_size(offset):
            return Get(oid, serial, offset)
        case ("put", transaction, name, size) if (
            CLIENT_MADE.test(transaction) and BLOB_NAME.test(name) and _is_size(size)
        ):
            return Put(transaction, name, size)
    raise PeerError("what is no request on a blob connection")


# Answers ----------------------------------------------------------------------------------------------

OK: Final = "ok"
SIZE: Final = "size"
GO: Final = "go"
DONE: Final = "done"


def reply(word: str) -> bytes:
    """The bytes of OK, GO or DONE."""
    return _frame(word)


def size(size_bytes: int) -> bytes:
    """The bytes of SIZE, behind which the blob comes."""
    return _frame(SIZE, size_bytes)


def fault(problem: Exception) -> bytes:
    """The bytes that say that a request failed."""
    name, details = faults.describe(problem)
    try:
        told = _frame("fault", name, details)
        if len(told) <= limits.BLOB_FRAME_BYTES:
            return told
    except (TypeError, ValueError, OverflowError):
        pass
    return _frame("fault", "ZODB.POSException.StorageError", (ascii(problem)[:_TOLD_CHARACTERS],))


def answer_to(payload: bytes, expected: str) -> int:
    """The size in the answer that was *expected*, 0 if it has none. PeerError if it is another one.

    If it is a fault, the exception that it tells of.
    """
    match _array(payload):
        case ("size", size_bytes) if expected == SIZE and _is_size(size_bytes):
            checked: int = size_bytes
            return checked
        case (word,) if word == expected != SIZE:
            return 0
        case ("fault", name, details) if expected != OK:
            raise faults.rebuild((name, details))
    raise PeerError("an answer on a blob connection that nobody asked for")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_BYTES


def _frame(*parts: Any) -> bytes:
    message: bytes = msgpack.packb(parts, use_bin_type=True)
    return frame(message)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"an extension type, {code}")


def _array(payload: bytes) -> tuple[Any, ...]:
    try:
        value = msgpack.unpackb(payload, use_list=False, ext_hook=_refuse_extension, timestamp=1)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as problem:
        raise UndecodableMessage(f"no message on a blob connection: {type(problem).__name__}") from None
    if type(value) is not tuple:
        raise UndecodableMessage("a message on a blob connection that is no array")
    return value
