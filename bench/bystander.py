"""Another client while something large goes on: `python -m bench.bystander PEER ADDRESS OBJECTS SECONDS`.

One storage, as in an application's process, and two threads: one loads objects, each once, so that none comes
from the cache; the other commits object 1 again and again. Between two calls each rests for so many SECONDS:
it is to notice what others do to it, not to be the load. Prints "ready" once it is at work, goes on until its
standard input ends, and prints when every call began and ended, on the machine's monotonic clock.

Owns the client process, and with `Bystander` what other modules need of it.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ZODB.utils import p64

from bench.database import commit, now
from bench.measure import Figures
from bench.peers import PEERS, Peer, connected
from bench.processes import PROJECT, PeerError, tethered

RECORD_BYTES = 200
REST_S = 0.002
END_TIMEOUT_S = 60.0

Window = tuple[float, float]
"""From when to when."""


class Bystander:
    """The process, from the outside: at work in its `with` block."""

    def __init__(self, peer: Peer, address: str, objects: int) -> None:
        self._peer = peer
        command = [sys.executable, "-m", "bench.bystander", peer.name, address, str(objects), str(REST_S)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(tethered(command), stdin=pipe, stdout=pipe, text=True, cwd=PROJECT)
        self._calls: dict[str, list[Window]] = {}

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self._process.communicate()
            raise PeerError(f"{self._peer.title}: the second client could not connect")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            printed, _ = self._process.communicate(timeout=END_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.communicate()
        if self._process.returncode == 0:
            self._calls = json.loads(printed)
        elif error is None:
            raise PeerError(f"{self._peer.title}: the second client failed")

    @property
    def commits(self) -> int:
        return len(self._calls["commit"])

    @property
    def loads(self) -> int:
        return len(self._calls["load"])

    def figures(self, windows: dict[str, Window]) -> Figures:
        """Of each kind of call, in each window: what one in a hundred takes at least, and the longest.

        `idle` must be one of the windows; the others are also told as multiples of it.
        """
        figures: Figures = {}
        for kind, calls in self._calls.items():
            for name, window in windows.items():
                times_ms = during(calls, window)
                if not times_ms:
                    raise PeerError(f"{self._peer.title}: no {kind} of the second client in {name!r}")
                figures[f"{kind}_{name}_ms"] = times_ms[len(times_ms) * 99 // 100]
                figures[f"{kind}_{name}_longest_ms"] = times_ms[-1]
                figures[f"{kind}_{name}_times"] = figures[f"{kind}_{name}_ms"] / figures[f"{kind}_idle_ms"]
        return figures


def during(calls: list[Window], window: Window) -> list[float]:
    """Milliseconds of those calls that were under way at any moment of the window, in ascending order."""
    begin, end = window
    return sorted((ended - began) * 1000 for began, ended in calls if began < end and ended > begin)


def work(storage: Any, objects: int, rest_s: float, ended: threading.Event) -> dict[str, list[Window]]:
    """Load and commit until `ended` is set."""
    oids = iter(random.Random(objects).sample(range(2, objects + 1), objects - 1))
    record = os.urandom(RECORD_BYTES)
    tid: bytes = storage.loadBefore(p64(1), now(storage))[1]

    def load() -> None:
        storage.loadBefore(p64(next(oids)), now(storage))

    def store() -> None:
        nonlocal tid
        tid = commit(storage, p64(1), tid, record)

    calls: dict[str, list[Window]] = {"load": [], "commit": []}

    def again(call: Callable[[], None], times: list[Window]) -> None:
        while True:
            began = time.monotonic()
            try:
                call()
            except BaseException:  # StopIteration, too: then there were too few objects
                failed.set()
                raise
            times.append((began, time.monotonic()))
            if ended.wait(rest_s):
                break

    failed = threading.Event()
    threads = [
        threading.Thread(target=again, args=(call, calls[kind]))
        for kind, call in (("load", load), ("commit", store))
    ]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    if failed.is_set():  # the thread's own traceback has been printed
        sys.exit("a thread failed")
    return calls


def main() -> None:
    peer, address, objects, rest_s = PEERS[sys.argv[1]](), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    with connected(peer, address) as storage:
        calls = work(storage, objects, rest_s, threading.Event())
    print(json.dumps(calls))


if __name__ == "__main__":
    main()
