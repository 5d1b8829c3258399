"""Blobs between our client, stock clients and stock servers: on the wire, and in the files of a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.blob import Blob
from ZODB.ConflictResolution import ConflictResolvingStorage
from ZODB.POSException import POSKeyError

from tests.peers import CODINGS, KINDS, Coding, Kind, Layout, Peers, wait_until
from tests.room import no_room_beyond
from zeoid.errors import ClientError

CONTENTS = {"empty": b"", "small": b"small", "large": os.urandom(1_000_000)}


@pytest.fixture(params=KINDS)
def serving(request: pytest.FixtureRequest) -> Kind:
    """What the server is."""
    kind: Kind = request.param
    return kind


def store(storage: Any, contents: dict[str, bytes]) -> None:
    manager = transaction.TransactionManager()
    database = ZODB.DB(storage)
    root = database.open(manager).root()
    for name, content in contents.items():
        root[name] = Blob(content)
    manager.commit()
    manager.abort()


def load(storage: Any, name: str) -> tuple[bytes, str]:
    """The content of a blob, and its path."""
    manager = transaction.TransactionManager()
    blob = ZODB.DB(storage).open(manager).root()[name]
    with blob.open() as file:
        content = file.read()
    path: str = blob.committed()
    manager.abort()
    return content, path


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("writer", ["zeoid", "stock"])
def test_what_one_client_stores_the_other_loads(
    writer: Kind, shared: bool, coding: Coding, serving: Kind, peers: Peers
) -> None:
    layout: Layout = "lawn" if shared else "bushy"
    server = peers.server(serving, coding=coding, blobs=layout)
    reader: Kind = "stock" if writer == "zeoid" else "zeoid"

    def client(kind: Kind) -> Any:
        directory = server.blob_dir() if shared else peers.folder()
        return peers.client(
            kind, server.address, coding=coding, blob_dir=str(directory), shared_blob_dir=shared
        )

    store(client(writer), CONTENTS)
    reading = client(reader)
    for name, content in CONTENTS.items():
        assert load(reading, name)[0] == content
    assert (server.blob_dir() / ".layout").read_text() == layout
    server.stop()
    left = [path for path in server.blob_dir().rglob("*") if path.is_file() and path.suffix != ".blob"]
    assert [path.name for path in left] == [".layout"]


@pytest.mark.parametrize(("first", "second"), [("zeoid", "stock"), ("stock", "zeoid")])
def test_one_cache_for_both_clients(first: Kind, second: Kind, serving: Kind, peers: Peers) -> None:
    server = peers.server(serving, blobs="bushy")
    directory = peers.folder()
    store(peers.client(first, server.address, blob_dir=str(directory)), CONTENTS)
    # What the server no longer has can come from the cache only.
    for path in server.blob_dir().rglob("*.blob"):
        path.unlink()
    reading = peers.client(second, server.address, blob_dir=str(directory))
    for name, content in CONTENTS.items():
        assert load(reading, name)[0] == content
    reading.close()


def test_a_blob_that_the_server_has_lost_is_a_key_error(serving: Kind, peers: Peers) -> None:
    server = peers.server(serving, blobs="bushy")
    store(peers.client("zeoid", server.address, blob_dir=peers.folder()), CONTENTS)
    for path in server.blob_dir().rglob("*.blob"):
        path.unlink()
    reading = peers.client("zeoid", server.address, blob_dir=peers.folder())
    with pytest.raises(POSKeyError):
        load(reading, "small")
    assert reading.is_connected()


def test_a_conflict_of_another_object_does_not_lose_the_blob(
    serving: Kind, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stock server whose clients resolve conflicts puts the blob where the failed vote would have it."""
    monkeypatch.setattr(ConflictResolvingStorage, "tryToResolveConflict", lambda *args: args[4])
    server = peers.server(serving, blobs="bushy", client_conflict_resolution=True)
    one = peers.client("zeoid", server.address, blob_dir=peers.folder())
    store(one, {"blob": b"first"})
    # Connected later, so that it has the blob in view.
    two = peers.client("zeoid", server.address, blob_dir=peers.folder())
    managers = [transaction.TransactionManager() for _ in range(2)]
    roots = [ZODB.DB(each).open(manager).root() for each, manager in zip((one, two), managers, strict=True)]
    for root in roots:
        root._p_activate()
    roots[0]["other"] = 1
    managers[0].commit()
    with roots[1]["blob"].open("w") as file:
        file.write(b"second")
    roots[1]["mine"] = 2
    managers[1].commit()
    for each in managers:
        each.abort()
    reading = peers.client("zeoid", server.address, blob_dir=peers.folder())
    assert load(reading, "blob")[0] == b"second"


def test_a_full_cache_fails_the_load_and_leaves_nothing(serving: Kind, peers: Peers) -> None:
    server = peers.server(serving, blobs="bushy")
    store(peers.client("zeoid", server.address, blob_dir=peers.folder()), CONTENTS)
    directory = peers.folder()
    reading = peers.client("zeoid", server.address, blob_dir=directory)
    with no_room_beyond(100_000), pytest.raises(ClientError, match=f"{directory}: File too large"):
        load(reading, "large")
    assert [path.name for path in directory.rglob("*") if path.is_file()] == [".layout"]
    assert load(reading, "large")[0] == CONTENTS["large"]


def test_the_cache_keeps_its_bound(serving: Kind, peers: Peers) -> None:
    server = peers.server(serving, blobs="bushy")
    blobs = {f"blob {number}": os.urandom(50_000) for number in range(20)}
    store(peers.client("zeoid", server.address, blob_dir=peers.folder()), blobs)
    directory = peers.folder()
    reading = peers.client("zeoid", server.address, blob_dir=directory, blob_cache_size=300_000)

    def size_bytes() -> int:
        return sum(path.stat().st_size for path in directory.rglob("*.blob"))

    for name, content in blobs.items():
        found, path = load(reading, name)
        assert found == content
        os.utime(path, (1, 1))  # as if it were long ago
    wait_until(lambda: size_bytes() <= 300_000, "room in the cache")
    assert all(load(reading, name)[0] == content for name, content in blobs.items())


def test_larger_than_the_cache(serving: Kind, peers: Peers) -> None:
    server = peers.server(serving, blobs="bushy")
    store(peers.client("zeoid", server.address, blob_dir=peers.folder()), CONTENTS)
    reading = peers.client("zeoid", server.address, blob_dir=peers.folder(), blob_cache_size=1000)
    content, path = load(reading, "large")
    assert content == CONTENTS["large"]
    assert Path(path).read_bytes() == content, "what was just handed out stays"
