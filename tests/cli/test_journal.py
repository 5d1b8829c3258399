"""`zeoid journal`: the commit journal of a data file as text, while a server writes it or after that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ZODB.utils import p64

from tests.server.processes import Serving, on_loopback
from tests.server.sockets import RawClient, commit
from zeoid.cli import main
from zeoid.model import NO_TID

A, B = p64(1), p64(2)
Serve = Callable[..., Serving]
Refused = Callable[..., str]


@pytest.fixture
def journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """What the command prints; it must succeed, and change nothing."""

    def journal(path: str) -> str:
        monkeypatch.chdir(tmp_path)
        assert main(["journal", path]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    return journal


def test_what_a_server_has_committed(serve: Serve, journal: Callable[[str], str]) -> None:
    """While it runs, and from the data file or from the journal's own directory."""
    address = serve(*on_loopback("Data.fs")).address
    with RawClient(address) as client:
        client.register()
        client.one_way("tpc_begin", 1, b"/ clerk", b"/shop\x1b[2J\n", {}, None, " ")
        client.one_way("storea", A, NO_TID, b"x" * 1234, 1)
        client.call("vote", 1)
        tid = client.call("tpc_finish", 1)
        text = journal("Data.fs")
        for path in ("Data.fs.journal/", "Data.fs.journal"):
            assert tid.hex() in journal(path)
    (line,) = [line for line in text.splitlines() if "user '/ clerk'" in line]
    assert tid.hex() in line
    assert line.endswith(": 1 objects, 1,234 bytes")
    assert "batch of 1 transactions" in text
    assert "base: the data file is durable up to 4 bytes" in text
    assert text.splitlines()[-1].startswith("sound: ")
    assert text.replace("\n", "").isprintable()


def test_the_same_after_a_kill(serve: Serve, journal: Callable[[str], str], tmp_path: Path) -> None:
    serving = serve(*on_loopback("Data.fs"))
    tid = commit(serving.address)
    serving.process.kill()
    serving.wait()
    before = {path: path.read_bytes() for path in tmp_path.glob("Data.fs.journal/*")}
    assert tid.hex() in journal("Data.fs")
    assert {path: path.read_bytes() for path in tmp_path.glob("Data.fs.journal/*")} == before


def test_a_journal_that_is_damaged(serve: Serve, journal: Callable[[str], str], tmp_path: Path) -> None:
    serving = serve(*on_loopback("Data.fs"))
    commit(serving.address)
    serving.stop()
    for path in tmp_path.glob("Data.fs.journal/*"):
        with path.open("r+b") as file:
            file.write(b"\xff" * 8)
    assert "can't be used: " in journal("Data.fs").splitlines()[-1]


def test_no_journal(refused_here: Refused) -> None:
    assert refused_here("journal", "Data.fs") == "there is no journal: Data.fs.journal does not exist"
