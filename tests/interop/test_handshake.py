"""How the two find a common coding, and what a server tells about itself."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import pytest
import ZEO.nagios
from persistent.mapping import PersistentMapping

from tests.interop.conftest import Pair, Session
from tests.interop.relay import Relay
from tests.peers import CODINGS, KINDS, Address, Coding, Kind, Peers, Server, wait_until

STATUS_KEYS = {
    "aborts",
    "active_txns",
    "commits",
    "conflicts",
    "conflicts_resolved",
    "connections",
    "last-transaction",
    "loads",
    "lock_time",
    "start",
    "stores",
    "timeout-thread-is-alive",
    "waiting",
}
ANSWER_S = 10.0


def test_both_speak_the_coding_of_the_test(pair: Pair) -> None:
    server = pair.server()
    with Relay(server.address) as relay:
        storage = pair.client(relay.address)
        storage.close()
    assert [offer.greeting for offer in relay.offers] == [pair.coding.encode()]
    assert [answer.greeting for answer in relay.answers] == [pair.coding.encode()]


@pytest.mark.parametrize("picked", CODINGS)
@pytest.mark.parametrize("offered", CODINGS)
@pytest.mark.parametrize("server_kind", KINDS)
def test_our_client_picks_a_coding_whatever_is_offered(
    server_kind: Kind, offered: Coding, picked: Coding, peers: Peers
) -> None:
    server = peers.server(server_kind, coding=offered)
    with Relay(server.address) as relay:
        session = Session(peers.database("zeoid", relay.address, coding=picked))
        session.root["page"] = PersistentMapping(text="new")
        session.commit()
        session.database.close()
    assert {offer.greeting for offer in relay.offers} == {offered.encode()}
    assert {answer.greeting for answer in relay.answers} == {picked.encode()}
    assert Session(peers.database("stock", server.address)).root["page"]["text"] == "new"


@pytest.fixture(params=[(kind, coding) for kind in KINDS for coding in CODINGS], ids="-".join)
def server(request: pytest.FixtureRequest, peers: Peers) -> Server:
    kind, coding = request.param
    return peers.server(kind, coding=coding)


def receive(connection: socket.socket) -> bytes:
    """The payload of the next frame."""

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = connection.recv(size - len(data))
            assert part, f"closed after {data!r}"
            data += part
        return data

    (size,) = struct.unpack(">I", exactly(4))
    return exactly(size)


def ask_ruok(address: Address) -> tuple[bytes, dict[str, Any]]:
    """The server's offer and its answer to the question that monitoring asks."""
    assert not isinstance(address, str), "for TCP only"
    with socket.create_connection(address, ANSWER_S) as connection:
        connection.sendall(struct.pack(">I", 4) + b"ruok")
        offer, answer = receive(connection), receive(connection)
        assert connection.recv(1) == b"", "the server says one thing and closes"
    return offer, json.loads(answer)


def test_ruok(server: Server) -> None:
    offer, status = ask_ruok(server.address)
    assert offer == server.coding.encode()
    assert list(status) == ["1"]
    assert set(status["1"]) == STATUS_KEYS


def test_ruok_counts_what_clients_do(server: Server, peers: Peers) -> None:
    session = Session(peers.database("stock", server.address))
    for text in ("first", "second"):
        session.root["page"] = PersistentMapping(text=text)
        session.commit()
    session.root["page"]["text"] = "given up"
    session.abort()
    wait_until(lambda: ask_ruok(server.address)[1]["1"]["commits"] == 3, "three commits")
    _, status = ask_ruok(server.address)
    tid = session.database.storage.lastTransaction()
    counts = {
        key: status["1"][key] for key in ("connections", "stores", "active_txns", "waiting", "conflicts")
    }
    assert counts == {"connections": 1, "stores": 5, "active_txns": 0, "waiting": 0, "conflicts": 0}
    assert status["1"]["last-transaction"] == tid.hex()


def test_clients_get_the_status_that_ruok_gives(server: Server, peers: Peers) -> None:
    storage = peers.client("stock", server.address)
    assert storage.server_status() == ask_ruok(server.address)[1]["1"]


def test_zeos_check_for_nagios(server: Server, peers: Peers, capsys: pytest.CaptureFixture[str]) -> None:
    address = "{}:{}".format(*server.address)
    assert ZEO.nagios.check(address, output_metrics=True, status=None, per="minutes") == 1
    assert "Empty storage '1'" in capsys.readouterr().out
    peers.database("stock", server.address)
    assert not ZEO.nagios.check(address, output_metrics=True, status=None, per="minutes")
    assert capsys.readouterr().out.startswith("OK")


def test_a_label_is_in_the_log(pair: Pair) -> None:
    server = pair.server()
    pair.database(server.address, label="instance-7").close()
    assert server.log.wait_for("instance-7", ANSWER_S), server.log.text()
