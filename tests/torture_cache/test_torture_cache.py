"""The torture of the shared object cache, in short, and proofs that it finds what is wrong."""

from __future__ import annotations

import random
from pathlib import Path
from zlib import crc32

import pytest

from tests.torture_cache import checker
from tests.torture_cache.run import Plan, run
from tests.torture_cache.worker import Journal, oid

A, B = oid(1), oid(2)
T1, T2, T3, T4, T5 = (number.to_bytes(8, "big") for number in range(1, 6))
HISTORY = {A: [(T2, crc32(b"2")), (T4, crc32(b"4"))], B: [(T1, crc32(b"1"))]}


@pytest.mark.timeout(240)
def test_what_is_read_is_true_whoever_is_killed_or_stopped(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    report = run(Plan(seed, 6, kill_s=1, stop_s=0.5, server_s=2.5), tmp_path)
    print(*report.lines(), sep="\n")
    assert report.problems == []
    # It was no walk in the park: everything that can happen did.
    assert report.kills > 2
    assert report.stops > 4
    assert report.server_kills > 0
    assert report.totals.reads > 1000
    assert report.totals.hits > 100
    assert report.totals.revisions > 500


RIGHT = [
    (A, T3, (b"2", T2, T4)),
    (A, T4, (b"2", T2, None)),
    (A, T5, (b"4", T4, None)),
    (B, T5, (b"1", T1, None)),
]
WRONG = [
    (A, T5, (b"2", T2, None), "there was the revision 0000000000000004"),
    (A, T3, (b"2", T1, T4), "there was the revision 0000000000000002"),
    (A, T3, (b"4", T2, T4), "its data was another"),
    (A, T3, (b"2", T2, T3), "it ended at 0000000000000004"),
    (B, T3, (b"1", T1, T3), "it ended at -"),
    (B, T1, (b"1", T1, None), "there was nothing"),
]


def test_what_is_right(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "1.reads")
    for each in RIGHT:
        journal.read(*each)
    journal.found(3, 2)
    journal.close()
    totals = checker.Totals()
    assert checker.problems([tmp_path / "1.reads"], HISTORY, totals) == []
    assert totals == checker.Totals(reads=4, hits=3, evicted=2, revisions=3)


@pytest.mark.parametrize(("oid", "before", "revision", "text"), WRONG)
def test_what_is_wrong(
    tmp_path: Path, oid: bytes, before: bytes, revision: tuple[bytes, bytes, bytes | None], text: str
) -> None:
    journal = Journal(tmp_path / "1.reads")
    journal.read(*RIGHT[0])
    journal.read(oid, before, revision)
    journal.close()
    first, last = checker.problems([tmp_path / "1.reads"], HISTORY, checker.Totals())
    assert first.endswith(text)
    assert last == "1 reads are wrong"
