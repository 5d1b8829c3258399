"""A client far away from its server: it goes through a tree of small objects that it has never seen.

Once as any application does, object by object, and once with a prefetch for each 500 of them.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import transaction
import ZODB
from BTrees.IOBTree import IOBTree
from persistent.mapping import PersistentMapping
from ZODB.FileStorage import FileStorage

from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import HOST, ZEO, Peer, serving
from bench.processes import PeerError, ServerProcess

ENTRIES = 50_000
BATCH = 500


def run(delay_ms: float, count: int, peer: Peer, folder: Path, quick: bool) -> Figures:
    """*delay_ms*: of a round trip. *count*: how many of the tree's objects are gone through."""
    entries, count = (1_000, 100) if quick else (ENTRIES, count)
    create(folder / "Data.fs", entries)
    figures = {}
    with serving(peer, folder) as address, far_away(address, delay_ms, folder) as far:
        for way, traverse in (("plain", plainly), ("prefetch", with_prefetch)):
            database = ZODB.DB(peer.client(far), cache_size=2 * ENTRIES)
            try:
                connection = database.open()
                began = time.perf_counter()
                found = traverse(peer, connection, count)
                figures[f"{way}_s"] = time.perf_counter() - began
                if found != sum(range(count)):
                    raise PeerError(f"{peer.title}: the objects are not what was put in")
            finally:
                database.close()
    return figures


def create(path: Path, entries: int) -> None:
    database = ZODB.DB(FileStorage(str(path), create=True))
    connection = database.open()
    tree = connection.root()["tree"] = IOBTree()
    for begin in range(0, entries, 1_000):
        for number in range(begin, min(begin + 1_000, entries)):
            tree[number] = PersistentMapping(number=number)
        transaction.commit()
    database.close()


@contextmanager
def far_away(address: str, delay_ms: float, folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "zeoid.testing.delaying", address, str(delay_ms / 2)]
    proxy = ServerProcess(command, folder / "proxy.log")
    try:
        port = proxy.wait_for(rf"listening on {HOST}:(\d+)")[1]
        yield f"{HOST}:{port}"
    finally:
        proxy.stop()


def plainly(peer: Peer, connection: Any, count: int) -> int:
    return sum(each["number"] for each in islice(connection.root()["tree"].values(), count))


def with_prefetch(peer: Peer, connection: Any, count: int) -> int:
    values = islice(connection.root()["tree"].values(), count)
    found = 0
    while batch := list(islice(values, BATCH)):
        before = connection._storage._start
        peer.prefetch(connection.db().storage, [each._p_oid for each in batch], before)
        found += sum(each["number"] for each in batch)
    return found


def benchmark(delay_ms: float, count: int) -> Benchmark:
    return Benchmark(
        name=f"far{delay_ms:g}",
        title=f"the first {count:,} of a tree of {ENTRIES:,} small objects, {delay_ms:g} ms away",
        peers=("zeo", "zeoid"),
        cpus=2,
        lines=(
            Figure("plain_s", "object by object, s", 2),
            Ratio("plain_to_zeo", "  ZEO takes so many times as long", "plain_s", ZEO.name, inverse=True),
            Figure("prefetch_s", "with prefetch of each 500, s", 2),
            Ratio(
                "prefetch_to_zeo", "  ZEO takes so many times as long",
                "prefetch_s", ZEO.name, inverse=True,
            ),
            Ratio(
                "prefetch_to_zeo_plain", "  ZEO takes so many times as long without",
                "prefetch_s", ZEO.name, inverse=True, base_figure="plain_s",
            ),
        ),
        run=partial(run, delay_ms, count),
    )  # fmt: skip


BENCHMARKS = (benchmark(1, 5_000), benchmark(20, 500))
