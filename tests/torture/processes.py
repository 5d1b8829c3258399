"""The server and the clients of a run as processes that are killed and started again.

Owns their files in the folder of the run. Must not know what clients do, nor when anybody is killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import zeoid
from tests.peers import Log, die_with_parent, environment
from tests.torture.objects import STORAGES, blob_dir, data_file

START_S = 60.0
STOP_S = 60.0
ROOT = Path(__file__).resolve().parents[2]
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class Server:
    """`python -m zeoid serve` with a configuration file."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._log = Log()
        #: What it wrote in those of its lives in which it met an error that it did not expect.
        self.complaints: list[str] = []
        self._configuration = folder / "server.conf"
        sections = "".join(
            f"<filestorage {storage}>\n  path {data_file(folder, storage)}\n"
            f"  blob-dir {blob_dir(folder, storage)}\n</filestorage>\n"
            for storage in STORAGES
        )
        self._configuration.write_text(f"<zeo>\n  address {address}\n  msgpack true\n</zeo>\n{sections}")

    def launch(self) -> None:
        """Start it, without waiting until it listens."""
        self._log = Log()
        # Not the folder of the tests: the server must do without the clients' classes.
        source = Path(zeoid.__file__).resolve().parents[1]
        command = [sys.executable, "-m", "zeoid", "serve", "-C", str(self._configuration)]
        self._process = subprocess.Popen(
            [*die_with_parent(), *command],
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
        self._log.follow(self._process)

    def start(self) -> None:
        """Start it and wait until it listens."""
        self.launch()
        if self._log.wait_for("listening on", START_S) is None:
            raise AssertionError(f"the server did not start; it wrote:\n{self._log.text()}")

    def died(self) -> str | None:
        """What it wrote, if it ended by itself."""
        assert self._process is not None
        return None if self._process.poll() is None else self._log.text()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_S)
        self._read_log()

    def _read_log(self) -> None:
        self._log.wait_for_end(STOP_S)
        text = self._log.text()
        if "Traceback" in text:
            self.complaints.append(f"the server met an error:\n{text}")

    def stop(self) -> None:
        """Ask it to end, which it must do with status 0."""
        assert self._process is not None
        self._process.terminate()
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server does not stop; it wrote:\n{self._log.text()}") from None
        self._read_log()
        if status:
            raise AssertionError(f"the server ended with status {status}; it wrote:\n{self._log.text()}")

    def end(self) -> None:
        """Whatever state it is in, be rid of it."""
        if self._process is not None:
            self.kill()


class Client:
    """`tests.torture.client`. Started again, it is another incarnation, with a journal of its own."""

    def __init__(self, folder: Path, number: int, threads: int, seed: str, address: str) -> None:
        self.number = number
        self._folder = folder
        self._arguments = [str(threads), seed, address]
        self._incarnation = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._incarnation += 1
        numbers = [str(self.number), str(self._incarnation)]
        with self._errors_path().open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *die_with_parent(),
                    sys.executable,
                    "-m",
                    "tests.torture.client",
                    *numbers,
                    *self._arguments,
                    str(self.journal_path()),
                ],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def journal_path(self) -> Path:
        return self._folder / f"client-{self.number}-{self._incarnation}.journal"

    def _errors_path(self) -> Path:
        return self._folder / f"client-{self.number}-{self._incarnation}.errors"

    def written_bytes(self) -> int:
        """The length of its journal, to give to `commits_after`."""
        path = self.journal_path()
        return path.stat().st_size if path.exists() else 0

    def commits_after(self, written_bytes: int) -> bool:
        """Whether a commit was acknowledged since its journal was so long."""
        if self.written_bytes() <= written_bytes:
            return False
        with self.journal_path().open("rb") as file:
            file.seek(written_bytes)
            return b'"done"' in file.read()

    def died(self) -> str | None:
        """What it wrote, if it ended by itself."""
        assert self._process is not None
        status = self._process.poll()
        return None if status is None else f"status {status}\n{self._errors_path().read_text()}"

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._wait()

    def ask_to_end(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait_for_end(self) -> str | None:
        """What it wrote, if it did not end well."""
        try:
            status = self._wait()
        except subprocess.TimeoutExpired:
            self.kill()
            return f"client {self.number} did not end\n{self._errors_path().read_text()}"
        return f"client {self.number}: {self.died()}" if status else None

    def _wait(self) -> int:
        assert self._process is not None
        assert self._process.stdin is not None
        status = self._process.wait(STOP_S)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        return status

    def end(self) -> None:
        """Whatever state it is in, be rid of it."""
        if self._process is not None:
            self.kill()


def free_port(choices: random.Random) -> int:
    """A port that stays free while the server is down.

    It is none that the system gives to outgoing connections: the server could find it taken when it comes
    back, even by a client that connects to it in vain, and so to itself.
    """
    first_given = int(PORT_RANGE.read_text().split()[0]) if PORT_RANGE.exists() else 32_768
    while True:
        port = choices.randrange(min(20_000, first_given - 1_000), first_given)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
