"""A process forks while its threads are in the middle of everything: an invalidation that is being applied, a
request for object ids, a transaction. What they hold, the child must not wait for.

It says what the child could do, line by line.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any

from ZODB.Connection import TransactionMetaData

from tests.client.programs.forking import DEADLINE_S, say
from zeoid import ClientStorage


class Slow:
    """A database that takes its time when it is told of a commit, but not in the child."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.told = threading.Event()
        self.over = threading.Event()

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        if os.getpid() == self.parent:
            self.told.set()
            self.over.wait(DEADLINE_S)
        else:
            say(f"child is told of {sorted(oids)}")

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    untransform_record_data = transform_record_data


def main(address: str) -> int:
    storage = ClientStorage(address, wait_timeout=DEADLINE_S)
    database = Slow()
    storage.registerDB(database)
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    threads = [
        threading.Thread(target=quietly, args=args)
        for args in ((storage.new_oid,), (storage.tpc_vote, transaction))
    ]
    for thread in threads:
        thread.start()
    if not database.told.wait(DEADLINE_S):
        return 2
    child = os.fork()
    if child == 0:
        status = 1
        try:
            in_child(storage)
            status = 0
        except BaseException as problem:
            say(f"child failed: {problem!r}")
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    database.over.set()
    storage.close()
    for thread in threads:
        thread.join(DEADLINE_S)
    return os.waitstatus_to_exitcode(status)


def quietly(call: Any, *args: Any) -> None:
    try:
        call(*args)
    except Exception as problem:
        say(f"parent's thread ended with {type(problem).__name__}")


def in_child(storage: ClientStorage) -> None:
    say(f"child knows {storage.lastTransaction().hex()}")
    storage.ping()
    say(f"child knows {storage.lastTransaction().hex()}")
    say(f"child has {sockets()} socket")
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    oid = storage.new_oid()
    storage.store(oid, b"\0" * 8, b"data", "", transaction)
    storage.tpc_vote(transaction)
    say(f"child committed {storage.tpc_finish(transaction).hex()}")
    storage.close()


def sockets() -> int:
    """How many this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory's own, which is gone by now
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
