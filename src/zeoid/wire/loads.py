"""A load and its reply as they stand in frames of M5, where their layout hardly varies.

Nearly every message is one of these, so both ends treat them as records: one step instead of a codec, a frame
and a check each. Owns that layout and nothing else. What is written here is what the codec writes; what is
read here the codec would have read the same, and what does not fit (None) goes through the codec. Source:
msgpack's specification.

    request  length  94 ce  id  00 aa "loadBefore" 92 c4 08  oid  c4 08  tid
    reply    length  94 ce  id  00 a6 ".reply" 93  c4|c5  size  data  c4 08  start  c0

Length and id are four bytes, oid and tids eight, all big-endian. The data's size is one byte after `c4`, two
after `c5`, where it is at least 256. A reply with an end tid instead of `c0`, or with more data, is rare.
"""

from struct import Struct
from typing import Any, Final

from zeoid.model import Revision

CODING: Final = "M5"
LOAD: Final = "loadBefore"

#: The ids that msgpack writes in four bytes.
FIRST_ID: Final = 1 << 16
LAST_ID: Final = (1 << 32) - 1

_QUADRUPLE: Final = b"\x94\xce"
_EIGHT_BYTES: Final = b"\xc4\x08"

_REQUEST: Final = Struct(">6sI15s8s2s8s")
_REQUEST_BEGIN: Final = (_REQUEST.size - 4).to_bytes(4, "big") + _QUADRUPLE
_REQUEST_NAME: Final = b"\x00\xaaloadBefore\x92\xc4\x08"
_pack_request = _REQUEST.pack
_unpack_request = _REQUEST.unpack
#: How long the frame of a request is.
REQUEST_BYTES: Final = _REQUEST.size

_SHORT: Final = Struct(">I2sI10sB")
_LONG: Final = Struct(">I2sI10sH")
_TAIL: Final = Struct(">2s8sB")
_SHORT_NAME: Final = b"\x00\xa6.reply\x93\xc4"
_LONG_NAME: Final = b"\x00\xa6.reply\x93\xc5"
_NONE: Final = 0xC0
_pack_short = _SHORT.pack
_pack_long = _LONG.pack
_pack_tail = _TAIL.pack
_unpack_long = _LONG.unpack_from
_unpack_tail = _TAIL.unpack_from
_SHORT_BYTES: Final = _SHORT.size
_LONG_BYTES: Final = _LONG.size
_TAIL_BYTES: Final = _TAIL.size
#: What the length in front does not count.
_PREFIX_BYTES: Final = 4
#: No reply is shorter; and so much of a frame is unpacked before it is known what it is.
_LEAST_BYTES: Final = _SHORT_BYTES + _TAIL_BYTES


def request(message_id: int, args: Any) -> bytes | None:
    """The frame of a load with *args*, which should be (oid, tid); None if they do not fit."""
    if type(args) is tuple and len(args) == 2 and message_id <= LAST_ID:
        oid, tid = args
        if type(oid) is type(tid) is bytes and len(oid) == len(tid) == 8:
            return _pack_request(_REQUEST_BEGIN, message_id, _REQUEST_NAME, oid, _EIGHT_BYTES, tid)
    return None


def read_request(frame: bytes) -> tuple[int, bytes, bytes] | None:
    """The id, oid and tid in *frame*, which is REQUEST_BYTES long; None if it is another message."""
    begin, message_id, name, oid, eight_bytes, tid = _unpack_request(frame)
    if begin == _REQUEST_BEGIN and name == _REQUEST_NAME and eight_bytes == _EIGHT_BYTES:
        return message_id, oid, tid
    return None


def reply(message_id: int, revision: Revision | None) -> bytes | None:
    """The frame of the reply with *revision* to the load with this id; None if they do not fit."""
    if revision is None:
        return None
    data, start, end = revision
    if type(data) is not bytes or type(start) is not bytes or len(start) != 8:
        return None
    size = len(data)
    if end is not None or size > 0xFFFF or not FIRST_ID <= message_id <= LAST_ID:
        return None
    if size > 0xFF:
        length = _LONG_BYTES + size + _TAIL_BYTES - _PREFIX_BYTES
        head = _pack_long(length, _QUADRUPLE, message_id, _LONG_NAME, size)
    else:
        length = _SHORT_BYTES + size + _TAIL_BYTES - _PREFIX_BYTES
        head = _pack_short(length, _QUADRUPLE, message_id, _SHORT_NAME, size)
    return head + data + _pack_tail(_EIGHT_BYTES, start, _NONE)


def read_reply(stream: bytes) -> tuple[int, Revision] | None:
    """The id and the revision in *stream*, if that is one whole frame with such a reply; otherwise None."""
    if len(stream) < _LEAST_BYTES:
        return None
    length, quadruple, message_id, name, size = _unpack_long(stream)
    begin = _LONG_BYTES
    if name == _SHORT_NAME:
        begin = _SHORT_BYTES
        size >>= 8
    elif name != _LONG_NAME:
        return None
    stop = begin + size
    if len(stream) != stop + _TAIL_BYTES or length != len(stream) - _PREFIX_BYTES or quadruple != _QUADRUPLE:
        return None
    eight_bytes, start, none = _unpack_tail(stream, stop)
    if eight_bytes != _EIGHT_BYTES or none != _NONE:
        return None
    return message_id, (stream[begin:stop], start, None)
