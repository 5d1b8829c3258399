"""Real servers and the barest of clients: `python -m zeoid serve` as a process, and a socket.

A `Serving` is one server process with its log; a `RawClient` sends exactly the bytes that a test wants sent.
Every wait has a deadline, and no process outlives its test. Must not know what the tests expect.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from ZODB.utils import p64

from tests.peers import Log, die_with_parent, environment, wait_until
from tests.server.inmemory import Call
from zeoid.cli import main
from zeoid.model import MAX_TID, NO_TID
from zeoid.wire import faults
from zeoid.wire.codec import FAULT
from zeoid.wire.connection import ClientConnection
from zeoid.wire.frames import frame

START_S = 60.0
STOP_S = 30.0
CALL_S = 30.0

TCP = re.compile(r"listening on (?P<host>[^ ]+):(?P<port>\d+)$")
Address = tuple[str, int] | str


def command(arguments: Sequence[Any]) -> list[str]:
    return [*die_with_parent(), sys.executable, "-m", "zeoid", *map(str, arguments)]


class Serving:
    """A server process that listens."""

    def __init__(
        self, arguments: Sequence[Any], folder: Path, variables: dict[str, str] | None = None
    ) -> None:
        self.log = Log()
        self.process = subprocess.Popen(
            command(["serve", *arguments]),
            cwd=folder,
            env={**environment(), **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
        self.log.follow(self.process)

    def wait_until_ready(self, listeners: int = 1) -> None:
        """Wait until it has said that it listens, so many times."""

        def listening() -> bool:
            return len(self.addresses) >= listeners or self.process.poll() is not None

        self.log.wait_for("listening on", START_S)
        wait_until(listening, "the server listens", START_S)
        assert self.process.poll() is None, f"the server ended at once:\n{self.log.text()}"

    @property
    def lines(self) -> list[str]:
        return self.log.text().splitlines()

    @property
    def addresses(self) -> list[Address]:
        """Where it listens, as it says itself."""
        found: list[Address] = []
        for line in self.lines:
            if tcp := TCP.search(line):
                found.append((tcp["host"].strip("[]"), int(tcp["port"])))
            elif unix := re.search(r"listening on (/.+)$", line):
                found.append(unix[1])
        return found

    @property
    def address(self) -> Address:
        return self.addresses[0]

    def lines_about(self, client: RawClient) -> list[str]:
        """What it wrote about one client, without the time."""
        return [
            line.split(" ", 2)[2]
            for line in self.lines
            if f"{client.name} " in line or f"{client.name}:" in line
        ]

    def peak_memory_bytes(self) -> int:
        """The most memory that it ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status. If it does not stop, it is killed, and the test fails."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        try:
            status = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"it does not stop; it wrote:\n{self.log.text()}") from None
        self.log.wait_for_end(STOP_S)
        return status

    def end(self) -> None:
        """Whatever state it is in, be rid of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_S)
        self.log.wait_for_end(STOP_S)


def serve_until(folder: Path, made: list[Serving]) -> Callable[..., Serving]:
    """A function that starts servers and adds them to *made*."""

    def serve(
        *arguments: Any, cwd: Path | None = None, listeners: int = 1, env: dict[str, str] | None = None
    ) -> Serving:
        serving = Serving(arguments, cwd or folder, env)
        made.append(serving)
        if listeners:
            serving.wait_until_ready(listeners)
        return serving

    return serve


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts servers with the given arguments. Those that still run at the end must stop cleanly."""
    made: list[Serving] = []
    try:
        yield serve_until(tmp_path, made)
        for serving in made:
            if serving.process.poll() is None:
                assert serving.stop() == 0, serving.log.text()
    finally:
        for serving in made:
            serving.end()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs the command with arguments that must be refused, and returns the one line that says why."""

    def refused(*arguments: Any) -> str:
        done = run(*arguments, cwd=tmp_path)
        return why(done.returncode, done.stderr)

    return refused


@pytest.fixture
def refused_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The same without a process of its own, which takes longer than all the rest."""

    def refused(*arguments: Any) -> str:
        monkeypatch.chdir(tmp_path)
        with root_logger_restored():
            status = main([str(argument) for argument in arguments])
        return why(status, capsys.readouterr().err)

    return refused


@contextlib.contextmanager
def root_logger_restored() -> Iterator[None]:
    """What is done to the root of all loggers is undone afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


def why(status: int, output: str) -> str:
    assert status == 2, output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if " INFO " not in line]
    assert len(lines) == 1, output
    assert lines[0].startswith("zeoid: ")
    return lines[0].removeprefix("zeoid: ")


def run(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        command(arguments),
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


# Clients --------------------------------------------------------------------------------------------------


def connect(address: Address) -> socket.socket:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(CALL_S)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection(address, CALL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class RawClient:
    """A connection on which anything can be sent."""

    def __init__(self, address: Address) -> None:
        self.socket = connect(address)
        self.connection = ClientConnection("M5")
        local = self.socket.getsockname()
        #: As the server's log calls it.
        self.name = "local client" if isinstance(address, str) else _host_and_port(local)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_frame(self, payload: bytes) -> None:
        self.send(frame(payload))

    def read_frame(self) -> bytes:
        length = int.from_bytes(self._read_exactly(4), "big")
        return self._read_exactly(length)

    def _read_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError(f"the connection ended after {len(data)} of {count} bytes")
            data += part
        return bytes(data)

    def read_to_end(self) -> bytes:
        """Everything until the server closes the connection."""
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while part := self.socket.recv(65536):
                data += part
        return bytes(data)

    def shake_hands(self) -> RawClient:
        offer = self.read_frame()
        self.connection.receive(frame(offer))
        self.send(self.connection.take_answer())
        return self

    def register(self, storage: str = "1", read_only: bool = False) -> RawClient:
        self.shake_hands().call("register", storage, read_only)
        return self

    def start(self, name: str, *args: Any) -> Call:
        """Call, without waiting for the answer."""
        call = Call(name, args)
        self.send(self.connection.call(call, name, args))
        return call

    def one_way(self, name: str, *args: Any) -> None:
        self.send(self.connection.one_way(name, args))

    def call(self, name: str, *args: Any) -> Any:
        return self.answer(self.start(name, *args))

    def answer(self, call: Call) -> Any:
        while not call.answered:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError("the server closed the connection")
            for slot, flag, _, value in self.connection.receive(data):
                if slot is not None:
                    slot.answered = True
                    slot.value = value
                    slot.problem = faults.rebuild(value) if flag == FAULT else None
        return call.result

    def prepare(self, oid: bytes, data: bytes = b"data", serial: bytes = NO_TID, id: Any = 1) -> Any:
        self.one_way("tpc_begin", id, b"", b"", {}, None, " ")
        self.one_way("storea", oid, serial, data, id)
        return self.call("vote", id)

    def commit(self, oid: bytes, data: bytes = b"data", serial: bytes = NO_TID) -> bytes:
        assert not self.prepare(oid, data, serial)
        tid: bytes = self.call("tpc_finish", 1)
        return tid


def _host_and_port(name: Any) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Bystander:
    """A client that loads and commits all the time, in a thread: nothing must go wrong for it.

    All its objects are its own. Used as a context manager, which ends with the first problem that it had.
    """

    numbers = itertools.count(1_000_000)

    def __init__(self, address: Address, storage: str = "1") -> None:
        self.rounds = 0
        self.problem: BaseException | None = None
        self._client = RawClient(address).register(storage)
        self._oid = p64(next(self.numbers))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bystander", daemon=True)

    def _work(self) -> None:
        serial = NO_TID
        try:
            while not self._ending.is_set():
                data = b"round %d" % self.rounds
                serial = self._client.commit(self._oid, data, serial)
                assert self._client.call("loadBefore", self._oid, MAX_TID) == (data, serial, None)
                self.rounds += 1
        except BaseException as problem:
            self.problem = problem

    def goes_on(self, rounds: int = 3) -> None:
        """See it do some more."""
        wanted = self.rounds + rounds
        wait_until(lambda: self.rounds >= wanted or self.problem, "another client is served", CALL_S)
        if self.problem is not None:
            raise self.problem

    def __enter__(self) -> Bystander:
        self._thread.start()
        self.goes_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(CALL_S)
        self._client.socket.close()
        assert not self._thread.is_alive()
        if error is None and self.problem is not None:
            raise self.problem
