"""One large transaction: 10,000 new objects of 1 kB each."""

import gc
from pathlib import Path

from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64

from bench.database import commit, count_transactions, create, now
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, InProcess, Peer, connected, serving
from bench.processes import PeerError, Stopwatch, peak_rss_bytes, rss_bytes

RECORD_BYTES = 1000
MB = 1e6


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    count = 500 if quick else 10_000
    database = create(folder, 1, RECORD_BYTES)
    with serving(peer, folder) as address, connected(peer, address) as storage:
        oid = database.oids[0]
        commit(storage, oid, storage.loadBefore(oid, now(storage))[1], database.record(oid))  # warms up
        oids = [storage.new_oid() for _ in range(count)]
        records = [database.record(oid) for oid in oids]
        rss = rss_bytes(peer.pid) if peer.pid else 0
        gc.collect()

        with Stopwatch(peer.pid) as watch:
            transaction = TransactionMetaData()
            storage.tpc_begin(transaction)
            for oid, record in zip(oids, records, strict=True):
                storage.store(oid, z64, record, "", transaction)
            storage.tpc_vote(transaction)
            storage.tpc_finish(transaction)

        figures = {"seconds": watch.wall_s, "client_cpu_s": watch.client_cpu_s}
        if peer.pid and watch.server_cpu_s is not None:
            peak = peak_rss_bytes(peer.pid)
            figures |= {"peak_mb": peak / MB, "growth_mb": (peak - rss) / MB}
            figures |= {"server_cpu_s": watch.server_cpu_s}
        database.check(storage, oids, now(storage))
    if count_transactions(database.path) != 3:
        raise PeerError(f"{peer.title}: the Data.fs does not hold the transactions that were committed")
    return figures


BENCHMARK = Benchmark(
    name="large",
    title="one transaction of 10,000 new objects of 1 kB, one client, with fsync",
    peers=("filestorage", "zeo", "zeoid"),
    lines=(
        Figure("seconds", "seconds", 3),
        Ratio("times_zeo", "  as fast as ZEO, times", "seconds", ZEO.name, inverse=True),
        Ratio("seconds_to_filestorage", "  times FileStorage's time", "seconds", InProcess.name),
        Figure("server_cpu_s", "server's CPU, s", 3),
        Figure("client_cpu_s", "client's CPU, s", 3),
        Figure("peak_mb", "server's peak memory, MB", 1),
        Figure("growth_mb", "  more than before it, MB", 1),
    ),
    run=run,
)
