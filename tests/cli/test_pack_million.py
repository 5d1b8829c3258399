"""The short form of `make pack-million`, and that it would notice a bar that lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pack_million.bar import ERASE, lies, percent_at, read
from tests.pack_million.database import Made
from tests.pack_million.run import SHORT, run

MADE = Made(objects=1000, first_leaf=4, live=800, size_bytes=10_000_000, removable_bytes=3_000_000)
FULL = "#" * 30
BEGINNING = f"[{'.' * 30}]   0 %  reading  0 of 10 MB  0 s"
TRACING = f"[{'#' * 12 + '.' * 18}]  40 %  tracing  300 of 1,000 objects  1 s"
COPYING = f"[{'#' * 27 + '.' * 3}]  90 %  copying  7 of 10 MB  2 s"
DONE = f"[{FULL}] 100 %  done  800 of 1,000 objects stay  3 s"
TRUE = (BEGINNING, TRACING, COPYING, "", DONE)


def written(*frames: str) -> bytes:
    return b"".join(ERASE + frame.encode() for frame in frames) + b"\r\nbelow\r\n"


def lies_of(*frames: str, times_s: tuple[float, ...] = ()) -> list[str]:
    # The second frame is there at half of the time.
    seen = read(written(*frames), times_s or [n if n < 2 else 10.0 + n for n in range(len(frames))])
    assert seen.last_lines == ["below"]
    return list(lies(seen, MADE, long=True))


def test_a_pack_shows_what_is_so(tmp_path: Path) -> None:
    report = run(SHORT, tmp_path)
    assert not report.problems
    frames = report.seen.frames
    assert f" of {SHORT.objects:,} objects stay" in frames[-1].text
    assert len(frames) > 1
    assert any("server's peak memory" in line for line in report.lines)
    assert any("times as long" in line for line in report.lines)


def test_the_truth_is_no_lie() -> None:
    assert lies_of(*TRUE) == []


@pytest.mark.parametrize(
    ("frames", "lie"),
    [
        ((BEGINNING, COPYING, TRACING, DONE), "it went back from 90 to 40 %"),
        ((BEGINNING, TRACING, COPYING.replace(" 2 s", " 0 s"), DONE), "time went back: 1 to 0 s"),
        ((BEGINNING, TRACING.replace("1,000", "999"), COPYING, DONE), "there are 1,000 objects"),
        ((BEGINNING, TRACING.replace("300", "801"), COPYING, DONE), "there are 1,000 objects"),
        ((BEGINNING, TRACING, COPYING.replace("10 MB", "13 MB"), DONE), "there are 10 MB"),
        ((BEGINNING, TRACING, COPYING.replace("10 MB", "8 MB"), DONE), "there are 10 MB"),
        ((BEGINNING, TRACING, COPYING.replace("7 of", "11 of"), DONE), "more than all"),
        ((BEGINNING, TRACING.replace("#.", "##", 1), COPYING, DONE), "not as long as its number"),
        ((BEGINNING, TRACING.replace("#.", "..", 1), COPYING, DONE), "not as long as its number"),
        ((BEGINNING, TRACING, COPYING, DONE, DONE), "100 % before the end"),
        ((BEGINNING, TRACING, COPYING), "it did not end full"),
        ((BEGINNING, TRACING, COPYING, DONE.replace("800", "799")), "it did not end full"),
        ((BEGINNING, TRACING, COPYING, "Traceback", DONE), "no bar: 'Traceback'"),
        ((BEGINNING, TRACING, DONE), "never seen: copying"),
        (("",), "there was no bar"),
    ],
)  # fmt: skip
def test_a_lie_is_noticed(frames: tuple[str, ...], lie: str) -> None:
    assert any(lie in found for found in lies_of(*frames)), lies_of(*frames)


def test_half_of_the_time_is_about_half_of_the_bar() -> None:
    late = (0.0, 1.0, 9.0, 10.0, 10.0)
    assert lies_of(*TRUE, times_s=(0.0, 1.0, 4.0, 10.0, 10.0)) == ["at half of the time it said 90 %"]
    assert lies_of(*TRUE, times_s=late) == []
    frames = read(written(*TRUE), late).frames
    assert [percent_at(frames, part) for part in (0, 0.05, 0.5, 0.95, 1)] == [0, 0, 40, 90, 100]
