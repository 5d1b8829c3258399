"""The databases that the benchmarks work on: written with FileStorage, checked by reading the file.

Owns what is in a database. Must not know who serves it.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileIterator, FileStorage
from ZODB.utils import p64, u64, z64

OBJECTS_A_TRANSACTION = 1000


@dataclass(frozen=True)
class Database:
    """Objects of one size; the bytes of each are random, and the same in every run."""

    path: Path
    oids: list[bytes]
    size_bytes: int

    def record(self, oid: bytes) -> bytes:
        return random.Random(oid).randbytes(self.size_bytes)

    def shuffled_oids(self) -> list[bytes]:
        """In an order that is not the file's, and the same in every run."""
        return random.Random(self.size_bytes).sample(self.oids, len(self.oids))

    def check(self, storage: Any, oids: list[bytes], before: bytes) -> None:
        """A storage must give back the very bytes that were put in."""
        for oid in oids:
            loaded = storage.loadBefore(oid, before)
            if loaded is None or loaded[0] != self.record(oid):
                raise ValueError(f"the storage gave a wrong record for oid {u64(oid):#x}")


def create(
    folder: Path, objects: int, size_bytes: int, objects_a_transaction: int = OBJECTS_A_TRANSACTION
) -> Database:
    """A new Data.fs with so many objects."""
    database = Database(folder / "Data.fs", [p64(number) for number in range(1, objects + 1)], size_bytes)
    storage = FileStorage(str(database.path), create=True)
    try:
        for start in range(0, objects, objects_a_transaction):
            transaction = TransactionMetaData()
            storage.tpc_begin(transaction)
            for oid in database.oids[start : start + objects_a_transaction]:
                storage.store(oid, z64, database.record(oid), "", transaction)
            storage.tpc_vote(transaction)
            storage.tpc_finish(transaction)
        storage.set_max_oid(p64(objects))
    finally:
        storage.close()
    return database


def now(storage: Any) -> bytes:
    """The tid to load before in order to get what is current: as a ZODB connection does it."""
    before: bytes = p64(u64(storage.lastTransaction()) + 1)
    return before


def commit(storage: Any, oid: bytes, serial: bytes, data: bytes) -> bytes:
    """One transaction that stores one object; its tid, once the storage says that it is committed."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(oid, serial, data, "", transaction)
    storage.tpc_vote(transaction)
    tid: bytes = storage.tpc_finish(transaction)
    return tid


def count_transactions(path: Path) -> int:
    """How many transactions a Data.fs holds that nobody has open."""
    iterator = FileIterator(str(path))
    try:
        return sum(1 for _ in iterator)
    finally:
        iterator.close()
