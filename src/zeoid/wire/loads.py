"""The request to load an object as it stands in a frame of M5, where its layout never varies.

Nearly every message to a server is one of these, so both ends treat it as a record of fixed size: one step
instead of a codec, a frame and a check each. Owns that layout and nothing else. What is written here is what
the codec writes; what is read here the codec would have read the same, and what does not fit (None) goes
through the codec. Source: msgpack's specification.

    length  94 ce  id  00 aa "loadBefore" 92 c4 08  oid  c4 08  tid

Length and id are four bytes, big-endian; oid and tid are eight.
"""

from struct import Struct
from typing import Any, Final

from zeoid.wire.codec import Message

CODING: Final = "M5"
LOAD: Final = "loadBefore"

_LAYOUT: Final = Struct(">6sI15s8s2s8s")
_BEGIN: Final = (_LAYOUT.size - 4).to_bytes(4, "big") + b"\x94\xce"
_NAME: Final = b"\x00\xaaloadBefore\x92\xc4\x08"
_EIGHT_BYTES: Final = b"\xc4\x08"
_pack = _LAYOUT.pack
_unpack = _LAYOUT.unpack

#: How long such a frame is.
REQUEST_BYTES: Final = _LAYOUT.size
#: The ids that msgpack writes in four bytes.
FIRST_ID: Final = 1 << 16
LAST_ID: Final = (1 << 32) - 1


def request(message_id: int, args: Any) -> bytes | None:
    """The frame of a load with *args*, which should be (oid, tid); None if they do not fit."""
    if type(args) is tuple and len(args) == 2 and message_id <= LAST_ID:
        oid, tid = args
        if type(oid) is type(tid) is bytes and len(oid) == len(tid) == 8:
            return _pack(_BEGIN, message_id, _NAME, oid, _EIGHT_BYTES, tid)
    return None


def read_request(frame: bytes) -> Message | None:
    """The message in *frame*, which is REQUEST_BYTES long; None if it is another one."""
    begin, message_id, name, oid, eight_bytes, tid = _unpack(frame)
    if begin == _BEGIN and name == _NAME and eight_bytes == _EIGHT_BYTES:
        return message_id, 0, LOAD, (oid, tid)
    return None
