"""Commits that are interrupted half-way, on real connections: nothing stale stays, nothing hangs."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ReadOnlyError, StorageError
from ZODB.utils import z64

import zeoid
from zeoid import limits
from zeoid.errors import ClientError
from zeoid.model import tid_after

DEADLINE_S = 10.0


class Alarm(BaseException):
    """What no code expects."""


class Gated(MappingStorage):
    """A storage whose steps wait for the test where it says so, and whose pack needs the commit lock."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, tuple[threading.Event, threading.Event]] = {}

    def gate(self, step: str) -> tuple[threading.Event, threading.Event]:
        """(set when the step has begun, to be set to let it go on)"""
        return self.gates.setdefault(step, (threading.Event(), threading.Event()))

    def _pass(self, step: str) -> None:
        if step in self.gates:
            begun, go_on = self.gates[step]
            begun.set()
            assert go_on.wait(DEADLINE_S)

    def tpc_vote(self, transaction: Any) -> Any:
        self._pass("vote")
        return super().tpc_vote(transaction)

    def tpc_finish(self, transaction: Any, func: Any = lambda tid: None) -> Any:
        self._pass("finish")
        return super().tpc_finish(transaction, func)

    def pack(self, t: float, referencesf: Any, gc: bool = True) -> None:
        self._pass("pack")
        with self._commit_lock:
            return None


def until(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(int(DEADLINE_S * 100)):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not come true")


def commit(storage: Any, oid: bytes, serial: bytes, data: bytes) -> bytes:
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    try:
        storage.store(oid, serial, data, "", transaction)
        storage.tpc_vote(transaction)
        return bytes(storage.tpc_finish(transaction))
    except BaseException:
        storage.tpc_abort(transaction)
        raise


@contextmanager
def in_thread(function: Callable[[], Any]) -> Iterator[list[BaseException]]:
    problems: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    yield problems
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_a_finish_that_is_interrupted_leaves_nothing_stale() -> None:
    """A thread that waits in tpc_finish, while another one reads the socket, is interrupted.

    The transaction is committed all the same, but its thread is gone, and the server does not tell a client
    of its own commits. What it wrote must not stay in the cache as it was before.
    """
    storage = Gated()

    def on_signal(number: int, frame: Any) -> None:
        raise Alarm

    with zeoid.serve(storage) as server:
        client = zeoid.ClientStorage(server.address, wait_timeout=DEADLINE_S)
        other = zeoid.ClientStorage(server.address, wait_timeout=DEADLINE_S)
        x, y = client.new_oid(), client.new_oid()
        old = commit(client, x, z64, b"old")
        assert client.loadBefore(x, tid_after(old)) == (b"old", old, None)
        packing, end_pack = storage.gate("pack")
        with in_thread(lambda: client.pack(wait=True)):
            assert packing.wait(DEADLINE_S)
            finishing, go_on = storage.gate("finish")
            main = threading.get_ident()

            def interrupt() -> None:
                assert finishing.wait(DEADLINE_S)
                signal.pthread_kill(main, signal.SIGUSR1)

            before = signal.signal(signal.SIGUSR1, on_signal)
            try:
                with in_thread(interrupt), pytest.raises(Alarm):
                    commit(client, x, old, b"new")
            finally:
                signal.signal(signal.SIGUSR1, before)
            go_on.set()
            until(lambda: other.lastTransaction() > old)
            new = other.lastTransaction()
            last = commit(other, y, z64, b"y")
            until(lambda: bool(client.lastTransaction() >= last))
            assert client.loadBefore(x, tid_after(last)) == (b"new", new, None)
            end_pack.set()
        client.close()
        other.close()


def test_a_server_stops_though_a_transaction_was_being_prepared_during_a_pack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A pack waits for the commit lock of a transaction whose client is gone, and the stop for the pack."""
    storage = Gated()
    server = zeoid.serve(storage)
    client = zeoid.ClientStorage(server.address, wait_timeout=DEADLINE_S)
    oid = client.new_oid()
    packing, go_on_packing = storage.gate("pack")
    client.pack(wait=False)
    assert packing.wait(DEADLINE_S)
    voting, go_on_voting = storage.gate("vote")
    with in_thread(lambda: commit(client, oid, z64, b"data")):
        assert voting.wait(DEADLINE_S)
        with in_thread(server.close) as stopping:
            until(lambda: "waiting for the pack" in caplog.text)
            go_on_voting.set()
            go_on_packing.set()
        assert stopping == []
    client.close()


def test_packing_is_writing() -> None:
    with zeoid.serve(Gated()) as server:
        reader = zeoid.ClientStorage(server.address, read_only=True)
        with pytest.raises(ReadOnlyError):
            reader.pack()
        reader.close()


def test_two_packs_at_a_time() -> None:
    storage = Gated()
    packing, go_on = storage.gate("pack")
    with zeoid.serve(storage) as server:
        client = zeoid.ClientStorage(server.address)
        with in_thread(client.pack):
            assert packing.wait(DEADLINE_S)
            with pytest.raises(StorageError, match="under way"):
                client.pack()
            go_on.set()
        client.close()


def test_a_record_that_no_message_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before it is sent, for good, and the connection goes on."""
    monkeypatch.setattr(limits, "FRAME_BYTES", 100_000)
    with zeoid.serve(Gated()) as server:
        client = zeoid.ClientStorage(server.address)
        oid = client.new_oid()
        with pytest.raises(ClientError, match="limit is 100,000"):
            commit(client, oid, z64, b"x" * 100_000)
        commit(client, oid, z64, b"x" * 90_000)
        client.close()
