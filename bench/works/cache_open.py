"""A client whose cache is full is started again: how long until it is connected, by the size of the cache.

The cache is filled with revisions that the server does not have: only the opening is measured, and the server
is asked for none of them.
"""

import statistics
import time
from pathlib import Path
from typing import Any

from bench.database import create
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, Peer, serving
from bench.processes import PeerError

RECORD_BYTES = 8_000
OPENINGS = 5
MB = 1_000_000


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    sizes_mb = {"small": 5, "large": 20} if quick else {"small": 50, "large": 1_000}
    create(folder, 1, 100)
    figures = {}
    with serving(peer, folder) as address:
        for name, size_mb in sizes_mb.items():
            caches = folder / name
            caches.mkdir(mode=0o700)

            def opened(caches: Path = caches, size_mb: int = size_mb) -> Any:
                return peer.client_with_cache(address, caches, size_mb * MB)

            storage = opened()
            filled = fill(peer, storage, size_mb)
            storage.close()
            times_ms = []
            for _ in range(OPENINGS):
                began = time.perf_counter()
                storage = opened()
                times_ms.append((time.perf_counter() - began) * 1_000)
                held = peer.cached(storage)
                storage.close()
                if held != filled:
                    raise PeerError(f"{peer.title}: of {filled} revisions, {held} are left")
            figures |= {f"{name}_ms": statistics.median(times_ms), f"{name}_mb": held * RECORD_BYTES / MB}
    return {**figures, "growth": figures["large_ms"] / figures["small_ms"]}


def fill(peer: Peer, storage: Any, size_mb: int) -> int:
    """Put in as many records as make three quarters of the size: how many are there in the end."""
    before = int.from_bytes(storage.lastTransaction(), "big") - 1  # the server is asked for what is newest
    tid = before.to_bytes(8, "big")
    for number in range(2, 2 + size_mb * MB * 3 // 4 // RECORD_BYTES):
        peer.put_into_cache(storage, number.to_bytes(8, "big"), tid, number.to_bytes(8, "big") * 1_000)
    deadline = time.monotonic() + 60
    while peer.waiting(storage):
        if time.monotonic() > deadline:
            raise PeerError(f"{peer.title}: what was put into the cache does not get there")
        time.sleep(0.01)
    return peer.cached(storage)


BENCHMARK = Benchmark(
    name="cache_open",
    title="start of a client whose cache of 50 MB, or of 1 GB, is three quarters full",
    peers=("zeo", "zeoid_shared"),
    lines=(
        Figure("small_ms", "50 MB: until it is connected, ms", 1),
        Figure("small_mb", "  what is in it, MB"),
        Figure("large_ms", "1 GB: until it is connected, ms", 1),
        Figure("large_mb", "  what is in it, MB"),
        Figure("growth", "  times as long as with 50 MB", 2),
        Ratio("large_to_zeo", "  ZEO takes so many times as long", "large_ms", ZEO.name, inverse=True),
    ),
    run=run,
)
