"""Journals against history: every revision that was read must be the one that was there.

Owns the reading of both. History is read by a client without a cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import zeoid
from tests.torture_cache.worker import OBJECTS, STORAGE, oid
from zeoid.model import MAX_TID

#: Of one kind of problem, so many are told.
EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Read:
    oid: bytes
    before: bytes
    check: int
    start: bytes
    end: bytes | None


@dataclass(slots=True)
class Totals:
    """What the journals tell besides."""

    reads: int = 0
    hits: int = 0
    evicted: int = 0
    revisions: int = 0


#: By oid: (start, check), oldest first.
History = dict[bytes, list[tuple[bytes, int]]]


def history(address: str) -> History:
    storage: Any = zeoid.ClientStorage(address, STORAGE, cache_size_bytes=0)
    try:
        return {oid(number): list(revisions(storage, oid(number)))[::-1] for number in range(OBJECTS)}
    finally:
        storage.close()


def revisions(storage: Any, oid: bytes) -> Iterator[tuple[bytes, int]]:
    """From the newest one back."""
    before: bytes = MAX_TID
    while (revision := storage.loadBefore(oid, before)) is not None:
        data, before, _ = revision
        yield before, crc32(data)


def lines(paths: Iterable[Path]) -> Iterator[list[str]]:
    for path in paths:
        whole = path.read_text()
        # The last line of a process that was killed may be cut off.
        yield from (line.split() for line in whole[: whole.rfind("\n") + 1].splitlines())


def reads(paths: Iterable[Path], totals: Totals) -> Iterator[Read]:
    for path in paths:
        hits = 0
        for kind, *words in lines([path]):
            if kind == "found":
                hits = int(words[0])
                totals.evicted = max(totals.evicted, int(words[1]))
                continue
            totals.reads += 1
            oid, before, check, start, end = words
            yield Read(
                bytes.fromhex(oid), bytes.fromhex(before), int(check), bytes.fromhex(start),
                None if end == "-" else bytes.fromhex(end),
            )  # fmt: skip
        totals.hits += hits


def problem(read: Read, known: History) -> str | None:
    """What is wrong with what was read."""
    chain = known[read.oid]
    place = bisect_left(chain, (read.before, 0)) - 1
    if place < 0:
        return "there was nothing"
    start, check = chain[place]
    if start != read.start:
        return f"there was the revision {start.hex()}"
    if check != read.check:
        return "its data was another"
    end = chain[place + 1][0] if place + 1 < len(chain) else None
    if read.end not in (None, end):
        return f"it ended at {end.hex() if end else '-'}"
    return None


def problems(paths: Iterable[Path], known: History, totals: Totals) -> list[str]:
    totals.revisions = sum(map(len, known.values()))
    found: list[str] = []
    count = 0
    for read in reads(paths, totals):
        wrong = problem(read, known)
        if wrong is not None:
            count += 1
            if count <= EXAMPLES:
                ended = read.end.hex() if read.end else "-"
                found.append(
                    f"of {read.oid.hex()} before {read.before.hex()} the revision {read.start.hex()} to "
                    f"{ended} was read: {wrong}"
                )
    return [*found, f"{count} reads are wrong"] if count else []
