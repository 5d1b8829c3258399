"""Cold load latency: one thread, each object once, so that no cache can help."""

import gc
from pathlib import Path

from bench.database import create, now
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, Bare, Lean, Peer, connected, serving
from bench.processes import PeerError, Stopwatch
from bench.tls_peers import BareTls, ZeoidTls, ZeoTls

RECORD_BYTES = 500


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    warm_up, count = (100, 500) if quick else (500, 5000)
    database = create(folder, warm_up + count, RECORD_BYTES)
    oids = database.shuffled_oids()
    with serving(peer, folder) as address, connected(peer, address) as storage:
        before = now(storage)
        load = storage.loadBefore
        for oid in oids[:warm_up]:
            load(oid, before)
        given = peer.loads(storage)
        gc.collect()

        with Stopwatch(peer.pid) as watch:
            for oid in oids[warm_up:]:
                load(oid, before)

        if given is not None and peer.loads(storage) != given + count:
            raise PeerError(f"{peer.title}: not every one of {count} loads was a request to the server")
        if not isinstance(peer, Bare):
            database.check(storage, oids, before)
    return watch.figures(count)


BENCHMARK = Benchmark(
    name="load",
    title="cold loads of 500-byte records, one thread",
    peers=("bare", "lean", "filestorage", "zeo", "zeoid"),
    lines=(
        Figure("us", "µs a load", 1),
        Ratio("us_to_bare", "  times the bare socket's", "us", Bare.name),
        Ratio("us_to_lean", "  times the lean pair's", "us", Lean.name),
        Ratio("zeo_to_us", "  times faster than ZEO", "us", ZEO.name, inverse=True),
        Figure("rate", "loads a second"),
        Figure("server_cpu_us", "server's CPU, µs a load", 1),
        Ratio("server_cpu_to_bare", "  times the bare server's", "server_cpu_us", Bare.name),
        Figure("client_cpu_us", "client's CPU, µs a load", 1),
        Ratio("client_cpu_to_bare", "  times the bare client's", "client_cpu_us", Bare.name),
        Figure("waiting_us", "neither on the CPU, µs a load", 1),
    ),
    run=run,
)

WITH_TLS = Benchmark(
    name="load_tls",
    title="the same over TLS with mutual certificates",
    peers=(BareTls.name, ZeoTls.name, ZeoidTls.name),
    lines=(
        Figure("us", "µs a load", 1),
        Ratio("us_to_bare", "  times the bare TLS socket's", "us", BareTls.name),
        Ratio("zeo_to_us", "  times faster than ZEO", "us", ZeoTls.name, inverse=True),
        Figure("rate", "loads a second"),
        Figure("server_cpu_us", "server's CPU, µs a load", 1),
        Figure("client_cpu_us", "client's CPU, µs a load", 1),
    ),
    run=run,
)
