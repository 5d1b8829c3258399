"""One run: a server, a pack on a terminal, commits beside it; what is wrong, and the figures.

Owns what is measured, and when. Must not know how a pack is made.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.database import now
from ZODB.utils import p64

import zeoid
from tests.pack_million.bar import MB, PACKED, Frame, Seen, count, lies, percent_at
from tests.pack_million.database import COUNTER, Made, check, create
from tests.pack_million.processes import Committing, on_terminal
from tests.server.processes import Serving, on_loopback

#: A commit adds less than that to the file.
COMMIT_BYTES = 300
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
            problems = [*lies(seen, made, long=plan.long), *check(storage, made)]
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
