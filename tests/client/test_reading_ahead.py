"""What an application is about to load comes before it asks: what is asked for, in which order, how much."""

from __future__ import annotations

import io
import itertools
import pickle
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from BTrees.IOBTree import IOBTree
from persistent.mapping import PersistentMapping
from ZODB.FileStorage import FileStorage

import zeoid
from tests.client.scenes import OID, T1, T2, Scene, Task, at, is_cached, load, oid
from tests.client.test_prefetching import connect, expect_bulk, silent
from tests.peers import wait_until
from zeoid import ClientStorage, limits
from zeoid.client.reading_ahead import _Trail
from zeoid.testing import ScriptedConnection

OBJECTS = [oid(number) for number in range(100, 160)]


@pytest.fixture(autouse=True)
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load takes too long, and nobody looks again whether something has come."""
    monkeypatch.setattr(limits, "READ_AHEAD_SLOW_S", 0.0)
    monkeypatch.setattr(limits, "READ_AHEAD_SLOW_LOADS", 1)
    monkeypatch.setattr(limits, "RECEIVE_TICK_S", 1000.0)


@pytest.fixture
def bulk(scene: Scene) -> tuple[ClientStorage, ScriptedConnection]:
    return connect(scene)


class _Reference:
    def __init__(self, oid: bytes) -> None:
        self.oid = oid


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> bytes | None:
        return obj.oid if isinstance(obj, _Reference) else None


def record(*oids: bytes) -> tuple[bytes, bytes, None]:
    """A revision of an object that refers to these."""
    file = io.BytesIO()
    pickler = _Pickler(file, 3)
    pickler.dump(PersistentMapping)
    pickler.clear_memo()
    pickler.dump({"data": [_Reference(each) for each in oids]})
    return file.getvalue(), T1, None


LEAF = record()


def figures(storage: ClientStorage) -> tuple[int, int]:
    statistics = storage.cache_statistics()
    return statistics["read_ahead"], statistics["read_ahead_used"]


# What is asked for ------------------------------------------------------------------------------------


def test_what_a_loaded_object_refers_to_comes_ahead(bulk: Any) -> None:
    storage, connection = bulk
    first, second, missing = OBJECTS[:3]
    load(storage, connection, OID, at(T1), record(first, second, missing, first, OID))
    connection.answer(expect_bulk(connection, first, second, missing), [LEAF, LEAF, None])
    assert is_cached(storage, connection, first, at(T1))
    assert storage.loadBefore(second, at(T1)) == LEAF
    silent(connection, storage)
    assert figures(storage) == (3, 2)


def test_who_needs_what_is_under_way_reads_until_it_comes(bulk: Any) -> None:
    """Nobody else does, and it is not asked for again."""
    storage, connection = bulk
    load(storage, connection, OID, at(T1), record(OBJECTS[0]))
    call = expect_bulk(connection, OBJECTS[0])
    tasks = [Task(storage.loadBefore, OBJECTS[0], at(T1)) for _ in range(2)]
    assert all(task.is_held_up() for task in tasks)
    connection.answer(call, [LEAF])
    assert [task.result() for task in tasks] == [LEAF, LEAF]
    silent(connection, storage)
    assert figures(storage) == (1, 1)


def test_nothing_comes_ahead_on_a_fast_link(bulk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, connection = bulk
    monkeypatch.setattr(limits, "READ_AHEAD_SLOW_S", 1000.0)
    for each in OBJECTS[:5]:
        load(storage, connection, each, at(T1), record(OBJECTS[10]))
    silent(connection, storage)
    assert figures(storage) == (0, 0)


def test_a_link_is_slow_if_no_load_is_fast(bulk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded before that is known is followed, too."""
    storage, connection = bulk
    monkeypatch.setattr(limits, "READ_AHEAD_SLOW_LOADS", 3)
    load(storage, connection, OBJECTS[0], at(T1), record(OBJECTS[10]))
    load(storage, connection, OBJECTS[1], at(T1), record(OBJECTS[11]))
    monkeypatch.setattr(limits, "READ_AHEAD_SLOW_S", 1000.0)
    load(storage, connection, OBJECTS[2], at(T1), record(OBJECTS[12]))
    monkeypatch.setattr(limits, "READ_AHEAD_SLOW_S", 0.0)
    for number in (3, 4):
        load(storage, connection, OBJECTS[number], at(T1), record(OBJECTS[10 + number]))
        silent(connection, storage)
    load(storage, connection, OBJECTS[5], at(T1), record(OBJECTS[15]))
    wanted = [OBJECTS[number] for number in (15, 14, 13, 11, 10)]
    connection.answer(expect_bulk(connection, *wanted), [LEAF] * 5)


@pytest.mark.parametrize("keywords", [{"read_ahead": False}, {"cache_size_bytes": 0}], ids=str)
def test_it_can_be_switched_off(scene: Scene, keywords: dict[str, Any]) -> None:
    storage, connection = connect(scene, **keywords)
    for each in OBJECTS[:3]:
        load(storage, connection, each, at(T1), record(OBJECTS[10]))
    silent(connection, storage)


def test_what_was_used_is_followed_first(bulk: Any) -> None:
    """Then what stands behind it; what the application has passed over comes last."""
    storage, connection = bulk
    parts = OBJECTS[:4]
    load(storage, connection, OID, at(T1), record(*parts))
    children = [record(OBJECTS[10 + number], OBJECTS[20 + number]) for number in range(4)]
    connection.answer(expect_bulk(connection, *parts), children)
    silent(connection, storage)
    storage.loadBefore(parts[1], at(T1))
    order = [OBJECTS[number] for number in (11, 21, 12, 22, 13, 23, 10, 20)]
    connection.answer(expect_bulk(connection, *order), [LEAF] * 8)


def test_so_deep_and_no_deeper(bulk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_AHEAD_USES", 1)
    storage, connection = bulk
    chain = OBJECTS[:10]
    link = {each: record(following) for each, following in itertools.pairwise(chain)}
    leaves = OBJECTS[20:23]  # beside the chain, of which nothing is used
    load(storage, connection, OID, at(T1), record(chain[0], *leaves))
    connection.answer(expect_bulk(connection, chain[0], *leaves), [link[chain[0]], *[LEAF] * 3])
    reached: list[bytes] = []
    for used in leaves:
        silent(connection, storage)
        storage.loadBefore(used, at(T1))
        if len(reached) < limits.READ_AHEAD_DEPTH:
            following = chain[len(reached) + 1]
            connection.answer(expect_bulk(connection, following), [link[following]])
            reached.append(following)
    silent(connection, storage)
    assert len(reached) == limits.READ_AHEAD_DEPTH == 2


def test_a_large_number_goes_in_several_messages(bulk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BULK_LOAD_OIDS", 10)
    storage, connection = bulk
    load(storage, connection, OID, at(T1), record(*OBJECTS[:25]))
    for portion in (OBJECTS[:10], OBJECTS[10:20], OBJECTS[20:25]):
        connection.answer(expect_bulk(connection, *portion), [LEAF] * len(portion))
    silent(connection, storage)


def test_a_server_without_bulk_loads_is_asked_one_by_one(scene: Scene) -> None:
    storage, connection = scene.connected(T1)
    load(storage, connection, OID, at(T1), record(*OBJECTS[:3]))
    for each in OBJECTS[:3]:
        call = connection.expect("loadBefore")
        assert call.args[0] == each
        connection.answer(call, LEAF)
    silent(connection, storage)
    assert is_cached(storage, connection, OBJECTS[2], at(T1))


@pytest.mark.parametrize("data", [b"Q", b"nonsense Q", b"\x80\x03Q.", record(OBJECTS[0])[0][:-3]])
def test_a_record_that_can_not_be_read_leads_nowhere(bulk: Any, data: bytes) -> None:
    storage, connection = bulk
    load(storage, connection, OID, at(T1), (data, T1, None))
    silent(connection, storage)


def test_what_may_change_at_any_moment_leads_nowhere(bulk: Any) -> None:
    """Nothing that comes ahead could be taken from the cache for it."""
    storage, connection = bulk
    for each in OBJECTS[:3]:
        loading = Task(storage.load, each)
        connection.answer(connection.expect("loadBefore"), record(OBJECTS[10]))
        loading.result()
    silent(connection, storage)


def test_a_trail_keeps_nothing_of_what_was_used() -> None:
    trail = _Trail(OBJECTS[:3])
    trail.oids.popleft()
    trail.look_through(OBJECTS[0], OBJECTS[10:20])
    for each in OBJECTS[10:20]:
        assert trail.go_on_from(each, ())
    assert list(trail.oids) == OBJECTS[1:3]
    assert not trail.depths


# How much ---------------------------------------------------------------------------------------------


def test_what_does_not_pay_ends(bulk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first few, one record comes for so many loads."""
    storage, connection = bulk
    counts = []
    for number in range(60):
        unused = [oid(1000 + 10 * number + each) for each in range(10)]
        task = Task(storage.loadBefore, OBJECTS[number], at(T1))
        connection.answer(connection.expect("loadBefore"), record(*unused))
        task.result()
        pinging = Task(storage.ping)
        call = connection.expect("ping", "loadBeforeMany")
        if call.name != "ping":
            counts.append(len(call.args[0]))
            connection.answer(call, [LEAF] * len(call.args[0]))
            call = connection.expect("ping")
        connection.answer(call, None)
        pinging.result()
    assert sum(counts) <= limits.READ_AHEAD_FIRST + 60 * limits.READ_AHEAD_CREDIT_OF_A_LOAD
    assert set(counts[8:]) == {1}, "and it does not end for ever"


def test_what_pays_grows(bulk: Any) -> None:
    """Ever more of a long list comes ahead, and so early that no load asks for it."""
    storage, connection = bulk
    parts = [oid(1000 + number) for number in range(500)]
    counts = []

    def answer() -> None:
        """Until there is a ping."""
        while (call := connection.expect("loadBeforeMany", "ping")).name != "ping":
            counts.append(len(call.args[0]))
            connection.answer(call, [LEAF] * counts[-1])
        connection.answer(call, None)

    def use_all() -> None:
        for each in parts:
            assert storage.loadBefore(each, at(T1)) == LEAF
        storage.ping()

    load(storage, connection, OID, at(T1), record(*parts))
    using = Task(use_all)
    answer()
    using.result()
    assert sum(counts) == 500
    assert max(counts) >= 3 * counts[0]
    assert figures(storage) == (500, 500)


def test_no_more_than_there_is_room_for(scene: Scene) -> None:
    """An eighth of the cache: what came first no longer counts as unused, and nothing is lost by it."""
    storage, connection = connect(scene, cache_size_bytes=80_000)
    load(storage, connection, OID, at(T1), record(*OBJECTS[:30]))
    big = (b"x" * 1000, T1, None)
    connection.answer(expect_bulk(connection, *OBJECTS[:30]), [big] * 30)
    silent(connection, storage)
    assert 5 <= len(storage._ahead.unused) <= 10
    assert storage._ahead._unused_bytes == sum(storage._ahead.unused.values()) <= 10_000


# What may come in between -----------------------------------------------------------------------------


def test_what_was_committed_meanwhile_is_not_kept_as_current(bulk: Any) -> None:
    storage, connection = bulk
    load(storage, connection, OID, at(T1), record(*OBJECTS[:2]))
    call = expect_bulk(connection, *OBJECTS[:2])
    connection.send(connection.invalidation(T2, [OBJECTS[0]]), connection.reply(call, [LEAF, LEAF]))
    silent(connection, storage)
    assert not is_cached(storage, connection, OBJECTS[0], at(T2))
    assert storage.loadBefore(OBJECTS[0], at(T1)) == (LEAF[0], T1, T2)
    assert storage.loadBefore(OBJECTS[1], at(T2)) == LEAF


def test_a_fault_is_for_whoever_needs_the_object(bulk: Any) -> None:
    storage, connection = bulk
    load(storage, connection, OID, at(T1), record(OBJECTS[0]))
    connection.send(connection.fault(expect_bulk(connection, OBJECTS[0]), ValueError("no")))
    silent(connection, storage)
    assert load(storage, connection, OBJECTS[0], at(T1), LEAF) == LEAF
    silent(connection, storage)


def test_what_breaks_the_protocol_ends_the_connection(scene: Scene) -> None:
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.welcome(T1, extensions=("loadBeforeMany",))
    wait_until(storage.is_connected, "a connection")
    load(storage, connection, OID, at(T1), record(OBJECTS[0]))
    connection.answer(expect_bulk(connection, OBJECTS[0]), [("no", "revision", 3)])
    loading = Task(storage.loadBefore, OBJECTS[0], at(T1))
    again = server.accept()
    again.welcome(T1, extensions=("loadBeforeMany",))
    again.answer(again.expect("loadBefore"), LEAF)
    assert loading.result() == LEAF


def test_a_new_connection_is_asked_again(scene: Scene) -> None:
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.welcome(T1, extensions=("loadBeforeMany",))
    wait_until(storage.is_connected, "a connection")
    load(storage, connection, OID, at(T1), record(*OBJECTS[:2]))
    expect_bulk(connection, *OBJECTS[:2])
    connection.close()
    again = server.accept()
    again.welcome(T1, extensions=("loadBeforeMany",))
    wait_until(storage.is_connected, "a connection")
    load(storage, again, OBJECTS[10], at(T1), record(*OBJECTS[:2]))
    again.answer(expect_bulk(again, *OBJECTS[:2]), [LEAF, LEAF])
    silent(again, storage)


# The real thing ---------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[str]:
    """The address of a server with a tree of 2,000 objects whose numbers sum up to nothing."""
    data_file = FileStorage(str(tmp_path / "Data.fs"))
    with closing(ZODB.DB(data_file)) as database, database.transaction() as connection:
        tree = connection.root()["tree"] = IOBTree()
        for number in range(2000):
            tree[number] = PersistentMapping(number=0)
    with zeoid.serve(str(tmp_path / "Data.fs")) as server:
        yield server.address


def total(connection: Any) -> int:
    return sum(each["number"] for each in connection.root()["tree"].values())


def test_a_tree_is_gone_through_with_few_loads(tree: str) -> None:
    with closing(zeoid.DB(tree)) as database, closing(database.open()) as connection:
        assert total(connection) == 0
        statistics = database.storage.cache_statistics()
        assert statistics["read_ahead_used"] > 1900
        assert statistics["read_ahead_used"] > 0.9 * statistics["read_ahead"]


def test_readers_see_whole_transactions(tree: str) -> None:
    """While others move numbers about in the tree, whatever comes ahead."""
    seed = random.randrange(1 << 32)
    rounds = 40

    def move() -> None:
        chance = random.Random(seed)
        with closing(zeoid.DB(tree)) as database, closing(database.open()) as connection:
            entries = connection.root()["tree"]
            for _ in range(rounds):
                transaction.begin()
                for _ in range(20):
                    amount = chance.randrange(100)
                    entries[chance.randrange(2000)]["number"] -= amount
                    entries[chance.randrange(2000)]["number"] += amount
                transaction.commit()

    moving = Task(move)
    sums = []
    with closing(zeoid.DB(tree, cache_size_bytes=200_000)) as database:
        while moving.is_alive() or len(sums) < 3:
            with closing(database.open()) as connection:
                sums.append(total(connection))
                connection.cacheMinimize()
        assert database.storage.cache_statistics()["read_ahead_used"] > 1000
    moving.result(60.0)
    assert set(sums) == {0}, f"seed {seed}"
