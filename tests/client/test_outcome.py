"""What a transaction's client is told when the connection is lost while it finishes: what really happened.

Each race between the lost reply, the next connection and the server's decision, one step after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ReadOnlyError, StorageError

from tests.client.scenes import OID, OTHER, T1, T2, T3, T4, Listener, Scene, Task, at, is_cached, load
from tests.peers import wait_until
from zeoid import ClientStorage, limits
from zeoid.errors import Disconnected, OutcomeUnknown, TimedOut
from zeoid.testing import Call, ScriptedConnection, ScriptedServer
from zeoid.wire.messages import EXTENSIONS

PROMPT_S = 5.0
#: Long enough for a slow machine to make a connection.
SHORT_S = 1.0


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONNECT_FIRST_S", 0.01)
    monkeypatch.setattr(limits, "RECONNECT_LAST_S", 0.02)


class Finishing:
    """A client whose transaction was prepared and is being finished; its server has the extensions."""

    def __init__(self, scene: Scene, *, extensions: Any = EXTENSIONS, **keywords: Any) -> None:
        self.server: ScriptedServer = scene.server()
        self.storage: ClientStorage = scene.storage(self.server, **keywords)
        self.listener = Listener()
        self.storage.registerDB(self.listener)
        self.told: list[bytes] = []
        self.connection: ScriptedConnection = self.next_connection(T1, extensions=extensions)
        load(self.storage, self.connection, OID, at(T1), (b"old", T1, None))
        self.transaction, self.prepare = self.prepared()
        self.task = Task(self.storage.tpc_finish, self.transaction, self.told.append)
        self.call = self.connection.expect("tpc_finish")

    def next_connection(
        self, last: bytes, *, extensions: Any = EXTENSIONS, **keywords: Any
    ) -> ScriptedConnection:
        connection = self.server.accept()
        connection.welcome(last, extensions=extensions, **keywords)
        wait_until(self.storage.is_connected, "a connection")
        return connection

    def prepared(self) -> tuple[TransactionMetaData, Call]:
        transaction = TransactionMetaData()
        self.storage.tpc_begin(transaction)
        self.storage.store(OID, T1, b"mine", "", transaction)
        voting = Task(self.storage.tpc_vote, transaction)
        prepare = self.connection.expect("tpc_prepare")
        self.connection.answer(prepare, [])
        voting.result()
        return transaction, prepare

    def asked(self, connection: ScriptedConnection) -> Call:
        """The client's question on a later connection."""
        call = connection.expect("outcome")
        assert (call.args, call.one_way) == ((self.prepare.args[0], T1), False)
        return call

    def nothing_was_kept(self, connection: ScriptedConnection) -> None:
        assert self.told == []
        assert self.storage.lastTransaction() == T1
        assert is_cached(self.storage, connection, OID, at(T1))
        assert self.storage.loadBefore(OID, at(T1)) == (b"old", T1, None)


def lose(finishing: Finishing) -> None:
    finishing.connection.close()


def break_off(finishing: Finishing) -> None:
    finishing.connection.reset()


# The answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [lose, break_off])
def test_it_was_committed(scene: Scene, how: Callable[[Finishing], None]) -> None:
    """The reply was lost, and the client is none the worse for it. What verification missed is told first."""
    finishing = Finishing(scene)
    how(finishing)
    again = finishing.next_connection(T2, missed=(T2, [OID]))
    again.answer(finishing.asked(again), T2)
    assert finishing.task.result(PROMPT_S) == T2
    assert finishing.told == [T2]
    storage = finishing.storage
    assert storage.lastTransaction() == T2
    assert load(storage, again, OID, at(T2), (b"mine", T2, None)) == (b"mine", T2, None)
    assert storage.tpc_transaction() is None


def test_it_is_committed_while_the_client_asks(scene: Scene) -> None:
    """The server waits for the disk. To the new connection it is the commit of another, and so announced."""
    finishing = Finishing(scene)
    lose(finishing)
    again = finishing.next_connection(T1)
    question = finishing.asked(again)
    assert finishing.task.is_held_up()
    again.send(
        again.invalidation(T2, [OID]), again.invalidation(T3, [OTHER]), again.reply(question, T2),
        again.invalidation(T4, [OTHER]),
    )  # fmt: skip
    assert finishing.task.result(PROMPT_S) == T2
    assert finishing.told == [T2]
    storage = finishing.storage
    wait_until(lambda: storage.lastTransaction() == T4, "what came after it")
    assert finishing.listener.heard == [(T2, [OID]), (T3, [OTHER]), (T4, [OTHER])]
    assert storage.loadBefore(OID, T2) == (b"old", T1, T2)
    assert not is_cached(storage, again, OID, at(T4))


def test_another_one_has_written_the_same_object_since(scene: Scene) -> None:
    """Its revision is not ended by ours, which is older."""
    finishing = Finishing(scene)
    lose(finishing)
    again = finishing.next_connection(T3, missed=(T3, [OID]))
    question = finishing.asked(again)
    storage = finishing.storage
    load(storage, again, OID, at(T3), (b"theirs", T3, None))
    again.answer(question, T2)
    assert finishing.task.result(PROMPT_S) == T2
    assert finishing.told == [T2]
    assert storage.lastTransaction() == T3, "it never goes back"
    assert load(storage, again, OID, at(T3), (b"theirs", T3, None)) == (b"theirs", T3, None)
    assert storage.loadBefore(OID, at(T3)) == (b"theirs", T3, None)


def test_it_was_not_committed(scene: Scene) -> None:
    """A retry is right then. Nothing of it is kept."""
    finishing = Finishing(scene)
    lose(finishing)
    again = finishing.next_connection(T1)
    again.answer(finishing.asked(again), None)
    outcome = finishing.task.outcome(PROMPT_S)
    assert type(outcome) is Disconnected
    assert isinstance(outcome, TransientError)
    assert "not committed" in str(outcome)
    finishing.storage.tpc_abort(finishing.transaction)
    finishing.nothing_was_kept(again)
    assert finishing.listener.heard == []


def test_a_retry_does_not_do_it_twice(scene: Scene) -> None:
    """Whoever tries transient errors again commits once: with a new id, and only after a "no"."""
    finishing = Finishing(scene)
    storage = finishing.storage
    lose(finishing)
    again = finishing.connection = finishing.next_connection(T1)
    again.answer(finishing.asked(again), None)
    assert isinstance(finishing.task.outcome(PROMPT_S), TransientError)
    storage.tpc_abort(finishing.transaction)
    transaction, prepare = finishing.prepared()
    assert prepare.args[0] != finishing.prepare.args[0]
    retrying = Task(storage.tpc_finish, transaction, finishing.told.append)
    again.expect("tpc_finish")
    again.close()
    third = finishing.next_connection(T2, missed=(T2, [OID]))
    question = third.expect("outcome")
    assert question.args[0] == prepare.args[0]
    third.answer(question, T2)
    assert retrying.result(PROMPT_S) == T2
    assert finishing.told == [T2]
    pinging = Task(storage.ping)
    third.answer(third.expect("ping"), None)  # and no third attempt
    pinging.result()


# When and whom it asks --------------------------------------------------------------------------------


def test_the_old_connection_is_closed_before_the_question(scene: Scene) -> None:
    """The deadline passed, the finish may still be in the old connection, and its reply may come at any time.

    The question overtakes it: what the server decides is what counts, and the late reply has no effect.
    """
    finishing = Finishing(scene, wait_timeout=SHORT_S)
    late = finishing.connection.reply(finishing.call, T2)
    assert finishing.connection.expect_end() == []
    again = finishing.next_connection(T1)
    question = finishing.asked(again)
    with contextlib.suppress(OSError):
        finishing.connection.send(late)
    assert finishing.task.is_held_up()
    again.answer(question, None)
    assert type(finishing.task.outcome(PROMPT_S)) is Disconnected
    finishing.nothing_was_kept(again)


def test_the_connection_is_lost_again_and_again(scene: Scene) -> None:
    finishing = Finishing(scene)
    lose(finishing)
    for _ in range(3):
        again = finishing.next_connection(T1)
        finishing.asked(again)
        again.close()
    again = finishing.next_connection(T2, missed=(T2, [OID]))
    again.answer(finishing.asked(again), T2)
    assert finishing.task.result(PROMPT_S) == T2
    assert finishing.told == [T2]


def test_no_connection_in_time(scene: Scene) -> None:
    """The whole of it, however many connections are lost, takes no longer than the deadline."""
    finishing = Finishing(scene, wait_timeout=SHORT_S)
    finishing.server.stop_listening()
    lose(finishing)
    outcome = finishing.task.outcome(PROMPT_S)
    assert type(outcome) is OutcomeUnknown
    assert "may or may not be committed" in str(outcome)
    assert isinstance(outcome.__cause__, TimedOut)
    assert not isinstance(outcome, TransientError)
    assert finishing.told == []


def test_no_answer_in_time(scene: Scene) -> None:
    finishing = Finishing(scene, wait_timeout=SHORT_S)
    lose(finishing)
    again = finishing.next_connection(T1)
    finishing.asked(again)
    assert type(finishing.task.outcome(PROMPT_S)) is OutcomeUnknown
    assert finishing.told == []


@pytest.mark.parametrize(
    "answer", [StorageError("too many came later"), ReadOnlyError(), 5, b"short", "T2", ()], ids=repr
)
def test_an_answer_that_is_none(scene: Scene, answer: Any) -> None:
    finishing = Finishing(scene)
    lose(finishing)
    again = finishing.next_connection(T1)
    question = finishing.asked(again)
    if isinstance(answer, Exception):
        again.send(again.fault(question, answer))
    else:
        again.answer(question, answer)
    outcome = finishing.task.outcome(PROMPT_S)
    assert type(outcome) is OutcomeUnknown
    if isinstance(answer, StorageError) and answer.args:
        assert "too many came later" in str(outcome)
    assert finishing.told == []
    assert finishing.storage.lastTransaction() == T1


@pytest.mark.parametrize("extensions", [(), ("tpc_prepare", "tpc_operate", "checkpoint")], ids=repr)
def test_the_next_server_cannot_be_asked(scene: Scene, extensions: tuple[str, ...]) -> None:
    """It is never sent a method that it did not name."""
    finishing = Finishing(scene)
    lose(finishing)
    again = finishing.next_connection(T1, extensions=extensions)
    assert type(finishing.task.outcome(PROMPT_S)) is OutcomeUnknown
    finishing.nothing_was_kept(again)


def test_the_first_server_could_not_be_asked(scene: Scene) -> None:
    """It knew no `outcome`: then the next one can't know of this transaction."""
    finishing = Finishing(scene, extensions=("tpc_prepare", "tpc_operate"))
    finishing.server.stop_listening()
    lose(finishing)
    assert type(finishing.task.outcome(PROMPT_S)) is OutcomeUnknown


def test_closing_the_storage_ends_the_question(scene: Scene) -> None:
    finishing = Finishing(scene, wait_timeout=60.0)
    lose(finishing)
    again = finishing.next_connection(T1)
    finishing.asked(again)
    finishing.storage.close()
    assert type(finishing.task.outcome(PROMPT_S)) is OutcomeUnknown


# What is no question of the outcome -------------------------------------------------------------------


def test_the_server_dies_between_the_vote_and_the_finish(scene: Scene) -> None:
    """Nobody asked it to commit: that is certain, and nothing of it enters the cache."""
    finishing = Finishing(scene)
    finishing.connection.answer(finishing.call, T2)
    assert finishing.task.result() == T2
    storage = finishing.storage
    told: list[bytes] = []
    transaction, _ = finishing.prepared()
    lose(finishing)
    wait_until(lambda: not storage.is_connected(), "the end of the connection")
    outcome = Task(storage.tpc_finish, transaction, told.append).outcome(PROMPT_S)
    assert type(outcome) is Disconnected
    storage.tpc_abort(transaction)
    again = finishing.next_connection(T2)
    assert told == []
    assert storage.lastTransaction() == T2
    assert is_cached(storage, again, OID, at(T2))
    assert storage.loadBefore(OID, at(T2)) == (b"mine", T2, None), "the one before"


def test_the_server_says_that_it_did_not_commit(scene: Scene) -> None:
    finishing = Finishing(scene)
    finishing.connection.send(finishing.connection.fault(finishing.call, StorageError("disk full")))
    with pytest.raises(StorageError, match="disk full"):
        finishing.task.result()
    finishing.nothing_was_kept(finishing.connection)
