"""Errors cross by name: ours to a stock client, a stock server's to ours, and no error breaks anything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZEO.asyncio import marshal
from ZEO.asyncio.client import exc_factories
from ZEO.Exceptions import ServerException
from ZODB import POSException
from ZODB.utils import p64

from tests.wire.samples import LATER_TID, OID, TID, nested, plain_values, unhurried
from zeoid.errors import Forbidden, InvalidCall, ServerError, UndecodableMessage, UnsendableValue
from zeoid.wire import faults
from zeoid.wire.codec import FAULT, PROTOCOLS, REPLY, codec_for
from zeoid.wire.pickles import Instance

both = pytest.mark.parametrize("protocol", PROTOCOLS)


def conflict(kind: type[POSException.ConflictError]) -> POSException.ConflictError:
    problem = kind("two of them", oid=OID, serials=(LATER_TID, TID))
    problem.class_name = "app.models.Account"
    return problem


#: Every error that crosses by name.
ERRORS: list[Exception] = [
    KeyError("x"),
    TypeError("2 arguments", 3),
    ValueError("unknown storage: x"),
    conflict(POSException.ConflictError),
    conflict(POSException.ReadConflictError),
    POSException.BTreesConflictError(1, -1, 3, 2),
    POSException.MultipleUndoErrors([(OID, POSException.UndoError("no", OID)), (p64(7), "modified later")]),
    POSException.UndoError("non-undoable transaction", OID),
    POSException.UndoError("non-undoable transaction"),
    POSException.POSKeyError(OID),
    POSException.ReadOnlyError(),
    POSException.ReadOnlyError("a replica"),
    POSException.StorageError("disk"),
    POSException.StorageTransactionError("no such transaction", OID),
    POSException.Unsupported("history"),
    Forbidden("pack needs the role admin; zope1 has write"),
]
every_error = pytest.mark.parametrize("problem", ERRORS, ids=lambda problem: type(problem).__name__)


class DatabaseKeyError(POSException.POSKeyError):
    """As a storage of another package derives them, with what clients can't be sent."""


class DatabaseConflict(POSException.ReadConflictError):
    def __init__(self, **known: Any) -> None:
        super().__init__(**known)
        self.connection = object()


class DatabaseError(POSException.POSError):
    pass


def sent(protocol: str, fault: Any) -> Any:
    codec = codec_for(protocol.encode())
    return codec.decode(codec.encode(7, FAULT, REPLY, fault))[3]


def check_same(remade: Exception, problem: Exception) -> None:
    assert type(remade) is type(problem)
    if isinstance(problem, POSException.MultipleUndoErrors):
        # The errors inside are reduced to their reasons.
        assert str(remade) == "Undo error 0x2a: no\nUndo error 0x07: modified later"
    else:
        assert str(remade) == str(problem)


def test_the_samples_are_every_error_that_crosses_by_name() -> None:
    assert {faults.describe(problem)[0] for problem in ERRORS} == set(faults._REBUILD)


@both
@every_error
def test_an_error_survives(problem: Exception, protocol: str) -> None:
    check_same(faults.rebuild(sent(protocol, faults.describe(problem))), problem)


def test_what_is_forbidden_reaches_a_stock_client() -> None:
    """It makes a ServerException, which is a StorageError, of what it does not know: with the text."""
    name, details = faults.describe(Forbidden("pack needs the role admin; zope1 has write"))
    assert name not in exc_factories
    problem = ServerException(name, details)
    assert isinstance(problem, POSException.StorageError)
    assert "pack needs the role admin; zope1 has write" in str(problem)


@both
def test_attributes_survive(protocol: str) -> None:
    remade: Any = faults.rebuild(sent(protocol, faults.describe(conflict(POSException.ConflictError))))
    assert (remade.oid, remade.serials, remade.class_name) == (OID, (LATER_TID, TID), "app.models.Account")
    remade = faults.rebuild(sent(protocol, faults.describe(POSException.POSKeyError(OID))))
    assert remade.args == (OID,)
    remade = faults.rebuild(sent(protocol, faults.describe(POSException.UndoError("no", OID))))
    assert (remade._reason, remade._oid) == ("no", OID)


@both
@every_error
def test_a_stock_client_makes_the_same_of_it(problem: Exception, protocol: str) -> None:
    codec = codec_for(protocol.encode())
    data = codec.encode(7, FAULT, REPLY, faults.describe(problem))
    _, flag, _, (name, details) = marshal.decoder(protocol.encode())(data)
    assert flag == 2
    assert name == f"{type(problem).__module__}.{type(problem).__qualname__}"
    if name in exc_factories:
        check_same(exc_factories[name](name, details), problem)


def test_the_samples_hold_every_error_that_a_stock_client_knows() -> None:
    named = {f"{type(problem).__module__}.{type(problem).__qualname__}" for problem in ERRORS}
    assert {name for name in exc_factories if not name.startswith("exceptions.")} <= named


@both
@every_error
def test_a_stock_servers_error_is_made_again(problem: Exception, protocol: str) -> None:
    data = marshal.encoder(protocol.encode(), True)(7, 2, ".reply", marshal.reduce_exception(problem))
    codec = codec_for(protocol.encode())
    check_same(faults.rebuild(codec.decode(data)[3]), problem)


@both
@pytest.mark.parametrize(
    "problem", [OSError(28, "No space left on device"), RuntimeError("x"), ZeroDivisionError()], ids=repr
)
def test_other_errors_arrive_as_server_errors_with_their_name(problem: Exception, protocol: str) -> None:
    remade = faults.rebuild(sent(protocol, faults.describe(problem)))
    assert type(remade) is ServerError
    assert isinstance(remade, POSException.StorageError)
    assert str(remade).startswith(f"builtins.{type(problem).__name__}: ")
    assert all(str(arg) in str(remade) for arg in problem.args)


@pytest.mark.parametrize(
    "problem", [InvalidCall("history: oid must be oid, not 3 bytes"), UnsendableValue("a x.y")], ids=repr
)
def test_what_a_caller_did_wrong_is_a_type_error_to_everybody(problem: Exception) -> None:
    assert faults.describe(problem) == ("builtins.TypeError", (str(problem),))


class WithState(Exception):
    """An error that carries something which no message can."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.cause = object()


@both
def test_errors_with_unsendable_parts_are_told(protocol: str) -> None:
    for problem in (WithState("why"), KeyError(object), ValueError((object(),))):
        name, details = sent(protocol, faults.describe(problem))
        assert name.endswith(type(problem).__name__)
        assert details[0] == str(problem)


@both
def test_a_note_on_an_error_does_not_get_in_the_way(protocol: str) -> None:
    problem = POSException.POSKeyError(OID)
    problem.add_note("while loading")
    assert sent(protocol, faults.describe(problem)) == ("ZODB.POSException.POSKeyError", (OID,))


def test_no_class_is_looked_up_by_name() -> None:
    for name in ("os.system", "builtins.SystemExit", "builtins.eval", "zeoid.errors.TimedOut", "zeoid", ""):
        assert type(faults.rebuild((name, ("true",)))) is ServerError


# What a peer may send instead -------------------------------------------------------------------------

MALFORMED = [
    None, 7, "text", (), ("x",), ("x", (), ()), (7, ()), (b"builtins.KeyError", ("x",)), [None, None],
    (Instance("builtins.KeyError"), ()),
]  # fmt: skip

WRONG_DETAILS = [
    None, 7, "text", b"\xff", (), (1, 2, 3, 4, 5, 6), {}, {1: 2}, {1: 2, "a": 3, None: 4}, ((),), [()],
    (OID, OID, OID), {"message": 1, "oid": 5, "serials": (1, 2, 3)},
    {"message": "", "oid": (), "serials": 7}, {"message": None, "oid": None, "serials": (b"", b"")},
    {"message": {}, "oid": OID, "serials": None}, {"p1": 1, "p2": 2, "p3": 3, "reason": 99},
    {"p1": "", "p2": (), "p3": None, "reason": 0}, {"p1": 1, "p2": 2, "p3": 3, "reason": ()},
    {"_errs": ()}, {"_errs": 7}, {"_errs": (7,)}, {"_errs": ((1, 2, 3),)}, {"_errs": ((None, None),)},
    {"_errs": (({}, Instance("builtins.KeyError")),)}, {"_reason": {}, "_oid": {}},
    {"_errs": (("", ("x", {"_reason": ()})),)}, Instance("ZODB.POSException.UndoError", (1,), {"a": 2}),
    (Instance("builtins.KeyError"),), nested(60),
]  # fmt: skip


@pytest.mark.parametrize("reply", MALFORMED, ids=repr)
def test_a_malformed_fault_is_a_server_error(reply: Any) -> None:
    remade = faults.rebuild(reply)
    assert type(remade) is ServerError
    assert str(remade) == "the server reported an error in an unknown form"


@pytest.mark.parametrize("name", [*sorted(faults._REBUILD), "x.y"])
def test_whatever_is_made_of_a_fault_can_be_told(name: str) -> None:
    for details in WRONG_DETAILS:
        remade = faults.rebuild((name, details))
        assert isinstance(remade, Exception), details
        assert isinstance(str(remade), str), details
        assert isinstance(repr(remade), str), details


@unhurried
@given(st.sampled_from([*sorted(faults._REBUILD), "x.y"]), plain_values)
def test_anything_in_a_fault_becomes_an_error_that_can_be_told(name: str, details: Any) -> None:
    remade = faults.rebuild((name, details))
    str(remade)
    repr(remade)


def test_an_error_of_errors_cannot_grow_when_it_is_told() -> None:
    # An exception that is used twice, by one that is used twice …: four billion of them when it is told.
    name = b"cZODB.POSException\nUndoError\n"
    doubling = b"(" + name + b")Rq\x00" + b"".join(name + b"h\x00h\x00\x86Rq\x00" for _ in range(32)) + b"t"
    with pytest.raises(UndecodableMessage):
        codec_for(b"Z5").decode(b"(K\x07K\x02X\x06\0\0\0.replyX\x03\0\0\0x.y" + doubling + b"\x86t.")


@both
@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (DatabaseKeyError(OID, {"cache": object()}), POSException.POSKeyError(OID)),
        (
            DatabaseConflict(message="two of them", oid=OID, serials=(LATER_TID, TID)),
            POSException.ReadConflictError("two of them", oid=OID, serials=(LATER_TID, TID)),
        ),
        (DatabaseError(object()), None),
        (DatabaseError("it is gone"), POSException.StorageError("it is gone")),
    ],
    ids=["key", "conflict", "unsendable", "plain"],
)
def test_errors_that_others_derived_arrive_as_those_of_zodb(
    protocol: str, problem: Exception, expected: Exception | None
) -> None:
    remade = faults.rebuild(sent(protocol, faults.describe(problem)))
    if expected is None:
        assert type(remade) is POSException.StorageError
    else:
        assert (type(remade), str(remade), vars(remade)) == (type(expected), str(expected), vars(expected))
