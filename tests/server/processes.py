"""Real servers: `python -m zeoid serve` as a process, with its log.

Every wait has a deadline, and no process outlives its test. Must not know what the tests expect.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage

from tests.peers import Log, die_with_parent, environment, wait_until
from tests.server.sockets import Address, RawClient
from zeoid.cli import main

START_S = 60.0
STOP_S = 30.0

TCP = re.compile(r"listening on (?P<host>[^ ]+):(?P<port>\d+)$")


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

    def forget_peak_memory(self) -> int:
        """The peak begins anew, at what it has now, which is returned."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self.peak_memory_bytes()

    def files(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

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


def on_loopback(*arguments: Any) -> list[Any]:
    return ["-h", "127.0.0.1", "-p", "0", *arguments]


def records(path: Path) -> dict[bytes, bytes]:
    """What is in a data file, read by ZODB alone, without an index."""
    Path(f"{path}.index").unlink(missing_ok=True)
    storage = FileStorage(str(path), read_only=True)
    found = {record.oid: record.data for transaction in storage.iterator() for record in transaction}
    storage.close()
    return found


def wait_for_pid(pid_file: Path, serving: Serving) -> None:
    """It is written after the line that says where the server listens."""
    pid = f"{serving.process.pid}\n"
    wait_until(lambda: pid_file.exists() and pid_file.read_text() == pid, "the pid file is written", 60)
