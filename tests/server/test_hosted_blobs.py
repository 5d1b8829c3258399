"""Blobs that are attached to transactions of a storage: their files are removed beside the loop, and once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from tests.engines.blobfiles import final_files, staged_files
from tests.server.inmemory import MemoryHouse, Peer
from zeoid.engines.opening import open_filestorage
from zeoid.model import NO_TID, AttachBlob

A = p64(1)


@pytest.fixture
def blob_dir(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def house(make_house: Callable[..., MemoryHouse], tmp_path: Path, blob_dir: Path) -> MemoryHouse:
    return make_house({"1": open_filestorage(tmp_path / "Data.fs", blob_dir=blob_dir)})


def attach(house: MemoryHouse, peer: Peer, content: bytes = b"content") -> None:
    """As a message will do it that ends an upload."""
    peer.begin()
    peer.store(A, serial=NO_TID)
    file = house.hosted.engine.stage_blob()
    file.write(content)
    house.hosted.transactions.operate(peer.session, 1, AttachBlob(A, file.complete()))


def test_a_vote_with_blobs_is_prepared_beside_the_loop(house: MemoryHouse, blob_dir: Path) -> None:
    peer = house.peer()
    attach(house, peer)
    vote = peer.start("vote", 1)
    assert not vote.answered
    assert len(house.beside) == 1
    house.work()
    peer.read()
    assert vote.result == ()
    tid = peer.ask("tpc_finish", 1)
    with house.hosted.engine.open_blob(A, tid) as file:
        assert file.read() == b"content"


def test_what_is_given_up_before_its_vote_is_removed_beside(house: MemoryHouse, blob_dir: Path) -> None:
    peer = house.peer()
    attach(house, peer)
    peer.ask("tpc_abort", 1)
    assert len(staged_files(blob_dir)) == 1
    assert len(house.beside) == 1
    assert house.hosted.busy
    house.work()
    assert staged_files(blob_dir) == []
    assert not house.hosted.busy


def test_what_is_prepared_and_given_up_is_removed_beside(house: MemoryHouse, blob_dir: Path) -> None:
    peer = house.peer()
    attach(house, peer)
    assert peer.ask("vote", 1) == ()
    peer.disconnect()
    assert len(staged_files(blob_dir)) == 1
    house.work()
    assert staged_files(blob_dir) == []
    assert final_files(blob_dir) == {}
    assert house.fatal == []


def test_who_disconnects_during_the_vote_leaves_nothing(house: MemoryHouse, blob_dir: Path) -> None:
    peer = house.peer()
    attach(house, peer)
    peer.start("vote", 1)
    peer.disconnect()
    house.work()
    assert staged_files(blob_dir) == []
    other = house.peer()
    attach(house, other, b"another")
    assert other.ask("vote", 1) == ()
    tid = other.ask("tpc_finish", 1)
    assert list(final_files(blob_dir).values()) == [b"another"]
    with pytest.raises(POSKeyError):
        house.hosted.engine.open_blob(A, p64(1))
    assert tid
