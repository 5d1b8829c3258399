"""The connection of a client storage: which server it takes, how it is verified, lost and made again.

Seen from outside, through `ClientStorage`, against servers that follow a script.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError, ReadOnlyError, StorageError

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
    welcomed,
)
from tests.peers import wait_until
from zeoid import ClientStorage, limits
from zeoid.errors import ClientError, Disconnected, TimedOut
from zeoid.model import NO_TID, tid_after
from zeoid.testing import INFO, Call, ScriptedConnection
from zeoid.wire.codec import codec_for
from zeoid.wire.messages import EXTENSIONS

SHORT_S = 0.2
#: Prompt: long before any deadline.
PROMPT_S = 5.0


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for between attempts, less long."""
    monkeypatch.setattr(limits, "RECONNECT_FIRST_S", 0.01)
    monkeypatch.setattr(limits, "RECONNECT_LAST_S", 0.02)
    monkeypatch.setattr(limits, "WRITER_POLL_S", 0.02)


def ping(storage: ClientStorage, connection: ScriptedConnection) -> None:
    """A round trip: afterwards all that was sent before has been applied."""
    task = Task(storage.ping)
    connection.answer(connection.expect("ping"), None)
    task.result()


def refuse_writing(connection: ScriptedConnection) -> Call:
    """Be a server that can only be read from; its next call."""
    connection.offer()
    register = connection.expect("register")
    assert register.args == ("1", False)
    connection.send(connection.fault(register, ReadOnlyError()))
    return register


def be_read_only(connection: ScriptedConnection, last: bytes = T1, **keywords: Any) -> None:
    """Be a server that can only be read from, and is taken for that."""
    refuse_writing(connection)
    register = connection.expect("register")
    assert register.args == ("1", True)
    connection.answer(register, last)


def verified(connection: ScriptedConnection, missed: Any = None) -> None:
    call = connection.expect_after_same_history("getInvalidations", "get_info")
    if call.name == "getInvalidations":
        connection.answer(call, missed)
        call = connection.expect("get_info")
    connection.answer(call, {"length": 1, "size": 2, "name": "x", "supportsUndo": False, "interfaces": ()})


# The first connection ---------------------------------------------------------------------------------


def test_what_a_client_says_first(scene: Scene) -> None:
    server = scene.server()
    storage = scene.storage(server, storage="zoo", client_label="the lion's")
    connection = server.accept()
    register = connection.welcome(T1)
    assert register.args == ("zoo", False)
    label = connection.expect("set_client_label")
    assert (label.args, label.one_way) == (("the lion's",), True)
    wait_until(storage.is_connected, "a connection")
    assert storage.lastTransaction() == T1
    assert storage.protocol == "M5"
    ping(storage, connection)


def test_a_database_without_any_transaction(scene: Scene) -> None:
    server = scene.server()
    storage = scene.storage(server)
    server.accept().welcome(NO_TID)
    wait_until(storage.is_connected, "a connection")
    assert storage.lastTransaction() == NO_TID


def test_waiting_for_the_first_connection(scene: Scene) -> None:
    server = scene.server()
    opening = Task(scene.storage, server, wait=True)
    assert opening.is_held_up()
    server.accept().welcome(T1)
    assert opening.result().is_connected()


def test_nobody_there(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    server = scene.server()
    server.stop_listening()
    host, port = server.address
    with pytest.raises(TimedOut, match=rf"within 0\.2 s: {host}:{port}: connection refused") as failure:
        scene.storage(server, wait=True, wait_timeout=SHORT_S)
    assert isinstance(failure.value, StorageError)
    assert isinstance(failure.value, TransientError)
    assert caplog.text.count("connection refused") == 1, "the same failure again and again is told once"


def test_not_waiting_for_a_server_that_comes_later(scene: Scene) -> None:
    server = scene.server()
    server.stop_listening()
    storage = scene.storage(server)
    assert not storage.is_connected()
    assert storage.protocol == ""
    assert "trying to connect to" in storage.getName()
    with pytest.raises(Disconnected, match="never connected"):
        storage.sortKey()
    server.listen_again()
    server.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection")
    host, port = server.address
    assert storage.getName() == f"{host}:{port} (connected to {host}:{port})"
    assert storage.sortKey() == f"1:{host}:{port}"
    storage.close()
    assert storage.getName() == f"{host}:{port} (closed)"


def test_a_server_that_never_makes_an_offer(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECT_TIMEOUT_S", 0.1)
    mute, server = scene.server(), scene.server()
    storage = scene.storage(mute, server)
    assert mute.accept().expect_end() == []
    server.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection with the second address")


@pytest.mark.parametrize("mute_at", ["register", "getInvalidations", "get_info"])
def test_a_server_that_falls_silent_during_the_handshake(scene: Scene, mute_at: str) -> None:
    server = scene.server()
    storage, connection = scene.connected(server=server, wait_timeout=0.5)
    connection.close()
    silent = server.accept()
    silent.offer()
    answers: dict[str, Any] = {"register": T2, "getInvalidations": (T2, []), "get_info": {}}
    for name, answer in answers.items():
        call = silent.expect(name)
        if name == mute_at:
            break
        silent.answer(call, answer)
    assert silent.expect_end() == []
    welcomed(storage, server, T2, (T2, []))


def test_an_unknown_storage_is_refused_at_once(scene: Scene) -> None:
    server = scene.server()
    opening = Task(scene.storage, server, storage="zoo", wait=True)
    connection = server.accept()
    connection.offer()
    connection.send(connection.fault(connection.expect("register"), ValueError("unknown storage: zoo")))
    with pytest.raises(ClientError, match="refused: unknown storage: zoo") as failure:
        opening.result(PROMPT_S)
    assert not isinstance(failure.value, TransientError)
    assert connection.expect_end() == []


def test_of_two_servers_one_refuses(scene: Scene) -> None:
    """That is no reason to give up."""
    first, second = scene.server(), scene.server()
    opening = Task(scene.storage, first, second, wait=True)
    connection = first.accept()
    connection.offer()
    connection.send(connection.fault(connection.expect("register"), ValueError("unknown storage")))
    second.accept().welcome(T1)
    assert opening.result().is_connected()


@pytest.mark.parametrize("problem", [StorageError("full"), POSKeyError(OID), LookupError("?"), KeyError("k")])
def test_a_server_that_fails_to_register(scene: Scene, problem: Exception) -> None:
    """Whatever it says: the client goes on trying."""
    first, second = scene.server(), scene.server()
    storage = scene.storage(first, second)
    connection = first.accept()
    connection.offer()
    connection.send(connection.fault(connection.expect("register"), problem))
    assert connection.expect_end() == []
    second.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection with the second address")


# What a server must not say ---------------------------------------------------------------------------


@pytest.mark.parametrize("tid", [1, "T", b"short", (), {}], ids=repr)
def test_a_last_tid_that_is_none(scene: Scene, tid: Any) -> None:
    first, second = scene.server(), scene.server()
    storage = scene.storage(first, second)
    connection = first.accept()
    connection.offer()
    connection.answer(connection.expect("register"), tid)
    assert connection.expect_end() == []
    second.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection with the second address")
    assert storage.lastTransaction() == T1


@pytest.mark.parametrize("info", [None, 1, "info", (1, 2), {"interfaces": 5}, {"interfaces": (1,)}], ids=repr)
def test_information_that_is_none(scene: Scene, info: Any) -> None:
    first, second = scene.server(), scene.server()
    storage = scene.storage(first, second)
    connection = first.accept()
    connection.offer()
    connection.answer(connection.expect("register"), T1)
    connection.answer(connection.expect("get_info"), info)
    assert connection.expect_end() == []
    second.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection with the second address")


@pytest.mark.parametrize(
    "missed", [1, (), (T2,), (T2, 5), (1, [OID]), (b"", [OID]), (T2, [b"short"]), (T2, [OID], 3)], ids=repr
)
def test_missed_invalidations_that_are_none(scene: Scene, missed: Any) -> None:
    """They are not applied in part, and the next connection is asked again."""
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    load(storage, connection, OID, at(T1), (b"old", T1, None))
    connection.close()
    broken = server.accept()
    broken.offer()
    broken.answer(broken.expect("register"), T2)
    broken.answer(broken.expect_after_same_history("getInvalidations"), missed)
    with contextlib.suppress(AssertionError):
        broken.answer(broken.expect("get_info", timeout_s=0.0), {})
    again = server.accept()
    again.offer()
    again.answer(again.expect("register"), T2)
    call = again.expect_after_same_history("getInvalidations")
    assert call.args == (T1,)
    again.answer(call, (T2, [OID]))
    again.answer(again.expect("get_info"), {})
    wait_until(storage.is_connected, "a connection")
    assert storage.lastTransaction() == T2
    assert not is_cached(storage, again, OID, at(T2))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("invalidateTransaction", (T2,)),
        ("invalidateTransaction", (b"short", [OID])),
        ("invalidateTransaction", (T2, [b"short"])),
        ("invalidateTransaction", (T2, 5)),
        ("invalidateTransaction", (None, [OID])),
        ("invalidateTransaction", 5),
        ("info", ()),
        ("info", ([1],)),
        ("info", ({"length": 1}, 2)),
        ("formatDisk", ()),
        ("__class__", ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("early", [True, False], ids=["during the handshake", "afterwards"])
def test_calls_that_no_server_makes(scene: Scene, name: str, args: Any, early: bool) -> None:
    """The connection is dropped, whenever they come, and another one is made."""
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.offer()
    register = connection.expect("register")
    bad = framed(codec_for(connection.protocol.encode()).encode(0, 1, name, args))
    if early:
        connection.send(connection.reply(register, T1), bad)
        with contextlib.suppress(AssertionError):
            connection.answer(connection.expect("get_info"), {})
    else:
        connection.answer(register, T1)
        connection.answer(connection.expect("get_info"), {})
        wait_until(storage.is_connected, "a connection")
        connection.send(bad)
    assert connection.expect_end() == []
    again = server.accept()
    again.welcome(T1)
    ping(storage, again)
    assert storage.lastTransaction() == T1


def framed(data: bytes) -> bytes:
    """Whether the codec frames by itself or not does not matter to these tests."""
    return data if len(data) == 4 + int.from_bytes(data[:4], "big") else len(data).to_bytes(4, "big") + data


@pytest.mark.parametrize(
    "sent",
    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1\xc1", b"\0\0\0\5\x94\x07\0\xa0\xc0", b"\0\0\0\5\x94"],
    ids=["huge", "empty", "no msgpack", "a call that wants a reply", "half a message"],
)
def test_what_is_no_protocol_ends_the_connection_and_calls_go_to_the_next(scene: Scene, sent: bytes) -> None:
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    listener = Listener()
    storage.registerDB(listener)
    loading, asking = Task(storage.loadBefore, OID, at(T1)), Task(storage.ping)
    for _ in range(2):
        connection.expect("loadBefore", "ping")
    connection.send(connection.invalidation(T2, [OTHER]), sent)
    connection.close()
    again = server.accept()
    again.welcome(T2, missed=(T2, [OTHER]))
    for _ in range(2):
        call = again.expect("loadBefore", "ping")
        again.answer(call, None if call.name == "ping" else (b"data", T1, None))
    asking.result()
    assert loading.result() == (b"data", T1, None)
    assert listener.heard == [(T2, [OTHER])]
    assert storage.lastTransaction() == T2


# The coding -------------------------------------------------------------------------------------------


def test_a_server_that_cannot_read_the_better_coding(scene: Scene) -> None:
    """It offers Z5, and breaks off when the answer is M5. Then the client takes what was offered."""
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    assert connection.offer("Z5") == "M5"
    connection.close()
    connection = server.accept()
    assert connection.offer("Z5") == "Z5"
    connection.answer(connection.expect("register"), T1)
    connection.answer(connection.expect("get_info"), {})
    wait_until(storage.is_connected, "a connection")
    assert storage.protocol == "Z5"


@pytest.mark.parametrize(("coding", "offer"), [("M5", "Z5"), ("M5", "M5"), ("Z5", "M5"), ("Z5", "Z5")])
def test_a_coding_that_was_asked_for(scene: Scene, coding: str, offer: str) -> None:
    """It is what the client answers, however often the connection breaks."""
    server = scene.server()
    storage = scene.storage(server, coding=coding)
    for _ in range(2):
        connection = server.accept()
        assert connection.offer(offer) == coding
        connection.close()
    connection = server.accept()
    connection.welcome(T1, coding=offer)
    wait_until(storage.is_connected, "a connection")
    assert storage.protocol == coding


# Several servers --------------------------------------------------------------------------------------


def test_addresses_are_tried_in_turn(scene: Scene) -> None:
    first, second, third = scene.server(), scene.server(), scene.server()
    first.stop_listening()
    storage = scene.storage(first, second, third)
    second.accept().close()
    third.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection")
    assert storage.sortKey() == "1:{}:{}".format(*third.address)


def test_a_writer_is_looked_for_among_read_only_servers(scene: Scene) -> None:
    reader, writer = scene.server(), scene.server()
    storage = scene.storage(reader, writer)
    connection = reader.accept()
    refuse_writing(connection)
    assert connection.expect_end() == []
    writer.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection")
    assert not storage.isReadOnly()


def test_only_read_only_servers(scene: Scene) -> None:
    server = scene.server()
    opening = Task(scene.storage, server, wait=True, wait_timeout=1.0)
    refuse_writing(server.accept())
    with pytest.raises(TimedOut, match="it is read-only"):
        opening.result()


def test_read_only_is_content_with_any(scene: Scene) -> None:
    server = scene.server()
    storage = scene.storage(server, read_only=True)
    connection = server.accept()
    register = connection.welcome(T1)
    assert register.args == ("1", True)
    wait_until(storage.is_connected, "a connection")
    assert storage.isReadOnly()
    assert storage.is_read_only()
    assert "read-only" in storage.getName()


def test_fallback_prefers_a_writer(scene: Scene) -> None:
    reader, writer = scene.server(), scene.server()
    storage = scene.storage(reader, writer, read_only_fallback=True)
    fallback = reader.accept()
    be_read_only(fallback)
    writer.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection")
    assert not storage.isReadOnly()
    assert fallback.expect_end() == []


class Fallback:
    """A client that had to take a read-only server, of two."""

    def __init__(self, scene: Scene, last: bytes = T1) -> None:
        self.reader, self.writer = scene.server(), scene.server()
        self.writer.stop_listening()
        self.storage = scene.storage(self.reader, self.writer, read_only_fallback=True)
        self.listener = Listener()
        self.connection = self.reader.accept()
        be_read_only(self.connection, last)
        verified(self.connection)
        wait_until(self.storage.is_connected, "a connection")
        self.storage.registerDB(self.listener)

    def turn_seekers_away(self) -> None:
        """The read-only server is asked again and again whether it can write by now."""
        refuse_writing(self.reader.accept())

    def accept_seeker(self) -> ScriptedConnection:
        """The writer is there: whoever looks for it comes."""
        self.writer.listen_again()
        turning_away = threading.Event()

        def turn_away() -> None:
            while not turning_away.is_set():
                with contextlib.suppress(AssertionError, OSError):
                    refuse_writing(self.reader.accept(timeout_s=0.05))

        task = Task(turn_away)
        try:
            return self.writer.accept()
        finally:
            turning_away.set()
            task.result()


def test_fallback_takes_a_reader_and_then_a_writer_that_appears(scene: Scene) -> None:
    fallback = Fallback(scene)
    storage = fallback.storage
    assert storage.isReadOnly()
    with pytest.raises(ReadOnlyError):
        storage.new_oid()
    fallback.turn_seekers_away()
    seeker = fallback.accept_seeker()
    seeker.offer()
    register = seeker.expect("register")
    assert register.args == ("1", False)
    seeker.answer(register, T1)
    verified(seeker)
    wait_until(lambda: not storage.isReadOnly(), "write access")
    assert fallback.connection.expect_end() == []
    oids = Task(storage.new_oid)
    seeker.answer(seeker.expect("new_oids"), [OID])
    assert oids.result() == OID


def test_a_writer_that_was_found_and_lost_is_looked_for_again(scene: Scene) -> None:
    fallback = Fallback(scene)
    storage = fallback.storage
    for _ in range(2):
        seeker = fallback.accept_seeker()
        seeker.welcome(T1)
        wait_until(lambda: not storage.isReadOnly(), "write access")
        wait_until(lambda: not seeking(fallback), "the end of the search")
        fallback.writer.stop_listening()
        seeker.close()
        connection = fallback.reader.accept()
        be_read_only(connection)
        verified(connection)
        wait_until(lambda: storage.isReadOnly() and storage.is_connected(), "a connection")


def seeking(fallback: Fallback) -> bool:
    address = "{}:{}".format(*fallback.writer.address)
    return any("seeks" in thread.name and address in thread.name for thread in threading.enumerate())


def test_a_commit_that_both_servers_tell_of_during_the_change(scene: Scene) -> None:
    """Between the writer's register and the change the old server goes on delivering. It is the same
    history: nothing is lost, nothing told twice, and the new server is not taken for one that lags behind.
    """
    fallback = Fallback(scene)
    storage, old = fallback.storage, fallback.connection
    seeker = fallback.accept_seeker()
    seeker.offer()
    register = seeker.expect("register")
    ping(storage, old)
    old.send(old.invalidation(T2, [OID]))
    wait_until(lambda: storage.lastTransaction() == T2, "the commit")
    seeker.send(seeker.reply(register, T1), seeker.invalidation(T2, [OID]), seeker.invalidation(T3, [OTHER]))
    for _ in range(3):
        call = seeker.expect_after_same_history("lastTransaction", "getInvalidations", "get_info")
        if call.name == "lastTransaction":
            seeker.answer(call, T3)
        elif call.name == "getInvalidations":
            seeker.answer(call, (T3, [OTHER]))
        else:
            seeker.answer(call, {})
            break
    wait_until(lambda: not storage.isReadOnly(), "write access")
    ping(storage, seeker)
    assert storage.lastTransaction() == T3
    assert fallback.listener.heard == [(T2, [OID]), (T3, [OTHER])]


def test_a_writer_is_looked_for_again_after_the_reader_was_lost(scene: Scene) -> None:
    """Also when the search was stuck in the middle of an attempt at that time."""
    fallback = Fallback(scene)
    stuck = fallback.accept_seeker()  # the search has come as far as this, and gets no answer
    fallback.writer.stop_listening()
    fallback.connection.close()
    for _ in range(2):  # whoever comes first
        connection = fallback.reader.accept()
        refuse_writing(connection)
        with contextlib.suppress(AssertionError):
            register = connection.expect("register", timeout_s=SHORT_S)
            assert register.args == ("1", True)
            connection.answer(register, T1)
            verified(connection)
            break
    wait_until(fallback.storage.is_connected, "a connection")
    stuck.close()
    seeker = fallback.accept_seeker()
    seeker.welcome(T1)
    wait_until(lambda: not fallback.storage.isReadOnly(), "write access")


def test_a_server_behind_the_client_is_refused(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    server = scene.server()
    storage, connection = scene.connected(T3, server=server, wait_timeout=1.0)
    connection.close()
    old = server.accept()
    old.offer()
    old.answer(old.expect("register"), T2)
    answer_last(old, T2)
    waiting = Task(storage.ping)
    with pytest.raises(TimedOut, match=r"is behind: its last transaction is .* was seen before"):
        waiting.result()
    assert "is behind" in caplog.text
    assert storage.lastTransaction() == T3
    assert not storage.is_connected()


def test_a_database_that_stays_behind_was_restored(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No site is down because of it: what is known is forgotten, which is said, and the client goes on."""
    server = scene.server()
    storage, connection = scene.connected(T3, server=server)
    listener = Listener()
    storage.registerDB(listener)
    load(storage, connection, OID, at(T3), (b"data", T1, None))
    connection.close()
    behind = server.accept()
    behind.offer()
    behind.answer(behind.expect("register"), T2)
    answer_last(behind, T2)
    monkeypatch.setattr(limits, "BEHIND_S", 0.0)
    restored = server.accept()
    restored.offer()
    restored.answer(restored.expect("register"), T2)
    restored.answer(restored.expect("lastTransaction"), T2)
    restored.answer(restored.expect("get_info"), dict(INFO))
    wait_until(storage.is_connected, "a connection")
    assert "must have been restored from a back-up" in caplog.text
    assert storage.lastTransaction() == T2
    assert listener.heard == ["everything"]
    assert not is_cached(storage, restored, OID, at(T2))


def test_a_server_that_is_behind_is_waited_for_longer_while_another_one_is_away(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is away may have what this one has not got yet."""
    monkeypatch.setattr(limits, "BEHIND_S", 0.0)
    first, second = scene.server(), scene.server()
    storage = scene.storage(first, second)
    connection = first.accept()
    connection.welcome(T3)
    wait_until(storage.is_connected, "a connection")
    second.close()
    connection.close()
    for _ in range(2):
        behind = first.accept()
        behind.offer()
        behind.answer(behind.expect("register"), T2)
        answer_last(behind, T2)
    assert storage.lastTransaction() == T3


@pytest.mark.parametrize(
    "answer", [(b"other", T2, None), (b"other", T1, T2), None, POSKeyError(OID)], ids=repr
)
def test_another_history_that_has_passed_what_was_seen_is_found_out(
    scene: Scene, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    """A database that was restored, and went on since: it is not merely newer."""
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    listener = Listener()
    storage.registerDB(listener)
    load(storage, connection, OTHER, at(T1), (b"data", T1, None))
    connection.send(connection.invalidation(T3, [OID]))
    wait_until(lambda: storage.lastTransaction() == T3, "the invalidation")
    listener.heard.clear()
    connection.close()
    again = server.accept()
    again.offer()
    again.answer(again.expect("register"), T4)
    asked = again.expect("loadBefore")
    assert asked.args == (OID, tid_after(T3))
    if isinstance(answer, Exception):
        again.send(again.fault(asked, answer))
    else:
        again.answer(asked, answer)
    again.answer(again.expect("get_info"), dict(INFO))
    wait_until(storage.is_connected, "a connection")
    assert "can't be found in its database" in caplog.text
    assert storage.lastTransaction() == T4
    assert listener.heard == ["everything"]
    assert not is_cached(storage, again, OTHER, at(T4))


def answer_last(connection: ScriptedConnection, last: bytes) -> None:
    """It may be asked again, in case that it has caught up meanwhile; then the connection ends."""
    with contextlib.suppress(AssertionError):
        connection.answer(connection.expect("lastTransaction"), last)
    assert connection.expect_end() == []


def test_an_empty_database_where_there_was_one(scene: Scene) -> None:
    server = scene.server()
    storage, connection = scene.connected(T3, server=server)
    connection.close()
    empty = server.accept()
    empty.offer()
    empty.answer(empty.expect("register"), NO_TID)
    answer_last(empty, NO_TID)
    server.accept().welcome(T3)
    wait_until(storage.is_connected, "a connection")
    assert storage.lastTransaction() == T3


def test_instead_of_a_server_that_is_behind_another_one_is_taken(scene: Scene) -> None:
    first, second = scene.server(), scene.server()
    storage = scene.storage(first, second)
    connection = first.accept()
    connection.welcome(T3)
    wait_until(storage.is_connected, "a connection")
    connection.close()
    behind = first.accept()
    behind.offer()
    behind.answer(behind.expect("register"), T2)
    answer_last(behind, T2)
    good = second.accept()
    good.welcome(T4, missed=(T4, [OID]))
    wait_until(storage.is_connected, "a connection")
    assert storage.lastTransaction() == T4


# Losing a connection ----------------------------------------------------------------------------------


def test_the_cache_survives_when_nothing_was_missed(scene: Scene) -> None:
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    load(storage, connection, OID, at(T1), (b"data", T1, None))
    connection.close()
    again = server.accept()
    again.welcome(T1)
    wait_until(storage.is_connected, "a connection")
    assert is_cached(storage, again, OID, at(T1))


def test_what_was_missed_is_forgotten_and_told_and_nothing_else(scene: Scene) -> None:
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    listener = Listener()
    storage.registerDB(listener)
    load(storage, connection, OID, at(T1), (b"data", T1, None))
    load(storage, connection, OTHER, at(T1), (b"other", T1, None))
    connection.close()
    again = server.accept()
    again.welcome(T3, missed=(T3, [OID]))
    wait_until(storage.is_connected, "a connection")
    assert listener.heard == [(T3, [OID])]
    assert storage.lastTransaction() == T3
    assert not is_cached(storage, again, OID, at(T3))
    assert is_cached(storage, again, OTHER, at(T3))


def test_too_much_was_missed(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    listener = Listener()
    storage.registerDB(listener)
    load(storage, connection, OID, at(T1), (b"data", T1, None))
    connection.close()
    again = server.accept()
    again.welcome(T3, missed=None)
    wait_until(storage.is_connected, "a connection")
    assert listener.heard == ["everything"]
    assert storage.lastTransaction() == T3
    assert not is_cached(storage, again, OID, at(T3))
    assert "too much was missed" in caplog.text


def test_calls_are_made_again_on_the_next_connection(scene: Scene) -> None:
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    loading, asking = Task(storage.loadBefore, OID, at(T1)), Task(storage.getTid, OID)
    for _ in range(2):
        connection.expect("loadBefore", "getTid")
    connection.close()
    again = server.accept()
    again.welcome(T1)
    for _ in range(2):
        call = again.expect("loadBefore", "getTid")
        again.answer(call, T1 if call.name == "getTid" else (b"data", T1, None))
    assert loading.result() == (b"data", T1, None)
    assert asking.result() == T1


def test_the_word_of_an_old_connection_does_not_unmake_the_new_one(scene: Scene) -> None:
    """The thread that notices a connection's end may be slow to say so: the next one is in use by then."""
    server = scene.server()
    storage = scene.storage(server)
    link = storage._link
    lost, held = link._lost, Held()

    def slow(*args: Any) -> None:
        if not held_once.is_set():
            held_once.set()
            held.stop_here()
        lost(*args)

    held_once = threading.Event()
    link._lost = slow  # type: ignore[assignment,method-assign]
    connection = server.accept()
    connection.welcome(T1)
    wait_until(storage.is_connected, "a connection")
    Task(storage.ping)  # this thread reads, and will be the slow one
    connection.expect("ping")
    connection.close()
    held.wait_for_entry()
    again = server.accept()
    again.welcome(T1)
    wait_until(lambda: storage._link.generation > 2, "the next connection")
    held.let_go()
    answered = again.expect("ping")
    again.answer(answered, None)
    ping(storage, again)
    assert storage.is_connected()


# Closing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["offer", "register", "get_info"])
def test_closing_does_not_wait_for_a_server_that_does_not_answer(scene: Scene, stage: str) -> None:
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    if stage != "offer":
        connection.offer()
        register = connection.expect("register")
        if stage == "get_info":
            connection.answer(register, T1)
            connection.expect("get_info")
    Task(storage.close).result(PROMPT_S)
    assert connection.expect_end() == []


def test_closing_between_attempts(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONNECT_FIRST_S", 3600.0)
    server = scene.server()
    server.stop_listening()
    storage = scene.storage(server)
    waiting = Task(storage.ping)
    assert waiting.is_held_up()
    Task(storage.close).result(PROMPT_S)
    assert isinstance(waiting.outcome(PROMPT_S), Disconnected)


def test_closing_ends_every_thread(scene: Scene) -> None:
    before = set(threading.enumerate())
    fallback = Fallback(scene)
    fallback.storage.close()
    fallback.storage.close()
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")


def test_after_closing_everything_says_so(scene: Scene) -> None:
    storage, connection = scene.connected()
    storage.close()
    assert connection.expect_end() == []
    for ask in (storage.ping, storage.new_oid, lambda: storage.loadBefore(OID, T1), storage.iterator):
        with pytest.raises(Disconnected, match="closed"):
            ask()
    assert not storage.is_connected()
    assert storage.lastTransaction() == T1


# In the background ------------------------------------------------------------------------------------


def test_invalidations_are_applied_while_nobody_calls(scene: Scene) -> None:
    storage, connection = scene.connected(T1)
    load(storage, connection, OID, at(T1), (b"old", T1, None))
    connection.send(connection.invalidation(T2, [OID]))
    wait_until(lambda: storage.lastTransaction() == T2, "the invalidation")
    assert storage.loadBefore(OID, T2) == (b"old", T1, T2)
    assert not is_cached(storage, connection, OID, at(T2))


def test_the_end_of_a_connection_is_noticed_while_nobody_calls(scene: Scene) -> None:
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    connection.close()
    server.accept().welcome(T2, missed=(T2, [OID]))
    wait_until(lambda: storage.lastTransaction() == T2, "what was missed")


def test_a_heartbeat_while_nobody_calls(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEARTBEAT_S", 0.05)
    _, connection = scene.connected()
    connection._sock.settimeout(DEADLINE_S)
    assert codec_for(b"M5").decode(connection._sock.recv(100)[4:]) == (-1, 0, ".reply", None)


def test_what_is_heard_of_the_size(scene: Scene) -> None:
    storage, connection = scene.connected()
    connection.send(connection.call("info", {"size": 4711, "length": 12}))
    wait_until(lambda: storage.getSize() == 4711, "the size")
    counting = Task(len, storage)
    connection.answer(connection.expect("get_info"), {"length": 13, "size": 5000})
    assert counting.result() == 13
    assert storage.getSize() == 5000


def test_a_client_says_what_it_does(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zeoid.client")
    server = scene.server()
    storage, connection = scene.connected(T1, server=server)
    connection.close()
    server.accept().welcome(T1)
    wait_until(storage.is_connected, "a connection")
    host, port = server.address
    assert f"trying to connect to {host}:{port}" in caplog.text
    assert f"connected to {host}:{port}, storage '1', protocol M5" in caplog.text
    assert f"disconnected from {host}:{port}: " in caplog.text


def test_a_unix_socket(scene: Scene, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    server = scene.server(path=path)
    storage, connection = scene.connected(T1, server=server)
    ping(storage, connection)
    assert storage.getName() == f"{path} (connected to {path})"


# What a server knows beyond ZEO's methods -------------------------------------------------------------


def begins_with(storage: ClientStorage, connection: ScriptedConnection) -> Call:
    """The first message of a transaction."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    voting = Task(storage.tpc_vote, transaction)
    call = connection.expect()
    vote = connection.expect("vote") if call.one_way else call
    connection.answer(vote, [])
    voting.result()
    storage.tpc_abort(transaction)
    connection.expect("tpc_abort")
    return call


def test_extensions_are_those_of_the_connection(scene: Scene) -> None:
    """The next server may be of another kind: a stock one is never asked for what it does not know."""
    server = scene.server()
    storage = scene.storage(server)
    for extensions in (EXTENSIONS, (), EXTENSIONS, ()):
        connection = server.accept()
        connection.welcome(T1, extensions=extensions)
        wait_until(storage.is_connected, "a connection")
        name = "tpc_prepare" if extensions else "tpc_begin"
        assert begins_with(storage, connection).name == name
        connection.close()
        wait_until(lambda: not storage.is_connected(), "the end of the connection")


def test_extensions_of_a_later_version(scene: Scene) -> None:
    """What we do not know we do not use."""
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.welcome(T1, extensions=["tpc_teleport", "ping", "tpc_begin"])
    wait_until(storage.is_connected, "a connection")
    assert begins_with(storage, connection).name == "tpc_begin"
    channel = storage._link.ready
    assert channel is not None
    assert channel.extensions == frozenset()


@pytest.mark.parametrize("extensions", [None, "tpc_prepare", 5, {"tpc_prepare": 1}], ids=repr)
def test_extensions_that_are_no_list(scene: Scene, extensions: Any) -> None:
    """Such a server is not used, and the next one is tried."""
    server = scene.server()
    storage = scene.storage(server)
    connection = server.accept()
    connection.welcome(T1, info={**INFO, "extensions": extensions})
    assert connection.expect_end() == []
    welcomed(storage, server, T1)
    assert storage.is_connected()
