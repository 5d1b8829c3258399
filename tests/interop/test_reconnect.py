"""Servers die and come back, and the way to them is cut; clients go on by themselves, and lose nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError, StorageError
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.tests.util import store
from ZODB.utils import load_current, z64

from tests.interop.conftest import Pair, Session
from tests.interop.relay import Relay
from tests.peers import wait_until

RECONNECT_S = 30.0
UNREACHABLE_S = 1.0
TIMED_OUT_S = 5.0


def write(session: Session, text: str) -> None:
    """Commit, as an application does: again from the start as long as the error is a transient one."""

    def attempt() -> bool:
        try:
            session.begin()
            session.root.setdefault("page", PersistentMapping())["text"] = text
            session.commit()
        except TransientError:
            session.abort()
            return False
        return True

    wait_until(attempt, "a commit", RECONNECT_S)


def wait_to_read(session: Session, text: str) -> None:
    def reads() -> bool:
        with contextlib.suppress(TransientError):
            session.begin()
            return bool(session.root.get("page", {}).get("text") == text)
        return False

    wait_until(reads, f"the text {text!r}", RECONNECT_S)


def test_clients_go_on_after_the_server_was_killed(pair: Pair) -> None:
    server = pair.server()
    writer, reader = Session(pair.database(server.address)), Session(pair.database(server.address))
    for number in range(3):
        write(writer, f"acknowledged {number}")
        server.kill()
        server.restart()
        write(writer, f"after {number}")

        wait_to_read(reader, f"after {number}")
    newcomer = Session(pair.database(server.address))
    texts = [
        newcomer.connection.oldstate(newcomer.root["page"], entry["tid"])["data"]["text"]
        for entry in newcomer.database.storage.history(newcomer.root["page"]._p_oid, 10)
    ]
    assert texts == [f"{when} {number}" for number in (2, 1, 0) for when in ("after", "acknowledged")]


def answers(ask: Callable[[], Any]) -> bool:
    """Whether the server answers, be it that there is no such object."""
    try:
        ask()
    except POSKeyError:
        return True
    except TransientError:
        return False
    return True


@pytest.mark.parametrize("voted", [False, True], ids=["stored", "voted"])
def test_a_transaction_that_was_open_fails(pair: Pair, voted: bool) -> None:
    server = pair.server()
    storage = pair.database(server.address).storage
    oid = storage.new_oid()
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(oid, z64, zodb_pickle(MinPO("lost")), "", transaction)
    if voted:
        storage.tpc_vote(transaction)

    server.kill()
    server.restart()
    wait_until(lambda: answers(lambda: storage.getTid(oid)), "an answer of the new server", RECONNECT_S)

    go_on = storage.tpc_finish if voted else storage.tpc_vote
    with pytest.raises(TransientError) as failure:
        go_on(transaction)
    assert isinstance(failure.value, StorageError)
    storage.tpc_abort(transaction)
    with pytest.raises(POSKeyError):
        storage.getTid(oid)

    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(oid, z64, zodb_pickle(MinPO("kept")), "", transaction)
    storage.tpc_vote(transaction)
    tid = storage.tpc_finish(transaction)
    assert load_current(storage, oid)[1] == tid


def test_a_commit_that_was_missed_is_seen_after_reconnecting(pair: Pair) -> None:
    """Also when nobody commits again."""
    server = pair.server()
    with Relay(server.address) as relay:
        writer, reader = Session(pair.database(server.address)), Session(pair.database(relay.address))
        write(writer, "old")
        reader.wait_to_see(lambda: "page" in reader.root, "the object")
        assert reader.root["page"]["text"] == "old"
        relay.cut()
        write(writer, "missed")
        relay.restore()
        wait_to_read(reader, "missed")


def test_a_client_that_is_cut_off_goes_on_reading_what_it_has(pair: Pair) -> None:
    server = pair.server()
    with Relay(server.address) as relay:
        session = Session(pair.database(relay.address))
        write(session, "text")
        session.begin()
        session.connection.cacheMinimize()
        assert session.root["page"]["text"] == "text"
        relay.cut()
        session.connection.cacheMinimize()
        assert session.root["page"]["text"] == "text"


def test_a_client_that_was_there_before_the_server(pair: Pair) -> None:
    server = pair.server()
    write(Session(pair.database(server.address)), "text")
    server.stop()
    storage = pair.client(server.address, wait=False)
    server.restart()
    wait_until(lambda: answers(lambda: storage.getTid(z64)), "a connection", RECONNECT_S)


def test_a_client_without_a_server_says_so(pair: Pair) -> None:
    server = pair.server()
    server.stop()
    with pytest.raises(TransientError) as failure:
        pair.client(server.address, wait_timeout_s=UNREACHABLE_S)
    assert isinstance(failure.value, StorageError)


def test_of_several_addresses_one_is_enough(pair: Pair) -> None:
    dead, alive = pair.server(), pair.server()
    dead.stop()
    session = Session(pair.database([dead.address, alive.address]))
    write(session, "text")
    assert Session(pair.database(alive.address)).root["page"]["text"] == "text"


@pytest.mark.stock_server_fails("it logs and closes the connection, but never releases the commit lock")
def test_a_transaction_that_is_not_finished_in_time_gives_way(pair: Pair) -> None:
    server = pair.server(transaction_timeout_s=1)
    sleeper, database = pair.client(server.address, label="sleepy"), pair.database(server.address)
    oid = sleeper.new_oid()
    transaction = TransactionMetaData()
    sleeper.tpc_begin(transaction)
    sleeper.store(oid, z64, zodb_pickle(MinPO("too late")), "", transaction)
    sleeper.tpc_vote(transaction)
    assert server.log.wait_for(r"CRITICAL.*sleepy.*Transaction timeout after", TIMED_OUT_S), server.log.text()

    pool = ThreadPoolExecutor(1)
    other = pool.submit(store, database.storage, oid, b"in time")
    pool.shutdown(wait=False)
    other.result(TIMED_OUT_S)

    with pytest.raises(StorageError):
        sleeper.tpc_finish(transaction)
    sleeper.tpc_abort(transaction)
    assert load_current(database.storage, oid)[0] == b"in time"
