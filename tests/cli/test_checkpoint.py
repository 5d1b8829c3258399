"""`zeoid checkpoint`: a live server's data file is complete by itself, and can be backed up."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ZODB.utils import p64

from tests.peers import Peers, environment
from tests.server.processes import Serving, on_loopback, records, run
from tests.server.sockets import Address, Bystander, RawClient, free_port
from zeoid import limits
from zeoid.cli import main

A, B = p64(1), p64(2)
Serve = Callable[..., Serving]
Refused = Callable[..., str]


def shown(address: Address) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def checkpoint(address: Address, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The tid up to which the file is complete, as the command says it."""
    assert main(["checkpoint", *options, shown(address)]) == 0
    said = re.fullmatch(
        r"the data file of storage '(.+)' is complete up to transaction (\w{16})\n", capsys.readouterr().out
    )
    assert said is not None
    assert said[1] == (options[-1] if options else "1")
    return said[2]


def repozo(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "ZODB.scripts.repozo", *arguments],
        cwd=folder, env=environment(), check=True, timeout=60, capture_output=True,
    )  # fmt: skip


def test_a_back_up_of_a_live_server(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """repozo copies the file while commits go on; what was acknowledged before the checkpoint is in the copy,
    which ZODB and a server open without the journal."""
    serving = serve(*on_loopback("Data.fs"))
    (tmp_path / "backup").mkdir()
    oids = [p64(number) for number in range(1, 51)]
    with Bystander(serving.address), RawClient(serving.address) as client:
        client.register()
        tids = [client.commit(oid, oid) for oid in oids]
        assert checkpoint(serving.address, capsys) >= tids[-1].hex()
        repozo(tmp_path, "-B", "-r", "backup", "-f", "Data.fs")
        client.commit(oids[-1], b"later", tids[-1])
    assert serving.stop() == 0
    repozo(tmp_path, "-R", "-r", "backup", "-o", "restored.fs")
    found = records(tmp_path / "restored.fs")
    assert {oid: found[oid] for oid in oids} == {oid: oid for oid in oids}
    again = serve(*on_loopback("restored.fs"))
    with RawClient(again.address) as client:
        assert client.register().call("loadBefore", oids[-1], b"\x7f" + b"\xff" * 7)[0] == oids[-1]


def test_after_it_the_journal_is_not_needed(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = serve(*on_loopback("Data.fs"))
    with RawClient(serving.address) as client:
        tid = client.register().commit(A)
        assert checkpoint(serving.address, capsys) == tid.hex()
        size_bytes = (tmp_path / "Data.fs").stat().st_size
        client.commit(B)
        serving.process.kill()
        serving.wait()
    assert main(["journal", str(tmp_path / "Data.fs")]) == 0
    assert f"base: the data file is durable up to {size_bytes:,} bytes with {tid.hex()}" in (
        capsys.readouterr().out
    )


def test_the_storage_can_be_chosen(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "server.conf").write_text(
        """
        <zeo>
          address 127.0.0.1:0
        </zeo>
        <filestorage zoo>
          path zoo.fs
        </filestorage>
        <mappingstorage>
        </mappingstorage>
        """
    )
    serving = serve("-C", "server.conf")
    with RawClient(serving.address) as client:
        tid = client.register("zoo").commit(A)
    assert checkpoint(serving.address, capsys, "--storage", "zoo") == tid.hex()
    assert checkpoint(serving.address, capsys) == "0" * 16


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command does not wait long for a server."""
    monkeypatch.setattr(limits, "CONNECT_TIMEOUT_S", 1.0)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there(refused_here: Refused) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert address in refused_here("checkpoint", address)


def test_a_storage_that_is_not_there(serve: Serve, refused_here: Refused) -> None:
    address = shown(serve(*on_loopback("--memory")).address)
    assert "nosuch" in refused_here("checkpoint", "-S", "nosuch", address)


def test_what_is_no_address(refused_here: Refused) -> None:
    assert "no address" in refused_here("checkpoint", "nowhere")


def test_a_stock_server_knows_no_checkpoint(peers: Peers, refused_here: Refused) -> None:
    server = peers.server("stock")
    assert refused_here("checkpoint", shown(server.address)) == (
        "no checkpoint was made: this server knows no checkpoints"
    )


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_read_only(serve: Serve, refused_here: Refused) -> None:
    serve(*on_loopback("Data.fs")).stop()
    address = shown(serve("--read-only", *on_loopback("Data.fs")).address)
    assert "read" in refused_here("checkpoint", address)


def test_it_is_a_command(serve: Serve, tmp_path: Path) -> None:
    address = shown(serve(*on_loopback("Data.fs")).address)
    done = run("checkpoint", address, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
