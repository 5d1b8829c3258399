"""What is in the engine but not yet published is not there for any reader, in any of the ways to read.

The transaction that nobody may see creates an object, changes one, deletes one and undoes another. Whatever
can be read is read before it and while it is hidden, and must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from zeoid.engines.opening import open_filestorage, open_memory
from zeoid.engines.storage import StorageEngine
from zeoid.model import MAX_TID, NO_TID, Delete, Operation, Store, TransactionInfo, Undo, tid_after
from zeoid.ports import Commit
from zeoid.server.visible import Visible

CHANGED, DELETED, UNCREATED, KEPT, CREATED = (p64(number) for number in range(1, 6))
OIDS = [CHANGED, DELETED, UNCREATED, KEPT, CREATED]


def tid(number: int) -> bytes:
    return bytes(p64(0x03C0_0000_0000_0000 + number))


LAST, HIDDEN, LATER = tid(3), tid(4), tid(5)
INFO = TransactionInfo(b"user", b"description", {})


def write(engine: StorageEngine, at: bytes, *operations: Operation) -> None:
    engine.commit([Commit(at, b"", engine.prepare(at, INFO, operations))])


def undo_id(engine: StorageEngine, at: bytes) -> bytes:
    entries = engine.undo_log(0, 100)
    found: bytes = entries[[entry_tid(engine, entry) for entry in entries].index(at)]["id"]
    return found


def entry_tid(engine: StorageEngine, entry: dict[str, Any]) -> bytes:
    import base64

    return base64.decodebytes(entry["id"] + b"\n")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[StorageEngine]:
    engine = open_filestorage(tmp_path / "Data.fs")
    write(engine, tid(1), Store(CHANGED, NO_TID, b"one"), Store(DELETED, NO_TID, b"to be deleted"))
    write(engine, tid(2), Store(UNCREATED, NO_TID, b"to be undone"))
    write(engine, tid(3), Store(CHANGED, tid(1), b"two"), Store(KEPT, NO_TID, b"kept"))
    yield engine
    engine.close()


def hide(engine: StorageEngine) -> None:
    """Commit a transaction, the way it is between the engine's finish and the publication."""
    write(
        engine,
        HIDDEN,
        Store(CHANGED, tid(3), b"hidden"),
        Store(CREATED, NO_TID, b"hidden, too"),
        Delete(DELETED, tid(1)),
        Undo(undo_id(engine, tid(2))),
    )
    assert engine.last_tid() == HIDDEN


def result_of(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except POSKeyError:
        return POSKeyError


def walk(visible: Visible) -> list[tuple[bytes, bytes, bytes]]:
    """All current records, as zodbconvert and the like read them."""
    found = []
    following: bytes | None = None
    while True:
        try:
            oid, at, data, following = visible.record_iternext(following)
        except POSKeyError:
            break
        found.append((oid, at, data))
        if following is None:
            break
    return found


def iterated(visible: Visible, start: bytes | None, stop: bytes | None) -> list[Any]:
    return [
        (transaction.tid, [(record.oid, record.tid, record.data) for record in transaction])
        for transaction in visible.iterate(start, stop)
    ]


READERS: dict[str, Callable[[Visible], Any]] = {
    "last transaction": lambda visible: visible.tid,
    "current tids": lambda visible: [result_of(lambda oid=oid: visible.current_tid(oid)) for oid in OIDS],
    "revisions that the transaction wrote": lambda visible: [
        result_of(lambda oid=oid: visible.load_serial(oid, HIDDEN)) for oid in OIDS
    ],
    "history": lambda visible: [
        [entry["tid"] for entry in visible.history(oid, 10)] for oid in OIDS if oid != CREATED
    ],
    "newest of the history": lambda visible: [
        [entry["tid"] for entry in visible.history(oid, 1)] for oid in OIDS if oid != CREATED
    ],
    "record iteration": walk,
    "undo log": lambda visible: [entry["id"] for entry in visible.undo_log(0, 100)],
    "undo info": lambda visible: [entry["id"] for entry in visible.undo_info(0, 100, None)],
    "iteration": lambda visible: iterated(visible, None, None),
    "iteration up to it": lambda visible: iterated(visible, None, HIDDEN),
    "iteration up to the end of time": lambda visible: iterated(visible, None, b"\xff" * 8),
    "iteration from it": lambda visible: iterated(visible, HIDDEN, None),
    "iteration from the last visible one": lambda visible: iterated(visible, LAST, None),
}


@pytest.mark.parametrize("name", READERS)
def test_no_reader_sees_what_is_hidden(engine: StorageEngine, name: str) -> None:
    visible = Visible(engine)
    before = READERS[name](visible)
    hide(engine)
    assert READERS[name](visible) == before


@pytest.mark.parametrize("before_tid", [MAX_TID, tid_after(HIDDEN), HIDDEN, tid_after(LAST), LAST, tid(2)])
def test_no_load_sees_what_is_hidden(engine: StorageEngine, before_tid: bytes) -> None:
    visible = Visible(engine)
    existing = [oid for oid in OIDS if oid != CREATED]
    before = [result_of(lambda oid=oid: visible.load_before(oid, before_tid)) for oid in existing]
    hide(engine)
    assert [result_of(lambda oid=oid: visible.load_before(oid, before_tid)) for oid in existing] == before


@pytest.mark.parametrize("before_tid", [MAX_TID, tid_after(HIDDEN), HIDDEN])
def test_an_object_that_is_hidden_cant_be_loaded(engine: StorageEngine, before_tid: bytes) -> None:
    visible = Visible(engine)
    hide(engine)
    assert result_of(lambda: visible.load_before(CREATED, before_tid)) in (None, POSKeyError)
    assert result_of(lambda: visible.current_tid(CREATED)) is POSKeyError
    assert result_of(lambda: visible.load_serial(CREATED, HIDDEN)) is POSKeyError
    assert result_of(lambda: visible.history(CREATED, 5)) in ([], POSKeyError)


def test_a_revision_that_ends_beyond_is_current(engine: StorageEngine) -> None:
    visible = Visible(engine)
    hide(engine)
    assert visible.load_before(CHANGED, MAX_TID) == (b"two", tid(3), None)
    assert visible.load_before(CHANGED, tid(2)) == (b"one", tid(1), tid(3))
    assert visible.load_before(DELETED, MAX_TID) == (b"to be deleted", tid(1), None)


def test_after_the_publication_everything_is_seen(engine: StorageEngine) -> None:
    visible = Visible(engine)
    hide(engine)
    visible.advance(HIDDEN)
    assert visible.tid == HIDDEN
    assert visible.load_before(CHANGED, MAX_TID) == (b"hidden", HIDDEN, None)
    assert visible.load_before(CHANGED, HIDDEN) == (b"two", tid(3), HIDDEN)
    assert visible.load_before(CREATED, MAX_TID) == (b"hidden, too", HIDDEN, None)
    assert visible.load_serial(CREATED, HIDDEN) == b"hidden, too"
    assert visible.current_tid(CHANGED) == HIDDEN
    for gone in (DELETED, UNCREATED):
        assert result_of(lambda gone=gone: visible.current_tid(gone)) is POSKeyError
        assert result_of(lambda gone=gone: visible.load_before(gone, MAX_TID)) is POSKeyError
        assert visible.load_before(gone, HIDDEN) is not None
    assert visible.history(CHANGED, 1)[0]["tid"] == HIDDEN
    assert [entry_tid(engine, entry) for entry in visible.undo_log(0, 1)] == [HIDDEN]
    assert [at for at, _ in iterated(visible, HIDDEN, None)] == [HIDDEN]


def test_one_transaction_is_published_and_the_next_is_hidden(engine: StorageEngine) -> None:
    visible = Visible(engine)
    hide(engine)
    visible.advance(HIDDEN)
    write(engine, LATER, Store(CHANGED, HIDDEN, b"later"), Store(CREATED, HIDDEN, b"later"))
    assert visible.load_before(CHANGED, MAX_TID) == (b"hidden", HIDDEN, None)
    assert visible.current_tid(CREATED) == HIDDEN
    assert visible.load_serial(CREATED, HIDDEN) == b"hidden, too"
    assert [entry["tid"] for entry in visible.history(CREATED, 10)] == [HIDDEN]


def test_the_visible_tid_only_grows(engine: StorageEngine) -> None:
    visible = Visible(engine)
    with pytest.raises(AssertionError):
        visible.advance(LAST)
    with pytest.raises(AssertionError):
        visible.advance(tid(2))


def test_an_empty_storage() -> None:
    engine = open_memory()
    visible = Visible(engine)
    assert visible.tid == NO_TID
    write(engine, HIDDEN, Store(CREATED, NO_TID, b"hidden"))
    assert result_of(lambda: visible.load_before(CREATED, MAX_TID)) in (None, POSKeyError)
    visible.advance(HIDDEN)
    assert visible.load_before(CREATED, MAX_TID) == (b"hidden", HIDDEN, None)
    engine.close()


def test_what_was_there_at_the_start_is_visible(engine: StorageEngine) -> None:
    hide(engine)
    assert Visible(engine).tid == HIDDEN


@pytest.mark.parametrize("id", [b"", b"not base64!", b"\xff", 17, None, b"AAAA", "text"], ids=repr)
def test_undo_ids_of_other_storages_are_shown(engine: StorageEngine, id: Any) -> None:
    """They tell no tid, and a storage that makes them is no FileStorage."""

    class Other(StorageEngine):
        def undo_log(self, first: int, last: int) -> list[dict[str, Any]]:
            return [{"id": id}]

    visible = Visible(Other(engine._storage))
    assert visible.undo_log(0, 20) == [{"id": id}]
