"""The works of the benchmarks that need more than a Data.fs: run short, and found out when they are wrong.

No test judges a speed.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from bench.bystander import Bystander, during
from bench.database import create
from bench.peers import PEERS, ZEO, InProcess, Peer, Zeoid, serving
from bench.processes import PeerError
from bench.works import BENCHMARKS, blob, copy
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64

from zeoid.cli import main


class OnStock(Zeoid):
    """Zeoid's client on ZEO's server."""

    title = "Zeoid's client"
    start = ZEO.start


def keeps_blobs(capsys: pytest.CaptureFixture[str]) -> bool:
    with contextlib.suppress(SystemExit):
        main(["serve", "--help"])
    return "--blob-dir" in capsys.readouterr().out


def figures_of(name: str) -> set[str]:
    """What a table of this work shows."""
    return {line.key for line in BENCHMARKS[name].lines if not hasattr(line, "base")}


# A blob -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", [ZEO, OnStock, Zeoid])
def test_a_blob_goes_up_and_down(
    tmp_path: Path, peer: type[Peer], capsys: pytest.CaptureFixture[str]
) -> None:
    if peer is Zeoid and not keeps_blobs(capsys):
        pytest.skip("this `zeoid serve` keeps no blobs yet")
    figures = BENCHMARKS["blob"].run(peer(), tmp_path, True)

    assert set(figures) >= figures_of("blob")
    assert all(math.isfinite(value) for value in figures.values())
    assert all(value > 0 for key, value in figures.items() if key != "growth_mb")
    for kind in ("load", "commit"):
        assert figures[f"{kind}_up_times"] == figures[f"{kind}_up_ms"] / figures[f"{kind}_idle_ms"]
        for window in ("idle", "up", "down"):
            assert figures[f"{kind}_{window}_ms"] <= figures[f"{kind}_{window}_longest_ms"]
    assert figures["up_synced_s"] == figures["up_s"] + figures["sync_s"]


def test_a_blob_that_is_not_what_was_put_in_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    assert blob.write_and_sync(path, 3) > 0
    assert path.stat().st_size == 3 * blob.PIECE_BYTES

    def check() -> None:
        with path.open("rb") as file:
            blob.check(ZEO(), file, 3)

    check()
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(PeerError, match="longer"):
        check()
    data = path.read_bytes()
    piece = blob.PIECE_BYTES
    path.write_bytes(data[:piece] + data[2 * piece : 3 * piece] + data[piece : 2 * piece])
    with pytest.raises(PeerError, match="a piece of the blob"):
        check()


def test_a_server_with_more_than_one_blob_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.blob").touch()
    assert blob.the_blob(ZEO(), tmp_path) == tmp_path / "one.blob"
    (tmp_path / "two.blob").touch()
    with pytest.raises(PeerError, match="2 blobs"):
        blob.the_blob(ZEO(), tmp_path)


def test_there_must_be_room_for_the_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 3 * 30 * blob.PIECE_BYTES

    monkeypatch.setattr(blob.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(PeerError, match="no room"):
        blob.run(ZEO(), tmp_path, True)


# The other client -------------------------------------------------------------------------------------


def test_a_call_belongs_to_every_window_that_it_was_under_way_in() -> None:
    calls = [(0.0, 1.0), (1.5, 2.5), (2.1, 2.2), (2.9, 5.0), (6.0, 6.1)]

    assert during(calls, (2.0, 3.0)) == pytest.approx([100, 1000, 2100])
    assert during(calls, (3.5, 4.0)) == pytest.approx([2100])
    assert during(calls, (5.5, 5.6)) == []


def test_the_other_client_tells_one_in_a_hundred_and_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = [(number, number + 0.001 * (number + 1)) for number in range(200)]
    busy = [(1000 + number, 1000 + number + 0.5) for number in range(10)]
    bystander = object.__new__(Bystander)
    bystander._peer = ZEO()
    bystander._calls = {"load": [*idle, *busy]}

    figures = bystander.figures({"idle": (0, 500), "up": (999, 2000)})

    assert figures["load_idle_ms"] == pytest.approx(199)
    assert figures["load_idle_longest_ms"] == pytest.approx(200)
    assert figures["load_up_times"] == pytest.approx(500 / 199)
    with pytest.raises(PeerError, match="no load of the second client in 'later'"):
        bystander.figures({"idle": (0, 500), "later": (5000, 6000)})


@pytest.mark.parametrize("name", ["zeo", "zeoid"])
def test_the_other_client_loads_from_the_server_and_commits(tmp_path: Path, name: str) -> None:
    peer = PEERS[name]()
    create(tmp_path, 3000, 200)
    with serving(peer, tmp_path) as address:
        client = peer.client(address)
        before = peer.loads(client)
        with Bystander(peer, address, 3000) as bystander:
            tid = client.lastTransaction()
            while client.lastTransaction() == tid:  # until it has committed
                client.sync()
        assert bystander.commits > 0
        loads = peer.loads(client)
        client.close()
    assert before is not None
    assert loads is not None
    assert loads - before >= bystander.loads


def test_another_client_that_runs_out_of_objects_is_an_error(tmp_path: Path) -> None:
    peer = Zeoid()
    create(tmp_path, 1, 200)  # the one that it commits: there is none to load
    with (
        serving(peer, tmp_path) as address,
        pytest.raises(PeerError, match="second client failed"),
        Bystander(peer, address, 1),
    ):
        pass


# Copying ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peer", "absent"), [(InProcess, {"verified", "server"}), (Zeoid, set())])
def test_copying(tmp_path: Path, peer: type[Peer], absent: set[str], capsys: Any) -> None:
    figures = BENCHMARKS["copy"].run(peer(), tmp_path, True)

    assert all(value > 0 for value in figures.values())
    assert {key for key in figures_of("copy") if key.split("_")[0] not in absent} <= set(figures)
    assert not {key for key in figures if key.split("_")[0] in absent}
    records = 30 * copy.RECORDS_A_TRANSACTION
    for leg in {key.split("_")[0] for key in figures}:
        mb_a_record = figures[f"{leg}_mb"] / figures[f"{leg}_rate"]
        assert mb_a_record == pytest.approx(copy.RECORD_BYTES / copy.MB)
        copies = {"server": "server/Data.fs"}
        path = tmp_path / "measured" / copies.get(leg, f"{leg}.fs")
        with contextlib.closing(FileStorage(str(path), read_only=True)) as copied:
            assert len(copied) == records
    assert capsys.readouterr().out == ""  # which is for the figures


def test_a_copy_that_is_not_what_the_source_is_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = FileStorage.restore

    def lie(self: Any, oid: bytes, serial: bytes, data: bytes, *rest: Any) -> None:
        restore(self, oid, serial, b"x" * len(data) if oid == p64(7) else data, *rest)

    monkeypatch.setattr(FileStorage, "restore", lie)
    with pytest.raises(PeerError, match=r"file\.fs is not what the source is"):
        BENCHMARKS["copy"].run(InProcess(), tmp_path, True)


def test_a_copy_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeoid.cli.copy._copy", lambda *_: (1, b""))
    with pytest.raises(PeerError, match="ended with status 1"):
        BENCHMARKS["copy"].run(Zeoid(), tmp_path, True)
