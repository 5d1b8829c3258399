"""`zeoid recover`: a data file that is complete by itself after a crash, or has a journal of another time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ZODB.POSException import StorageTransactionError
from ZODB.utils import p64

from tests.server.processes import Serving, on_loopback, records, run
from tests.server.sockets import RawClient, commit, load
from zeoid import limits
from zeoid.cli import main
from zeoid.model import NO_TID

A, B, C = p64(1), p64(2), p64(3)
#: An empty data file: its magic number.
EMPTY_BYTES = 4
Serve = Callable[..., Serving]
Refused = Callable[..., str]
Recover = Callable[..., list[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "Data.fs"


@pytest.fixture
def recover(tmp_path: Path) -> Recover:
    """Runs the command, which must succeed, and returns what it said."""

    def recover(*arguments: object) -> list[str]:
        done = run("recover", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        # ZODB complains of the index of every data file that is shorter than 100 bytes.
        return [line for line in said if not line.startswith("Ignoring index")]

    return recover


def crash(serve: Serve, *oids: bytes) -> list[bytes]:
    """A server that is killed in the middle of its work: the tids that it has acknowledged."""
    serving = serve(*on_loopback("Data.fs"))
    with RawClient(serving.address) as client:
        client.register()
        tids = [client.commit(oid, b"data of %s" % oid) for oid in oids]
        client.prepare(p64(1000), b"never")
        serving.process.kill()
        serving.wait()
    return tids


def lose_what_was_not_synced(path: Path, kept_bytes: int = EMPTY_BYTES) -> None:
    """As a power cut may: of what was appended to the data file, nothing or a part is there."""
    os.truncate(path, kept_bytes)


# After a crash --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["all", "nothing", "half a transaction"])
def test_after_a_crash_the_file_gets_what_was_acknowledged(
    serve: Serve, recover: Recover, path: Path, kept: str
) -> None:
    """The file alone is enough then: for a stock server, and without the journal."""
    oids = [p64(number) for number in range(1, 30)]
    tids = crash(serve, *oids)
    if kept != "all":
        lose_what_was_not_synced(path, EMPTY_BYTES if kept == "nothing" else path.stat().st_size - 50)
    said = recover("Data.fs")
    assert said[0] == f"Data.fs is complete: its last transaction is {tids[-1].hex()}"
    assert f"{path} was not closed: 29 transactions are written to it again from its journal" in said
    shutil.rmtree(f"{path}.journal")
    assert records(path) == {oid: b"data of %s" % oid for oid in oids}


def test_the_outcome_is_known_after_a_crash(serve: Serve, path: Path) -> None:
    """Of what was committed, and of what was prepared when the server was killed: that never will be."""
    serving = serve(*on_loopback("Data.fs"))
    begin = (b"", b"", {}, None, " ")
    with RawClient(serving.address) as client:
        client.register().call("tpc_prepare", b"one", begin, [(0, A, NO_TID, b"data", None)])
        tid = client.call("tpc_finish", b"one")
        client.call("tpc_prepare", b"two", begin, [(0, B, NO_TID, b"data", None)])
        serving.process.kill()
        serving.wait()
    lose_what_was_not_synced(path)
    again = serve(*on_loopback("Data.fs"))
    with RawClient(again.address) as client:
        client.register()
        assert client.call("outcome", b"one", NO_TID) == tid
        assert client.call("outcome", b"two", NO_TID) is None
        with pytest.raises(StorageTransactionError):
            client.call("tpc_finish", b"two")


def test_a_server_recovers_by_itself(serve: Serve, path: Path) -> None:
    tids = crash(serve, A, B)
    lose_what_was_not_synced(path)
    again = serve(*on_loopback("Data.fs"))
    assert load(again.address, A) == (b"data of " + A, tids[0], None)
    assert commit(again.address, C) > tids[-1]
    assert any("2 transactions are written to it again" in line for line in again.lines)


def test_nothing_is_to_be_done_after_a_clean_stop(serve: Serve, recover: Recover, path: Path) -> None:
    serving = serve(*on_loopback("Data.fs"))
    tid = commit(serving.address)
    assert serving.stop() == 0
    assert recover("Data.fs") == [f"Data.fs is complete: its last transaction is {tid.hex()}"]
    assert records(path) == {A: b"data"}


def test_a_crash_of_a_server_without_commits(serve: Serve, recover: Recover, path: Path) -> None:
    crash(serve)
    (line,) = recover("Data.fs")
    assert line == f"Data.fs is complete: its last transaction is {'0' * 16}"
    assert records(path) == {}


def test_recovering_twice_does_no_harm(serve: Serve, recover: Recover, path: Path) -> None:
    crash(serve, A)
    lose_what_was_not_synced(path)
    first = recover("Data.fs")
    assert recover("Data.fs") == first[:1]
    assert records(path) == {A: b"data of " + A}


def test_a_data_file_of_a_stock_server_gets_a_journal(serve: Serve, recover: Recover, path: Path) -> None:
    serving = serve(*on_loopback("Data.fs"))
    tid = commit(serving.address)
    serving.stop()
    shutil.rmtree(f"{path}.journal")
    assert recover("Data.fs") == [f"Data.fs is complete: its last transaction is {tid.hex()}"]


# What is refused ------------------------------------------------------------------------------------------


def test_a_data_file_in_use(serve: Serve, refused: Refused) -> None:
    address = serve(*on_loopback("Data.fs")).address
    assert "in use by another process" in refused("recover", "Data.fs")
    assert "in use by another process" in refused("recover", "--trust-data-file", "Data.fs")
    assert commit(address)


@pytest.mark.parametrize("options", [[], ["--trust-data-file"]], ids=["", "trust"])
def test_no_data_file(refused_here: Refused, tmp_path: Path, options: list[str]) -> None:
    line = refused_here("recover", *options, "Data.fs")
    assert line.startswith("Data.fs does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--trust-data-file"]], ids=["", "trust"])
def test_a_journal_without_its_data_file(
    serve: Serve, refused_here: Refused, path: Path, options: list[str]
) -> None:
    crash(serve, A)
    path.unlink()
    assert "Data.fs does not exist" in refused_here("recover", *options, "Data.fs")
    assert Path(f"{path}.journal").is_dir()
    assert not path.exists()


def test_a_reader_does_not_recover(serve: Serve, refused_here: Refused, recover: Recover, path: Path) -> None:
    """It would not see what is in the journal only."""
    (tid,) = crash(serve, A)
    line = refused_here("serve", "--read-only", *on_loopback("Data.fs"))
    assert "`zeoid recover" in line
    recover("Data.fs")
    assert load_read_only(serve, path) == (b"data of " + A, tid, None)


def load_read_only(serve: Serve, path: Path) -> object:
    serving = serve("--read-only", *on_loopback(path))
    with RawClient(serving.address) as client:
        return client.register(read_only=True).call("loadBefore", A, b"\x7f" + b"\xff" * 7)


# A back-up beside a journal of another time ---------------------------------------------------------------


@pytest.fixture
def restored(serve: Serve, path: Path) -> bytes:
    """A is in the back-up, which has been restored; B is in the journal only. The tid of A."""
    serving = serve(*on_loopback("Data.fs"))
    tid = commit(serving.address, A)
    assert serving.stop() == 0
    backup = path.read_bytes()
    serving = serve(*on_loopback("Data.fs"))
    commit(serving.address, C)
    assert serving.stop() == 0  # the journal says now that the file has to have C
    crash(serve, B)
    path.write_bytes(backup)
    Path(f"{path}.index").unlink(missing_ok=True)
    return tid


@pytest.mark.parametrize(
    "command", [["recover", "Data.fs"], ["serve", *on_loopback("Data.fs")]], ids=" ".join
)
def test_a_restored_back_up_is_refused(
    restored: bytes, refused_here: Refused, path: Path, command: list[str]
) -> None:
    """With the command that settles it, and what that costs; and nothing is changed."""
    before = path.read_bytes()
    line = refused_here(*command)
    assert "is not the file that its journal was written for" in line
    assert "Was a back-up restored?" in line
    assert f"`zeoid recover --trust-data-file {path}`" in line
    assert "with 1 transactions that only it has" in line
    assert path.read_bytes() == before


def test_a_restored_back_up_is_trusted(
    restored: bytes, serve: Serve, recover: Recover, path: Path, tmp_path: Path
) -> None:
    moved, complete = recover("--trust-data-file", "Data.fs")
    assert complete == f"Data.fs is complete: its last transaction is {restored.hex()}"
    aside = re.fullmatch(r"the journal was moved to (.+)", moved)
    assert aside is not None
    assert Path(aside[1]).parent == tmp_path
    assert any(Path(aside[1]).iterdir())
    assert records(path) == {A: b"data"}
    again = serve(*on_loopback("Data.fs"))
    assert commit(again.address, B) > restored


def test_trust_where_there_is_no_journal(serve: Serve, recover: Recover, path: Path) -> None:
    serving = serve(*on_loopback("Data.fs"))
    commit(serving.address)
    serving.stop()
    shutil.rmtree(f"{path}.journal")
    assert recover("--trust-data-file", "Data.fs")[0] == "Data.fs: there is no journal"


def test_a_journal_that_is_damaged_is_refused_and_can_be_set_aside(
    serve: Serve, refused_here: Refused, recover: Recover, path: Path
) -> None:
    crash(serve, A)
    (segment,) = [file for file in Path(f"{path}.journal").iterdir() if b"data of " + A in file.read_bytes()]
    with segment.open("r+b") as file:
        file.write(b"\xff" * 8)
    for command in (["recover", "Data.fs"], ["serve", *on_loopback("Data.fs")]):
        assert "zeoid recover --trust-data-file" in refused_here(*command)
    recover("--trust-data-file", "Data.fs")
    assert records(path) == {A: b"data of " + A}


# Stopping cleanly -----------------------------------------------------------------------------------------


def test_after_a_clean_stop_the_file_alone_is_enough(serve: Serve, path: Path) -> None:
    """For a stock server, for repozo: all that was committed, and not a byte that was reserved ahead."""
    serving = serve(*on_loopback("Data.fs"))
    with RawClient(serving.address) as client, RawClient(serving.address) as other:
        client.register()
        other.register()
        oids = [p64(number) for number in range(1, 101)]
        for oid in oids:
            (client if oid[-1] % 2 else other).commit(oid, oid)
        client.prepare(p64(1000), b"never")
        assert serving.stop() == 0
    size_bytes = path.stat().st_size
    assert path.stat().st_blocks * 512 < limits.RESERVE_BYTES / 2
    shutil.rmtree(f"{path}.journal")
    assert records(path) == {oid: oid for oid in oids}
    assert path.stat().st_size == size_bytes


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recover", "--help"])
    assert "--trust-data-file" in capsys.readouterr().out
