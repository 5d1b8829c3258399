"""What is stored: counters, entries of a tree, and the empty databases that a run begins with.

Clients import this module; the server must not, so conflicts are resolved by clients only.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import transaction
import ZODB
from BTrees.OOBTree import OOBTree
from persistent import Persistent
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage

STORAGES = ("1", "2")
RESOLVING = tuple(f"resolving-{n}" for n in range(3))
PLAIN = tuple(f"plain-{n}" for n in range(3))
#: Always written together, by the same amount: whoever reads them differing sees two points in time at once.
TWINS = ("twin-a", "twin-b")
#: One in each storage, written together.
PAIRS = tuple(f"pair-{n}" for n in range(2))

#: The description of the transactions that make the databases; every other one has its writer's id.
POPULATING = ("initial database creation", "the torture begins")


class Resolutions(threading.local):
    """How many conflicts this thread has resolved."""

    count = 0


resolutions = Resolutions()


class Counter(Persistent):  # type: ignore[misc]
    """Increments of it conflict."""

    def __init__(self) -> None:
        self.value = 0


class ResolvingCounter(Counter):
    """Increments of it add up."""

    def _p_resolveConflict(
        self, old: dict[str, int], saved: dict[str, int], new: dict[str, int]
    ) -> dict[str, int]:
        resolutions.count += 1
        return {"value": saved["value"] + new["value"] - old["value"]}


class Entry(Persistent):  # type: ignore[misc]
    """What a key of the tree stands for. Its data can be told from that of any other entry."""

    #: Some have one, as long as they say.
    blob: Blob | None = None
    blob_bytes = 0

    def __init__(self, key: str, size_bytes: int) -> None:
        self.key = key
        self.data = filling(key, size_bytes)

    def give_blob(self, size_bytes: int) -> None:
        """To be called when the entry has its storage, in whose folder the file is made."""
        blob = Blob()
        self._p_jar.add(blob)
        with blob.open("w") as file:
            file.write(filling(self.key, size_bytes))
        self.blob, self.blob_bytes = blob, size_bytes

    @property
    def sound(self) -> bool:
        return bool(self.data == filling(self.key, len(self.data))) and self._has_sound_blob()

    def _has_sound_blob(self) -> bool:
        if self.blob is None:
            return True
        with self.blob.open() as file:
            return bool(file.read() == filling(self.key, self.blob_bytes))


def filling(key: str, size_bytes: int) -> bytes:
    raw = key.encode()
    return (raw * (size_bytes // len(raw) + 1))[:size_bytes]


def own(client: int, thread: int) -> str:
    """The name of the counter that one thread of one client writes, and nobody else."""
    return f"own-{client}-{thread}"


def data_file(folder: Path, storage: str) -> Path:
    return folder / f"{storage}.fs"


def blob_dir(folder: Path, storage: str) -> Path:
    return folder / f"{storage}-blobs"


def populate(folder: Path, clients: int, threads: int) -> None:
    """Make the data files, with stock ZODB alone."""
    owned = [own(client, thread) for client in range(clients) for thread in range(threads)]
    for storage in STORAGES:
        blobs = str(blob_dir(folder, storage))
        database = ZODB.DB(FileStorage(str(data_file(folder, storage)), blob_dir=blobs))
        manager = transaction.TransactionManager()
        connection = database.open(manager)
        root: Any = connection.root()
        root["counters"] = OOBTree({name: Counter() for name in (*PLAIN, *TWINS, *PAIRS, *owned)})
        root["counters"].update({name: ResolvingCounter() for name in RESOLVING})
        root["entries"] = OOBTree()
        manager.get().note(POPULATING[1])
        manager.commit()
        connection.close()
        database.close()
