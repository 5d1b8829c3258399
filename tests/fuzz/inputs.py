"""Makes inputs from a seed: the same seed and number give the same bytes on any machine.

Owns what is worth trying: noise, damaged messages, and programs of the opcodes of both codings. Must not know
what is done with an input.
"""

from __future__ import annotations

import pickle
import pickletools
import random
from collections.abc import Callable
from io import BytesIO
from typing import Any

import msgpack

MOST_BYTES = 256 * 1024

_OID = b"\0\0\0\0\0\0\0\x2a"
_TID = b"\x03\xfb\xb5\x4d\x80\x31\x22\x99"
_PREFIX = b"cZopeUndo.Prefix\nPrefix\n)\x81}(X\x06\0\0\0lengthK\x01X\x04\0\0\0path]X\0\0\0\0aub"

_ARGS: dict[str, tuple[Any, ...]] = {
    "register": ("1", False),
    "get_info": (),
    "lastTransaction": (),
    "getInvalidations": (_TID,),
    "loadBefore": (_OID, _TID),
    "loadBeforeMany": ([_OID, _TID], _TID),
    "history": (_OID, 3),
    "undoInfo": (0, -20, {"user_name": "x"}),
    "iterator_start": (None, _TID),
    "iterator_gc": ([1, 2],),
    "new_oids": (100,),
    "tpc_begin": (7, b"user", b"description", {"a": [1, {"b": 2.5}]}, None, " "),
    "storea": (_OID, _TID, b"cpersistent.mapping\nPersistentMapping\n." * 5, 7),
    "restorea": (_OID, _TID, None, _TID, 7),
    "undoa": (b"A/u1TYAxIpk=", 7),
    "vote": (7,),
    "pack": (1700000000.5, True),
    "set_client_label": ("label",),
    "invalidateTransaction": (_TID, [_OID, _TID]),
    "info": ({"length": 7, "size": 1000},),
}
_REPLIES: tuple[Any, ...] = (
    None,
    _TID,
    (b"data" * 20, _TID, None),
    [_OID, _TID],
    [(b"data" * 20, _TID, None), None, (b"", _OID, _TID)],
    [{"oid": _OID, "serials": (_TID, _TID), "data": b"x"}],
    ("ZODB.POSException.POSKeyError", (_OID,)),
    ("ZODB.POSException.ConflictError", {"message": "", "oid": _OID, "serials": (_TID, _TID)}),
    ("ZODB.POSException.MultipleUndoErrors", {"_errs": [(_OID, "no")]}),
    ("ZODB.POSException.BTreesConflictError", {"p1": 1, "p2": 2, "p3": 3, "reason": 4}),
    ("builtins.KeyError", ("x",)),
)
_NAMES = (*_ARGS, ".reply", ".reply", ".reply", "nothing")
_IDS: tuple[Any, ...] = (0, 1, 2, 3, 4, 5, -1, 2**63, (_OID, _TID))

_GLOBALS = (
    b"ZODB.POSException\nUndoError", b"ZODB.POSException\nConflictError", b"ZODB.POSException\n_recon",
    b"builtins\nset", b"__builtin__\nfrozenset", b"_codecs\nencode", b"ZopeUndo.Prefix\nPrefix",
    b"builtins\nKeyError", b"os\nsystem", b"builtins\neval", b"copyreg\n_reconstructor",
)  # fmt: skip
_LENGTHS = (0, 1, 2, 7, 8, 9, 127, 128, 255, 256, 65535, 65536, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
_BYTES = (
    b"\x00\x01\x7f\x80\x81\x85\x87\x8a\x8b\x8d\x8e\x90\x95\xa0\xc0\xc1\xc6\xc7\xd4\xdb\xdd\xdf\xff"
    b"().]}0NRbcehjlpqrstu"
)
_PICKLE_CODES = tuple(opcode.code.encode("latin1") for opcode in pickletools.opcodes)

Rng = random.Random


def _without_memo(value: Any) -> bytes:
    stream = BytesIO()
    pickler = pickle.Pickler(stream, 3)
    pickler.fast = True
    pickler.dump(value)
    return stream.getvalue()


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


_CODINGS: tuple[Callable[[Any], bytes], ...] = (_without_memo, _packed)


def message(rng: Rng) -> tuple[Any, int, str, Any]:
    """A message as peers send them."""
    name = rng.choice(_NAMES)
    args = rng.choice(_REPLIES) if name == ".reply" else _ARGS.get(name, ())
    return rng.choice(_IDS), rng.choice((0, 0, 1, 2)), name, args


def value(rng: Rng, depth: int = 4) -> Any:
    """Any plain value that both codings carry."""
    kind = rng.randrange(11 if depth else 7)
    if kind == 0:
        return rng.choice((None, True, False, float("nan"), float("inf"), "", b""))
    if kind == 1:
        return rng.choice((0, 1, -1, 2**31, 2**63, -(2**63), rng.getrandbits(64)))
    if kind == 2:
        return rng.random() * 10 ** rng.randint(-9, 9)
    if kind in (3, 4):
        return rng.randbytes(rng.choice((0, 1, 7, 8, 8, 9, 40)))
    if kind in (5, 6):
        return rng.choice(("", "x", "p", "\u20ac", "_errs", "message", "1", "x" * 70))
    parts = [value(rng, depth - 1) for _ in range(rng.randrange(5))]
    if kind in (7, 8):
        return tuple(parts)
    if kind == 9:
        return parts
    return {rng.choice(("a", b"b", "_errs", "_reason", "oid", "serials", "message")): part for part in parts}


def _pickle_opcode(rng: Rng) -> bytes:
    kind = rng.randrange(16)
    if kind < 8:
        return rng.choice(_PICKLE_CODES)
    if kind < 10:
        return b"K" + bytes([rng.randrange(256)])
    if kind == 10:
        return rng.choice((b"q", b"h")) + bytes([rng.randrange(3)])
    if kind == 11:
        return b"X\x01\0\0\0a"
    if kind == 12:
        return b"c" + rng.choice(_GLOBALS) + b"\n"
    if kind == 13:
        return b"c" + rng.choice(_GLOBALS[:7]) + b"\n)" + rng.choice((b"R", b"\x81", b"\x81}b"))
    if kind == 14:
        return rng.choice((_PREFIX, _without_memo(value(rng, 2))[2:-1]))
    code = rng.choice((b"B", b"X", b"T", b"\x8b", b"\x8e", b"\x8d", b"r", b"j", b"\x95", b"\x8a", b"C", b"U"))
    return code + _length(rng) + rng.randbytes(rng.randrange(6))


def pickle_program(rng: Rng) -> bytes:
    """Opcodes that may or may not make sense together; more often than not the args of a message."""
    program = b"".join(_pickle_opcode(rng) for _ in range(rng.randrange(1, 40)))
    if rng.random() < 0.7:
        return b"\x80\x03(K\x01K\x02X\x06\0\0\0.reply(" + program + b"tt."
    return program + b"."


def _msgpack_item(rng: Rng) -> bytes:
    kind = rng.randrange(6)
    if kind < 3:
        return bytes([rng.randrange(256)])
    if kind == 3:
        return bytes([rng.randrange(0xC0, 0xE0)]) + _length(rng)
    if kind == 4:
        return bytes([rng.choice((0x91, 0x92, 0x81, 0x94, 0xA1, 0xD6))]) + rng.randbytes(rng.randrange(3))
    return _packed(value(rng, 2))


def msgpack_program(rng: Rng) -> bytes:
    """Headers and items that may or may not fit together; more often than not the args of a message."""
    program = b"".join(_msgpack_item(rng) for _ in range(rng.randrange(1, 40)))
    return (b"\x94\x01\x02\xa6.reply" if rng.random() < 0.7 else b"") + program


def _length(rng: Rng) -> bytes:
    length = rng.choice(_LENGTHS) + rng.choice((0, 0, 0, -1, 1))
    return (length & 0xFFFFFFFF).to_bytes(4, rng.choice(("big", "little")))


def damaged(rng: Rng, data: bytes) -> bytes:
    """*data* with a few changes of the kinds that break parsers."""
    for _ in range(rng.randint(1, 4)):
        start, stop = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        kind = rng.randrange(8)
        if kind == 0 and data:
            position = rng.randrange(len(data))
            data = data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]
        elif kind == 1:
            data = data[:start] + bytes([rng.choice(_BYTES)]) + data[start + 1 :]
        elif kind == 2:
            data = data[:start] + _length(rng) + data[start + rng.choice((0, 1, 2, 4, 8)) :]
        elif kind == 3:
            data = data[:start] + data[stop:]
        elif kind == 4:
            data = data[:stop] + data[start:]
        elif kind == 5:
            data = data[:start] + rng.randbytes(rng.randrange(9)) + data[start:]
        elif kind == 6:
            part = data[start : start + rng.randrange(1, 9)]
            most = MOST_BYTES if rng.random() < 0.05 else 2000
            data = data[:start] + part * (rng.randrange(most) // max(1, len(part))) + data[start:]
        else:
            data = data[:start] + rng.choice(_CODINGS)(message(rng))[rng.randrange(4) :] + data[stop:]
    return data


def payload(rng: Rng) -> bytes:
    """What stands in a frame: a message, something like one, or noise."""
    kind = rng.randrange(10)
    if kind < 2:
        return rng.choice(_CODINGS)(message(rng))
    if kind < 5:
        return damaged(rng, rng.choice(_CODINGS)(message(rng)))
    if kind == 5:
        args = value(rng)
        return rng.choice(_CODINGS)((rng.choice(_IDS), rng.choice((0, 1, 2)), rng.choice(_NAMES), args))
    if kind < 8:
        program = pickle_program(rng) if kind == 6 else msgpack_program(rng)
        return damaged(rng, program) if rng.random() < 0.2 else program
    if kind == 8:
        return rng.choice((b"ruok", b"M5", b"Z5", b"M4", b"", b"Z5" * 50))
    return rng.randbytes(rng.randrange(200))


def stream(rng: Rng) -> bytes:
    """Frames as a peer writes them: often a right handshake first, then messages of one coding."""
    coding = rng.randrange(2)
    frames = [] if rng.random() < 0.1 else [(b"Z5", b"M5")[coding]]
    for _ in range(rng.randrange(8)):
        frames.append(_CODINGS[coding](message(rng)) if rng.random() < 0.6 else payload(rng))
    data = b"".join(len(part).to_bytes(4, "big") + part for part in frames)
    return damaged(rng, data) if rng.random() < 0.3 else data


def make(seed: int, number: int) -> bytes:
    """Input *number* of *seed*."""
    rng = random.Random(seed << 64 | number)
    made = stream(rng) if rng.random() < 0.5 else payload(rng)
    return made[:MOST_BYTES]
