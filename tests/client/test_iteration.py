"""Iterating over a remote storage's transactions: the server's iterators, and what becomes of them."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.client.interruptions import at_place
from tests.client.scenes import DEADLINE_S, OID, OTHER, T1, T2, T3, Scene, Task
from zeoid import ClientStorage
from zeoid.errors import Disconnected, TimedOut
from zeoid.testing import Call, ScriptedConnection


def begun(storage: ClientStorage, connection: ScriptedConnection, number: int = 7) -> Any:
    starting = Task(storage.iterator, T1, T3)
    call = connection.expect("iterator_start")
    assert call.args == (T1, T3)
    connection.answer(call, number)
    return starting.result()


def answered(connection: ScriptedConnection, function: Callable[..., Any], *answers: tuple[str, Any]) -> Any:
    """What *function* gives while the server is asked these and answers so."""
    task = Task(function)
    for name, value in answers:
        connection.answer(connection.expect(name), value)
    return task.result()


def test_transactions_and_their_records(scene: Scene) -> None:
    storage, connection = scene.connected()
    iteration = begun(storage, connection)
    assert iter(iteration) is iteration
    asking = Task(next, iteration)
    call = connection.expect("iterator_next")
    assert call.args == (7,)
    connection.answer(call, (T1, " ", b"user", b"description", {"k": 1}))
    transaction = asking.result()
    assert (transaction.tid, transaction.status) == (T1, " ")
    assert (transaction.user, transaction.description) == (b"user", b"description")
    assert transaction.extension == {"k": 1}

    reading = Task(list, transaction)
    call = connection.expect("iterator_record_start")
    assert call.args == (7, T1)
    connection.answer(call, 8)
    for item in [(OID, T1, b"data", None), (OTHER, T1, None, T2), None]:
        call = connection.expect("iterator_record_next")
        assert call.args == (8,)
        connection.answer(call, item)
    first, second = reading.result()
    assert (first.oid, first.tid, first.data, first.data_txn) == (OID, T1, b"data", None)
    assert (second.oid, second.tid, second.data, second.data_txn) == (OTHER, T1, None, T2)

    assert answered(connection, lambda: list(iteration), ("iterator_next", None)) == []
    with pytest.raises(StopIteration):
        next(iteration)  # without a question


def test_an_iterator_that_came_to_its_end_is_not_discarded_again(scene: Scene) -> None:
    storage, connection = scene.connected()
    iteration = begun(storage, connection)
    answered(connection, partial(list, iteration), ("iterator_next", None))
    iteration.close()
    del iteration
    begun(storage, connection, 8)  # expects that this is the first thing that is heard


def test_closing_an_iterator_tells_the_server(scene: Scene) -> None:
    storage, connection = scene.connected()
    iteration = begun(storage, connection)
    iteration.close()
    call = connection.expect("iterator_gc")
    assert call.one_way
    assert call.args == ((7,),)
    iteration.close()
    with pytest.raises(StopIteration):
        next(iteration)


def test_iterators_that_are_left_unfinished_are_discarded_before_the_next_begins(scene: Scene) -> None:
    storage, connection = scene.connected()
    begun(storage, connection, 7)
    starting = Task(storage.iterator)
    call = connection.expect("iterator_gc")
    assert call.one_way
    assert call.args == ((7,),)
    connection.answer(connection.expect("iterator_start"), 9)
    starting.result()


def test_an_iterator_that_is_collected_in_the_middle_of_a_call(scene: Scene) -> None:
    """The collector runs whenever it likes: also in a thread that holds what is needed to send a message."""
    storage, connection = scene.connected()
    gc.freeze()  # what there was before need not be looked at each time
    for place in itertools.count(1):
        ring: list[Any] = [begun_after_discards(storage, connection)]
        ring.append(ring)
        del ring
        calling = Task(at_place, place, storage.ping, lambda where: gc.collect() and None)
        connection.answer(expect_after_discards(connection, "ping"), None)
        outcome, where = calling.result()
        assert outcome is None, where
        if not where:
            break
    gc.unfreeze()
    assert place > 5


def begun_after_discards(storage: ClientStorage, connection: ScriptedConnection) -> Any:
    starting = Task(storage.iterator)
    connection.answer(expect_after_discards(connection, "iterator_start"), 7)
    return starting.result()


def expect_after_discards(connection: ScriptedConnection, name: str) -> Call:
    while (call := connection.expect(name, "iterator_gc")).name != name:
        pass
    return call


def test_an_iterator_does_not_outlive_its_connection(scene: Scene) -> None:
    """The next connection knows nothing of it; another iterator may have its number there."""
    server = scene.server()
    storage, connection = scene.connected(server=server)
    iteration = begun(storage, connection)
    connection.close()
    again = server.accept()
    again.welcome(T1)
    assert answered(again, storage.ping, ("ping", None)) is None
    with pytest.raises(Disconnected):
        next(iteration)
    del iteration
    begun(storage, again)


def test_the_deadline_of_an_iteration(scene: Scene) -> None:
    storage, connection = scene.connected(wait_timeout=0.1)
    starting = Task(storage.iterator)
    connection.expect("iterator_start")
    assert isinstance(starting.outcome(DEADLINE_S), TimedOut)


def test_the_server_vanishes_while_records_are_read(scene: Scene) -> None:
    storage, connection = scene.connected()
    iteration = begun(storage, connection)
    transaction = answered(connection, lambda: next(iteration), ("iterator_next", (T1, " ", b"", b"", {})))
    reading = Task(list, transaction)
    connection.answer(connection.expect("iterator_record_start"), 8)
    connection.expect("iterator_record_next")
    connection.close()
    assert isinstance(reading.outcome(), Disconnected)
