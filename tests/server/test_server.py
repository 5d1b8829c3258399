"""Listeners, sockets, threads and the end of a server, on real sockets in this process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from tests.peers import wait_until
from tests.server.inmemory import ParallelEngine
from tests.server.sockets import Address, RawClient, free_port, needs_ipv6
from zeoid import limits
from zeoid.addresses import Address as Listening
from zeoid.addresses import TcpAddress, UnixAddress
from zeoid.engines.opening import open_filestorage, open_memory
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ConfigurationError
from zeoid.model import MAX_TID, NO_TID
from zeoid.ports import Engine, PackStep
from zeoid.server.server import StorageFailure, StorageServer, serve_forever

A = p64(1)
WAIT_S = 30.0
ANY_PORT = TcpAddress("127.0.0.1", 0)


class Running:
    """A server on the event loop of a thread of its own, until `stop`."""

    def __init__(self, server: StorageServer, *addresses: Listening) -> None:
        self.server = server
        self.problem: BaseException | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, args=(addresses,), daemon=True)
        self._thread.start()
        assert self._ready.wait(WAIT_S)
        if self.problem is not None:
            self._thread.join(WAIT_S)
            raise self.problem

    def _run(self, addresses: tuple[Listening, ...]) -> None:
        try:
            serve_forever(self.server, addresses or (ANY_PORT,), on_ready=self._started)
        except BaseException as problem:
            self.problem = problem
        finally:
            self._ready.set()

    def _started(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready.set()

    @property
    def address(self) -> Address:
        return as_given(self.server.addresses[0])

    def on_loop(self, what: Callable[[], Any]) -> None:
        """Have something done on the server's loop, and wait for it."""
        done = threading.Event()

        def work() -> None:
            what()
            done.set()

        assert self._loop is not None
        self._loop.call_soon_threadsafe(work)
        assert done.wait(WAIT_S)

    def goes_on_for(self, seconds: float) -> bool:
        """Whether the server's loop still runs after so much time."""
        passed = threading.Event()
        loop = self._loop
        assert loop is not None
        loop.call_soon_threadsafe(loop.call_later, seconds, passed.set)
        return passed.wait(WAIT_S / 3)

    def stop(self) -> None:
        if self._thread.is_alive() and self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.server.stop)
        self.join()

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def as_given(address: Listening) -> Address:
    return (address.host, address.port) if isinstance(address, TcpAddress) else address.path


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers on addresses, by default with one storage in memory."""
    running: list[Running] = []

    def start(*addresses: Listening, storages: dict[str, Engine] | None = None, **options: Any) -> Running:
        running.append(Running(StorageServer(storages or {"1": open_memory()}, **options), *addresses))
        return running[-1]

    yield start
    for each in running:
        each.stop()


def works(address: Address) -> bool:
    with RawClient(address) as client:
        return bool(client.register().call("lastTransaction"))


def refuses(words: str, *addresses: Listening, **options: Any) -> None:
    """A server with these addresses does not start; the line that says why has these words."""
    with pytest.raises(ConfigurationError) as caught:
        Running(StorageServer({"1": open_memory()}, **options), *addresses)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# TCP ------------------------------------------------------------------------------------------------------


def test_any_free_port(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    running = start()
    assert works(running.address)
    assert f"listening on 127.0.0.1:{running.address[1]}" in caplog.messages


@needs_ipv6
def test_ipv6(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    running = start(TcpAddress("::1", 0))
    assert running.address[0] == "::1"
    assert works(running.address)
    assert any(line.startswith("listening on [::1]:") for line in caplog.messages)
    assert any(line.startswith("[::1]:") and "connected" in line for line in caplog.messages)


@needs_ipv6
def test_a_name_with_several_addresses_and_a_port(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    real = socket.getaddrinfo

    def lookup(host: Any, port: Any, *args: Any, **keywords: Any) -> Any:
        if host == "both.example":
            return [(family, socket.SOCK_STREAM, 6, "", (number, port)) for family, number in both]
        return real(host, port, *args, **keywords)

    async def resolve(self: Any, host: Any, port: Any, **keywords: Any) -> Any:
        return lookup(host, port)

    monkeypatch.setattr("zeoid.server.server.open_event_loop", lambda: asyncio.new_event_loop)
    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    port = free_port()
    start(TcpAddress("both.example", port))
    assert works(("127.0.0.1", port))
    assert works(("::1", port))


def test_every_interface(start: Start) -> None:
    running = start(TcpAddress("", free_port()), insecure=True)
    assert works(("127.0.0.1", running.address[1]))


def test_several_addresses(start: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    running = start(ANY_PORT, UnixAddress(path), ANY_PORT)
    one, other, third = (as_given(address) for address in running.server.addresses)
    assert one != third
    assert other == path
    with RawClient(one) as writer, RawClient(other) as reader:
        tid = writer.register().commit(A)
        assert reader.register().call("loadBefore", A, MAX_TID) == (b"data", tid, None)
    assert works(third)


def test_a_port_in_use(start: Start) -> None:
    address = start().server.addresses[0]
    refuses(f"can't listen on {address}: address already in use", address)


def test_a_port_in_use_among_several_addresses(start: Start, tmp_path: Path) -> None:
    """Nothing stays behind of the others."""
    address = start().server.addresses[0]
    path = tmp_path / "socket"
    refuses("address already in use", ANY_PORT, UnixAddress(str(path)), address)
    assert not path.exists()


def test_the_same_port_at_once(start: Start) -> None:
    """Connections that were closed by the first server do not keep the second from listening."""
    first = start()
    with RawClient(first.address) as client:
        client.register()
        first.stop()
        again = start(first.server.addresses[0])
        assert works(again.address)


@pytest.mark.parametrize(
    "address",
    [TcpAddress("no-such-host.invalid", 7700), TcpAddress("192.0.2.1", 7700), TcpAddress("a" * 300, 1)],
    ids=lambda address: str(address)[:20],
)
def test_an_address_that_is_not_here(address: TcpAddress) -> None:
    refuses(f"can't listen on {address}", address, insecure=True)


# Unix sockets ---------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


def test_a_unix_socket(start: Start, path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    running = start(UnixAddress(path))
    assert works(path)
    assert f"listening on {path}" in caplog.messages
    assert any(line.startswith("local client connected") for line in caplog.messages)
    running.stop()
    assert not os.path.exists(path)


def test_a_stale_socket_is_replaced(start: Start, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    assert os.path.exists(path)
    start(UnixAddress(path))
    assert works(path)


def test_a_live_socket_is_refused(start: Start, path: str) -> None:
    start(UnixAddress(path))
    refuses(f"can't listen on {path}: another server listens there", UnixAddress(path))
    assert works(path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_socket_is_refused_and_kept(path: str, kind: str) -> None:
    if kind == "file":
        Path(path).write_text("precious")
    else:
        Path(path).mkdir()
    refuses(f"can't listen on {path}: it exists and is no socket", UnixAddress(path))
    assert os.path.exists(path)


def test_a_socket_in_a_folder_that_does_not_exist(path: str) -> None:
    refuses(f"can't listen on {path}/below: no such file or directory", UnixAddress(f"{path}/below"))


def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 200))
    refuses(f"can't listen on {long}", UnixAddress(long))


def test_the_socket_of_another_server_is_not_removed(start: Start, path: str) -> None:
    """Somebody has moved ours away, and another server has taken its place."""
    first = start(UnixAddress(path))
    os.rename(path, f"{path}.moved")
    second = start(UnixAddress(path))
    first.stop()
    assert works(path)
    second.stop()
    assert not os.path.exists(path)


# The end --------------------------------------------------------------------------------------------------


class Closing(StorageEngine):
    """Tells how often it was closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1
        super().close()


def test_a_stop_with_clients_at_work(start: Start, tmp_path: Path) -> None:
    """One has a prepared transaction, one waits, one has never registered, one does not read: all are told by
    the end of their connection, and the data file has what was committed."""
    data = tmp_path / "Data.fs"
    running = start(storages={"1": open_filestorage(data)})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.address)) for _ in range(4)]
        holder, waiter, stranger, reader = clients
        for client in (holder, waiter, reader):
            client.register()
        committed = reader.commit(A, b"committed")
        holder.prepare(p64(2), b"prepared")
        waiter.one_way("tpc_begin", 1, b"", b"", {}, None, " ")
        waiter.start("vote", 1)
        reader.call("ping")
        running.stop()
        assert running.problem is None
        for client in (holder, waiter, stranger):
            client.read_to_end()
    engine = open_filestorage(data)
    assert engine.last_tid() == committed
    assert engine.load_before(A, MAX_TID) == (b"committed", committed, None)
    with pytest.raises(POSKeyError):
        engine.load_before(p64(2), MAX_TID)
    engine.close()


def test_a_client_that_reads_nothing_does_not_keep_a_server_from_stopping(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STOP_TIMEOUT_S", 0.2)
    running = start()
    with RawClient(running.address) as client:
        client.register().commit(A, b"x" * 1_000_000)
        for _ in range(50):
            client.start("loadBefore", A, MAX_TID)
        running.stop()
        assert running.problem is None


def test_storages_are_closed_once(start: Start) -> None:
    engines = {name: Closing(open_memory()._storage) for name in ("1", "2")}
    running = start(storages=dict(engines))
    running.stop()
    assert [engine.closed for engine in engines.values()] == [1, 1]


def test_storages_are_closed_when_the_server_cannot_listen(start: Start) -> None:
    address = start().server.addresses[0]
    engine = Closing(open_memory()._storage)
    with pytest.raises(ConfigurationError):
        Running(StorageServer({"1": engine}), address)
    assert engine.closed == 1


def test_no_thread_stays_behind(start: Start) -> None:
    before = set(threading.enumerate())
    running = start(storages={name: open_memory() for name in "123"})
    with RawClient(running.address) as client:
        client.register("2").call("undoLog")
    running.stop()
    assert set(threading.enumerate()) <= before


def test_a_storage_that_fails_stops_the_server(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Closing):
        def commit(self, batch: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

    engine = Failing(open_memory()._storage)
    running = start(storages={"1": engine})
    with RawClient(running.address) as client, RawClient(running.address) as other:
        other.register()
        client.register().prepare(A)
        finish = client.start("tpc_finish", 1)
        with pytest.raises(EOFError):
            client.answer(finish)
        other.read_to_end()
        running.join()
    assert isinstance(running.problem, StorageFailure)
    assert engine.closed == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert "failed to commit" in line
    assert "Input/output error" in line
    assert "the server stops" in line.lower()


def test_deadlines_of_a_storage_are_seen_to_while_another_one_fails(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    running = start(storages={"bad": open_memory(), "good": open_memory()}, transaction_timeout_s=0.3)

    def fail() -> None:
        raise ZeroDivisionError("in the other storage")

    def spoil() -> None:
        running.server.storages["bad"].tick = fail  # type: ignore[method-assign]

    running.on_loop(spoil)
    with RawClient(running.address) as slow:
        slow.register("good").prepare(A)
        slow.read_to_end()
    assert any("Transaction timeout after 0.3 seconds" in line for line in caplog.messages)
    assert any(record.exc_info for record in caplog.records)


# Threads --------------------------------------------------------------------------------------------------


class Slow(StorageEngine):
    """An engine some of whose work takes until the test lets it go on."""

    def __init__(self, storage: Any) -> None:
        super().__init__(storage)
        self.may_go_on = threading.Event()
        self.at_work = threading.Event()

    def undo_log(self, first: int, last: int) -> Any:
        self._wait()
        return []

    def pack(self, time: float, progress: Any = None) -> None:
        self._wait()

    def _wait(self) -> None:
        self.at_work.set()
        assert self.may_go_on.wait(WAIT_S)


@pytest.fixture
def slow() -> Iterator[Slow]:
    engine = Slow(open_memory()._storage)
    yield engine
    engine.may_go_on.set()


def test_slow_requests_hold_up_nobody(start: Start, slow: Slow) -> None:
    running = start(storages={"1": slow})
    with RawClient(running.address) as client, RawClient(running.address) as other:
        client.register()
        waiting = [client.start("undoLog") for _ in range(limits.SLOW_REQUEST_THREADS * 2)]
        assert slow.at_work.wait(WAIT_S)
        assert client.call("ping") is None
        assert other.register().commit(A)
        assert not any(call.answered for call in waiting)
        slow.may_go_on.set()
        for call in waiting:
            assert client.answer(call) == ()


def test_commits_go_on_during_a_pack(start: Start, slow: Slow) -> None:
    running = start(storages={"1": slow})
    with RawClient(running.address) as client, RawClient(running.address) as other:
        packing = client.register().start("pack", 1_700_000_000.0, True)
        assert slow.at_work.wait(WAIT_S)
        assert other.register().commit(A)
        assert not packing.answered
        slow.may_go_on.set()
        assert client.answer(packing) is None


def test_a_stop_waits_for_a_pack(start: Start, slow: Slow, caplog: pytest.LogCaptureFixture) -> None:
    """That of this storage can't be interrupted; but nobody waits for its answer any more."""
    running = start(storages={"1": slow})
    with RawClient(running.address) as client:
        client.register().start("pack", 1_700_000_000.0, True)
        assert slow.at_work.wait(WAIT_S)
        stopping = threading.Thread(target=running.stop, daemon=True)
        stopping.start()
        client.read_to_end()
        wait_until(
            lambda: "waiting for the pack of storage '1' to end: a pack of this storage can't" in caplog.text,
            "the server says what it waits for",
        )
        slow.may_go_on.set()
        stopping.join(WAIT_S)
    assert running.problem is None


class Patient(StorageEngine):
    """An engine that packs until it is told not to."""

    can_cancel_pack = True

    def __init__(self, storage: Any) -> None:
        super().__init__(storage)
        self.at_work = threading.Event()

    def pack(self, time: float, progress: Any = None) -> None:
        pause = threading.Event()
        while True:
            progress.report(PackStep("copying", 50.0))
            self.at_work.set()
            pause.wait(0.01)


def test_a_stop_cancels_a_pack(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    patient = Patient(open_memory()._storage)
    running = start(storages={"1": patient})
    with RawClient(running.address) as client:
        client.register().start("pack", 1_700_000_000.0, True)
        assert patient.at_work.wait(WAIT_S)
        running.stop()
        client.read_to_end()
    assert running.problem is None
    lines = [line for line in caplog.messages if "pack of storage" in line]
    assert lines == [
        "the server, which stops, cancels the pack of storage '1'",
        "the pack of storage '1' was cancelled",
    ]


class SlowDisk(ParallelEngine):
    """An engine whose commits take until the test lets them go on."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.at_work = threading.Event()

    def commit(self, batch: Any) -> None:
        self.at_work.set()
        assert self.may_go_on.wait(WAIT_S)
        super().commit(batch)


@pytest.fixture
def slow_disk() -> Iterator[SlowDisk]:
    engine = SlowDisk()
    yield engine
    engine.may_go_on.set()


def test_a_slow_disk_holds_up_nobody_but_those_who_commit(start: Start, slow_disk: SlowDisk) -> None:
    """Those who come meanwhile are committed together."""
    running = start(storages={"1": slow_disk})
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(RawClient(running.address)).register() for _ in range(5)]
        first.prepare(A)
        finish = first.start("tpc_finish", 1)
        assert slow_disk.at_work.wait(WAIT_S)
        finishes = []
        for number, client in enumerate(others, 2):
            assert client.prepare(p64(number)) == ()
            finishes.append(client.start("tpc_finish", 1))
            assert client.call("lastTransaction") == NO_TID
        assert not finish.answered
        slow_disk.may_go_on.set()
        tids = [client.answer(finish) for client, finish in zip(others, finishes, strict=True)]
        assert slow_disk.batches == [[first.answer(finish)], tids]
        assert tids == sorted(tids)


def test_a_stop_waits_for_the_disk(start: Start, slow_disk: SlowDisk) -> None:
    """What is on its way there is committed, though nobody hears the answer; then the storage is closed."""
    running = start(storages={"1": slow_disk})
    with RawClient(running.address) as client, RawClient(running.address) as other:
        client.register().prepare(A)
        other.register()
        client.start("tpc_finish", 1)
        assert slow_disk.at_work.wait(WAIT_S)
        stopping = threading.Thread(target=running.stop, daemon=True)
        stopping.start()
        client.read_to_end()
        other.read_to_end()
        assert stopping.is_alive()
        slow_disk.may_go_on.set()
        stopping.join(WAIT_S)
    assert running.problem is None
    assert len(slow_disk.batches) == 1


def test_a_disk_that_fails_while_the_server_stops(start: Start, slow_disk: SlowDisk) -> None:
    """Whoever started the server is told all the same."""
    running = start(storages={"1": slow_disk})
    with RawClient(running.address) as client, RawClient(running.address) as other:
        other.register()
        client.register().prepare(A)
        client.start("tpc_finish", 1)
        assert slow_disk.at_work.wait(WAIT_S)
        slow_disk.failing = "commit"
        stopping = threading.Thread(target=running.stop, daemon=True)
        stopping.start()
        client.read_to_end()
        wait_until(lambda: not running.server.connections, "the connections are closed")
        assert running.goes_on_for(0.1)  # past the connections, as it waits for the disk
        slow_disk.may_go_on.set()
        stopping.join(WAIT_S)
    assert isinstance(running.problem, StorageFailure)
