"""A program that forks again and again while its threads read and write a shared object cache.

Its threads and its children look whether what they find is right. It prints what is wrong, or that all is
well.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback

from tests.cache.sharing import KEY, SIZE_BYTES, oid, tid
from zeoid.cache.shared import SharedCache
from zeoid.client.view import View

FORKS = 25
OBJECTS = 20


class Parent:
    """Its stream: each transaction writes one object, whose data says which transaction that was."""

    def __init__(self, cache_dir: str) -> None:
        self.cache_dir = cache_dir
        self.view = View(self.make_cache(bytes(8)))
        self.view.known()
        self.view.begin(tid(1))
        self.over = threading.Event()
        self.found = 0
        self.problems: list[str] = []

    def make_cache(self, told: bytes) -> SharedCache:
        return SharedCache(self.cache_dir, KEY, SIZE_BYTES, told)

    def watch(self, work: object) -> threading.Thread:
        def run() -> None:
            try:
                while not self.over.is_set():
                    work()  # type: ignore[operator]
            except BaseException:
                self.problems.append(traceback.format_exc())
                self.over.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def write(self) -> None:
        last = int.from_bytes(self.view.last_tid(), "big") + 1
        self.view.finished(tid(last), {oid(last % OBJECTS): b"%d" % last * 50}, self.view.mark, None)
        time.sleep(0.0005)

    def read(self) -> None:
        last = int.from_bytes(self.view.last_tid(), "big")
        self.look(last)

    def look(self, last: int) -> None:
        """At what was there when transaction *last* was the last one."""
        for start in range(max(2, last - OBJECTS + 1), last + 1):
            found = self.view.lookup(oid(start % OBJECTS), tid(last + 1))
            if found is not None:
                assert found[:2] == (b"%d" % start * 50, tid(start)), (start, last, found)
                self.found += 1

    def child(self) -> None:
        self.found = 0
        self.view.after_fork(self.make_cache)
        self.view.known()
        last = int.from_bytes(self.view.last_tid(), "big")
        self.view.catch_up(tid(last), tid(last), [])
        for _ in range(20):
            self.look(last)
        assert isinstance(self.view.cache, SharedCache)
        assert self.view.cache._here is not None, "it has no environment"
        self.view.cache.close()


def main(cache_dir: str) -> int:
    parent = Parent(cache_dir)
    cache = parent.view.cache
    assert isinstance(cache, SharedCache)
    threads = [parent.watch(parent.write), *(parent.watch(parent.read) for _ in range(3))]
    for _ in range(FORKS):
        time.sleep(0.01)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                parent.child()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if os.waitpid(pid, 0)[1]:
            parent.problems.append("a child failed")
    parent.over.set()
    for thread in threads:
        thread.join()
    if cache._here is None or cache._left:
        parent.problems.append("it has left its environment")
    if not parent.found:
        parent.problems.append("nothing was ever found")
    cache.close()
    print(*parent.problems or ["all is well"], sep="\n")
    return bool(parent.problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
