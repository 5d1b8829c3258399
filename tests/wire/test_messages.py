"""The message table: each method takes what it should, and names what is wrong; the documentation agrees."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZEO.asyncio.client import Protocol as StockClientProtocol
from ZEO.StorageServer import ZEOStorage, registered_methods

from tests.wire.samples import OID, TID, nested, plain_values, unhurried
from zeoid import limits
from zeoid.errors import InvalidCall
from zeoid.model import UndoPrefix
from zeoid.wire.codec import PROTOCOLS, codec_for
from zeoid.wire.messages import CLIENT_METHODS, EXTENSIONS, SERVER_METHODS, Access, Kind, Method, Phase
from zeoid.wire.pickles import Instance

METHODS = [*SERVER_METHODS.values(), *CLIENT_METHODS.values()]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)

#: For each kind of argument, values that are of this kind …
RIGHT: dict[str, list[Any]] = {
    "oid": [OID, b"\0" * 8, b"\xff" * 8],
    "tid": [TID, b"\0" * 8],
    "bytes": [b"", b"x" * 1000],
    "text": ["", "label", b"caf\xc3\xa9", "caf\xe9"],
    "integer": [0, -20, 100, True, 2**70],
    "number": [0, 1700000000, 1700000000.5, float("inf")],
    "flag": [True, False, 0, 1],
    "status": [" ", "p", b" "],
    "integers": [[], (), [1, 2], (3,)],
    "up to 100 oids": [[], (OID,), [OID, OID], [OID] * 100],
    "oids": [[], (OID,), [OID, OID], {OID}],
    "dictionary": [{}, {"a": 1}, {"a": {b"b": (1, [2.5, None, True])}}],
    "specification": [None, {}, {"user_name": "x", "description": b"x"}, {"user_name": UndoPrefix(("",))}],
    "transaction id": [0, 140_000_000_000_000, "x" * 64, b"\0" * 16, -1],
    "client-made id": [b"\0" * 16, b"x", b"x" * 64],
    "beginning": [
        (b"user", b"description", {"a": 1}, None, " "),
        ["", "", {}, TID, "p"],
    ],
    "operations": [
        [],
        (),
        [(0, OID, TID, b"data", None), (0, OID, None, b"", None)],
        ([1, OID, TID, b"data", None], (1, OID, TID, None, TID), (1, OID, TID, None, None)),
        [(2, OID, TID, None, None), (3, OID, TID, None, None)],
        [(4, None, None, b"undone", None)],
    ],
}
#: Sound but for one part, which is replaced by what it must not be.
SOUND_BEGINNING = (b"user", b"description", {}, None, " ")
WRONG_IN_BEGINNING: list[tuple[int, list[Any]]] = [
    (0, [None, 1, ()]), (1, [None, 1, ()]), (2, [None, [], {"a": object()}, {"a": UndoPrefix(("",))}]),
    (3, [7, b"short", "12345678"]), (4, ["", "pp", None, 0]),
]  # fmt: skip
SOUND_OPERATIONS = (
    (0, OID, TID, b"data", None), (1, OID, TID, b"data", TID), (2, OID, TID, None, None),
    (3, OID, TID, None, None), (4, None, None, b"undone", None),
)  # fmt: skip
#: For each part of an operation what no kind takes …
WRONG_PARTS: list[list[Any]] = [
    [5, -1, True, "0", None, 0.0, b"\0"], [OID[:7], "12345678", 42, (OID,)], [TID[:7], "12345678", 42],
    ["text", 5, (b"x",), bytearray(b"x")], [TID[:7], "12345678", 42, b"x" * 9],
]  # fmt: skip
#: … and what some kinds only take: (kinds, part, value)
WRONG_FOR_SOME: list[tuple[tuple[int, ...], int, Any]] = [
    ((0, 1, 2, 3), 1, None), ((4,), 1, OID), ((1, 2, 3), 2, None), ((4,), 2, TID), ((0, 4), 3, None),
    ((2, 3), 3, b"data"), ((0, 2, 3, 4), 4, TID),
]  # fmt: skip


def replaced(parts: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*parts[:index], value, *parts[index + 1 :])


def wrong_operations() -> list[Any]:
    good = SOUND_OPERATIONS[0]
    wrong = [replaced(sound, part, value) for sound in SOUND_OPERATIONS
             for part, values in enumerate(WRONG_PARTS) for value in values]  # fmt: skip
    wrong += [replaced(SOUND_OPERATIONS[kind], part, value) for kinds, part, value in WRONG_FOR_SOME
              for kind in kinds]  # fmt: skip
    wrong += [good[:4], (*good, None), None, 7, b"12345", {1: 2}]
    return [[good, operation] for operation in wrong] + [None, 7, b"", "", {}, {good}, good]


#: … and values that are not.
WRONG: dict[str, list[Any]] = {
    "oid": [None, 42, "\0" * 8, b"", b"\0" * 7, b"\0" * 9, bytearray(8), [OID], (OID,), {}],
    "tid": [None, 1.5, "12345678", b"1234567", b"123456789", (TID,), Instance("builtins.KeyError")],
    "bytes": [None, "text", 7, [b"x"], bytearray(b"x"), memoryview(b"x"), UndoPrefix(("",))],
    "text": [None, 7, ("x",), ["x"], {}, 1.5],
    "integer": [None, 1.0, "1", b"1", (1,), [], {}],
    "number": [None, "1", b"1", (1.0,), 1j],
    "flag": [None, 1.0, "", b"\1", ()],
    "status": [None, "", "pp", b"", b"pp", 0, (" ",)],
    "integers": [None, 1, "12", b"12", [1.0], [None], ["1"], {1: 2}, {1}, [[1]]],
    "up to 100 oids": [None, OID, [OID[:7]], [1], ["12345678"], {OID: 1}, [[OID]], {OID}, [OID] * 101],
    "oids": [None, OID, [OID[:7]], [1], ["12345678"], {OID: 1}, [[OID]]],
    "dictionary": [None, (), [], "a", [("a", 1)], 7],
    "specification": [7, "x", (), [], {7: "x"}, {b"x": "y"}, {"x": object()}, {"x": nested(200)}],
    "transaction id": [None, 1.5, "x" * 65, b"x" * 65, (1,), [], {}, ((),)],
    "client-made id": [None, 7, "x" * 16, b"", b"x" * 65, (b"x",)],
    "beginning": [None, 7, b"12345", "12345", SOUND_BEGINNING[:4], (*SOUND_BEGINNING, None), {}]
    + [replaced(SOUND_BEGINNING, part, value) for part, values in WRONG_IN_BEGINNING for value in values],
    "operations": wrong_operations(),
}
#: The dictionary of `tpc_begin` must be plain all the way down; that of `info` is for the client to judge.
WRONG_EXTENSION = [{"a": object()}, {"a": [Instance("x")]}, {"a": UndoPrefix(("",))}, {"a": nested(100_000)}]


def right(kind: Kind) -> list[Any]:
    name, _, none = kind.name.partition(" or ")
    return RIGHT[name] + ([None] if none else [])


def wrong(kind: Kind) -> list[Any]:
    name, _, none = kind.name.partition(" or ")
    return [value for value in WRONG[name] if not (none and value is None)]


def right_args(method: Method) -> tuple[Any, ...]:
    return tuple(right(kind)[0] for _, kind in method.args)


# The right arguments ----------------------------------------------------------------------------------


@every_method
def test_right_arguments_are_given_back_as_a_tuple(method: Method) -> None:
    args = right_args(method)
    assert method.check(args) == args
    assert method.check(list(args)) == args


@every_method
def test_every_right_value_is_taken(method: Method) -> None:
    args = right_args(method)
    for index, (_, kind) in enumerate(method.args):
        for value in right(kind):
            chosen = (*args[:index], value, *args[index + 1 :])
            assert method.check(chosen) == chosen


@every_method
def test_the_optional_arguments_may_be_left_out(method: Method) -> None:
    args = right_args(method)
    for count in range(len(args) - method.optional, len(args) + 1):
        assert method.check(args[:count]) == args[:count]


@every_method
def test_right_arguments_are_right_after_they_were_sent(method: Method) -> None:
    for protocol in PROTOCOLS:
        codec = codec_for(protocol.encode())
        method.check(codec.decode(codec.encode(1, 0, method.name, right_args(method)))[3])


# The wrong ones ---------------------------------------------------------------------------------------


@every_method
def test_too_few_or_too_many_arguments_are_refused_with_the_right_ones(method: Method) -> None:
    args = right_args(method)
    least = len(args) - method.optional
    for wrong_args in [args[:count] for count in range(least)] + [(*args, None), (*args, *args, 1)]:
        with pytest.raises(InvalidCall) as caught:
            method.check(wrong_args)
        assert str(caught.value) == (
            f"{method.name} takes {method.signature()}, not {len(wrong_args)} arguments"
        )


@every_method
def test_the_wrong_argument_is_named(method: Method) -> None:
    args = right_args(method)
    for index, (name, kind) in enumerate(method.args):
        for value in wrong(kind):
            with pytest.raises(InvalidCall) as caught:
                method.check((*args[:index], value, *args[index + 1 :]))
            assert str(caught.value).startswith(f"{method.name}: {name} must be {kind.name}, not "), value


def test_the_extension_must_be_plain_all_the_way_down() -> None:
    begin = SERVER_METHODS["tpc_begin"]
    for value in WRONG_EXTENSION:
        with pytest.raises(InvalidCall, match=r"^tpc_begin: extension must be dictionary, not dict$"):
            begin.check((1, b"", b"", value))
    deepest = {"a": nested(limits.NESTING - 2)}
    assert begin.check((1, b"", b"", deepest))[3] == deepest


@every_method
def test_arguments_that_are_no_sequence_are_refused(method: Method) -> None:
    for args in (None, 7, "ab", b"ab", {}, {1, 2}, Instance("x")):
        with pytest.raises(InvalidCall, match=f"^{method.name}: the arguments are no sequence$"):
            method.check(args)


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    with pytest.raises(InvalidCall) as caught:
        SERVER_METHODS["loadBefore"].check((b"x" * 1_000_000, TID))
    assert str(caught.value) == "loadBefore: oid must be oid, not 1000000 bytes"


@unhurried
@given(st.sampled_from(METHODS), plain_values)
def test_any_arguments_are_right_or_refused(method: Method, args: Any) -> None:
    try:
        checked = method.check(args)
    except InvalidCall:
        return
    assert type(checked) is tuple
    assert checked == tuple(args)


# The table --------------------------------------------------------------------------------------------


def test_names_are_unique_and_every_row_says_what_it_does() -> None:
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert 0 <= method.optional <= len(method.args)
        assert method.summary
        names = [name for name, _ in method.args]
        assert len(set(names)) == len(names)


def test_what_comes_before_register() -> None:
    early = [method.name for method in SERVER_METHODS.values() if method.phase is Phase.UNREGISTERED]
    assert early == ["register", "authenticate"]


def test_only_saying_who_is_there_needs_no_access() -> None:
    assert [method.name for method in SERVER_METHODS.values() if method.access is None] == ["authenticate"]


def test_what_changes_the_storage_is_not_open_to_readers() -> None:
    changing = {method.name for method in SERVER_METHODS.values() if method.access is not Access.READ}
    assert changing >= {
        "tpc_begin", "storea", "restorea", "deleteObject", "undoa", "vote", "tpc_finish", "tpc_abort",
        "new_oids", "pack", "checkCurrentSerialInTransaction", "tpc_prepare", "tpc_operate", "outcome",
    }  # fmt: skip
    assert {SERVER_METHODS[name].access for name in ("pack", "pack_cancel", "checkpoint")} == {Access.ADMIN}


def test_signatures() -> None:
    assert SERVER_METHODS["ping"].signature() == "()"
    assert SERVER_METHODS["loadBefore"].signature() == "(oid, tid)"
    assert SERVER_METHODS["history"].signature() == "(oid, [size])"
    assert SERVER_METHODS["undoInfo"].signature() == "([first], [last], [specification])"


# The reference ----------------------------------------------------------------------------------------

#: Methods of a stock server that are not spoken: `new_oid` exists in its list only.
UNSPOKEN = {"new_oid", "sendBlob", "storeBlobStart", "storeBlobChunk", "storeBlobEnd", "storeBlobShared"}
UNHEARD: set[str] = set()


def test_the_methods_are_those_of_a_stock_server() -> None:
    assert set(registered_methods) - set(SERVER_METHODS) <= UNSPOKEN
    assert set(SERVER_METHODS) - set(registered_methods) == {"register", *EXTENSIONS}


def test_an_extension_is_what_no_stock_server_has() -> None:
    assert EXTENSIONS == (
        "tpc_prepare", "tpc_operate", "outcome", "checkpoint", "pack_status", "pack_cancel",
            "blob_token", "blob_load", "loadBeforeMany", "authenticate",
    )  # fmt: skip
    assert not set(EXTENSIONS) & (set(registered_methods) | set(vars(ZEOStorage)))


def test_the_methods_of_a_client_are_those_of_a_stock_client() -> None:
    assert set(StockClientProtocol.client_methods) - set(CLIENT_METHODS) <= UNHEARD
    assert set(CLIENT_METHODS) <= set(StockClientProtocol.client_methods)


@pytest.mark.parametrize("name", sorted(name for name in SERVER_METHODS if name in vars(ZEOStorage)))
def test_as_many_arguments_as_a_stock_server_takes(name: str) -> None:
    method = SERVER_METHODS[name]
    parameters = list(inspect.signature(getattr(ZEOStorage, name)).parameters.values())[1:]
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    assert len(method.args) == len(parameters)
    assert len(method.args) - method.optional <= len(required)


# The documentation ------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
ROW = re.compile(r"^\| `(?P<name>\w+)(?P<signature>\(.*?\))` \|(?: (?P<access>\w+) \|)? (?P<summary>.+) \|$")


def documented(heading: str) -> dict[str, re.Match[str]]:
    """The rows of the table below *heading*."""
    text = PAGE.read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, f"no heading {heading!r} in {PAGE}"
    section = re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]
    rows = [match for line in section.splitlines() if (match := ROW.match(line))]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize(
    ("heading", "table"),
    [("### What a client may call", SERVER_METHODS), ("### What a server may call", CLIENT_METHODS)],
)
def test_the_documented_methods_are_the_spoken_ones(heading: str, table: dict[str, Method]) -> None:
    rows = documented(heading)
    assert list(rows) == list(table)
    for name, method in table.items():
        assert rows[name]["signature"] == method.signature(), name
        assert rows[name]["summary"] == method.summary, name
        if rows[name]["access"] is not None:
            assert rows[name]["access"] == ("none" if method.access is None else method.access.value), name


def test_every_kind_of_argument_is_documented() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for method in METHODS:
        for name, kind in method.args:
            kind_name = kind.name.removesuffix(" or None")
            assert re.search(rf"^\| {kind_name} \|.*`{name}`", text, re.MULTILINE), (kind_name, name)
