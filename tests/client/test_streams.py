"""A ZODB application's blobs, over blob connections of a real server."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.blob import Blob
from ZODB.POSException import ConflictError, POSKeyError, StorageError

from tests.blobserver import BlobServer, opened
from tests.client.scenes import Task
from tests.peers import wait_until
from tests.server.sockets import RawClient
from zeoid import ClientStorage, limits
from zeoid.client import streams
from zeoid.errors import Disconnected

LARGE = os.urandom(20_000_000)
INLINE = limits.BLOB_INLINE_BYTES
SIZES = [0, 1, INLINE - 1, INLINE, INLINE + 1, len(LARGE)]
Open = Callable[..., ClientStorage]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BlobServer]:
    (tmp_path / "server").mkdir()
    with BlobServer(tmp_path / "server") as server:
        yield server


@pytest.fixture
def open_client(server: BlobServer, tmp_path: Path) -> Iterator[Open]:
    made: list[ClientStorage] = []

    def open_client(**options: Any) -> ClientStorage:
        folder = tmp_path / f"cache{len(made)}"
        made.append(ClientStorage(server.address, wait_timeout=20, blob_dir=folder, **options))
        return made[-1]

    yield open_client
    for client in made:
        client.close()


def store(storage: ClientStorage, **contents: bytes) -> None:
    manager = transaction.TransactionManager()
    root = ZODB.DB(storage).open(manager).root()
    for name, content in contents.items():
        root[name] = Blob(content)
    manager.commit()
    manager.abort()


def load(storage: ClientStorage, name: str) -> bytes:
    manager = transaction.TransactionManager()
    with ZODB.DB(storage).open(manager).root()[name].open() as file:
        content: bytes = file.read()
    manager.abort()
    return content


def unclaimed(server: BlobServer) -> int:
    """Blobs that no transaction has, by the server's own count."""
    return sum(client.grant.staged._count for client in server.server.storages["1"].clients)


def nothing_is_left(server: BlobServer) -> None:
    server.on_loop(lambda: None)
    server.engine.checkpoint()
    wait_until(lambda: not server.staged, "nothing is staged")


def no_stock_messages(client: ClientStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: Any) -> None:
        raise AssertionError("a blob was asked for as of a stock server")

    monkeypatch.setattr(client._blobs, "_downloads", type("None", (), {"fetch": fetch})())


@pytest.mark.parametrize("size_bytes", SIZES)
def test_stored_and_read(
    size_bytes: int, server: BlobServer, open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(open_client(), blob=LARGE[:size_bytes])
    reader = open_client()
    no_stock_messages(reader, monkeypatch)
    assert load(reader, "blob") == LARGE[:size_bytes]
    assert unclaimed(server) == 0
    nothing_is_left(server)


def test_aborted(server: BlobServer, open_client: Open) -> None:
    storage = open_client()
    manager = transaction.TransactionManager()
    root = ZODB.DB(storage).open(manager).root()
    root["blob"] = Blob(LARGE)

    class Refusing:
        """A data manager that lets no transaction pass, after the storage has voted."""

        def sortKey(self) -> str:
            return "~"

        def tpc_vote(self, _: Any) -> None:
            raise RuntimeError("no")

        def abort(self, _: Any) -> None: ...

        tpc_begin = commit = tpc_abort = abort

    manager.get().join(Refusing())
    with pytest.raises(RuntimeError):
        manager.commit()
    manager.abort()
    assert unclaimed(server) == 0
    nothing_is_left(server)


def test_aborted_before_the_vote(server: BlobServer, open_client: Open, tmp_path: Path) -> None:
    storage = open_client()
    of = ZODB.Connection.TransactionMetaData()
    storage.tpc_begin(of)
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    storage.storeBlob(bytes(7) + b"\5", bytes(8), b"cZODB.blob\nBlob\nq\x01.N.", str(path), "", of)
    assert unclaimed(server) == 1
    storage.tpc_abort(of)
    storage.ping()
    assert unclaimed(server) == 0
    nothing_is_left(server)


def test_a_blob_outlives_a_round_of_conflicts(open_client: Open) -> None:
    from BTrees.Length import Length

    first, second = open_client(), open_client()
    manager = transaction.TransactionManager()
    database = ZODB.DB(first)
    root = database.open(manager).root()
    root["length"] = Length(0)
    root["blob"] = Blob(b"before")
    manager.commit()
    root["length"].change(1)
    with root["blob"].open("w") as file:
        file.write(LARGE)
    other = transaction.TransactionManager()
    ZODB.DB(second).open(other).root()["length"].change(10)
    held = second.lastTransaction()
    other.commit()
    assert second.lastTransaction() > held
    manager.commit()
    assert root["length"]() == 11
    assert load(open_client(), "blob") == LARGE
    manager.abort()
    other.abort()


def test_a_conflict_that_cannot_be_resolved(server: BlobServer, open_client: Open) -> None:
    first, second = open_client(), open_client()
    store(first, blob=b"before")
    managers = [transaction.TransactionManager() for _ in range(2)]
    roots = [
        ZODB.DB(storage).open(manager).root()
        for storage, manager in zip((first, second), managers, strict=True)
    ]
    for root in roots:
        with root["blob"].open("w") as file:
            file.write(LARGE[:100_000])
    managers[0].commit()
    with pytest.raises(ConflictError):
        managers[1].commit()
    managers[1].abort()
    second.ping()
    assert unclaimed(server) == 0
    nothing_is_left(server)


def test_the_client_goes_away_in_an_upload(server: BlobServer, open_client: Open, tmp_path: Path) -> None:
    storage = open_client()
    of = ZODB.Connection.TransactionMetaData()
    storage.tpc_begin(of)
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    arrived = threading.Event()
    go_on = threading.Event()
    staging = server.engine.stage_blob

    def stage(size_bytes: int) -> Any:
        writer = staging(size_bytes)
        arrived.set()
        assert go_on.wait(20)
        return writer

    server.engine.stage_blob = stage
    storing = Task(storage.storeBlob, bytes(8), bytes(8), b"record", str(path), "", of)
    assert arrived.wait(20)
    assert server.staged
    storage.close()
    assert isinstance(storing.outcome(), Disconnected)
    go_on.set()
    nothing_is_left(server)
    wait_until(lambda: not server.streams, "no blob connection is left")


def test_the_server_restarts_in_a_download(
    server: BlobServer, open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(open_client(), blob=LARGE)
    reader = open_client()
    write = streams.Part.write
    offsets: list[int] = []
    get = streams.Get

    def noted(oid: bytes, serial: bytes, offset: int) -> Any:
        offsets.append(offset)
        return get(oid, serial, offset)

    def interrupted(part: Any, data: Any) -> None:
        write(part, data)
        if len(offsets) == 1 and part.size_bytes > 1_000_000:
            offsets.append(-1)
            server.stop()
            server.start()

    monkeypatch.setattr(streams, "Get", noted)
    monkeypatch.setattr(streams.Part, "write", interrupted)
    assert load(reader, "blob") == LARGE
    first, _, *again = offsets
    assert first == 0
    assert again[-1] > 1_000_000  # it goes on where it was


def test_several_threads_store_and_read_at_once(server: BlobServer, open_client: Open) -> None:
    storage, reader = open_client(), open_client()
    database = ZODB.DB(storage)
    contents = {f"blob{number}": LARGE[number : number + 1_000_000] for number in range(10)}
    most = 0

    def save(name: str, content: bytes) -> None:
        nonlocal most
        manager = transaction.TransactionManager()
        for attempt in manager.attempts(20):
            with attempt:
                database.open(manager).root()[name] = Blob(content)
            most = max(most, len(storage._blobs.streams._lines))  # type: ignore[union-attr]

    # Everybody writes to the root, so there are conflicts.
    for task in [Task(save, name, content) for name, content in contents.items()]:
        task.result(60)
    assert 0 < most <= limits.BLOB_CONNECTIONS
    for name, content in contents.items():
        assert load(reader, name) == content
    assert unclaimed(server) == 0
    nothing_is_left(server)


def busy_streams(server: BlobServer) -> Iterator[RawClient]:
    """As many as the server has threads, which send nothing of what they announced."""
    while server.streams < limits.BLOB_STREAMS:
        client = RawClient(server.address).register()
        for _ in range(limits.BLOB_CONNECTIONS):
            stream = opened(server, client)
            stream.begin_put(os.urandom(16), os.urandom(16), INLINE + 1)
            yield stream
        yield client


def test_a_server_all_of_whose_threads_are_busy(
    server: BlobServer, open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends nothing to it holds up nobody else."""
    monkeypatch.setattr(limits, "BLOB_CONNECTION_WAIT_S", 0.1)
    busy = list(busy_streams(server))
    store(open_client(), blob=LARGE)
    assert load(open_client(), "blob") == LARGE
    for each in busy:
        each.socket.close()
    wait_until(lambda: not server.streams, "the threads are free")
    reader = open_client()
    no_stock_messages(reader, monkeypatch)
    assert load(reader, "blob") == LARGE
    nothing_is_left(server)


def test_what_lets_no_blob_connection_through_is_not_tried_for_each_blob(
    server: BlobServer, open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Any] = []

    def refuse(address: Any, timeout_s: float) -> Any:
        tries.append(address)
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(streams, "connect", refuse)
    client = open_client()
    for name in "abc":
        store(client, **{name: name.encode() * (INLINE + 1)})
    assert len(tries) == 1
    monkeypatch.setattr(limits, "BLOB_CONNECTION_AGAIN_S", 0.0)
    reader = open_client()
    for name in "abc":
        assert load(reader, name) == name.encode() * (INLINE + 1)
    assert len(tries) == 4
    nothing_is_left(server)


def test_a_client_that_may_only_read(open_client: Open) -> None:
    store(open_client(), blob=LARGE)
    assert load(open_client(read_only=True), "blob") == LARGE


def test_no_such_blob(open_client: Open) -> None:
    storage = open_client()
    store(storage, blob=b"content")
    with pytest.raises(POSKeyError):
        storage.loadBlob(bytes(7) + b"\x63", storage.lastTransaction())


def test_a_disk_of_the_server_that_is_full(
    server: BlobServer, open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_client()
    monkeypatch.setattr(limits, "BLOB_FREE_BYTES", 1 << 62)
    with pytest.raises(StorageError, match="a blob can't be stored"):
        store(storage, blob=LARGE)
    monkeypatch.undo()
    store(storage, blob=LARGE)
    nothing_is_left(server)


def test_an_idle_connection_is_closed_after_a_while(
    server: BlobServer, open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_CONNECTION_IDLE_S", 0.05)
    store(open_client(), blob=LARGE)
    wait_until(lambda: not server.streams, "it is closed")


def test_an_idle_connection_that_the_server_closed(server: BlobServer, open_client: Open) -> None:
    storage = open_client()
    store(storage, first=LARGE[:100_000])
    wait_until(lambda: server.server.streams._idle, "it is idle")
    next(iter(server.server.streams._idle)).shut()
    store(storage, second=LARGE[:200_000])
    assert load(open_client(), "second") == LARGE[:200_000]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_its_own(server: BlobServer, open_client: Open) -> None:
    storage = open_client()
    store(storage, blob=LARGE)
    blobs = storage._blobs
    assert blobs.streams is not None
    lines = list(blobs.streams._lines)
    assert lines
    child = os.fork()
    if not child:
        closed = all(line._pipe._sock.fileno() < 0 for line in lines)
        os._exit(0 if closed and not blobs.streams._lines else 1)
    assert os.waitpid(child, 0)[1] == 0
    store(storage, more=LARGE)
    assert load(open_client(), "more") == LARGE
