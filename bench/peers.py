"""The peers: how to start each one's server, and how to open a client of it.

Owns every difference between the peers. Must not know what is measured.
"""

import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from bench.processes import PROJECT, PeerError, ServerProcess, listening_port

HOST = "127.0.0.1"
CONNECT_TIMEOUT_S = 30.0
REPLY_TIMEOUT_S = 120.0


class Peer:
    """One way to get at the Data.fs in a folder. The defaults fit a peer with no server."""

    name: str
    title: str
    server: ServerProcess | None = None
    counts_loads = False
    #: Where the server keeps blobs, if it is to: set before it is started.
    blob_dir: Path | None = None

    @classmethod
    def missing(cls) -> str | None:
        """Why this peer cannot take part, or None."""
        return None

    def start(self, folder: Path) -> str:
        """Start the server; the address that `client` takes."""
        raise NotImplementedError

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        """A new client, connected, that has ZODB's storage interface; with this directory for its blobs."""
        raise NotImplementedError

    def prefetch(self, storage: Any, oids: list[bytes], before: bytes) -> None:
        """Return when all is in the client's cache."""
        raise NotImplementedError

    def client_with_cache(self, address: str, caches: Path, size_bytes: int) -> Any:
        """A new client whose cache is in this directory, and stays there."""
        raise NotImplementedError

    def put_into_cache(self, storage: Any, oid: bytes, tid: bytes, data: bytes) -> None:
        """Have a current revision in the client's cache, whatever the server has."""
        raise NotImplementedError

    def cached(self, storage: Any) -> int:
        """How many current revisions are in the client's cache."""
        raise NotImplementedError

    def waiting(self, storage: Any) -> bool:
        """Whether the client has something in its memory that is to go to the cache."""
        return False

    def stop(self) -> None:
        """Stop the server, if there is one. The process is gone afterwards."""
        if self.server is not None:
            self.server.stop()

    def loads(self, storage: Any) -> int | None:
        """How many objects the server says it has given out so far; None where nobody counts."""
        return storage.server_status()["loads"] if self.counts_loads else None

    @property
    def pid(self) -> int | None:
        return self.server.pid if self.server else None


class Zeoid(Peer):
    """Zeoid's server, `python -m zeoid serve`, and its ClientStorage, with all settings at their defaults."""

    name = "zeoid"
    title = "Zeoid"
    counts_loads = True

    @classmethod
    def missing(cls) -> str | None:
        try:
            found = importlib.util.find_spec("zeoid.__main__") is not None
        except ModuleNotFoundError:
            found = False
        return None if found else "the package zeoid is not installed, or has no command"

    def start(self, folder: Path) -> str:
        command = [sys.executable, "-m", "zeoid", "serve", "-h", HOST, "-p", "0"]
        options = self._options()
        if "--msgpack" in options:
            command.append("--msgpack")
        if self.blob_dir is not None:
            if "--blob-dir" not in options:
                raise PeerError("this version of `zeoid serve` keeps no blobs")
            command += ["--blob-dir", str(self.blob_dir)]
        self.server = ServerProcess([*command, str(folder / "Data.fs")], folder / "zeoid.log")
        port = self.server.wait_for(rf"listening on {HOST}:(\d+)")[1]
        return f"{HOST}:{port}"

    @staticmethod
    def _options() -> str:
        command = [sys.executable, "-m", "zeoid", "serve", "--help"]
        done = subprocess.run(
            command, cwd=PROJECT, check=False, capture_output=True, text=True, timeout=CONNECT_TIMEOUT_S
        )
        if done.returncode != 0:
            raise PeerError(f"{' '.join(command)} ended with status {done.returncode}\n{done.stderr[-2000:]}")
        return done.stdout

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        from zeoid import ClientStorage

        host, _, port = address.rpartition(":")
        return ClientStorage((host, int(port)), wait_timeout=CONNECT_TIMEOUT_S, blob_dir=blob_cache)

    def prefetch(self, storage: Any, oids: list[bytes], before: bytes) -> None:
        storage.prefetch(oids, before)


class SharedZeoid(Zeoid):
    """The same with a `cache_dir`, new for each client."""

    name = "zeoid_shared"
    title = "Zeoid, cache_dir"

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        from zeoid import ClientStorage

        host, _, port = address.rpartition(":")
        folder = tempfile.mkdtemp(prefix="bench-cache-")
        storage = ClientStorage((host, int(port)), wait_timeout=CONNECT_TIMEOUT_S, cache_dir=folder)
        weakref.finalize(storage, shutil.rmtree, folder, ignore_errors=True)
        return storage

    def client_with_cache(self, address: str, caches: Path, size_bytes: int) -> Any:
        from zeoid import ClientStorage

        return ClientStorage(
            address, wait_timeout=CONNECT_TIMEOUT_S, cache_dir=caches, cache_size_bytes=size_bytes
        )

    def put_into_cache(self, storage: Any, oid: bytes, tid: bytes, data: bytes) -> None:
        storage._view.cache.store(oid, tid, None, data)

    def cached(self, storage: Any) -> int:
        return int(storage._view.cache._here[0].records.count()[0])

    def waiting(self, storage: Any) -> bool:
        return bool(storage.cache_statistics()["waiting"])


class ZEO(Peer):
    """ZEO as it comes: runzeo and its ClientStorage, both with uvloop where installed, and with msgpack."""

    name = "zeo"
    title = "ZEO"
    counts_loads = True

    def start(self, folder: Path) -> str:
        configuration = folder / "zeo.conf"
        blobs = "" if self.blob_dir is None else f"  blob-dir {self.blob_dir}\n"
        configuration.write_text(
            f"<zeo>\n  address {HOST}:0\n  msgpack true\n</zeo>\n"
            f"<filestorage 1>\n  path {folder / 'Data.fs'}\n{blobs}</filestorage>\n"
        )
        command = [sys.executable, "-m", "ZEO.runzeo", "-C", str(configuration)]
        self.server = ServerProcess(command, folder / "zeo.log")
        self.server.wait_for("listening on")  # the line holds the port that was asked for: 0
        return f"{HOST}:{listening_port(self.server.pid)}"

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        from ZEO.ClientStorage import ClientStorage  # type: ignore[import-untyped]

        host, _, port = address.rpartition(":")
        storage = ClientStorage(
            (host, int(port)),
            wait_timeout=CONNECT_TIMEOUT_S,
            blob_dir=None if blob_cache is None else str(blob_cache),
        )
        if storage.protocol_version[:1] != b"M":
            storage.close()
            raise PeerError("ZEO did not agree on msgpack")
        return storage

    def client_with_cache(self, address: str, caches: Path, size_bytes: int) -> Any:
        from ZEO.ClientStorage import ClientStorage

        host, _, port = address.rpartition(":")
        return ClientStorage(
            (host, int(port)), wait_timeout=CONNECT_TIMEOUT_S, client="bench", var=str(caches),
            cache_size=size_bytes,
        )  # fmt: skip

    def put_into_cache(self, storage: Any, oid: bytes, tid: bytes, data: bytes) -> None:
        storage._cache.store(oid, tid, None, data)

    def cached(self, storage: Any) -> int:
        return len(storage._cache)

    def prefetch(self, storage: Any, oids: list[bytes], before: bytes) -> None:
        # ClientStorage.prefetch starts this and returns at once; only the future knows when it is done.
        storage._server.prefetch(oids, before).result(REPLY_TIMEOUT_S)


class InProcess(Peer):
    """FileStorage, opened by the client's own process: what it costs when nothing is shared."""

    name = "filestorage"
    title = "FileStorage"

    def start(self, folder: Path) -> str:
        return str(folder / "Data.fs")

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        from ZODB.FileStorage import FileStorage

        return FileStorage(address)


class Bare(Peer):
    """A request and a reply of a load's sizes between two blocking sockets, and nothing else."""

    name = "bare"
    title = "bare socket"

    def start(self, folder: Path) -> str:
        program = str(PROJECT / "bench" / "bare_server.py")
        sizes = [str(PingPong.REQUEST_SIZE), str(PingPong.REPLY_SIZE)]
        self.server = ServerProcess([sys.executable, program, *sizes], folder / "bare.log")
        port = self.server.wait_for(rf"listening on {HOST}:(\d+)")[1]
        return f"{HOST}:{port}"

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        host, _, port = address.rpartition(":")
        return PingPong((host, int(port)))


def blocking_socket(address: tuple[str, int]) -> socket.socket:
    sock = socket.create_connection(address, CONNECT_TIMEOUT_S)
    sock.settimeout(None)  # a time-out would put a poll(2) before every recv
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class PingPong:
    """The bare socket's client. It has a storage's methods, so that all peers go through one loop."""

    # A load of a record of 500 bytes as ZEO's protocol has it, in msgpack, with the length before it.
    _KEY = (bytes(8), bytes(8))
    REQUEST_SIZE = 4 + len(msgpack.packb((_KEY, 0, "loadBefore", _KEY)))
    REPLY_SIZE = 4 + len(msgpack.packb((_KEY, 0, ".reply", (bytes(500), bytes(8), None))))

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = blocking_socket(address)
        self._request = bytes(self.REQUEST_SIZE)

    def lastTransaction(self) -> bytes:
        return bytes(8)

    def loadBefore(self, oid: bytes, tid: bytes) -> bytes:
        self._socket.sendall(self._request)
        reply = self._socket.recv(65536)
        if len(reply) != self.REPLY_SIZE:
            raise PeerError(f"a reply came in pieces: {len(reply)} of {self.REPLY_SIZE} bytes")
        return reply

    def close(self) -> None:
        self._socket.close()


class Lean(Peer):
    """The least Python that loads a record over the real messages: no checks, threads or invalidations."""

    name = "lean"
    title = "lean pair"

    def start(self, folder: Path) -> str:
        program = str(PROJECT / "bench" / "lean_server.py")
        self.server = ServerProcess([sys.executable, program, str(folder / "Data.fs")], folder / "lean.log")
        port = self.server.wait_for(rf"listening on {HOST}:(\d+)")[1]
        return f"{HOST}:{port}"

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        host, _, port = address.rpartition(":")
        return LeanClient((host, int(port)))


class LeanClient:
    """Sends a load, reads its reply, keeps what it was told in a dictionary."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = blocking_socket(address)
        self._pack = msgpack.Packer().pack
        self._cache: dict[bytes, Any] = {}
        self._last_id = 0

    def lastTransaction(self) -> bytes:
        return b"\x7f" + bytes(7)

    def loadBefore(self, oid: bytes, tid: bytes) -> Any:
        if oid in self._cache:
            return self._cache[oid]
        self._last_id += 1
        message = self._pack((self._last_id, 0, "loadBefore", (oid, tid)))
        self._socket.sendall(len(message).to_bytes(4, "big") + message)
        revision = msgpack.unpackb(self._socket.recv(65536)[4:], use_list=False)[3]
        self._cache[oid] = revision
        return revision

    def close(self) -> None:
        self._socket.close()


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Bare, Lean, InProcess, ZEO, Zeoid, SharedZeoid)}


@contextmanager
def serving(peer: Peer, folder: Path) -> Iterator[str]:
    """The peer's address, while its server runs. Its log would go with the folder: errors carry its tail."""
    try:
        yield peer.start(folder)
    except Exception as error:
        if peer.server is not None:
            error.add_note(f"The end of the server's log:\n{peer.server.log_tail()}")
        raise
    finally:
        peer.stop()


@contextmanager
def connected(peer: Peer, address: str, blob_cache: Path | None = None) -> Iterator[Any]:
    """A client of the peer, closed at the end."""
    client = peer.client(address, blob_cache)
    try:
        yield client
    finally:
        client.close()
