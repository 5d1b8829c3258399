"""Where servers listen, what they serve, and how they stop."""

from __future__ import annotations

import pytest
from persistent.mapping import PersistentMapping
from ZODB.interfaces import IStorageUndoable

from tests.interop.conftest import Pair, Session
from tests.peers import Peers


def test_a_socket_in_the_file_system(pair: Pair) -> None:
    server = pair.server(on_socket=True)
    session = Session(pair.database(server.address))
    session.root["page"] = PersistentMapping(text="new")
    session.commit()
    assert Session(pair.database(server.address)).root["page"]["text"] == "new"


def test_storages_of_one_server_have_nothing_in_common(pair: Pair) -> None:
    server = pair.server(storages=("1", "other"))
    session = Session(pair.database(server.address))
    other = Session(pair.database(server.address, storage="other"))
    for text in ("old", "new"):
        session.root["page"] = PersistentMapping(text=text)
        session.commit()
        other.root["page"] = PersistentMapping(text=f"other's {text}")
        other.commit()
    for storage, text in (("1", "new"), ("other", "other's new")):
        assert Session(pair.database(server.address, storage=storage)).root["page"]["text"] == text


def test_a_storage_that_forgets(pair: Pair) -> None:
    server = pair.server(in_memory=True)
    database = pair.database(server.address)
    session = Session(database)
    session.root["page"] = PersistentMapping(text="new")
    session.commit()
    assert Session(pair.database(server.address)).root["page"]["text"] == "new"
    assert not database.supportsUndo()
    assert not IStorageUndoable.providedBy(database.storage)


@pytest.mark.parametrize("signal", ["stop", "kill"])
def test_a_server_can_be_stopped_as_soon_as_it_listens(signal: str, peers: Peers) -> None:
    folder = peers.folder()
    for _ in range(3):
        status = getattr(peers.server("zeoid", folder=folder), signal)()
        assert status == (0 if signal == "stop" else -9)
