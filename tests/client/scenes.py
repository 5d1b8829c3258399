"""What the tests of the client share: oids and tids, calls in threads, storages on scripted servers.

Everything that a `Scene` opened ends with it. Must not know how any module of `zeoid.client` works inside.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from tests.peers import wait_until
from zeoid import ClientStorage
from zeoid.model import tid_after
from zeoid.testing import ScriptedConnection, ScriptedServer

DEADLINE_S = 10.0
#: How long something is watched that must not happen. Shorter only makes a test less severe.
GRACE_S = 0.05


def oid(number: int) -> bytes:
    return number.to_bytes(8, "big")


def tid(number: int) -> bytes:
    return (0x03FB_B54D_0000_0000 + number).to_bytes(8, "big")


OID, OTHER = oid(42), oid(43)
T1, T2, T3, T4, T5, T6 = map(tid, range(10, 70, 10))


class Task:
    """A call in a thread of its own. What comes of it is waited for with a deadline."""

    def __init__(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        self._function = function
        self._args = args
        self._keywords = keywords
        self._value: Any = None
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"task {function!r}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function(*self._args, **self._keywords)
        except BaseException as problem:
            self._problem = problem

    @property
    def thread(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    def outcome(self, timeout_s: float = DEADLINE_S) -> Any:
        """The value, or the exception."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise AssertionError(f"{self._thread.name} did not return within {timeout_s:g} s")
        return self._value if self._problem is None else self._problem

    def result(self, timeout_s: float = DEADLINE_S) -> Any:
        self.outcome(timeout_s)
        if self._problem is not None:
            raise self._problem
        return self._value

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def is_held_up(self) -> bool:
        """Whether it has not returned, though it had some time for it."""
        self._thread.join(GRACE_S)
        return self._thread.is_alive()


class Listener:
    """What a database would be told, written down."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        self.heard.append((tid, sorted(oids)))

    def invalidateCache(self) -> None:
        self.heard.append("everything")

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    untransform_record_data = transform_record_data


class Held:
    """A call that stops in the middle until it is let go, and says when it has come there."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._let_go = threading.Event()

    def stop_here(self) -> None:
        self._entered.set()
        if not self._let_go.wait(DEADLINE_S):
            raise AssertionError("nobody let this call go")

    def wait_for_entry(self) -> None:
        assert self._entered.wait(DEADLINE_S), "the call did not come"

    def let_go(self) -> None:
        self._let_go.set()


class Scene:
    """Scripted servers and client storages of one test; they are closed in the end."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def server(self, **keywords: Any) -> ScriptedServer:
        return self._open.enter_context(ScriptedServer(**keywords))

    def storage(self, *servers: Any, **keywords: Any) -> ClientStorage:
        """A client of these servers (or addresses), which does not wait for them."""
        addresses = [getattr(server, "address", server) for server in servers]
        keywords = {"wait": False, "wait_timeout": DEADLINE_S, **keywords}
        storage = ClientStorage(addresses, **keywords)
        self._open.callback(storage.close)
        return storage

    def connected(
        self, last: bytes = T1, *, server: ScriptedServer | None = None, **keywords: Any
    ) -> tuple[ClientStorage, ScriptedConnection]:
        """A client, and the server's end of its connection, which is ready."""
        server = server or self.server()
        storage = self.storage(server, **keywords)
        return storage, welcomed(storage, server, last)


def welcomed(
    storage: ClientStorage, server: ScriptedServer, last: bytes, missed: Any = None
) -> ScriptedConnection:
    """The connection of *storage*, once it is ready, with a server whose last transaction is *last*.

    A client with a short deadline may lose its patience with this machine; then it comes again.
    """
    for _ in range(20):
        connection = server.accept()
        with contextlib.suppress(AssertionError, OSError):
            connection.welcome(last, missed=missed)
            wait_until(storage.is_connected, "a connection", deadline_s=2.0)
            return connection
    raise AssertionError("the client does not like its server")


def load(
    storage: ClientStorage, connection: ScriptedConnection, oid: bytes, before: bytes, reply: Any
) -> Any:
    """Let *storage* load from the server, which sends *reply*."""
    loading = Task(storage.loadBefore, oid, before)
    call = connection.expect("loadBefore")
    assert call.args == (oid, before)
    connection.answer(call, reply)
    return loading.result()


def at(last: bytes) -> bytes:
    """What a reader that sees *last* asks to be before."""
    return tid_after(last)


def is_cached(storage: ClientStorage, connection: ScriptedConnection, oid: bytes, before: bytes) -> bool:
    """Whether *storage* answers this by itself. If it asks, it is told that there is nothing."""
    def ask() -> None:
        storage.loadBefore(oid, before)
        storage.ping()

    asking = Task(ask)
    call = connection.expect("loadBefore", "ping")
    if call.name == "ping":
        connection.answer(call, None)
    else:
        connection.answer(call, None)
        connection.answer(connection.expect("ping"), None)
    asking.result()
    return call.name == "ping"
