"""`zeoid pack`: a bar that tells the truth, giving up, a server that can't tell, and how it ends."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import StorageError
from ZODB.utils import z64

import zeoid
from tests.engines.datafiles import record
from tests.peers import Peers
from tests.server.processes import Serving, on_loopback, run
from tests.server.sockets import Address, RawClient, free_port
from zeoid import limits
from zeoid.cli import connecting, main
from zeoid.cli.pack import Display, bar, told
from zeoid.errors import Disconnected, ServerError
from zeoid.server.packing import Pack

Serve = Callable[..., Serving]
Refused = Callable[..., str]
Output = pytest.CaptureFixture[str]
WAIT_S = 30.0
PACKED = re.compile(r"storage '(.+)' is packed: ([\d,]+) bytes before, ([\d,]+) after, in \d+\.\d s\n")


def shown(address: Any) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def fill(address: Address, storage: str = "1") -> None:
    """A root that is overwritten several times."""
    with RawClient(address) as client:
        client.register(storage)
        tid = z64
        for number in range(5):
            tid = client.commit(z64, record(b"%d" % number * 500), tid)


def sizes(printed: str) -> tuple[int, int]:
    said = PACKED.fullmatch(printed)
    assert said is not None, printed
    return int(said[2].replace(",", "")), int(said[3].replace(",", ""))


def status(**given: Any) -> dict[str, Any]:
    return {
        "number": 1, "state": "running", "time": 0.0, "phase": "reading", "percent": 50.0, "objects": 0,
        "objects_total": 0, "bytes": 1_000_000, "bytes_total": 2_000_000, "size_before": 3000,
        "size_after": 0, "seconds": 1234.5, "can_cancel": True, "cancelling": False, "error": "", **given,
    }  # fmt: skip


# The bar ----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_as_long_as_the_percentage() -> None:
    for percent in range(101):
        drawn = re.match(r"\[(#*)(\.*)\]  *(\d+) % ", bar(status(percent=float(percent))))
        assert drawn is not None
        assert len(drawn[1] + drawn[2]) == 30
        assert len(drawn[1]) == percent * 30 // 100
        assert int(drawn[3]) == percent


def test_a_bar_is_full_at_the_end_only() -> None:
    almost = bar(status(percent=99.9))
    assert "." in almost.partition("]")[0]
    assert " 99 %" in almost


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "50 %  reading  1 of 2 MB  1,234 s"),
        ({"phase": "tracing", "objects": 9, "objects_total": 1234}, "50 %  tracing  9 of 1,234 objects  "),
        ({"cancelling": True}, "50 %  cancelling  "),
        ({"phase": "packing", "percent": None, "bytes_total": 0}, "packing  1,234 s"),
        (
            {"state": "done", "percent": 100.0, "phase": "copying", "objects": 1000, "objects_total": 1234},
            "100 %  done  1,000 of 1,234 objects stay  1,234 s",
        ),
        ({"state": "done", "percent": 100.0, "objects_total": 1234}, "100 %  done  1,234 s"),
    ],
)  # fmt: skip
def test_how_far_it_is_in_words(given: dict[str, Any], words: str) -> None:
    assert told(status(**given)).strip().startswith(words)


def test_what_can_t_be_known_is_no_bar() -> None:
    assert bar(status(percent=None)) == told(status(percent=None))
    assert "%" not in bar(status(percent=None))


def test_on_a_terminal_one_line_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    display = Display(stream)
    display.show(status(percent=10.0))
    display.show(status(percent=20.0))
    display.clear()
    written = stream.getvalue()
    assert "\n" not in written
    first, second, last = written.split("\r\x1b[K")[1:]
    assert (first, second, last) == (
        bar(status(percent=10.0))[:39], bar(status(percent=20.0))[:39], ""
    )  # fmt: skip


def test_a_terminal_keeps_the_full_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = status(state="done", percent=100.0, objects=7, objects_total=9)
    stream = Terminal()
    display = Display(stream)
    display.show(status(percent=99.9))
    display.clear()
    display.finish(done)
    assert stream.getvalue().endswith(f"\r\x1b[K\r\x1b[K{bar(done)}\n")
    assert bar(done) == f"[{'#' * 30}] 100 %  done  7 of 9 objects stay  1,234 s"


def test_elsewhere_the_end_is_no_bar() -> None:
    stream = io.StringIO()
    Display(stream).finish(status(state="done", percent=100.0))
    assert stream.getvalue() == ""


def test_elsewhere_there_is_a_line_now_and_then() -> None:
    now_s = 0.0
    stream = io.StringIO()
    display = Display(stream, lambda: now_s)
    for percent in range(100):
        now_s += 0.25
        display.show(status(percent=float(percent)))
    display.clear()
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["39", "79"]


# What it does with what a server says -----------------------------------------------------------------


class Scripted:
    """In the place of a client: its server says one thing after the other."""

    def __init__(self, *said: Any) -> None:
        self.said = list(said)
        self.asked: list[Any] = []
        self.refusal: Exception | None = None

    def __call__(self, address: str, storage: str, **options: Any) -> Scripted:
        return self

    def pack_status(self) -> Any:
        said = self.said.pop(0)
        if isinstance(said, BaseException):
            raise said
        return said

    def pack(self, days: float, wait: bool) -> None:
        self.asked.append(("pack", days, wait))
        if self.refusal is not None:
            raise self.refusal

    def cancel_pack(self) -> None:
        self.asked.append("cancel")
        if self.refusal is not None:
            raise self.refusal

    def getSize(self) -> int:
        return 7000

    def __len__(self) -> int:
        return 1

    def close(self) -> None:
        self.asked.append("close")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    monkeypatch.setattr(limits, "PACK_POLL_S", 0.0)

    def scripted(*said: Any) -> Scripted:
        server = Scripted(*said)
        monkeypatch.setattr(connecting, "ClientStorage", server)
        return server

    return scripted


DONE = status(state="done", percent=100.0, size_after=1000, seconds=12.3)
BEFORE = {"number": 0, "state": "none"}


def test_a_pack_is_followed_to_its_end(scripted: Callable[..., Scripted], capsys: Output) -> None:
    server = scripted(BEFORE, status(percent=1.0), status(percent=2.0), DONE)
    assert main(["pack", "zoo:1", "--days", "1.5"]) == 0
    assert server.asked == [("pack", 1.5, False), "close"]
    assert capsys.readouterr() == ("storage '1' is packed: 3,000 bytes before, 1,000 after, in 12.3 s\n", "")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (status(state="failed", error="OSError: full"), "the pack failed: OSError: full"),
        (status(state="cancelled"), "the pack was cancelled; the storage is as it was before"),
        (BEFORE, "the server was started anew, and does not know how the pack ended"),
        (status(number=2), "the server was started anew, and does not know how the pack ended"),
        (None, "the server was started anew, and does not know how the pack ended"),
        (Disconnected("gone"), "it is not known how the pack ended: gone"),
    ],
)
def test_a_pack_that_is_not_done(
    scripted: Callable[..., Scripted], capsys: Output, said: Any, words: str
) -> None:
    scripted(BEFORE, status(), said)
    assert main(["pack", "zoo:1"]) == 1
    assert capsys.readouterr() == ("", f"zeoid: {words}\n")


def test_a_pack_that_is_refused(scripted: Callable[..., Scripted], capsys: Output) -> None:
    scripted(DONE).refusal = StorageError("a pack of this storage is under way")
    assert main(["pack", "zoo:1"]) == 2
    assert capsys.readouterr() == ("", "zeoid: no pack was begun: a pack of this storage is under way\n")


def test_who_does_not_wait_is_told_that_it_was_begun(
    scripted: Callable[..., Scripted], capsys: Output
) -> None:
    server = scripted(BEFORE)
    assert main(["pack", "zoo:1", "--no-wait", "-S", "zoo"]) == 0
    assert server.asked == [("pack", 0.0, False), "close"]
    assert capsys.readouterr() == ("the server packs storage 'zoo'\n", "")


@pytest.mark.parametrize(("options", "named"), [([], ""), (["-S", "zoo"], " -S zoo")])
def test_an_interrupt_leaves_the_pack_running(
    scripted: Callable[..., Scripted], capsys: Output, options: list[str], named: str
) -> None:
    server = scripted(BEFORE, status(), KeyboardInterrupt())
    assert main(["pack", "zoo:1", *options]) == 130
    assert server.asked == [("pack", 0.0, False), "close"]
    how = f"zeoid pack --cancel{named} zoo:1"
    assert capsys.readouterr() == ("", f"the server goes on packing; to stop that: {how}\n")


def test_an_interrupt_where_nothing_can_be_cancelled(
    scripted: Callable[..., Scripted], capsys: Output
) -> None:
    scripted(None).refusal = KeyboardInterrupt()  # type: ignore[assignment]
    assert main(["pack", "zoo:1"]) == 130
    assert capsys.readouterr().err.endswith("\nthe server goes on packing; it can't be told to stop\n")


def test_a_pack_that_fails_on_a_server_that_tells_nothing(
    scripted: Callable[..., Scripted], capsys: Output
) -> None:
    scripted(None).refusal = ServerError("full")
    assert main(["pack", "zoo:1"]) == 1
    assert capsys.readouterr().err.endswith("\nzeoid: the pack failed: full\n")


@pytest.mark.parametrize(
    ("refusal", "said", "printed"),
    [
        (None, [status(), status(state="cancelled")], None),
        (None, [status(), DONE], "the pack had ended before it could be cancelled"),
        (StorageError("no pack is under way"), [], "no pack is under way"),
        (ServerError("this server can't cancel a pack"), [], "this server can't cancel a pack"),
    ],
)
def test_cancelling(
    scripted: Callable[..., Scripted], capsys: Output, refusal: Any, said: list[Any], printed: str | None
) -> None:
    server = scripted(*said)
    server.refusal = refusal
    assert main(["pack", "--cancel", "zoo:1"]) == (0 if printed is None else 1)
    assert server.asked == ["cancel", "close"]
    if printed is None:
        expected = ("the pack of storage '1' was cancelled; the storage is as it was before\n", "")
    else:
        expected = ("", f"zeoid: {printed}\n")
    assert capsys.readouterr() == expected


def test_cancelling_without_waiting(scripted: Callable[..., Scripted], capsys: Output) -> None:
    scripted()
    assert main(["pack", "--cancel", "--no-wait", "zoo:1"]) == 0
    assert capsys.readouterr() == ("the server gives up the pack of storage '1'\n", "")


@pytest.mark.parametrize("days", ["-1", "soon", "nan", "1e9"])
def test_days_that_are_none(capsys: Output, days: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pack", "zoo:1", f"--days={days}"])
    assert caught.value.code == 2
    assert "no number of days" in capsys.readouterr().err


# Real servers -----------------------------------------------------------------------------------------


def test_a_server_is_packed(serve: Serve, tmp_path: Path, capsys: Output) -> None:
    address = serve(*on_loopback("Data.fs")).address
    fill(address)
    assert main(["pack", shown(address), "-d", "1"]) == 0
    before, after = sizes(capsys.readouterr().out)
    assert before == after  # all of it is younger than a day
    assert main(["pack", shown(address)]) == 0
    before, after = sizes(capsys.readouterr().out)
    assert after < before / 3
    with RawClient(address) as client:
        assert client.register().call("loadBefore", z64, b"\x7f" + b"\xff" * 7)[0] == record(b"4" * 500)


def test_it_is_a_command(serve: Serve, tmp_path: Path) -> None:
    address = serve(*on_loopback("Data.fs")).address
    fill(address)
    done = run("pack", shown(address), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sizes(done.stdout)


def test_a_storage_that_packs_by_itself(serve: Serve, capsys: Output) -> None:
    address = serve(*on_loopback("--memory")).address
    fill(address)
    assert main(["pack", shown(address)]) == 0
    assert PACKED.fullmatch(capsys.readouterr().out)


@pytest.mark.parametrize("options", [[], ["--no-wait"]])
def test_a_stock_server(peers: Peers, capsys: Output, options: list[str]) -> None:
    server = peers.server("stock")
    with RawClient(server.address) as client:
        client.register().commit(z64, record(b"1" * 500))
    assert main(["pack", shown(server.address), *options]) == 0
    printed = capsys.readouterr()
    if options:
        assert printed == ("the server packs storage '1'\n", "")
    else:
        assert sizes(printed.out)
        assert printed.err == "packing; this server does not tell how far it is …\n"
    assert main(["pack", "--cancel", shown(server.address)]) == 1
    assert capsys.readouterr().err == "zeoid: this server can't cancel a pack\n"


class Gate:
    """A pack that goes on when it is told to, or not to."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.may_go_on = threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    report, cancel = Pack.report, Pack.cancel

    def slow(self: Pack, step: Any) -> None:
        gate.reached.set()
        assert gate.may_go_on.wait(WAIT_S)
        report(self, step)

    def prompt(self: Pack) -> Any:
        refusal = cancel(self)
        gate.may_go_on.set()
        return refusal

    monkeypatch.setattr(Pack, "report", slow)
    monkeypatch.setattr(Pack, "cancel", prompt)
    yield gate
    gate.may_go_on.set()


def test_one_packs_and_another_one_cancels(gate: Gate, tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "Data.fs"
    statuses: list[int] = []
    with zeoid.serve(path) as server:
        fill((server.address.host, server.address.port))  # type: ignore[union-attr]
        packing = threading.Thread(target=lambda: statuses.append(main(["pack", str(server.address)])))
        packing.start()
        assert gate.reached.wait(WAIT_S)
        size = path.stat().st_size
        assert main(["pack", "--cancel", str(server.address)]) == 0
        packing.join(WAIT_S)
        assert statuses == [1]
        assert path.stat().st_size == size
    printed = capsys.readouterr()
    assert "was cancelled" in printed.out
    assert "zeoid: the pack was cancelled" in printed.err
    assert not Path(f"{path}.pack").exists()


def test_a_server_that_is_not_there(refused_here: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECT_TIMEOUT_S", 1.0)
    address = f"127.0.0.1:{free_port()}"
    assert address in refused_here("pack", address)


def test_a_server_that_is_read_only(
    serve: Serve, refused_here: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECT_TIMEOUT_S", 1.0)
    serve(*on_loopback("Data.fs")).stop()
    address = shown(serve("--read-only", *on_loopback("Data.fs")).address)
    assert "read" in refused_here("pack", address)
