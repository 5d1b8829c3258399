"""How a target cuts an input: the same data is always cut at the same points."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator


def pieces(data: bytes) -> list[bytes]:
    """*data*, cut as a network may cut it."""
    rng = random.Random(zlib.crc32(data))
    found, start = [], 0
    while start < len(data):
        stop = start + rng.choice((1, 2, 3, 4, 5, 10, 100, 1000, 100_000))
        found.append(data[start:stop])
        start = stop
    return found


def chunks(data: bytes, head: int) -> Iterator[tuple[bytes, bytes]]:
    """Of data that is a program: *head* bytes, one with a length, so many bytes; again and again."""
    start = 0
    while start + head < len(data):
        body = start + head + 1
        stop = body + data[body - 1]
        yield data[start : start + head], data[body:stop]
        start = stop
