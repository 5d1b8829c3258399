"""Databases with all that a transaction can have, and what is in a storage, read by ZODB alone."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transaction
import ZODB
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob, is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.serialize import referencesf
from ZODB.utils import p64

BLOB_BYTES = 3_000_000
HEADER_BYTES = 23
"""Of a transaction in a data file: tid, length, status, and the lengths of three texts."""


class Site:
    """A data file, with blobs beside it, that is written through a `ZODB.DB`."""

    def __init__(self, folder: Path, name: str = "site", *, blobs: bool = True) -> None:
        self.path = folder / f"{name}.fs"
        self.blobs = folder / f"{name}-blobs"
        self.storage = FileStorage(str(self.path), blob_dir=str(self.blobs) if blobs else None)
        self.db = ZODB.DB(self.storage)
        self.manager = transaction.TransactionManager()
        self.root = self.db.open(self.manager).root()

    def commit(self, **root: Any) -> bytes:
        """Set these in the root, in one transaction with a user, a description and an extension."""
        self.root.update(root)
        t = self.manager.get()
        t.setUser("jürgen", "/acl_users")
        t.note(f"sets {', '.join(root)} — ☃")
        t.setExtendedInfo("request", {"path": "/a", "size": 1})
        self.manager.commit()
        tid: bytes = self.storage.lastTransaction()
        return tid

    def blob(self, data: bytes) -> Blob:
        return Blob(data)

    def undo_last(self) -> bytes:
        self.db.undo(self.db.undoInfo()[0]["id"], self.manager.get())
        self.manager.commit()
        tid: bytes = self.storage.lastTransaction()
        return tid

    def delete(self, oid: bytes) -> None:
        meta = TransactionMetaData(b"collector", b"a collector of garbage deletes it")
        self.storage.tpc_begin(meta)
        self.storage.deleteObject(oid, self.storage.getTid(oid), meta)
        self.storage.tpc_vote(meta)
        self.storage.tpc_finish(meta)

    def close(self) -> None:
        self.manager.abort()
        self.db.close()


def write_history(site: Site) -> None:
    """What a pack leaves, changes and a creation that are undone, an object that is deleted, blobs."""
    for number in range(5):
        site.commit(counter=number, page=PersistentMapping({"text": f"page {number}"}))
    site.storage.pack(time.time(), referencesf)
    site.commit(counter=100)
    site.undo_last()
    site.undo_last()  # the undo is undone
    site.commit(kept=PersistentMapping({"large": "x" * 100_000}))
    site.undo_last()  # of a creation
    doomed = PersistentMapping({"doomed": True})
    site.commit(doomed=doomed)
    oid = doomed._p_oid
    site.commit(doomed=None)
    site.delete(oid)
    if site.storage.blob_dir:
        site.commit(blob=site.blob(b"small"), large=site.blob(b"\xff" * BLOB_BYTES))
        with site.root["blob"].open("w") as file:
            file.write(b"changed")
        site.commit(changed=True)
        site.undo_last()
    site.commit(last=PersistentMapping())


def write_pages(site: Site, count: int) -> list[bytes]:
    """So many transactions of a few small objects each; their tids."""
    return [
        site.commit(**{f"page{number}": PersistentMapping({"text": f"page {number}" * 20})})
        for number in range(count)
    ]


def contents(storage: Any) -> list[Any]:
    """All that is in a storage, with a digest for each record and each blob."""
    return [
        (
            of.tid.hex(), of.status, of.user, of.description, of.extension,
            {record.oid.hex(): (_digest(record.data), _blob_digest(storage, record)) for record in of},
        )
        for of in storage.iterator()
    ]  # fmt: skip


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _blob_digest(storage: Any, record: Any) -> str | None:
    if not is_blob_record(record.data) or not hasattr(storage, "loadBlob"):
        return None
    return hashlib.sha256(Path(storage.loadBlob(record.oid, record.tid)).read_bytes()).hexdigest()


def contents_of_file(path: Path, blobs: Path | None = None) -> list[Any]:
    storage = FileStorage(str(path), read_only=True, blob_dir=None if blobs is None else str(blobs))
    try:
        return contents(storage)
    finally:
        storage.close()


# Damage -----------------------------------------------------------------------------------------------


def positions(path: Path) -> list[int]:
    """Where in the file each transaction begins."""
    storage = FileStorage(str(path), read_only=True)
    found = [of._tpos for of in storage.iterator()]
    storage.close()
    return found


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


DAMAGES: dict[str, Callable[[int, int], tuple[int, bytes]]] = {
    # What is written, and where, into a transaction that begins and ends there.
    "zeros over the header": lambda begin, end: (begin, bytes(HEADER_BYTES)),
    "rubbish over the header": lambda begin, end: (begin + 8, b"\xaa" * 15),
    "a length that is too large": lambda begin, end: (begin + 8, p64(1 << 40)),
    "a length that is wrong": lambda begin, end: (begin + 8, p64(end - begin - 9)),
    "the second length is wrong": lambda begin, end: (end - 8, p64(17)),
    "an invalid status": lambda begin, end: (begin + 16, b"x"),
    "a tid that is not later": lambda begin, end: (begin, p64(1)),
    "zeros over the first record": lambda begin, end: (begin + HEADER_BYTES + 80, bytes(120)),
    "rubbish over everything": lambda begin, end: (begin, b"\x55" * (end - begin)),
}
