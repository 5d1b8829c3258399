"""A process whose threads read all the time forks again and again; every child reads, too.

Ends with status 0 if nobody failed and no connection was lost.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

import zeoid
from tests.client.programs.forking import DEADLINE_S, Losses

FORKS = 12


def main(address: str) -> int:
    losses = Losses()
    logging.getLogger("zeoid.client").addHandler(losses)
    storage = zeoid.ClientStorage(address, wait_timeout=DEADLINE_S)
    over = threading.Event()
    problems: list[BaseException] = []

    def read() -> None:
        try:
            while not over.is_set():
                storage.load(b"\0" * 8)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    failed = 0
    for _ in range(FORKS):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                storage.load(b"\0" * 8)
                storage.close()
                status = 0
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        failed += os.waitstatus_to_exitcode(ended) != 0
    over.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    storage.close()
    print(f"{failed} of {FORKS} children failed; {problems}; lost {losses.messages}", flush=True)
    return 1 if failed or problems or losses.messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
