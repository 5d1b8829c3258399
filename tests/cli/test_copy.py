"""`zeoid copy`: between every kind of storage, to the end, or to any other end and then on from there."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage

from tests.admin.databases import Site, contents_of_file, write_history, write_pages
from tests.peers import Kind, Peers, Server, die_with_parent, environment
from tests.server.processes import root_logger_restored, run
from zeoid import limits
from zeoid.admin.copying import Stopped, Tally
from zeoid.cli import main
from zeoid.cli.copy import Progress

Refused = Callable[..., str]
TIMEOUT_S = 60.0


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A closed database with everything in it, and blobs."""
    site = Site(tmp_path)
    write_history(site)
    site.close()
    return site


@pytest.fixture
def pages(tmp_path: Path) -> Site:
    """A closed database without blobs, of eleven transactions."""
    site = Site(tmp_path, blobs=False)
    write_pages(site, 10)
    site.close()
    return site


def copy(*arguments: object) -> int:
    with root_logger_restored():
        return main(["copy", *map(str, arguments)])


def address(server: Server) -> str:
    return "{}:{}".format(*server.address)


def with_blobs(site: Site, name: str = "copy") -> list[object]:
    """Source, destination, and the blob directories of both."""
    folder = site.path.parent
    return [
        site.path, folder / f"{name}.fs",
        "--source-blobs", site.blobs, "--destination-blobs", folder / f"{name}-blobs",
    ]  # fmt: skip


# From storage to storage ------------------------------------------------------------------------------


def test_the_command(site: Site, tmp_path: Path) -> None:
    done = run("copy", *with_blobs(site), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    expected = contents_of_file(site.path, site.blobs)
    count = len(expected)
    copied, verified = done.stdout.splitlines()
    figures = rf"copied {count} transactions, 2\d records, 4 blobs, 3\.\d MB in \d+\.\d s \([\d,]+ records/s,"
    assert re.match(figures, copied)
    assert verified == f"verified: {count} transactions are equal in both"
    assert (tmp_path / "copy.fs").read_bytes() == site.path.read_bytes()
    assert contents_of_file(tmp_path / "copy.fs", tmp_path / "copy-blobs") == expected


@pytest.mark.parametrize("second", ["zeoid", "stock"])
@pytest.mark.parametrize("first", ["zeoid", "stock"])
def test_through_two_servers(
    tmp_path: Path, peers: Peers, first: Kind, second: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file, a server, another one, and a file again; the last step with ZEO's own client."""
    site = Site(tmp_path, "original", blobs=False)
    write_history(site)
    site.close()
    servers = [peers.server(first), peers.server(second, coding="Z5")]
    back = tmp_path / "back.fs"
    assert copy(site.path, address(servers[0])) == 0
    assert copy(address(servers[0]), f"zeoid://{address(servers[1])}?storage=1") == 0
    assert copy(f"zeo://{address(servers[1])}", back) == 0
    expected = contents_of_file(site.path)
    assert contents_of_file(back) == expected
    assert capsys.readouterr().out.count(f"verified: {len(expected)} transactions are equal in both\n") == 3
    for server in servers:
        server.stop()
        assert contents_of_file(server.data_file) == expected


def test_blobs_of_a_stock_server(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They come through ZEO's own client and its blob cache; its protocol can't bring them there."""
    server = Server("stock", tmp_path / "server", blobs="bushy")
    server.folder.mkdir()
    server_blobs = server.blob_dir("1")
    blobs = "--source-blobs", site.blobs, "--destination-blobs", server_blobs
    assert copy(site.path, server.data_file, *blobs) == 0
    server.start()
    try:
        uri = f"zeo://{address(server)}?blob_dir={tmp_path}/cache"
        assert copy(uri, tmp_path / "copy.fs", "--destination-blobs", tmp_path / "copy-blobs") == 0
        capsys.readouterr()
        new = Site(tmp_path)
        new.commit(more=new.blob(b"more"))
        new.close()
        assert copy(site.path, uri, "--source-blobs", site.blobs) == 1
        assert f"is a blob, and {uri} can't take it" in capsys.readouterr().err
    finally:
        server.stop()
    expected = contents_of_file(site.path, site.blobs)[:-1]
    assert contents_of_file(tmp_path / "copy.fs", tmp_path / "copy-blobs") == expected
    assert contents_of_file(server.data_file, server_blobs) == expected


#: The class that each leg of the chain writes to, and how its setup gets it.
FILE = "FileStorage"
CLIENT = "__import__('zeoid').ClientStorage"
RELSTORAGE = "__import__('relstorage.storage').storage.RelStorage"


@pytest.mark.parametrize("killed", [None, FILE, CLIENT, RELSTORAGE], ids=["whole", "file", "server", "sql"])
def test_the_whole_chain(site: Site, tmp_path: Path, peers: Peers, killed: str | None) -> None:
    """ZEO's server, a file, our server, a database, and a file again; nothing is another in the end.

    One of the legs is killed in the middle of its eighth commit, and then gone on with.
    """
    stock = Server("stock", tmp_path / "stock", blobs="bushy")
    stock.folder.mkdir()
    assert copy(site.path, stock.data_file, "--source-blobs", site.blobs, "--destination-blobs",
                stock.blob_dir()) == 0  # fmt: skip
    ours = peers.server("zeoid", blobs="bushy")
    (tmp_path / "sql.conf").write_text(
        f"%import relstorage\n<relstorage>\nkeep-history true\nblob-dir {tmp_path}/sql-blobs\n"
        f"<sqlite3>\ndata-dir {tmp_path}/sql\n</sqlite3>\n</relstorage>\n"
    )

    def leg(kind: str, source: object, destination: object, *blobs: object) -> None:
        if kind == killed:
            setup = f"at({kind}, 'tpc_finish', 8, send(signal.SIGKILL))"
            assert copy_with(setup, source, destination, *blobs).returncode == -signal.SIGKILL
        assert copy(source, destination, *blobs) == 0

    def ours_with(cache: str) -> str:
        return f"zeoid://{address(ours)}?blob_dir={tmp_path}/{cache}"

    first, last = tmp_path / "first.fs", tmp_path / "last.fs"
    first_blobs, last_blobs = tmp_path / "first-blobs", tmp_path / "last-blobs"
    stock.start()
    try:
        leg(
            FILE, f"zeo://{address(stock)}?blob_dir={tmp_path}/stock-cache", first,
            "--destination-blobs", first_blobs,
        )  # fmt: skip
    finally:
        stock.stop()
    leg(CLIENT, first, ours_with("up"), "--source-blobs", first_blobs)
    leg(RELSTORAGE, ours_with("down"), tmp_path / "sql.conf")
    leg("", tmp_path / "sql.conf", last, "--destination-blobs", last_blobs)
    ours.stop()
    expected = contents_of_file(site.path, site.blobs)
    assert contents_of_file(ours.data_file, ours.blob_dir()) == expected
    assert contents_of_file(last, last_blobs) == expected


def test_by_uris(site: Site, tmp_path: Path) -> None:
    source = f"file://{site.path}?blobstorage_dir={site.blobs}"
    assert copy(source, f"file://{tmp_path}/copy.fs?blobstorage_dir={tmp_path}/copy-blobs") == 0
    assert contents_of_file(tmp_path / "copy.fs", tmp_path / "copy-blobs") == contents_of_file(
        site.path, site.blobs
    )
    assert (tmp_path / "copy.fs").read_bytes() == site.path.read_bytes()


def test_by_configuration_files(site: Site, tmp_path: Path) -> None:
    (tmp_path / "from.conf").write_text(
        f"<filestorage>\npath {site.path}\nblob-dir {site.blobs}\n</filestorage>"
    )
    (tmp_path / "to.conf").write_text(
        f"<zodb>\n<filestorage>\npath {tmp_path}/copy.fs\nblob-dir {tmp_path}/copy-blobs\n</filestorage>\n"
        "</zodb>\n"
    )
    assert copy(tmp_path / "from.conf", tmp_path / "to.conf") == 0
    assert (tmp_path / "copy.fs").read_bytes() == site.path.read_bytes()


def test_a_site_that_is_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Most of it is copied while it runs, and what came meanwhile when it has stopped."""
    site = Site(tmp_path)
    write_history(site)
    assert copy(*with_blobs(site)) == 0
    site.commit(page=site.blob(b"written meanwhile"))
    write_pages(site, 2)
    site.close()
    capsys.readouterr()
    assert copy(*with_blobs(site)) == 0
    told = capsys.readouterr()
    assert told.out.startswith("copied 3 transactions, 6 records, 1 blobs, ")
    assert re.search(r"going on after transaction \w{16} \(20.* UTC\), which .*copy.fs has already", told.err)
    assert (tmp_path / "copy.fs").read_bytes() == site.path.read_bytes()
    assert copy(*with_blobs(site)) == 0
    told = capsys.readouterr()
    assert re.match(r"nothing to copy: .*copy.fs has all transactions up to \w{16} \(", told.out)


def test_a_blob_that_is_missing(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blob = min(path for path in site.blobs.rglob("*.blob"))
    blob.unlink()
    assert copy(*with_blobs(site)) == 1
    assert "is missing; if it is lost, --allow-missing-blobs" in capsys.readouterr().err
    assert copy(*with_blobs(site), "--allow-missing-blobs") == 0
    told = capsys.readouterr().out
    assert "1 blobs are missing in the source: the blob of object 0" in told
    assert "verified: " in told


# Verification -----------------------------------------------------------------------------------------


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> None:
    """FileStorage stores other data than it is given, in one transaction."""
    restore = FileStorage.restore

    def lie(self: Any, oid: bytes, serial: bytes, data: bytes, *rest: Any) -> None:
        restore(self, oid, serial, data.replace(b"page 3", b"page 4"), *rest)

    monkeypatch.setattr(FileStorage, "restore", lie)


@pytest.mark.usefixtures("lying")
def test_a_copy_that_differs(pages: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copy(pages.path, tmp_path / "copy.fs") == 1
    told = capsys.readouterr()
    *differing, total = told.err.splitlines()
    assert total == "zeoid: 1 transactions differ, 10 are equal"
    (line,) = differing
    assert re.fullmatch(r"zeoid: transaction \w{16} \(20.* UTC\): object \w{16} differs", line)
    assert "verified" not in told.out


@pytest.mark.usefixtures("lying")
def test_no_verification(pages: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copy("--no-verify", pages.path, tmp_path / "copy.fs") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_differences_are_told_up_to_a_bound(
    pages: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "COPY_TOLD", 2)
    restore = FileStorage.restore

    def lie(self: Any, oid: bytes, serial: bytes, data: bytes, *rest: Any) -> None:
        restore(self, oid, serial, b"x" + data, *rest)

    monkeypatch.setattr(FileStorage, "restore", lie)
    assert copy(pages.path, tmp_path / "copy.fs") == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


# What is refused --------------------------------------------------------------------------------------


def test_the_same_twice(pages: Site, refused_here: Refused) -> None:
    assert refused_here("copy", pages.path, pages.path) == "source and destination are the same"


def test_the_same_by_another_name(pages: Site, refused_here: Refused, tmp_path: Path) -> None:
    (tmp_path / "link.fs").symlink_to(pages.path)
    assert refused_here("copy", pages.path, tmp_path / "link.fs") == "source and destination are the same"


def test_a_destination_with_something_else(pages: Site, refused_here: Refused, tmp_path: Path) -> None:
    other = Site(tmp_path, "other", blobs=False)
    other.close()
    before = other.path.read_bytes()
    told = refused_here("copy", pages.path, other.path)
    assert told.startswith(f"{other.path} is neither empty nor the beginning of {pages.path}: its ")
    assert other.path.read_bytes() == before


def test_a_destination_that_cannot_restore(pages: Site, peers: Peers, refused_here: Refused) -> None:
    server = peers.server("zeoid", in_memory=True)
    assert "can't store transactions as they were" in refused_here("copy", pages.path, address(server))


def test_what_names_no_storage(pages: Site, refused_here: Refused) -> None:
    assert "nosuch://" in refused_here("copy", "nosuch://here", "x.fs")
    assert "nosuch://" in refused_here("copy", pages.path, "nosuch://here")
    assert "does not exist" in refused_here("copy", "nosuch.fs", "x.fs")


# Any other end ----------------------------------------------------------------------------------------

#: Runs the command with *setup* before it, in which `at(CLASS, METHOD, CALL, ACTION)` has something done
#: before that call of a method.
SCRIPT = """
import os, signal, sys
from ZODB.FileStorage import FileStorage

def at(kind, name, call, action):
    method, calls = getattr(kind, name), []
    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            action()
        return method(*args, **kwargs)
    setattr(kind, name, counted)

def send(*numbers):
    def action():
        for number in numbers:
            os.kill(os.getpid(), number)
    return action

{setup}

from zeoid.cli import main
sys.exit(main(sys.argv[1:]))
"""


def copy_with(setup: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*die_with_parent(), sys.executable, "-c", SCRIPT.format(setup=setup), "copy", *map(str, arguments)],
        env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip


def check_beginning(site: Site, path: Path, blobs: Path | None = None) -> int:
    """What is there is the beginning of the source; how many transactions, of which there are more."""
    expected = contents_of_file(site.path, site.blobs if blobs else None)
    there = contents_of_file(path, blobs)
    assert there == expected[: len(there)]
    assert 0 < len(there) < len(expected)
    return len(there)


@pytest.mark.parametrize("method", ["restore", "tpc_vote", "tpc_finish", "restoreBlob"])
def test_a_process_that_is_killed_can_be_started_again(site: Site, tmp_path: Path, method: str) -> None:
    call = {"restore": 12, "restoreBlob": 2}.get(method, 8)
    done = copy_with(f"at(FileStorage, {method!r}, {call}, send(signal.SIGKILL))", *with_blobs(site))
    assert done.returncode == -signal.SIGKILL
    assert check_beginning(site, tmp_path / "copy.fs", tmp_path / "copy-blobs") >= 5
    assert copy(*with_blobs(site)) == 0
    assert (tmp_path / "copy.fs").read_bytes() == site.path.read_bytes()


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt(pages: Site, tmp_path: Path, number: str) -> None:
    """It ends between two records, and says what is there and how to go on."""
    path = tmp_path / "copy.fs"
    done = copy_with(f"at(FileStorage, 'tpc_finish', 5, send(signal.{number}))", pages.path, path)
    assert (done.returncode, done.stdout) == (130, "")
    assert check_beginning(pages, path) == 5
    last = contents_of_file(path)[-1][0]
    assert re.fullmatch(
        rf"zeoid: interrupted; {path} has all transactions up to {last} \(20.* UTC\), "
        r"the same command goes on from there\n",
        done.stderr,
    )
    assert copy(pages.path, path) == 0
    assert path.read_bytes() == pages.path.read_bytes()


def test_a_second_interrupt_does_not_wait(pages: Site, tmp_path: Path) -> None:
    path = tmp_path / "copy.fs"
    setup = (
        "def twice():\n"
        "    send(signal.SIGINT, signal.SIGINT)()\n"
        "    print('went on')\n"
        "at(FileStorage, 'restore', 8, twice)"
    )
    done = copy_with(setup, pages.path, path)
    assert done.stdout == ""
    assert done.returncode == 130
    assert done.stderr.startswith("zeoid: interrupted; ")
    check_beginning(pages, path)
    assert copy(pages.path, path) == 0
    assert path.read_bytes() == pages.path.read_bytes()


def test_an_interrupt_before_anything_is_copied(pages: Site, tmp_path: Path) -> None:
    path = tmp_path / "copy.fs"
    done = copy_with("at(FileStorage, 'tpc_begin', 1, send(signal.SIGINT))", pages.path, path)
    assert done.returncode == 130
    assert f"{path} has no transaction" in done.stderr
    assert copy(pages.path, path) == 0


def test_an_interrupt_of_the_verification(pages: Site, tmp_path: Path) -> None:
    setup = "import zeoid.admin.comparing as c\nat(c, '_digest', 7, send(signal.SIGINT))"
    done = copy_with(setup, pages.path, tmp_path / "copy.fs")
    assert done.returncode == 130
    assert done.stderr == "zeoid: interrupted; the copy is whole, but not verified\n"
    assert (tmp_path / "copy.fs").read_bytes() == pages.path.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="no limits for a process here")
@pytest.mark.parametrize("size_bytes", [50_000, 2_000_000], ids=["data", "blob"])
def test_a_full_disk(site: Site, tmp_path: Path, size_bytes: int) -> None:
    setup = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size_bytes}, {size_bytes}))"
    done = copy_with(setup, *with_blobs(site))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    failed, state = done.stderr.splitlines()[:2]
    assert re.match(r"zeoid: .*copy.fs failed at transaction \w{16} \(.*: OSError: .*File too large", failed)
    count = check_beginning(site, tmp_path / "copy.fs", tmp_path / "copy-blobs")
    last = contents_of_file(tmp_path / "copy.fs")[count - 1][0]
    assert state.startswith(f"zeoid: {tmp_path}/copy.fs has all transactions up to {last} (")
    assert copy(*with_blobs(site)) == 0
    assert (tmp_path / "copy.fs").read_bytes() == site.path.read_bytes()


def test_a_damaged_source(pages: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tids = [tid for tid, *_ in contents_of_file(pages.path)]
    data = pages.path.read_bytes()
    begin = data.index(bytes.fromhex(tids[5]))
    with pages.path.open("r+b") as file:
        file.seek(begin + 8)
        file.write(bytes(8))
    assert copy(pages.path, tmp_path / "copy.fs") == 1
    why, state = capsys.readouterr().err.splitlines()
    assert why.startswith(f"zeoid: {pages.path} is damaged after transaction {tids[4]} (20")
    assert why.endswith(f"has invalid transaction header at {begin}")
    assert state.startswith(f"zeoid: {tmp_path}/copy.fs has all transactions up to {tids[4]} (")
    assert [tid for tid, *_ in contents_of_file(tmp_path / "copy.fs")] == tids[:5]
    # The source is mended, from a back-up for instance.
    pages.path.write_bytes(data)
    assert copy(pages.path, tmp_path / "copy.fs") == 0


def test_a_server_that_dies(
    pages: Site, peers: Peers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = peers.server("zeoid")
    destination = f"zeoid://{address(server)}?wait_timeout=2"
    ticks: list[None] = []
    copying = Progress.copying

    def tick(self: Progress, tally: Tally) -> None:
        ticks.append(None)
        if len(ticks) == 10:
            server.kill()
        copying(self, tally)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "copying", tick)
        assert copy(pages.path, destination) == 1
    told = capsys.readouterr().err
    assert re.search(r"failed at transaction \w{16} \(.*: Disconnected: ", told)
    assert "has all transactions up to" in told
    server.start()
    assert copy(pages.path, destination) == 0
    assert server.stop() == 0
    assert contents_of_file(server.data_file) == contents_of_file(pages.path)


def test_signals_are_as_before_afterwards(pages: Site, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert copy(pages.path, tmp_path / "copy.fs") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# Progress ---------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """What is written, to a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


TALLY = Tally(transactions=1234, records=5678, blobs=3, size_bytes=20_000_000, share=0.256)
SHOWN = " 26%  1,234 transactions, 5,678 records, 3 blobs, 20.0 MB in 10.0 s (568 records/s, 2.0 MB/s)"


def test_progress_on_a_terminal_is_one_line() -> None:
    screen, clock = Screen(terminal=True), Clock()
    progress = Progress(screen, clock)
    progress.copying(TALLY)
    clock.now_s += limits.COPY_TERMINAL_S * 0.9
    progress.copying(TALLY)
    assert screen.getvalue() == ""
    clock.now_s = 110
    progress.copying(TALLY)
    progress.copying(TALLY)
    assert screen.getvalue() == f"\r{SHOWN}"
    clock.now_s += limits.COPY_TERMINAL_S
    progress.comparing()
    text = "verifying: 0 transactions compared"
    # Nothing is left of the other one.
    assert screen.getvalue().endswith(f"\r{text}{' ' * (len(SHOWN) - len(text))}")
    progress.end_line()
    progress.end_line()
    assert screen.getvalue().count("\n") == 1


def test_progress_elsewhere_is_a_line_now_and_then() -> None:
    screen, clock = Screen(terminal=False), Clock()
    progress = Progress(screen, clock)
    clock.now_s += limits.COPY_LINE_S * 0.9
    progress.copying(TALLY)
    assert screen.getvalue() == ""
    clock.now_s = 100 + limits.COPY_LINE_S
    progress.copying(TALLY)
    progress.end_line()
    assert screen.getvalue() == f"{SHOWN}\n"


def test_no_progress() -> None:
    screen, clock = Screen(terminal=True), Clock()
    progress = Progress(screen, clock, quiet=True)
    clock.now_s += 100
    progress.copying(TALLY)
    progress.comparing()
    progress.say("something")
    progress.end_line()
    assert screen.getvalue() == ""
    progress.stop()
    with pytest.raises(Stopped):
        progress.copying(TALLY)


def test_progress_is_shown_by_the_command(
    pages: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "COPY_LINE_S", 0.0)
    assert copy(pages.path, tmp_path / "copy.fs") == 0
    lines = capsys.readouterr().err.splitlines()
    shares = [int(line.split("%")[0]) for line in lines if "%" in line]
    assert shares == sorted(shares)
    assert shares[0] < 20
    assert shares[-1] == 100
    assert lines[-1] == "verifying: 10 transactions compared"
    assert copy("--quiet", pages.path, tmp_path / "copy.fs") == 0
    assert capsys.readouterr().err == ""


def test_progress_by_time_where_the_source_tells_no_position(
    pages: Site,
    peers: Peers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = peers.server("zeoid")
    assert copy(pages.path, address(server)) == 0
    capsys.readouterr()
    monkeypatch.setattr(limits, "COPY_LINE_S", 0.0)
    assert copy(address(server), tmp_path / "copy.fs") == 0
    shares = [int(line.split("%")[0]) for line in capsys.readouterr().err.splitlines() if "%" in line]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    assert len(set(shares)) > 5


def test_on_a_real_terminal(pages: Site, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        setup = "import zeoid.limits\nzeoid.limits.COPY_TERMINAL_S = 0.0"
        process = subprocess.run(
            [*die_with_parent(), sys.executable, "-c", SCRIPT.format(setup=setup), "copy",
             str(pages.path), str(tmp_path / "copy.fs")],
            env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert process.returncode == 0
        written = os.read(ours, 100_000).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert written.count("\n") == 2  # after copying, and after comparing
    assert re.search(r"\r100%  11 transactions, ", written)
