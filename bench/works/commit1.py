"""Commits of one client, one object of 500 bytes in each, every one durable before the next begins."""

import gc
import os
import time
from pathlib import Path

from bench.database import commit, count_transactions, create, now
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, InProcess, Peer, connected, serving
from bench.processes import PeerError, Stopwatch

RECORD_BYTES = 500
FSYNCED_BYTES = 600  # about what FileStorage writes for such a transaction


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    warm_up, count = (10, 50) if quick else (100, 1000)
    database = create(folder, 1, RECORD_BYTES)
    oid = database.oids[0]
    records = [os.urandom(RECORD_BYTES) for _ in range(warm_up + count)]
    present = count_transactions(database.path)
    fsync_us = write_and_fsync_us(folder, count)
    with serving(peer, folder) as address, connected(peer, address) as storage:
        tid = storage.loadBefore(oid, now(storage))[1]
        for record in records[:warm_up]:
            tid = commit(storage, oid, tid, record)
        gc.collect()

        with Stopwatch(peer.pid) as watch:
            for record in records[warm_up:]:
                tid = commit(storage, oid, tid, record)

    if count_transactions(database.path) != present + len(records):
        raise PeerError(f"{peer.title}: the Data.fs does not hold the transactions that were committed")
    return watch.figures(count) | {"fsync_us": fsync_us}


def write_and_fsync_us(folder: Path, count: int) -> float:
    """What the disk itself takes, in the same folder and just before."""
    data = os.urandom(FSYNCED_BYTES)
    with open(folder / "fsync", "wb", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(count):
            file.write(data)
            os.fsync(file.fileno())
        return (time.perf_counter() - began) / count * 1e6


BENCHMARK = Benchmark(
    name="commit1",
    title="commits of one 500-byte object, one client, with fsync",
    peers=("filestorage", "zeo", "zeoid"),
    lines=(
        Figure("rate", "commits a second"),
        Ratio("rate_to_filestorage", "  times FileStorage's", "rate", InProcess.name),
        Ratio("rate_to_zeo", "  times ZEO's", "rate", ZEO.name),
        Figure("us", "µs a commit"),
        Figure("fsync_us", "write and fsync alone, µs"),
        Figure("server_cpu_us", "server's CPU, µs a commit"),
        Figure("client_cpu_us", "client's CPU, µs a commit"),
        Figure("waiting_us", "neither on the CPU, µs"),
    ),
    run=run,
)
