"""A storage server with blobs, in a thread of this process, and the barest client of its blob connections.

Every wait has a deadline. Must not know what the tests expect.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.server.sockets import RawClient
from zeoid.addresses import TcpAddress
from zeoid.engines.opening import open_filestorage
from zeoid.server.server import StorageServer, serve_forever
from zeoid.wire import streams as wire
from zeoid.wire.messages import ATTACH, STORE

START_S = 30.0
INTERFACE = ("ZODB.interfaces", "IBlobStorage")
RECORD = b"cZODB.blob\nBlob\nq\x01.N."
BEGINNING = (b"", b"", {}, None, " ")


class BlobServer:
    """Serves the data file in *folder*, and its blobs; `stop` and `start` as often as one likes."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.options = options
        self.port = 0
        self.start()

    def start(self) -> BlobServer:
        engine = open_filestorage(self.folder / "Data.fs", blob_dir=self.folder / "blobs")
        if INTERFACE not in engine.interfaces:
            engine.interfaces = (*engine.interfaces, INTERFACE)
        self.engine: Any = engine
        self.server = StorageServer({"1": engine}, **self.options)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blob server", daemon=True)
        self._thread.start()
        assert self._ready.wait(START_S)
        self.port = self.server.addresses[0].port  # type: ignore[union-attr]
        return self

    def _run(self) -> None:
        try:
            serve_forever(
                self.server, [TcpAddress("127.0.0.1", self.port)], on_ready=self._started
            )
        finally:
            self._ready.set()

    def _started(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._ready.set()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(START_S)
        assert not self._thread.is_alive()

    def on_loop(self, what: Any) -> Any:
        """The result of calling *what* on the server's loop."""

        async def call() -> Any:
            return what()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(START_S)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def staged(self) -> list[str]:
        """The files of blobs that are no transaction's, or whose names are not settled yet."""
        return sorted(path.name for path in (self.folder / "blobs" / ".staged").iterdir())

    @property
    def streams(self) -> int:
        """How many blob connections it has."""
        return self.server.streams._count

    def __enter__(self) -> BlobServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class RawStream(RawClient):
    """A blob connection on which anything can be sent."""

    def open(self, token: bytes) -> RawStream:
        self.read_frame()
        self.send(wire.answer(token))
        assert wire.answer_to(self.read_frame(), wire.OK) == 0
        return self

    def get(self, oid: bytes, serial: bytes, offset: int = 0) -> bytes:
        self.send(wire.request(wire.Get(oid, serial, offset)))
        return self._read_exactly(wire.answer_to(self.read_frame(), wire.SIZE) - offset)

    def begin_put(self, id: bytes, name: bytes, size_bytes: int) -> None:
        put = wire.Put(id, name, size_bytes)
        self.send(wire.request(put))
        if not put.small:
            wire.answer_to(self.read_frame(), wire.GO)

    def put(self, id: bytes, name: bytes, content: bytes) -> None:
        self.begin_put(id, name, len(content))
        self.send(content)
        wire.answer_to(self.read_frame(), wire.DONE)


def opened(server: BlobServer, client: RawClient) -> RawStream:
    return RawStream(server.address).open(client.call("blob_token"))


def attach(client: RawClient, id: bytes, oid: bytes, name: bytes, serial: bytes = b"\0" * 8) -> bytes:
    """Commit an object with a blob that was put."""
    operations = [(STORE, oid, serial, RECORD, None), (ATTACH, oid, None, name, None)]
    assert not client.call("tpc_prepare", id, BEGINNING, operations)
    tid: bytes = client.call("tpc_finish", id)
    return tid
