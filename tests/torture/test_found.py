"""Restarts after `kill -9` that were found by the torture, each reduced to what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.Connection import TransactionMetaData

import zeoid
from tests.peers import wait_until
from tests.torture.objects import PAIRS, STORAGES, populate
from tests.torture.processes import Server
from zeoid.errors import Disconnected

TIMEOUT_S = 5.0


@pytest.fixture
def address(tmp_path: Path) -> str:
    populate(tmp_path, 1, 1)
    return str(tmp_path / "socket")


@pytest.fixture
def server(tmp_path: Path, address: str) -> Iterator[Server]:
    server = Server(tmp_path, address)
    try:
        server.start()
        yield server
    finally:
        server.end()


def open_storage(address: str, name: str = "1") -> Any:
    return zeoid.ClientStorage(address, name, wait_timeout=TIMEOUT_S)


def test_an_oid_is_not_handed_out_again_after_a_kill(server: Server, address: str) -> None:
    """Two clients gave it to objects of theirs: "A different object already has the same oid"."""
    with closing(open_storage(address)) as client:
        first = client.new_oid()
    server.kill()
    server.start()
    with closing(open_storage(address)) as client:
        assert client.new_oid() > first


def test_a_transaction_that_was_only_voted_on_does_not_count_as_the_last_one(
    server: Server, address: str
) -> None:
    """The server took its tid from the file, where it was cut off; and had forgotten it after the next start,
    when every client that had seen it refused the server for being behind.
    """
    with closing(open_storage(address)) as client:
        before = client.lastTransaction()
        unfinished = TransactionMetaData()
        client.tpc_begin(unfinished)
        client.store(client.new_oid(), bytes(8), b"data", "", unfinished)
        client.tpc_vote(unfinished)
        for _ in range(2):
            server.kill()
            server.start()
            client.ping()
            assert client.lastTransaction() == before


@pytest.mark.timeout(60)
def test_what_is_finished_in_one_of_two_storages_is_not_tried_again(server: Server, address: str) -> None:
    """The server dies between the two finishes, and the client notices before it sends the second."""
    manager = transaction.TransactionManager(explicit=True)
    databases: dict[str, Any] = {}
    for name in STORAGES:
        ZODB.DB(open_storage(address, name), database_name=name, databases=databases)
    first = databases["1"].open(manager)
    connections = [first, first.get_connection("2")]

    class Between:
        """Finishes after the storage 1 and before the storage 2."""

        def sortKey(self) -> str:
            return "1~"

        def abort(self, transaction: Any) -> None: ...

        tpc_begin = commit = tpc_vote = tpc_abort = abort

        def tpc_finish(self, transaction: Any) -> None:
            server.kill()
            wait_until(lambda: not databases["2"].storage.is_connected(), "the client has noticed")
            server.start()

    tries = 0
    try:
        with pytest.raises(Disconnected):  # noqa: PT012
            for attempt in zeoid.retry.attempts(manager=manager):
                with attempt as current:
                    tries += 1
                    if tries == 1:
                        current.join(Between())
                    for connection in connections:
                        connection.root()["counters"][PAIRS[0]].value += 1
    finally:
        manager.begin()
        values = [connection.root()["counters"][PAIRS[0]].value for connection in connections]
        manager.abort()
        first.close()
        for database in databases.values():
            database.close()
        print(f"tries {tries}, values {values}")
    assert (tries, values) == (1, [1, 0])
