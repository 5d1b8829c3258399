"""RelStorage on SQLite: databases that several storages write to.

A `Database` is a folder. Every storage that is opened on it stands for another process: they share nothing
but the files. Must not know what the tests do with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relstorage.adapters.sqlite.adapter import Sqlite3Adapter
from relstorage.options import Options
from relstorage.storage import RelStorage
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError

from zeoid.model import NO_TID

#: For a server's configuration file; see `tests.peers.Server`.
SECTION = """
%import relstorage
<relstorage {name}>
  <sqlite3>
    data-dir {folder}/{name}
  </sqlite3>
</relstorage>
"""


class Database:
    """A database and somebody who writes to it directly, as a RelStorage in another process does."""

    def __init__(self, folder: Path, *, keep_history: bool = True) -> None:
        self._folder = folder
        self._keep_history = keep_history
        self._opened: list[Any] = []
        self._other: Any = None

    def open(self) -> Any:
        """A RelStorage on it, closed at the end if nobody else has closed it."""
        options = Options(keep_history=self._keep_history, cache_local_mb=1, commit_lock_timeout=1)
        storage = RelStorage(Sqlite3Adapter(str(self._folder), pragmas={}, options=options), options=options)
        self._opened.append(storage)
        return storage

    @property
    def other(self) -> Any:
        """The other writer's storage, with a view of everything that is committed."""
        if self._other is None:
            self._other = self.open().new_instance()
        self._other.sync()
        self._other.poll_invalidations()
        return self._other

    def serial(self, oid: bytes) -> bytes:
        try:
            serial: bytes = self.other.load(oid)[1]
        except POSKeyError:
            return NO_TID
        return serial

    def write(self, *oids: bytes, data: bytes = b"others'") -> bytes:
        """The other writer commits; the tid."""
        storage, meta = self.other, TransactionMetaData(b"other", b"written directly")
        storage.tpc_begin(meta)
        for oid in oids:
            storage.store(oid, self.serial(oid), data, "", meta)
        storage.tpc_vote(meta)
        tid: bytes = storage.tpc_finish(meta)
        return tid

    def close(self) -> None:
        for storage in reversed(self._opened):
            storage.close()
