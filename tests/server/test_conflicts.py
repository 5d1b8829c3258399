"""Conflicts, of stores and of undos: put to the client that caused them, or resolved in the server."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import ConflictError, UndoError
from ZODB.tests.ConflictResolution import PCounter, PCounter3
from ZODB.tests.StorageTestBase import zodb_pickle, zodb_unpickle
from ZODB.utils import p64

from tests.server.assertions import nothing_is_locked
from tests.server.inmemory import MemoryHouse, Peer
from zeoid.engines.opening import open_filestorage, open_memory
from zeoid.model import MAX_TID

A, B = p64(1), p64(2)


def counter(value: int, kind: type[Any] = PCounter) -> bytes:
    """The record of a counter. It resolves conflicts by adding up; the kind `PCounter3` can't."""
    made = kind()
    made.inc(value)
    data: bytes = zodb_pickle(made)
    return data


def value(peer: Peer, oid: bytes = A) -> int:
    counted: int = zodb_unpickle(peer.ask("loadBefore", oid, MAX_TID)[0])._value
    return counted


def set_to(peer: Peer, *values: int, kind: type[Any] = PCounter) -> list[bytes]:
    """One transaction for each value."""
    return [peer.commit(A, data=counter(value, kind)) for value in values]


def undo(peer: Peer, *tids: bytes) -> Any:
    """Begin a transaction that undoes these, and vote: the answer."""
    call = peer.start("undoLog", 0, 100)
    peer.house.slow.run_all()
    peer.read()
    ids = {_tid_in(entry["id"]): entry["id"] for entry in call.result}
    peer.begin()
    for tid in tids:
        peer.one_way("undoa", ids[tid], 1)
    return peer.ask("vote", 1)


def _tid_in(transaction_id: bytes) -> bytes:
    return base64.decodebytes(transaction_id + b"\n")


@pytest.fixture
def peer(file_house: MemoryHouse) -> Peer:
    return file_house.peer()


# Put to the client ----------------------------------------------------------------------------------------


def test_an_undo_of_what_was_changed_since_is_put_to_the_client(peer: Peer) -> None:
    """As any conflict: the change from the undone state to the one before it, on top of the current one."""
    other = peer.house.peer()
    _, undone, last = set_to(peer, 1, 5, 7)
    (conflict,) = undo(peer, undone)
    assert conflict == {"oid": A, "serials": (last, undone), "data": counter(1)}
    nobody = other.prepare(B)
    assert not nobody.answered  # what an undo writes is not known beforehand: the whole storage is locked
    peer.store(A, counter(3), serial=last)
    assert peer.ask("vote", 1) == (A,)
    tid = peer.ask("tpc_finish", 1)
    assert other.told()[-1] == (tid, (A,))
    assert value(other) == 3
    assert nobody.answered


def test_an_undo_that_needs_no_resolution_is_not_put_to_anybody(peer: Peer) -> None:
    _, undone = set_to(peer, 1, 5)
    peer.commit(B)
    assert undo(peer, undone) == (A,)
    assert peer.ask("tpc_finish", 1)
    assert value(peer) == 1


def test_a_client_that_can_not_resolve_an_undo_gives_it_up(peer: Peer) -> None:
    other = peer.house.peer()
    _, undone, _ = set_to(peer, 1, 5, 7)
    assert len(undo(peer, undone)) == 1
    vote = other.prepare(A)
    assert not vote.answered
    peer.ask("tpc_abort", 1)
    other.read()
    assert vote.result == ()
    assert value(peer) == 7


def test_two_clients_undo_the_same(peer: Peer) -> None:
    """The second one's undo meets that of the first, and changes nothing that it did not mean."""
    other = peer.house.peer()
    _, undone = set_to(peer, 1, 5)
    assert undo(peer, undone) == (A,)
    again = other.house.peer()
    again.begin()
    again.one_way("undoa", _undo_id(undone), 1)
    vote = again.start("vote", 1)
    assert not vote.answered
    tid = peer.ask("tpc_finish", 1)
    again.house.work()
    again.read()
    assert vote.result == ({"oid": A, "serials": (tid, undone), "data": counter(1)},)


def _undo_id(tid: bytes) -> bytes:
    return base64.encodebytes(tid).rstrip(b"\n")


# Resolved in the server -----------------------------------------------------------------------------------


@pytest.fixture(params=["data file", "memory"])
def resolving(
    request: pytest.FixtureRequest, make_house: Callable[..., MemoryHouse], tmp_path: Path
) -> MemoryHouse:
    engine = open_memory() if request.param == "memory" else open_filestorage(tmp_path / "Data.fs")
    engine.resolve_conflicts()
    return make_house({"1": engine})


def test_the_server_resolves_a_conflict(resolving: MemoryHouse) -> None:
    peer, other = resolving.peer(), resolving.peer()
    first, _ = set_to(other, 1, 5)
    peer.begin()
    peer.store(A, counter(3), serial=first)
    assert peer.ask("vote", 1) == (A,)  # which tells the client that its own copy is out of date
    tid = peer.ask("tpc_finish", 1)
    assert other.told() == [(tid, (A,))]
    assert value(peer) == 5 + 3 - 1


def test_it_resolves_in_a_thread_where_transactions_are_parallel(
    make_house: Callable[..., MemoryHouse], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application's code is not to hold up the loop."""
    engine = open_filestorage(tmp_path / "Data.fs")
    engine.resolve_conflicts()
    house = make_house({"1": engine})
    peer = house.peer()
    vote = peer.prepare(A)
    assert not vote.answered
    assert peer.ask("ping") is None
    house.beside.run()
    peer.read()
    assert vote.result == ()


def test_a_conflict_that_the_server_can_not_resolve(resolving: MemoryHouse) -> None:
    peer, other = resolving.peer(), resolving.peer()
    first, last = set_to(other, 1, 5, kind=PCounter3)
    peer.begin()
    peer.store(A, counter(3, PCounter3), serial=first)
    peer.store(B)
    with pytest.raises(ConflictError) as caught:
        peer.ask("vote", 1)
    assert (caught.value.oid, caught.value.serials) == (A, (last, first))
    nothing_is_locked(resolving.hosted)
    with pytest.raises(KeyError):
        peer.ask("loadBefore", B, MAX_TID)
    assert set_to(peer, 9, kind=PCounter3)


@pytest.fixture
def undoing(make_house: Callable[..., MemoryHouse], tmp_path: Path) -> Peer:
    """A client of a data file whose conflicts the server resolves."""
    engine = open_filestorage(tmp_path / "Data.fs")
    engine.resolve_conflicts()
    house: MemoryHouse = make_house({"1": engine})
    return house.peer()


def test_the_server_resolves_an_undo(undoing: Peer) -> None:
    _, undone, _ = set_to(undoing, 1, 5, 7)
    assert undo(undoing, undone) == (A,)
    undoing.ask("tpc_finish", 1)
    assert value(undoing) == 7 - 4


def test_an_undo_that_the_server_can_not_resolve(undoing: Peer) -> None:
    _, undone, _ = set_to(undoing, 1, 5, 7, kind=PCounter3)
    with pytest.raises(UndoError):
        undo(undoing, undone)
    nothing_is_locked(undoing.house.hosted)
    assert value(undoing) == 7


def test_nothing_of_the_application_runs_in_a_server_that_was_not_asked_to(peer: Peer) -> None:
    """The class need not even exist there."""
    first = peer.commit(A, data=b"no pickle")
    peer.commit(A, data=b"nor this")
    peer.begin()
    peer.store(A, b"and this", serial=first)
    assert [conflict["oid"] for conflict in peer.ask("vote", 1)] == [A]
