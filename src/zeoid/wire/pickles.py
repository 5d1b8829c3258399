"""Z5's pickles, read by an interpreter that can make plain values only, and written from plain values only.

Owns the list of what a pickle from the network may contain. Python's own unpickler can be restricted in
what it imports, but not in memory (a memo index or a length of a few bytes makes it allocate gigabytes)
or in time (nested tuples as a dictionary key take forever to hash). A message is some twelve opcodes, so
a table of the opcodes that protocols 1 to 3 use for plain values is small and fast enough, and anything
else is an error by construction. Source: the opcode descriptions in Python's pickletools module.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from itertools import repeat
from struct import Struct, error
from typing import Any, Final

from zeoid import limits
from zeoid.errors import UndecodableMessage, UnsendableValue
from zeoid.model import UndoPrefix, frozen

_MARK: Final = object()


@dataclass(slots=True)
class Instance:
    """An exception or other object as it was pickled: its class's name, never the class itself."""

    name: str
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


@frozen
class _Global:
    name: str


#: What may be named in a pickle. None of it is imported: names become values below.
_INSTANCES: Final = frozenset(
    f"ZODB.POSException.{name}"
    for name in (
        "BTreesConflictError", "ConflictError", "MultipleUndoErrors", "POSKeyError", "ReadConflictError",
        "ReadOnlyError", "StorageError", "StorageTransactionError", "UndoError",
    )
) | frozenset(
    f"builtins.{name}" for name in ("Exception", "KeyError", "TypeError", "ValueError")
)  # fmt: skip
_RECONSTRUCTOR: Final = "ZODB.POSException._recon"
_PREFIX: Final = "ZopeUndo.Prefix.Prefix"
_SETS: Final = frozenset({"builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"})
#: How ZODB writes a transaction's extension that it read from a storage.
_DICTS: Final = frozenset({"builtins.dict", "__builtin__.dict"})
_ENCODE: Final = "_codecs.encode"
_ALLOWED: Final = _INSTANCES | _SETS | _DICTS | {_RECONSTRUCTOR, _PREFIX, _ENCODE}

_SCALARS: Final = (str, bytes, int, float, type(None))
#: The longest text or bytes that a pickle may refer to a second time.
_SHARED_BYTES: Final = 64


def _key(value: Any) -> Any:
    # Keys whose hashes a peer can choose make a dictionary take forever: tuples and large integers are such.
    if not isinstance(value, _SCALARS):
        raise UndecodableMessage(f"a {type(value).__name__} as a key")
    if type(value) is int and value.bit_length() > 64:
        raise UndecodableMessage(f"an integer of {value.bit_length()} bits as a key")
    return value


class _Machine:
    """The stack, the marks and the memo of one pickle, and a position in its bytes."""

    __slots__ = ("data", "memo", "names", "position", "stack")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        #: Classes named and not yet used for a call: a message must not contain any.
        self.names = 0

    def take(self, size: int) -> bytes:
        start = self.position
        self.position = stop = start + size
        if stop > len(self.data):
            raise UndecodableMessage("a pickle that ends too early")
        return self.data[start:stop]

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.position)
        if stop < 0:
            raise UndecodableMessage("a pickle that ends too early")
        text = self.data[self.position : stop]
        self.position = stop + 1
        return text

    def pop_mark(self) -> list[Any]:
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                values = stack[index + 1 :]
                del stack[index:]
                return values
        raise UndecodableMessage("a pickle without the mark that it uses")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise UndecodableMessage("a mark where a value belongs")
        return value

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise UndecodableMessage(f"a {type(value).__name__} where a {kind.__name__} belongs")
        return value


_U1, _U2, _U4, _I4, _U8, _F8 = (Struct(f) for f in ("<B", "<H", "<I", "<i", "<Q", ">d"))


def _constant(value: Any) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        machine.stack.append(value)

    return push


def _number(layout: Struct) -> Callable[[_Machine], None]:
    size = layout.size
    unpack_from = layout.unpack_from

    def push(machine: _Machine) -> None:
        machine.stack.append(unpack_from(machine.data, machine.position)[0])
        machine.position += size

    return push


def _counted(layout: Struct, convert: Callable[[bytes], Any] | None) -> Callable[[_Machine], None]:
    size = layout.size
    unpack_from = layout.unpack_from

    def push(machine: _Machine) -> None:
        (length,) = unpack_from(machine.data, machine.position)
        start = machine.position + size
        machine.position = stop = start + length
        if stop > len(machine.data):
            raise UndecodableMessage("a pickle that ends too early")
        raw = machine.data[start:stop]
        machine.stack.append(raw if convert is None else convert(raw))

    return push


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _python2_string(raw: bytes) -> str | bytes:
    # Python 2 had one type for text and bytes: what is ASCII was text (names), the rest bytes (oids).
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        return raw


def _bounded_integer(raw: bytes) -> int:
    if len(raw) > limits.INTEGER_BYTES:
        raise UndecodableMessage(f"an integer of {len(raw)} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _text_integer(machine: _Machine) -> None:
    text = machine.line().rstrip(b"L")
    if text in (b"00", b"01"):
        machine.stack.append(text == b"01")
        return
    if len(text) > 2 * limits.INTEGER_BYTES:
        raise UndecodableMessage(f"an integer of {len(text)} digits")
    machine.stack.append(int(text))


def _tuple_of(size: int) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        values = tuple(machine.pop() for _ in range(size))
        machine.stack.append(values[::-1])

    return push


def _mark_tuple(machine: _Machine) -> None:
    values = tuple(machine.pop_mark())
    machine.stack.append(values)


def _mark_list(machine: _Machine) -> None:
    values = machine.pop_mark()
    machine.stack.append(values)


def _empty_list(machine: _Machine) -> None:
    machine.stack.append([])


def _empty_dict(machine: _Machine) -> None:
    machine.stack.append({})


def _mark(machine: _Machine) -> None:
    machine.stack.append(_MARK)


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _appends(machine: _Machine) -> None:
    values = machine.pop_mark()
    machine.top(list).extend(values)


def _set_pairs(target: dict[Any, Any], values: list[Any]) -> None:
    if len(values) % 2:
        raise UndecodableMessage("a key without a value")
    for index in range(0, len(values), 2):
        target[_key(values[index])] = values[index + 1]


def _set_item(machine: _Machine) -> None:
    value = machine.pop()
    key = machine.pop()
    machine.top(dict)[_key(key)] = value


def _set_items(machine: _Machine) -> None:
    values = machine.pop_mark()
    _set_pairs(machine.top(dict), values)


def _mark_dict(machine: _Machine) -> None:
    made: dict[Any, Any] = {}
    _set_pairs(made, machine.pop_mark())
    machine.stack.append(made)


def _memo_put(layout: Struct | None) -> Callable[[_Machine], None]:
    def put(machine: _Machine) -> None:
        index = int(machine.line()[:20]) if layout is None else layout.unpack(machine.take(layout.size))[0]
        if machine.stack[-1] is _MARK:
            raise UndecodableMessage("a mark where a value belongs")
        machine.memo[index] = machine.stack[-1]

    return put


def _memo_get(layout: Struct | None) -> Callable[[_Machine], None]:
    def get(machine: _Machine) -> None:
        index = int(machine.line()[:20]) if layout is None else layout.unpack(machine.take(layout.size))[0]
        value = machine.memo[index]
        # Sharing lets a few bytes stand for a structure that takes forever to walk, or for gigabytes once it
        # is written again. No peer does it: messages are pickled without a memo.
        if type(value) is _Global:
            machine.names += 1
        elif not isinstance(value, _SCALARS):
            raise UndecodableMessage("a container that is used twice")
        elif isinstance(value, (str, bytes)) and len(value) > _SHARED_BYTES:
            raise UndecodableMessage(f"{len(value)} bytes that are used twice")
        machine.stack.append(value)

    return get


def _global(machine: _Machine) -> None:
    module, name = machine.line(), machine.line()
    dotted = (module + b"." + name).decode("ascii", "replace")
    if dotted not in _ALLOWED:
        raise UndecodableMessage(f"a message may not name {dotted[:100]!r}")
    machine.names += 1
    machine.stack.append(_Global(dotted))


def _call(machine: _Machine) -> None:
    args = machine.pop()
    function = machine.pop()
    if type(function) is not _Global or type(args) is not tuple:
        raise UndecodableMessage("a call of something that is no class")
    machine.names -= 2 if function.name == _RECONSTRUCTOR else 1
    machine.stack.append(_made(function.name, args))


def _made(name: str, args: tuple[Any, ...]) -> Any:
    if name in _SETS:
        if len(args) != 1 or type(args[0]) is not list:
            raise UndecodableMessage("a set that is made of something else than a list")
        return {_key(value) for value in args[0]}
    if name in _DICTS:
        pairs = args[0] if args else ()
        if len(args) > 1 or type(pairs) not in (tuple, list):
            raise UndecodableMessage("a dictionary that is made of something else than pairs")
        if not all(type(pair) is tuple and len(pair) == 2 for pair in pairs):
            raise UndecodableMessage("a dictionary that is made of something else than pairs")
        return {_key(key): value for key, value in pairs}
    if name == _RECONSTRUCTOR:
        if len(args) != 2 or type(args[0]) is not _Global or type(args[1]) is not dict:
            raise UndecodableMessage("an exception that is no exception")
        state = dict(args[1])
        own = state.pop("args", ())
        return Instance(args[0].name, own if type(own) is tuple else (), state)
    if name == _ENCODE:  # how protocols 1 and 2 write bytes
        if len(args) != 2 or type(args[0]) is not str or args[1] != "latin1":
            raise UndecodableMessage("bytes in an unknown disguise")
        return args[0].encode("latin1")
    return Instance(name, args)


def _build(machine: _Machine) -> None:
    state = machine.pop()
    instance = machine.top(Instance)
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise UndecodableMessage("an object with a state that is no dictionary")
    if instance.name == _PREFIX:
        machine.stack[-1] = _prefix(state)
    else:
        instance.state.update(state)


def _prefix(state: dict[str, Any]) -> UndoPrefix:
    path = state.get("path")
    if type(path) is not list or not all(type(element) is str for element in path):
        raise UndecodableMessage("an undo prefix without a path")
    return UndoPrefix.of(path)


def _proto(machine: _Machine) -> None:
    if machine.take(1)[0] > 4:
        raise UndecodableMessage("a pickle of an unknown protocol")


def _pop(machine: _Machine) -> None:
    machine.stack.pop()


_OPCODES: Final[dict[int, Callable[[_Machine], None]]] = {
    ord(code): action
    for code, action in {
        "\x80": _proto,
        "\x95": lambda machine: machine.take(8) and None,  # FRAME: a hint for files
        "(": _mark, "0": _pop, "N": _constant(None), "\x88": _constant(True), "\x89": _constant(False),
        "K": _number(_U1), "M": _number(_U2), "J": _number(_I4), "G": _number(_F8),
        "\x8a": _counted(_U1, _bounded_integer), "\x8b": _counted(_U4, _bounded_integer),
        "I": _text_integer, "L": _text_integer,
        "C": _counted(_U1, None), "B": _counted(_U4, None), "\x8e": _counted(_U8, None),
        "U": _counted(_U1, _python2_string), "T": _counted(_U4, _python2_string),
        "X": _counted(_U4, _text), "\x8c": _counted(_U1, _text), "\x8d": _counted(_U8, _text),
        ")": _constant(()), "t": _mark_tuple,
        "\x85": _tuple_of(1), "\x86": _tuple_of(2), "\x87": _tuple_of(3),
        "]": _empty_list, "l": _mark_list, "a": _append, "e": _appends,
        "}": _empty_dict, "d": _mark_dict, "s": _set_item, "u": _set_items,
        "p": _memo_put(None), "q": _memo_put(_U1), "r": _memo_put(_U4),
        "g": _memo_get(None), "h": _memo_get(_U1), "j": _memo_get(_U4),
        "c": _global, "R": _call, "\x81": _call, "b": _build,
    }.items()
}  # fmt: skip
_STOP: Final = ord(".")
_ALWAYS: Final = repeat(None)


def loads(data: bytes, most_opcodes: int = 0) -> Any:
    """The value of a pickle, made of plain values, `Instance` and `UndoPrefix` only.

    Time and memory are proportional to the length of *data*, and to *most_opcodes* if there is such a bound.
    UndecodableMessage for everything else.
    """
    machine = _Machine(data)
    opcodes = _OPCODES
    try:
        for _ in range(most_opcodes) if most_opcodes else _ALWAYS:
            code = data[machine.position]
            machine.position += 1
            if code == _STOP:
                (value,) = machine.stack
                if value is _MARK or machine.names:
                    raise UndecodableMessage("a pickle without a value, or with a class as one")
                return value
            opcodes[code](machine)
        raise UndecodableMessage(f"a pickle of more than {most_opcodes:,} opcodes")
    except KeyError as problem:
        raise UndecodableMessage(f"an opcode or a memo in a pickle that is not allowed: {problem}") from None
    except (IndexError, ValueError, error) as problem:
        raise UndecodableMessage(f"a broken pickle: {problem}") from None


class _SetMet(Exception):
    """There is a set in what is to be pickled, or the class itself."""


class _PlainPickler(pickle.Pickler):
    """Refuses everything that the pickler does not know by heart."""

    def reducer_override(self, obj: Any) -> Any:
        if obj is set or obj is frozenset:  # what the pickler makes of a set is a call of its class
            raise _SetMet
        kind = obj if isinstance(obj, type) else type(obj)
        raise UnsendableValue(f"a {kind.__module__}.{kind.__qualname__} can't be sent")


def dumps(value: Any) -> bytes:
    """*value* as a pickle of protocol 3, without memo. UnsendableValue unless it is plain.

    Sets become lists: a stock client takes no message that names the class of a set.
    """
    try:
        return _pickled(value)
    except _SetMet:
        try:
            return _pickled(_listed(value, limits.NESTING))
        except _SetMet:
            raise UnsendableValue("a class of sets can't be sent") from None


def _listed(value: Any, depth: int) -> Any:
    """A copy of *value* with lists for sets."""
    if not depth:
        raise UnsendableValue(f"a value that is nested more than {limits.NESTING} deep can't be sent")
    if type(value) is dict:
        return {key: _listed(part, depth - 1) for key, part in value.items()}
    if type(value) is tuple:
        return tuple(_listed(part, depth - 1) for part in value)
    if type(value) in (list, set, frozenset):
        return [_listed(part, depth - 1) for part in value]
    return value


def _pickled(value: Any) -> bytes:
    stream = BytesIO()
    pickler = _PlainPickler(stream, 3)
    pickler.fast = True
    try:
        pickler.dump(value)
    except (RecursionError, ValueError, pickle.PicklingError) as problem:
        raise UnsendableValue(f"a value that can't be sent: {problem}") from None
    return stream.getvalue()
