"""The law of a connection, for both ends: the handshake, then calls and replies. No I/O.

States and what moves them (anything else is a PeerError, after which the connection is CLOSED):

    end     state      receives                   writes           becomes
    server  OFFERED    an answer: M5 or Z5        -                OPEN
    server  OFFERED    `ruok`                     -                ASKED (for its status, as one JSON message)
    server  OFFERED    `B5` and a token           -                HANDED_OVER (to `streams`)
    server  OPEN       calls, heartbeats          replies, calls   OPEN
    client  WAITING    an offer: M5 or Z5         the answer       OPEN
    client  OPEN       replies, one-way calls     calls            OPEN

The server speaks first: `ServerConnection.offer` is what to write when a connection is made. A reply
carries the id of its call; a client's reply to nothing, or a call that is no one-way call, breaks the law.
"""

from collections.abc import Callable
from enum import Enum
from itertools import count
from typing import Any, Final

from zeoid import limits
from zeoid.errors import PeerError, UnknownProtocol
from zeoid.wire import faults, loads, streams
from zeoid.wire.codec import FAULT, HEARTBEAT_ID, ONE_WAY, REPLY, Codec, Message, MessageId, codec_for
from zeoid.wire.frames import FrameReader, frame

STATUS_REQUEST: Final = b"ruok"
#: How whoever speaks TLS begins: with a handshake, and with an alert (RFC 8446, 5.1). As lengths of messages
#: these are beyond every limit.
_TLS_HELLO: Final = b"\x16\x03"
_TLS_ALERT: Final = b"\x15\x03"


class State(Enum):
    """Where a connection is in its life."""

    OFFERED = "offered"
    WAITING = "waiting for an offer"
    ASKED = "asked for its status"
    HANDED_OVER = "handed over"
    OPEN = "open"
    CLOSED = "closed"


#: A name in a module is found faster than a member of an enumeration, which Python 3.11 looks up in Python.
_OPEN: Final = State.OPEN
_LONG_BYTES: Final = limits.PICKLE_COUNTED_BYTES


class _Connection:
    """What both ends share: frames, the codec once it is agreed on, and the state."""

    __slots__ = (
        "_decode",
        "_decode_long",
        "_encode",
        "_frame_limit",
        "_loads_are_records",
        "_reader",
        "protocol",
        "state",
    )

    def __init__(self, state: State, frame_limit: int) -> None:
        self.state = state
        self.protocol = ""
        self._frame_limit = frame_limit
        self._reader = FrameReader(min(frame_limit, limits.HANDSHAKE_FRAME_BYTES))
        self._loads_are_records = False

    def _agree(self, codec: Codec) -> None:
        self._encode = codec.encode
        self._decode = codec.decode
        self._decode_long = codec.decode_long
        self.protocol = codec.name
        self.state = State.OPEN
        self._loads_are_records = codec.name == loads.CODING

    def registered(self) -> None:
        """The peer is known: messages may now be as large as the limit says."""
        self._reader.limit = self._frame_limit

    @property
    def pending_bytes(self) -> int:
        """How much of a message is held of which not all has come."""
        return self._reader.pending_bytes

    def close(self) -> None:
        self.state = State.CLOSED
        self._loads_are_records = False
        # What is left of this object may stay for long, in a cycle of references.
        self._reader.rest = bytearray()

    def _require_open(self) -> None:
        if self.state is not State.OPEN:
            raise AssertionError(f"a message on a connection that is {self.state.value}")


class ServerConnection(_Connection):
    """The server's end."""

    __slots__ = ("offer", "token")

    def __init__(self, offer: str, frame_limit: int = limits.FRAME_BYTES) -> None:
        super().__init__(State.OFFERED, frame_limit)
        #: What a blob connection was opened with.
        self.token = b""
        #: The first bytes to write.
        self.offer = frame(offer.encode("ascii"))

    def receive(self, data: bytes) -> list[Message]:
        """The calls that *data* completes, in order, without heartbeats. PeerError ends the connection."""
        calls: list[Message] = []
        try:
            for payload in self._reader.feed(data):
                if self.state is _OPEN:
                    call = (
                        self._decode(payload) if len(payload) <= _LONG_BYTES else self._decode_long(payload)
                    )
                    if call[2] != REPLY:
                        calls.append(call)
                    elif call[0] != HEARTBEAT_ID:
                        raise PeerError("a reply to a call that was never made")
                elif self.state is not State.OFFERED:
                    raise PeerError(f"a message on a connection that is {self.state.value}")
                elif payload == STATUS_REQUEST:
                    self.state = State.ASKED
                elif token := streams.token_of(payload):
                    self.token = token
                    self.state = State.HANDED_OVER
                else:
                    self._agree(codec_for(payload))
            if self.state is State.HANDED_OVER and self._reader.rest:
                raise PeerError("something follows the token of a blob connection")
        except PeerError as problem:
            wants_tls = self.state is State.OFFERED and data.startswith(_TLS_HELLO)
            self.close()
            if wants_tls:
                raise UnknownProtocol("it wants TLS, which this server does not have") from problem
            raise
        return calls

    def receive_load(self, data: bytes) -> tuple[int, bytes, bytes] | None:
        """What *data*, of `loads.REQUEST_BYTES`, asks for: id, oid and tid. None: `receive` has to tell."""
        if self._loads_are_records and not self._reader.rest:
            return loads.read_request(data)
        return None

    def reply(self, message_id: MessageId, value: Any) -> bytes:
        """The bytes of a reply. UnsendableValue when *value* can't be sent."""
        return frame(self._encode(message_id, 0, REPLY, value))

    def fault(self, message_id: MessageId, problem: BaseException) -> bytes:
        """The bytes of a reply that says that the call failed."""
        return frame(self._encode(message_id, FAULT, REPLY, faults.describe(problem)))

    def call(self, name: str, *args: Any) -> bytes:
        """The bytes of a one-way call to the client."""
        self._require_open()
        return frame(self._encode(0, ONE_WAY, name, args))

    def caller(self) -> Callable[..., bytes]:
        """What does as `call`, for another thread: a codec is one thread's."""
        encode = codec_for(self.protocol.encode("ascii")).encode
        return lambda name, *args: frame(encode(0, ONE_WAY, name, args))


#: What a client gets for a message: the slot of the call it answers (None for a call by the server),
#: the flag, the name and the args.
Delivery = tuple[Any, int, str, Any]


class ClientConnection(_Connection):
    """The client's end. A *slot* is whatever the caller wants back with the reply, but None.

    `call` and `receive` may be used by two threads, one of each; `forget` by any.
    """

    __slots__ = ("_answer", "_coding", "_ids", "_last_id", "offered", "pending")

    def __init__(self, coding: str | None = None, frame_limit: int = limits.FRAME_BYTES) -> None:
        """*coding*: "M5" or "Z5", whatever the server offers; None answers M5."""
        super().__init__(State.WAITING, frame_limit)
        self._coding = coding or "M5"
        self._answer = b""
        #: What the server offered: M5 or Z5.
        self.offered = ""
        self._ids = count(loads.FIRST_ID)
        self._last_id = loads.FIRST_ID - 1
        #: Calls that have no reply yet: their slots, by their ids.
        self.pending: dict[MessageId, Any] = {}

    def take_answer(self) -> bytes:
        """What must be written because of what was received; empty most of the time."""
        answer, self._answer = self._answer, b""
        return answer

    def receive(self, data: bytes) -> list[Delivery]:
        """Replies with their slots and the server's calls, in order. PeerError ends the connection."""
        if self._loads_are_records and not self._reader.rest:
            reply = loads.read_reply(data)
            if reply is not None:
                slot = self.pending.pop(reply[0], None)
                if slot is not None:
                    return [(slot, 0, REPLY, reply[1])]
        deliveries: list[Delivery] = []
        try:
            for payload in self._reader.feed(data):
                if self.state is _OPEN:
                    message_id, flag, name, args = self._decode(payload)
                    if name == REPLY:
                        slot = self.pending.pop(message_id, None)
                        if slot is not None:
                            deliveries.append((slot, flag, name, args))
                        elif message_id != HEARTBEAT_ID and not self._was_forgotten(message_id):
                            raise PeerError("a reply to a call that was never made")
                    elif flag == ONE_WAY:
                        deliveries.append((None, flag, name, args))
                    else:
                        raise PeerError(f"the server called {name[:100]!r} and wants a reply")
                elif self.state is State.WAITING:
                    self._accept(payload)
                else:
                    raise PeerError(f"a message on a connection that is {self.state.value}")
        except PeerError as problem:
            wants_tls = self.state is State.WAITING and data.startswith(_TLS_ALERT)
            self.close()
            if wants_tls:
                raise UnknownProtocol("the server wants TLS: this client has none") from problem
            raise
        return deliveries

    def _accept(self, offer: bytes) -> None:
        self.offered = codec_for(offer).name  # the version must fit; the coding is ours to choose
        if self._coding not in ("M5", "Z5"):
            raise UnknownProtocol(f"coding {self._coding!r} is neither M5 nor Z5")
        answer = self._coding.encode("ascii")
        self._agree(codec_for(answer))
        self._answer = frame(answer)
        # A large invalidation may stand right behind the reply to `register`, in the same segment.
        self.registered()

    def _was_forgotten(self, message_id: MessageId) -> bool:
        return type(message_id) is int and loads.FIRST_ID <= message_id <= self._last_id

    def call(self, slot: Any, name: str, args: tuple[Any, ...]) -> bytes:
        """The bytes of a call whose reply comes back with *slot*."""
        message_id = next(self._ids)
        message = None
        if name == loads.LOAD and self._loads_are_records:
            message = loads.request(message_id, args)
        if message is None:
            message = frame(self._encode(message_id, 0, name, args))
        self.pending[message_id] = slot
        self._last_id = message_id
        return message

    def one_way(self, name: str, args: tuple[Any, ...]) -> bytes:
        """The bytes of a call without a reply."""
        self._require_open()
        return frame(self._encode(0, ONE_WAY, name, args))

    def heartbeat(self) -> bytes:
        """The bytes of a message that says nothing but that we are there."""
        return frame(self._encode(HEARTBEAT_ID, 0, REPLY, None))

    def forget(self, slot: Any) -> None:
        """Nobody waits for this reply any more; it will be dropped when it comes."""
        for message_id, waiting in self.pending.copy().items():
            if waiting is slot:
                self.pending.pop(message_id, None)

    def slots(self) -> list[Any]:
        """The slots of all calls that have no reply yet."""
        return list(self.pending.values())
