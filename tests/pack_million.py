"""A pack of very many objects, and whether its bar tells the truth: `python -m tests.pack_million`.

A data file is written, of which a third is garbage and old revisions; `zeoid serve` serves it, `zeoid pack`
packs it on a pseudo-terminal, and a client beside them commits. What the terminal was sent is held against
what is known of the file.

Owns the file, the terminal and the figures. What the bar may say is in `lies`, which reads frames only, so
that it can be tried on made-up ones. Must not know how a pack is made. Exit status: 0 the bar told the truth,
1 it did not.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.database import commit, now
from bench.works.pack import record
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64, z64

import zeoid
from tests.peers import die_with_parent, environment
from tests.server.processes import Serving, on_loopback

MB = 1e6
DATA_HEADER_BYTES = 42  # of a record in a data file
STATE_BYTES = 300
BRANCH = 500  # objects below one, and in one transaction
#: The number of the object that is committed during the pack; 0 is the root, the branches come after it.
COUNTER = 1
SAMPLE = 500
#: Between two commits: they are to notice the pack, not to be the load.
REST_S = 0.002
END_S = 60.0
#: A commit adds less than that to the file.
COMMIT_BYTES = 300
#: Half of the time is to be about half of the bar.
HALF_WITHIN_PERCENT = 20
WIDTH = 120
ERASE = b"\r\x1b[K"
#: Asks more often, so that a short pack shows something.
IMPATIENT = "from zeoid import cli, limits; limits.PACK_POLL_S = 0.002; raise SystemExit(cli.main())"


@dataclass(frozen=True)
class Plan:
    objects: int
    commits_before: int
    #: Long enough that every phase must be seen, and that its time can be spoken of.
    long: bool


MILLION = Plan(1_000_000, 2000, long=True)
SHORT = Plan(5_000, 50, long=False)


# The data file ----------------------------------------------------------------------------------------


def is_garbage(number: int) -> bool:
    """A fifth of the leaves; with the old revisions of another quarter they are a third of the file."""
    return number % 5 == 0


def is_overwritten(number: int) -> bool:
    return number % 5 == 1 or number % 20 == 2


def leaf(number: int, revision: int) -> bytes:
    return record(random.Random(2 * number + revision).randbytes(STATE_BYTES))


@dataclass(frozen=True)
class Made:
    """What is in the file."""

    objects: int
    first_leaf: int
    live: int
    size_bytes: int
    removable_bytes: int


def create(path: Path, objects: int) -> Made:
    """A new Data.fs with exactly so many objects. Holds no more of it in memory than one transaction."""
    branches = range(COUNTER + 1, COUNTER + 1 + objects // BRANCH)
    first_leaf = branches.stop
    leaves = range(first_leaf, objects)
    storage = FileStorage(str(path), create=True)

    def write(records: dict[int, bytes], serial: bytes = z64) -> bytes:
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for number, data in records.items():
            storage.store(p64(number), serial, data, "", transaction)
        storage.tpc_vote(transaction)
        tid: bytes = storage.tpc_finish(transaction)
        return tid

    removable_bytes = 0
    live = objects
    try:
        write({0: record(b"root", *map(p64, [COUNTER, *branches])), COUNTER: record(b"0")})
        for index, branch in enumerate(branches):
            below = leaves[len(leaves) * index // len(branches) : len(leaves) * (index + 1) // len(branches)]
            records = {number: leaf(number, 0) for number in below}
            kept = [number for number in below if not is_garbage(number)]
            tid = write({branch: record(b"branch", *map(p64, kept)), **records})
            again = {number: leaf(number, 1) for number in kept if is_overwritten(number)}
            write(again, tid)
            live -= len(below) - len(kept)
            removable_bytes += sum(
                len(data) + DATA_HEADER_BYTES
                for number, data in records.items()
                if is_garbage(number) or number in again
            )
        storage.set_max_oid(p64(objects))
    finally:
        storage.close()
    return Made(objects, first_leaf, live, path.stat().st_size, removable_bytes)


def check(storage: Any, made: Made) -> Iterator[str]:
    """What is wrong with the storage after the pack: by samples, the same in every run."""
    count = len(storage)
    if count != made.live:
        yield f"{count:,} objects are left, not {made.live:,}"
    for number in random.Random(1).sample(range(made.first_leaf, made.objects), SAMPLE):
        try:
            loaded = storage.loadBefore(p64(number), now(storage))
        except POSKeyError:
            loaded = None
        expected = None if is_garbage(number) else leaf(number, int(is_overwritten(number)))
        if (loaded and loaded[0]) != expected:
            what = "is gone or wrong" if expected else "is garbage, and still there"
            yield f"object {number} {what}"


# The bar ----------------------------------------------------------------------------------------------


FRAME = re.compile(
    r"\[(?P<full>#*)(?P<rest>\.*)\] +(?P<percent>\d+) %  (?P<phase>[a-z]+)"
    r"(?:  (?P<part>[\d,]+) of (?P<whole>[\d,]+) (?P<unit>objects|MB|objects stay))?  (?P<seconds>[\d,]+) s"
)
PACKED = re.compile(r"storage '1' is packed: ([\d,]+) bytes before, ([\d,]+) after, in [\d,.]+ s")


@dataclass(frozen=True)
class Frame:
    """What the bar said, and when."""

    at_s: float
    text: str
    bar: str
    percent: int
    phase: str
    part: int
    whole: int
    unit: str
    seconds: int


@dataclass(frozen=True)
class Seen:
    """All that a terminal was sent."""

    frames: Sequence[Frame]
    #: What is no frame, and not empty.
    strange: Sequence[str]
    #: Below the bar.
    last_lines: Sequence[str]


def count(text: str | None) -> int:
    return int((text or "0").replace(",", ""))


def read(written: bytes, times_s: Sequence[float]) -> Seen:
    """*times_s*: when each erasing of the line came."""
    _, *pieces = written.decode().split(ERASE.decode())
    frames, strange, last_lines = [], [], []
    for index, (piece, at_s) in enumerate(zip(pieces, times_s, strict=True)):
        text, *below = piece.split("\r\n")
        if index == len(pieces) - 1:
            last_lines = [line for line in below if line]
        elif below:
            strange.append(piece)
        found = FRAME.fullmatch(text)
        if found is None:
            strange += [text] if text else []
            continue
        frames.append(
            Frame(
                at_s, text, found["full"] + found["rest"], int(found["percent"]), found["phase"],
                count(found["part"]), count(found["whole"]), found["unit"] or "", count(found["seconds"]),
            )
        )  # fmt: skip
    return Seen(frames, strange, last_lines)


def lies(seen: Seen, made: Made, plan: Plan) -> Iterator[str]:
    """What the bar said that is not so."""
    frames = seen.frames
    yield from (f"no bar: {text!r}" for text in seen.strange)
    if not frames:
        yield "there was no bar"
        return
    for before, frame in itertools.pairwise(frames):
        if frame.percent < before.percent:
            yield f"it went back from {before.percent} to {frame.percent} %"
        if frame.seconds < before.seconds:
            yield f"time went back: {before.seconds} to {frame.seconds} s"
    for frame in frames:
        yield from _lies_of_frame(frame, made)
    if any(frame.percent == 100 for frame in frames[:-1]):
        yield "100 % before the end"
    last = frames[-1]
    stays = f"{made.live:,} of {made.objects:,} objects stay"
    if last.bar != "#" * 30 or not re.search(rf" 100 %  done  {stays}  ", last.text):
        yield f"it did not end full, with {stays}: {last.text!r}"
    if plan.long:
        missing = {"reading", "tracing", "copying"} - {frame.phase for frame in frames}
        if missing:
            yield f"never seen: {', '.join(sorted(missing))}"
        half = percent_at(frames, 0.5)
        if abs(half - 50) > HALF_WITHIN_PERCENT:
            yield f"at half of the time it said {half} %"


def _lies_of_frame(frame: Frame, made: Made) -> Iterator[str]:
    full = len(frame.bar.rstrip("."))
    # The part of a percent that the number leaves out may be another mark.
    if len(frame.bar) != 30 or not 30 * frame.percent // 100 <= full <= 30 * (frame.percent + 1) // 100:
        yield f"the bar is not as long as its number: {frame.text!r}"
    if frame.unit.startswith("objects") and (frame.whole != made.objects or frame.part > made.live):
        yield f"there are {made.objects:,} objects, of which {made.live:,} stay: {frame.text!r}"
    # It grows while it is packed.
    size_mb = made.size_bytes / MB
    if frame.unit == "MB" and not size_mb - 1 <= frame.whole <= 1.1 * size_mb + 1:
        yield f"there are {size_mb:,.0f} MB: {frame.text!r}"
    if frame.part > frame.whole:
        yield f"more than all: {frame.text!r}"


def percent_at(frames: Sequence[Frame], part: float) -> int:
    """What the bar said after that part of its time."""
    moment = frames[0].at_s + part * (frames[-1].at_s - frames[0].at_s)
    return max((frame.percent for frame in frames if frame.at_s <= moment), default=0)


def on_terminal(command: list[str]) -> tuple[int, Seen]:
    """Run a command on a pseudo-terminal: its exit status, and what it wrote there."""
    mine, its = os.openpty()
    with os.fdopen(mine, "rb", buffering=0) as terminal:
        try:
            fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
            variables = {name: value for name, value in environment().items() if name != "COLUMNS"}
            process = subprocess.Popen(
                [*die_with_parent(), *command], stdin=its, stdout=its, stderr=its, env=variables
            )
        finally:
            os.close(its)
        try:
            written, times_s = b"", []
            # Linux tells with EIO that nobody has the terminal open any more.
            with contextlib.suppress(OSError):
                while chunk := terminal.read(65536):
                    written += chunk
                    times_s += [time.monotonic()] * (written.count(ERASE) - len(times_s))
            return process.wait(END_S), read(written, times_s)
        finally:
            process.kill()
            process.wait()


# The commits beside it --------------------------------------------------------------------------------


class Committing:
    """A thread that commits one small object again and again, in a `with` block."""

    def __init__(self, address: Any, enough: int) -> None:
        self._storage = zeoid.ClientStorage(address, wait=True)
        self._enough = enough
        self._ended = threading.Event()
        self._has_enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commits")
        self.problem: BaseException | None = None
        #: When each began, and how long it took.
        self.commits: list[tuple[float, float]] = []
        self.last = b""

    def __enter__(self) -> Committing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._storage.close()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def wait_until_enough(self) -> None:
        assert self._has_enough.wait(END_S), "commits take too long"

    def between(self, began_s: float, ended_s: float) -> list[float]:
        """Milliseconds of the commits that began in that time."""
        return [1000 * took_s for at_s, took_s in self.commits if began_s <= at_s < ended_s]

    def _run(self) -> None:
        try:
            oid = p64(COUNTER)
            _, tid, _ = self._storage.loadBefore(oid, now(self._storage))
            while not self._ended.wait(REST_S):
                data = record(b"%d" % (len(self.commits) + 1))
                began_s = time.monotonic()
                tid = commit(self._storage, oid, tid, data)
                self.commits.append((began_s, time.monotonic() - began_s))
                self.last = data
                if len(self.commits) == self._enough:
                    self._has_enough.set()
        except BaseException as problem:
            self.problem = problem
        finally:
            self._has_enough.set()


# The run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    problems: Sequence[str]
    lines: Sequence[str]
    seen: Seen


def run(plan: Plan, folder: Path) -> Report:
    path = folder / "Data.fs"
    began_s = time.monotonic()
    made = create(path, plan.objects)
    mine_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    part = 100 * made.removable_bytes / made.size_bytes
    lines = [
        f"{made.objects:,} objects, {made.live:,} of them live; {made.size_bytes / MB:,.1f} MB, of which "
        f"{part:.0f} % are garbage and old revisions; made in {time.monotonic() - began_s:.0f} s with "
        f"{mine_mb:,.0f} MB of memory"
    ]
    serving = Serving(on_loopback("--msgpack", path.name), folder)
    try:
        serving.wait_until_ready()
        problems, seen, figures = _pack(plan, made, path, serving)
        if serving.process.poll() is not None or serving.stop() != 0:
            problems.append(f"the server did not end well; it wrote:\n{serving.log.text()}")
    finally:
        serving.end()
    return Report(problems, [*lines, *figures], seen)


def _pack(plan: Plan, made: Made, path: Path, serving: Serving) -> tuple[list[str], Seen, list[str]]:
    """Have it packed: what is wrong, what the terminal showed, the figures."""
    host, port = serving.address
    program = ["-m", "zeoid"] if plan.long else ["-c", IMPATIENT]
    with Committing(serving.address, plan.commits_before) as committing:
        committing.wait_until_enough()
        before = committing.between(0, began_s := time.monotonic())
        memory_before = serving.peak_memory_bytes()
        size_before = path.stat().st_size
        status, seen = on_terminal([sys.executable, *program, "pack", f"{host}:{port}"])
        during = committing.between(began_s, ended_s := time.monotonic())
        memory_after = serving.peak_memory_bytes()
        committing.stop()
        size_after = path.stat().st_size
        with contextlib.closing(zeoid.ClientStorage(serving.address, wait=True)) as storage:
            problems = [*lies(seen, made, plan), *check(storage, made)]
            if storage.loadBefore(p64(COUNTER), now(storage))[0] != committing.last:
                problems.append("the last commit is lost")
    if committing.problem is not None:
        problems.append(f"a commit failed: {committing.problem!r}")
    if status:
        problems.append(f"zeoid pack ended with status {status}")
    slack_bytes = COMMIT_BYTES * len(committing.commits)
    problems += _wrong_sizes(seen, made, (size_before, size_after), slack_bytes)
    lines = [*seen.last_lines, f"{len(seen.frames):,} frames in {ended_s - began_s:.1f} s"]
    if seen.frames:
        lines.append(f"the last: {seen.frames[-1].text}")
        quarters = ", ".join(f"{percent_at(seen.frames, n / 4)} %" for n in (1, 2, 3))
        lines.append(f"at a quarter, half and three quarters of the time: {quarters}")
        lines += _phases(seen.frames)
    grown_mb = (memory_after - memory_before) / MB
    lines.append(
        f"the server's peak memory: {memory_before / MB:.1f} MB before, {memory_after / MB:.1f} MB after, "
        f"{grown_mb:.1f} MB more"
    )
    if before and during:
        lines += _latency(before, during)
    return problems, seen, lines


def _wrong_sizes(seen: Seen, made: Made, sizes: tuple[int, int], slack_bytes: int) -> Iterator[str]:
    """What the line below the bar says, against the file, to which others add at the same time."""
    said = PACKED.fullmatch(seen.last_lines[0]) if len(seen.last_lines) == 1 else None
    if said is None:
        yield f"it does not end with what was packed: {seen.last_lines}"
        return
    size_before, size_after = sizes
    before, after = count(said[1]), count(said[2])
    if not size_before <= before <= size_before + slack_bytes:
        yield f"the file had {size_before:,} bytes, not {before:,}"
    if not size_after - slack_bytes <= after <= size_after:
        yield f"the file has {size_after:,} bytes, not {after:,}"
    if after > before - made.removable_bytes + slack_bytes:
        yield f"{made.removable_bytes:,} bytes could be removed: {before:,} before, {after:,} after"


def _phases(frames: Sequence[Frame]) -> Iterator[str]:
    """How the phases share the time, and the percentages."""
    for before, frame in zip([None, *frames], frames, strict=False):
        if before is None or frame.phase != before.phase:
            yield f"  {frame.at_s - frames[0].at_s:7.1f} s  {frame.text}"


def _latency(before: list[float], during: list[float]) -> Iterator[str]:
    yield (
        f"a commit: {median(before):.2f} ms before ({len(before):,} commits), {median(during):.2f} ms during "
        f"the pack ({len(during):,}), {median(during) / median(before):.2f} times as long"
    )
    yield (
        f"  one in a hundred takes {_slow(before):.1f} ms before and {_slow(during):.1f} during, "
        f"the longest {max(before):.1f} and {max(during):.1f}"
    )


def _slow(times_ms: list[float]) -> float:
    return sorted(times_ms)[len(times_ms) * 99 // 100]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pack_million", description=__doc__)
    add = parser.add_argument
    add("--objects", type=int, default=MILLION.objects, help="how many (%(default)s)")
    add("--folder", type=Path, default=Path("/var/tmp"), help="where the file goes (%(default)s)")
    options = parser.parse_args()
    if options.objects < SHORT.objects:
        parser.error(f"at least {SHORT.objects:,} objects")
    plan = Plan(options.objects, MILLION.commits_before, long=options.objects >= MILLION.objects // 10)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="pack-") as folder:
        report = run(plan, Path(folder))
    print("\n".join(report.lines))
    print("\n".join(f"WRONG: {problem}" for problem in report.problems) or "the bar told the truth")
    return 1 if report.problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
