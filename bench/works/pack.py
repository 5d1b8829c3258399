"""Commits of one client while the storage is packed: how long they take, against before; the server's memory.

The database is a tree of objects; a third of them were overwritten, and a tenth is garbage.
"""

import gc
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64, z64

from bench.database import commit, now
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, Peer, connected, serving
from bench.processes import PeerError, peak_rss_bytes, rss_bytes

RECORD_BYTES = 300
BRANCH = 500  # objects below one
SAMPLE = 1000
MB = 1e6


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    objects, before_s = (2_000, 0.3) if quick else (100_000, 3.0)
    records = create(folder / "Data.fs", objects)
    with serving(peer, folder) as address, connected(peer, address) as storage:
        assert peer.pid is not None
        client = Client(storage, storage.loadBefore(z64, now(storage)))
        client.commit_while(within(before_s / 3))
        before_ms = client.commit_while(within(before_s))
        rss, size = rss_bytes(peer.pid), size_bytes(storage)
        gc.collect()

        with connected(peer, address) as other:
            packing = threading.Thread(target=lambda: other.pack(time.time(), wait=True))
            began = time.perf_counter()
            packing.start()
            during_ms = client.commit_while(packing.is_alive)
            seconds = time.perf_counter() - began

        peak = peak_rss_bytes(peer.pid)
        if size_bytes(storage) >= size:
            raise PeerError(f"{peer.title}: nothing was packed")
        check(peer, storage, records, client)
    slowest = sorted(during_ms)[len(during_ms) * 99 // 100]
    return {
        "before_ms": median(before_ms), "during_ms": median(during_ms),
        "times_before": median(during_ms) / median(before_ms), "slow_ms": slowest,
        "longest_ms": max(during_ms), "commits": len(during_ms), "seconds": seconds,
        "growth_mb": (peak - rss) / MB,
    }  # fmt: skip


def record(state: bytes, *references: bytes) -> bytes:
    """A record that refers to these objects: the pickles of a class and of a state."""
    referring = b"".join(b"(C\x08" + oid + b"cpersistent\nPersistent\ntQ" for oid in references)
    data = b"B" + len(state).to_bytes(4, "little") + state
    return b"cpersistent\nPersistent\n.(" + referring + data + b"t."


def create(path: Path, objects: int) -> dict[bytes, bytes]:
    """A new Data.fs with about so many objects; the records of those that can be reached."""
    storage = FileStorage(str(path), create=True)
    chance = random.Random(objects)
    tids: dict[bytes, bytes] = {}

    def write(records: dict[bytes, bytes]) -> None:
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for oid, data in records.items():
            storage.store(oid, tids.get(oid, z64), data, "", transaction)
        storage.tpc_vote(transaction)
        tids.update(dict.fromkeys(records, storage.tpc_finish(transaction)))

    branches = [p64(number) for number in range(1, objects // BRANCH + 1)]
    live = {z64: record(b"root", *branches)}
    write(live)
    for index, branch in enumerate(branches):
        first = len(branches) + 1 + index * BRANCH
        leaves = {p64(first + n): record(chance.randbytes(RECORD_BYTES)) for n in range(BRANCH)}
        kept = list(leaves)[: BRANCH * 9 // 10]
        live[branch] = record(b"branch", *kept)
        write({branch: live[branch], **leaves})
        again = {oid: record(chance.randbytes(RECORD_BYTES)) for oid in kept[::3]}
        write(again)
        live.update({oid: again.get(oid, leaves[oid]) for oid in kept})
    storage.set_max_oid(p64(len(branches) * (BRANCH + 1)))
    storage.close()
    return live


class Client:
    """Commits the root again and again, unchanged, and measures how long each takes."""

    def __init__(self, storage: Any, root: tuple[bytes, bytes, bytes | None]) -> None:
        self._storage = storage
        self._record, self.tid, _ = root

    def commit_while(self, wanted: Callable[[], bool]) -> list[float]:
        """Milliseconds of each commit, at least two."""
        times_ms: list[float] = []
        while wanted() or len(times_ms) < 2:
            began = time.perf_counter()
            self.tid = commit(self._storage, z64, self.tid, self._record)
            times_ms.append((time.perf_counter() - began) * 1000)
        return times_ms


def within(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def size_bytes(storage: Any) -> int:
    """As the server knows it now: a client is told a little later."""
    len(storage)
    size: int = storage.getSize()
    return size


def check(peer: Peer, storage: Any, records: dict[bytes, bytes], client: Client) -> None:
    """What can be reached is there, and what was committed last."""
    sample = random.Random(1).sample(sorted(records), min(SAMPLE, len(records)))
    for oid in [z64, *sample]:
        loaded = storage.loadBefore(oid, now(storage))
        if loaded is None or loaded[0] != records[oid] or (oid == z64 and loaded[1] != client.tid):
            raise PeerError(f"{peer.title}: the pack lost object {oid.hex()}")


BENCHMARK = Benchmark(
    name="pack",
    title="commits of one client while a storage of 100,000 objects is packed, with fsync",
    peers=("zeo", "zeoid"),
    cpus=2,
    lines=(
        Figure("before_ms", "a commit before the pack, ms", 2),
        Figure("during_ms", "a commit during the pack, ms", 2),
        Figure("times_before", "  times as long as before", 2),
        Figure("slow_ms", "  one in a hundred takes as long as, ms", 1),
        Figure("longest_ms", "  the longest, ms", 1),
        Figure("commits", "commits during the pack"),
        Figure("seconds", "seconds of the pack", 2),
        Ratio("seconds_to_zeo", "  times ZEO's", "seconds", ZEO.name),
        Figure("growth_mb", "server's memory, MB more than before", 1),
    ),
    run=run,
)
