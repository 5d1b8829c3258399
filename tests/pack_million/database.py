"""A data file with very many objects, of which a third is garbage and old revisions, and what stays of it.

Owns what is in the file. Must not know who packs it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.database import now
from bench.works.pack import record
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64, z64

DATA_HEADER_BYTES = 42  # of a record in a data file
STATE_BYTES = 300
BRANCH = 500  # objects below one, and in one transaction
#: The number of the object that is committed during the pack; 0 is the root, the branches come after it.
COUNTER = 1
SAMPLE = 500


def is_garbage(number: int) -> bool:
    """A fifth of the leaves; with the old revisions of another quarter they are a third of the file."""
    return number % 5 == 0


def is_overwritten(number: int) -> bool:
    return number % 5 == 1 or number % 20 == 2


def leaf(number: int, revision: int) -> bytes:
    return record(random.Random(2 * number + revision).randbytes(STATE_BYTES))


@dataclass(frozen=True)
class Made:
    """What is in the file."""

    objects: int
    first_leaf: int
    live: int
    size_bytes: int
    removable_bytes: int


def create(path: Path, objects: int) -> Made:
    """A new Data.fs with exactly so many objects. Holds no more of it in memory than one transaction."""
    branches = range(COUNTER + 1, COUNTER + 1 + objects // BRANCH)
    first_leaf = branches.stop
    leaves = range(first_leaf, objects)
    storage = FileStorage(str(path), create=True)

    def write(records: dict[int, bytes], serial: bytes = z64) -> bytes:
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for number, data in records.items():
            storage.store(p64(number), serial, data, "", transaction)
        storage.tpc_vote(transaction)
        tid: bytes = storage.tpc_finish(transaction)
        return tid

    removable_bytes = 0
    live = objects
    try:
        write({0: record(b"root", *map(p64, [COUNTER, *branches])), COUNTER: record(b"0")})
        for index, branch in enumerate(branches):
            below = leaves[len(leaves) * index // len(branches) : len(leaves) * (index + 1) // len(branches)]
            records = {number: leaf(number, 0) for number in below}
            kept = [number for number in below if not is_garbage(number)]
            tid = write({branch: record(b"branch", *map(p64, kept)), **records})
            again = {number: leaf(number, 1) for number in kept if is_overwritten(number)}
            write(again, tid)
            live -= len(below) - len(kept)
            removable_bytes += sum(
                len(data) + DATA_HEADER_BYTES
                for number, data in records.items()
                if is_garbage(number) or number in again
            )
        storage.set_max_oid(p64(objects))
    finally:
        storage.close()
    return Made(objects, first_leaf, live, path.stat().st_size, removable_bytes)


def check(storage: Any, made: Made) -> Iterator[str]:
    """What is wrong with the storage after the pack: by samples, the same in every run."""
    count = len(storage)
    if count != made.live:
        yield f"{count:,} objects are left, not {made.live:,}"
    for number in random.Random(1).sample(range(made.first_leaf, made.objects), SAMPLE):
        try:
            loaded = storage.loadBefore(p64(number), now(storage))
        except POSKeyError:
            loaded = None
        expected = None if is_garbage(number) else leaf(number, int(is_overwritten(number)))
        if (loaded and loaded[0]) != expected:
            what = "is gone or wrong" if expected else "is garbage, and still there"
            yield f"object {number} {what}"
