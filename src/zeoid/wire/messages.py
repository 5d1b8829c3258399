"""The message table: every method of the protocol with its arguments, in one place.

Owns what a call must look like: who may call it, in which phase, with which arguments, and whether it may
be sent one-way. Knows nothing of how a method is carried out. `docs/protocol.md` is checked against it.
Source: the methods of ZEO 5 and 6, as their servers register them. Those marked `extension` are ours:
a client may call one only on a server whose reply to `get_info` names it.
"""

from collections.abc import Callable
from dataclasses import field
from enum import Enum
from typing import Any, Final

from zeoid import limits
from zeoid.errors import InvalidCall
from zeoid.model import UndoPrefix, frozen


class Phase(Enum):
    """When a call is allowed on a connection."""

    UNREGISTERED = "before register"
    REGISTERED = "after register"


class Access(Enum):
    """What a caller must be allowed to do. Roles grant these."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"
    #: To be told all that is committed, in order to keep a copy of it.
    REPLICA = "replica"


Check = Callable[[Any], bool]


@frozen
class Kind:
    """The kind of an argument: its name as documented, and the test it must pass."""

    name: str
    test: Check


def _is_eight_bytes(value: Any) -> bool:
    return type(value) is bytes and len(value) == 8


def _are_oids(value: Any) -> bool:
    if type(value) not in (tuple, list, set):
        return False
    for oid in value:  # noqa: SIM110 - clients get many of these, and an expression takes longer
        if type(oid) is not bytes or len(oid) != 8:
            return False
    return True


def _is_plain(value: Any, depth: int = limits.NESTING) -> bool:
    if depth == 0:
        return False
    if type(value) is dict:
        return all(_is_plain(part, depth - 1) for pair in value.items() for part in pair)
    if type(value) in (list, tuple, set):
        return all(_is_plain(part, depth - 1) for part in value)
    return value is None or type(value) in (str, bytes, int, float, bool)


def _is_specification(value: Any) -> bool:
    return type(value) is dict and all(
        type(key) is str and (isinstance(wanted, UndoPrefix) or _is_plain(wanted))
        for key, wanted in value.items()
    )


def _is_integer(value: Any) -> bool:
    return type(value) is int or type(value) is bool


OID: Final = Kind("oid", _is_eight_bytes)
TID: Final = Kind("tid", _is_eight_bytes)
DATA: Final = Kind("bytes", lambda value: type(value) is bytes)
TEXT: Final = Kind("text", lambda value: type(value) in (str, bytes))
INTEGER: Final = Kind("integer", _is_integer)
NUMBER: Final = Kind("number", lambda value: type(value) is float or _is_integer(value))
FLAG: Final = Kind("flag", _is_integer)
#: ZODB's own tests write "no revision" as text.
SERIAL: Final = Kind(
    "tid or None", lambda value: value is None or _is_eight_bytes(value) or value == "\0" * 8
)
STATUS: Final = Kind("status", lambda value: type(value) in (str, bytes) and len(value) == 1)
INTEGERS: Final = Kind(
    "integers", lambda value: type(value) in (list, tuple) and all(map(_is_integer, value))
)
OIDS: Final = Kind("oids", _are_oids)
BULK_OIDS: Final = Kind(
    f"up to {limits.BULK_LOAD_OIDS} oids",
    lambda value: _are_oids(value) and type(value) is not set and len(value) <= limits.BULK_LOAD_OIDS,
)
EXTENSION: Final = Kind("dictionary", lambda value: type(value) is dict and _is_plain(value))
SPECIFICATION: Final = Kind("specification", lambda value: value is None or _is_specification(value))
MAPPING: Final = Kind("dictionary", lambda value: type(value) is dict)
#: A transaction's id is whatever its client chose, as long as it can be a key.
TRANSACTION: Final = Kind(
    "transaction id", lambda value: len(value) <= 64 if type(value) in (bytes, str) else _is_integer(value)
)
#: One that must be unique, because it names the transaction on any connection.
CLIENT_MADE: Final = Kind("client-made id", lambda value: type(value) is bytes and 0 < len(value) <= 64)

#: What a client calls a blob that it sends ahead of its transaction. It is random.
BLOB_NAME: Final = Kind("blob name", lambda value: type(value) is bytes and len(value) == 16)

#: The kinds of an operation of `tpc_prepare`.
STORE, RESTORE, DELETE, CHECK_CURRENT, UNDO, ATTACH = range(6)


def _is_beginning(value: Any) -> bool:
    """Whether it is (user, description, extension, tid or None, status)."""
    if type(value) not in (tuple, list) or len(value) != 5:
        return False
    user, description, extension, tid, status = value
    return (
        type(user) in (bytes, str)
        and type(description) in (bytes, str)
        and type(extension) is dict
        and (not extension or _is_plain(extension))
        and (tid is None or _is_eight_bytes(tid))
        and STATUS.test(status)
    )


def _are_operations(value: Any) -> bool:
    """Whether it is a sequence of (kind, oid, serial, data, same_as), each as its kind wants it.

    Every store of a commit comes through here: no call for each part.
    """
    if type(value) is not list and type(value) is not tuple:
        return False
    for operation in value:
        if (type(operation) is not tuple and type(operation) is not list) or len(operation) != 5:
            return False
        kind, oid, serial, data, same_as = operation
        if type(kind) is not int:
            return False
        if kind == UNDO:
            if oid is not None or serial is not None or same_as is not None or type(data) is not bytes:
                return False
            continue
        if type(oid) is not bytes or len(oid) != 8:
            return False
        if kind == ATTACH:
            if serial is not None or same_as is not None or not BLOB_NAME.test(data):
                return False
            continue
        if (type(serial) is not bytes or len(serial) != 8) and (serial is not None or kind != STORE):
            return False
        if kind == STORE:
            sound = type(data) is bytes and same_as is None
        elif kind == RESTORE:
            sound = (data is None or type(data) is bytes) and (same_as is None or _is_eight_bytes(same_as))
        else:
            sound = kind in (DELETE, CHECK_CURRENT) and data is None and same_as is None
        if not sound:
            return False
    return True


BEGINNING: Final = Kind("beginning", _is_beginning)
OPERATIONS: Final = Kind("operations", _are_operations)


def _or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.name} or None", lambda value: value is None or kind.test(value))


@frozen
class Method:
    """One row of the table. The last *optional* arguments may be left out."""

    name: str
    args: tuple[tuple[str, Kind], ...]
    optional: int = 0
    phase: Phase = Phase.REGISTERED
    #: None: nothing. Only what says who is there needs nothing, and what a server calls on its client.
    access: Access | None = None
    summary: str = ""
    #: Whether stock servers don't know it, so that they must not be asked.
    extension: bool = False
    #: Whether the arguments are oids and tids only, as a load's are: they are tested without a call for each.
    all_eight_bytes: bool = field(init=False)

    def __post_init__(self) -> None:
        all_eight_bytes = all(kind.test is _is_eight_bytes for _, kind in self.args)
        object.__setattr__(self, "all_eight_bytes", all_eight_bytes)

    def check(self, args: Any) -> tuple[Any, ...]:
        """*args* as a tuple. InvalidCall, naming the first argument that is wrong."""
        if type(args) is tuple and len(args) == len(self.args):
            if self.all_eight_bytes:
                for value in args:
                    if type(value) is not bytes or len(value) != 8:
                        break
                else:
                    return args
            else:
                for (_, kind), value in zip(self.args, args, strict=False):
                    if not kind.test(value):
                        break
                else:
                    return args
        return self._explain(args)

    def _explain(self, args: Any) -> tuple[Any, ...]:
        """As `check`, for arguments that are incomplete, of another type, or wrong."""
        if type(args) is not tuple:
            if type(args) is not list:
                raise InvalidCall(f"{self.name}: the arguments are no sequence")
            args = tuple(args)
        given: tuple[Any, ...] = args
        most = len(self.args)
        if not most - self.optional <= len(given) <= most:
            raise InvalidCall(f"{self.name} takes {self.signature()}, not {len(given)} arguments")
        for (name, kind), value in zip(self.args, given, strict=False):
            if not kind.test(value):
                raise InvalidCall(f"{self.name}: {name} must be {kind.name}, not {_shown(value)}")
        return given

    def signature(self) -> str:
        """The arguments as documented, the optional ones in brackets."""
        required = len(self.args) - self.optional
        return "(" + ", ".join(
            name if index < required else f"[{name}]" for index, (name, _) in enumerate(self.args)
        ) + ")"  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return type(value).__name__


def _table(*rows: Method) -> dict[str, Method]:
    return {row.name: row for row in rows}


_R, _W, _A = Access.READ, Access.WRITE, Access.ADMIN
_P = Phase.REGISTERED
_id = ("transaction", TRANSACTION)
_oid = ("oid", OID)
_serial = ("serial", TID)
_data = ("data", DATA)
_begin = ("begin", _or_none(BEGINNING))
_operations = ("operations", OPERATIONS)

#: What a client may call on a server.
SERVER_METHODS: Final = _table(
    Method("register", (("storage", TEXT), ("read_only", FLAG)), 0, Phase.UNREGISTERED, _R,
           "choose a storage; the reply is its last tid"),
    Method("get_info", (), 0, _P, _R, "length, size, name and interfaces of the storage"),
    Method("lastTransaction", (), 0, _P, _R, "the last visible tid"),
    Method("getInvalidations", (("tid", TID),), 0, _P, _R, "what changed since, or None if it isn't known"),
    Method("loadBefore", (_oid, ("tid", TID)), 0, _P, _R, "the newest revision before tid"),
    Method("loadSerial", (_oid, _serial), 0, _P, _R, "the data of one revision"),
    Method("getTid", (_oid,), 0, _P, _R, "the tid of the current revision"),
    Method("history", (_oid, ("size", INTEGER)), 1, _P, _R, "the newest revisions, described"),
    Method("record_iternext", (("next", _or_none(OID)),), 1, _P, _R, "the current records in oid order"),
    Method("undoInfo", (("first", INTEGER), ("last", INTEGER), ("specification", SPECIFICATION)), 3, _P, _R,
           "the undoable transactions that match"),
    Method("undoLog", (("first", INTEGER), ("last", INTEGER)), 2, _P, _R, "the undoable transactions"),
    Method("sendBlob", (_oid, _serial), 0, _P, _R, "send the blob of a revision, before the reply"),
    Method("iterator_start", (("start", _or_none(TID)), ("stop", _or_none(TID))), 2, _P, _R,
           "begin to iterate over transactions; the reply is the iterator's id"),
    Method("iterator_next", (("iterator", INTEGER),), 0, _P, _R, "the next transaction or None"),
    Method("iterator_record_start", (("iterator", INTEGER), ("tid", TID)), 0, _P, _R,
           "begin to iterate over the records of the iterator's current transaction"),
    Method("iterator_record_next", (("iterator", INTEGER),), 0, _P, _R, "the next record or None"),
    Method("iterator_gc", (("iterators", INTEGERS),), 0, _P, _R, "forget iterators"),
    Method("new_oids", (("count", INTEGER),), 1, _P, _W, "oids that were never used"),
    Method("tpc_begin", (_id, ("user", TEXT), ("description", TEXT), ("extension", EXTENSION),
                         ("tid", _or_none(TID)), ("status", STATUS)), 2, _P, _W, "begin a transaction"),
    Method("storea", (_oid, ("serial", SERIAL), _data, _id), 0, _P, _W, "write a revision"),
    Method("restorea", (_oid, _serial, ("data", _or_none(DATA)), ("same_as", _or_none(TID)), _id), 0, _P, _W,
           "copy a revision of another storage"),
    Method("deleteObject", (_oid, _serial, _id), 0, _P, _W, "delete an object"),
    Method("checkCurrentSerialInTransaction", (_oid, _serial, _id), 0, _P, _W,
           "fail the vote unless the object is still at this revision"),
    Method("undoa", (("undone", DATA), _id), 0, _P, _W, "reverse a transaction"),
    Method("storeBlobStart", (), 0, _P, _W, "a blob begins"),
    Method("storeBlobChunk", (("chunk", DATA),), 0, _P, _W, "the next part of it"),
    Method("storeBlobEnd", (_oid, ("serial", SERIAL), _data, _id), 0, _P, _W,
           "that was all of it; it belongs to this record"),
    Method("storeBlobShared", (_oid, ("serial", SERIAL), _data, ("filename", TEXT), _id), 0, _P, _W,
           "write a revision whose blob is a file in the shared blob directory, beside the object's others"),
    Method("vote", (_id,), 0, _P, _W, "prepare; the reply lists resolved oids and conflicts to resolve"),
    Method("tpc_finish", (_id,), 0, _P, _W, "commit; the reply is the tid"),
    Method("tpc_abort", (_id,), 0, _P, _W, "forget the transaction"),
    Method("pack", (("time", NUMBER), ("wait", FLAG)), 1, _P, _A, "remove old revisions and garbage"),
    Method("server_status", (), 0, _P, _R, "the thirteen figures that ZEO reports"),
    Method("set_client_label", (("label", TEXT),), 0, _P, _R, "a name for the log"),
    Method("ping", (), 0, _P, _R, "nothing, in order"),
    Method("tpc_prepare", (_id, _begin, _operations), 0, _P, _W,
           "begin unless that was done, do the operations, and vote", extension=True),
    Method("tpc_operate", (_id, _begin, _operations), 0, _P, _W,
           "a first part of what is too much for one `tpc_prepare`", extension=True),
    Method("outcome", (("transaction", CLIENT_MADE), ("after", TID)), 0, _P, _W,
           "the tid that a transaction was committed with, or None: it is not, and never will be",
           extension=True),
    Method("checkpoint", (), 0, _P, _A,
           "bring the storage's own files up to date; the reply is the tid reached", extension=True),
    Method("pack_status", (), 0, _P, _R, "how far the pack is that is under way, or how the last one ended",
           extension=True),
    Method("pack_cancel", (), 0, _P, _A,
           "give up the pack that is under way; the reply is None, or says why that can't be",
           extension=True),
    Method("blob_token", (), 0, _P, _R, "what opens one blob connection, within `BLOB_TOKEN_S`",
           extension=True),
    Method("blob_load", (_oid, _serial, ("most", INTEGER)), 0, _P, _R,
           "the size of a blob, and its content unless it is larger than most", extension=True),
    Method("loadBeforeMany", (("oids", BULK_OIDS), ("tid", TID)), 0, _P, _R,
           "the newest revisions before tid of several objects", extension=True),
    Method("authenticate", (("token", TEXT),), 0, Phase.UNREGISTERED, None,
           "say who is there, before `register`; the reply is the name", extension=True),
)  # fmt: skip

#: What a server may call, one-way, on a client.
CLIENT_METHODS: Final = _table(
    Method("invalidateTransaction", (("tid", TID), ("oids", OIDS)),
           summary="a transaction was committed; it wrote these objects"),
    Method("info", (("info", MAPPING),), summary="the storage's length and size have changed"),
    Method("receiveBlobStart", (_oid, _serial), summary="a blob begins, which `sendBlob` asked for"),
    Method("receiveBlobChunk", (_oid, _serial, ("chunk", DATA)), summary="the next part of a blob"),
    Method("receiveBlobStop", (_oid, _serial), summary="that was all of a blob; the reply follows"),
)  # fmt: skip

#: What a server knows beyond ZEO's methods; the reply to `get_info` names them.
EXTENSIONS: Final = tuple(method.name for method in SERVER_METHODS.values() if method.extension)
#: Of these, what it knows only where its storage has blobs.
BLOB_EXTENSIONS: Final = ("blob_token", "blob_load")
