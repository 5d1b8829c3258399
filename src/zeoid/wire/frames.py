"""Frames: a four-byte big-endian length, then that many bytes. Owns the limit on their length."""

from struct import Struct

from zeoid import limits
from zeoid.errors import FrameTooLarge

_LENGTH = Struct(">I")
_pack_length = _LENGTH.pack
_read_length = _LENGTH.unpack_from
_PREFIX = _LENGTH.size
#: A longer message is not copied twice on its way out of the stream.
_COPIED_BYTES = 64 * 1024


def frame(message: bytes) -> bytes:
    """*message* with its length in front. FrameTooLarge when the prefix can't express it."""
    if len(message) > 0xFFFFFFFF:
        raise FrameTooLarge(f"a message of {len(message):,} bytes can't be sent")
    return _pack_length(len(message)) + message


class FrameReader:
    """Cuts a stream of bytes into messages. Holds at most one incomplete frame."""

    __slots__ = ("limit", "rest")

    def __init__(self, limit: int = limits.FRAME_BYTES) -> None:
        self.limit = limit
        #: An incomplete frame; empty between frames.
        self.rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that *data* completes.

        A length above the limit raises FrameTooLarge before any of that message is kept; whatever stood
        before it in *data* is lost with the connection.
        """
        rest = self.rest
        if not rest and len(data) > _PREFIX and _read_length(data)[0] == len(data) - _PREFIX <= self.limit:
            return [data[_PREFIX:]]  # one whole frame, as nearly always
        if rest:
            rest += data
            stream: bytes | bytearray = rest
        else:
            stream = data
        end = len(stream)
        position = 0
        messages = []
        while end - position >= _PREFIX:
            (length,) = _read_length(stream, position)
            if length > self.limit:
                raise FrameTooLarge(f"a message of {length:,} bytes; the limit is {self.limit:,}")
            stop = position + _PREFIX + length
            if stop > end:
                break
            if length <= _COPIED_BYTES:
                messages.append(bytes(stream[position + _PREFIX : stop]))
            else:
                with memoryview(stream) as view:
                    messages.append(bytes(view[position + _PREFIX : stop]))
            position = stop
        if stream is rest:
            del rest[:position]
        elif position < end:
            rest += stream[position:]
        return messages

    @property
    def pending_bytes(self) -> int:
        """How much of an incomplete frame is held."""
        return len(self.rest)
