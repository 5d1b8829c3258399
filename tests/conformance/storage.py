"""What ZODB's storage tests ask of a storage, for a client storage whose server is another process.

Owns how a test gets its storage: a server for all tests of a class, with an empty storage for each of them,
clients of it, closing and opening again. Must not know which tests there are.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ZODB
import ZODB.tests.util
from ZODB.tests.StorageTestBase import StorageTestBase
from ZODB.tests.TransactionalUndoStorage import TransactionalUndoStorage
from ZODB.tests.util import store

from tests.peers import Coding, Kind, Peers, Server

COMPETITOR_S = 30.0


class ClientStorageCase(StorageTestBase):
    """The base of the conformance tests: a kind of client, a kind of server, and the coding between them."""

    client_kind: Kind
    server_kind: Kind
    coding: Coding
    section = ""
    """Of the server's configuration, where its storages are none of the usual files; see `Server`."""
    storages_per_test = 1

    @pytest.fixture(autouse=True)
    def _take_peers(
        self, peers: Peers, class_server: Server, unused_storages: Iterator[str]
    ) -> Iterator[None]:
        self.peers = peers
        self.server = class_server
        self.names = list(itertools.islice(unused_storages, self.storages_per_test))
        if not self.server.running:
            self.server.start()
        self.server.log.clear()
        yield
        assert self.server.running, "the server died"

    def setUp(self) -> None:
        super().setUp()
        self.open()

    def open(self, read_only: bool = False) -> None:
        self._storage = self._connect(self.names[0], read_only)

    def _connect(self, storage: str, read_only: bool = False) -> Any:
        return self.peers.client(
            self.client_kind, self.server.address, storage=storage, coding=self.coding, read_only=read_only
        )

    def _new_storage_client(self) -> Any:
        """Without this two of the races would be skipped."""
        return self._connect(self.names[0])

    def _do_store_in_separate_thread(self, oid: bytes, revid: bytes, voted: bool) -> threading.Thread:
        """Let the competitor of `test_checkCurrentSerialInTransaction` be another client.

        In the same storage it would only wait for its turn, and the server would never see two transactions.
        When the first one has voted, the competitor has to wait for it; otherwise it has to get through.
        """
        storage = self._new_storage_client()

        thread = threading.Thread(
            target=store, args=(storage, oid, b"competing", revid), name="competitor", daemon=True
        )
        thread.start()
        thread.join(0.1 if voted else COMPETITOR_S)
        return thread


class RestartedServerCase(ClientStorageCase):
    """Opening again opens the file again: what persists has to be in the file, not in the server's memory."""

    def open(self, read_only: bool = False) -> None:
        if self._storage is not None:
            self.server.restart()
        super().open(read_only)


class TwoStoragesCase(ClientStorageCase):
    """With a second storage, into which transactions are copied."""

    storages_per_test = 2

    def setUp(self) -> None:
        super().setUp()
        self._dst = self._connect(self.names[1])

    def _close(self) -> None:
        self._dst.close()
        super()._close()


class RealTimeCase(ClientStorageCase):
    """`testPackUndoLog` moves the clock of this process, which a server in another one never notices."""

    def testPackUndoLog(self) -> None:
        super().testPackUndoLog.__wrapped__(self)


class UndoVoteCase(ClientStorageCase):
    """`ConflictResolvingTransUndoStorage` takes for granted that it stands beside this method's owner."""

    _begin_undos_vote = TransactionalUndoStorage._begin_undos_vote


class ResolvedConflictCase(ClientStorageCase):
    """`checkResolve` is a test, but lacks the prefix of one."""

    def testResolve(self) -> None:
        self.checkResolve()


class DatabaseCase(ClientStorageCase):
    """With a database on the storage. Its tests make one of a file by themselves if they are let."""

    def setUp(self) -> None:
        ZODB.tests.util.TestCase.setUp(self)
        self.open()
        self._db = ZODB.DB(self._storage)

    def tearDown(self) -> None:
        self._db.close()
        StorageTestBase.tearDown(self)
