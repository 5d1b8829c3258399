"""Z5's pickles: what stock ZEO writes is read, what is written stock ZEO reads, and bombs are duds."""

from __future__ import annotations

import pickle
import pickletools
import time
from collections import OrderedDict
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZEO.asyncio import marshal
from ZODB.POSException import MultipleUndoErrors, POSKeyError, UndoError

from tests.wire.samples import OID, PREFIX_PICKLE, TID, nested, peak_bytes, plain_values, unhurried
from zeoid.errors import UndecodableMessage, UnsendableValue
from zeoid.model import UndoPrefix
from zeoid.wire.pickles import Instance, dumps, loads

PLAIN = (str, bytes, int, float, bool, type(None))
WORST_BYTES = 4_000_000
WORST_S = 2.0


def check_plain(value: Any) -> None:
    """Fail unless *value* is made of what `loads` promises. Without recursion: it may be deep."""
    rest = [value]
    while rest:
        part = rest.pop()
        if type(part) is dict:
            rest += part.keys()
            rest += part.values()
        elif type(part) in (list, tuple, set):
            rest += part
        elif type(part) is Instance:
            rest += (part.args, part.state)
        elif type(part) is not UndoPrefix:
            assert type(part) in PLAIN, type(part)


def without_memo(value: Any, protocol: int) -> bytes:
    """*value* as Python's own pickler writes it without its memo, as messages are written."""
    stream = BytesIO()
    pickler = pickle.Pickler(stream, protocol)
    pickler.fast = True
    pickler.dump(value)
    return stream.getvalue()


# What is read -----------------------------------------------------------------------------------------


@unhurried
@given(plain_values)
def test_reads_what_stock_zeo_writes(value: Any) -> None:
    assert loads(marshal.encoder(b"Z5")(7, 0, "name", value)) == (7, 0, "name", value)


@unhurried
@given(plain_values)
def test_reads_what_it_writes(value: Any) -> None:
    assert loads(dumps(value)) == value


@pytest.mark.parametrize("protocol", [1, 2, 3])
@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 255, 65535, -1, 2**31, -(2**31), 2**63, 2**70, 1.5, "", "text", "\u20ac",
        "\ud800", b"x", b"\xff\x00" * 200, "x" * 300, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1],
        [1, 2], {}, {"a": 1}, {b"a": 1, None: 2, 7: 3, 1.5: 4}, {1, 2}, frozenset({b"x"}),
    ],
    ids=repr,
)  # fmt: skip
def test_reads_plain_values_of_each_protocol(value: Any, protocol: int) -> None:
    assert loads(without_memo(value, protocol)) == value


@pytest.mark.parametrize("protocol", [1, 2, 3])
def test_reads_puts_and_small_gets(protocol: int) -> None:
    value = ["oid", "oid", b"12345678", [b"12345678"]]
    value[3][0] = value[2]  # type: ignore[index]
    assert loads(pickle.dumps(value, protocol)) == value


def test_reads_python_2_strings_as_text_where_they_can_be() -> None:
    assert loads(b"U\x04name.") == "name"
    assert loads(b"U\x02\xff\x00.") == b"\xff\x00"
    assert loads(b"T\x04\x00\x00\x00name.") == "name"


def test_reads_the_prefix_of_zopes_undo_form() -> None:
    specification = loads(b"\x80\x03}X\x09\0\0\0user_name" + PREFIX_PICKLE + b"s.")
    assert list(specification) == ["user_name"]
    prefix = specification["user_name"]
    assert type(prefix) is UndoPrefix
    assert prefix.path == ("", "a", "b")
    assert prefix == "/a/b admin"
    assert prefix == b"/a/b/c admin"
    assert prefix != "/a admin"


def test_an_exception_is_read_as_the_name_of_its_class() -> None:
    error = UndoError("some data were modified by a later transaction", OID)
    assert loads(marshal.encoder(b"Z5")(1, 2, ".reply", error))[3] == Instance(
        "ZODB.POSException.UndoError",
        ("some data were modified by a later transaction", OID),
        {"_reason": "some data were modified by a later transaction", "_oid": OID},
    )
    assert loads(marshal.encoder(b"Z5")(1, 2, ".reply", POSKeyError(OID)))[3] == Instance(
        "ZODB.POSException.POSKeyError", (OID,)
    )
    assert loads(marshal.encoder(b"Z5")(1, 2, ".reply", KeyError("x")))[3] == Instance(
        "builtins.KeyError", ("x",)
    )


def test_undo_errors_inside_of_undo_errors() -> None:
    several = MultipleUndoErrors([(OID, UndoError("no", OID)), (TID, UndoError("neither", TID))])
    name, state = loads(marshal.encoder(b"Z5", True)(1, 2, ".reply", marshal.reduce_exception(several)))[3]
    assert name == "ZODB.POSException.MultipleUndoErrors"
    assert [(oid, error.name, error.state["_reason"]) for oid, error in state["_errs"]] == [
        (OID, "ZODB.POSException.UndoError", "no"),
        (TID, "ZODB.POSException.UndoError", "neither"),
    ]


# What is written --------------------------------------------------------------------------------------


@unhurried
@given(plain_values)
def test_stock_zeo_reads_what_is_written(value: Any) -> None:
    message = (7, 0, "name", value)
    assert marshal.decoder(b"Z5")(dumps(message)) == message
    assert marshal.server_decoder(b"Z5")(dumps(message)) == message


def test_nothing_is_memoized() -> None:
    oid = OID * 2
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(dumps((oid, oid, [oid], {"a": (oid,)})))}
    assert not {name for name in opcodes if "PUT" in name or "GET" in name or "MEMO" in name}


def test_sets_are_written_as_lists_which_a_stock_client_can_read() -> None:
    data = dumps((0, 1, "invalidateTransaction", (TID, {OID}, {"deeper": [frozenset({OID})]})))
    assert marshal.decoder(b"Z5")(data)[3] == (TID, [OID], {"deeper": [[OID]]})


class Text(str):
    """As applications have it: no plain text, though it looks like it."""


@pytest.mark.parametrize(
    "value",
    [
        object(), Text("x"), OrderedDict(), POSKeyError(OID), UndoPrefix(("", "a")),
        Instance("builtins.KeyError"), print, lambda: None, dict, set, frozenset, OSError, ..., 1j,
        bytearray(b"x"), memoryview(b"x"), range(3),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_anything_else_is_refused(value: Any) -> None:
    for wrapped in (value, (1, [value]), {"a": value}, [{1}, value]):
        with pytest.raises(UnsendableValue):
            dumps(wrapped)


def test_a_refusal_says_what_cannot_be_sent() -> None:
    with pytest.raises(UnsendableValue, match=r"^a tests\.wire\.test_pickles\.Text can't be sent$"):
        dumps([Text()])


def test_values_without_end_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (endless, nested(100_000), [{1}, endless], [{1}, nested(100_000)]):
        with pytest.raises(UnsendableValue):
            dumps(value)


# What is refused --------------------------------------------------------------------------------------


@unhurried
@given(st.binary(max_size=400))
def test_any_bytes_are_a_plain_value_or_refused(data: bytes) -> None:
    try:
        value = loads(data)
    except UndecodableMessage:
        return
    check_plain(value)


@unhurried
@given(plain_values, st.data())
def test_a_damaged_pickle_is_a_plain_value_or_refused(value: Any, data: st.DataObject) -> None:
    pickled = bytearray(dumps((7, 0, "name", value)))
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    pickled = pickled[: data.draw(st.integers(0, len(pickled)))]
    try:
        value = loads(bytes(pickled))
    except UndecodableMessage:
        return
    check_plain(value)


@unhurried
@given(st.lists(st.sampled_from(
    [bytes([code]) for code in range(256)]
    + [b"K\x01", b"X\x01\0\0\0a", b"C\x01a", b"q\x00", b"h\x00", b"cZODB.POSException\nUndoError\n",
       b"cZODB.POSException\n_recon\n", b"cbuiltins\nset\n", b"cos\nsystem\n", PREFIX_PICKLE]
), max_size=60))  # fmt: skip
def test_any_opcodes_are_a_plain_value_or_refused(opcodes: list[bytes]) -> None:
    try:
        value = loads(b"".join(opcodes) + b".")
    except UndecodableMessage:
        return
    check_plain(value)


NAMES = [
    "os system", "posix system", "builtins eval", "builtins exec", "builtins getattr",
    "builtins __import__", "builtins object", "builtins bytearray", "builtins BaseException",
    "builtins SystemExit", "subprocess Popen", "zodbpickle binary", "copyreg _reconstructor",
    "copy_reg _reconstructor", "pickle loads", "ZODB.POSException POSError",
    "ZODB.POSException ConflictError.__init__", "ZODB.utils os", "ZopeUndo.Prefix os", "ZopeUndo Prefix",
    " ", "os",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_other_name_may_stand_in_a_pickle(name: str) -> None:
    module, _, attribute = name.encode().partition(b" ")
    for use in (b"", b"(X\x02\0\0\0idtR", b")\x81", b")\x81}b", b"0N"):
        with pytest.raises(UndecodableMessage, match="may not name"):
            loads(b"\x80\x03c" + module + b"\n" + attribute + b"\n" + use + b".")


class Evil:
    """Runs code where a pickle of it is read by Python's own unpickler."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1/0",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_runs(protocol: int) -> None:
    with pytest.raises(ZeroDivisionError):
        pickle.loads(pickle.dumps(Evil(), protocol))
    with pytest.raises(UndecodableMessage):
        loads(pickle.dumps(Evil(), protocol))


@pytest.mark.parametrize(
    "code", [code.name for code in pickletools.opcodes if code.name in {
        "PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "STACK_GLOBAL", "DUP",
        "MEMOIZE", "EMPTY_SET", "ADDITEMS", "FROZENSET", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER",
        "STRING", "UNICODE", "FLOAT", "POP_MARK",
    }],
)  # fmt: skip
def test_opcodes_that_no_message_has_are_refused(code: str) -> None:
    (opcode,) = (opcode.code for opcode in pickletools.opcodes if opcode.name == code)
    with pytest.raises(UndecodableMessage):
        loads(b"\x80\x03N" + opcode.encode("latin1") + b".")


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"N", b"(.", b"NN.", b"(N.", b"0.", b"\x80", b"\x80\x05N.", b"K", b"X\x05\0\0\0abc.",
        b"\x85.", b"(\x85.", b"}K\x01s.", b"}(K\x01u.", b"(K\x01d.", b"K\x01K\x02a.", b"N(a.", b"](N.",
        b"h\x00.", b"q\x00.", b"(q\x00.", b"p", b"pxyz\n.", b"gxyz\n.", b"Ix\n.", b"I\n.",
        b"X\x01\0\0\0\xff.", b"NR.", b"N)R.", b"N}b.", b"cbuiltins\nset\n)R.", b"cbuiltins\nset\nN\x85R.",
        b"cbuiltins\nset\n]]a\x85R.", b"cZODB.POSException\n_recon\n)R.",
        b"cZODB.POSException\n_recon\nN}\x86R.",
        b"cZODB.POSException\n_recon\ncZODB.POSException\nUndoError\nN\x86R.", b"c_codecs\nencode\n)R.",
        b"c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0utf-8\x86R.",
        b"c_codecs\nencode\nX\x03\0\0\0\xe2\x82\xacX\x06\0\0\0latin1\x86R.",
        b"cZODB.POSException\nUndoError\n)\x81Nb.", b"cZODB.POSException\nUndoError\n)\x81}K\x01K\x01sb.",
        b"cZopeUndo.Prefix\nPrefix\n)\x81}b.",
        b"cZopeUndo.Prefix\nPrefix\n)\x81}X\x04\0\0\0path]K\x01asb.", b"cZODB.POSException\nUndoError",
        b"cZODB.POSException\nUndoError\n.", b"cZODB.POSException\nUndoError\n\x85.",
        b"NcZODB.POSException\nUndoError\n0.",
    ],
    ids=repr,
)  # fmt: skip
def test_broken_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(UndecodableMessage):
        loads(data)


def test_a_class_is_never_a_value() -> None:
    name = b"cZODB.POSException\nUndoError\n"
    for data in (
        name + b"q\x00h\x00\x86.",
        name + name + b"\x85R.",
        b"]" + name + b"a.",
        name + b")R" + name + b"\x86.",
    ):
        with pytest.raises(UndecodableMessage, match="class as one"):
            loads(data)
    assert loads(name + b"q\x00)Rh\x00)R\x86.") == (Instance("ZODB.POSException.UndoError"),) * 2


def colliding_keys(count: int) -> bytes:
    modulus = 2**61 - 1  # integers that differ by a multiple of it have the same hash
    keys = ((modulus * i).to_bytes(16, "little") for i in range(1, count + 1))
    return b"}(" + b"".join(b"\x8a\x10" + key + b"N" for key in keys) + b"u."


def doubled(first: bytes, step: bytes, depth: int) -> bytes:
    """A structure that refers to itself twice, *depth* levels deep: 2 to the power of *depth* leaves."""
    return first + b"q\x00" + b"".join(b"0" + step + b"q\x00" for _ in range(depth)) + b"."


BOMBS = {
    "BINBYTES": b"B\xff\xff\xff\xff.",
    "BINBYTES8": b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff.",
    "BINBYTES8, signed": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "BINBYTES8, a gigabyte": b"\x8e\0\0\0\x40\0\0\0\0.",
    "BINUNICODE": b"X\xff\xff\xff\xffx.",
    "BINUNICODE8": b"\x8d\0\0\0\0\0\0\0\x40x.",
    "BINSTRING": b"T\xff\xff\xff\x7fx.",
    "LONG4": b"\x8b\xff\xff\xff\x7f.",
    "LONG4, a megabyte": b"\x8b\x40\x42\x0f\x00" + b"\x7f" * 1_000_000 + b".",
    "LONG, digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "INT, digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "BYTEARRAY8": b"\x96\0\0\0\x40\0\0\0\0.",
    "nested tuples as a key": b"}N" + b"\x85" * 20_000 + b"Ns.",
    "nested tuples as keys": b"}" + b"N\x85\x85\x85Ns" * 10_000 + b".",
    "a pair of numbers as a key": b"}K\x01K\x02\x86Ns.",
    "colliding keys": colliding_keys(30_000),
    "shared tuples": doubled(b"N", b"h\x00h\x00\x86", 60),
    "shared lists": doubled(b"N", b"](h\x00h\x00e", 60),
    "shared dictionaries": doubled(b"N", b"}(K\x01h\x00K\x02h\x00u", 60),
    "shared exceptions": doubled(b"N", b"cZODB.POSException\nUndoError\nh\x00h\x00\x86R", 60),
    "shared set": b"(cbuiltins\nset\n](" + b"".join(b"M" + bytes([i & 255, i >> 8]) for i in range(1000))
        + b"e\x85Rq\x00" + b"h\x00" * 1000 + b"t.",
    "shared bytes": b"(B\x40\x42\x0f\x00" + b"x" * 1_000_000 + b"q\x00" + b"h\x00" * 100_000 + b"t.",
    "a list in itself": b"]q\x00h\x00a.",
    "an exception in itself": b"cZODB.POSException\nUndoError\n)Rq\x00}X\x01\0\0\0ah\x00sb.",
    "marks": b"(" * 100_000 + b".",
    "lists without an end": b"]" * 20_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_time_and_memory(name: str) -> None:
    bomb = BOMBS[name]
    start = time.process_time()
    with pytest.raises(UndecodableMessage):
        loads(bomb)
    assert time.process_time() - start < WORST_S
    assert peak_bytes(lambda: loads(bomb)) < WORST_BYTES


@pytest.mark.parametrize(
    "pickled",
    [b"Nr\xff\xff\xff\xff.", b"Np9999999999999999999\n.", b"Np-1\n.", b"\x95" + b"\xff" * 8 + b"N."],
    ids=["memo index", "memo index as text", "negative memo index", "length of a frame"],
)
def test_numbers_that_make_another_unpickler_allocate_mean_nothing(pickled: bytes) -> None:
    assert loads(pickled) is None
    assert peak_bytes(lambda: loads(pickled)) < 10_000


def test_deep_nesting_takes_time_and_memory_like_any_other_pickle() -> None:
    # How deep a message may be is for the codec to say: here it only must not recurse.
    for bomb in (b"N" + b"\x85" * 100_000 + b".", b"]" * 100_000 + b"a" * 99_999 + b"."):
        start = time.process_time()
        value = loads(bomb)
        check_plain(value)
        assert time.process_time() - start < WORST_S


@pytest.mark.parametrize("opcode", [b"}", b"]", b"N", b"K\x01", b"(t", b"h\x00)\x81"], ids=repr)
def test_memory_is_proportional_to_the_length(opcode: bytes) -> None:
    def peak(count: int) -> int:
        data = b"(cZODB.POSException\nUndoError\nq\x00)\x81" + opcode * count + b"t."
        return peak_bytes(lambda: loads(data))

    assert peak(20_000) < 120 * 20_000 * len(opcode)
    assert peak(40_000) < 2.5 * peak(20_000)


class _Extension(dict[str, str]):
    """As ZODB hands out a transaction's extension that it read from a storage: a dictionary when pickled."""

    def __reduce__(self) -> tuple[type, tuple[tuple[tuple[str, str], ...]]]:
        return dict, (tuple(self.items()),)


def test_a_dictionary_that_is_made_of_pairs() -> None:
    data = pickle.dumps({"extension": _Extension(why="because"), "none": dict}, 3)
    with pytest.raises(UndecodableMessage):
        loads(data)  # the class itself is no value
    assert loads(pickle.dumps([_Extension(why="because"), _Extension()], 3)) == [
        {"why": "because"},
        {},
    ]


@pytest.mark.parametrize(
    "pairs", [b"K\x01", b"]K\x01a", b"]K\x01K\x02K\x03\x87a", b"]](K\x01K\x02tK\x03\x86a"]
)
def test_a_dictionary_that_is_made_of_something_else(pairs: bytes) -> None:
    with pytest.raises(UndecodableMessage):
        loads(b"\x80\x03cbuiltins\ndict\n" + pairs + b"\x85R.")
