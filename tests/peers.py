"""The storage servers and clients of a test: Zeoid's, and those of stock ZEO.

Owns how a server is started as a process of its own, stopped or killed, how its log is kept, and how a client
storage of either kind is opened. Everything that a `Peers` started ends with it. Must not know what the tests
do with servers and clients.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import ZEO.ClientStorage
import ZODB
from ZODB.FileStorage import FileStorage

import zeoid

Kind = Literal["zeoid", "stock"]
Coding = Literal["M5", "Z5"]
Layout = Literal["bushy", "lawn"]
"""How a server's blob directory is laid out."""
Address = tuple[str, int] | str
"""A host and a port, or the path of a socket."""

KINDS: tuple[Kind, ...] = ("zeoid", "stock")
CODINGS: tuple[Coding, ...] = ("M5", "Z5")

START_S = 30.0
STOP_S = 15.0
STOP_ATTEMPTS = 15
LOG_LINES = 5_000
CLIENT_WAIT_S = 15.0

MAPPING_SECTION = "<mappingstorage {name}>\n</mappingstorage>\n"
FILE_SECTION = "<filestorage {name}>\n{keys}</filestorage>\n"

STOCK_SERVER = Path(__file__).with_name("stock_server.py")
LISTENING = re.compile(r"listening on (?:127\.0\.0\.1:(\d+)|/)")

UNCLOSED_BUFFER = r"unclosed file <_io\.BufferedRandom"
"""The warning of stock clients about files that they leave to the garbage collector."""

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, deadline_s: float = 10.0) -> T:
    """Ask `condition` again and again until its answer is true, and return the answer."""
    pause = threading.Event()
    end = time.monotonic() + deadline_s
    while not (answer := condition()):
        if time.monotonic() >= end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        pause.wait(0.01)
    return answer


class Log:
    """What a process wrote last; a thread reads it, so that a full pipe never stops the process."""

    def __init__(self) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        self._changed = threading.Condition()
        self._reader: threading.Thread | None = None

    def follow(self, process: subprocess.Popen[str]) -> None:
        self._reader = threading.Thread(target=self._read, args=(process,), name="server log", daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.add(line)
        with self._changed:
            self._reader = None
            self._changed.notify_all()

    def add(self, line: str) -> None:
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._lines.clear()

    def find(self, pattern: str | re.Pattern[str]) -> re.Match[str] | None:
        with self._changed:
            return next((found for line in self._lines if (found := re.search(pattern, line))), None)

    def wait_for(self, pattern: str | re.Pattern[str], deadline_s: float) -> re.Match[str] | None:
        """The first match; None when the process closed its output, or said nothing of the kind in time."""
        with self._changed:
            self._changed.wait_for(lambda: self.find(pattern) or self._reader is None, deadline_s)
            return self.find(pattern)

    def wait_for_end(self, deadline_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._reader is None, deadline_s)

    def text(self) -> str:
        with self._changed:
            return "".join(self._lines)


class Server:
    """A storage server as a process that can be stopped, killed and started again.

    Its storages are data files in one folder: the storage 1 is `Data.fs`, one of another name is in a file
    of that name; unless a `section` of a configuration is given, in which `{name}` stands for the name and
    `{folder}` for the folder. Started again, it listens on the port that it had.
    """

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        *,
        storages: Sequence[str] = ("1",),
        coding: Coding = "M5",
        read_only: bool = False,
        transaction_timeout_s: int | None = None,
        configured: bool = False,
        in_memory: bool = False,
        on_socket: bool = False,
        section: str = "",
        blobs: Layout | None = None,
        client_conflict_resolution: bool = False,
        tls: str = "",
    ) -> None:
        self.kind = kind
        self.folder = folder
        self.storages = storages
        self.coding = coding
        self.read_only = read_only
        self.transaction_timeout_s = transaction_timeout_s
        self.configured = configured
        self.in_memory = in_memory
        self.on_socket = on_socket
        self.section = section
        self.blobs = blobs
        self.client_conflict_resolution = client_conflict_resolution
        #: A section of a stock server's configuration.
        self.tls = tls
        self.log = Log()
        self.ended_by_test = False
        self._port = 0
        self._process: subprocess.Popen[str] | None = None

    def __repr__(self) -> str:
        return f"<{self.kind} server in {self.folder.name}, {self.coding}, port {self._port}>"

    @property
    def data_file(self) -> Path:
        return self._file_of("1")

    def _file_of(self, storage: str) -> Path:
        return self.folder / ("Data.fs" if storage == "1" else f"{storage}.fs")

    def blob_dir(self, storage: str = "1", *, exists: bool = True) -> Path:
        """The directory of a storage's blobs, with the layout marker that makes it what was asked for."""
        assert self.blobs is not None
        directory = self.folder / f"blobs-{storage}"
        if exists and not directory.exists():
            if not self._file_of(storage).exists():
                # Together with a new data file FileStorage makes a new directory, whatever was there.
                FileStorage(str(self._file_of(storage))).close()
            directory.mkdir()
            (directory / ".layout").write_text(self.blobs)
        return directory

    @property
    def address(self) -> Address:
        if self.on_socket:
            return str(self.folder / "socket")
        assert self._port, "the server was never started"
        return "127.0.0.1", self._port

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        assert not self.running
        self.log.clear()
        self.ended_by_test = False
        self._process = subprocess.Popen(
            [*die_with_parent(), sys.executable, *self._command()],
            cwd=self.folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
        self.log.follow(self._process)
        listening = self.log.wait_for(LISTENING, START_S)
        if listening is None:
            self.kill()
            raise AssertionError(f"{self!r} did not start; it wrote:\n{self.log.text()}")
        self._port = int(listening[1] or 0)

    def _command(self) -> list[str]:
        if self.kind == "stock":
            return [str(STOCK_SERVER), "-C", self._configuration()]
        command = ["-m", "zeoid", "serve"]
        if self.configured or self.section or len(self.storages) > 1:
            return [*command, "-C", self._configuration()]
        if self.on_socket:
            command += ["-a", str(self.address)]
        else:
            command += ["-h", "127.0.0.1", "-p", str(self._port)]
        if self.coding == "M5":
            command.append("--msgpack")
        if self.read_only:
            command.append("--read-only")
        if self.blobs is not None:
            command += ["--blob-dir", str(self.blob_dir())]
        if self.transaction_timeout_s is not None:
            command += ["--transaction-timeout", str(self.transaction_timeout_s)]
        return [*command, "--memory" if self.in_memory else str(self.data_file)]

    def _configuration(self) -> str:
        """The path of a configuration for `runzeo` that says what the options of the command line would."""
        timeout = f"transaction-timeout {self.transaction_timeout_s}" if self.transaction_timeout_s else ""
        address = self.address if self.on_socket else f"127.0.0.1:{self._port}"
        resolving = "client-conflict-resolution true" if self.client_conflict_resolution else ""
        server = f"""
            <zeo>
              address {address}
              read-only {self.read_only}
              msgpack {self.coding == "M5"}
              {timeout}
              {resolving}
              {self.tls}
            </zeo>
        """
        section = self.section or (MAPPING_SECTION if self.in_memory else FILE_SECTION)
        storages = (
            section.format(name=storage, folder=self.folder, keys=self._keys_of(storage))
            for storage in self.storages
        )
        path = self.folder / "server.conf"
        path.write_text("".join([server, *storages]))
        return str(path)

    def _keys_of(self, storage: str) -> str:
        blobs = "" if self.blobs is None else f"blob-dir {self.blob_dir(storage)}\n"
        return f"path {self._file_of(storage)}\n{blobs}"

    def stop(self) -> int:
        """Ask the server to end, the way an init system does; its exit status.

        ZEO's server takes the SystemExit of its signal handler for the failure of whatever connection it is
        serving when the signal comes, and stays; so it is asked again. If that meets it on its way out, with
        its handlers put away, it dies of the signal, which is no news.
        """
        attempts = STOP_ATTEMPTS if self.kind == "stock" else 1
        for _ in range(attempts):
            status = self._end(signal.SIGTERM, STOP_S / attempts)
            if status is not None:
                return 0 if self.kind == "stock" and status == -signal.SIGTERM else status
        self.log.add(f"(still there {STOP_S:g} s after SIGTERM, killed)\n")
        return self.kill()

    def kill(self) -> int:
        status = self._end(signal.SIGKILL, STOP_S)
        assert status is not None, "a process survived SIGKILL"
        return status

    def _end(self, number: signal.Signals, deadline_s: float) -> int | None:
        """Send the signal and wait for the end of the process and of its log: None when it doesn't come."""
        process = self._process
        assert process is not None, "the server was never started"
        self.ended_by_test = True
        process.send_signal(number)
        try:
            status = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return None
        self.log.wait_for_end(STOP_S)
        return status

    def restart(self) -> None:
        """Stop it, unless it is dead already, and start it again."""
        if self.running:
            self.stop()
        self.start()


def die_with_parent() -> list[str]:
    """What goes before a command so that no server outlives a test run that was itself killed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def environment() -> dict[str, str]:
    """Servers run the same Zeoid as this process does, wherever they are started."""
    source = Path(zeoid.__file__).resolve().parents[1]
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), *([inherited] if inherited else [])])}


def collect_unclosed_buffers() -> None:
    """Let the garbage collector have, here and not in another test, the files that stock clients don't close.

    They leave the file with a transaction's stores open when nobody aborts the transaction after a conflict.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNCLOSED_BUFFER, ResourceWarning)
        gc.collect()


class Peers:
    """Starts servers and opens clients for one test; in the end closes the clients and stops the servers."""

    def __init__(self, folder: Path) -> None:
        self.servers: list[Server] = []
        self._folder = folder
        self._has_stock_client = False
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if self._has_stock_client:
            collect_unclosed_buffers()

    def server(
        self,
        kind: Kind,
        *,
        coding: Coding = "M5",
        read_only: bool = False,
        transaction_timeout_s: int | None = None,
        folder: Path | None = None,
        storages: Sequence[str] = ("1",),
        configured: bool = False,
        in_memory: bool = False,
        on_socket: bool = False,
        section: str = "",
        blobs: Layout | None = None,
        client_conflict_resolution: bool = False,
        tls: str = "",
    ) -> Server:
        """A server that listens; with new, empty data files, unless it is given a folder that has some.

        A stock server always gets a configuration file; one of Zeoid's when it has several storages or is to
        be `configured` so.
        """
        server = Server(
            kind,
            folder or self.folder(),
            storages=storages,
            coding=coding,
            read_only=read_only,
            transaction_timeout_s=transaction_timeout_s,
            configured=configured,
            in_memory=in_memory,
            on_socket=on_socket,
            section=section,
            blobs=blobs,
            client_conflict_resolution=client_conflict_resolution,
            tls=tls,
        )
        self.servers.append(server)
        self._open.callback(self._end, server)
        server.start()
        return server

    def folder(self) -> Path:
        """A new, empty folder."""
        folder = self._folder / f"{sum(1 for _ in self._folder.iterdir())}"
        folder.mkdir()
        return folder

    @staticmethod
    def _end(server: Server) -> None:
        """See a server out at the end of a test, which fails if it died by itself or doesn't stop cleanly."""
        if server.ended_by_test:
            return
        status = server.stop()
        if status:
            raise AssertionError(f"{server!r} ended with status {status}; it wrote:\n{server.log.text()}")

    def client(
        self,
        kind: Kind,
        address: Address | Sequence[Address],
        *,
        storage: str = "1",
        coding: Coding = "M5",
        wait_timeout_s: float = CLIENT_WAIT_S,
        read_only: bool = False,
        read_only_fallback: bool = False,
        label: str = "",
        wait: bool = True,
        blob_dir: Path | str | None = None,
        **blob_options: Any,
    ) -> Any:
        """A client storage. A stock one has no say in the coding: it takes what the server offers."""
        if kind == "zeoid":
            client = zeoid.ClientStorage(
                address,
                storage,
                wait=wait,
                wait_timeout=wait_timeout_s,
                read_only=read_only,
                read_only_fallback=read_only_fallback,
                coding=coding,
                client_label=label,
                blob_dir=blob_dir,
                **blob_options,
            )
        else:
            self._has_stock_client = True
            client = ZEO.ClientStorage.ClientStorage(
                address,
                storage,
                wait=wait,
                wait_timeout=wait_timeout_s,
                read_only=read_only,
                read_only_fallback=read_only_fallback,
                client_label=label,
                blob_dir=blob_dir,
                **blob_options,
            )
        self._open.callback(client.close)
        return client

    def database(self, kind: Kind, address: Address | Sequence[Address], **options: Any) -> ZODB.DB:
        """A `ZODB.DB` on a client storage; the options are those of `client`."""
        return ZODB.DB(self.client(kind, address, **options))
