"""The two codings of a message, M5 (msgpack) and Z5 (pickle), behind one face.

A message is the four values `(message id, flag, name, args)`. Owns their shape: what leaves `decode` has
been checked to be such a quadruple; what its args may be is the business of `messages`.
"""

from collections.abc import Callable, Collection, Sized
from typing import Any, Final, Protocol

import msgpack

from zeoid import limits
from zeoid.errors import UndecodableMessage, UnknownProtocol, UnsendableValue
from zeoid.wire import pickles

#: An int, or the pair (oid, tid) that a stock client uses as the id of a load.
MessageId = int | tuple[bytes, bytes]
Message = tuple[MessageId, int, str, Any]

ONE_WAY: Final = 1
FAULT: Final = 2
REPLY: Final = ".reply"
HEARTBEAT_ID: Final = -1

_VERSION: Final = b"5"
_ID_BOUND: Final = 1 << 64
_CONTAINERS: Final = frozenset({tuple, list, dict, set, frozenset, pickles.Instance})
#: The keys that a dictionary may have. A peer would refuse others, and the connection with them.
_MSGPACK_KEYS: Final[frozenset[type]] = frozenset({str, bytes})
_PICKLE_KEYS: Final[frozenset[type]] = frozenset({str, bytes, int, float, bool, type(None)})
#: msgpack's packer keeps a buffer as large as its largest message; above this size it is given up.
_KEPT_BUFFER_BYTES: Final = 1024 * 1024
#: msgpack makes a number of its timestamps, which no message needs. No other extension passes.
_TIMESTAMP_AS_NUMBER: Final = 1


class Codec(Protocol):
    """One coding. Not safe for use by two threads at once."""

    name: str

    def encode(self, message_id: MessageId, flag: int, name: str, args: Any) -> bytes:
        """The bytes of a message, unframed. UnsendableValue when *args* holds what can't be sent."""

    def decode(self, data: bytes) -> Message:
        """The message in *data*. UndecodableMessage when it is none."""

    def decode_long(self, data: bytes) -> Message:
        """As `decode`, of a long message from one who may mean harm: it must not have too many values."""


def _checked(message: Any) -> Message:
    if type(message) is not tuple or len(message) != 4:
        raise UndecodableMessage(f"a message that is no quadruple but a {type(message).__name__}")
    message_id, flag, name, args = message
    if type(message_id) is int:
        if not -_ID_BOUND < message_id < _ID_BOUND:
            raise UndecodableMessage("a message id out of range")
    elif (
        type(message_id) is not tuple
        or len(message_id) != 2
        or not all(type(part) is bytes and len(part) <= 8 for part in message_id)
    ):
        raise UndecodableMessage("a message id that is neither a number nor a pair of an oid and a tid")
    if type(flag) is not int and type(flag) is not bool:
        raise UndecodableMessage("a flag that is no number")
    if type(name) is not str:
        raise UndecodableMessage("a name that is no text")
    if not _is_flat(args):
        _check_containers(args, None, UndecodableMessage)
    return message


def _is_flat(args: Any) -> bool:
    """Whether there is nothing inside of *args* that could be wrong: so are most messages.

    A list in it of what is none (the oids of an invalidation) is as harmless.
    """
    if type(args) is not tuple:
        return type(args) not in _CONTAINERS or not args
    for part in args:
        kind = type(part)
        if kind in _CONTAINERS and part:
            if kind is not tuple and kind is not list:
                return False
            for inner in part:
                if type(inner) in _CONTAINERS:
                    return False
    return True


def _check_containers(args: Any, keys: frozenset[type] | None, wrong: type[Exception]) -> None:
    """Raise *wrong* if *args* is nested too deep, or has a dictionary with keys of other types than *keys*.

    Goes level by level and without recursion, which is what a deep value would exhaust.
    """
    level = [args]
    for _ in range(limits.NESTING):
        below: list[Any] = []
        for value in level:
            if type(value) is dict:
                if keys is not None and not keys.issuperset(map(type, value)):
                    raise wrong("a dictionary with a key that no message may have")
                parts: Collection[Any] = value.values()
            elif type(value) is pickles.Instance:
                parts = (value.args, value.state)
            elif type(value) in _CONTAINERS:
                parts = value
            else:
                continue
            if not _CONTAINERS.isdisjoint(map(type, parts)):
                below += [part for part in parts if type(part) in _CONTAINERS]
        if not below:
            return
        level = below
    raise wrong(f"a message that is nested more than {limits.NESTING} deep")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise UndecodableMessage(f"a msgpack extension type ({code})")


def _refuse_object(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return list(value)
    raise UnsendableValue(f"a {type(value).__module__}.{type(value).__qualname__} can't be sent")


#: Messages up to this size go through one unpacker that is kept; they are most of all.
_SMALL_BYTES: Final = 4096
_UNPACKING: Final[dict[str, Any]] = {
    "raw": False,
    "use_list": False,
    "ext_hook": _refuse_extension,
    "timestamp": _TIMESTAMP_AS_NUMBER,
}


_BROKEN: Final = (ValueError, TypeError, msgpack.UnpackException, RecursionError)


def _broken(problem: BaseException) -> UndecodableMessage:
    return UndecodableMessage(f"a broken msgpack message: {str(problem) or type(problem).__name__}")


class MsgpackCodec:
    """M5. Lists arrive as tuples."""

    name = "M5"

    def __init__(self) -> None:
        self._pack = self._new_packer()
        self._renew_unpacker()

    def _renew_unpacker(self) -> None:
        unpacker = msgpack.Unpacker(
            **_UNPACKING, max_buffer_size=_SMALL_BYTES, max_str_len=_SMALL_BYTES, max_bin_len=_SMALL_BYTES,
            max_array_len=_SMALL_BYTES, max_map_len=_SMALL_BYTES,
        )  # fmt: skip
        self._feed = unpacker.feed
        self._unpack = unpacker.unpack
        self._tell = unpacker.tell
        self._fed_bytes = 0

    @staticmethod
    def _new_packer() -> Callable[[Any], bytes]:
        pack: Callable[[Any], bytes] = msgpack.Packer(use_bin_type=True, default=_refuse_object).pack
        return pack

    def encode(self, message_id: MessageId, flag: int, name: str, args: Any) -> bytes:
        if not _is_flat(args):
            _check_containers(args, _MSGPACK_KEYS, UnsendableValue)
        try:
            message = self._pack((message_id, flag, name, args))
        except UnsendableValue:
            self._pack = self._new_packer()
            raise
        except (ValueError, OverflowError, TypeError) as problem:
            self._pack = self._new_packer()
            raise UnsendableValue(f"a value that can't be sent: {problem}") from None
        if len(message) > _KEPT_BUFFER_BYTES:
            self._pack = self._new_packer()
        return message

    def decode_long(self, data: bytes) -> Message:
        if len(data) <= limits.MESSAGE_COUNTED_BYTES:
            return self.decode(data)
        left = limits.MESSAGE_VALUES

        def count(container: Sized) -> Sized:
            nonlocal left
            left -= 1 + len(container)
            if left < 0:
                raise UndecodableMessage(f"a message of more than {limits.MESSAGE_VALUES:,} values")
            return container

        try:
            message = msgpack.unpackb(
                data, **_UNPACKING, list_hook=count, object_hook=count, max_array_len=left, max_map_len=left
            )
        except _BROKEN as problem:
            raise _broken(problem) from None
        return _checked(message)

    def decode(self, data: bytes) -> Message:
        try:
            if len(data) > _SMALL_BYTES:
                message = msgpack.unpackb(data, **_UNPACKING)
            else:
                # The same, without being set up for each message anew.
                self._fed_bytes += len(data)
                self._feed(data)
                message = self._unpack()
                if self._tell() != self._fed_bytes:
                    raise UndecodableMessage("a msgpack message with something behind it")
        except BaseException as problem:
            self._renew_unpacker()
            if not isinstance(problem, _BROKEN):
                raise
            raise _broken(problem) from None
        return _checked(message)


class PickleCodec:
    """Z5."""

    name = "Z5"

    def encode(self, message_id: MessageId, flag: int, name: str, args: Any) -> bytes:
        if not _is_flat(args):
            _check_containers(args, _PICKLE_KEYS, UnsendableValue)
        return pickles.dumps((message_id, flag, name, args))

    def decode(self, data: bytes) -> Message:
        return _checked(pickles.loads(data))

    def decode_long(self, data: bytes) -> Message:
        return _checked(pickles.loads(data, limits.PICKLE_OPCODES))


_CODECS: Final[dict[bytes, Callable[[], Codec]]] = {b"M": MsgpackCodec, b"Z": PickleCodec}

#: The names of the protocols that this version speaks, the best first.
PROTOCOLS: Final = ("M5", "Z5")


def codec_for(protocol: bytes) -> Codec:
    """The codec of a protocol name as it stands on the wire, such as b"M5"."""
    make = _CODECS.get(protocol[:1])
    if make is None or protocol[1:] != _VERSION:
        shown = protocol[: limits.INTEGER_BYTES]
        raise UnknownProtocol(f"protocol {shown!r} is not spoken here, only {' and '.join(PROTOCOLS)}")
    return make()
