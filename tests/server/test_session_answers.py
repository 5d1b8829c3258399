"""One session: the answers to votes, slow requests and packs, what is written when, and the end of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.POSException import (
    POSKeyError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
    Unsupported,
)
from ZODB.utils import p64

from tests.server.assertions import log_lines, refuses
from tests.server.inmemory import Call, MemoryHouse, Peer, in_order
from zeoid import limits
from zeoid.engines.opening import open_memory
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ServerError
from zeoid.model import MAX_TID, NO_TID
from zeoid.server.clients import Announcement

A, B = p64(1), p64(2)

codings = pytest.mark.parametrize("coding", ["M5", "Z5"])


@pytest.fixture(autouse=True)
def whole_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zeoid.server")


# Votes and finishes ---------------------------------------------------------------------------------------


def test_a_vote_that_has_no_answer_yet_is_not_repeated(house: MemoryHouse) -> None:
    other, peer = house.peer(), house.peer()
    other.prepare(A)
    waiting = peer.prepare(B)
    with pytest.raises(StorageTransactionError, match="no answer yet"):
        peer.ask("vote", 1)
    assert not waiting.answered
    other.ask("tpc_abort", 1)
    peer.read()
    assert waiting.result == ()


def test_a_vote_is_answered_when_its_transaction_is_aborted(house: MemoryHouse) -> None:
    """Clients lose patience, abort, and may use the same id for their next transaction."""
    other, peer = house.peer(), house.peer()
    other.prepare(A)
    waiting = peer.prepare(B)
    assert peer.ask("tpc_abort", 1) is None
    with pytest.raises(StorageTransactionError, match="aborted"):
        _ = waiting.result
    other.ask("tpc_abort", 1)
    assert peer.commit(B) == house.hosted.visible.tid


def test_a_vote_in_a_thread_is_answered_when_its_transaction_is_aborted(house: MemoryHouse) -> None:
    peer = house.peer()
    house.hosted.pack_begins()
    voting = peer.prepare(B)
    assert not voting.answered
    peer.ask("tpc_abort", 1)
    with pytest.raises(StorageTransactionError, match="aborted"):
        _ = voting.result
    again = peer.prepare(A)
    house.commit.run_all()
    peer.read()
    assert again.result == ()
    finishing = peer.start("tpc_finish", 1)
    house.commit.run_all()
    peer.read()
    assert finishing.result == house.hosted.visible.tid
    with pytest.raises(POSKeyError):
        peer.ask("loadBefore", B, MAX_TID)


def test_a_finish_without_a_vote_is_an_error(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.begin()
    with pytest.raises(StorageTransactionError):
        peer.ask("tpc_finish", 1)
    assert peer.ask("vote", 1) == ()


def test_a_second_finish_is_an_error(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.commit(A)
    with pytest.raises(StorageTransactionError, match="over"):
        peer.ask("tpc_finish", 1)


def test_transactions_of_one_connection_do_not_mix(house: MemoryHouse) -> None:
    peer = house.peer()
    first = peer.prepare(A, id=1)
    second = peer.prepare(B, id="b")
    assert first.result == ()
    assert not second.answered
    tid = peer.ask("tpc_finish", 1)
    assert second.result == ()
    assert peer.ask("tpc_finish", "b") > tid


# Labels ---------------------------------------------------------------------------------------------------


def test_a_label_goes_before_the_peer_in_the_log(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    peer = house.peer()
    peer.ask("set_client_label", "worker 3")
    peer.disconnect()
    assert log_lines(caplog, logging.INFO)[1:] == [
        "peer is labelled worker 3", "worker 3 peer disconnected",
    ]  # fmt: skip


@codings
@pytest.mark.parametrize(
    "label",
    [
        "evil\n2026-01-01 CRITICAL everything is lost", "a\rb", "bell\a", "\x1b[2J", "\0",
        "line\u2028separator", "\x85", "\u202ereversed", b"bytes\n\xff",
    ],
    ids=ascii,
)  # fmt: skip
def test_control_characters_of_a_label_do_not_reach_the_log(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture, label: Any, coding: str
) -> None:
    peer = Peer(house, coding=coding).register()
    peer.ask("set_client_label", label)
    peer.ask("set_client_label", label)
    peer.start("nosuch")
    peer.disconnect()
    for line in log_lines(caplog, logging.INFO):
        assert line.isprintable(), line


def test_a_label_is_cut_to_a_sensible_length(house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = house.peer()
    peer.ask("set_client_label", "x" * 1_000_000)
    assert max(map(len, log_lines(caplog, logging.INFO))) < 300


# Work in threads ------------------------------------------------------------------------------------------


def test_a_slow_request_is_answered_when_it_is_done(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    peer.commit(A)
    call = peer.start("undoLog", 0, -5)
    assert peer.ask("ping") is None  # meanwhile
    assert not call.answered
    file_house.slow.work()
    assert not peer.read()
    file_house.slow.land()
    peer.read()
    assert len(call.result) == 1


def test_an_error_in_a_thread_is_the_answer(
    file_house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    peer = file_house.peer()
    call = peer.start("history", B)
    file_house.slow.run()
    peer.read()
    with pytest.raises(POSKeyError):
        _ = call.result
    assert log_lines(caplog) == []


def test_only_so_many_slow_requests_at_a_time(file_house: MemoryHouse) -> None:
    peer, other = file_house.peer(), file_house.peer()
    peer.commit(A)
    calls = [peer.start("undoLog") for _ in range(limits.SLOW_REQUESTS_PER_CONNECTION)]
    refuses(peer.start("undoLog"), "16 requests of this connection are under way")
    theirs = other.start("undoLog")
    file_house.slow.run_all()
    peer.read()
    other.read()
    assert [len(call.result) for call in [*calls, theirs]] == [1] * 17
    again = peer.start("undoLog")
    file_house.slow.run_all()
    peer.read()
    assert again.answered


def test_nothing_is_written_to_a_client_that_left_meanwhile(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    peer.start("undoLog")
    peer.disconnect()
    file_house.slow.run()
    assert peer.wire.writes == []


# Packing --------------------------------------------------------------------------------------------------


def test_a_pack_is_answered_at_its_end(file_house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = file_house.peer()
    call = peer.start("pack", 1_700_000_000.0, True)
    assert file_house.hosted.packing
    assert not call.answered
    file_house.packs.run()
    peer.read()
    assert call.result is None
    assert not file_house.hosted.packing
    assert log_lines(caplog, logging.INFO)[1:] == ["peer packs storage '1'", "peer has packed storage '1'"]


def test_a_pack_that_nobody_waits_for_is_answered_at_its_beginning(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    assert peer.ask("pack", 1_700_000_000, False) is None
    file_house.packs.run()
    assert list(in_order(peer.read())) == []


def test_a_one_way_pack(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    peer.one_way("pack", 1_700_000_000.0, True)
    file_house.packs.run()
    assert list(in_order(peer.read())) == []


def test_a_second_pack_is_refused(file_house: MemoryHouse) -> None:
    peer, other = file_house.peer(), file_house.peer()
    peer.start("pack", 1_700_000_000.0)
    with pytest.raises(StorageError, match="a pack of this storage is under way"):
        other.ask("pack", 1_700_000_000.0)
    file_house.packs.run()
    other.start("pack", 1_700_000_000.0)
    assert len(file_house.packs) == 1
    file_house.packs.run()


def test_a_client_that_only_reads_does_not_pack(file_house: MemoryHouse) -> None:
    peer = Peer(file_house).register(read_only=True)
    with pytest.raises(ReadOnlyError):
        peer.ask("pack", 1_700_000_000.0)
    assert not file_house.hosted.packing


@pytest.mark.parametrize("time", [float("nan"), float("inf"), -1e300, 10**70], ids=repr)
def test_a_pack_to_a_time_that_does_not_exist(
    file_house: MemoryHouse, caplog: pytest.LogCaptureFixture, time: Any
) -> None:
    peer = Peer(file_house, coding="Z5").register()
    peer.commit(A)
    call = peer.start("pack", time, True)
    file_house.packs.run_all()
    peer.read()
    with pytest.raises((TypeError, ValueError, ServerError)):
        _ = call.result
    assert len(log_lines(caplog)) == 1
    assert not file_house.hosted.packing


def test_the_client_that_packs_may_leave(file_house: MemoryHouse) -> None:
    peer = file_house.peer()
    peer.start("pack", 1_700_000_000.0, True)
    peer.disconnect()
    file_house.packs.run()
    assert not file_house.hosted.packing


# Values and faults ----------------------------------------------------------------------------------------


class Odd(StorageEngine):
    """An engine that answers what it should not."""

    history_of_oid: Any = ()
    fault: BaseException | None = None

    def history(self, oid: bytes, size: int) -> Any:
        return self.history_of_oid

    def load_serial(self, oid: bytes, serial: bytes) -> bytes:
        assert self.fault is not None
        raise self.fault


@pytest.fixture
def odd(make_house: Callable[..., MemoryHouse]) -> Odd:
    engine = Odd(open_memory()._storage)
    engine.house = make_house({"1": engine})  # type: ignore[attr-defined]
    return engine


@codings
@pytest.mark.parametrize(
    "value", [object(), {1, object()}, {"deep": [object]}], ids=["object", "set", "class"]
)
def test_a_value_that_cant_be_sent_is_an_error_reply(
    odd: Odd, caplog: pytest.LogCaptureFixture, coding: str, value: Any
) -> None:
    house: MemoryHouse = odd.house  # type: ignore[attr-defined]
    odd.history_of_oid = [{"tid": NO_TID, "odd": value}]
    peer = Peer(house, coding=coding).register()
    call = peer.start("history", A)
    house.slow.run()
    peer.read()
    refuses(call, "history", "can't be sent")
    assert len(log_lines(caplog)) == 1
    assert peer.ask("ping") is None


def test_a_fault_of_the_engine_is_told_and_logged(odd: Odd, caplog: pytest.LogCaptureFixture) -> None:
    house: MemoryHouse = odd.house  # type: ignore[attr-defined]
    odd.fault = ZeroDivisionError("by zero")
    peer = house.peer()
    house.hosted.visible.advance(p64(5))
    with pytest.raises(ServerError, match=r"ZeroDivisionError.*by zero"):
        peer.ask("loadSerial", A, p64(1))
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == "peer: loadSerial failed"
    assert record.exc_info is not None
    assert peer.ask("ping") is None


@codings
def test_a_fault_that_cant_be_sent_as_it_is(odd: Odd, coding: str) -> None:
    house: MemoryHouse = odd.house  # type: ignore[attr-defined]
    odd.fault = ZeroDivisionError("half a character: \ud800")
    peer = Peer(house, coding=coding).register()
    house.hosted.visible.advance(p64(5))
    with pytest.raises(StorageError, match="half a character"):
        peer.ask("loadSerial", A, p64(1))
    assert peer.ask("ping") is None


def test_an_answer_that_no_client_would_take(house: MemoryHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients have a limit, too: such an answer would cost them the connection."""
    peer = house.peer()
    peer.commit(A, data=b"x" * 70_000)
    monkeypatch.setattr(limits, "FRAME_BYTES", 66_000)
    with pytest.raises(StorageError, match="too large to be sent"):
        peer.ask("loadBefore", A, MAX_TID)
    assert peer.ask("ping") is None


def test_a_missing_object_is_no_matter_for_the_log(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    peer = house.peer()
    with pytest.raises(POSKeyError):
        peer.ask("loadBefore", A, MAX_TID)
    assert log_lines(caplog) == []


# What is written ------------------------------------------------------------------------------------------


def test_the_answers_to_one_segment_are_written_at_once(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.commit(A)
    peer.read()
    calls = [Call("loadBefore") for _ in range(100)]
    peer.send(b"".join(peer.connection.call(call, "loadBefore", (A, MAX_TID)) for call in calls))
    assert len(peer.wire.writes) == 1
    peer.read()
    assert all(call.value[0] == b"data" for call in calls)


def test_a_client_that_does_not_read_gets_no_more_answers(house: MemoryHouse) -> None:
    """All its calls may have arrived in one segment; their answers must not all be made at once."""
    peer = house.peer()
    size = 100_000
    peer.commit(A, data=b"x" * size)
    peer.read()
    calls = [Call("loadBefore") for _ in range(1000)]
    peer.wire.on_write = peer.session.pause
    peer.send(b"".join(peer.connection.call(call, "loadBefore", (A, MAX_TID)) for call in calls))
    assert sum(map(len, peer.wire.writes)) < limits.GATHER_BYTES + 2 * size
    rounds = 0
    while not calls[-1].answered:
        peer.wire.on_write = peer.session.pause
        peer.session.resume()
        assert sum(map(len, peer.wire.writes)) < 2 * (limits.GATHER_BYTES + 2 * size)
        peer.read()
        rounds += 1
        assert rounds < 2000
    assert all(len(call.value[0]) == size for call in calls)


def test_a_client_that_does_not_read_still_gets_its_invalidations_in_order(house: MemoryHouse) -> None:
    peer, writer = house.peer(), house.peer()
    writer.commit(A)
    peer.read()
    peer.session.pause()
    call = Call("lastTransaction")
    peer.send(peer.connection.call(call, "lastTransaction", ()))
    tid = writer.commit(B)
    assert list(in_order(peer.read())) == ["call invalidateTransaction"]
    peer.session.resume()
    peer.read()
    assert call.result == tid


def test_a_client_is_dropped_while_it_does_not_read(house: MemoryHouse) -> None:
    peer = house.peer()
    peer.session.pause()
    call = Call("ping")
    peer.send(peer.connection.call(call, "ping", ()))
    peer.session.drop("enough")
    peer.session.resume()
    peer.read()
    assert not call.answered


# The end --------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_is_forgotten(house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = house.peer()
    peer.prepare(A)
    peer.session.lost("connection reset by peer")
    assert house.hosted.clients == set()
    assert house.hosted.transactions.active == 0
    assert log_lines(caplog, logging.INFO)[-1] == "peer disconnected: connection reset by peer"


def test_a_client_that_never_registered_leaves_no_line(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    Peer(house).disconnect()
    assert log_lines(caplog, logging.INFO) == []


def test_a_session_ends_once(house: MemoryHouse, caplog: pytest.LogCaptureFixture) -> None:
    peer = house.peer()
    peer.session.drop("enough")
    peer.session.drop("again")
    peer.session.lost("gone")
    peer.send(peer.connection.heartbeat())
    peer.session.hold()
    peer.session.tell(Announcement("info", {}))
    peer.session.let_go()
    assert peer.wire.writes == []
    assert log_lines(caplog) == ["peer dropped: enough"]


def test_calls_after_the_one_that_ends_the_connection_are_not_carried_out(house: MemoryHouse) -> None:
    peer = house.peer()
    good = Call("ping")
    late = Call("ping")
    peer.send(
        peer.connection.call(good, "ping", ())
        + peer.connection.one_way("nosuch", ())
        + peer.connection.call(late, "ping", ())
    )
    peer.read()
    assert (good.answered, late.answered) == (True, False)


def test_what_a_storage_can_not_do_leaves_no_traceback(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does what it refuses in words of its own: whoever asks again and again would fill the log."""
    peer = house.peer()
    with pytest.raises(Unsupported, match="can't list its objects"):
        peer.ask("record_iternext", None)
    assert log_lines(caplog) == []
    peer.begin()
    peer.store(p64(1), b"")
    with pytest.raises(StorageError, match="is empty"):
        peer.ask("vote", 1)
    (line,) = log_lines(caplog)
    assert line.startswith("peer: vote failed: the data of object")
