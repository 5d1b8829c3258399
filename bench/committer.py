"""One of commit16's client processes: `python -m bench.committer PEER ADDRESS OID ...`.

A thread with a storage of its own for every oid (in hex). Prints "ready" once all are connected, reads one
line, "START LENGTH" (seconds on the machine's monotonic clock, and seconds), and commits at once, to warm up,
and until START + LENGTH. Prints for every oid how many commits were acknowledged, and how many since START.
"""

import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

from bench.database import commit, now
from bench.peers import PEERS, connected

RECORD_BYTES = 500


def commit_until(storage: Any, oid: bytes, start: float, end: float) -> dict[str, int]:
    """Commit one transaction after the other, and count those that are acknowledged from `start` to `end`."""
    record = os.urandom(RECORD_BYTES)
    tid = storage.loadBefore(oid, now(storage))[1]
    done = counted = 0
    while time.monotonic() < end:
        tid = commit(storage, oid, tid, record)
        done += 1
        counted += start <= time.monotonic() < end
    return {"done": done, "counted": counted}


def main() -> None:
    peer, address, oids = PEERS[sys.argv[1]](), sys.argv[2], [bytes.fromhex(oid) for oid in sys.argv[3:]]
    results: dict[str, dict[str, int]] = {}
    with ExitStack() as stack:
        storages = [stack.enter_context(connected(peer, address)) for _ in oids]
        print("ready", flush=True)
        start, length = map(float, sys.stdin.readline().split())

        def work(storage: Any, oid: bytes) -> None:
            results[oid.hex()] = commit_until(storage, oid, start, start + length)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(storages, oids, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(results) != len(oids):  # the thread's own traceback has been printed
        sys.exit("a client failed")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
