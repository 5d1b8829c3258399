"""A server that answers by itself, from a table, for tests in which the order does not matter.

Owns a thread. Must not know what the client is tested for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tests.client.scenes import T1, Task
from tests.peers import wait_until
from zeoid.testing import Call, ScriptedConnection, ScriptedServer

#: (number of the connection, from 1 on; the call) → the reply, or an exception to reply with
Answer = Callable[[int, Call], Any]


class AutoServer:
    """Welcomes every client and answers every call, one connection after the other."""

    def __init__(self, answer: Answer, last: bytes = T1) -> None:
        self._answer = answer
        #: The last transaction, which newcomers are told.
        self.last = last
        self._server = ScriptedServer(timeout_s=0.05)
        self._connection: ScriptedConnection | None = None
        self._closing = threading.Event()
        self.address = self._server.address
        self.connections = 0
        self._task = Task(self._serve)

    def __enter__(self) -> AutoServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._task.result()
        self._server.close()

    def drop(self) -> None:
        """Break the connection that there is, or will be in a moment; the client may come again."""
        connection = wait_until(lambda: self._connection, "a connection")
        assert connection is not None
        self._connection = None
        connection.end_stream()

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                connection = self._server.accept()
            except AssertionError:
                continue
            with connection, contextlib.suppress(OSError):
                connection.timeout_s = 10.0
                self._talk(connection)

    def _talk(self, connection: ScriptedConnection) -> None:
        try:
            connection.welcome(self.last, missed=(self.last, []))
        except AssertionError:
            return
        self.connections += 1
        self._connection = connection
        while not self._closing.is_set():
            try:
                call = connection.expect(timeout_s=0.05)
            except AssertionError as silence:
                if "in time" in str(silence):
                    continue
                return
            if not call.one_way:
                answer = self._answer(self.connections, call)
                if isinstance(answer, Exception):
                    connection.send(connection.fault(call, answer))
                else:
                    connection.answer(call, answer)
