"""Races that have lost or hidden data elsewhere: on the client, with the server's bytes in every order.

Most servers here are scripts, which send what the test says in one segment or in several; where a whole
database takes part, it is ZODB's own on a real server.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, ReadOnlyError, StorageError

import zeoid
from tests.client.scenes import (
    DEADLINE_S,
    OID,
    OTHER,
    T1,
    T2,
    T3,
    T4,
    Held,
    Listener,
    Scene,
    Task,
    at,
    is_cached,
    load,
    oid,
    welcomed,
)
from tests.peers import wait_until
from zeoid import ClientStorage, limits
from zeoid.errors import Disconnected, OutcomeUnknown, TimedOut
from zeoid.model import NO_TID
from zeoid.testing import Call, ScriptedConnection

PROMPT_S = 5.0


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Scene() as scene:
        yield scene


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONNECT_FIRST_S", 0.01)
    monkeypatch.setattr(limits, "RECONNECT_LAST_S", 0.02)
    monkeypatch.setattr(limits, "WRITER_POLL_S", 0.02)


def begin(storage: ClientStorage, *stores: tuple[bytes, bytes, bytes]) -> TransactionMetaData:
    """A transaction with these (oid, serial, data) stored."""
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    for oid_, serial, data in stores:
        storage.store(oid_, serial, data, "", meta)
    return meta


def vote(
    storage: ClientStorage, connection: ScriptedConnection, meta: TransactionMetaData, stores: int
) -> None:
    voting = Task(storage.tpc_vote, meta)
    connection.expect("tpc_begin")
    for _ in range(stores):
        connection.expect("storea")
    connection.answer(connection.expect("vote"), [])
    voting.result()


# Loads and invalidations ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["reply first", "invalidation first"])
@pytest.mark.parametrize("segments", [1, 2])
def test_a_load_and_the_invalidation_of_the_same_object(scene: Scene, order: str, segments: int) -> None:
    """A revision is on its way to the client, and right behind it, or before it, the news of its end.

    Whoever handles the two apart from each other ends with a stale revision that looks current.
    """
    storage, connection = scene.connected(T1)
    loading = Task(storage.loadBefore, OID, at(T1))
    call = connection.expect("loadBefore")
    parts = [connection.reply(call, (b"old", T1, None)), connection.invalidation(T2, [OID])]
    if order == "invalidation first":
        parts.reverse()
    if segments == 1:
        connection.send(*parts)
    else:
        for part in parts:
            connection.send(part)
    assert loading.result()[:2] == (b"old", T1)
    wait_until(lambda: storage.lastTransaction() == T2, "the invalidation")
    assert storage.loadBefore(OID, at(T1)) == (b"old", T1, T2)
    assert load(storage, connection, OID, at(T2), (b"new", T2, None)) == (b"new", T2, None)
    assert storage.loadBefore(OID, at(T2)) == (b"new", T2, None)


@pytest.mark.parametrize("position", range(4))
def test_a_prefetch_with_an_invalidation_among_its_replies(scene: Scene, position: int) -> None:
    """The same for many loads at once: one of the objects changes while the replies are coming in."""
    storage, connection = scene.connected(T1)
    oids = [oid(number) for number in range(3)]
    fetching = Task(storage.prefetch, oids, at(T1))
    calls = [connection.expect("loadBefore") for _ in oids]
    parts = [connection.reply(call, (b"old", T1, None)) for call in calls]
    parts.insert(position, connection.invalidation(T2, [oids[1]]))
    connection.send(*parts)
    fetching.result()
    wait_until(lambda: storage.lastTransaction() == T2, "the invalidation")
    for each in oids:
        expected = T2 if each == oids[1] else None
        assert storage.loadBefore(each, at(T1)) == (b"old", T1, expected)
    assert [is_cached(storage, connection, each, at(T2)) for each in oids] == [True, False, True]


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("position", range(3))
def test_a_bulk_load_with_an_invalidation_among_its_replies(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, position: int, segments: int
) -> None:
    """The same for bulk loads, each of which has several objects in one reply: before, between and after."""
    monkeypatch.setattr(limits, "BULK_LOAD_OIDS", 3)
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.welcome(T1, extensions=["loadBeforeMany"])
    wait_until(storage.is_connected, "a connection")
    oids = [oid(number) for number in range(6)]
    fetching = Task(storage.prefetch, oids, at(T1))
    calls = [connection.expect("loadBeforeMany") for _ in range(2)]
    parts = [connection.reply(call, [(b"old", T1, None)] * 3) for call in calls]
    parts.insert(position, connection.invalidation(T2, [oids[1], oids[4]]))
    if segments == 1:
        connection.send(*parts)
    else:
        for part in parts:
            connection.send(part)
    fetching.result()
    wait_until(lambda: storage.lastTransaction() == T2, "the invalidation")
    ended = [False, True, False, False, True, False]
    for each, has_ended in zip(oids, ended, strict=True):
        assert storage.loadBefore(each, at(T1)) == (b"old", T1, T2 if has_ended else None)
    assert [is_cached(storage, connection, each, at(T2)) for each in oids] == [not has for has in ended]
    assert load(storage, connection, oids[1], at(T2), (b"new", T2, None)) == (b"new", T2, None)


def test_a_bulk_load_of_what_is_new_already(scene: Scene) -> None:
    """The server answered after the commit, and the news of the commit comes first, as it must: the revision
    is the one that the news told of, and is current.
    """
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.welcome(T1, extensions=["loadBeforeMany"])
    wait_until(storage.is_connected, "a connection")
    fetching = Task(storage.prefetch, [OID, OTHER], at(T2))
    call = connection.expect("loadBeforeMany")
    connection.send(
        connection.invalidation(T2, [OID]), connection.reply(call, [(b"new", T2, None), (b"old", T1, None)])
    )
    fetching.result()
    assert storage.loadBefore(OID, at(T2)) == (b"new", T2, None)
    assert storage.loadBefore(OTHER, at(T2)) == (b"old", T1, None)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_two_loads_of_one_object_and_its_invalidation(scene: Scene, order: tuple[int, ...]) -> None:
    """Two threads load the same object, one before and one after it changed. Whatever the order of their
    replies, the cache ends with the newer revision as the current one.
    """
    storage, connection = scene.connected(T1)
    first = Task(storage.loadBefore, OID, at(T1))
    first_call = connection.expect("loadBefore")
    second = Task(storage.loadBefore, OID, at(T2))
    second_call = connection.expect("loadBefore")
    parts = [
        connection.reply(first_call, (b"old", T1, None)),
        connection.invalidation(T2, [OID]),
        connection.reply(second_call, (b"new", T2, None)),
    ]
    connection.send(*(parts[number] for number in order))
    assert first.result()[0] == b"old"
    assert second.result()[0] == b"new"
    wait_until(lambda: storage.lastTransaction() == T2, "the invalidation")
    found = Task(storage.loadBefore, OID, at(T2))
    if found.is_held_up():  # it need not be kept, but what is kept must be right
        connection.answer(connection.expect("loadBefore"), (b"new", T2, None))
    assert found.result() == (b"new", T2, None)


def test_a_missed_object_gets_no_end_that_was_made_up(scene: Scene) -> None:
    """While a client was away, one object changed first and another one later. It is told both oids and the
    last tid only: to say that the first object's old revision lasted until that tid would be a lie, which a
    reader between the two commits would believe.
    """
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    load(storage, connection, OID, at(T1), (b"a1", T1, None))
    load(storage, connection, OTHER, at(T1), (b"b1", T1, None))
    connection.close()
    again = server.accept()
    again.welcome(T3, missed=(T3, [OID, OTHER]))
    wait_until(storage.is_connected, "a connection")
    answers = {OID: (b"a2", T2, None), OTHER: (b"b1", T1, T3)}
    for each, answer in answers.items():
        assert load(storage, again, each, at(T2), answer) == answer


# The last transaction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["a thread that calls", "the background"])
def test_the_last_transaction_waits_for_the_database(scene: Scene, reader: str) -> None:
    """The database is being told of a commit. Another thread that asks for the last transaction now must
    wait: with the new tid it would read at a time whose changes the database does not know yet.
    """
    held = Held()
    told: list[bytes] = []

    class Slow(Listener):
        def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
            held.stop_here()
            told.append(tid)

    storage, connection = scene.connected(T1)
    storage.registerDB(Slow())
    calling = None
    if reader == "a thread that calls":
        calling = Task(storage.ping)
        call = connection.expect("ping")
    connection.send(connection.invalidation(T2, [OID]))
    held.wait_for_entry()
    asking = [Task(lambda: (storage.lastTransaction(), list(told))) for _ in range(3)]
    assert all(task.is_held_up() for task in asking)
    held.let_go()
    assert [task.result() for task in asking] == [(T2, [T2])] * 3
    if calling is not None:
        connection.answer(call, None)
        calling.result()


def test_a_connection_that_is_opened_while_a_commit_is_delivered(scene: Scene) -> None:
    """ZODB has told its open connections of a commit, and the storage has not yet moved on. A connection
    that is opened now was not there to be told: if it began at the old tid, it would keep the old state of
    the object also in its next transactions, for it is never told again.
    """

    class SlowToReturn:
        """Passes on what it is told, and then takes its time."""

        def __init__(self, database: Any) -> None:
            self.database = database
            self.held = Held()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.database, name)

        def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
            self.database.invalidate(tid, oids)
            self.held.stop_here()

    with zeoid.serve(None) as server, contextlib.closing(zeoid.DB(server.address)) as database:
        slow = SlowToReturn(database._mvcc_storage)
        with database.transaction() as first:
            first.root()["page"] = PersistentMapping(text="old")
        database.storage.registerDB(slow)
        with contextlib.closing(zeoid.DB(server.address)) as writers, writers.transaction() as writer:
            writer.root()["page"]["text"] = "new"
        slow.held.wait_for_entry()

        def open_and_read() -> list[str]:
            manager = transaction.TransactionManager()
            connection = database.open(manager)
            opened.set()
            seen = []
            for _ in range(2):
                seen.append(connection.root()["page"]["text"])
                manager.begin()
            connection.close()
            return seen

        opened = threading.Event()
        reading = Task(open_and_read)
        assert reading.is_held_up()
        assert not opened.is_set()
        slow.held.let_go()
        assert reading.result() == ["new", "new"]


@pytest.mark.parametrize("order", ["own first", "other first"])
@pytest.mark.parametrize("own_data_known", [True, False])
def test_an_own_commit_and_the_one_of_another(scene: Scene, order: str, own_data_known: bool) -> None:
    """The reply to a client's own finish and the news of another client's next commit of the same object
    come together. In either order, nobody may be left with the own revision as the current one.
    """
    storage, connection = scene.connected(T1)
    listener = Listener()
    storage.registerDB(listener)
    load(storage, connection, OID, at(T1), (b"old", T1, None))
    meta = begin(storage, (OID, T1, b"mine"))
    voting = Task(storage.tpc_vote, meta)
    connection.expect("tpc_begin"), connection.expect("storea")
    connection.answer(connection.expect("vote"), [] if own_data_known else [OID])
    voting.result()
    order_of_tids: list[bytes] = []
    finishing = Task(storage.tpc_finish, meta, order_of_tids.append)
    call = connection.expect("tpc_finish")
    parts = [connection.reply(call, T2), connection.invalidation(T3, [OID])]
    if order == "other first":
        parts.reverse()
    connection.send(*parts)
    assert finishing.result() == T2
    wait_until(lambda: storage.lastTransaction() == T3, "the other commit")
    assert order_of_tids == [T2]
    assert listener.heard == [(T3, [OID])]
    assert storage.loadBefore(OID, T2) == (b"old", T1, T2)
    expected = (b"mine", T2, T3)
    between = Task(storage.loadBefore, OID, T3)
    if not own_data_known:
        connection.answer(connection.expect("loadBefore"), expected)
    assert between.result() == expected
    assert load(storage, connection, OID, at(T3), (b"theirs", T3, None)) == (b"theirs", T3, None)


# Connecting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covered", [False, True], ids=["after the answer", "covered by the answer"])
@pytest.mark.parametrize("position", ["register", "getInvalidations", "get_info"])
def test_a_commit_while_a_client_is_verified(scene: Scene, position: str, covered: bool) -> None:
    """A client comes back. Between its first and its last question somebody commits; the server tells it of
    that at once, or the answer to what was missed contains it already, or both. The database must hear of
    it, once, and the old revision must not be taken for current.
    """
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    listener = Listener()
    storage.registerDB(listener)
    load(storage, connection, OID, at(T1), (b"old", T1, None))
    connection.close()

    again = server.accept()
    again.offer()
    news = again.invalidation(T3, [OID])
    missed = (T3, [OTHER, OID]) if covered else (T2, [OTHER])
    answers = {"register": T2, "getInvalidations": missed, "get_info": {"length": 1}}
    for name, answer in answers.items():
        reply = again.reply(again.expect_after_same_history(name), answer)
        again.send(reply, news) if name == position else again.send(reply)
    wait_until(lambda: storage.is_connected() and storage.lastTransaction() == T3, "the last commit")
    answer_ping(storage, again)
    told = [(T3, [OID, OTHER])] if covered else [(T2, [OTHER]), (T3, [OID])]
    if covered and position == "get_info":
        # A repetition behind the last answer can't be told from a new commit, and does no harm.
        assert listener.heard[:1] == told
        assert len(listener.heard) <= 2
    else:
        assert listener.heard == told
    assert not is_cached(storage, again, OID, at(T3))


def answer_ping(storage: ClientStorage, connection: ScriptedConnection) -> None:
    task = Task(storage.ping)
    connection.answer(connection.expect("ping"), None)
    task.result()


@pytest.mark.parametrize("position", ["register", "get_info"])
def test_a_commit_while_a_client_connects_for_the_first_time(scene: Scene, position: str) -> None:
    """It has nothing to verify; what it is told meanwhile counts all the same."""
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.offer()
    for name, answer in {"register": T1, "get_info": {}}.items():
        parts = [connection.reply(connection.expect(name), answer)]
        if name == position:
            parts += [connection.invalidation(T2, [OID]), connection.invalidation(T3, [OTHER])]
        connection.send(*parts)
    wait_until(lambda: storage.lastTransaction() == T3, "the commits")


def test_a_server_that_was_not_taken_changes_nothing(scene: Scene) -> None:
    """Of two servers the one that can write is taken. The other one has registered the client and tells it
    of commits that the chosen one knows nothing of: not a word of that may reach cache, database or state.
    """
    loser, winner = scene.server(), scene.server()
    storage = scene.storage(loser, winner, read_only_fallback=True)
    listener = Listener()
    storage.registerDB(listener)
    other = loser.accept()
    other.offer()
    other.send(other.fault(other.expect("register"), ReadOnlyError()))
    register = other.expect("register")
    other.send(
        other.reply(register, T4),
        other.invalidation(T4, [OID]),
        other.call("info", {"size": 666, "length": 666}),
    )
    connection = winner.accept()
    connection.welcome(T1)
    wait_until(storage.is_connected, "a connection")
    assert other.expect_end() == []
    load(storage, connection, OID, at(T1), (b"data", T1, None))
    assert storage.lastTransaction() == T1
    assert listener.heard == []
    assert storage.getSize() == 0
    assert is_cached(storage, connection, OID, at(T1))
    connection.send(connection.invalidation(T2, [OID]))
    wait_until(lambda: storage.lastTransaction() == T2, "the commit")
    assert listener.heard == [(T2, [OID])]


def test_a_server_that_is_left_for_a_better_one_changes_nothing_more(scene: Scene) -> None:
    """The old connection is being read at the moment of the change, and its last segment holds more news."""
    held = Held()

    class Slow(Listener):
        def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
            super().invalidate(tid, oids)
            if len(self.heard) == 1:
                held.stop_here()

    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    listener = Slow()
    storage.registerDB(listener)
    connection.send(
        connection.invalidation(T2, [OID]),
        connection.invalidation(T3, [OTHER]),
        connection.call("info", {"size": 1}),
    )
    held.wait_for_entry()  # the reader is in the middle of the segment
    connection.close()
    held.let_go()
    again = server.accept()
    again.offer()
    again.answer(again.expect("register"), T4)
    call = again.expect_after_same_history("getInvalidations")
    assert call.args[0] in (T2, T3)
    again.answer(call, (T4, [OID, OTHER]))
    again.answer(again.expect("get_info"), {"size": 4})
    wait_until(lambda: storage.lastTransaction() == T4, "the next connection")
    tids = [tid for tid, _ in listener.heard]
    assert tids == sorted(tids)


def test_a_commit_that_was_missed_is_seen_though_nobody_commits_again(tmp_path: Path) -> None:
    """The connection is lost, somebody commits, the connection is made anew, and then nothing happens. The
    very next transaction must see the commit: not only the one after the next commit.
    """
    path = tmp_path / "Data.fs"
    with zeoid.serve(path) as server:
        address = server.address
        database = zeoid.DB(address)
        manager = transaction.TransactionManager()
        connection = database.open(manager)
        connection.root()["page"] = PersistentMapping(text="old")
        manager.commit()
        assert connection.root()["page"]["text"] == "old"
    wait_until(lambda: not database.storage.is_connected(), "the end of the connection")
    with contextlib.closing(ZODB.DB(str(path))) as directly, directly.transaction() as writer:
        writer.root()["page"]["text"] = "missed"
    with contextlib.closing(database), zeoid.serve(path, port=address.port):  # type: ignore[union-attr]
        wait_until(database.storage.is_connected, "a connection")
        manager.begin()
        assert connection.root()["page"]["text"] == "missed"
        connection.close()


@pytest.mark.parametrize("last", [NO_TID, T1, T2], ids=["empty", "older", "a little older"])
def test_a_server_that_lags_behind_what_was_seen(scene: Scene, last: bytes) -> None:
    """After a failover or a restored back-up the server's last transaction is older than what this client
    has seen. Its cache would be of another history. It is refused by name, and whoever else there is is
    asked.
    """
    first, second = scene.server(), scene.server()
    storage = scene.storage(first, second, wait_timeout=1.0)
    connection = first.accept()
    connection.welcome(T3)
    wait_until(storage.is_connected, "a connection")
    load(storage, connection, OID, at(T3), (b"data", T3, None))
    second.stop_listening()
    connection.close()
    behind = first.accept()
    behind.offer()
    behind.answer(behind.expect("register"), last)
    with contextlib.suppress(AssertionError):
        behind.answer(behind.expect("lastTransaction"), last)
    assert behind.expect_end() == []
    first.stop_listening()
    asking = Task(storage.ping)
    assert isinstance(asking.outcome(), TimedOut)
    assert storage.lastTransaction() == T3
    second.listen_again()
    good = second.accept()
    good.welcome(T3)
    answer_ping(storage, good)
    assert is_cached(storage, good, OID, at(T3))


# Committing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("when", ["before finish", "after finish"])
def test_the_server_dies_between_vote_and_finish(scene: Scene, when: str, committed: bool) -> None:
    """The transaction was prepared; whether it was committed nobody tells. Its data must not be in the cache
    as if it had been. What really happened is learned from the next connection.
    """
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    listener = Listener()
    storage.registerDB(listener)
    load(storage, connection, OID, at(T1), (b"old", T1, None))
    meta = begin(storage, (OID, T1, b"mine"))
    vote(storage, connection, meta, 1)
    told: list[bytes] = []
    if when == "before finish":
        connection.close()
        wait_until(lambda: not storage.is_connected(), "the end of the connection")
        with pytest.raises(TransientError) as failure:
            storage.tpc_finish(meta, told.append)
        assert isinstance(failure.value, Disconnected)
    else:
        finishing = Task(storage.tpc_finish, meta, told.append)
        connection.expect("tpc_finish")
        connection.close()
        with pytest.raises(OutcomeUnknown) as outcome:
            finishing.result()
        assert isinstance(outcome.value, StorageError)
        assert not isinstance(outcome.value, TransientError), "a retry could do it twice"
    storage.tpc_abort(meta)
    assert told == []
    assert storage.lastTransaction() == T1
    assert storage.loadBefore(OID, at(T1)) == (b"old", T1, None)
    again = server.accept()
    if committed and when == "after finish":
        again.welcome(T2, missed=(T2, [OID]))
        wait_until(storage.is_connected, "a connection")
        assert listener.heard == [(T2, [OID])]
        assert load(storage, again, OID, at(T2), (b"mine", T2, None)) == (b"mine", T2, None)
    else:
        again.welcome(T1)
        wait_until(storage.is_connected, "a connection")
        assert listener.heard == []
        assert is_cached(storage, again, OID, at(T1))


def test_a_finish_whose_reply_does_not_come(scene: Scene) -> None:
    """The deadline passes. The reply may still come: so the connection is given up, lest it be missed that
    the own commit is there.
    """
    server = scene.server()
    storage, connection = scene.connected(T1, server=server, wait_timeout=0.3)
    meta = begin(storage, (OID, T1, b"mine"))
    vote(storage, connection, meta, 1)
    finishing = Task(storage.tpc_finish, meta)
    connection.expect("tpc_finish")
    with pytest.raises(OutcomeUnknown, match=r"may or may not be committed: .*0\.3 s"):
        finishing.result()
    assert connection.expect_end() == []
    welcomed(storage, server, T2, (T2, [OID]))
    assert storage.lastTransaction() == T2


@pytest.mark.parametrize("value", [None, 0, b"", b"short", "T2", ()], ids=repr)
def test_a_finish_that_says_nothing(scene: Scene, value: Any) -> None:
    """A server that forgot the transaction may answer with nothing at all: that is no success."""
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    meta = begin(storage, (OID, T1, b"mine"))
    vote(storage, connection, meta, 1)
    told: list[bytes] = []
    finishing = Task(storage.tpc_finish, meta, told.append)
    connection.answer(connection.expect("tpc_finish"), value)
    with pytest.raises(StorageError, match="did not commit"):
        finishing.result()
    storage.tpc_abort(meta)
    assert told == []
    again = server.accept()
    again.welcome(T1)
    wait_until(storage.is_connected, "a connection")
    assert not is_cached(storage, again, OID, at(T1))


@pytest.mark.parametrize("step", ["store", "vote", "finish"])
def test_a_new_connection_in_the_middle_of_a_transaction(scene: Scene, step: str) -> None:
    """The server that comes back knows nothing of what was stored before. The transaction must fail, however
    quickly the connection was made anew; half of it must never be committed.
    """
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    meta = begin(storage, (OID, T1, b"first half"))
    if step == "finish":
        vote(storage, connection, meta, 1)
    connection.close()
    again = server.accept()
    again.welcome(T1)
    wait_until(lambda: storage._link.generation > 2 and storage.is_connected(), "the next connection")
    steps: dict[str, Callable[[], Any]] = {
        "store": lambda: storage.store(OTHER, T1, b"second half", "", meta),
        "vote": lambda: storage.tpc_vote(meta),
        "finish": lambda: storage.tpc_finish(meta),
    }
    with pytest.raises(Disconnected) as failure:
        steps[step]()
    assert isinstance(failure.value, TransientError)
    storage.tpc_abort(meta)
    # Nothing of it was sent there; a new transaction works.
    meta = begin(storage, (OID, T1, b"again"))
    vote(storage, again, meta, 1)


@pytest.mark.parametrize(
    "problem",
    [ConflictError(oid=OID, serials=(T2, T1)), StorageError("disk full"), ReadOnlyError()],
    ids=lambda problem: type(problem).__name__,
)
def test_an_error_in_what_was_sent_one_way(scene: Scene, problem: Exception) -> None:
    """Begin and store have no reply that could tell of an error. The vote does; it neither passes nor waits
    for ever, and the transaction can be aborted and begun again.
    """
    storage, connection = scene.connected(T1)
    load(storage, connection, OID, at(T1), (b"old", T1, None))
    meta = begin(storage, (OID, T1, b"mine"))
    voting = Task(storage.tpc_vote, meta)
    for name in ("tpc_begin", "storea"):
        assert connection.expect(name).one_way
    connection.send(connection.fault(connection.expect("vote"), problem))
    with pytest.raises(type(problem)):
        voting.result()
    storage.tpc_abort(meta)
    assert connection.expect("tpc_abort").one_way
    # After a conflict the revision that lost is not read from the cache once more.
    assert is_cached(storage, connection, OID, at(T1)) is not isinstance(problem, ConflictError)
    meta = begin(storage, (OID, T1, b"mine"))
    vote(storage, connection, meta, 1)


def test_object_ids_are_given_out_once(scene: Scene) -> None:
    """Not again after an abort, not twice to two threads; and those of an earlier connection are dropped:
    that server may have been another one, and may give the same ones to somebody else.
    """
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    numbers = itertools.count(1)

    def pool() -> list[bytes]:
        return [oid(next(numbers)) for _ in range(5)]

    def new_oids(server_end: ScriptedConnection, count: int) -> list[bytes]:
        taking = [Task(lambda: [storage.new_oid() for _ in range(count)]) for _ in range(3)]
        for _ in range(-(-3 * count // 5)):
            server_end.answer(server_end.expect("new_oids"), pool())
        return [each for task in taking for each in task.result()]

    given = new_oids(connection, 5)
    assert sorted(given) == [oid(number) for number in range(1, 16)]
    taking = Task(storage.new_oid)
    connection.answer(connection.expect("new_oids"), pool())
    given.append(taking.result())
    meta = begin(storage, (given[-1], NO_TID, b"data"))
    storage.tpc_abort(meta)
    given.append(storage.new_oid())
    assert len(set(given)) == len(given)

    connection.close()
    again = server.accept()
    again.welcome(T1)
    wait_until(storage.is_connected, "a connection")
    taking = Task(storage.new_oid)
    call = again.expect("new_oids")
    again.answer(call, [oid(1000), oid(1001)])
    assert taking.result() == oid(1000)
    assert storage.new_oid() == oid(1001)


# Calls that race the end ------------------------------------------------------------------------------


def calls(storage: ClientStorage) -> dict[str, Callable[[], Any]]:
    return {
        "loadBefore": lambda: storage.loadBefore(OID, T1),
        "load": lambda: storage.load(OID),
        "loadSerial": lambda: storage.loadSerial(OID, T1),
        "getTid": lambda: storage.getTid(OID),
        "history": lambda: storage.history(OID),
        "record_iternext": storage.record_iternext,
        "undoInfo": storage.undoInfo,
        "undoLog": storage.undoLog,
        "iterator": storage.iterator,
        "new_oid": storage.new_oid,
        "ping": storage.ping,
        "server_status": storage.server_status,
        "prefetch": lambda: storage.prefetch([OTHER, oid(44)], T1),
        "pack": lambda: storage.pack(1.0),
    }


def start_all(storage: ClientStorage, connection: ScriptedConnection) -> dict[str, Task]:
    """Every kind of call, each in a thread, all under way; a vote, and a begin that waits behind it."""
    meta = begin(storage, (OID, T1, b"data"))
    tasks = {name: Task(call) for name, call in calls(storage).items()}
    tasks["tpc_vote"] = Task(storage.tpc_vote, meta)
    for _ in range(len(tasks) + 1 + 2):  # prefetch makes two calls, begin and store are two more
        connection.expect()
    tasks["tpc_begin"] = Task(storage.tpc_begin, TransactionMetaData())
    assert tasks["tpc_begin"].is_held_up()
    return tasks


def test_closing_while_threads_wait_for_replies(scene: Scene) -> None:
    """A storage is closed while many threads are in the middle of calls: every one of them comes back."""
    storage, connection = scene.connected(T1, wait_timeout=60.0)
    tasks = start_all(storage, connection)
    Task(storage.close).result(PROMPT_S)
    outcomes = {name: type(task.outcome(PROMPT_S)) for name, task in tasks.items()}
    assert outcomes == dict.fromkeys(tasks, Disconnected)


def test_the_server_vanishes_while_threads_wait_for_replies(scene: Scene) -> None:
    """The connection is lost and does not come back. What can't be repeated fails at once; what can waits
    for another connection until its deadline, and fails then.
    """
    server = scene.server()
    storage, connection = scene.connected(T1, server=server, wait_timeout=1.5)
    tasks = start_all(storage, connection)
    server.stop_listening()
    connection.reset()
    outcomes = {name: task.outcome(PROMPT_S) for name, task in tasks.items()}
    assert {name: isinstance(outcome, Disconnected) for name, outcome in outcomes.items()} == dict.fromkeys(
        tasks, True
    )
    assert type(outcomes["tpc_vote"]) is Disconnected


@pytest.mark.parametrize("closing", [True, False], ids=["closed", "server gone"])
def test_calls_while_there_is_no_connection(scene: Scene, closing: bool) -> None:
    """Threads wait for a first connection that never comes."""
    server = scene.server()
    server.stop_listening()
    storage = scene.storage(server, wait_timeout=60.0 if closing else 0.3)
    tasks = {name: Task(call) for name, call in calls(storage).items()}
    if closing:
        assert tasks["ping"].is_held_up()
        Task(storage.close).result(PROMPT_S)
    for task in tasks.values():
        assert type(task.outcome(PROMPT_S)) is (Disconnected if closing else TimedOut)


@pytest.mark.parametrize("seed", range(12))
def test_a_storage_that_is_closed_under_load(scene: Scene, seed: int) -> None:
    """Eight threads call in a loop while it is closed. None hangs, and what they get is Disconnected."""
    storage, connection = scene.connected(T1, wait_timeout=60.0)

    def call_until_it_ends(number: int) -> Any:
        with contextlib.suppress(Disconnected):
            while True:
                storage.ping() if number % 2 else storage.loadBefore(oid(number), at(T1))
        return True

    tasks = [Task(call_until_it_ends, number) for number in range(8)]
    for _ in range(10 * seed):
        answer_any(connection)
    closing = Task(storage.close)
    with contextlib.suppress(AssertionError, OSError):
        while True:
            answer_any(connection)
    closing.result(PROMPT_S)
    assert all(task.result(PROMPT_S) for task in tasks)


def answer_any(connection: ScriptedConnection) -> Call:
    call = connection.expect(timeout_s=DEADLINE_S)
    connection.answer(call, None)
    return call


def test_connections_that_break_again_and_again_under_load(scene: Scene) -> None:
    """Threads read all the time while the server drops every connection after a few replies. Every read is
    answered in the end, and each by the right reply.
    """
    server = scene.server()
    storage = scene.storage(server)
    threads, rounds = 6, 25

    def read(number: int) -> bool:
        return all(
            storage.loadSerial(oid(number), oid(round_)) == oid(number) + oid(round_)
            for round_ in range(rounds)
        )

    tasks = [Task(read, number) for number in range(threads)]
    # The threads may have got the last replies before the last drop: serve until all are done.
    done = Task(lambda: all(task.result(60.0) for task in tasks))
    drops = 0
    while done.is_alive():
        try:
            connection = server.accept(timeout_s=0.5)
            connection.welcome(T1)
            for _ in range(3 + drops % 9):
                call = connection.expect("loadSerial", timeout_s=0.5)
                connection.answer(call, b"".join(call.args))
        except (AssertionError, OSError):
            continue
        connection.reset() if drops % 2 else connection.close()
        drops += 1
    assert done.result()
    assert drops > 5


def test_databases_under_load_see_one_history(tmp_path: Path) -> None:
    """Two processes' worth of ZODB databases write and read two objects that must always be equal. No reader
    ever sees them differ, nor goes back in time.
    """
    rounds = 20
    with zeoid.serve(tmp_path / "Data.fs") as server, contextlib.ExitStack() as stack:
        databases = []
        for number in range(2):
            databases.append(zeoid.DB(server.address))
            stack.callback(databases[-1].close)
            if number == 0:  # the other one begins with what is there
                with databases[0].transaction() as first:
                    first.root()["a"] = PersistentMapping(number=0)
                    first.root()["b"] = PersistentMapping(number=0)
        over = threading.Event()

        def write(database: ZODB.DB) -> int:
            manager = transaction.TransactionManager()
            connection = database.open(manager)
            conflicts = 0
            for _ in range(rounds):
                for _ in range(100):
                    try:
                        manager.begin()
                        root = connection.root()
                        number = root["a"]["number"] + 1
                        root["a"]["number"] = root["b"]["number"] = number
                        manager.commit()
                        break
                    except TransientError:
                        manager.abort()
                        conflicts += 1
                else:
                    raise AssertionError("a hundred conflicts in a row")
            connection.close()
            return conflicts

        def read(database: ZODB.DB) -> int:
            manager = transaction.TransactionManager()
            connection = database.open(manager)
            seen = 0
            while not over.is_set():
                manager.begin()
                try:
                    a, b = connection.root()["a"]["number"], connection.root()["b"]["number"]
                except TransientError:
                    manager.abort()
                    continue
                assert a == b >= seen
                seen = a
                connection.cacheMinimize()
            manager.abort()
            connection.close()
            return seen

        readers = [Task(read, database) for database in databases for _ in range(2)]
        writers = [Task(write, database) for database in databases]
        try:
            for task in writers:
                task.result(60.0)
        finally:
            over.set()
        for task in readers:
            assert task.result() <= 2 * rounds
        for database in databases:
            wait_until(partial(shows, database, 2 * rounds), "the last commit")


def shows(database: ZODB.DB, number: int) -> bool:
    with database.transaction() as connection:
        return bool(connection.root()["b"]["number"] == number)
