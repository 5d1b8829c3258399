"""What the tests of the wire share: made-up messages, hand-written pickles, and how much memory a call takes.

Must not know how any module of `zeoid.wire` works inside.
"""

from __future__ import annotations

import contextlib
import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: The machine may be busy with other things; what must be fast has a bound of its own in its test.
unhurried = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

OID = b"\0\0\0\0\0\0\0\x2a"
TID = b"\x03\xfb\xb5\x4d\x80\x31\x22\x99"
LATER_TID = b"\x03\xfb\xb5\x4d\x80\x31\x22\xaa"

#: A `ZopeUndo.Prefix.Prefix("/a/b")`, as Zope's undo form sends it. The package itself is not needed.
PREFIX_PICKLE = (
    b"cZopeUndo.Prefix\nPrefix\n)\x81"
    b"}(X\x06\0\0\0lengthK\x03X\x04\0\0\0path](X\0\0\0\0X\x01\0\0\0aX\x01\0\0\0beub"
)

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=40)
    | _texts
)


def _containers(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = _texts | st.binary(max_size=8)
    return st.lists(parts, max_size=6).map(tuple) | st.dictionaries(keys, parts, max_size=6)


#: Values that both codings carry, and give back as they are: with tuples, without lists.
plain_values: st.SearchStrategy[Any] = st.recursive(_scalars, _containers, max_leaves=20)

message_ids: st.SearchStrategy[Any] = st.integers(-1, 2**63) | st.tuples(
    st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8)
)
names = st.sampled_from([".reply", "loadBefore", "storea", "x", ""])
messages: st.SearchStrategy[tuple[Any, int, str, Any]] = st.tuples(
    message_ids, st.sampled_from([0, 1, 2]), names, plain_values
)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that *call* held at once, beyond what there was before; its error is swallowed."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        with contextlib.suppress(Exception):
            call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def cut(data: bytes, points: list[int]) -> list[bytes]:
    """*data* in pieces, cut at *points* (taken modulo its length)."""
    edges = sorted({0, len(data), *(point % (len(data) + 1) for point in points)})
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


def nested(depth: int) -> tuple[Any, ...]:
    """An empty tuple in a tuple in a tuple …, *depth* of them."""
    value: tuple[Any, ...] = ()
    for _ in range(depth - 1):
        value = (value,)
    return value
