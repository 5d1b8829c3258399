"""Every method of the protocol has a function that carries it out, and each does what it is for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.POSException import POSKeyError, ReadOnlyError, StorageError, UndoError
from ZODB.utils import p64

from tests.server.inmemory import MemoryHouse, Peer
from zeoid.model import MAX_TID, NO_TID, UndoPrefix, tid_after
from zeoid.server.methods import ANSWERED_LATER, METHODS, NAMED_FIRST, OPERATIONS
from zeoid.wire.messages import SERVER_METHODS, Access, Method

A, B, C = p64(1), p64(2), p64(3)
codings = pytest.mark.parametrize("coding", ["M5", "Z5"])


# The table ------------------------------------------------------------------------------------------------


def test_every_method_of_the_protocol_is_carried_out_and_no_other() -> None:
    assert set(METHODS) == set(SERVER_METHODS)


@pytest.mark.parametrize("method", SERVER_METHODS.values(), ids=lambda method: method.name)
def test_the_function_takes_what_the_protocol_says(method: Method) -> None:
    _, *parameters = inspect.signature(METHODS[method.name]).parameters.values()
    assert len(parameters) == len(method.args)
    optional = [parameter for parameter in parameters if parameter.default is not parameter.empty]
    assert len(optional) == method.optional
    assert parameters[len(parameters) - method.optional :] == optional


def test_no_method_has_two_functions_and_no_function_two_methods() -> None:
    assert len(set(METHODS.values())) == len(METHODS)


def test_operations_are_about_a_transaction() -> None:
    for name in OPERATIONS:
        place = 0 if name in NAMED_FIRST else -1
        assert SERVER_METHODS[name].args[place][0] == "transaction"
        assert SERVER_METHODS[name].access is Access.WRITE
    for name in ANSWERED_LATER:
        assert SERVER_METHODS[name].args[0][0] == "transaction"
    assert not OPERATIONS & ANSWERED_LATER


# Reading --------------------------------------------------------------------------------------------------


@pytest.fixture
def peer(file_house: MemoryHouse) -> Peer:
    return file_house.peer()


def slowly(peer: Peer, name: str, *args: Any) -> Any:
    """Call what is answered from a thread."""
    call = peer.start(name, *args)
    peer.house.slow.run_all()
    peer.read()
    return call.result


def test_load_before(peer: Peer) -> None:
    first = peer.commit(A, data=b"one")
    second = peer.commit(A, data=b"two")
    assert peer.ask("loadBefore", A, MAX_TID) == (b"two", second, None)
    assert peer.ask("loadBefore", A, tid_after(second)) == (b"two", second, None)
    assert peer.ask("loadBefore", A, second) == (b"one", first, second)
    assert peer.ask("loadBefore", A, first) is None
    assert peer.ask("loadBefore", A, b"\xff" * 8) == (b"two", second, None)
    with pytest.raises(POSKeyError):
        peer.ask("loadBefore", B, MAX_TID)


def test_load_serial(peer: Peer) -> None:
    first = peer.commit(A, data=b"one")
    peer.commit(A, data=b"two")
    assert peer.ask("loadSerial", A, first) == b"one"
    for oid, serial in ((A, NO_TID), (A, MAX_TID), (B, first)):
        with pytest.raises(POSKeyError):
            peer.ask("loadSerial", oid, serial)


def test_get_tid(peer: Peer) -> None:
    peer.commit(A)
    tid = peer.commit(A)
    peer.commit(B)
    assert peer.ask("getTid", A) == tid
    with pytest.raises(POSKeyError):
        peer.ask("getTid", C)


def test_last_transaction(peer: Peer) -> None:
    assert peer.ask("lastTransaction") == NO_TID
    tid = peer.commit(A)
    assert peer.ask("lastTransaction") == tid


def test_get_invalidations(peer: Peer) -> None:
    assert peer.ask("getInvalidations", NO_TID) == (NO_TID, ())
    first = peer.commit(A)
    second = peer.commit(B)
    assert peer.ask("getInvalidations", first) == (second, (B,))
    assert peer.ask("getInvalidations", second) == (second, ())
    assert peer.ask("getInvalidations", MAX_TID) == (second, ())


def test_history(peer: Peer) -> None:
    tids = [peer.commit(A) for _ in range(3)]
    newest_first = [entry["tid"] for entry in slowly(peer, "history", A, 10)]
    assert newest_first == tids[::-1]
    (entry,) = slowly(peer, "history", A)
    assert (entry["tid"], entry["user_name"], entry["size"]) == (tids[-1], b"user", len(b"data"))
    assert slowly(peer, "history", A, 0) == slowly(peer, "history", A, -7) == ()


def test_record_iternext(peer: Peer) -> None:
    tid = peer.commit(A, B, C)
    found = []
    following = None
    while True:
        oid, serial, data, following = peer.ask("record_iternext", following)
        found.append((oid, serial, data))
        if following is None:
            break
    assert found == [(oid, tid, b"data") for oid in (A, B, C)]


@codings
def test_undo_information(file_house: MemoryHouse, coding: str) -> None:
    peer = Peer(file_house, coding=coding).register()
    for _ in range(3):
        peer.commit(A)
    assert len(slowly(peer, "undoLog")) == 3
    assert len(slowly(peer, "undoLog", 1, -5)) == 2
    entries = slowly(peer, "undoInfo", 0, -20, {"user_name": b"user"})
    assert [entry["description"] for entry in entries] == [b"description"] * 3
    assert len(slowly(peer, "undoInfo", 0, -20, {"user_name": b"other"})) == 0
    assert entries[0].keys() >= {"id", "time", "user_name", "description", "size"}


def test_undo_information_by_the_path_of_a_user(peer: Peer) -> None:
    for number, user in enumerate((b"/zoo keeper", b"/zoo/house keeper", b"/office clerk")):
        peer.one_way("tpc_begin", number, user, b"", {}, None, " ")
        peer.store(A, id=number)
        peer.ask("vote", number)
        peer.ask("tpc_finish", number)
    visible = peer.house.hosted.visible
    found = visible.undo_info(0, -20, {"user_name": UndoPrefix(("", "zoo"))})
    assert [entry["user_name"] for entry in found] == [b"/zoo/house keeper", b"/zoo keeper"]


def test_server_status(peer: Peer) -> None:
    assert peer.ask("server_status") == peer.house.hosted.status()


# Transactions ---------------------------------------------------------------------------------------------


def test_user_and_description_may_be_text(peer: Peer) -> None:
    peer.one_way("tpc_begin", 1, "Zoë", "caf\u00e9", {"key": [1, 2.5, None]}, None, " ")
    peer.store(A)
    peer.ask("vote", 1)
    peer.ask("tpc_finish", 1)
    (entry,) = slowly(peer, "history", A)
    assert (entry["user_name"], entry["description"]) == ("Zoë".encode(), "caf\u00e9".encode())


def test_an_object_is_deleted(peer: Peer) -> None:
    tid = peer.commit(A)
    peer.begin()
    peer.one_way("deleteObject", A, tid, 1)
    peer.ask("vote", 1)
    peer.ask("tpc_finish", 1)
    with pytest.raises(POSKeyError):
        peer.ask("loadBefore", A, MAX_TID)


def test_a_transaction_is_undone(peer: Peer) -> None:
    other = peer.house.peer()
    peer.commit(A, data=b"one")
    peer.commit(A, data=b"two")
    (entry,) = slowly(peer, "undoLog", 0, 1)
    peer.begin()
    peer.one_way("undoa", entry["id"], 1)
    assert peer.ask("vote", 1) == (A,)
    tid = peer.ask("tpc_finish", 1)
    assert other.told()[-1] == (tid, (A,))
    assert other.ask("loadBefore", A, MAX_TID) == (b"one", tid, None)


def test_what_can_not_be_undone(peer: Peer) -> None:
    peer.begin()
    peer.one_way("undoa", b"no such transaction", 1)
    with pytest.raises(UndoError):
        peer.ask("vote", 1)
    assert peer.commit(A)


def test_a_transaction_is_copied_with_its_tid(peer: Peer) -> None:
    other = peer.house.peer()
    tid = p64(0x03C0_0000_0000_0000)
    peer.begin(tid=tid)
    peer.one_way("restorea", A, tid, b"copied", None, 1)
    peer.ask("vote", 1)
    assert peer.ask("tpc_finish", 1) == tid
    assert other.told() == [(tid, (A,))]
    assert other.ask("loadBefore", A, MAX_TID) == (b"copied", tid, None)


@pytest.mark.parametrize("tid", [NO_TID, MAX_TID, b"\xff" * 8, b"\x80" + b"\0" * 7], ids=bytes.hex)
def test_a_tid_that_no_transaction_can_have(peer: Peer, tid: bytes) -> None:
    peer.begin(tid=tid)
    peer.one_way("restorea", A, tid, b"copied", None, 1)
    with pytest.raises(TypeError, match="no transaction can have this tid"):
        peer.ask("vote", 1)


def test_a_copy_that_comes_too_late(peer: Peer) -> None:
    tid = peer.commit(A)
    peer.begin(tid=tid)
    with pytest.raises(StorageError, match="too old"):
        peer.ask("vote", 1)


@codings
@pytest.mark.parametrize("status", ["c", "u", "x", "\u00e9", "\0", b"c", b"\xff"], ids=ascii)
def test_a_status_that_would_spoil_the_data_file(file_house: MemoryHouse, status: Any, coding: str) -> None:
    """FileStorage writes it as it is, and cuts the file off there when it is opened again."""
    peer = Peer(file_house, coding=coding).register()
    peer.one_way("tpc_begin", 1, b"", b"", {}, None, status)
    peer.store(A)
    with pytest.raises(TypeError, match="the status must be"):
        peer.ask("vote", 1)
    peer.commit(A)
    assert file_house.fatal == []


@pytest.mark.parametrize("status", [" ", "p", b" ", b"p"])
def test_a_status_that_is_allowed(peer: Peer, status: Any) -> None:
    peer.one_way("tpc_begin", 1, b"", b"", {}, None, status)
    peer.store(A)
    assert peer.ask("vote", 1) == ()
    assert peer.ask("tpc_finish", 1)


def test_empty_data_fails_the_vote(peer: Peer) -> None:
    """FileStorage would write a record that makes the rest of its file unreadable."""
    peer.begin()
    peer.one_way("storea", A, NO_TID, b"", 1)
    with pytest.raises(StorageError, match="is empty"):
        peer.ask("vote", 1)
    assert peer.commit(A)


# Read-only clients ----------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Peer], None]] = {
    "store": lambda peer: peer.one_way("storea", A, NO_TID, b"data", 1),
    "delete": lambda peer: peer.one_way("deleteObject", A, NO_TID, 1),
    "restore": lambda peer: peer.one_way("restorea", A, NO_TID, b"data", None, 1),
    "undo": lambda peer: peer.one_way("undoa", b"id", 1),
    "nothing": lambda peer: None,
}


@pytest.mark.parametrize("what", WRITES)
def test_a_client_that_registered_read_only_writes_nothing(file_house: MemoryHouse, what: str) -> None:
    peer = Peer(file_house).register(read_only=True)
    peer.begin()
    WRITES[what](peer)
    with pytest.raises(ReadOnlyError):
        peer.ask("vote", 1)
    assert file_house.hosted.transactions.active == 0


def test_a_client_that_registered_read_only_gets_no_oids(file_house: MemoryHouse) -> None:
    peer = Peer(file_house).register(read_only=True)
    with pytest.raises(ReadOnlyError):
        peer.ask("new_oids", 10)


def test_a_client_that_registered_read_only_reads_and_hears(file_house: MemoryHouse) -> None:
    peer = Peer(file_house).register(read_only=True)
    tid = file_house.peer().commit(A)
    assert peer.told() == [(tid, (A,))]
    assert peer.ask("loadBefore", A, MAX_TID) == (b"data", tid, None)
    assert len(slowly(peer, "undoLog")) == 1
