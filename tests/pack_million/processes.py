"""Who works beside each other in a run: a command on a pseudo-terminal, and a client that commits.

Must not know what is made of what they saw.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import termios
import threading
import time
from typing import Any

from bench.database import commit, now
from bench.works.pack import record
from ZODB.utils import p64

import zeoid
from tests.pack_million.bar import ERASE, Seen, read
from tests.pack_million.database import COUNTER
from tests.peers import die_with_parent, environment

#: Between two commits: they are to notice the pack, not to be the load.
REST_S = 0.002
END_S = 60.0
WIDTH = 120


def on_terminal(command: list[str]) -> tuple[int, Seen]:
    """Run a command on a pseudo-terminal: its exit status, and what it wrote there."""
    mine, its = os.openpty()
    with os.fdopen(mine, "rb", buffering=0) as terminal:
        try:
            fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
            variables = {name: value for name, value in environment().items() if name != "COLUMNS"}
            process = subprocess.Popen(
                [*die_with_parent(), *command], stdin=its, stdout=its, stderr=its, env=variables
            )
        finally:
            os.close(its)
        try:
            written, times_s = b"", []
            # Linux tells with EIO that nobody has the terminal open any more.
            with contextlib.suppress(OSError):
                while chunk := terminal.read(65536):
                    written += chunk
                    times_s += [time.monotonic()] * (written.count(ERASE) - len(times_s))
            return process.wait(END_S), read(written, times_s)
        finally:
            process.kill()
            process.wait()


class Committing:
    """A thread that commits one small object again and again, in a `with` block."""

    def __init__(self, address: Any, enough: int) -> None:
        self._storage = zeoid.ClientStorage(address, wait=True)
        self._enough = enough
        self._ended = threading.Event()
        self._has_enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commits")
        self.problem: BaseException | None = None
        #: When each began, and how long it took.
        self.commits: list[tuple[float, float]] = []
        self.last = b""

    def __enter__(self) -> Committing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._storage.close()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def wait_until_enough(self) -> None:
        assert self._has_enough.wait(END_S), "commits take too long"

    def between(self, began_s: float, ended_s: float) -> list[float]:
        """Milliseconds of the commits that began in that time."""
        return [1000 * took_s for at_s, took_s in self.commits if began_s <= at_s < ended_s]

    def _run(self) -> None:
        try:
            oid = p64(COUNTER)
            _, tid, _ = self._storage.loadBefore(oid, now(self._storage))
            while not self._ended.wait(REST_S):
                data = record(b"%d" % (len(self.commits) + 1))
                began_s = time.monotonic()
                tid = commit(self._storage, oid, tid, data)
                self.commits.append((began_s, time.monotonic() - began_s))
                self.last = data
                if len(self.commits) == self._enough:
                    self._has_enough.set()
        except BaseException as problem:
            self.problem = problem
        finally:
            self._has_enough.set()
