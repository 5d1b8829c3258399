"""The bound of a directory of blob files: what goes, what stays, who cleans."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zc.lockfile

from tests.peers import environment, wait_until
from zeoid import limits
from zeoid.cache import blobs
from zeoid.cache.blobs import BlobCache
from zeoid.cache.cleaning import Cleaner

NS = 1_000_000_000
NOW_NS = 1_700_000_000 * NS
TID = b"\x03\xfb\xb5\x4d\0\0\0\1"
SIZE = 100


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(str(tmp_path), now_ns=lambda: NOW_NS)


def cleaner(cache: BlobCache, bound_bytes: int = 1000, step_bytes: int = 100) -> Cleaner:
    return Cleaner(cache, bound_bytes, step_bytes, now_ns=lambda: NOW_NS)


def put(cache: BlobCache, number: int, age_s: float, size_bytes: int = SIZE) -> str:
    path = cache.path_of(number.to_bytes(8, "big"), TID)
    part = cache.part(path, 1.0)
    assert part is not None
    part.begin()
    part.write(bytes(size_bytes))
    part.end()
    part.place()
    part.close()
    at_ns = NOW_NS - int(age_s * NS)
    os.utime(path, ns=(at_ns, at_ns))
    return path


def left(paths: list[str]) -> list[int]:
    return [number for number, path in enumerate(paths) if os.path.exists(path)]


def test_the_oldest_go_until_there_is_room_for_a_step(cache: BlobCache) -> None:
    paths = [put(cache, number, age_s=1000 - number) for number in range(12)]
    assert cleaner(cache).clean() is None
    assert left(paths) == list(range(3, 12)), "9 files are 900 bytes: the bound less a step"
    assert cleaner(cache).clean() is None
    assert left(paths) == list(range(3, 12))


def test_what_fits_stays(cache: BlobCache) -> None:
    paths = [put(cache, number, age_s=1000) for number in range(9)]
    assert cleaner(cache).clean() is None
    assert left(paths) == list(range(9))


def test_what_was_just_handed_out_stays_and_is_looked_at_again(cache: BlobCache) -> None:
    paths = [put(cache, number, age_s=limits.BLOB_GRACE_S - 1) for number in range(12)]
    assert cleaner(cache).clean() == limits.BLOB_GRACE_S
    assert left(paths) == list(range(12))


def test_twice_too_much_shortens_the_grace(cache: BlobCache) -> None:
    young = [put(cache, number, age_s=limits.BLOB_SHORT_GRACE_S - 1) for number in range(5)]
    older = [put(cache, number, age_s=limits.BLOB_SHORT_GRACE_S + number) for number in range(5, 30)]
    assert cleaner(cache).clean() is None
    assert left(young) == list(range(5))
    assert len(left(older)) == 4


def test_a_blob_that_is_held_stays_whatever_its_age(cache: BlobCache) -> None:
    paths = [put(cache, number, age_s=1000 - number) for number in range(12)]
    held = os.open(paths[0], os.O_RDONLY)
    assert blobs._lock(held, exclusive=False)
    assert cleaner(cache).clean() is None
    os.close(held)
    assert left(paths) == [0, *range(4, 12)]


def test_times_in_the_future_go_first(cache: BlobCache) -> None:
    paths = [put(cache, 0, age_s=-3600), *(put(cache, number, age_s=1000) for number in range(1, 10))]
    assert cleaner(cache).clean() is None
    assert left(paths) == list(range(1, 10))


def test_what_is_not_a_blob_is_left_alone(cache: BlobCache) -> None:
    directory = Path(cache.directory)
    (directory / "7").mkdir()
    for name in ("7/.lock", "7/notes.txt", "notes.blob", "tmp/BUC1"):
        (directory / name).write_bytes(bytes(5000))
    assert cleaner(cache).clean() is None
    assert all((directory / name).exists() for name in ("7/.lock", "7/notes.txt", "notes.blob", "tmp/BUC1"))


def test_parts_go_after_a_day_unless_they_are_being_filled(cache: BlobCache) -> None:
    forgotten = cache.path_of(b"\0" * 8, TID) + ".part"
    os.makedirs(os.path.dirname(forgotten))
    fresh = forgotten.replace(".part", ".other.part")
    for path, age_s in ((forgotten, limits.BLOB_LEFTOVER_S + 1), (fresh, limits.BLOB_LEFTOVER_S - 1)):
        Path(path).write_bytes(b"")
        os.utime(path, ns=(NOW_NS, NOW_NS - int(age_s * NS)))
    part = cache.part(cache.path_of(b"\0" * 7 + b"\1", TID), 1.0)
    assert part is not None
    os.utime(part._name, ns=(0, 0))
    cleaner(cache).clean()
    assert [os.path.exists(path) for path in (forgotten, fresh, part._name)] == [False, True, True]
    part.close()


def test_one_process_cleans_at_a_time_and_does_it_once_more_for_the_other(cache: BlobCache) -> None:
    attempt = os.path.join(cache.directory, "check_size.attempt")
    paths = [put(cache, number, age_s=1000) for number in range(12)]
    # The way ZEO's client does it.
    lock = zc.lockfile.LockFile(os.path.join(cache.directory, "check_size.lock"))
    assert cleaner(cache).clean() is None
    assert left(paths) == list(range(12))
    assert os.path.exists(attempt)
    lock.close()
    one = cleaner(cache)
    passes: list[int] = []
    passing = one._pass

    def once_more() -> float | None:
        passes.append(1)
        if len(passes) == 1:
            assert cleaner(cache).clean() is None, "another process comes while we clean"
        return passing()

    one._pass = once_more  # type: ignore[method-assign]
    assert one.clean() is None
    assert len(passes) == 2
    assert len(left(paths)) == 9
    assert not os.path.exists(attempt)


# In the background ------------------------------------------------------------------------------------


@pytest.fixture
def working(cache: BlobCache) -> Iterator[Cleaner]:
    one = cleaner(cache)
    cache.added = one.added
    yield one
    one.close(10.0)
    assert "zeoid cleans blobs" not in {thread.name for thread in threading.enumerate()}


def test_it_is_cleaned_when_a_step_was_added(cache: BlobCache, working: Cleaner) -> None:
    paths = [put(cache, number, age_s=1000, size_bytes=9) for number in range(11)]
    assert working._thread is None, "99 bytes are less than a step"
    paths += [put(cache, number, age_s=1000, size_bytes=100) for number in range(11, 25)]
    sizes_bytes = [9] * 11 + [100] * 14  # a file that is looked up may be gone by then
    wait_until(lambda: sum(sizes_bytes[number] for number in left(paths)) <= 900, "room")
    wait_until(lambda: working._thread is None, "the end of the thread")


def test_what_had_to_stay_does_not_keep_the_thread_from_ending(cache: BlobCache, working: Cleaner) -> None:
    cache.added = lambda size_bytes: None  # a file that has no age yet, by this clock, would go first
    paths = [put(cache, number, age_s=1) for number in range(15)]
    working.start()
    wait_until(lambda: not working._wake.is_set(), "a first look")
    assert len(left(paths)) == 15


def test_nothing_is_begun_after_the_end(cache: BlobCache, working: Cleaner) -> None:
    working.close(1.0)
    working.added(10_000)
    assert working._thread is None


FILL = """
import os, sys
from zeoid.cache.blobs import BlobCache
from zeoid.cache.cleaning import Cleaner
directory, number = sys.argv[1], int(sys.argv[2])
cache = BlobCache(directory)
cleaner = Cleaner(cache, 100_000, 10_000)
cache.added = cleaner.added
for index in range(100):
    path = cache.path_of((number * 1000 + index).to_bytes(8, "big"), bytes(8))
    part = cache.part(path, 10.0)
    part.begin(); part.write(bytes(5000)); part.end(); part.place(); part.close()
    os.utime(path, (1, 1))
cleaner.start()
thread = cleaner._thread
if thread is not None:
    thread.join(30)
"""


def test_the_bound_holds_for_several_processes(tmp_path: Path) -> None:
    fillers = [
        subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path), str(number)], env=environment())
        for number in range(4)
    ]
    assert [filler.wait(60) for filler in fillers] == [0] * 4
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.blob"))
    assert 50_000 < total <= 100_000
