"""Copying a database: `zeoid copy` beside ZODB's own copyTransactionsFrom.

The column of FileStorage is ZODB's own way, which goes into a data file only. That of Zeoid is the command
`zeoid copy`, run in this process: everything that it does but starting Python. Both commit with fsync.
"""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ZODB.FileStorage import FileIterator, FileStorage

from bench.database import create
from bench.measure import Benchmark, Figure, Figures, Ratio
from bench.peers import ZEO, InProcess, Peer, Zeoid, connected, serving
from bench.processes import PeerError

RECORD_BYTES = 1000
RECORDS_A_TRANSACTION = 10
MB = 1e6

Way = Callable[[str, Path], None]
"""Copies from a path or an address into a data file."""


def run(peer: Peer, folder: Path, quick: bool) -> Figures:
    legs = _legs_of_zodb if isinstance(peer, InProcess) else _legs_of_zeoid
    _measured(peer, legs, folder / "warming up", 5)
    return _measured(peer, legs, folder / "measured", 30 if quick else 2_000)


class _Timed:
    """Copies of one database, each of which is timed and then compared with it."""

    def __init__(self, peer: Peer, folder: Path, transactions: int) -> None:
        folder.mkdir()
        self.peer = peer
        self.folder = folder
        self.records = transactions * RECORDS_A_TRANSACTION
        self.source = create(folder, self.records, RECORD_BYTES, RECORDS_A_TRANSACTION).path
        self.seconds: dict[str, float] = {}

    def time(self, leg: str, way: Way, origin: str, destination: Path) -> None:
        began = time.perf_counter()
        way(origin, destination)
        self.seconds[leg] = time.perf_counter() - began

    def file(self, leg: str, way: Way) -> None:
        destination = self.folder / f"{leg}.fs"
        self.time(leg, way, str(self.source), destination)
        check(self.peer, self.source, destination)

    def from_zeo(self, way: Way) -> None:
        destination = self.folder / "zeo.fs"
        with serving(ZEO(), self.folder) as address:
            self.time("zeo", way, address, destination)
        check(self.peer, self.source, destination)

    def to_server(self) -> None:
        (served := self.folder / "server").mkdir()
        with serving(self.peer, served) as address:

            def to_address(origin: str, _: Path) -> None:
                _zeoid("--no-verify", origin, address)

            self.time("server", to_address, str(self.source), served)
        check(self.peer, self.source, served / "Data.fs")


def _measured(peer: Peer, legs: Callable[[_Timed], None], folder: Path, transactions: int) -> Figures:
    timed = _Timed(peer, folder, transactions)
    legs(timed)
    mb = timed.records * RECORD_BYTES / MB
    figures: Figures = {}
    for leg, seconds in timed.seconds.items():
        figures |= {f"{leg}_rate": timed.records / seconds, f"{leg}_mb": mb / seconds}
    return figures


def _legs_of_zodb(timed: _Timed) -> None:
    timed.file("file", zodb_copies)
    timed.from_zeo(zodb_copies_from_zeo)


def _legs_of_zeoid(timed: _Timed) -> None:
    timed.file("file", zeoid_copies)
    timed.file("verified", zeoid_copies_and_compares)
    timed.to_server()
    timed.from_zeo(zeoid_copies)


def zodb_copies(origin: str, destination: Path) -> None:
    _zodb(FileStorage(origin, read_only=True), destination)


def zodb_copies_from_zeo(origin: str, destination: Path) -> None:
    with connected(ZEO(), origin) as source:
        _zodb(source, destination)


def _zodb(source: Any, destination: Path) -> None:
    with contextlib.closing(source), contextlib.closing(FileStorage(str(destination), create=True)) as copy:
        copy.copyTransactionsFrom(source)


def zeoid_copies(origin: str, destination: Path) -> None:
    _zeoid("--no-verify", origin, str(destination))


def zeoid_copies_and_compares(origin: str, destination: Path) -> None:
    _zeoid(origin, str(destination))


def _zeoid(*arguments: str) -> None:
    from zeoid.cli import main

    printed = io.StringIO()  # standard output is for the figures
    with contextlib.redirect_stdout(printed):
        status = main(["copy", "--quiet", *arguments])
    if status:
        raise PeerError(f"zeoid copy ended with status {status}: {printed.getvalue()}")


def check(peer: Peer, source: Path, destination: Path) -> None:
    """The copy has every transaction and every record of the source, and no other."""
    if list(contents(source)) != list(contents(destination)):
        raise PeerError(f"{peer.title}: the copy {destination.name} is not what the source is")


def contents(path: Path) -> Iterator[Any]:
    with contextlib.closing(FileIterator(str(path))) as iterator:
        for transaction in iterator:
            yield transaction.tid, [(record.oid, record.tid, hash(record.data)) for record in transaction]


BENCHMARK = Benchmark(
    name="copy",
    title="copying 20,000 records of 1 kB in transactions of 10, with fsync",
    peers=(InProcess.name, Zeoid.name),
    lines=(
        Figure("file_rate", "data file to data file, records a second"),
        Figure("file_mb", "  MB a second", 1),
        Ratio("file_to_zodb", "  times copyTransactionsFrom's", "file_rate", InProcess.name),
        Figure("verified_rate", "  and compared afterwards, records a second"),
        Figure("server_rate", "data file to Zeoid's server, records a second"),
        Figure("server_mb", "  MB a second", 1),
        Figure("zeo_rate", "ZEO's server to data file, records a second"),
        Figure("zeo_mb", "  MB a second", 1),
        Ratio("zeo_to_zodb", "  times copyTransactionsFrom's", "zeo_rate", InProcess.name),
    ),
    run=run,
)
