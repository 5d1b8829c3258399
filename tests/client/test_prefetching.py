"""Many objects with few messages, none of them twice: what is asked for and kept, and who waits for whom."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import transaction
from hypothesis import given
from hypothesis import strategies as st
from persistent.mapping import PersistentMapping
from ZODB.POSException import POSKeyError, StorageError

import zeoid
from tests.client.autoserver import AutoServer
from tests.client.interruptions import Interrupted, Interruption
from tests.client.scenes import (
    DEADLINE_S,
    OID,
    OTHER,
    T1,
    T2,
    T3,
    Scene,
    Task,
    at,
    is_cached,
    load,
    oid,
    tid,
)
from tests.peers import wait_until
from zeoid import ClientStorage, limits
from zeoid.cache.memory import MemoryCache
from zeoid.client.view import View
from zeoid.errors import Disconnected, ServerError, TimedOut
from zeoid.testing import Call, ScriptedConnection
from zeoid.wire.codec import codec_for

#: Much less than any deadline of a call here.
PROMPT_S = DEADLINE_S / 2
OIDS = [oid(number) for number in range(10)]
FOUND = b"data", T1, None
EXTENSIONS = ("loadBeforeMany",)


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is woken; looking again now and then is for threads that are interrupted."""
    monkeypatch.setattr(limits, "RECEIVE_TICK_S", 1000.0)


@pytest.fixture
def bulk(scene: Scene) -> tuple[ClientStorage, ScriptedConnection]:
    """A client whose server knows bulk loads."""
    return connect(scene)


def connect(scene: Scene, **keywords: Any) -> tuple[ClientStorage, ScriptedConnection]:
    server = scene.server()
    storage = scene.storage(server, **keywords)
    connection = server.accept()
    connection.welcome(T1, extensions=EXTENSIONS)
    wait_until(storage.is_connected, "a connection")
    return storage, connection


def expect_bulk(connection: ScriptedConnection, *oids: bytes, before: bytes = at(T1)) -> Call:
    call = connection.expect("loadBeforeMany")
    assert (list(call.args[0]), call.args[1]) == (list(oids), before)
    return call


def silent(connection: ScriptedConnection, storage: ClientStorage) -> None:
    """Nothing more was asked for."""
    pinging = Task(storage.ping)
    connection.answer(connection.expect("ping"), None)
    pinging.result()


# What is asked for, and kept --------------------------------------------------------------------------


def test_what_is_missing_is_asked_for_in_one_message(bulk: Any) -> None:
    storage, connection = bulk
    load(storage, connection, OIDS[2], at(T1), FOUND)
    fetching = Task(storage.prefetch, iter([OIDS[0], *OIDS[:5], OIDS[1]]), at(T1))
    wanted = [OIDS[0], OIDS[1], OIDS[3], OIDS[4]]
    connection.answer(expect_bulk(connection, *wanted), [FOUND, None, (b"old", T1, T2), FOUND])
    fetching.result()
    silent(connection, storage)
    assert storage.loadBefore(OIDS[0], at(T1)) == FOUND
    assert storage.loadBefore(OIDS[3], T2) == (b"old", T1, T2)
    assert [is_cached(storage, connection, each, at(T1)) for each in OIDS[:5]] == [
        True, False, True, True, True,
    ]  # fmt: skip


def test_nothing_is_asked_for_if_nothing_is_missing(bulk: Any) -> None:
    storage, connection = bulk
    load(storage, connection, OID, at(T1), FOUND)
    storage.prefetch([OID, OID], at(T1))
    storage.prefetch([], at(T1))
    silent(connection, storage)


def test_more_than_fits_in_one_message(bulk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window's messages are sent together; the next window follows when they are answered."""
    monkeypatch.setattr(limits, "PREFETCH_WINDOW", 7)
    monkeypatch.setattr(limits, "BULK_LOAD_OIDS", 3)
    storage, connection = bulk
    fetching = Task(storage.prefetch, OIDS, at(T1))
    calls = [expect_bulk(connection, *OIDS[start:stop]) for start, stop in ((0, 3), (3, 6), (6, 7))]
    for call in reversed(calls):  # in whatever order they are answered
        assert fetching.is_alive()
        connection.answer(call, [FOUND] * len(call.args[0]))
    connection.answer(expect_bulk(connection, *OIDS[7:]), [FOUND] * 3)
    fetching.result()
    assert all(is_cached(storage, connection, each, at(T1)) for each in OIDS)


def test_what_did_not_fit_in_a_reply_is_asked_for_again(bulk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BULK_LOAD_OIDS", 4)
    storage, connection = bulk
    fetching = Task(storage.prefetch, OIDS, at(T1))
    calls = [expect_bulk(connection, *OIDS[start : start + 4]) for start in (0, 4, 8)]
    connection.send(*(connection.reply(call, [FOUND]) for call in calls))
    left = [*OIDS[1:4], *OIDS[5:8], OIDS[9]]
    calls = [expect_bulk(connection, *left[start : start + 4]) for start in (0, 4)]
    connection.send(*(connection.reply(call, [FOUND] * 3) for call in calls))
    connection.answer(expect_bulk(connection, left[3]), [FOUND])
    fetching.result()
    silent(connection, storage)
    assert all(is_cached(storage, connection, each, at(T1)) for each in OIDS)


@pytest.mark.parametrize(
    "reply",
    [
        None, 5, b"data", {}, [], (FOUND, FOUND, FOUND), [FOUND, 5], [FOUND, (b"data", T1)],
        [("text", T1, None)], [FOUND, (b"data", None, None)], [(b"data", T1[1:], None)], [(None, T1, None)],
        [(b"data", T2, T1)], [(b"data", T1, T1)], [(b"data", T1, 5)], [(b"data", T1, T2[1:])], [[]],
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("others", [0, 1])
def test_an_answer_that_is_none(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, reply: Any, others: int
) -> None:
    """The caller is told, nothing of it is kept, the connection is given up, and the next one is asked."""
    monkeypatch.setattr(limits, "BULK_LOAD_OIDS", 2)
    storage, connection = connect(scene)
    fetching = Task(storage.prefetch, OIDS[: 2 + others], at(T1))
    calls = [connection.expect("loadBeforeMany") for _ in range(1 + others)]
    connection.answer(calls[0], reply)
    problem = fetching.outcome()
    assert isinstance(problem, ServerError), problem
    assert isinstance(problem, StorageError)
    assert connection.expect_end() == []
    assert len(storage._view.cache) == 0


def test_what_the_server_fails_at_is_left_to_the_load_that_needs_it(
    bulk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BULK_LOAD_OIDS", 2)
    storage, connection = bulk
    fetching = Task(storage.prefetch, OIDS[:4], at(T1))
    first, second = (expect_bulk(connection, *OIDS[start : start + 2]) for start in (0, 2))
    connection.send(connection.fault(first, StorageError("not now")), connection.reply(second, [FOUND] * 2))
    fetching.result()
    cached = [is_cached(storage, connection, each, at(T1)) for each in OIDS[:4]]
    assert cached == [False, False, True, True]


def test_the_next_server_need_not_know_bulk_loads(scene: Scene) -> None:
    """The connection is lost; what is still missing is asked for in the way that the next server knows."""
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.welcome(T1, extensions=EXTENSIONS)
    wait_until(storage.is_connected, "a connection")
    fetching = Task(storage.prefetch, OIDS[:3], at(T1))
    expect_bulk(connection, *OIDS[:3])
    connection.close()
    again = server.accept()
    again.welcome(T1)
    calls = [again.expect("loadBefore") for _ in range(3)]
    assert [call.args for call in calls] == [(each, at(T1)) for each in OIDS[:3]]
    again.send(*(again.reply(call, FOUND) for call in calls))
    fetching.result()


def test_a_server_that_does_not_answer(scene: Scene) -> None:
    storage, connection = connect(scene, wait_timeout=0.15)
    fetching = Task(storage.prefetch, OIDS, at(T1))
    expect_bulk(connection, *OIDS)
    assert isinstance(fetching.outcome(), TimedOut)


revisions = st.tuples(
    st.binary(max_size=300), st.sampled_from([T1, T2]), st.one_of(st.none(), st.just(T3))
)  # fmt: skip


@given(st.lists(st.one_of(st.none(), revisions), min_size=1, max_size=8), st.sampled_from([b"M5", b"Z5"]))
def test_a_reply_arrives_as_it_was_sent(reply: list[Any], coding: bytes) -> None:
    """In both codings, whatever is in it: the cache answers as the server does."""
    view = View(MemoryCache())
    view.begin(T2)
    *_, arrived = codec_for(coding).decode(codec_for(coding).encode(70_000, 0, ".reply", reply))
    oids = OIDS[: len(reply)]
    assert view.loaded_many((oids, view.mark, at(T2)), arrived) == len(reply)
    for each, revision in zip(oids, reply, strict=True):
        assert view.lookup(each, at(T2)) == revision


# Who waits for whom -----------------------------------------------------------------------------------


def test_two_threads_that_load_the_same_ask_once(bulk: Any) -> None:
    storage, connection = bulk
    first = Task(storage.loadBefore, OID, at(T1))
    call = connection.expect("loadBefore")
    others = [Task(storage.loadBefore, OID, at(T1)) for _ in range(3)]
    assert all(other.is_held_up() for other in others)
    connection.answer(call, FOUND)
    assert [task.result(PROMPT_S) for task in (first, *others)] == [FOUND] * 4
    silent(connection, storage)


@pytest.mark.parametrize("reply", [None, (bytes(1000), T1, None)], ids=["nothing", "too large to be kept"])
def test_they_need_no_cache_for_it(scene: Scene, reply: Any) -> None:
    storage, connection = connect(scene, cache_size_bytes=0)
    tasks = [Task(storage.loadBefore, OID, at(T1))]
    call = connection.expect("loadBefore")
    tasks.append(Task(storage.loadBefore, OID, at(T1)))
    assert tasks[1].is_held_up()
    connection.answer(call, reply)
    assert [task.result() for task in tasks] == [reply, reply]
    silent(connection, storage)


@pytest.mark.parametrize(
    ("what", "before"), [("the object", at(T1)), ("the tid", T1), ("both of it", tid(1))], ids=str
)
def test_what_differs_is_asked_for(bulk: Any, what: str, before: bytes) -> None:
    storage, connection = bulk
    first = Task(storage.loadBefore, OID, at(T1))
    call = connection.expect("loadBefore")
    other = Task(storage.loadBefore, OID if what == "the tid" else OTHER, before)
    connection.answer(connection.expect("loadBefore"), None)
    assert other.result() is None
    connection.answer(call, FOUND)
    assert first.result() == FOUND


def test_what_is_current_is_asked_for_each_time(bulk: Any) -> None:
    """A reply that was asked for earlier may be out of date: a commit that the caller knows of came since."""
    storage, connection = bulk
    tasks, calls = [], []
    for _ in range(2):
        tasks.append(Task(storage.load, OID))
        calls.append(connection.expect("loadBefore"))
    connection.send(connection.reply(calls[0], FOUND), connection.invalidation(T2, [OID]))
    assert tasks[0].result() == FOUND[:2]
    connection.answer(calls[1], (b"new", T2, None))
    assert tasks[1].result() == (b"new", T2)


def test_a_load_waits_for_the_part_of_a_prefetch_that_it_is_in(
    bulk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BULK_LOAD_OIDS", 2)
    storage, connection = bulk
    fetching = Task(storage.prefetch, OIDS[:6], at(T1))
    calls = [connection.expect("loadBeforeMany") for _ in range(3)]
    loading = Task(storage.loadBefore, OIDS[3], at(T1))
    assert loading.is_held_up()
    connection.answer(calls[0], [FOUND, FOUND])
    assert loading.is_held_up()
    connection.answer(calls[1], [FOUND, FOUND])
    assert loading.result() == FOUND
    assert fetching.is_alive()
    connection.answer(calls[2], [FOUND, FOUND])
    fetching.result()
    silent(connection, storage)


def test_a_load_of_what_a_prefetch_did_not_bring(bulk: Any) -> None:
    storage, connection = bulk
    fetching = Task(storage.prefetch, [OID, OTHER], at(T1))
    call = connection.expect("loadBeforeMany")
    loading = Task(storage.loadBefore, OTHER, at(T1))
    assert loading.is_held_up()
    connection.answer(call, [FOUND, None])
    single = connection.expect("loadBefore")
    connection.send(connection.fault(single, POSKeyError(OTHER)))
    assert isinstance(loading.outcome(), POSKeyError)
    fetching.result()


def test_a_prefetch_waits_for_what_others_are_loading(bulk: Any) -> None:
    storage, connection = bulk
    loading = Task(storage.loadBefore, OIDS[1], at(T1))
    single = connection.expect("loadBefore")
    first = Task(storage.prefetch, OIDS[:3], at(T1))
    one = expect_bulk(connection, OIDS[0], OIDS[2])
    second = Task(storage.prefetch, OIDS[:5], at(T1))
    two = expect_bulk(connection, OIDS[3], OIDS[4])
    connection.answer(two, [FOUND, FOUND])
    assert second.is_held_up()
    connection.answer(one, [FOUND, FOUND])
    assert first.is_held_up()
    connection.answer(single, FOUND)
    assert loading.result() == FOUND
    first.result()
    second.result()
    silent(connection, storage)
    assert all(is_cached(storage, connection, each, at(T1)) for each in OIDS[:5])


def test_a_prefetch_asks_for_what_others_did_not_get(bulk: Any) -> None:
    storage, connection = bulk
    loading = Task(storage.loadBefore, OID, at(T1))
    single = connection.expect("loadBefore")
    fetching = Task(storage.prefetch, [OID], at(T1))
    assert fetching.is_held_up()
    connection.send(connection.fault(single, StorageError("not now")))
    assert isinstance(loading.outcome(), StorageError)
    connection.answer(expect_bulk(connection, OID), [FOUND])
    fetching.result()
    assert is_cached(storage, connection, OID, at(T1))


def test_who_waits_asks_when_the_other_one_fails(bulk: Any) -> None:
    """Its error is its own."""
    storage, connection = bulk
    first = Task(storage.loadBefore, OID, at(T1))
    call = connection.expect("loadBefore")
    second = Task(storage.loadBefore, OID, at(T1))
    assert second.is_held_up()
    connection.send(connection.fault(call, StorageError("not now")))
    assert isinstance(first.outcome(), StorageError)
    connection.answer(connection.expect("loadBefore"), FOUND)
    assert second.result() == FOUND


def test_who_waits_asks_the_next_connection(scene: Scene) -> None:
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    tasks = [Task(storage.loadBefore, OID, at(T1))]
    connection.expect("loadBefore")
    tasks.append(Task(storage.loadBefore, OID, at(T1)))
    assert tasks[1].is_held_up()
    connection.close()
    again = server.accept()
    again.welcome(T1)
    answering = Task(answer_loads, again, FOUND)
    assert [task.result() for task in tasks] == [FOUND, FOUND]
    again.close()
    assert answering.result() in (1, 2), "one of them waits again, unless it comes too late"


def answer_loads(connection: ScriptedConnection, reply: Any) -> int:
    """Answer whatever loads come until the script closes the connection; how many."""
    count = 0
    while True:
        try:
            call = connection.expect("loadBefore", timeout_s=DEADLINE_S)
            connection.answer(call, reply)
        except (AssertionError, OSError):
            return count
        count += 1


def test_who_waits_for_a_closed_storage_is_told(bulk: Any) -> None:
    storage, connection = bulk
    tasks = [Task(storage.loadBefore, OID, at(T1))]
    connection.expect("loadBefore")
    tasks += [Task(storage.loadBefore, OID, at(T1)), Task(storage.prefetch, [OID], at(T1))]
    assert all(task.is_held_up() for task in tasks)
    storage.close()
    assert [type(task.outcome(PROMPT_S)) for task in tasks] == [Disconnected] * 3


def test_who_waits_has_a_deadline_of_its_own(bulk: Any) -> None:
    storage, connection = bulk
    first = Task(storage.loadBefore, OID, at(T1))
    call = connection.expect("loadBefore")
    storage._timeout_s = 0.15
    with pytest.raises(TimedOut, match=r"within 0\.15 s"):
        storage.loadBefore(OID, at(T1))
    with pytest.raises(TimedOut):
        storage.prefetch([OID], at(T1))
    connection.answer(call, FOUND)
    assert first.result() == FOUND


def test_who_waits_goes_on_when_the_other_ones_deadline_has_passed(bulk: Any) -> None:
    storage, connection = bulk
    storage._timeout_s = 0.3
    first = Task(storage.loadBefore, OID, at(T1))
    connection.expect("loadBefore")
    storage._timeout_s = DEADLINE_S
    second = Task(storage.loadBefore, OID, at(T1))
    assert isinstance(first.outcome(), TimedOut)
    connection.answer(connection.expect("loadBefore"), FOUND)
    assert second.result() == FOUND


def test_who_comes_too_late_to_wait_for_it_does_not(bulk: Any) -> None:
    """The other thread has given up, or was answered, between the look and the wait."""
    storage, connection = bulk
    channel = storage._link.ready
    storage._timeout_s = 0.5
    first = Task(storage.loadBefore, OID, at(T1))
    connection.expect("loadBefore")
    (given_up,) = channel.under_way()
    assert isinstance(first.outcome(), TimedOut)
    assert Task(channel.follow, given_up, DEADLINE_S).result(PROMPT_S) is False
    second = Task(storage.loadBefore, OTHER, at(T1))
    call = connection.expect("loadBefore")
    (answered,) = channel.under_way()
    connection.answer(call, FOUND)
    assert second.result() == FOUND
    assert Task(channel.follow, answered, DEADLINE_S).result(PROMPT_S) is True


@pytest.mark.parametrize("function", ["load", "prefetch"])
def test_who_waits_goes_on_when_the_other_thread_is_interrupted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Anywhere: between two steps of the one, the other may have begun to wait."""
    welcome = partialmethod(ScriptedConnection.welcome, extensions=EXTENSIONS)
    monkeypatch.setattr(ScriptedConnection, "welcome", welcome)
    monkeypatch.setattr(limits, "BULK_LOAD_OIDS", 4)
    monkeypatch.setattr(limits, "RECEIVE_TICK_S", 1.0)

    def answer(number: int, call: Call) -> Any:
        return [FOUND] * len(call.args[0]) if call.name == "loadBeforeMany" else FOUND

    for place in range(1, 1000):
        with AutoServer(answer) as server, closing(ClientStorage(server.address)) as storage:
            ask = partial(storage.loadBefore, OID) if function == "load" else partial(storage.prefetch, OIDS)
            interrupted = Interrupted(place, partial(ask, at(T1)), Interruption)
            other = Task(storage.loadBefore, OID if function == "load" else OIDS[-1], at(T1))
            interrupted.join(DEADLINE_S)
            assert other.result() == FOUND, interrupted.where
            storage.prefetch(OIDS, at(T1))
        if not interrupted.where:
            break
    assert place > 10


# With a real server and a real database ---------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Any) -> Iterator[Any]:
    with zeoid.serve(str(tmp_path / "Data.fs")) as server:
        yield server.address


@pytest.mark.parametrize("shared", [False, True], ids=["own cache", "shared cache"])
def test_a_zodb_connection_prefetches_what_it_is_about_to_need(
    served: Any, tmp_path: Path, shared: bool
) -> None:
    count = 3 * limits.BULK_LOAD_OIDS + 10
    database = zeoid.DB((served.host, served.port))
    try:
        with database.transaction() as connection:
            for number in range(count):
                connection.root()[number] = PersistentMapping(number=number)
        oids = [each._p_oid for each in database.open().root().values()]
    finally:
        database.close()
    gc.collect()

    options = {"cache_dir": str(tmp_path / "cache")} if shared else {}
    database = zeoid.DB((served.host, served.port), **options)
    try:
        manager = transaction.TransactionManager()
        connection = database.open(manager)
        objects = list(connection.root().values())
        assert all(each._p_changed is None for each in objects), "they are ghosts"
        before = database.storage.server_status()["loads"]
        connection.prefetch(objects[:5], objects[5:])
        assert database.storage.server_status()["loads"] == before + count
        assert sorted(each["number"] for each in objects) == list(range(count))
        connection.prefetch(oids)
        assert database.storage.server_status()["loads"] == before + count, "everything was there"
        manager.abort()
    finally:
        database.close()


def test_an_earlier_state_is_prefetched_for_who_began_before(served: Any) -> None:
    """The connection's transaction began before another client's commit: that is what it gets."""
    here, there = zeoid.DB((served.host, served.port)), zeoid.DB((served.host, served.port))
    try:
        with here.transaction() as connection:
            connection.root().update({number: PersistentMapping(state="old") for number in range(3)})
        manager = transaction.TransactionManager()
        wait_until(lambda: there.storage.lastTransaction() == here.storage.lastTransaction(), "the commit")
        reader = there.open(manager)
        objects = list(reader.root().values())
        with here.transaction() as connection:
            connection.root()[1]["state"] = "new"
        wait_until(lambda: there.storage.lastTransaction() == here.storage.lastTransaction(), "the commit")
        reader.prefetch(objects)
        before = there.storage.server_status()["loads"]
        assert [each["state"] for each in objects] == ["old"] * 3
        manager.begin()
        assert [each["state"] for each in objects] == ["old", "new", "old"]
        assert there.storage.server_status()["loads"] == before + 1
        manager.abort()
    finally:
        here.close()
        there.close()
