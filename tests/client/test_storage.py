"""The ZODB face of the client: what each method asks and gives, its errors, and that every wait ends."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partialmethod
from types import FrameType
from typing import Any

import pytest
import zope.interface
import zope.interface.verify
from transaction.interfaces import TransientError
from ZODB import interfaces
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IStorage
from ZODB.POSException import (
    POSKeyError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
)

import zeoid
from tests.client.autoserver import AutoServer
from tests.client.interruptions import Interruption, at_place
from tests.client.scenes import (
    DEADLINE_S,
    GRACE_S,
    OID,
    OTHER,
    T1,
    T2,
    T3,
    T4,
    Held,
    Scene,
    Task,
    at,
    is_cached,
    load,
    oid,
)
from tests.peers import wait_until
from zeoid import ClientStorage, limits
from zeoid.errors import ConfigurationError, Disconnected, ServerError, TimedOut
from zeoid.model import MAX_TID, NO_TID
from zeoid.testing import INFO, ScriptedConnection
from zeoid.wire.messages import EXTENSIONS

SHORT_S = 0.15
PROMPT_S = 5.0


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONNECT_FIRST_S", 0.01)
    monkeypatch.setattr(limits, "RECONNECT_LAST_S", 0.02)


def meta() -> TransactionMetaData:
    return TransactionMetaData("user", "description", {"k": "v"})


def asked(
    connection: ScriptedConnection, function: Callable[[], Any], name: str, args: tuple[Any, ...], answer: Any
) -> Any:
    """What *function* gives when the server is asked *name* with *args* and answers so."""
    task = Task(function)
    call = connection.expect(name)
    assert (call.args, call.one_way) == (args, False)
    if isinstance(answer, Exception):
        connection.send(connection.fault(call, answer))
    else:
        connection.answer(call, answer)
    return task.result()


# Making one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"read_only": True, "read_only_fallback": True}, "exclude each other"),
        ({"coding": "Z4"}, "coding must be M5 or Z5"),
        ({"coding": ""}, "coding must be M5 or Z5"),
    ],
)
def test_options_that_do_not_fit(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClientStorage(("127.0.0.1", 1), wait=False, **keywords)


@pytest.mark.parametrize("address", ["nowhere", "host:port", ("host", "1"), [], "", None, 4.5, True])
def test_addresses_that_are_none(address: Any) -> None:
    with pytest.raises(ConfigurationError):
        ClientStorage(address, wait=False)


def test_a_storage_that_could_not_connect_leaves_nothing_behind(scene: Scene) -> None:
    before = set(threading.enumerate())
    server = scene.server()
    server.stop_listening()
    with pytest.raises(TimedOut):
        ClientStorage(server.address, wait_timeout=SHORT_S)
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")


def test_names(scene: Scene) -> None:
    server = scene.server()
    storage, _ = scene.connected(server=server, name="zoo")
    host, port = server.address
    assert storage.__name__ == "zoo"
    assert storage.getName() == f"zoo (connected to {host}:{port})"
    assert storage.sortKey() == f"1:{host}:{port}"
    assert bool(storage)


def test_the_same_database_sorts_the_same_in_every_process(scene: Scene) -> None:
    """Transactions over several databases lock them in one order, whatever the clients are called."""
    server = scene.server()
    first, _ = scene.connected(server=server, name="a")
    second, _ = scene.connected(server=server, name="b")
    assert first.sortKey() == second.sortKey()


def test_what_the_storage_provides(scene: Scene) -> None:
    server = scene.server()
    storage = scene.storage(server)
    assert zope.interface.verify.verifyObject(IStorage, storage)
    assert interfaces.IMultiCommitStorage.providedBy(storage)
    assert not interfaces.IStorageUndoable.providedBy(storage)
    info = {
        **INFO,
        "length": 3,
        "size": 1234,
        "supportsUndo": True,
        "interfaces": (
            ("ZODB.interfaces", "IStorageUndoable"),
            ("ZODB.interfaces", "IBlobStorage"),
            ("os", "system"),
        ),
    }
    server.accept().welcome(T1, info=info)
    wait_until(storage.is_connected, "a connection")
    assert interfaces.IStorageUndoable.providedBy(storage)
    assert not interfaces.IBlobStorage.providedBy(storage), "what the client can't do, it does not promise"
    assert storage.supportsUndo()
    assert storage.getSize() == 1234


# Reading ----------------------------------------------------------------------------------------------


def test_reading(scene: Scene) -> None:
    storage, connection = scene.connected(T2)
    assert asked(connection, lambda: storage.getTid(OID), "getTid", (OID,), T1) == T1
    assert asked(connection, lambda: storage.loadSerial(OID, T1), "loadSerial", (OID, T1), b"d") == b"d"
    entries = ({"tid": T1, "size": 4, "user_name": b"", "description": b"", "time": 1.5},)
    assert asked(connection, lambda: storage.history(OID, 3), "history", (OID, 3), entries) == list(entries)
    record = (OID, T1, b"d", OTHER)
    assert asked(connection, storage.record_iternext, "record_iternext", (None,), record) == record
    entries = ({"id": b"x"},)
    assert asked(connection, lambda: storage.undoLog(1, 5), "undoLog", (1, 5), entries) == list(entries)
    wanted = {"user_name": b"x"}
    assert asked(connection, lambda: storage.undoInfo(0, 9, wanted), "undoInfo", (0, 9, wanted), ()) == []
    assert storage.undoLog(filter=lambda entry: True) == []
    assert asked(connection, storage.server_status, "server_status", (), {"loads": 1}) == {"loads": 1}
    assert asked(connection, storage.ping, "ping", (), None) is None


def test_loading(scene: Scene) -> None:
    storage, connection = scene.connected(T2)
    assert load(storage, connection, OID, at(T2), (b"data", T1, None)) == (b"data", T1, None)
    assert storage.loadBefore(OID, at(T2)) == (b"data", T1, None)  # without a question
    assert load(storage, connection, OTHER, T1, None) is None
    assert load(storage, connection, OTHER, T1, None) is None, "that there is nothing is not remembered"
    gone = POSKeyError(OTHER)
    with pytest.raises(POSKeyError):
        asked(connection, lambda: storage.loadBefore(OTHER, T2), "loadBefore", (OTHER, T2), gone)


def test_loading_what_is_current(scene: Scene) -> None:
    """The server may know a newer revision than the cache: it is asked."""
    storage, connection = scene.connected(T1)
    load(storage, connection, OID, at(T1), (b"old", T1, None))
    for answer in [(b"new", T2, None), (b"newer", T3, None)]:
        found = asked(connection, lambda: storage.load(OID), "loadBefore", (OID, MAX_TID), answer)
        assert found == answer[:2]
    with pytest.raises(POSKeyError):
        asked(connection, lambda: storage.load(OTHER), "loadBefore", (OTHER, MAX_TID), None)


@pytest.mark.parametrize("reply", [5, (b"data",), ("text", T1, None), (b"data", None, None)], ids=repr)
def test_an_answer_that_is_no_revision(scene: Scene, reply: Any) -> None:
    """The caller is told, the connection is given up, and the next one is asked."""
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    with pytest.raises(StorageError, match="no revision"):
        load(storage, connection, OID, at(T1), reply)
    assert connection.expect_end() == []
    again = server.accept()
    again.welcome(T1)
    assert load(storage, again, OID, at(T1), (b"data", T1, None)) == (b"data", T1, None)


def test_prefetching_asks_for_what_is_missing_together(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PREFETCH_WINDOW", 4)
    storage, connection = scene.connected(T1)
    oids = [oid(number) for number in range(10)]
    load(storage, connection, oids[3], at(T1), (b"data", T1, None))
    fetching = Task(storage.prefetch, iter(oids), at(T1))
    for window in (oids[:3] + oids[4:5], oids[5:9], oids[9:]):
        calls = [connection.expect("loadBefore") for _ in window]
        assert [call.args for call in calls] == [(each, at(T1)) for each in window]
        connection.send(
            *(
                connection.fault(call, POSKeyError(call.args[0]))
                if call.args[0] == oids[7]
                else connection.reply(call, (b"data", T1, None))
                for call in calls
            )
        )
    fetching.result()
    cached = [is_cached(storage, connection, each, at(T1)) for each in oids]
    assert cached == [each != oids[7] for each in oids]


def test_prefetching_nothing(scene: Scene) -> None:
    storage, connection = scene.connected(T1)
    storage.prefetch([], at(T1))
    asked(connection, storage.ping, "ping", (), None)


def test_synchronising_applies_what_has_arrived(scene: Scene) -> None:
    """At least what arrived before a reply that this thread has had."""
    storage, connection = scene.connected(T1)
    for number in range(30):
        last = (int.from_bytes(T1, "big") + number + 1).to_bytes(8, "big")
        connection.send(connection.invalidation(last, [OID]))
        asked(connection, storage.ping, "ping", (), None)
        storage.sync()
        assert storage.lastTransaction() == last


def test_synchronising_with_the_server(scene: Scene) -> None:
    storage, connection = scene.connected(T1, server_sync=True)
    syncing = Task(storage.sync)
    call = connection.expect("ping")
    connection.send(connection.invalidation(T2, [OID]), connection.reply(call, None))
    syncing.result()
    assert storage.lastTransaction() == T2


def test_synchronising_without_a_connection(scene: Scene) -> None:
    server = scene.server()
    server.stop_listening()
    scene.storage(server).sync()


def test_the_number_of_objects_without_a_connection(scene: Scene) -> None:
    server = scene.server()
    storage, connection = scene.connected(T1, server=server, wait_timeout=SHORT_S)
    assert asked(connection, lambda: len(storage), "get_info", (), {"length": 7}) == 7
    server.stop_listening()
    connection.close()
    assert len(storage) == 7


def test_packing(scene: Scene) -> None:
    storage, connection = scene.connected(T1, wait_timeout=SHORT_S)
    packing = Task(storage.pack, 100_000.0, None, days=1)
    call = connection.expect("pack")
    assert call.args == (100_000.0 - 86_400, True)
    packing._thread.join(SHORT_S + GRACE_S)
    assert packing.is_alive(), "a pack may take longer than other calls"
    connection.answer(call, None)
    packing.result()
    asked(connection, lambda: storage.pack(5.0, wait=False), "pack", (5.0, False), None)
    packing = Task(storage.pack)
    call = connection.expect("pack")
    assert abs(call.args[0] - time.time()) < 60
    connection.send(connection.fault(call, StorageError("no room")))
    with pytest.raises(StorageError, match="no room"):
        packing.result()


def test_how_far_a_pack_is_and_giving_it_up(scene: Scene) -> None:
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.welcome(T1, extensions=EXTENSIONS)
    wait_until(storage.is_connected, "a connection")
    status = {"number": 1, "state": "running"}
    assert asked(connection, storage.pack_status, "pack_status", (), status) == status
    assert asked(connection, storage.cancel_pack, "pack_cancel", (), None) is None
    with pytest.raises(StorageError, match=r"^it is too late$"):
        asked(connection, storage.cancel_pack, "pack_cancel", (), "it is too late")


def test_a_stock_server_tells_nothing_of_its_packs(scene: Scene) -> None:
    """It is not even asked: it would close the connection."""
    storage, connection = scene.connected(T1)
    assert storage.pack_status() is None
    with pytest.raises(ServerError, match="can't cancel"):
        storage.cancel_pack()
    asked(connection, storage.ping, "ping", (), None)


# Every wait ends --------------------------------------------------------------------------------------


def reads(storage: ClientStorage) -> dict[str, Callable[[], Any]]:
    return {
        "load": lambda: storage.load(OID),
        "loadBefore": lambda: storage.loadBefore(OID, T1),
        "loadSerial": lambda: storage.loadSerial(OID, T1),
        "getTid": lambda: storage.getTid(OID),
        "history": lambda: storage.history(OID),
        "record_iternext": storage.record_iternext,
        "undoLog": storage.undoLog,
        "undoInfo": storage.undoInfo,
        "iterator": storage.iterator,
        "prefetch": lambda: storage.prefetch([OTHER, oid(44)], T1),
        "ping": storage.ping,
        "sync": storage.sync,
        "server_status": storage.server_status,
        "new_oid": storage.new_oid,
        "pack, not waiting": lambda: storage.pack(1.0, wait=False),
    }


def test_a_server_that_never_answers(scene: Scene) -> None:
    """Every kind of call ends at its deadline, with an error that a publisher tries again after."""
    storage, _ = scene.connected(T1, wait_timeout=SHORT_S, server_sync=True)
    tasks = {name: Task(call) for name, call in reads(storage).items()}
    transaction = meta()
    storage.tpc_begin(transaction)
    tasks["tpc_vote"] = Task(storage.tpc_vote, transaction)
    tasks["another tpc_begin"] = Task(storage.tpc_begin, meta())
    for name, task in tasks.items():
        outcome = task.outcome(PROMPT_S)
        assert isinstance(outcome, TimedOut), name
        assert isinstance(outcome, StorageError)
        assert isinstance(outcome, TransientError)
        assert "0.15 s" in str(outcome)
    storage.tpc_abort(transaction)


def test_without_a_server(scene: Scene) -> None:
    server = scene.server()
    server.stop_listening()
    storage = scene.storage(server, wait_timeout=SHORT_S, server_sync=True)
    tasks = {name: Task(call) for name, call in reads(storage).items()}
    tasks["tpc_begin"] = Task(storage.tpc_begin, meta())
    for name, task in tasks.items():
        assert isinstance(task.outcome(PROMPT_S), TimedOut), name
    assert storage.lastTransaction() == NO_TID


def test_a_connection_whose_end_is_noticed_late(scene: Scene) -> None:
    """Whoever finds it dead does not go round in circles beyond the deadline."""
    storage, connection = scene.connected(T1, wait_timeout=SHORT_S)
    held = Held()
    link = storage._link
    channel = link.ready
    assert channel is not None
    channel._on_death = lambda problem: held.stop_here()
    dying = Task(channel.close)
    held.wait_for_entry()
    try:
        for read in (storage.ping, lambda: storage.loadBefore(OID, at(T1))):
            assert isinstance(Task(read).outcome(PROMPT_S), Disconnected)
    finally:
        held.let_go()
    dying.result()
    assert connection.expect_end() == []


# Writing ----------------------------------------------------------------------------------------------


def test_new_oids_come_by_the_hundred(scene: Scene) -> None:
    storage, connection = scene.connected(T1)
    assert asked(connection, storage.new_oid, "new_oids", (100,), [oid(1), oid(2), oid(3)]) == oid(1)
    assert [storage.new_oid(), storage.new_oid()] == [oid(2), oid(3)]
    assert asked(connection, storage.new_oid, "new_oids", (100,), [oid(4)]) == oid(4)


@pytest.mark.parametrize("answer", [(), None, 5, ("text",), (b"short",)], ids=repr)
def test_new_oids_that_are_none(scene: Scene, answer: Any) -> None:
    storage, connection = scene.connected(T1)
    with pytest.raises(StorageError, match="no object ids"):
        asked(connection, storage.new_oid, "new_oids", (100,), answer)
    assert asked(connection, storage.new_oid, "new_oids", (100,), [oid(4)]) == oid(4)


@pytest.mark.parametrize("when", ["before the call", "after the reply"])
def test_the_connection_changes_while_an_oid_is_taken(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The pool of the old server is not used up on the new one."""
    numbers = itertools.count(1)

    def answer(connection: int, call: Any) -> Any:
        return [oid(1_000_000 * connection + next(numbers)) for _ in range(100)]

    with AutoServer(answer) as server, closing(ClientStorage(server.address)) as storage:
        ask = storage._read

        def change() -> None:
            monkeypatch.undo()
            before = storage._link.generation
            server.drop()
            wait_until(lambda: storage._link.generation > before and storage.is_connected(), "another")

        def changing(*args: Any) -> Any:
            if when == "before the call":
                change()
                return ask(*args)
            reply = ask(*args)
            change()
            return reply

        monkeypatch.setattr(storage, "_read", changing)
        Task(storage.new_oid).result()
        assert all(Task(storage.new_oid).result() > oid(2_000_000) for _ in range(3))


def test_a_storage_that_may_only_be_read(scene: Scene) -> None:
    storage, connection = scene.connected(T1, read_only=True)
    transaction = meta()
    for write in (
        storage.new_oid,
        lambda: storage.tpc_begin(transaction),
        lambda: storage.store(OID, T1, b"", "", transaction),
        lambda: storage.restore(OID, T1, b"", "", None, transaction),
        lambda: storage.deleteObject(OID, T1, transaction),
        lambda: storage.undo(b"id", transaction),
        lambda: storage.checkCurrentSerialInTransaction(OID, T1, transaction),
        lambda: storage.tpc_vote(transaction),
        lambda: storage.tpc_finish(transaction),
    ):
        with pytest.raises(ReadOnlyError):
            write()
    storage.tpc_abort(transaction)
    asked(connection, storage.ping, "ping", (), None)


def test_a_transaction_that_was_not_begun(scene: Scene) -> None:
    storage, connection = scene.connected(T1)
    transaction = meta()
    for write in (
        lambda: storage.store(OID, T1, b"", "", transaction),
        lambda: storage.undo(b"id", transaction),
        lambda: storage.tpc_vote(transaction),
        lambda: storage.tpc_finish(transaction),
    ):
        with pytest.raises(StorageTransactionError):
            write()
    storage.tpc_abort(transaction)
    storage.tpc_begin(transaction)
    with pytest.raises(StorageTransactionError, match="Duplicate"):
        storage.tpc_begin(transaction)
    assert storage.tpc_transaction() is transaction
    storage.tpc_abort(transaction)
    assert storage.tpc_transaction() is None
    asked(connection, storage.ping, "ping", (), None)


def test_one_transaction_at_a_time(scene: Scene) -> None:
    storage, _ = scene.connected(T1)
    first, second = meta(), meta()
    storage.tpc_begin(first)
    beginning = Task(storage.tpc_begin, second)
    assert beginning.is_held_up()
    storage.tpc_abort(first)
    beginning.result()
    storage.tpc_abort(first)  # which is over: it must not end the other one's turn
    third = Task(storage.tpc_begin, meta())
    assert third.is_held_up()
    storage.tpc_abort(second)
    third.result()


def extended(scene: Scene, **keywords: Any) -> tuple[ClientStorage, ScriptedConnection]:
    """A client of a server that has the extensions."""
    server = scene.server()
    storage = scene.storage(server, **keywords)
    connection = server.accept()
    connection.welcome(T1, extensions=EXTENSIONS)
    wait_until(storage.is_connected, "a connection")
    return storage, connection


def test_transactions_side_by_side(scene: Scene) -> None:
    """On a server that has the extensions: they are prepared at once, and finished in any order."""
    storage, connection = extended(scene)
    transactions = [meta() for _ in range(3)]
    for number, transaction in enumerate(transactions):
        storage.tpc_begin(transaction)
        storage.store(oid(number), NO_TID, b"%d" % number, "", transaction)
    votes = [Task(storage.tpc_vote, transaction) for transaction in transactions]
    calls = {call.args[2][0][1]: call for call in [connection.expect("tpc_prepare") for _ in votes]}
    for number in (2, 0, 1):
        connection.answer(calls[oid(number)], [])
        votes[number].result()
    ended: list[bytes] = []
    finishes = [Task(storage.tpc_finish, transaction, ended.append) for transaction in transactions]
    numbers = {calls[oid(number)].args[0]: number for number in range(3)}
    tids = {}
    for last in (T2, T3, T4):
        call = connection.expect("tpc_finish")
        tids[numbers[call.args[0]]] = last
        connection.answer(call, last)
    assert [finish.result() for finish in finishes] == [tids[number] for number in range(3)]
    assert ended == [T2, T3, T4]
    for number in range(3):
        assert storage.loadBefore(oid(number), at(T4)) == (b"%d" % number, tids[number], None)
    assert storage.tpc_transaction() is None


def test_no_more_transactions_side_by_side_than_a_server_allows(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TRANSACTIONS_PER_CONNECTION", 3)
    storage, _ = extended(scene)
    transactions = [meta() for _ in range(3)]
    for transaction in transactions:
        storage.tpc_begin(transaction)
    waiting = [Task(storage.tpc_begin, meta()) for _ in range(2)]
    assert all(task.is_held_up() for task in waiting)
    storage.tpc_abort(transactions[0])
    storage.tpc_abort(transactions[1])
    for task in waiting:
        task.result(PROMPT_S)


def test_waiting_for_a_turn_on_a_server_that_gives_way_to_another(scene: Scene) -> None:
    """Whoever waited goes on the connection that there is then, in its way of speaking."""
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    first, second = meta(), meta()
    storage.tpc_begin(first)
    beginning = Task(storage.tpc_begin, second)
    assert beginning.is_held_up()
    connection.close()
    again = server.accept()
    again.welcome(T1, extensions=EXTENSIONS)
    wait_until(storage.is_connected, "a connection")
    storage.tpc_abort(first)
    beginning.result(PROMPT_S)
    voting = Task(storage.tpc_vote, second)
    again.answer(again.expect("tpc_prepare"), [])
    voting.result()


def test_a_turn_passes_on_when_who_was_told_of_it_fails(scene: Scene) -> None:
    """One that waited is told that it may go, but can't; the next one may."""
    storage, _ = scene.connected(T1)
    first = meta()
    storage.tpc_begin(first)
    unsendable = Task(storage.tpc_begin, TransactionMetaData("", "", {"k": object()}))
    assert unsendable.is_held_up()
    beginning = Task(storage.tpc_begin, meta())
    assert beginning.is_held_up()
    storage.tpc_abort(first)
    assert isinstance(unsendable.outcome(PROMPT_S), zeoid.errors.UnsendableValue)
    beginning.result(PROMPT_S)


def test_a_turn_is_not_lost_on_who_was_interrupted_as_it_began_to_wait(scene: Scene) -> None:
    """Its place in the queue stays behind."""
    storage, _ = scene.connected()
    first, second, third = meta(), meta(), meta()
    storage.tpc_begin(first)

    def interrupt(frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_return" and frame.f_code is threading.Condition._release_save.__code__:
            sys.setprofile(None)
            raise KeyboardInterrupt

    def interrupted() -> None:
        sys.setprofile(interrupt)
        storage.tpc_begin(second)

    assert isinstance(Task(interrupted).outcome(), BaseException)
    waiting = Task(storage.tpc_begin, third)
    wait_until(lambda: storage._turns._waiting == 2, "the third one waits")
    storage.tpc_abort(first)
    waiting.result(PROMPT_S)


def test_closing_wakes_who_waits_for_their_turn(scene: Scene) -> None:
    storage, _ = scene.connected(T1, wait_timeout=60.0)
    storage.tpc_begin(meta())
    waiting = [Task(storage.tpc_begin, meta()) for _ in range(3)]
    assert all(task.is_held_up() for task in waiting)
    storage.close()
    for task in waiting:
        assert type(task.outcome(PROMPT_S)) is Disconnected


def test_a_transaction_that_cannot_be_begun_ends_its_turn(scene: Scene) -> None:
    storage, _ = scene.connected(T1)
    with pytest.raises(zeoid.errors.UnsendableValue):
        storage.tpc_begin(TransactionMetaData("", "", {"k": object()}))
    Task(storage.tpc_begin, meta()).result()


@pytest.mark.parametrize("extensions", [(), EXTENSIONS], ids=["stock", "extended"])
def test_a_transaction_that_is_interrupted_anywhere(
    monkeypatch: pytest.MonkeyPatch, extensions: tuple[str, ...]
) -> None:
    """Ctrl-C at every place of a commit. The transaction is aborted, as the transaction package does; the
    next one goes through, on this connection or another.
    """
    welcome = partialmethod(ScriptedConnection.welcome, extensions=extensions)
    monkeypatch.setattr(ScriptedConnection, "welcome", welcome)
    tids = itertools.count(int.from_bytes(T2, "big"))

    def answer(connection: int, call: Any) -> Any:
        if call.name != "tpc_finish":
            return None
        server.last = next(tids).to_bytes(8, "big")
        return server.last

    with AutoServer(answer) as server:
        storage = ClientStorage(server.address, wait_timeout=DEADLINE_S)

        def commit(transaction: Any) -> bytes:
            try:
                storage.tpc_begin(transaction)
                storage.store(OID, T1, b"data", "", transaction)
                storage.tpc_vote(transaction)
                return storage.tpc_finish(transaction)
            finally:
                storage.tpc_abort(transaction)

        def interrupt(where: str) -> None:
            raise Interruption(where)

        try:
            for place in itertools.count(1):
                transaction = meta()
                _, where = Task(at_place, place, lambda t=transaction: commit(t), interrupt).result(PROMPT_S)
                # If the abort itself was interrupted, it is done again.
                Task(storage.tpc_abort, transaction).result(PROMPT_S)
                if not where:
                    break
                outcome = Task(retried, commit).outcome(PROMPT_S)
                assert isinstance(outcome, bytes), (where, outcome)
        finally:
            storage.close()
    assert place > 50


def retried(commit: Callable[[Any], bytes]) -> bytes:
    while True:
        try:
            return commit(meta())
        except TransientError:
            continue
        except StorageError:  # the outcome of the one before is unknown
            continue
