"""Prefetch: many objects at once into the client's cache, then proof that they are there."""

import gc
from pathlib import Path

from bench.database import create, now
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, Peer, connected, serving
from bench.processes import PeerError, Stopwatch

RECORD_BYTES = 500


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    warm_up, count = (50, 500) if quick else (500, 5000)
    database = create(folder, warm_up + count, RECORD_BYTES)
    oids = database.shuffled_oids()
    wanted = oids[warm_up:]
    with serving(peer, folder) as address, connected(peer, address) as storage:
        before = now(storage)
        peer.prefetch(storage, oids[:warm_up], before)
        gc.collect()

        with Stopwatch(peer.pid) as watch:
            peer.prefetch(storage, wanted, before)

        given = peer.loads(storage)
        database.check(storage, wanted, before)
        if peer.loads(storage) != given:
            raise PeerError(f"{peer.title}: objects were asked for again after their prefetch")
    return watch.figures(count)


BENCHMARK = Benchmark(
    name="prefetch",
    title="prefetch of 5,000 objects of 500 bytes",
    peers=("zeo", "zeoid", "zeoid_shared"),
    lines=(
        Figure("rate", "objects a second"),
        Ratio("rate_to_zeo", "  times ZEO's", "rate", ZEO.name),
        Figure("us", "µs an object", 1),
        Figure("server_cpu_us", "server's CPU, µs an object", 1),
        Figure("client_cpu_us", "client's CPU, µs an object", 1),
        Figure("waiting_us", "neither on the CPU, µs", 1),
    ),
    run=run,
)
