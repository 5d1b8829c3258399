"""A blob of 1 GB, up and down, and what another client notices of it.

ZEO's server never syncs a blob; Zeoid's does before it answers the vote. So the server's file is synced here,
too, after the commit has returned, and the time of that is told: with a server that did it, it is nothing.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64

from bench.bystander import RECORD_BYTES, Bystander, Window
from bench.database import count_transactions, create
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, Peer, connected, serving
from bench.processes import PeerError, peak_rss_bytes, rss_bytes

PIECE_BYTES = 1_000_000
COPIES = 4  # the uploading client's, the server's, the downloading client's, and one more to be sure
BLOB_RECORD = b"cZODB.blob\nBlob\n.N."  # the pickles of the class, and of no state
MB = 1e6


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    pieces, warm_up_s, idle_s, objects = (30, 0.2, 0.5, 5_000) if quick else (1_000, 1.0, 5.0, 60_000)
    if shutil.disk_usage(folder).free < COPIES * pieces * PIECE_BYTES:
        raise PeerError(f"{folder} has no room for {COPIES} blobs of {pieces:,} MB: choose another --folder")
    peer.blob_dir = folder / "blobs"
    database = create(folder, objects, RECORD_BYTES)
    present = count_transactions(database.path)
    windows: dict[str, Window] = {}
    with serving(peer, folder) as address, connected(peer, address, folder / "up") as storage:
        assert peer.pid is not None
        source = Path(storage.temporaryDirectory()) / "source"
        write_s = write_and_sync(source, pieces)
        with Bystander(peer, address, objects) as bystander:
            time.sleep(warm_up_s)
            rss = rss_bytes(peer.pid)
            began = time.monotonic()
            time.sleep(idle_s)
            windows["idle"] = began, time.monotonic()
            oid, tid, windows["up"] = upload(storage, source)
            server_file = the_blob(peer, peer.blob_dir)
            sync_s = sync(server_file)
            with connected(peer, address, folder / "down") as reader:
                began = time.monotonic()
                file = reader.openCommittedBlobFile(oid, tid)
                windows["down"] = began, time.monotonic()
                with file:
                    check(peer, file, pieces)
        peak = peak_rss_bytes(peer.pid)
        if (peer.loads(storage) or 0) < bystander.loads:
            raise PeerError(f"{peer.title}: the second client's loads did not get to the server")
    with server_file.open("rb") as file:
        check(peer, file, pieces)
    if count_transactions(database.path) != present + bystander.commits + 1:
        raise PeerError(f"{peer.title}: the Data.fs does not hold the transactions that were committed")
    up_s, down_s = (end - begin for begin, end in (windows["up"], windows["down"]))
    return {
        "write_s": write_s, "up_s": up_s, "sync_s": sync_s, "up_synced_s": up_s + sync_s, "down_s": down_s,
        "growth_mb": (peak - rss) / MB, **bystander.figures(windows),
    }  # fmt: skip


def upload(storage: Any, source: Path) -> tuple[bytes, bytes, Window]:
    """Commit the file as a blob: its oid and tid, and how long it took."""
    oid = storage.new_oid()
    began = time.monotonic()
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.storeBlob(oid, z64, BLOB_RECORD, str(source), "", transaction)
    storage.tpc_vote(transaction)
    tid = storage.tpc_finish(transaction)
    return oid, tid, (began, time.monotonic())


def content(pieces: int) -> Iterator[bytes]:
    """Pieces that differ, the same in every run."""
    rest = bytes(range(250)) * (PIECE_BYTES // 250)
    return (number.to_bytes(8, "big") + rest[8:] for number in range(pieces))


def write_and_sync(path: Path, pieces: int) -> float:
    """Write the file. The seconds that the disk itself takes, just before."""
    began = time.perf_counter()
    with path.open("wb") as file:
        for piece in content(pieces):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def sync(path: Path) -> float:
    """Have what is in the file on the disk. The seconds that it takes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        began = time.perf_counter()
        os.fsync(descriptor)
        return time.perf_counter() - began
    finally:
        os.close(descriptor)


def the_blob(peer: Peer, blob_dir: Path) -> Path:
    """The only blob that the server has."""
    found = list(blob_dir.rglob("*.blob"))
    if len(found) != 1:
        raise PeerError(f"{peer.title}: the server has {len(found)} blobs, not one")
    return found[0]


def check(peer: Peer, file: Any, pieces: int) -> None:
    """The file holds what was put in, and no more."""
    for piece in content(pieces):
        if file.read(PIECE_BYTES) != piece:
            raise PeerError(f"{peer.title}: a piece of the blob is not what was put in")
    if file.read(1):
        raise PeerError(f"{peer.title}: the blob is longer than what was put in")


def _noticed(kind: str) -> tuple[Figure | Ratio, ...]:
    """The lines of what the other client notices."""
    lines: list[Figure | Ratio] = [
        Figure(f"{kind}_idle_ms", f"one {kind} in a hundred takes as long as, ms", 2)
    ]
    for name in ("up", "down"):
        lines += [
            Figure(f"{kind}_{name}_ms", f"  {name}: as long as, ms", 2),
            Figure(f"{kind}_{name}_times", "    times as long as without", 2),
            Ratio(f"{kind}_{name}_to_zeo", "    times ZEO's", f"{kind}_{name}_ms", ZEO.name),
            Figure(f"{kind}_{name}_longest_ms", "    the longest, ms", 1),
        ]
    return tuple(lines)


BENCHMARK = Benchmark(
    name="blob",
    title="a blob of 1 GB up and down, while another client loads and commits",
    peers=("zeo", "zeoid"),
    cpus=2,
    lines=(
        Figure("write_s", "write and fsync alone, s", 2),
        Figure("up_s", "up, until it is committed, s", 2),
        Ratio("up_to_zeo", "  times ZEO's", "up_s", ZEO.name),
        Figure("sync_s", "  fsync of the server's file after that, s", 2),
        Figure("up_synced_s", "  both, s", 2),
        Ratio("up_synced_to_zeo", "  times ZEO's", "up_synced_s", ZEO.name),
        Figure("down_s", "down, until it is open, s", 2),
        Ratio("down_to_zeo", "  times ZEO's", "down_s", ZEO.name),
        *_noticed("load"),
        *_noticed("commit"),
        Figure("growth_mb", "server's memory, MB more than before", 1),
    ),
    run=run,
)
