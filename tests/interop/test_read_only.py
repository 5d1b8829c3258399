"""Clients that only read, servers that only let read, clients that make do with them until a writer comes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import ZODB
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ReadOnlyError

from tests.interop.conftest import Pair, Session
from tests.peers import Server, wait_until

UPGRADE_S = 30.0
UNREACHABLE_S = 1.0


@pytest.fixture
def writer(pair: Pair) -> Server:
    """A server with a page."""
    server = pair.server()
    with pair.database(server.address).transaction() as connection:
        connection.root()["page"] = PersistentMapping(text="old")
    return server


@pytest.fixture
def copy(pair: Pair, writer: Server) -> Path:
    """A folder with a copy of the writer's data file; the writer is stopped."""
    writer.stop()
    folder = pair.peers.folder()
    shutil.copy(writer.data_file, folder)
    return folder


def assert_reads_only(session: Session) -> None:
    storage = session.database.storage
    assert storage.isReadOnly()
    assert session.root["page"]["text"] == "old"
    with pytest.raises(ReadOnlyError):
        storage.tpc_begin(TransactionMetaData())
    session.root["page"]["text"] = "never"
    with pytest.raises(ReadOnlyError):
        session.commit()
    session.abort()
    assert session.root["page"]["text"] == "old"


def test_a_client_that_only_reads(pair: Pair, writer: Server) -> None:
    reader = Session(pair.database(writer.address, read_only=True))
    assert_reads_only(reader)
    session = Session(pair.database(writer.address))
    session.root["page"]["text"] = "new"
    session.commit()
    reader.wait_to_see(lambda: reader.root["page"]["text"] == "new", "the change")


def test_a_server_that_only_lets_read(pair: Pair, copy: Path) -> None:
    server = pair.server(read_only=True, folder=copy)
    assert_reads_only(Session(pair.database(server.address, read_only=True)))
    assert_reads_only(Session(pair.database(server.address, read_only_fallback=True)))


def test_a_client_that_has_to_write_does_not_take_a_server_that_does_not(pair: Pair, copy: Path) -> None:
    server = pair.server(read_only=True, folder=copy)
    with pytest.raises((ReadOnlyError, TransientError)):
        pair.client(server.address, wait_timeout_s=UNREACHABLE_S)


def test_a_writer_is_found_among_the_addresses(pair: Pair, writer: Server, copy: Path) -> None:
    server = pair.server(read_only=True, folder=copy)
    writer.restart()
    session = Session(pair.database([server.address, writer.address]))
    assert not session.database.storage.isReadOnly()
    session.root["page"]["text"] = "new"
    session.commit()


def test_a_client_that_makes_do_with_reading_writes_when_a_writer_comes(
    pair: Pair, writer: Server, copy: Path
) -> None:
    server = pair.server(read_only=True, folder=copy)
    session = Session(pair.database([server.address, writer.address], read_only_fallback=True))
    assert_reads_only(session)

    writer.restart()
    wait_until(lambda: not session.database.storage.isReadOnly(), "a connection to the writer", UPGRADE_S)

    session.begin()
    session.root["page"]["text"] = "new"
    session.commit()
    assert Session(pair.database(writer.address)).root["page"]["text"] == "new"


def test_a_client_falls_back_to_reading_when_the_writer_is_gone(
    pair: Pair, writer: Server, copy: Path
) -> None:
    server = pair.server(read_only=True, folder=copy)
    writer.restart()
    storage = pair.client([server.address, writer.address], read_only_fallback=True)
    # Before it loads anything: what a stock client is waiting for when it finds a writer fails.
    wait_until(lambda: not storage.isReadOnly(), "a connection to the writer", UPGRADE_S)
    session = Session(ZODB.DB(storage))
    writer.kill()
    wait_until(storage.isReadOnly, "a connection to the other server", UPGRADE_S)
    session.begin()
    assert_reads_only(session)
