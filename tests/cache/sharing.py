"""A process of its own that shares an object cache with the tests, and does what it is told, line by line.

Its lines are Python expressions, in which `cache` and `view` are its own, and everything in this module is
known. Owns how such a process is started, asked, stopped, killed and ended.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.peers import die_with_parent
from tests.peers import environment as variables
from zeoid import limits
from zeoid.cache import environment
from zeoid.cache.records import Records
from zeoid.cache.shared import SharedCache
from zeoid.client.view import View

KEY = "the storage of the tests"
SIZE_BYTES = 1024 * 1024
#: Long enough for a slow machine to start Python.
DEADLINE_S = 25.0
ROOT = Path(__file__).parents[2]


def oid(number: int) -> bytes:
    return number.to_bytes(8, "big")


tid = oid


class Other:
    """Such a process, seen from the test."""

    def __init__(self, cache_dir: Path, size_bytes: int = SIZE_BYTES) -> None:
        self._process = subprocess.Popen(
            [*die_with_parent(), sys.executable, "-m", __name__, str(cache_dir), str(size_bytes)],
            cwd=ROOT,
            env=variables(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.pid = self._process.pid

    def ask(self, expression: str) -> Any:
        """What comes of an expression. It may be an exception's text."""
        self.tell(expression)
        return self.hear()

    def tell(self, expression: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{expression}\n".encode())

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], DEADLINE_S)
            assert ready, "the other process does not answer"
            byte = os.read(self._process.stdout.fileno(), 1)
            assert byte, f"the other process ended after {line!r}"
            line += byte
        return eval(line)

    def stop(self) -> None:
        """Stop it, and wait until it is."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)

    def wait_for_death(self) -> int:
        return self._process.wait(DEADLINE_S)

    def __enter__(self) -> Other:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


# What it can be told ----------------------------------------------------------------------------------


def say(value: object) -> None:
    sys.stdout.write(f"{value!r}\n")
    sys.stdout.flush()


def stand_still(*_: Any) -> None:
    say("here")
    threading.Event().wait()


def flush(cache: SharedCache) -> None:
    while cache.flush():
        pass


def hold_write_lock(cache: SharedCache, how: str = "") -> None:
    """Say so, and keep it. *how*: with a transaction of LMDB's as well."""
    assert cache._here is not None
    here = cache._here[0]
    with here.writing(1.0) if how else here._write_lock(1.0):
        stand_still()


def hold_snapshot(cache: SharedCache) -> None:
    assert cache._here is not None
    with cache._here[0].records._reading():
        stand_still()


def hold_key_lock(cache_dir: str) -> None:
    (path,) = environment.environments(Path(cache_dir))
    with environment._key_lock(path):
        stand_still()


def stand_still_in(name: str, before: bool) -> None:
    """From now on, before or after a method of `Records`."""
    method = getattr(Records, name)

    def standing(*args: Any) -> None:
        if not before:
            method(*args)
        stand_still()

    setattr(Records, name, standing)


def die_beyond(size_bytes: int) -> None:
    """From now on, whatever is written at that place of a file ends the process at once."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(cache_dir: str, size_bytes: str) -> None:
    limits.SHARED_CACHE_FLUSH_S = 3600.0  # type: ignore[misc]
    cache = SharedCache(cache_dir, KEY, int(size_bytes))
    names = {**globals(), "cache": cache, "view": View(cache), "cache_dir": cache_dir}
    for line in sys.stdin:
        with contextlib.suppress(BrokenPipeError):
            try:
                say(eval(line, names))
            except Exception as problem:
                say(repr(problem))


if __name__ == "__main__":
    main(*sys.argv[1:])
