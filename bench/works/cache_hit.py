"""Loads that the client's cache answers, without a request."""

import gc
import time
from pathlib import Path
from typing import Any

from bench.database import create, now
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, Peer, connected, serving
from bench.processes import PeerError, Stopwatch

RECORD_BYTES = 500


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    objects, passes = (200, 2) if quick else (2000, 10)
    database = create(folder, objects, RECORD_BYTES)
    oids = database.shuffled_oids()
    with serving(peer, folder) as address, connected(peer, address) as storage:
        before = now(storage)
        database.check(storage, oids, before)  # this fills the cache
        database.check(storage, oids, before)  # and this comes out of it
        wait_until_shared(storage)
        load = storage.loadBefore
        given = peer.loads(storage)
        gc.collect()

        with Stopwatch(peer.pid) as watch:
            for _ in range(passes):
                for oid in oids:
                    load(oid, before)

        if peer.loads(storage) != given:
            raise PeerError(f"{peer.title}: not every load was answered by the cache")
    return watch.figures(objects * passes)


def wait_until_shared(storage: Any) -> None:
    """Until what was loaded is where all processes find it, and not in this one's memory."""
    figures = getattr(storage, "cache_statistics", dict)
    while figures().get("waiting"):
        time.sleep(0.01)


BENCHMARK = Benchmark(
    name="cache_hit",
    title="loads of 500-byte records that are in the client's cache, one thread",
    peers=("zeo", "zeoid", "zeoid_shared"),
    lines=(
        Figure("us", "µs a load", 2),
        Figure("rate", "loads a second"),
        Ratio("rate_to_zeo", "  times ZEO's", "rate", ZEO.name),
    ),
    run=run,
)
