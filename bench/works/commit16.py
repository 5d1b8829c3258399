"""Commits of 16 clients at once, in 4 processes of 4 threads, each client to an object of its own."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from bench.database import count_transactions, create
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, Peer, serving
from bench.processes import PROJECT, PeerError, cpu_s, tethered

RECORD_BYTES = 500
PROCESSES = 4
THREADS = 4


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    warm_up_s, length_s = (0.2, 0.5) if quick else (0.5, 3.0)
    database = create(folder, PROCESSES * THREADS, RECORD_BYTES)
    present = count_transactions(database.path)
    with serving(peer, folder) as address, ExitStack() as stack:
        pipes = [
            committer(stack, peer, address, database.oids[number::PROCESSES]) for number in range(PROCESSES)
        ]
        for _, output in pipes:
            if output.readline() != "ready\n":
                raise PeerError(f"{peer.title}: a client process could not connect")
        assert peer.pid is not None
        cpu_began_s = cpu_s(peer.pid)

        start = time.monotonic() + warm_up_s
        results: dict[str, dict[str, int]] = {}
        for orders, _ in pipes:
            print(start, length_s, file=orders, flush=True)
        for _, output in pipes:
            results |= json.loads(output.readline() or "{}")

        server_cpu_s = cpu_s(peer.pid) - cpu_began_s
    if len(results) != len(database.oids):
        raise PeerError(f"{peer.title}: a client process failed")
    done = sum(result["done"] for result in results.values())
    counts = [result["counted"] for result in results.values()]
    if count_transactions(database.path) != present + done:
        raise PeerError(f"{peer.title}: the Data.fs does not hold the transactions that were committed")
    return {
        "rate": sum(counts) / length_s,
        "fewest": min(counts) / length_s,
        "most": max(counts) / length_s,
        "server_cpu_us": server_cpu_s / done * 1e6,
    }


def committer(stack: ExitStack, peer: Peer, address: str, oids: list[bytes]) -> tuple[IO[str], IO[str]]:
    """A client process, waited for when the stack unwinds: its standard input and output."""
    command = [sys.executable, "-m", "bench.committer", peer.name, address, *(oid.hex() for oid in oids)]
    pipe = subprocess.PIPE
    process = stack.enter_context(
        subprocess.Popen(tethered(command), stdin=pipe, stdout=pipe, text=True, cwd=PROJECT)
    )
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


BENCHMARK = Benchmark(
    name="commit16",
    title="commits of one 500-byte object, 16 clients in 4 processes, each its own object, with fsync",
    peers=("zeo", "zeoid"),
    cpus=2,
    lines=(
        Figure("rate", "commits a second, all"),
        Ratio("rate_to_zeo", "  times ZEO's", "rate", ZEO.name),
        Figure("fewest", "  of the slowest client"),
        Figure("most", "  of the fastest client"),
        Figure("server_cpu_us", "server's CPU, µs a commit"),
    ),
    run=run,
)
