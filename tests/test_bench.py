"""The benchmarks: a short run from end to end, and what their figures rest on. No test judges a speed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bench.__main__ import blank, parse, run
from bench.database import commit, count_transactions, create, now
from bench.document import DOCUMENT, LATEST, figures, split
from bench.measure import OTHERS, Benchmark, Figure, Ratio, Round, disturbance_percent, summarise
from bench.peers import PEERS, Peer, connected, serving
from bench.processes import (
    PROJECT,
    PeerError,
    ServerProcess,
    Stopwatch,
    cpu_s,
    listening_port,
    peak_rss_bytes,
)
from bench.runner import Conditions, run_rounds
from bench.table import render
from bench.works import BENCHMARKS

DEADLINE_S = 100


def bench(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=PROJECT,
        env=os.environ | (environment or {}),
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def test_a_short_run_prints_the_table_and_writes_the_figures(tmp_path: Path) -> None:
    figures_path = tmp_path / "figures.json"
    (tmp_path / "databases").mkdir()
    places = ["--json", str(figures_path), "--folder", str(tmp_path / "databases")]

    done = bench("--quick", "--rounds", "1", "--only", "load", *places)

    assert done.returncode == 0, done.stderr
    for title in ("bare socket", "lean pair", "FileStorage", "ZEO", "Zeoid"):
        assert title in done.stdout
    line = next(line for line in done.stdout.splitlines() if "times the bare socket's" in line)
    assert len(re.findall(r"[\d.]+ \([\d.]+\.\.[\d.]+\)", line)) == 4  # all but the bare socket itself

    written = json.loads(figures_path.read_text())
    assert {"cpu", "cores", "kernel"} <= written["machine"].keys()
    assert {"Python", "zeoid", "ZODB", "ZEO", "msgpack", "uvloop"} == written["versions"].keys()
    assert list(written["results"]) == ["load"]
    load = written["results"]["load"]
    (only_round,) = load["rounds"]
    assert set(only_round) == set(load["summary"]) == {"bare", "lean", "filestorage", "zeo", "zeoid"}
    for peer in ("zeo", "zeoid"):
        assert all(only_round[peer][key] > 0 for key in ("us", "rate", "server_cpu_us", "client_cpu_us"))
        for key, ratio in (("us", "us_to_bare"), ("server_cpu_us", "server_cpu_to_bare")):
            expected = only_round[peer][key] / only_round["bare"][key]
            assert load["summary"][peer][ratio]["median"] == pytest.approx(expected)
    assert not list((tmp_path / "databases").iterdir())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "nonsense"], "there is no 'nonsense'"),
        (["--peers", "zeo,nobody"], "there is no 'nobody'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--folder", "/nowhere/at/all"], "no such folder"),
        (["--only", "commit16", "--peers", "bare"], "none of bare takes part"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], complaint: str) -> None:
    done = bench(*arguments)

    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_peer_whose_server_fails_is_an_error_and_no_figure(tmp_path: Path) -> None:
    package = tmp_path / "zeoid"  # found before the real one
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys\nif '--help' not in sys.argv: sys.exit('no room')")
    figures_path = tmp_path / "figures.json"

    arguments = ["--quick", "--rounds", "1", "--only", "load", "--peers", "zeoid"]
    places = ["--folder", str(tmp_path), "--json", str(figures_path)]
    done = bench(*arguments, *places, environment={"PYTHONPATH": str(tmp_path)})

    assert done.returncode == 1
    assert "load, zeoid: failed" in done.stderr
    assert "ended with status 1 before it was ready" in done.stderr
    assert "no room" in done.stderr
    written = json.loads(figures_path.read_text())
    assert written["results"] == {}
    assert list(written["failures"]) == ["load"]


def test_a_benchmark_that_fails_does_not_cost_the_others_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_fails(benchmark: Benchmark, *_: object, **__: object) -> tuple[list[Round], list[Round]]:
        if benchmark.name == "load":
            raise PeerError("out of order")
        return [{"zeo": {"us": 4.0, "rate": 250_000.0, OTHERS.key: 0.0}}], []

    monkeypatch.setattr("bench.__main__.run_rounds", one_fails)

    options = parse(["--only", "load", "--only", "cache_hit", "--peers", "zeo", "--folder", str(tmp_path)])
    results = blank(options)

    run(options, results)

    assert results["failures"] == {"load": "out of order"}
    assert list(results["results"]) == ["cache_hit"]
    printed = capsys.readouterr()
    assert "error: out of order" in printed.err
    assert "250,000" in printed.out


def test_a_disturbed_round_is_repeated_as_a_whole_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_percent = iter([0, 50, 1, 2, 60, 3, *([99] * 100)])  # two peers: the first and third round are bad
    monkeypatch.setattr("bench.runner.run_once", lambda *_: {"us": 1.0, OTHERS.key: next(others_percent)})

    kept, disturbed = run_rounds(
        BENCHMARKS["cache_hit"], ["zeo", "zeoid"], 2, Conditions([0], tmp_path, False), report=lambda _: None
    )

    assert [disturbance_percent(figures) for figures in kept] == [2, 99]
    assert [disturbance_percent(figures) for figures in disturbed] == [50, 60, 99, 99]


def test_a_run_that_is_told_to_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--only", "commit16", "--peers", "zeo"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    process = subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: any(is_zeo_server(pid) for pid in processes_with(tmp_path)))
        process.terminate()
        _, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 130
    assert errors.strip() == "interrupted"
    assert processes_with(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_tethered_process_dies_with_the_one_that_started_it() -> None:
    sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
    program = (
        "import subprocess, sys; from bench.processes import tethered\n"
        f"child = subprocess.Popen(tethered({sleeper!r}), stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)

    wait_until(lambda: not is_running(child))


def test_a_server_that_does_not_start_is_an_error_with_its_log(tmp_path: Path) -> None:
    server = ServerProcess([sys.executable, "-c", "exit('the disk is upside down')"], tmp_path / "log")

    with pytest.raises(PeerError, match=r"status 1 before it was ready[^$]*the disk is upside down"):
        server.wait_for("listening")
    with pytest.raises(PeerError, match="ended with status 1 before it was stopped"):
        server.stop()


def test_cpu_time_port_and_memory_are_those_the_server_process_has(tmp_path: Path) -> None:
    bare = PEERS["bare"]()
    with serving(bare, tmp_path) as address, connected(bare, address) as client:
        assert bare.pid is not None
        assert listening_port(bare.pid) == int(address.rpartition(":")[2])
        with Stopwatch(bare.pid) as watch:
            ticks = cpu_ticks(bare.pid)
            while cpu_ticks(bare.pid) < ticks + 20:
                client.loadBefore(bytes(8), bytes(8))
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        assert watch.server_cpu_s == pytest.approx(20 * tick_s, abs=3 * tick_s)
        assert 0 < watch.client_cpu_s <= watch.wall_s
        assert watch.server_cpu_s is not None
        assert cpu_s(bare.pid) >= watch.server_cpu_s
        assert 1e6 < peak_rss_bytes(bare.pid) < 1e9


@pytest.mark.parametrize("name", ["filestorage", "zeo", "zeoid"])
def test_a_peer_serves_the_database_and_writes_to_it(tmp_path: Path, name: str) -> None:
    assert PEERS[name].missing() is None
    peer: Peer = PEERS[name]()
    database = create(tmp_path, 20, 500)
    oid, present = database.oids[7], count_transactions(database.path)
    with serving(peer, tmp_path) as address, connected(peer, address) as storage:
        database.check(storage, database.oids, now(storage))
        tid = commit(storage, oid, storage.loadBefore(oid, now(storage))[1], b"changed")
        assert storage.loadBefore(oid, now(storage))[:2] == (b"changed", tid)
        with pytest.raises(ValueError, match="wrong record for oid 0x8"):
            database.check(storage, database.oids, now(storage))

    assert count_transactions(database.path) == present + 1


def test_a_ratio_is_taken_within_each_round_and_the_median_afterwards() -> None:
    lines = (Figure("us", "time"), Ratio("ratio", "times a", "us", "a"), Ratio("speed", "", "us", "a", True))
    benchmark = Benchmark("name", "title", ("a", "b"), lines, run=lambda *_: {})
    pairs = [(1.0, 2.0), (10.0, 40.0), (100.0, 300.0)]
    rounds = [{"a": {"us": a, OTHERS.key: 0.0}, "b": {"us": b, OTHERS.key: 0.0}} for a, b in pairs]

    summary = summarise(benchmark, rounds)

    assert summary["b"]["us"] == {"median": 40.0, "min": 2.0, "max": 300.0}
    assert summary["b"]["ratio"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert summary["b"]["speed"] == {"median": pytest.approx(1 / 3), "min": 0.25, "max": 0.5}


@pytest.mark.parametrize(("others_percent", "warned"), [(9.0, False), (31.0, True)])
def test_the_table_says_when_the_machine_was_busy(others_percent: float, warned: bool) -> None:
    benchmark = BENCHMARKS["cache_hit"]
    rounds = [{"zeo": {"us": 4.0, "rate": 250_000.0, OTHERS.key: others_percent}}]
    result = {
        "summary": summarise(benchmark, rounds),
        "rounds": rounds,
        "disturbed_rounds": [],
        "cpus": [0],
        "quick": False,
    }

    assert ("BUSY: other processes had up to 31 %" in render(benchmark, result)) == warned


def test_the_figures_in_the_documentation_are_those_of_the_latest_run() -> None:
    _, in_document, _ = split(DOCUMENT.read_text())

    if LATEST.exists():
        assert in_document == figures(json.loads(LATEST.read_text()))
    else:
        assert not re.search(r"\d", in_document)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def processes_with(folder: Path) -> list[int]:
    """The processes that have the folder on their command line."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids if str(folder) in command(pid)]


def is_zeo_server(pid: int) -> bool:
    return "ZEO.runzeo" in command(pid)


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended meanwhile
        return ""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
