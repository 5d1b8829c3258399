"""A cache that processes share, on real servers: warm after a restart, warm for all, never stale."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData

import zeoid
from tests.client.test_processes import program, written
from tests.peers import KINDS, Kind, Peers, Server, wait_until
from zeoid import limits
from zeoid.model import NO_TID, tid_after

OBJECTS = 200
#: What the transaction wrote that a back-up does not have.
LOST = (1).to_bytes(8, "big")


def write(storage: Any, numbers: Any, data: bytes) -> bytes:
    """Commit objects with these numbers: the tid."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    for number in numbers:
        oid = number.to_bytes(8, "big")
        try:
            serial = storage.getTid(oid)
        except KeyError:
            serial = NO_TID
        storage.store(oid, serial, data, "", transaction)
    storage.tpc_vote(transaction)
    tid: bytes = storage.tpc_finish(transaction)
    return tid


class Reader:
    """A process of `programs.reading_shared`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._line() == "ready"

    def read(self, first: int = 1, last: int = OBJECTS) -> tuple[str, int]:
        """What the objects were, and the loads that the server has answered so far."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{first} {last}\n")
        self._process.stdin.flush()
        data, loads = self._line().split()
        return data, int(loads)

    def end(self) -> None:
        _, errors = self._process.communicate(timeout=25)
        assert self._process.returncode == 0, errors

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._process.communicate()[1]
        return line.strip()


@contextmanager
def reader(server: Server, cache_dir: Path) -> Iterator[Reader]:
    with program("reading_shared", written(server.address), str(cache_dir)) as process:
        yield Reader(process)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, peers: Peers) -> Server:
    kind: Kind = request.param
    return peers.server(kind)


@pytest.fixture
def writer(server: Server, peers: Peers) -> Any:
    storage = peers.client("zeoid", server.address)
    write(storage, range(1, OBJECTS + 1), b"first")
    return storage


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("how", ["end", "kill"])
def test_a_second_life_needs_no_server(server: Server, writer: Any, cache_dir: Path, how: str) -> None:
    with reader(server, cache_dir) as process:
        data, loads = process.read()
        assert (data, loads) == ("first", OBJECTS)
        getattr(process, how)()
    with reader(server, cache_dir) as process:
        # A stock server's figure grows by one: whether it has the last revision that was seen.
        data, again = process.read()
        assert data == "first"
        assert again - loads <= 1
        assert process.read()[1] == again
        process.end()


def test_eight_processes_warm_each_other(server: Server, writer: Any, cache_dir: Path) -> None:
    part = OBJECTS // 8
    with ExitStack() as stack:
        processes = [stack.enter_context(reader(server, cache_dir)) for _ in range(8)]
        for number, process in enumerate(processes):
            process.read(1 + number * part, (number + 1) * part)
        before = processes[0].read()[1]
        assert all(process.read() == ("first", before) for process in processes)
        # One object in ten is another one now: each of them is loaded once, or twice where two hurry.
        write(writer, range(10, OBJECTS + 1, 10), b"second")
        for process in processes:
            wait_until(lambda process=process: process.read(10, 10)[0] == "second", "the commit")
            assert process.read(1, 9)[0] == "first"
        for process in processes:
            for number in range(10, OBJECTS + 1, 10):
                assert process.read(number, number)[0] == "second"
        assert processes[0].read(1, 9)[1] - before <= OBJECTS // 10 + 8
        for process in processes:
            process.end()


def test_what_was_written_while_nobody_was_there_is_loaded_and_nothing_else(
    server: Server, writer: Any, cache_dir: Path
) -> None:
    with reader(server, cache_dir) as process:
        process.read()
        process.end()
    write(writer, range(50, 60), b"second")
    loads = writer.server_status()["loads"]
    with reader(server, cache_dir) as process:
        assert process.read(50, 59)[0] == "second"
        assert process.read(1, 49)[0] == "first"
        assert process.read(60, OBJECTS)[1] - loads <= 10 + 1
        process.end()


def test_a_commit_of_ones_own_is_there_for_others(server: Server, writer: Any, cache_dir: Path) -> None:
    one = zeoid.ClientStorage(server.address, cache_dir=cache_dir)
    tid = write(one, [7], b"own")
    one.close()
    loads = writer.server_status()["loads"]
    two = zeoid.ClientStorage(server.address, cache_dir=cache_dir)
    assert two.loadBefore((7).to_bytes(8, "big"), tid_after(two.lastTransaction())) == (b"own", tid, None)
    assert writer.server_status()["loads"] - loads <= 1
    two.close()


def restored(peers: Peers, cache_dir: Path) -> tuple[Server, bytes]:
    """A server whose last commit, which the cache has, was lost to a back-up; the tid before that."""
    server = peers.server("stock")
    writer = peers.client("zeoid", server.address)
    first = write(writer, [1, 2], b"first")
    server.stop()
    back_up = server.data_file.read_bytes()
    server.start()
    write(writer, [1], b"lost")
    one = zeoid.ClientStorage(server.address, cache_dir=cache_dir)
    assert one.loadBefore(LOST, tid_after(one.lastTransaction()))[0] == b"lost"
    one.close()
    writer.close()
    server.stop()
    for file in server.data_file.parent.glob("*.fs.*"):
        file.unlink()
    server.data_file.write_bytes(back_up)
    server.start()
    return server, first


def test_a_database_that_was_restored(
    peers: Peers, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The last commits are lost: whoever starts then does not see them, and nobody has to remove anything."""
    monkeypatch.setattr(limits, "BEHIND_S", 0.5)
    server, first = restored(peers, cache_dir)
    two = zeoid.ClientStorage(server.address, cache_dir=cache_dir)
    assert two.lastTransaction() == first
    assert two.loadBefore(LOST, tid_after(first))[:2] == (b"first", first)
    assert "restored from a back-up" in caplog.text
    two.close()


def test_a_restored_database_that_has_gone_on(peers: Peers, cache_dir: Path, caplog: Any) -> None:
    server, _ = restored(peers, cache_dir)
    newer = peers.client("zeoid", server.address)
    tid = write(newer, [2], b"second")
    two = zeoid.ClientStorage(server.address, cache_dir=cache_dir)
    assert two.lastTransaction() == tid
    assert two.loadBefore(LOST, tid_after(tid))[0] == b"first"
    assert "can't be found in its database" in caplog.text
    two.close()


@pytest.mark.parametrize("size_bytes", [1, 4 * 1024**2 - 1])
def test_a_shared_cache_has_a_least_size(cache_dir: Path, size_bytes: int) -> None:
    with pytest.raises(zeoid.errors.ConfigurationError, match="4,194,304 at least"):
        zeoid.ClientStorage(("127.0.0.1", 1), cache_dir=cache_dir, cache_size_bytes=size_bytes, wait=False)
    assert not cache_dir.exists()
