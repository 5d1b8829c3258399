"""What a server knows beyond ZEO's methods: whole transactions in one message, and checkpoints."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import (
    POSKeyError,
    ReadConflictError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
)
from ZODB.utils import p64

from tests.server.assertions import log_lines, nothing_is_locked, refuses
from tests.server.inmemory import MemoryHouse, Peer
from zeoid import limits
from zeoid.engines.opening import open_filestorage
from zeoid.model import MAX_TID, NO_TID

A, B, C = p64(1), p64(2), p64(3)
BEGIN = (b"user", b"description", {"key": 1}, None, " ")
STORE, RESTORE, DELETE, CHECK, UNDO = range(5)
STORE_A = (STORE, A, NO_TID, b"data of A", None)
STORE_B = (STORE, B, NO_TID, b"data of B", None)
ID = b"made by a client"

codings = pytest.mark.parametrize("coding", ["M5", "Z5"])


@pytest.fixture
def peer(file_house: MemoryHouse) -> Peer:
    return file_house.peer()


def current(peer: Peer, oid: bytes) -> bytes:
    data: bytes = peer.ask("loadBefore", oid, MAX_TID)[0]
    return data


def commit(peer: Peer, *operations: tuple[Any, ...], id: Any = ID) -> bytes:
    peer.ask("tpc_prepare", id, BEGIN, operations)
    tid: bytes = peer.ask("tpc_finish", id)
    return tid


# Good ones ------------------------------------------------------------------------------------------------


@codings
def test_a_whole_transaction_in_one_message(file_house: MemoryHouse, coding: str) -> None:
    peer, reader = Peer(file_house, coding=coding).register(), file_house.peer()
    assert len(peer.ask("tpc_prepare", ID, BEGIN, [STORE_A, (STORE, B, None, b"data of B", None)])) == 0
    tid = peer.ask("tpc_finish", ID)
    assert reader.told() == [(tid, (A, B))]
    assert reader.ask("loadBefore", A, MAX_TID) == (b"data of A", tid, None)
    assert current(reader, B) == b"data of B"
    log = reader.start("undoLog", 0, 1)
    file_house.slow.run_all()
    reader.read()
    (entry,) = log.result
    assert (entry["user_name"], entry["description"], entry["key"]) == (b"user", b"description", 1)
    assert file_house.hosted.status()["stores"] == 2


def test_one_that_is_too_large_for_one_message(peer: Peer) -> None:
    """Its first parts are sent one-way, and are begun only once."""
    peer.one_way("tpc_operate", ID, BEGIN, [STORE_A])
    peer.one_way("tpc_operate", ID, None, [STORE_B])
    assert peer.ask("tpc_prepare", ID, None, [(STORE, C, NO_TID, b"data of C", None)]) == ()
    peer.ask("tpc_finish", ID)
    assert [current(peer, oid) for oid in (A, B, C)] == [b"data of A", b"data of B", b"data of C"]


def test_a_part_may_be_sent_as_a_call(peer: Peer) -> None:
    assert peer.ask("tpc_operate", ID, BEGIN, [STORE_A]) is None
    assert peer.ask("vote", ID) == ()
    assert peer.ask("tpc_finish", ID)


def test_old_and_new_messages_make_one_transaction(peer: Peer) -> None:
    peer.one_way("tpc_begin", ID, b"", b"", {}, None, " ")
    peer.one_way("storea", A, NO_TID, b"data of A", ID)
    assert peer.ask("tpc_prepare", ID, None, [STORE_B]) == ()
    peer.ask("tpc_finish", ID)
    assert (current(peer, A), current(peer, B)) == (b"data of A", b"data of B")


def test_every_kind_of_operation(peer: Peer) -> None:
    first = commit(peer, STORE_A, STORE_B, id=b"1")
    second = commit(peer, (STORE, A, first, b"changed", None), (CHECK, B, first, None, None), id=b"2")
    commit(peer, (DELETE, B, first, None, None), id=b"3")
    with pytest.raises(POSKeyError):
        current(peer, B)
    undone = base64.encodebytes(second).rstrip(b"\n")
    assert peer.ask("tpc_prepare", b"4", BEGIN, [(UNDO, None, None, undone, None)]) == (A,)
    peer.ask("tpc_finish", b"4")
    assert current(peer, A) == b"data of A"
    copied = p64(0x0500_0000_0000_0000)
    begin = (*BEGIN[:3], copied, "p")
    peer.ask("tpc_prepare", b"5", begin, [(RESTORE, C, copied, b"copied", None)])
    assert peer.ask("tpc_finish", b"5") == copied
    assert current(peer, C) == b"copied"


def test_a_dependency_that_is_gone_fails_it(peer: Peer) -> None:
    first = commit(peer, STORE_B)
    commit(peer, (STORE, B, first, b"newer", None), id=b"2")
    with pytest.raises(ReadConflictError):
        peer.ask("tpc_prepare", b"3", BEGIN, [STORE_A, (CHECK, B, first, None, None)])
    nothing_is_locked(peer.house.hosted)


def test_conflicts_are_resolved_in_one_message(peer: Peer) -> None:
    tid = commit(peer, STORE_A)
    (conflict,) = peer.ask("tpc_prepare", b"2", BEGIN, [(STORE, A, NO_TID, b"mine", None), STORE_B])
    assert conflict == {"oid": A, "serials": (tid, NO_TID), "data": b"mine"}
    assert peer.ask("tpc_prepare", b"2", None, [(STORE, A, tid, b"both", None)]) == ()
    peer.ask("tpc_finish", b"2")
    assert (current(peer, A), current(peer, B)) == (b"both", b"data of B")


def test_several_of_one_connection_in_one_segment(peer: Peer) -> None:
    begun = [
        ("tpc_prepare", p64(number), BEGIN, [(STORE, p64(number), None, b"x", None)]) for number in range(9)
    ]
    assert [call.result for call in peer.calls(*begun)] == [()] * 9
    tids = [call.result for call in peer.calls(*(("tpc_finish", p64(number)) for number in range(9)))]
    assert tids == sorted(set(tids))


# Bad ones: an error that says why, nothing stored, nothing locked ------------------------------------------

BAD_OPERATIONS: dict[str, Any] = {
    "no sequence": 7,
    "no operation": [7],
    "too short": [(STORE, A, NO_TID, b"data")],
    "too long": [(*STORE_A, None)],
    "unknown kind": [(5, A, NO_TID, b"data", None)],
    "negative kind": [(-1, A, NO_TID, b"data", None)],
    "kind is no number": [("0", A, NO_TID, b"data", None)],
    "short oid": [(STORE, b"short", NO_TID, b"data", None)],
    "no oid": [(STORE, None, NO_TID, b"data", None)],
    "short serial": [(STORE, A, b"short", b"data", None)],
    "no data": [(STORE, A, NO_TID, None, None)],
    "text": [(STORE, A, NO_TID, "data", None)],
    "delete of an unknown revision": [(DELETE, A, None, None, None)],
    "delete with data": [(DELETE, A, NO_TID, b"data", None)],
    "check of an unknown revision": [(CHECK, A, None, None, None)],
    "undo of nothing": [(UNDO, None, None, None, None)],
    "the second one": [STORE_B, (STORE, A, NO_TID, 7, None)],
}  # fmt: skip
BAD_BEGINNINGS: dict[str, Any] = {
    "no sequence": 7,
    "empty": (),
    "too short": BEGIN[:4],
    "user is a number": (7, *BEGIN[1:]),
    "no extension": (b"", b"", None, None, " "),
    "tid is text": (b"", b"", {}, "12345678", " "),
    "long status": (b"", b"", {}, None, "  "),
}
WRONG = [
    *(pytest.param((ID, BEGIN, operations), id=name) for name, operations in BAD_OPERATIONS.items()),
    *(pytest.param((ID, begin, [STORE_A]), id=f"begin: {name}") for name, begin in BAD_BEGINNINGS.items()),
]


@codings
@pytest.mark.parametrize("name", ["tpc_prepare", "tpc_operate"])
@pytest.mark.parametrize("args", WRONG)
def test_wrong_arguments_of_a_call(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, name: str, args: Any, coding: str
) -> None:
    peer = Peer(house, coding=coding).register()
    refuses(peer.start(name, *args), name)
    assert len(log_lines(caplog)) == 1
    nothing_is_locked(house.hosted)
    assert commit(peer, STORE_A)


@pytest.mark.parametrize("args", WRONG)
def test_wrong_arguments_that_cant_be_told_at_once(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, args: Any
) -> None:
    """The vote tells them, also where everything before and after them was right."""
    peer, reader = house.peer(), house.peer()
    peer.one_way("tpc_operate", ID, BEGIN, [(STORE, C, NO_TID, b"good", None)])
    peer.one_way("tpc_operate", *args)
    refuses(peer.start("tpc_prepare", ID, None, [(STORE, C, NO_TID, b"good", None)]), "tpc_operate")
    assert len(log_lines(caplog)) == 1
    nothing_is_locked(house.hosted)
    with pytest.raises(POSKeyError):
        reader.ask("loadBefore", C, MAX_TID)
    assert commit(peer, STORE_A, id=b"2")


@pytest.mark.parametrize("id", [None, 1.5, b"x" * 65, ["list"]], ids=repr)
def test_a_wrong_id_ends_the_connection(house: MemoryHouse, id: Any) -> None:
    peer = house.peer()
    peer.one_way("tpc_operate", id, BEGIN, [STORE_A])
    assert peer.dropped
    nothing_is_locked(house.hosted)


def test_it_is_not_called_one_way(house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = house.peer()
    peer.one_way("tpc_prepare", ID, BEGIN, [STORE_A])
    assert peer.dropped
    assert log_lines(caplog) == ["peer dropped: tpc_prepare was called one-way, but has an answer"]
    nothing_is_locked(house.hosted)


@pytest.mark.parametrize("operations", [[], [STORE_A]], ids=["nothing", "store"])
def test_a_vote_without_a_begin(peer: Peer, operations: Any) -> None:
    with pytest.raises(StorageTransactionError, match=r"was not begun|before tpc_begin"):
        peer.ask("tpc_prepare", ID, None, operations)
    nothing_is_locked(peer.house.hosted)
    assert commit(peer, STORE_A)


def test_a_finish_without_a_vote(peer: Peer) -> None:
    peer.ask("tpc_operate", ID, BEGIN, [STORE_A])
    with pytest.raises(StorageTransactionError, match="finish of a transaction that is storing"):
        peer.ask("tpc_finish", ID)
    assert peer.ask("tpc_prepare", ID, None, []) == ()
    assert peer.ask("tpc_finish", ID)


@pytest.mark.parametrize("how", ["tpc_operate", "storea", "wrong"])
def test_a_store_after_the_vote_fails_the_finish(peer: Peer, how: str) -> None:
    """It was prepared without it: to commit a part of what the client wanted would be worse."""
    waiter = peer.house.peer()
    peer.ask("tpc_prepare", ID, BEGIN, [STORE_A])
    if how == "tpc_operate":
        peer.one_way("tpc_operate", ID, None, [STORE_B])
    elif how == "storea":
        peer.one_way("storea", B, NO_TID, b"data", ID)
    else:
        peer.one_way("storea", B, NO_TID, "no bytes", ID)
    vote = waiter.prepare(A)
    with pytest.raises((StorageTransactionError, TypeError), match=r"after the vote|data must be"):
        peer.ask("tpc_finish", ID)
    waiter.read()
    assert vote.result == ()
    for oid in (A, B):
        with pytest.raises(POSKeyError):
            peer.ask("loadBefore", oid, MAX_TID)
    waiter.ask("tpc_abort", 1)
    nothing_is_locked(peer.house.hosted)


def test_a_second_vote(peer: Peer) -> None:
    peer.ask("tpc_prepare", ID, BEGIN, [STORE_A])
    with pytest.raises(StorageTransactionError, match="vote on a transaction that is prepared"):
        peer.ask("vote", ID)
    assert peer.ask("tpc_finish", ID)


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_transaction_that_is_too_large(peer: Peer, in_parts: bool) -> None:
    """Its data is not even kept; the vote says how large it may be."""
    peer.house.hosted.transactions._transaction_bytes = 10_000
    operations = [(STORE, p64(number), NO_TID, b"x" * 1000, None) for number in range(9)]
    if in_parts:
        for operation in operations:
            peer.one_way("tpc_operate", ID, BEGIN, [operation])
        transaction = peer.house.hosted.transactions.find(peer.session, ID)
        assert transaction is not None
        assert transaction.operations == []
        operations = []
    with pytest.raises(StorageError, match="the transaction is larger than 10,000 bytes"):
        peer.ask("tpc_prepare", ID, BEGIN, operations)
    nothing_is_locked(peer.house.hosted)
    with pytest.raises(POSKeyError):
        current(peer, p64(0))
    assert commit(peer, STORE_A, id=b"2")


def test_too_many_transactions_of_one_connection(house: MemoryHouse) -> None:
    peer = house.peer()
    for number in range(limits.TRANSACTIONS_PER_CONNECTION):
        peer.one_way("tpc_operate", p64(number), BEGIN, [])
    with pytest.raises(StorageTransactionError, match="more than 64 transactions"):
        peer.ask("tpc_prepare", ID, BEGIN, [STORE_A])
    assert peer.ask("vote", p64(0)) == ()


def test_an_earlier_vote_without_an_answer(house: MemoryHouse) -> None:
    holder, peer = house.peer(), house.peer()
    holder.prepare(A)
    waiting = peer.start("tpc_prepare", ID, BEGIN, [STORE_B])
    with pytest.raises(StorageTransactionError, match="no answer yet"):
        peer.ask("tpc_prepare", ID, None, [STORE_B])
    holder.ask("tpc_abort", 1)
    peer.read()
    assert waiting.result == ()


def test_a_client_that_only_reads_prepares_nothing(file_house: MemoryHouse) -> None:
    peer = Peer(file_house).register(read_only=True)
    with pytest.raises(ReadOnlyError):
        peer.ask("tpc_prepare", ID, BEGIN, [STORE_A])
    nothing_is_locked(file_house.hosted)


# Checkpoints ----------------------------------------------------------------------------------------------


def checkpoint(peer: Peer) -> Any:
    call = peer.start("checkpoint")
    peer.house.slow.run_all()
    peer.read()
    return call.result


def test_a_checkpoint_tells_the_last_tid(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    assert checkpoint(peer) == NO_TID
    tid = peer.commit(A)
    assert checkpoint(peer) == tid
    assert peer.commit(B) > tid


def test_a_checkpoint_holds_up_nobody(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    call = peer.start("checkpoint")
    tid = peer.commit(A)
    assert not call.answered
    file_house.slow.run()
    peer.read()
    assert call.result == tid


def test_a_checkpoint_where_there_is_nothing_to_do(house: MemoryHouse) -> None:
    peer = house.peer()
    tid = peer.commit(A)
    assert checkpoint(peer) == tid


def test_a_checkpoint_is_writing(
    file_house: MemoryHouse, make_house: Callable[..., MemoryHouse], tmp_path: Path
) -> None:
    with pytest.raises(ReadOnlyError):
        checkpoint(Peer(file_house).register(read_only=True))
    file_house.close()
    house = make_house({"1": open_filestorage(tmp_path / "Data.fs", read_only=True)})
    with pytest.raises(ReadOnlyError):
        checkpoint(Peer(house).register(read_only=True))
