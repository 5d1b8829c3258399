"""What the bar of a pack said on a terminal, and which of it is not so.

Owns how a bar reads. Sees frames only, so that it can be tried on made-up ones.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.pack_million.database import Made

MB = 1e6
#: Half of the time is to be about half of the bar.
HALF_WITHIN_PERCENT = 20
ERASE = b"\r\x1b[K"
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


def lies(seen: Seen, made: Made, *, long: bool) -> Iterator[str]:
    """What the bar said that is not so. *long*: every phase must be seen, and its time can be spoken of."""
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
    if long:
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
