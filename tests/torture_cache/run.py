"""One run: starts everybody, kills and stops at random, and has the outcome checked.

Owns who is killed and stopped, and when. A process that ends by itself, that meets an error, or that does not
go on when all is well again, is a problem like any other.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage

from tests.peers import die_with_parent, environment, wait_until
from tests.torture.objects import STORAGES, blob_dir, data_file
from tests.torture.processes import ROOT, Server, free_port
from tests.torture_cache import checker
from tests.torture_cache.worker import OBJECTS, STORAGE, oid

WORK_S = 60.0
STOP_S = 60.0
#: So long is somebody stopped.
LEAST_STOP_S, MOST_STOP_S = 0.1, 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to be."""

    seed: int
    seconds: float
    #: On the average, one process is killed, one is stopped, and the server is killed this often.
    kill_s: float = 1.0
    stop_s: float = 0.7
    server_s: float = 8.0
    processes: int = 8


@dataclass(frozen=True, slots=True)
class Report:
    """What became of it."""

    problems: Sequence[str]
    totals: checker.Totals
    kills: int
    stops: int
    server_kills: int
    set_aside: int

    def lines(self) -> Iterator[str]:
        yield f"{self.kills} processes killed, {self.stops} stopped, {self.server_kills} kills of the server"
        yield (
            f"{self.totals.reads:,} reads of {self.totals.revisions:,} revisions, {self.totals.hits:,} from "
            f"the cache, which evicted {self.totals.evicted:,}, and which was set aside "
            f"{self.set_aside} times"
        )
        yield from self.problems
        yield "nothing is wrong" if not self.problems else f"{len(self.problems)} problems"


class Process:
    """`tests.torture_cache.worker`. Started again, it has another journal."""

    def __init__(self, folder: Path, number: int, seed: int, address: str) -> None:
        self.number = number
        self._folder = folder
        self._seed = seed
        self._address = address
        self._incarnation = 0
        self._process: subprocess.Popen[bytes] | None = None
        #: When it goes on, if it is stopped.
        self.goes_on_s: float | None = None

    @property
    def journal(self) -> Path:
        return self._folder / f"{self.number}-{self._incarnation}.reads"

    @property
    def _errors(self) -> Path:
        return self.journal.with_suffix(".errors")

    def start(self) -> None:
        self._incarnation += 1
        self.goes_on_s = None
        arguments = [
            f"{self._seed}/{self.number}/{self._incarnation}",
            self._address,
            str(self._folder / "cache"),
            str(self.journal),
        ]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*die_with_parent(), sys.executable, "-m", "tests.torture_cache.worker", *arguments],
                cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip

    def stop(self, goes_on_s: float) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        self.goes_on_s = goes_on_s

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        self.goes_on_s = None

    def kill(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait(STOP_S)
        self._process.stdin.close()

    def died(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def written_bytes(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def ask_to_end(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait_for_end(self) -> str | None:
        """What is wrong with how it ended."""
        assert self._process is not None
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return f"process {self.number} does not end"
        return f"process {self.number} ended with status {status}" if status else None

    def end(self) -> None:
        """Whatever state it is in, be rid of it."""
        if self._process is not None:
            self.kill()


class Torture:
    """See the module."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._choices = random.Random(plan.seed)
        self._address = f"127.0.0.1:{free_port(self._choices)}"
        self._server = Server(folder, self._address)
        self._processes = [
            Process(folder, number, plan.seed, self._address) for number in range(plan.processes)
        ]
        self.kills = self.stops = self.server_kills = 0
        self._problems: list[str] = []

    def run(self) -> Report:
        populate(self._folder)
        totals = checker.Totals()
        with contextlib.ExitStack() as ends:
            ends.callback(self._server.end)
            for process in self._processes:
                ends.callback(process.end)
            try:
                self._server.start()
                for process in self._processes:
                    process.start()
                self._wait_for_progress()
                self._rage()
                self._finish()
                history = checker.history(self._address)
                self._problems += checker.problems(self._folder.glob("*.reads"), history, totals)
                self._server.stop()
            except AssertionError as problem:
                self._problems.append(str(problem))
        errors = {path.name: path.read_text() for path in self._folder.glob("*.errors")}
        self._problems += [f"{name}:\n{text}" for name, text in errors.items() if "Traceback" in text]
        self._problems += self._server.complaints
        set_aside = sum(text.count("is set aside") for text in errors.values())
        return Report(self._problems, totals, self.kills, self.stops, self.server_kills, set_aside)

    def _wait_for_progress(self) -> None:
        """Every process must come (back) to work by itself."""
        waiting = {process: process.written_bytes() for process in self._processes}

        def all_work() -> bool:
            for process in [each for each, length in waiting.items() if each.written_bytes() > length]:
                del waiting[process]
            return not waiting

        try:
            wait_until(all_work, "", WORK_S)
        except AssertionError:
            numbers = sorted(process.number for process in waiting)
            raise AssertionError(f"the processes {numbers} do nothing within {WORK_S:g} s") from None

    def _rage(self) -> None:
        plan, pause = self._plan, threading.Event()
        end_s = time.monotonic() + plan.seconds
        deeds = {self._kill: plan.kill_s, self._stop: plan.stop_s, self._kill_server: plan.server_s}
        due_s = {deed: self._next_s(mean_s) for deed, mean_s in deeds.items()}
        while (now_s := time.monotonic()) < end_s:
            for process in self._processes:
                assert not process.died(), f"process {process.number} ended by itself"
                if process.goes_on_s is not None and now_s >= process.goes_on_s:
                    process.go_on()
            for deed, mean_s in deeds.items():
                if now_s >= due_s[deed]:
                    deed()
                    due_s[deed] = self._next_s(mean_s)
            pause.wait(0.01)

    def _next_s(self, mean_s: float) -> float:
        return time.monotonic() + mean_s * self._choices.uniform(0.2, 1.8)

    def _kill(self) -> None:
        """Also one that is stopped."""
        process = self._choices.choice(self._processes)
        process.kill()
        self.kills += 1
        process.start()

    def _stop(self) -> None:
        process = self._choices.choice(self._processes)
        process.stop(time.monotonic() + self._choices.uniform(LEAST_STOP_S, MOST_STOP_S))
        self.stops += 1

    def _kill_server(self) -> None:
        self._server.kill()
        self.server_kills += 1
        self._server.start()

    def _finish(self) -> None:
        for process in self._processes:
            process.go_on()
        self._wait_for_progress()
        for process in self._processes:
            process.ask_to_end()
        ends = [process.wait_for_end() for process in self._processes]
        self._problems += [problem for problem in ends if problem]


def populate(folder: Path) -> None:
    for name in STORAGES:
        storage = FileStorage(str(data_file(folder, name)), blob_dir=str(blob_dir(folder, name)))
        if name == STORAGE:
            details = TransactionMetaData()
            storage.tpc_begin(details)
            for number in range(OBJECTS):
                storage.store(oid(number), bytes(8), os.urandom(100), "", details)
            storage.tpc_vote(details)
            storage.tpc_finish(details)
        storage.close()


def run(plan: Plan, folder: Path) -> Report:
    """Torture in this folder, which is empty, and holds all there is to look at afterwards."""
    return Torture(plan, folder).run()
