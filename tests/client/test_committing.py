"""One transaction on its way to the server: what is sent when, how conflicts are resolved, how it ends."""

from __future__ import annotations

from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import (
    BTreesConflictError,
    ConflictError,
    ReadConflictError,
    StorageError,
    StorageTransactionError,
    UndoError,
)

from tests.client.scenes import OID, OTHER, T1, T2, T3, T4, Scene, Task, at, is_cached, load, oid
from tests.peers import wait_until
from zeoid import ClientStorage, limits
from zeoid.errors import ClientError, Disconnected, UnsendableValue
from zeoid.model import NO_TID
from zeoid.testing import Call, ScriptedConnection
from zeoid.wire.messages import EXTENSIONS, SERVER_METHODS

PROMPT_S = 5.0


class Writing:
    """A client with a transaction that was begun, and the server's end."""

    def __init__(self, storage: ClientStorage, connection: ScriptedConnection) -> None:
        self.storage = storage
        self.connection = connection
        self.begin()

    def begin(self) -> None:
        self.transaction = TransactionMetaData("joe", "a note", {"k": "v"})
        self.storage.tpc_begin(self.transaction)

    def store(self, oid: bytes = OID, serial: bytes = T1, data: bytes = b"mine") -> None:
        self.storage.store(oid, serial, data, "", self.transaction)

    def voting(self, *expected: str) -> Task:
        """A vote that is under way, once the server has got all before it."""
        task = Task(self.storage.tpc_vote, self.transaction)
        for name in ("tpc_begin", *expected):
            assert self.connection.expect(name).one_way
        return task

    def vote(self, *expected: str, answer: Any = ()) -> Any:
        task = self.voting(*expected)
        self.connection.answer(self.connection.expect("vote"), answer)
        return task.result()

    def finish(self, tid: bytes = T2, before: bytes = b"") -> bytes:
        task = Task(self.storage.tpc_finish, self.transaction)
        call = self.connection.expect("tpc_finish")
        self.connection.send(before, self.connection.reply(call, tid))
        result: bytes = task.result()
        return result

    def ping(self) -> None:
        """Nothing else was sent."""
        task = Task(self.storage.ping)
        self.connection.answer(self.connection.expect("ping"), None)
        task.result()


@pytest.fixture
def writing(scene: Scene) -> Writing:
    return Writing(*scene.connected(T1))


# What is sent -----------------------------------------------------------------------------------------


def test_a_small_transaction_takes_two_round_trips(writing: Writing) -> None:
    """All that goes before the vote is sent with it, in order and under one id."""
    storage, connection, transaction = writing.storage, writing.connection, writing.transaction
    storage.store(OID, T1, b"data", "", transaction)
    storage.checkCurrentSerialInTransaction(OTHER, T1, transaction)
    storage.deleteObject(OTHER, T1, transaction)
    storage.restore(OTHER, T1, None, "", T1, transaction)
    storage.undo(b"undone", transaction)
    voting = Task(storage.tpc_vote, transaction)
    begin = connection.expect()
    number = begin.args[0]
    assert (begin.name, begin.one_way) == ("tpc_begin", True)
    assert begin.args == (number, b"joe", b"a note", {"k": "v"}, None, " ")
    sent = [connection.expect() for _ in range(5)]
    assert [(call.name, call.args) for call in sent] == [
        ("storea", (OID, T1, b"data", number)),
        ("checkCurrentSerialInTransaction", (OTHER, T1, number)),
        ("deleteObject", (OTHER, T1, number)),
        ("restorea", (OTHER, T1, None, T1, number)),
        ("undoa", (b"undone", number)),
    ]
    assert all(call.one_way for call in sent)
    vote = connection.expect("vote")
    assert (vote.args, vote.one_way) == ((number,), False)
    connection.answer(vote, None)
    assert voting.result() is None
    assert writing.finish() == T2
    assert storage.lastTransaction() == T2


def test_every_transaction_has_an_id_of_its_own(writing: Writing) -> None:
    ids = set()
    for _ in range(3):
        voting = Task(writing.storage.tpc_vote, writing.transaction)
        ids.add(writing.connection.expect("tpc_begin").args[0])
        writing.connection.answer(writing.connection.expect("vote"), [])
        voting.result()
        writing.finish()
        writing.begin()
    assert len(ids) == 3


def test_a_copied_transaction_keeps_its_tid_and_status(scene: Scene) -> None:
    storage, connection = scene.connected(T1)
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction, T3, "p")
    voting = Task(storage.tpc_vote, transaction)
    assert connection.expect("tpc_begin").args[4:] == (T3, "p")
    connection.answer(connection.expect("vote"), [])
    voting.result()


def test_a_large_transaction_is_sent_while_it_is_stored(writing: Writing, monkeypatch: Any) -> None:
    monkeypatch.setattr(limits, "GATHER_BYTES", 1000)
    writing.store(data=b"x" * 600)
    writing.store(OTHER, data=b"y" * 600)
    for name in ("tpc_begin", "storea", "storea"):
        writing.connection.expect(name)  # without a vote
    writing.store(data=b"z")
    voting = Task(writing.storage.tpc_vote, writing.transaction)
    assert writing.connection.expect("storea").args[2] == b"z"
    writing.connection.answer(writing.connection.expect("vote"), [])
    voting.result()


def test_aborting_what_was_never_sent_sends_nothing(writing: Writing) -> None:
    writing.store()
    writing.storage.tpc_abort(writing.transaction)
    writing.ping()


def test_aborting_what_was_sent(writing: Writing) -> None:
    writing.store()
    writing.vote("storea")
    writing.storage.tpc_abort(writing.transaction)
    assert writing.connection.expect("tpc_abort").one_way
    writing.storage.tpc_abort(writing.transaction)
    writing.ping()


def test_aborting_on_a_connection_that_is_gone(writing: Writing) -> None:
    writing.store()
    writing.vote("storea")
    writing.connection.close()
    Task(writing.storage.tpc_abort, writing.transaction).result(PROMPT_S)


@pytest.mark.parametrize("value", [object(), [1, object()]], ids=["object", "list"])
def test_a_value_that_cannot_be_sent(writing: Writing, value: Any) -> None:
    """The caller is told at once. The transaction is no worse for it."""
    with pytest.raises(UnsendableValue):
        writing.storage.store(OID, T1, value, "", writing.transaction)
    writing.store()
    writing.vote("storea")


# The vote ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, [], ()], ids=repr)
def test_a_vote_that_changes_nothing(writing: Writing, answer: Any) -> None:
    writing.store()
    assert not writing.vote("storea", answer=answer)
    writing.finish()
    assert writing.storage.loadBefore(OID, at(T2)) == (b"mine", T2, None)


def test_oids_whose_data_the_server_changed(writing: Writing) -> None:
    """They are not kept as they were sent."""
    writing.store()
    writing.store(OTHER)
    assert writing.vote("storea", "storea", answer=[OTHER]) == [OTHER]
    writing.finish()
    assert writing.storage.loadBefore(OID, at(T2)) == (b"mine", T2, None)
    assert not is_cached(writing.storage, writing.connection, OTHER, at(T2))


def test_what_an_undo_changed_is_known_after_the_vote(writing: Writing) -> None:
    load(writing.storage, writing.connection, OID, at(T1), (b"undone", T1, None))
    writing.storage.undo(b"id", writing.transaction)
    assert writing.vote("undoa", answer=[OID]) == [OID]
    writing.finish()
    assert writing.storage.loadBefore(OID, T2) == (b"undone", T1, T2)
    assert not is_cached(writing.storage, writing.connection, OID, at(T2))


@pytest.mark.parametrize("how", ["deleteObject", "restorea"])
def test_what_was_deleted_or_restored_is_not_kept(writing: Writing, how: str) -> None:
    load(writing.storage, writing.connection, OID, at(T1), (b"old", T1, None))
    if how == "deleteObject":
        writing.storage.deleteObject(OID, T1, writing.transaction)
    else:
        writing.storage.restore(OID, T1, b"restored", "", None, writing.transaction)
    writing.vote(how)
    writing.finish()
    assert not is_cached(writing.storage, writing.connection, OID, at(T2))


def conflict() -> dict[str, Any]:
    return {"oid": OID, "serials": (T2, T1), "data": b"mine"}


def test_a_conflict_that_can_be_resolved(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client resolves it with its own classes, stores the result and votes again."""
    asked: list[Any] = []

    def resolve(*args: Any) -> bytes:
        asked.append(args)
        return b"resolved"

    monkeypatch.setattr(writing.storage, "tryToResolveConflict", resolve)
    connection = writing.connection
    writing.store()
    writing.store(OTHER)
    voting = writing.voting("storea", "storea")
    connection.answer(connection.expect("vote"), [conflict()])
    again = connection.expect("storea")
    assert again.args[:3] == (OID, T2, b"resolved")
    connection.answer(connection.expect("vote"), [])
    assert voting.result() == [OID]
    assert asked == [(OID, T2, T1, b"mine")]
    writing.finish(T3)
    assert writing.storage.loadBefore(OTHER, at(T3)) == (b"mine", T3, None)
    assert not is_cached(writing.storage, connection, OID, at(T3))


def test_conflicts_over_and_over(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """After nine rounds it is a conflict error. What can't be prepared must never be finished."""
    monkeypatch.setattr(writing.storage, "tryToResolveConflict", lambda *args: b"resolved")
    connection = writing.connection
    writing.store()
    voting = writing.voting("storea")
    for number in range(limits.RESOLUTION_ROUNDS):
        if number:
            connection.expect("storea")
        connection.answer(connection.expect("vote"), [conflict()])
    with pytest.raises(ConflictError) as failure:
        voting.result()
    assert failure.value.oid == OID
    writing.storage.tpc_abort(writing.transaction)
    connection.expect("tpc_abort")


def test_a_conflict_that_cannot_be_resolved(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(oid: bytes, committed: bytes, read: bytes, data: bytes) -> bytes:
        raise ConflictError(oid=oid, serials=(committed, read))

    monkeypatch.setattr(writing.storage, "tryToResolveConflict", refuse)
    load(writing.storage, writing.connection, OID, at(T1), (b"old", T1, None))
    writing.store()
    voting = writing.voting("storea")
    writing.connection.answer(writing.connection.expect("vote"), [conflict()])
    with pytest.raises(ConflictError):
        voting.result()
    writing.storage.tpc_abort(writing.transaction)
    writing.connection.expect("tpc_abort")
    assert not is_cached(writing.storage, writing.connection, OID, at(T1)), "a retry reads what is new"


@pytest.mark.parametrize(
    "answer",
    [
        5,
        "text",
        OID,
        {"oid": OID},
        [5],
        [b"short"],
        [OID, None],
        [{}],
        [{"oid": OID, "serials": (T2, T1)}],
        [{"oid": 5, "serials": (T2, T1), "data": b""}],
        [{"oid": OID, "serials": (T2,), "data": b""}],
        [{"oid": OID, "serials": 5, "data": b""}],
        [{"oid": OID, "serials": (T2, None), "data": b""}],
        [{"oid": OID, "serials": (T2, T1), "data": "text"}],
    ],
    ids=repr,
)
def test_an_answer_to_the_vote_that_is_none(writing: Writing, answer: Any) -> None:
    """It is a StorageError, and the transaction is not committed."""
    writing.store()
    voting = writing.voting("storea")
    writing.connection.answer(writing.connection.expect("vote"), answer)
    with pytest.raises(StorageError, match="vote"):
        voting.result()
    writing.storage.tpc_abort(writing.transaction)
    writing.connection.expect("tpc_abort")
    writing.begin()
    writing.store()
    writing.vote("storea")


def test_the_end_of_the_connection_during_the_vote(writing: Writing) -> None:
    writing.store()
    voting = writing.voting("storea")
    writing.connection.expect("vote")
    writing.connection.close()
    assert type(voting.outcome(PROMPT_S)) is Disconnected
    with pytest.raises(Disconnected):
        writing.store()
    writing.storage.tpc_abort(writing.transaction)


# The finish -------------------------------------------------------------------------------------------


def test_the_callback_comes_in_the_order_of_the_commits(writing: Writing) -> None:
    """Commits of others that the server did before are applied before it, those after it afterwards."""
    storage, connection = writing.storage, writing.connection
    writing.store()
    writing.vote("storea")
    seen: list[Any] = []

    def callback(tid: bytes) -> None:
        seen.append(storage.lastTransaction())

    finishing = Task(storage.tpc_finish, writing.transaction, callback)
    call = connection.expect("tpc_finish")
    connection.send(
        connection.invalidation(T2, [OTHER]), connection.reply(call, T3), connection.invalidation(T4, [OTHER])
    )
    assert finishing.result() == T3
    assert seen == [T2]
    wait_until(lambda: storage.lastTransaction() == T4, "the commit after it")


def test_a_finish_that_fails(writing: Writing) -> None:
    """The server says that it did not commit: the error is what it says, and nothing of it is kept."""
    writing.store()
    writing.vote("storea")
    finishing = Task(writing.storage.tpc_finish, writing.transaction)
    call = writing.connection.expect("tpc_finish")
    writing.connection.send(writing.connection.fault(call, StorageTransactionError("no such transaction")))
    with pytest.raises(StorageTransactionError, match="no such transaction"):
        finishing.result()
    assert writing.storage.lastTransaction() == T1
    writing.begin()
    writing.store()
    writing.vote("storea")


def test_a_new_object_is_there_after_its_commit(writing: Writing) -> None:
    writing.store(serial=NO_TID)
    writing.vote("storea")
    told: list[bytes] = []
    finishing = Task(writing.storage.tpc_finish, writing.transaction, told.append)
    writing.connection.answer(writing.connection.expect("tpc_finish"), T2)
    assert finishing.result() == T2
    assert told == [T2]
    assert writing.storage.loadBefore(OID, at(T2)) == (b"mine", T2, None)
    assert writing.storage.loadBefore(OID, at(T2)) == (b"mine", T2, None)
    writing.ping()


def test_a_callback_that_fails(writing: Writing) -> None:
    """The transaction is committed all the same. The connection is verified anew, and the turn is over."""
    writing.store()
    writing.vote("storea")

    def fail(tid: bytes) -> None:
        raise RuntimeError("no room")

    finishing = Task(writing.storage.tpc_finish, writing.transaction, fail)
    writing.connection.answer(writing.connection.expect("tpc_finish"), T2)
    with pytest.raises(RuntimeError, match="no room"):
        finishing.result()
    assert writing.connection.expect_end() == []
    assert writing.storage.lastTransaction() == T1, "it is learned when the connection is verified"
    assert writing.storage.tpc_transaction() is None


# With the extensions ----------------------------------------------------------------------------------

BEGINNING = (b"joe", b"a note", {"k": "v"}, None, " ")


class Extended(Writing):
    """The same with a server that has the extensions."""

    def __init__(self, scene: Scene, **keywords: Any) -> None:
        server = scene.server()
        storage = scene.storage(server, **keywords)
        connection = server.accept()
        connection.welcome(T1, extensions=EXTENSIONS)
        wait_until(storage.is_connected, "a connection")
        super().__init__(storage, connection)

    def preparing(self) -> tuple[Task, Call]:
        task = Task(self.storage.tpc_vote, self.transaction)
        return task, self.prepare_call()

    def prepare_call(self) -> Call:
        call = self.connection.expect("tpc_prepare")
        assert not call.one_way
        assert SERVER_METHODS["tpc_prepare"].check(call.args) == call.args
        return call

    def prepare(self, answer: Any = ()) -> Any:
        task, call = self.preparing()
        self.connection.answer(call, answer)
        return task.result()


@pytest.fixture
def extended(scene: Scene) -> Extended:
    return Extended(scene)


def test_a_transaction_is_prepared_with_one_message(extended: Extended) -> None:
    storage, transaction = extended.storage, extended.transaction
    storage.store(OID, T1, b"data", "", transaction)
    storage.checkCurrentSerialInTransaction(OTHER, T1, transaction)
    storage.deleteObject(OTHER, T1, transaction)
    storage.restore(OTHER, T1, None, "", T1, transaction)
    storage.undo(b"undone", transaction)
    voting, call = extended.preparing()
    id, beginning, operations = call.args
    assert (type(id), len(id)) == (bytes, 16)
    assert beginning == BEGINNING
    assert operations == (
        (0, OID, T1, b"data", None),
        (3, OTHER, T1, None, None),
        (2, OTHER, T1, None, None),
        (1, OTHER, T1, None, T1),
        (4, None, None, b"undone", None),
    )
    extended.connection.answer(call, None)
    assert voting.result() is None
    finishing = Task(storage.tpc_finish, transaction)
    finish = extended.connection.expect("tpc_finish")
    assert finish.args == (id,)
    extended.connection.answer(finish, T2)
    assert finishing.result() == T2
    assert storage.loadBefore(OID, at(T2)) == (b"data", T2, None)
    assert not is_cached(storage, extended.connection, OTHER, at(T2))


def test_a_copied_transaction_keeps_its_tid_and_status_with_extensions(extended: Extended) -> None:
    extended.storage.tpc_abort(extended.transaction)
    extended.transaction = TransactionMetaData()
    extended.storage.tpc_begin(extended.transaction, T3, "p")
    _, call = extended.preparing()
    assert call.args[1] == (b"", b"", {}, T3, "p")


def test_ids_of_transactions_are_never_used_twice(scene: Scene) -> None:
    """Not by one storage, nor by two."""
    ids = []
    for extended in (Extended(scene), Extended(scene)):
        for _ in range(3):
            voting, call = extended.preparing()
            ids.append(call.args[0])
            extended.connection.answer(call, [])
            voting.result()
            extended.finish()
            extended.begin()
    assert len(set(ids)) == 6
    assert len({id[:8] for id in ids}) == 2


def test_a_large_transaction_is_sent_in_pieces(extended: Extended, monkeypatch: Any) -> None:
    monkeypatch.setattr(limits, "GATHER_BYTES", 1000)
    extended.store(data=b"w" * 400)
    extended.store(data=b"x" * 400)
    extended.store(OTHER, data=b"y" * 400)
    piece = extended.connection.expect("tpc_operate")
    assert piece.one_way
    id, beginning, operations = SERVER_METHODS["tpc_operate"].check(piece.args)
    assert beginning == BEGINNING
    assert [operation[3][:1] for operation in operations] == [b"w", b"x"]
    extended.store(data=b"z" * 2000)
    assert extended.connection.expect("tpc_operate").args == (id, None, ((0, OTHER, T1, b"y" * 400, None),))
    assert extended.connection.expect("tpc_operate").args == (id, None, ((0, OID, T1, b"z" * 2000, None),))
    extended.store(data=b"last")
    voting, call = extended.preparing()
    assert call.args == (id, None, ((0, OID, T1, b"last", None),))
    extended.connection.answer(call, [])
    voting.result()


def test_many_small_operations_are_sent_in_pieces(extended: Extended, monkeypatch: Any) -> None:
    """What has no data counts as well."""
    monkeypatch.setattr(limits, "GATHER_BYTES", 1000)
    for number in range(100):
        extended.storage.checkCurrentSerialInTransaction(oid(number), T1, extended.transaction)
    assert len(extended.connection.expect("tpc_operate").args[2]) < 100


def test_an_operation_that_is_too_large(extended: Extended, monkeypatch: Any) -> None:
    """The caller is told at once. The transaction is no worse for it."""
    monkeypatch.setattr(limits, "GATHER_BYTES", 1000)
    monkeypatch.setattr(limits, "FRAME_BYTES", 3000)
    extended.store(data=b"before")
    with pytest.raises(ClientError, match="the limit is 3,000"):
        extended.store(OTHER, data=b"x" * 3000)
    assert len(extended.connection.expect("tpc_operate").args[2]) == 1
    extended.store(data=b"after")
    voting, call = extended.preparing()
    assert [operation[3] for operation in call.args[2]] == [b"after"]
    extended.connection.answer(call, [])
    voting.result()
    extended.finish()
    assert not is_cached(extended.storage, extended.connection, OTHER, at(T2))


def test_a_large_record_does_not_share_its_message(extended: Extended, monkeypatch: Any) -> None:
    """What was gathered before it must not be what makes it too large."""
    monkeypatch.setattr(limits, "GATHER_BYTES", 1000)
    monkeypatch.setattr(limits, "FRAME_BYTES", 3000)
    extended.store(data=b"x" * 900)
    extended.store(OTHER, data=b"y" * 2800)
    for data in (b"x" * 900, b"y" * 2800):
        (operation,) = extended.connection.expect("tpc_operate").args[2]
        assert operation[3] == data


@pytest.mark.parametrize("value", [object(), [1, object()], "text", bytearray(b"x")], ids=repr)
def test_data_that_cannot_be_sent_with_extensions(extended: Extended, value: Any) -> None:
    with pytest.raises(UnsendableValue):
        extended.storage.store(OID, T1, value, "", extended.transaction)
    extended.store()
    _, call = extended.preparing()
    assert len(call.args[2]) == 1


def test_a_beginning_that_cannot_be_sent(extended: Extended) -> None:
    with pytest.raises(UnsendableValue):
        extended.storage.tpc_begin(TransactionMetaData("", "", {"k": object()}))
    extended.ping()


def test_aborting_with_extensions(extended: Extended) -> None:
    """What was never sent needs no abort."""
    extended.store()
    extended.storage.tpc_abort(extended.transaction)
    extended.ping()
    extended.begin()
    extended.prepare()
    extended.storage.tpc_abort(extended.transaction)
    abort = extended.connection.expect("tpc_abort")
    assert abort.one_way
    assert len(abort.args[0]) == 16


def test_resolved_conflicts_are_prepared_again(extended: Extended, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only they are sent, and on top of what is committed."""
    monkeypatch.setattr(extended.storage, "tryToResolveConflict", lambda *args: b"resolved")
    extended.store()
    extended.store(OTHER)
    voting, call = extended.preparing()
    extended.connection.answer(call, [conflict()])
    again = extended.prepare_call()
    assert again.args == (call.args[0], None, ((0, OID, T2, b"resolved", None),))
    extended.connection.answer(again, [])
    assert voting.result() == [OID]
    extended.finish(T3)
    assert extended.storage.loadBefore(OTHER, at(T3)) == (b"mine", T3, None)
    assert not is_cached(extended.storage, extended.connection, OID, at(T3))


@pytest.mark.parametrize("answer", [5, OID, [5], [{"oid": OID}]], ids=repr)
def test_an_answer_to_tpc_prepare_that_is_none(extended: Extended, answer: Any) -> None:
    extended.store()
    with pytest.raises(StorageError, match="vote"):
        extended.prepare(answer)


def test_the_end_of_the_connection_while_it_prepares(extended: Extended) -> None:
    extended.store()
    voting, _ = extended.preparing()
    extended.connection.close()
    assert type(voting.outcome(PROMPT_S)) is Disconnected
    with pytest.raises(Disconnected):
        extended.store()
    extended.storage.tpc_abort(extended.transaction)


# What is said of a conflict ---------------------------------------------------------------------------


def unresolvable(
    writing: Writing, monkeypatch: pytest.MonkeyPatch, *expected: str, of: bytes = OID
) -> BaseException:
    """What the vote raises for a conflict of an object of the class `app.Thing`."""

    def refuse(oid: bytes, committed: bytes, read: bytes, data: bytes) -> bytes:
        raise ConflictError(oid=oid, serials=(committed, read), data=b"capp\nThing\n.")

    monkeypatch.setattr(writing.storage, "tryToResolveConflict", refuse)
    answer = [{**conflict(), "oid": of}]
    if isinstance(writing, Extended):
        voting, call = writing.preparing()
    else:
        voting = writing.voting(*expected)
        call = writing.connection.expect("vote")
    writing.connection.answer(call, answer)
    problem = voting.outcome(PROMPT_S)
    assert isinstance(problem, BaseException)
    return problem


@pytest.mark.parametrize("extensions", [False, True], ids=["stock", "extended"])
def test_a_conflict_says_what_was_done_to_what(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, extensions: bool
) -> None:
    """One line for people, and the attributes for programs."""
    if extensions:
        writing: Writing = Extended(scene, client_label="the lion's")
    else:
        writing = Writing(*scene.connected(T1, client_label="the lion's"))
    assert writing.connection.expect("set_client_label").one_way
    writing.storage.tpc_abort(writing.transaction)
    writing.transaction = TransactionMetaData("joe", "feed\n the lion")
    writing.storage.tpc_begin(writing.transaction)
    writing.store()
    problem = unresolvable(writing, monkeypatch, "storea")
    assert type(problem) is ConflictError
    assert (problem.oid, problem.serials, problem.class_name) == (OID, (T2, T1), "app.Thing")
    text = str(problem)
    assert "\n" not in text
    serials = [T2.hex().lstrip("0"), T1.hex().lstrip("0")]
    told = ["app.Thing", "0x2a", *serials, "'joe'", "'feed the lion'", "the lion's"]
    assert [word for word in told if word not in text] == []


def test_a_conflict_of_a_transaction_that_nobody_described(
    writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing.storage.tpc_abort(writing.transaction)
    writing.transaction = TransactionMetaData()
    writing.storage.tpc_begin(writing.transaction)
    writing.store()
    text = str(unresolvable(writing, monkeypatch, "storea"))
    assert text.startswith("database conflict error (oid 0x2a, class app.Thing, ")


def test_a_long_description_is_told_in_part(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    writing.storage.tpc_abort(writing.transaction)
    writing.transaction = TransactionMetaData("", "x" * 10_000)
    writing.storage.tpc_begin(writing.transaction)
    writing.store()
    assert len(str(unresolvable(writing, monkeypatch, "storea"))) < 1000


def test_a_read_conflict_that_the_server_tells_of(extended: Extended) -> None:
    load(extended.storage, extended.connection, OID, at(T1), (b"old", T1, None))
    extended.storage.checkCurrentSerialInTransaction(OID, T1, extended.transaction)
    voting, call = extended.preparing()
    extended.connection.send(extended.connection.fault(call, ReadConflictError(oid=OID, serials=(T2, T1))))
    problem = voting.outcome(PROMPT_S)
    assert type(problem) is ReadConflictError
    assert (problem.oid, problem.serials) == (OID, (T2, T1))
    assert "'joe'" in str(problem)
    assert "'a note'" in str(problem)
    assert not is_cached(extended.storage, extended.connection, OID, at(T1)), "a retry reads what is new"


def test_a_conflict_of_btrees_that_the_server_could_not_resolve(extended: Extended) -> None:
    """It has no attributes to tell anything with, and stays what it is."""
    extended.store()
    voting, call = extended.preparing()
    extended.connection.send(extended.connection.fault(call, BTreesConflictError(1, 2, 3, 4)))
    problem = voting.outcome(PROMPT_S)
    assert type(problem) is BTreesConflictError
    assert problem.reason == 4


# Undo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extensions", [False, True], ids=["stock", "extended"])
def test_an_undo_whose_conflict_cannot_be_resolved(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, extensions: bool
) -> None:
    writing = Extended(scene) if extensions else Writing(*scene.connected(T1))
    writing.storage.undo(b"undone", writing.transaction)
    writing.store(OTHER)
    problem = unresolvable(writing, monkeypatch, "undoa", "storea")
    assert type(problem) is UndoError
    assert problem._oid == OID
    assert "0x2a" in str(problem)


def test_a_conflict_of_a_store_beside_an_undo(extended: Extended, monkeypatch: pytest.MonkeyPatch) -> None:
    extended.storage.undo(b"undone", extended.transaction)
    extended.store()
    assert type(unresolvable(extended, monkeypatch)) is ConflictError


def test_an_undo_whose_conflict_is_resolved(extended: Extended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extended.storage, "tryToResolveConflict", lambda *args: b"resolved")
    extended.storage.undo(b"undone", extended.transaction)
    voting, call = extended.preparing()
    extended.connection.answer(call, [conflict()])
    again = extended.prepare_call()
    assert again.args[2] == ((0, OID, T2, b"resolved", None),)
    extended.connection.answer(again, [])
    assert voting.result() == [OID]
    extended.finish(T3)
    assert not is_cached(extended.storage, extended.connection, OID, at(T3))


def test_an_undo_that_is_in_conflict_over_and_over(
    extended: Extended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That its object was stored resolved, in the rounds before, does not make it a store of its own."""
    monkeypatch.setattr(extended.storage, "tryToResolveConflict", lambda *args: b"resolved")
    extended.storage.undo(b"undone", extended.transaction)
    voting, call = extended.preparing()
    for number in range(limits.RESOLUTION_ROUNDS):
        extended.connection.answer(call if number == 0 else extended.prepare_call(), [conflict()])
    problem = voting.outcome(PROMPT_S)
    assert type(problem) is UndoError
    assert problem._oid == OID
