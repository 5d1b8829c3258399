"""A data file has no owner: the two servers can take turns, and one configuration starts either of them."""

from __future__ import annotations

import pytest
from persistent.mapping import PersistentMapping

from tests.interop.conftest import Session
from tests.peers import CODINGS, KINDS, Coding, Kind, Peers


@pytest.mark.parametrize("first", KINDS)
def test_servers_take_turns_on_one_file(first: Kind, peers: Peers) -> None:
    second = next(kind for kind in KINDS if kind != first)
    folder = peers.folder()
    for turn, kind in enumerate((first, second, first, second)):
        server = peers.server(kind, folder=folder)
        session = Session(peers.database(first, server.address))
        assert [session.root[number]["turn"] for number in range(turn)] == list(range(turn))
        session.root[turn] = PersistentMapping(turn=turn)
        session.commit()
        session.database.close()
        assert server.stop() == 0


@pytest.mark.parametrize("coding", CODINGS)
def test_a_configuration_of_runzeo(coding: Coding, peers: Peers) -> None:
    folder = peers.folder()
    for kind in KINDS:
        server = peers.server(kind, folder=folder, coding=coding, configured=True)
        session = Session(peers.database("stock", server.address))
        session.root[kind] = PersistentMapping()
        session.commit()
        assert server.stop() == 0
    assert set(session.root) == set(KINDS)
