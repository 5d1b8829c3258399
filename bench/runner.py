"""The rounds: every peer in turn, each time in fresh processes and a fresh folder.

Owns the order of things and their deadline. Must not know what a benchmark does.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.measure import OTHERS_LIMIT_PERCENT, Benchmark, Figures, Round, disturbance_percent
from bench.processes import PROJECT, STOP_TIMEOUT_S, PeerError, tethered

ROUND_TIMEOUT_S = 300.0
REPEATS = 2  # of disturbed rounds, for every round that was asked for


@dataclass(frozen=True)
class Conditions:
    """What all peers have in common."""

    cpus: list[int]
    folder: Path
    quick: bool


def run_rounds(
    benchmark: Benchmark, peers: list[str], count: int, conditions: Conditions, report: Callable[[str], None]
) -> tuple[list[Round], list[Round]]:
    """A B C A B C …: so many rounds, and those that were disturbed and had to be repeated.

    A round counts as disturbed by what others took of the CPUs' time, never by its result. It is repeated as
    a whole, because its ratios need all its parts. On a machine that never gets quiet the repeats end, too.
    """
    kept: list[Round] = []
    disturbed: list[Round] = []
    repeats = 0 if conditions.quick else REPEATS * count
    while len(kept) < count:
        figures: Round = {}
        for peer in peers:
            tries = f", {len(disturbed)} repeated" if disturbed else ""
            report(f"{benchmark.name}: round {len(kept) + 1} of {count}{tries}, {peer}")
            figures[peer] = run_once(benchmark, peer, conditions)
        too_much = disturbance_percent(figures) > OTHERS_LIMIT_PERCENT
        (disturbed if too_much and len(disturbed) < repeats else kept).append(figures)
    return kept, disturbed


def run_once(benchmark: Benchmark, peer: str, conditions: Conditions) -> Figures:
    """One peer, once. Its processes are gone when this returns or raises: they are tethered to each other."""
    with tempfile.TemporaryDirectory(prefix="zeoid-bench-", dir=conditions.folder) as own_folder:
        command = [sys.executable, "-m", "bench.once", benchmark.name, peer, own_folder]
        command += [",".join(map(str, conditions.cpus)), *(["--quick"] if conditions.quick else [])]
        process = subprocess.Popen(
            tethered(command), cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            printed, errors = process.communicate(timeout=ROUND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise PeerError(f"{benchmark.name}, {peer}: not done after {ROUND_TIMEOUT_S:.0f} s") from None
        finally:
            end(process)
        if process.returncode != 0:
            raise PeerError(f"{benchmark.name}, {peer}: failed\n{errors}")
        figures: Figures = json.loads(printed)
        return figures


def end(process: subprocess.Popen[str]) -> None:
    """Have the process stop its server and leave, if it hasn't; it is gone when this returns."""
    process.terminate()
    try:
        process.communicate(timeout=2 * STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
