"""What lies beneath the objects: history, undo, iteration and pack, compared with the data file itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from BTrees.Length import Length
from persistent.mapping import PersistentMapping
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError, POSKeyError, UndoError
from ZODB.utils import z64

from tests.interop.conftest import Pair, Session
from tests.peers import Server


@contextlib.contextmanager
def data_file(server: Server) -> Iterator[Any]:
    """The file that the server left behind, read with nothing but ZODB."""
    assert server.stop() == 0
    with contextlib.closing(FileStorage(str(server.data_file), read_only=True)) as storage:
        yield storage


def fill(session: Session) -> None:
    """Eight transactions of all sorts: with and without metadata, of new and of old objects, and an undo.

    The undo is not one of a creation: on the record that leaves, FileStorage's own `record_iternext` fails.
    """
    session.root["page"] = page = PersistentMapping(text="first")
    session.commit()
    for number in range(5):
        transaction = session.begin()
        transaction.setUser("ada", "/acl_users")
        transaction.note(f"edit {number} — ünïcode")
        transaction.setExtendedInfo("request", f"/page/{number}")
        page["text"] = f"edit {number}"
        if number < 4:
            session.root[number] = PersistentMapping()
        session.commit()
    session.database.undo(session.database.undoLog(0, 1)[0]["id"], session.manager.get())
    session.commit()


def transactions(storage: Any) -> list[tuple[Any, ...]]:
    """Everything that an iterator of a storage tells."""
    iterator = storage.iterator()
    try:
        return [
            (
                transaction.tid,
                transaction.status,
                transaction.user,
                transaction.description,
                transaction.extension,
                [(record.oid, record.tid, record.data, record.data_txn) for record in transaction],
            )
            for transaction in iterator
        ]
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def current_records(storage: Any) -> list[tuple[bytes, bytes, bytes]]:
    records: list[tuple[bytes, bytes, bytes]] = []
    following = None
    while not records or following is not None:
        oid, tid, data, following = storage.record_iternext(following)
        records.append((oid, tid, data))
    return records


def test_the_server_tells_what_the_file_says(pair: Pair) -> None:
    server = pair.server()
    session = Session(pair.database(server.address))
    fill(session)
    page = session.root["page"]._p_oid
    storage = pair.client(server.address)

    def answers(storage: Any) -> dict[str, Any]:
        return {
            "transactions": transactions(storage),
            "current records": current_records(storage),
            "history of the root": list(storage.history(z64, 100)),
            "newest of the page": list(storage.history(page)),
            "undo log": list(storage.undoLog(0, -100)),
            "middle of the undo information": list(storage.undoInfo(2, 5)),
            "last transaction": storage.lastTransaction(),
            "tid of the page": storage.getTid(page),
            "length": len(storage),
            "undo": storage.supportsUndo(),
        }

    told = answers(storage)
    assert len(told["transactions"]) == 8
    with data_file(server) as file:
        assert told == answers(file)


def test_every_revision_can_be_loaded(pair: Pair) -> None:
    server = pair.server()
    session = Session(pair.database(server.address))
    fill(session)
    oid = session.root["page"]._p_oid
    storage = pair.client(server.address)
    revisions = [entry["tid"] for entry in reversed(storage.history(oid, 100))]
    loaded = [storage.loadSerial(oid, tid) for tid in revisions]
    before = [storage.loadBefore(oid, tid) for tid in [*revisions, b"\x7f" + b"\xff" * 7]]
    assert before == [None, *zip(loaded, revisions, [*revisions[1:], None], strict=True)]
    with data_file(server) as file:
        assert loaded == [file.loadSerial(oid, tid) for tid in revisions]


def test_what_never_was_cannot_be_loaded(pair: Pair) -> None:
    server = pair.server()
    database = pair.database(server.address)
    unused = b"\0" * 7 + b"\xfe"
    for ask in (database.storage.getTid, database.storage.history):
        with pytest.raises(POSKeyError):
            ask(unused)
    with pytest.raises(POSKeyError):
        database.storage.loadSerial(unused, database.storage.lastTransaction())
    with pytest.raises(POSKeyError):
        database.storage.loadBefore(unused, b"\x7f" + b"\xff" * 7)


def test_others_see_what_is_undone(pair: Pair) -> None:
    server = pair.server()
    writer, reader = Session(pair.database(server.address)), Session(pair.database(server.address))
    writer.root["page"] = PersistentMapping(text="good")
    writer.commit()
    writer.root["page"]["text"] = "bad"
    writer.commit()
    reader.wait_to_see(lambda: "page" in reader.root and reader.root["page"]["text"] == "bad", "a change")
    writer.database.undo(writer.database.undoInfo(0, 1)[0]["id"], writer.manager.get())
    writer.commit()
    for session in (writer, reader):
        session.wait_to_see(lambda: session.root["page"]["text"] == "good", "the undo")  # noqa: B023


def test_an_undo_of_an_older_change_keeps_the_newer_one(pair: Pair) -> None:
    """It takes the resolution of a conflict to undo one of several changes to a counter."""
    server = pair.server()
    session = Session(pair.database(server.address))
    session.root["visits"] = Length(0)
    session.commit()
    for change in (1, 10, 100):
        session.root["visits"].change(change)
        session.commit()
    session.database.undo(session.database.undoLog(1, 2)[0]["id"], session.manager.get())
    session.commit()
    session.wait_to_see(lambda: session.root["visits"].value == 101, "one change less")


def test_what_was_changed_since_cannot_be_undone(pair: Pair) -> None:
    server = pair.server()
    session = Session(pair.database(server.address))
    session.root["page"] = PersistentMapping(text="first")
    session.commit()
    for text in ("second", "third"):
        session.root["page"]["text"] = text
        session.commit()
    session.database.undo(session.database.undoLog(1, 2)[0]["id"], session.manager.get())
    # A stock client is told of an undo's conflict like of any other, and can't tell them apart.
    told = ConflictError if (pair.client_kind, pair.server_kind) == ("stock", "zeoid") else UndoError
    with pytest.raises(told):
        session.commit()
    session.abort()
    session.root["page"]["text"] = "fourth"
    session.commit()
    assert session.database.undoLog(0, 1)[0]["id"] is not None


def test_pack_removes_the_past_and_the_unreachable(pair: Pair) -> None:
    server = pair.server()
    session = Session(pair.database(server.address))
    session.root.update(page=PersistentMapping(text="old"), garbage=PersistentMapping())
    session.commit()
    page, garbage = session.root["page"]._p_oid, session.root["garbage"]._p_oid
    old = session.root["page"]._p_serial
    session.root["page"]["text"] = "new"
    del session.root["garbage"]
    session.commit()

    session.database.pack(time.time() + 1)

    storage = pair.client(server.address)
    with pytest.raises(POSKeyError):
        storage.loadSerial(page, old)
    with pytest.raises(POSKeyError):
        storage.getTid(garbage)
    session.begin()
    session.root["page"]["text"] = "after the pack"
    session.commit()
    reader = Session(pair.database(server.address))
    assert reader.root["page"]["text"] == "after the pack"
    with data_file(server) as file:
        assert [oid for oid, _, _ in current_records(file)] == [z64, page]
