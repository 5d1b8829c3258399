"""Blobs of a client storage, on a server that follows a script: what is sent, and what is in the cache."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zope.interface.verify
from ZODB import interfaces
from ZODB.blob import Blob, BlobFile
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError, ReadOnlyError, Unsupported

import zeoid
from tests.client import interruptions
from tests.client.interruptions import Interrupted, Interruption
from tests.client.scenes import OID, OTHER, T1, T2, T3, Scene, Task, oid, tid
from tests.peers import environment, wait_until
from tests.room import no_room_beyond
from zeoid import ClientStorage, limits
from zeoid.errors import (
    ClientError,
    ConfigurationError,
    Disconnected,
    OutcomeUnknown,
    ServerError,
    TimedOut,
    UnsendableValue,
)
from zeoid.model import NO_TID
from zeoid.testing import INFO, Call, ScriptedConnection, ScriptedServer

WITH_BLOBS = {**INFO, "interfaces": (("ZODB.interfaces", "IBlobStorage"),)}
RECORD = b"cZODB.blob\nBlob\nq\x01.N."
EXTENSIONS = ("tpc_prepare", "tpc_operate", "outcome")
DEADLINE_S = 10.0
#: More than sockets hold: another thread gets in between.
UPLOAD_BYTES = 6_000_000


class BlobScene:
    """A client with a blob directory, and the server's end of its connection."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene = scene
        self.folder = folder
        self.server: ScriptedServer = scene.server()
        self.cache = folder / "cache"
        self.storage: ClientStorage = None  # type: ignore[assignment]
        self.connection: ScriptedConnection = None  # type: ignore[assignment]

    def open(self, extensions: tuple[str, ...] = (), **options: Any) -> BlobScene:
        options = {"blob_dir": self.cache, **options}
        self.storage = self.scene.storage(self.server, **options)
        self.connection = self.welcome(extensions)
        return self

    def welcome(self, extensions: tuple[str, ...] = (), **keywords: Any) -> ScriptedConnection:
        connection = self.server.accept()
        connection.welcome(T1, info=WITH_BLOBS, extensions=extensions, **keywords)
        wait_until(self.storage.is_connected, "a connection")
        return connection

    def file(self, content: bytes = b"content") -> str:
        path = self.folder / "file"
        path.write_bytes(content)
        return str(path)

    def path(self, serial: bytes, of: bytes = OID) -> Path:
        return Path(self.storage.fshelper.getBlobFilename(of, serial))

    def files(self) -> list[str]:
        """What there is but for the marker."""
        found = [path for path in self.cache.rglob("*") if path.is_file() and path.name != ".layout"]
        return [str(path.relative_to(self.cache)) for path in found]

    def send(self, content: bytes, serial: bytes = T1, of: bytes = OID, pieces: int = 3) -> None:
        """What a server sends in front of the reply to `sendBlob`."""
        call = self.connection.call
        self.connection.send(call("receiveBlobStart", of, serial))
        size = max(1, len(content) // pieces)
        for start in range(0, len(content), size):
            self.connection.send(call("receiveBlobChunk", of, serial, content[start : start + size]))
        self.connection.send(call("receiveBlobStop", of, serial))

    def answer_load(self, content: bytes, serial: bytes = T1, of: bytes = OID) -> None:
        call = self.connection.expect("sendBlob")
        assert call.args == (of, serial)
        self.send(content, serial, of)
        self.connection.answer(call, None)


@pytest.fixture
def blobs(scene: Scene, tmp_path: Path) -> BlobScene:
    return BlobScene(scene, tmp_path)


# Options ----------------------------------------------------------------------------------------------


def test_blobs_are_promised_with_a_directory_only(scene: Scene, tmp_path: Path) -> None:
    server = scene.server()
    with_blobs = scene.storage(server, blob_dir=tmp_path / "cache")
    assert zope.interface.verify.verifyObject(interfaces.IBlobStorage, with_blobs)
    with_blobs.close()
    assert interfaces.IBlobStorage.providedBy(with_blobs)
    without = scene.storage(server)
    assert not interfaces.IBlobStorage.providedBy(without)
    assert without.fshelper is None
    for call in (
        lambda: without.loadBlob(OID, T1),
        lambda: without.openCommittedBlobFile(OID, T1),
        without.temporaryDirectory,
    ):
        with pytest.raises(Unsupported, match="give the storage a blob_dir"):
            call()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"blob_dir": 7}, "blob_dir must be a path"),
        ({"blob_cache_size": -1}, "blob_cache_size must be"),
        ({"blob_cache_size": "1G"}, "blob_cache_size must be"),
        ({"blob_cache_size": 100, "blob_cache_size_check": 100}, "blob_cache_size_check must be"),
        ({"shared_blob_dir": True}, "no server's blob directory"),
    ],
)
def test_options_that_can_not_be(
    options: dict[str, Any], complaint: str, scene: Scene, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        scene.storage(scene.server(), **{"blob_dir": tmp_path / "cache", **options})


def test_a_relative_directory_stays_where_it_is(
    blobs: BlobScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blobs.open(blob_dir="cache")
    monkeypatch.chdir("/")
    assert blobs.storage.temporaryDirectory() == str(tmp_path / "cache" / "tmp")
    assert str(blobs.path(T1)).startswith(str(tmp_path / "cache"))


def test_a_server_without_blobs_is_not_asked_for_any(scene: Scene, tmp_path: Path) -> None:
    storage, connection = scene.connected(blob_dir=tmp_path / "cache")
    with pytest.raises(Unsupported, match="has no blobs"):
        storage.loadBlob(OID, T1)
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    file = tmp_path / "file"
    file.write_bytes(b"content")
    with pytest.raises(Unsupported, match="has no blobs"):
        storage.storeBlob(OID, NO_TID, RECORD, str(file), "", transaction)
    assert file.exists()
    storage.tpc_abort(transaction)
    storage.close()
    assert [call.name for call in connection.expect_end()] == []


# Storing ----------------------------------------------------------------------------------------------


def test_a_blob_is_sent_at_once_in_pieces_and_is_cached_before_the_tid_shows(blobs: BlobScene) -> None:
    blobs.open()
    storage, connection = blobs.storage, blobs.connection
    content = os.urandom(2 * limits.BLOB_CHUNK_BYTES + 5)
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.storeBlob(OID, T1, RECORD, blobs.file(content), "", transaction)
    assert not os.path.exists(blobs.folder / "file")
    calls = [connection.expect() for _ in range(7)]
    number = calls[0].args[0]
    assert [call.name for call in calls] == [
        "tpc_begin", "storea", "storeBlobStart", *["storeBlobChunk"] * 3, "storeBlobEnd",
    ]  # fmt: skip
    assert all(call.one_way for call in calls)
    assert calls[1].args == (OID, T1, RECORD, number)
    assert [len(call.args[0]) for call in calls[3:6]] == [limits.BLOB_CHUNK_BYTES] * 2 + [5]
    assert b"".join(call.args[0] for call in calls[3:6]) == content
    assert calls[6].args == (OID, T1, RECORD, number)
    assert [name for name in blobs.files() if not name.startswith("tmp/")] == []
    voting = Task(storage.tpc_vote, transaction)
    connection.answer(connection.expect("vote"), ())
    assert not voting.result()
    seen: list[tuple[bool, bytes]] = []

    def told(at: bytes) -> None:
        seen.append((blobs.path(at).read_bytes() == content, storage._view._last))

    finishing = Task(storage.tpc_finish, transaction, told)
    connection.answer(connection.expect("tpc_finish"), T2)
    assert finishing.result() == T2
    assert seen == [(True, T1)]
    assert len(blobs.files()) == 1
    assert storage.loadBlob(OID, T2) == str(blobs.path(T2)), "without asking the server"


@pytest.mark.parametrize("serial", ["\0" * 8, None, NO_TID])
def test_a_new_blob_however_its_serial_is_written(blobs: BlobScene, serial: Any) -> None:
    blobs.open()
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)
    blobs.storage.storeBlob(OID, serial, RECORD, blobs.file(b""), "", transaction)
    wanted = None if serial is None else NO_TID
    calls = [blobs.connection.expect() for _ in range(4)]
    assert [call.name for call in calls] == ["tpc_begin", "storea", "storeBlobStart", "storeBlobEnd"]
    assert [call.args[:2] for call in calls[1::2]] == [(OID, wanted)] * 2
    blobs.storage.tpc_abort(transaction)


def test_an_abort_leaves_no_file_and_tells_the_server(blobs: BlobScene) -> None:
    blobs.open()
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)
    for of in (OID, OTHER):
        blobs.storage.storeBlob(of, NO_TID, RECORD, blobs.file(), "", transaction)
    assert len(blobs.files()) == 2
    blobs.storage.tpc_abort(transaction)
    assert blobs.files() == []
    calls = [blobs.connection.expect() for _ in range(10)]
    assert calls[-1].name == "tpc_abort"
    assert calls[-1].args == (calls[0].args[0],)


def test_a_lost_connection_leaves_no_file(blobs: BlobScene) -> None:
    blobs.open()
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)
    blobs.storage.storeBlob(OID, NO_TID, RECORD, blobs.file(), "", transaction)
    blobs.connection.reset()
    wait_until(lambda: not blobs.storage.is_connected(), "the end of the connection")
    path = blobs.file(b"another one")
    with pytest.raises(Disconnected):
        blobs.storage.storeBlob(OTHER, NO_TID, RECORD, path, "", transaction)
    assert os.path.exists(path), "it was not taken"
    with pytest.raises(Disconnected):
        blobs.storage.tpc_vote(transaction)
    blobs.storage.tpc_abort(transaction)
    assert blobs.files() == []


def test_an_unknown_outcome_leaves_no_file(blobs: BlobScene) -> None:
    blobs.open()
    transaction = voted(blobs)
    finishing = Task(blobs.storage.tpc_finish, transaction)
    blobs.connection.expect("tpc_finish")
    blobs.connection.reset()
    assert isinstance(finishing.outcome(), OutcomeUnknown)
    assert blobs.files() == []


def voted(blobs: BlobScene) -> TransactionMetaData:
    """A transaction with a blob that was voted on, on a stock server."""
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)
    blobs.storage.storeBlob(OID, NO_TID, RECORD, blobs.file(), "", transaction)
    voting = Task(blobs.storage.tpc_vote, transaction)
    while (call := blobs.connection.expect()).name != "vote":
        pass
    blobs.connection.answer(call, ())
    voting.result()
    return transaction


def test_a_server_with_extensions_is_told_of_the_transaction_before_its_blob(blobs: BlobScene) -> None:
    blobs.open(EXTENSIONS)
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)
    blobs.storage.storeBlob(OID, NO_TID, RECORD, blobs.file(), "", transaction)
    calls = [blobs.connection.expect() for _ in range(4)]
    names = [call.name for call in calls]
    assert names == ["tpc_operate", "storeBlobStart", "storeBlobChunk", "storeBlobEnd"]
    id, beginning, operations = calls[0].args
    assert beginning is not None
    assert [tuple(operation[:4]) for operation in operations] == [(0, OID, NO_TID, RECORD)]
    assert calls[3].args == (OID, NO_TID, RECORD, id)
    voting = Task(blobs.storage.tpc_vote, transaction)
    vote = blobs.connection.expect("tpc_prepare")
    assert vote.args[:2] == (id, None)
    assert not vote.args[2]
    blobs.connection.answer(vote, ())
    voting.result()
    finishing = Task(blobs.storage.tpc_finish, transaction)
    blobs.connection.expect("tpc_finish")
    blobs.connection.reset()
    blobs.connection = blobs.welcome(EXTENSIONS)
    blobs.connection.answer(blobs.connection.expect("outcome"), T2)
    assert finishing.result() == T2
    assert blobs.path(T2).read_bytes() == b"content", "what was learned later is placed as well"


def test_a_conflict_that_is_resolved_sends_the_blobs_again(
    blobs: BlobScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZEO's server loses them in a vote that met conflicts, and commits the record without its file."""
    blobs.open()
    monkeypatch.setattr(ClientStorage, "tryToResolveConflict", lambda *args: b"resolved")
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)
    blobs.storage.store(OTHER, T1, b"data", "", transaction)
    blobs.storage.storeBlob(OID, NO_TID, RECORD, blobs.file(), "", transaction)
    voting = Task(blobs.storage.tpc_vote, transaction)
    while (call := blobs.connection.expect()).name != "vote":
        pass
    blobs.connection.answer(call, [{"oid": OTHER, "serials": (T2, T1), "data": b"data"}])
    names = [blobs.connection.expect().name for _ in range(5)]
    assert names == ["storea", "storeBlobStart", "storeBlobChunk", "storeBlobEnd", "vote"]
    blobs.storage.close()
    assert isinstance(voting.outcome(), Disconnected)


def test_two_blobs_of_one_object_are_not_cached(blobs: BlobScene) -> None:
    """ZEO's server keeps the first of them."""
    blobs.open()
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)
    for content in (b"one", b"two"):
        blobs.storage.storeBlob(OID, NO_TID, RECORD, blobs.file(content), "", transaction)
    voting = Task(blobs.storage.tpc_vote, transaction)
    while (call := blobs.connection.expect()).name != "vote":
        pass
    blobs.connection.answer(call, ())
    voting.result()
    finishing = Task(blobs.storage.tpc_finish, transaction)
    blobs.connection.answer(blobs.connection.expect("tpc_finish"), T2)
    finishing.result()
    assert blobs.files() == []


def test_uploads_of_several_threads_are_not_mixed(blobs: BlobScene) -> None:
    """With extensions several transactions share a connection; a server takes one blob at a time."""
    blobs.open(EXTENSIONS)
    transactions = [TransactionMetaData() for _ in range(4)]
    paths = []
    for number in range(4):
        paths.append(str(blobs.folder / f"file {number}"))
        Path(paths[-1]).write_bytes(bytes([number]) * UPLOAD_BYTES)
    tasks = []
    for number, transaction in enumerate(transactions):
        blobs.storage.tpc_begin(transaction)
        args = oid(number), NO_TID, RECORD, paths[number], "", transaction
        tasks.append(Task(blobs.storage.storeBlob, *args))
    content = None
    whole: dict[bytes, bytes] = {}
    while len(whole) < 4:
        call = blobs.connection.expect("tpc_operate", "storeBlobStart", "storeBlobChunk", "storeBlobEnd")
        if call.name == "storeBlobStart":
            assert content is None
            content = b""
        elif call.name == "storeBlobChunk":
            assert content is not None
            content += call.args[0]
        elif call.name == "storeBlobEnd":
            assert content is not None
            whole[call.args[0]] = content
            content = None
    assert whole == {oid(number): bytes([number]) * UPLOAD_BYTES for number in range(4)}
    for task, transaction in zip(tasks, transactions, strict=True):
        task.result()
        blobs.storage.tpc_abort(transaction)
    assert blobs.files() == []


def test_a_server_that_must_get_rid_of_invalidations_first(blobs: BlobScene) -> None:
    """It reads nothing until the client has read them; no other thread of the client does."""
    blobs.open()
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)
    args = OID, NO_TID, RECORD, blobs.file(bytes(UPLOAD_BYTES)), "", transaction
    storing = Task(blobs.storage.storeBlob, *args)
    for number in range(100):
        blobs.connection.send(blobs.connection.invalidation(tid(number + 100), [oid(1)] * 10_000))
    while blobs.connection.expect().name != "storeBlobEnd":
        pass
    storing.result()
    blobs.storage.tpc_abort(transaction)
    wait_until(lambda: blobs.storage.lastTransaction() == tid(199), "the last invalidation")


def test_a_file_that_can_not_be_read_ends_the_connection_and_says_why(
    blobs: BlobScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.open()
    transaction = TransactionMetaData()
    blobs.storage.tpc_begin(transaction)

    class Unreadable(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("zeoid.client.transfers.open", lambda *_, **__: Unreadable(), raising=False)
    with pytest.raises(ClientError, match=r"can't be read: .*Input/output error"):
        blobs.storage.storeBlob(OID, NO_TID, RECORD, blobs.file(), "", transaction)
    assert "storeBlobEnd" not in [call.name for call in blobs.connection.expect_end()]
    blobs.storage.tpc_abort(transaction)
    assert blobs.files() == []


# Between the opening of a file and its `with` there is a place, too.
@pytest.mark.filterwarnings("ignore:unclosed file <_io.FileIO:ResourceWarning")
@pytest.mark.parametrize("first", [11, pytest.param(1, marks=pytest.mark.every_combination)])
def test_a_thread_that_is_interrupted_while_it_stores_leaves_no_file(
    first: int, blobs: BlobScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any place, once the transaction is aborted; and it can be done again."""
    places = 0
    with being_served(blobs, monkeypatch):
        while True:
            places += 1
            storage = ClientStorage(blobs.server.address, blob_dir=blobs.cache, wait_timeout=DEADLINE_S)
            where = ""
            for place in (places * first, 0):
                transaction = TransactionMetaData()
                storage.tpc_begin(transaction)
                args = OID, NO_TID, RECORD, blobs.file(bytes(100_000)), "", transaction
                interrupted = Interrupted(place, lambda: storage.storeBlob(*args), Interruption)  # noqa: B023
                interrupted.join(DEADLINE_S)
                assert interrupted.where or interrupted.outcome is None
                storage.tpc_abort(transaction)
                assert blobs.files() == [], interrupted.where
                where = where or interrupted.where
            storage.close()
            if not where:
                break
    assert places > 100 / first


def test_a_read_only_client_stores_none(blobs: BlobScene) -> None:
    blobs.open(read_only=True)
    with pytest.raises(ReadOnlyError):
        blobs.storage.storeBlob(OID, NO_TID, RECORD, blobs.file(), "", TransactionMetaData())
    loading = Task(blobs.storage.loadBlob, OID, T1)
    blobs.answer_load(b"but has a cache")
    assert Path(loading.result()).read_bytes() == b"but has a cache"


# Loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"content", bytes(500_000)])
def test_a_blob_is_downloaded_once(blobs: BlobScene, content: bytes) -> None:
    blobs.open()
    loading = Task(blobs.storage.loadBlob, OID, T1)
    blobs.answer_load(content)
    assert loading.result() == str(blobs.path(T1))
    assert blobs.path(T1).read_bytes() == content
    assert len(blobs.files()) == 1
    assert blobs.storage.loadBlob(OID, T1) == str(blobs.path(T1))
    with blobs.storage.openCommittedBlobFile(OID, T1) as file:
        assert type(file) is io.BufferedReader
        assert file.name == str(blobs.path(T1))
        assert file.read() == content
    blob = Blob()
    with blobs.storage.openCommittedBlobFile(OID, T1, blob) as of_blob:
        assert type(of_blob) is BlobFile
        assert of_blob.read() == content
    blobs.storage.close()
    assert blobs.storage.loadBlob(OID, T1) == str(blobs.path(T1)), "what is here can be had without a server"
    assert [call.name for call in blobs.connection.expect_end()] == []


def test_many_threads_have_one_download(blobs: BlobScene) -> None:
    blobs.open()
    loading = [Task(blobs.storage.loadBlob, OID, T1) for _ in range(8)]
    call = blobs.connection.expect("sendBlob")
    assert all(task.is_held_up() for task in loading)
    blobs.send(b"content")
    blobs.connection.answer(call, None)
    assert {task.result() for task in loading} == {str(blobs.path(T1))}
    blobs.storage.close()
    assert [call.name for call in blobs.connection.expect_end()] == []


def test_downloads_of_several_blobs_may_be_mixed(blobs: BlobScene) -> None:
    blobs.open()
    loading = {of: Task(blobs.storage.loadBlob, of, T1) for of in (OID, OTHER)}
    calls = [blobs.connection.expect("sendBlob") for _ in loading]
    call = blobs.connection.call
    for name in ("receiveBlobStart", "receiveBlobChunk", "receiveBlobChunk", "receiveBlobStop"):
        for of in loading:
            blobs.connection.send(call(name, of, T1, *([of] if name == "receiveBlobChunk" else [])))
    for each in calls:
        blobs.connection.answer(each, None)
    for of, task in loading.items():
        assert Path(task.result()).read_bytes() == of * 2


def test_a_blob_that_there_is_not(blobs: BlobScene) -> None:
    blobs.open()
    loading = [Task(blobs.storage.loadBlob, OID, T1) for _ in range(3)]
    call = blobs.connection.expect("sendBlob")
    assert all(task.is_held_up() for task in loading)
    blobs.connection.send(blobs.connection.fault(call, POSKeyError(OID)))
    outcomes = [task.outcome() for task in loading]
    assert [type(outcome) for outcome in outcomes] == [POSKeyError] * 3
    assert len({id(outcome) for outcome in outcomes}) == 3
    assert blobs.files() == []
    assert blobs.storage.is_connected()


def test_a_server_that_only_says_that_it_sent_it(blobs: BlobScene) -> None:
    blobs.open()
    loading = Task(blobs.storage.loadBlob, OID, T1)
    call = blobs.connection.expect("sendBlob")
    blobs.connection.send(blobs.connection.call("receiveBlobStart", OID, T1))
    blobs.connection.answer(call, None)
    assert isinstance(loading.outcome(), ServerError)
    assert blobs.files() == []


def test_a_download_that_nobody_asked_for_is_dropped(blobs: BlobScene) -> None:
    blobs.open()
    blobs.send(b"content")
    pinging = Task(blobs.storage.ping)
    blobs.connection.answer(blobs.connection.expect("ping"), None)
    pinging.result()
    assert blobs.files() == []


def test_a_download_begins_anew_on_the_next_connection(blobs: BlobScene) -> None:
    blobs.open()
    loading = Task(blobs.storage.loadBlob, OID, T1)
    blobs.connection.expect("sendBlob")
    call = blobs.connection.call
    blobs.connection.send(call("receiveBlobStart", OID, T1))
    blobs.connection.send(call("receiveBlobChunk", OID, T1, b"a long beginning"))
    blobs.connection.close()
    blobs.connection = blobs.welcome()
    blobs.answer_load(b"whole")
    assert Path(loading.result()).read_bytes() == b"whole"


def test_a_download_is_given_up_after_some_connections(blobs: BlobScene) -> None:
    blobs.open()
    loading = Task(blobs.storage.loadBlob, OID, T1)
    for number in range(limits.BLOB_DOWNLOADS):
        if number:
            blobs.connection = blobs.welcome()
        blobs.connection.expect("sendBlob")
        blobs.connection.close()
    assert isinstance(loading.outcome(), Disconnected)
    assert blobs.files() == []


def test_a_full_disk_fails_the_load_and_not_the_connection(blobs: BlobScene) -> None:
    blobs.open()
    with no_room_beyond(1000):
        loading = [Task(blobs.storage.loadBlob, OID, T1) for _ in range(2)]
        call = blobs.connection.expect("sendBlob")
        assert all(task.is_held_up() for task in loading)
        blobs.send(bytes(5000))
        blobs.connection.answer(call, None)
        for task in loading:
            problem = task.outcome()
            assert type(problem) is ClientError
            assert str(problem) == f"the blob directory {blobs.cache}: File too large"
    assert blobs.files() == []
    assert blobs.storage.is_connected()
    again = Task(blobs.storage.loadBlob, OID, T1)
    blobs.answer_load(bytes(5000))
    assert os.path.getsize(again.result()) == 5000


def test_no_deadline_passes_while_a_blob_comes(blobs: BlobScene) -> None:
    """Everybody's replies stand behind it."""
    blobs.open(wait_timeout=0.3)
    loading = Task(blobs.storage.loadBlob, OID, T1)
    download = blobs.connection.expect("sendBlob")
    other = Task(blobs.storage.loadSerial, OID, T1)
    load = blobs.connection.expect("loadSerial")
    call = blobs.connection.call
    blobs.connection.send(call("receiveBlobStart", OID, T1))
    ticks = threading.Event()
    for _ in range(10):
        ticks.wait(0.1)
        blobs.connection.send(call("receiveBlobChunk", OID, T1, b"x"))
    blobs.connection.send(call("receiveBlobStop", OID, T1))
    blobs.connection.answer(download, None)
    blobs.connection.answer(load, b"data")
    assert Path(loading.result()).read_bytes() == b"x" * 10
    assert other.result() == b"data"


def test_a_blob_that_stops_coming_times_out_and_ends_the_connection(blobs: BlobScene) -> None:
    blobs.open(wait_timeout=0.3)
    loading = Task(blobs.storage.loadBlob, OID, T1)
    blobs.connection.expect("sendBlob")
    call = blobs.connection.call
    blobs.connection.send(call("receiveBlobStart", OID, T1), call("receiveBlobChunk", OID, T1, b"x"))
    assert isinstance(loading.outcome(), TimedOut)
    blobs.connection.expect_end()
    assert blobs.files() == []


# Python swallows an interruption that comes in the midst of it.
@pytest.mark.filterwarnings("ignore:.*Part.__del__:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("first", [7, pytest.param(1, marks=pytest.mark.every_combination)])
def test_a_thread_that_is_interrupted_leaves_the_download_to_the_next(
    first: int, blobs: BlobScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any place: afterwards another thread has the blob, and nothing half done is left.

    *first*: the first place, and the distance from one to the next.
    """
    places = 0
    with being_served(blobs, monkeypatch):
        while True:
            serial = (0x03FB_0000_0000_0000 + places).to_bytes(8, "big")
            places += 1
            # A new one each time: whoever loses its connections early waits for longer and longer.
            storage = ClientStorage(blobs.server.address, blob_dir=blobs.cache, wait_timeout=DEADLINE_S)
            interrupted = Interrupted(places * first, lambda: storage.loadBlob(OID, serial), Interruption)  # noqa: B023
            interrupted.join(DEADLINE_S)
            path = Task(storage.loadBlob, OID, serial).result()
            storage.close()
            assert Path(path).read_bytes() == serial * 3, interrupted.where
            parts = [name for name in blobs.files() if name.endswith(".part")]
            assert parts == [], interrupted.where
            if not interrupted.where:
                break
    assert places > 100 / first


@contextlib.contextmanager
def being_served(blobs: BlobScene, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With a server that sends any blob, and interruptions also at the places of the cache."""
    monkeypatch.setattr(interruptions, "PLACES", os.path.dirname(zeoid.__file__))
    stop = threading.Event()
    serving = Task(serve_blobs, blobs, stop)
    try:
        yield
    finally:
        stop.set()
        serving.result()
        gc.collect()


def serve_blobs(blobs: BlobScene, stop: threading.Event) -> None:
    """Answer every `sendBlob` on whatever connection there is, with the serial three times."""
    blobs.server.timeout_s = 0.05
    while not stop.is_set():
        if blobs.connection is None:
            with contextlib.suppress(AssertionError, OSError):
                connection = blobs.server.accept()
                connection.timeout_s = DEADLINE_S
                connection.welcome(T1, info=WITH_BLOBS)
                blobs.connection = connection
            continue
        try:
            call = blobs.connection.expect(timeout_s=0.05)
        except AssertionError as silence:
            if "in time" not in str(silence):
                blobs.connection = None  # type: ignore[assignment]
            continue
        with contextlib.suppress(OSError):
            answer_serial(blobs, call)


def answer_serial(blobs: BlobScene, call: Call) -> None:
    if call.name == "sendBlob":
        blobs.send(call.args[1] * 3, call.args[1])
    if not call.one_way:
        blobs.connection.answer(call, None)


# Processes --------------------------------------------------------------------------------------------

PROGRAMS = Path(__file__).parent / "programs"


@contextlib.contextmanager
def program(name: str, blobs: BlobScene) -> Iterator[subprocess.Popen[str]]:
    """A process with a client of the same server and the same cache; it ends with this."""
    host, port = blobs.server.address
    command = [sys.executable, str(PROGRAMS / name), f"{host}:{port}", str(blobs.cache)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_two_processes_have_one_download(blobs: BlobScene) -> None:
    blobs.open()
    mine = Task(blobs.storage.loadBlob, OID, T1)
    call = blobs.connection.expect("sendBlob")
    with program("loading_blob.py", blobs) as process:
        other = blobs.server.accept()
        other.welcome(T1, info=WITH_BLOBS)
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        with pytest.raises(AssertionError, match="nothing came in time"):
            other.expect(timeout_s=0.3)
        blobs.send(b"content")
        blobs.connection.answer(call, None)
        assert process.communicate(timeout=DEADLINE_S)[0] == "b'content'\n"
        assert process.returncode == 0
    assert Path(mine.result()).read_bytes() == b"content"
    assert other.expect_end() == []
    assert len(blobs.files()) == 1


def test_a_process_forks_in_a_download(blobs: BlobScene) -> None:
    """Its child has another blob, then waits for its parent's download as for any other process's."""
    with program("forking_blob.py", blobs) as process:
        parents = blobs.connection = blobs.server.accept()
        parents.welcome(T1, info=WITH_BLOBS)
        of_parent = parents.expect("sendBlob")
        parents.send(parents.call("receiveBlobStart", OID, T1))
        parents.send(parents.call("receiveBlobChunk", OID, T1, b"half"))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("fork\n")
        process.stdin.flush()
        childs = blobs.connection = blobs.server.accept()
        childs.welcome(T1, info=WITH_BLOBS)
        of_child = childs.expect("sendBlob")
        assert of_child.args == (OTHER, T1)
        blobs.send(b"the child's", of=OTHER)
        childs.answer(of_child, None)
        assert process.stdout.readline() == "child has b\"the child's\"\n"
        with pytest.raises(AssertionError, match="nothing came in time"):
            childs.expect(timeout_s=0.3)
        parents.send(parents.call("receiveBlobChunk", OID, T1, b"half"))
        parents.send(parents.call("receiveBlobStop", OID, T1))
        parents.answer(of_parent, None)
        lines = process.communicate(timeout=DEADLINE_S)[0].splitlines()
        assert sorted(lines) == ["child ended with 0", "child has b'halfhalf'", "parent has b'halfhalf'"]
        assert process.returncode == 0
    assert len(blobs.files()) == 2


def test_a_parent_that_dies_in_a_download_leaves_no_lock_to_its_child(blobs: BlobScene) -> None:
    with program("forking_blob.py", blobs) as process:
        parents = blobs.server.accept()
        parents.welcome(T1, info=WITH_BLOBS)
        parents.expect("sendBlob")
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("fork\n")
        process.stdin.flush()
        childs = blobs.connection = blobs.server.accept()
        childs.welcome(T1, info=WITH_BLOBS)
        call = childs.expect("sendBlob")
        blobs.send(b"the child's", of=OTHER)
        process.kill()
        childs.answer(call, None)
        assert process.stdout.readline() == "child has b\"the child's\"\n"
        blobs.answer_load(b"content")
        assert process.stdout.readline() == "child has b'content'\n"
        childs.expect_end()
    assert len(blobs.files()) == 2


# A shared directory -----------------------------------------------------------------------------------


@pytest.fixture
def shared(blobs: BlobScene, tmp_path: Path) -> BlobScene:
    blobs.cache = tmp_path / "servers"
    blobs.cache.mkdir()
    (blobs.cache / ".layout").write_text("lawn")
    return blobs.open(shared_blob_dir=True)


def test_a_shared_directory_is_not_made(scene: Scene, tmp_path: Path) -> None:
    for marker in (None, "zeocache", "unheard of"):
        if marker:
            (tmp_path / ".layout").write_text(marker)
        with pytest.raises(ConfigurationError, match="was the server ever started"):
            scene.storage(scene.server(), blob_dir=tmp_path, shared_blob_dir=True)
    assert os.listdir(tmp_path) == [".layout"]


def test_in_a_shared_directory_the_server_is_told_the_name(shared: BlobScene) -> None:
    transaction = TransactionMetaData()
    shared.storage.tpc_begin(transaction)
    shared.storage.storeBlob(OID, "\0" * 8, RECORD, shared.file(), "", transaction)
    begin, store, attach = (shared.connection.expect() for _ in range(3))
    assert (begin.name, store.name, attach.name) == ("tpc_begin", "storea", "storeBlobShared")
    of, serial, data, name, number = attach.args
    assert (of, serial, data, number) == (OID, NO_TID, RECORD, begin.args[0])
    assert name.endswith(".tmp-")
    assert "/" not in name
    file = Path(shared.storage.fshelper.getPathForOID(OID)) / name
    assert file.read_bytes() == b"content"
    assert file.stat().st_mode & 0o222 == 0
    shared.storage.tpc_abort(transaction)
    assert file.exists(), "it is the server's, which stumbles over one that is gone"


def test_in_a_shared_directory_what_is_there_is_there(shared: BlobScene) -> None:
    with pytest.raises(POSKeyError):
        shared.storage.loadBlob(OID, T3)
    with pytest.raises(POSKeyError):
        shared.storage.openCommittedBlobFile(OID, T3)
    shared.path(T3).parent.mkdir()
    shared.path(T3).write_bytes(b"content")
    assert shared.storage.loadBlob(OID, T3) == str(shared.path(T3))
    with shared.storage.openCommittedBlobFile(OID, T3) as file:
        assert file.read() == b"content"
    shared.storage.close()
    assert [call.name for call in shared.connection.expect_end()] == []


def test_in_a_shared_directory_a_file_that_the_server_never_heard_of_is_removed(shared: BlobScene) -> None:
    transaction = TransactionMetaData()
    shared.storage.tpc_begin(transaction)
    with pytest.raises(UnsendableValue):
        shared.storage.storeBlob(OID, NO_TID, object(), shared.file(), "", transaction)
    shared.storage.tpc_abort(transaction)
    assert shared.files() == []


def test_in_a_shared_directory_a_conflict_is_not_resolved_at_the_blobs_expense(
    shared: BlobScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClientStorage, "tryToResolveConflict", lambda *args: b"resolved")
    transaction = TransactionMetaData()
    shared.storage.tpc_begin(transaction)
    shared.storage.store(OTHER, T1, b"data", "", transaction)
    shared.storage.storeBlob(OID, NO_TID, RECORD, shared.file(), "", transaction)
    voting = Task(shared.storage.tpc_vote, transaction)
    while (call := shared.connection.expect()).name != "vote":
        pass
    shared.connection.answer(call, [{"oid": OTHER, "serials": (T2, T1), "data": b"data"}])
    assert isinstance(voting.outcome(), ConflictError)
    shared.storage.tpc_abort(transaction)
