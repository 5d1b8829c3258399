"""`python -m bench`: run the benchmarks, print the tables, write the figures.

Owns the command line and the file of results. Exit status: 0 done, 1 a benchmark failed, 2 wrong options,
130 interrupted.
"""

import argparse
import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.document import DOCUMENT, LATEST, write_figures
from bench.machine import IN_MEMORY, file_system, machine, versions
from bench.measure import summarise
from bench.peers import PEERS
from bench.processes import PROJECT, PeerError, usable_cpus
from bench.runner import Conditions, run_rounds
from bench.table import heading, render
from bench.works import BENCHMARKS

RESULTS = PROJECT / "bench" / "results"
ROUNDS = 5


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Zeoid beside ZEO, FileStorage and a bare socket, in one run."
    )
    add = parser.add_argument
    add("--only", metavar="NAME", action="append", help=f"one of {', '.join(BENCHMARKS)}; may be repeated")
    add("--rounds", type=int, default=ROUNDS, help="how often each peer runs (%(default)s)")
    add("--peers", metavar="A,B", help=f"only these of {', '.join(PEERS)}")
    add("--quick", action="store_true", help="far fewer operations: does it work at all?")
    add("--folder", type=Path, default=Path("/var/tmp"), help="where the databases go (%(default)s)")
    add("--json", metavar="PATH", type=Path, help="where the figures go (a dated file in bench/results)")
    add("--document", action="store_true", help="put bench/results/latest.json into the docs; run nothing")
    options = parser.parse_args(arguments)
    options.only = options.only or list(BENCHMARKS)
    options.peers = options.peers.split(",") if options.peers else list(PEERS)
    for name, known in [(n, BENCHMARKS) for n in options.only] + [(n, PEERS) for n in options.peers]:
        if name not in known:
            parser.error(f"there is no {name!r}; there are {', '.join(known)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not os.access(options.folder, os.W_OK | os.X_OK):
        parser.error(f"--folder {options.folder}: no such folder, or it cannot be written to")
    if not any(peer in BENCHMARKS[name].peers for name in options.only for peer in options.peers):
        parser.error(f"none of {', '.join(options.peers)} takes part in {', '.join(options.only)}")
    for peer in options.peers if not options.document else ():
        if reason := PEERS[peer].missing():
            parser.error(f"{PEERS[peer].title} cannot take part: {reason} (--peers chooses others)")
    return options


def blank(options: argparse.Namespace) -> dict[str, Any]:
    """The file of results before anything was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(options.folder),
        "versions": versions(),
        "results": {},
        "failures": {},
    }


def run(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """All benchmarks that were asked for; each table is printed as soon as it is complete."""
    print(heading(results), flush=True)
    if file_system(options.folder) in IN_MEMORY:
        print(f"note: {options.folder} is in memory, where an fsync costs nothing: choose another --folder\n")
    for name in options.only:
        benchmark = BENCHMARKS[name]
        peers = [peer for peer in benchmark.peers if peer in options.peers]
        if not peers:
            continue
        cpus = usable_cpus()[-benchmark.cpus :]
        load_before = os.getloadavg()[0]
        conditions = Conditions(cpus, options.folder, options.quick)
        try:
            rounds, disturbed = run_rounds(benchmark, peers, options.rounds, conditions, report=progress)
        except PeerError as error:  # the others may work, and may have taken an hour
            results["failures"][name] = str(error)
            progress("")
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        results["results"][name] = {
            "title": benchmark.title,
            "quick": options.quick,
            "cpus": cpus,
            "load_average_before": load_before,
            "summary": summarise(benchmark, rounds),
            "rounds": rounds,
            "disturbed_rounds": disturbed,
        }
        progress("")
        print(render(benchmark, results["results"][name]), flush=True)


def progress(text: str) -> None:
    """One line on the terminal that is written over; nothing where standard error is not a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def save(results: dict[str, Any], options: argparse.Namespace) -> list[Path]:
    """Write the figures. A whole run without a failure is also the latest, which docs quote."""
    stamp = datetime.fromisoformat(results["date"]).strftime("%Y%m%d-%H%M%S")
    paths = [options.json or RESULTS / f"{stamp}.json"]
    whole = list(results["results"]) == list(BENCHMARKS) and options.peers == list(PEERS)
    if whole and options.rounds >= ROUNDS and not options.quick and not options.json:
        paths.append(LATEST)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    return paths


def main() -> int:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a round in progress is cleaned up
    try:
        if options.document:
            write_figures()
            print(f"wrote {DOCUMENT}")
            return 0
        results = blank(options)
        try:
            run(options, results)
        finally:  # also when interrupted: what is complete is kept
            if results["results"] or results["failures"]:
                print("wrote", *save(results, options))
        return 1 if results["failures"] else 0
    except (OSError, ValueError) as error:
        progress("")
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress("")
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
