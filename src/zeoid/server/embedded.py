"""A storage server in a thread of this process. Owns that thread."""

import asyncio
import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from zeoid import limits
from zeoid.addresses import Address
from zeoid.engines.opening import engine_of, open_filestorage, open_memory
from zeoid.ports import Engine
from zeoid.server.server import StorageServer, serve_forever


class RunningServer:
    """Made running; `close` stops it and closes its storages."""

    def __init__(self, storages: Mapping[str, Any], address: Address, **options: Any) -> None:
        self._problem: BaseException | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server = _server(storages, options)
        self._thread = threading.Thread(
            target=self._run, args=(address,), name=f"zeoid server {address}", daemon=True
        )
        self._thread.start()
        self._ready.wait()
        if self._problem is not None:
            self._thread.join()
            raise self._problem
        self.address: Address = self._server.addresses[0]

    def _run(self, address: Address) -> None:
        try:
            serve_forever(self._server, [address], on_ready=self._started)
        except BaseException as problem:
            self._problem = problem
        finally:
            self._ready.set()

    def _started(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready.set()

    def close(self) -> None:
        """Stop it. What made a storage fail meanwhile, if anything did, is raised here."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._server.stop)
        self._thread.join(limits.STOP_TIMEOUT_S + limits.PACK_TIMEOUT_S)
        if self._problem is not None:
            raise self._problem

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _server(storages: Mapping[str, Any], options: dict[str, Any]) -> StorageServer:
    engines: dict[str, Engine] = {}
    try:
        for name, given in storages.items():
            engines[name] = _engine(given)
        return StorageServer(engines, **options)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise


def _engine(given: Any) -> Engine:
    if given is None:
        return open_memory()
    if isinstance(given, (str, os.PathLike)):
        return open_filestorage(given)
    return engine_of(given)
