"""A server in a thread of this process: `zeoid.serve`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from zc.lockfile import LockFile
from ZODB.MappingStorage import MappingStorage
from ZODB.tests.ConflictResolution import PCounter
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.utils import p64

import zeoid
from tests.server.sockets import Address, RawClient
from zeoid.addresses import TcpAddress, UnixAddress
from zeoid.errors import ConfigurationError
from zeoid.model import MAX_TID
from zeoid.server.embedded import RunningServer

A = p64(1)


def where(server: RunningServer) -> Address:
    address = server.address
    return (address.host, address.port) if isinstance(address, TcpAddress) else address.path


def commit(server: RunningServer, storage: str = "1") -> bytes:
    with RawClient(where(server)) as client:
        return client.register(storage).commit(A)


def test_a_storage_in_memory() -> None:
    with zeoid.serve(None) as server:
        assert isinstance(server.address, TcpAddress)
        assert server.address.host == "127.0.0.1"
        assert commit(server)


def test_a_data_file(tmp_path: Path) -> None:
    path = tmp_path / "Data.fs"
    with zeoid.serve(path) as server:
        tid = commit(server)
    LockFile(f"{path}.lock").close()
    with zeoid.serve(str(path)) as server, RawClient(where(server)) as client:
        assert client.register().call("loadBefore", A, MAX_TID) == (b"data", tid, None)


def test_a_storage_that_is_open() -> None:
    storage = MappingStorage()
    with zeoid.serve(storage) as server:
        tid = commit(server)
        assert storage.lastTransaction() == tid
    assert not storage.opened()


def test_several_storages(tmp_path: Path) -> None:
    with zeoid.serve({"main": tmp_path / "main.fs", "temporary": None}) as server:
        assert commit(server, "temporary")
        with RawClient(where(server)) as client:
            client.shake_hands()
            with pytest.raises(TypeError, match="this server has 'main', 'temporary'"):
                client.call("register", "1", False)


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with zeoid.serve(None, path=str(path)) as server:
        assert server.address == UnixAddress(str(path))
        assert commit(server)
    assert not path.exists()


def test_options_of_the_server() -> None:
    with zeoid.serve(None, read_only=True, offer="M5") as server, RawClient(where(server)) as client:
        assert client.read_frame() == b"M5"


def test_a_server_that_resolves_conflicts(tmp_path: Path) -> None:
    """It is asked to once, for all its storages."""
    storages = {"main": tmp_path / "main.fs", "memory": None}
    with zeoid.serve(storages, resolve_conflicts=True) as server, RawClient(where(server)) as client:
        client.register("main")
        first = client.commit(A, counter(1))
        client.commit(A, counter(5), first)
        assert client.prepare(A, counter(3), first) == (A,)
        tid = client.call("tpc_finish", 1)
        assert client.call("loadBefore", A, MAX_TID) == (counter(7), tid, None)


def counter(value: int) -> bytes:
    made = PCounter()
    made.inc(value)
    data: bytes = zodb_pickle(made)
    return data


def test_a_port_in_use() -> None:
    with zeoid.serve(None) as server:
        assert isinstance(server.address, TcpAddress)
        with pytest.raises(ConfigurationError, match="address already in use"):
            zeoid.serve(None, port=server.address.port)
        assert commit(server)


def test_a_data_file_that_is_locked(tmp_path: Path) -> None:
    with (
        zeoid.serve(tmp_path / "Data.fs"),
        pytest.raises(ConfigurationError, match="in use by another process"),
    ):
        zeoid.serve(tmp_path / "Data.fs")


def test_one_bad_storage_among_good_ones(tmp_path: Path) -> None:
    """Those that were opened before it are closed again."""
    with pytest.raises(ConfigurationError, match="does not exist"):
        zeoid.serve({"good": tmp_path / "Data.fs", "bad": tmp_path / "nosuch" / "Data.fs"})
    LockFile(f"{tmp_path / 'Data.fs'}.lock").close()


def test_an_option_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="nosuch"):
        zeoid.serve(tmp_path / "Data.fs", nosuch=7)
    LockFile(f"{tmp_path / 'Data.fs'}.lock").close()


def test_closing_it_twice_does_no_harm() -> None:
    server = zeoid.serve(None)
    server.close()
    server.close()


def test_it_ends_its_thread_when_the_block_fails() -> None:
    before = set(threading.enumerate())

    def fail() -> None:
        with zeoid.serve(None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(threading.enumerate()) <= before


def test_many_one_after_the_other() -> None:
    before = threading.active_count()
    for _ in range(10):
        with zeoid.serve(None) as server:
            assert commit(server)
    assert threading.active_count() <= before
