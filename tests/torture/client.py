"""A client process: opens both storages and works with some threads until its input ends.

Its arguments come from `processes`; what it did is in its journal, and on its standard error what it did not
expect.
"""

from __future__ import annotations

import random
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import ZODB

import zeoid
from tests.torture.deeds import deeds
from tests.torture.journal import Journal
from tests.torture.objects import STORAGES
from tests.torture.worker import Floors, Worker
from zeoid.errors import Disconnected

#: Longer than a server takes to start on a busy machine with much to read.
WAIT_TIMEOUT_S = 20.0
#: Few, so that what a thread reads comes from the storage rather often.
CACHED_OBJECTS = 200
BLOB_CACHE_BYTES = 500_000


def open_databases(address: str, folder: Path, over: threading.Event) -> dict[str, Any]:
    """Both storages as one multi-database; clients share their caches of blobs. Empty when it is *over*."""
    databases: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    while len(databases) < len(STORAGES) and not over.is_set():
        name = STORAGES[len(databases)]
        try:
            storage = zeoid.ClientStorage(
                address,
                name,
                wait_timeout=WAIT_TIMEOUT_S,
                blob_dir=folder / f"{name}-cache",
                blob_cache_size=BLOB_CACHE_BYTES,
            )
            databases[name] = ZODB.DB(
                storage, database_name=name, databases=shared, cache_size=CACHED_OBJECTS
            )
        except Disconnected:
            continue  # the server is down, which is what we are here for
    return databases if len(databases) == len(STORAGES) else {}


def main(client: int, incarnation: int, threads: int, seed: str, address: str, path: str) -> int:
    over = threading.Event()

    def wait_for_end_of_input() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    databases = open_databases(address, Path(path).parent, over)
    if not databases:
        return 0
    journal, floors = Journal(Path(path)), Floors()
    failures: list[str] = []

    def work(thread: int) -> None:
        try:
            choices = random.Random(f"{seed}/{client}/{incarnation}/{thread}")
            worker = Worker(databases, journal, floors, random.Random(choices.random()))
            worker.work(deeds(choices, client, incarnation, thread), over)
            worker.close()
        except BaseException:
            failures.append(traceback.format_exc())

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for database in databases.values():
        database.close()
    print(*failures, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    client, incarnation, threads, *texts = sys.argv[1:]
    sys.exit(main(int(client), int(incarnation), int(threads), *texts))
