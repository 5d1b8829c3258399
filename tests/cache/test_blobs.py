"""The directory of blob files: its layout, who fills a file, and that nothing handed out is removed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZEO.ClientStorage import BlobCacheLayout

from tests.peers import environment
from tests.room import no_room_beyond
from zeoid import limits
from zeoid.cache import blobs
from zeoid.cache.blobs import BlobCache, Part
from zeoid.errors import ClientError, ConfigurationError, TimedOut

OID = b"\0\0\0\0\0\0\x12\x34"
TID = b"\x03\xfb\xb5\x4d\0\0\0\1"
FULL = r"the blob directory .*cache: File too large"
NS = 1_000_000_000
NOW_NS = 1_700_000_000 * NS
LONG_AGO_NS = NOW_NS - 1000 * NS


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(str(tmp_path / "cache"), now_ns=lambda: NOW_NS, pause=never)


def never(_: float) -> None:
    raise AssertionError("nothing is to be waited for")


def put(cache: BlobCache, data: bytes = b"data", atime_ns: int = LONG_AGO_NS, oid: bytes = OID) -> str:
    """A blob in the cache that was handed out at *atime_ns*."""
    path = cache.path_of(oid, TID)
    part = cache.part(path, 1.0)
    assert part is not None
    fill(part, data)
    os.utime(path, ns=(atime_ns, atime_ns))
    return path


def fill(part: Part, data: bytes) -> None:
    part.begin()
    part.write(data)
    part.end()
    part.place()
    part.close()


def files(cache: BlobCache) -> list[str]:
    """What there is but for the marker."""
    found = [path for path in Path(cache.directory).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(cache.directory)) for path in found if path.name != ".layout")


# The directory ----------------------------------------------------------------------------------------


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8))
def test_a_blob_is_where_stock_clients_look_for_it(oid: bytes, tid: bytes) -> None:
    ours, theirs = blobs._Layout(), BlobCacheLayout()
    assert ours.getBlobFilePath(oid, tid) == theirs.getBlobFilePath(oid, tid)
    assert ours.oid_to_path(oid) == theirs.oid_to_path(oid)


def test_a_new_directory_has_the_marker_and_nothing_else(cache: BlobCache) -> None:
    assert sorted(os.listdir(cache.directory)) == [".layout", "tmp"]
    assert (Path(cache.directory) / ".layout").read_text() == "zeocache"
    assert os.listdir(os.path.join(cache.directory, "tmp")) == []


@pytest.mark.parametrize("marker", ["", "\n", "zeocache", "zeocache\n"])
def test_a_directory_that_is_a_cache_stays_one(tmp_path: Path, marker: str) -> None:
    (tmp_path / ".layout").write_text(marker)
    BlobCache(str(tmp_path))
    assert (tmp_path / ".layout").read_text().strip() == "zeocache"
    assert os.listdir(tmp_path / "tmp") == []


@pytest.mark.parametrize("marker", ["bushy", "lawn", None])
def test_a_servers_directory_is_refused_and_left_alone(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "0x00").mkdir()
    if marker:
        (tmp_path / ".layout").write_text(marker)
    with pytest.raises(ConfigurationError, match="blob directory of a server"):
        BlobCache(str(tmp_path))
    assert (tmp_path / ".layout").exists() == bool(marker)


def test_a_directory_that_can_not_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file/cache can't be used: Not a directory"):
        BlobCache(str(tmp_path / "file" / "cache"))


def test_what_killed_transactions_left_goes_after_a_day(tmp_path: Path) -> None:
    BlobCache(str(tmp_path))
    for name in ("zeoid-1", "savepoint-1"):
        (tmp_path / "tmp" / name).write_text("")
    changed_ns = (tmp_path / "tmp" / "zeoid-1").stat().st_ctime_ns
    day_ns = int(limits.BLOB_LEFTOVER_S) * NS
    BlobCache(str(tmp_path), now_ns=lambda: changed_ns + day_ns - NS)
    assert sorted(os.listdir(tmp_path / "tmp")) == ["savepoint-1", "zeoid-1"]
    BlobCache(str(tmp_path), now_ns=lambda: changed_ns + day_ns + NS)
    assert os.listdir(tmp_path / "tmp") == ["savepoint-1"]


# Storing ----------------------------------------------------------------------------------------------


def test_a_file_that_is_taken_belongs_to_the_cache_and_is_placed_by_name(
    cache: BlobCache, tmp_path: Path
) -> None:
    added: list[int] = []
    cache.added = added.append
    (tmp_path / "file").write_bytes(b"content")
    taken = cache.taken(OID)
    taken.take(str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()
    assert os.stat(taken.path).st_mode & 0o222 == 0
    taken.place(TID)
    assert files(cache) == [os.path.relpath(cache.path_of(OID, TID), cache.directory)]
    assert Path(cache.path_of(OID, TID)).read_bytes() == b"content"
    assert added == [7]


def test_a_file_that_is_discarded_is_gone(cache: BlobCache, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    taken = cache.taken(OID)
    taken.take(str(tmp_path / "file"))
    taken.discard()
    taken.discard()
    assert files(cache) == []


def test_a_file_that_can_not_be_placed_is_discarded(cache: BlobCache, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    taken = cache.taken(OID)
    taken.take(str(tmp_path / "file"))
    Path(cache.path_of(OID, TID)).mkdir(parents=True)
    taken.place(TID)
    assert files(cache) == []


def test_a_file_that_can_not_be_copied_stays_the_callers(
    cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_partition(*_: Any) -> None:
        raise OSError("another partition")

    (tmp_path / "file").write_bytes(bytes(100_000))
    monkeypatch.setattr(os, "rename", another_partition)
    with no_room_beyond(50_000), pytest.raises(ClientError, match=FULL):
        cache.taken(OID).take(str(tmp_path / "file"))
    assert (tmp_path / "file").stat().st_size == 100_000
    assert files(cache) == []


# Downloads --------------------------------------------------------------------------------------------


def test_a_part_becomes_the_blob_as_a_whole(cache: BlobCache) -> None:
    path = cache.path_of(OID, TID)
    part = cache.part(path, 1.0)
    assert part is not None
    part.begin()
    part.write(b"one")
    assert not os.path.exists(path)
    part.write(b"two")
    part.end()
    part.place()
    part.close()
    assert Path(path).read_bytes() == b"onetwo"
    assert os.stat(path).st_mode & 0o222 == 0
    assert len(files(cache)) == 1
    assert cache.part(path, 1.0) is None, "it is here"
    assert len(files(cache)) == 1, "looking for it leaves nothing"


def test_a_part_that_is_given_up_leaves_nothing(cache: BlobCache) -> None:
    part = cache.part(cache.path_of(OID, TID), 1.0)
    assert part is not None
    part.begin()
    part.write(b"one")
    part.close()
    part.write(b"late")
    part.close()
    assert files(cache) == []


def test_a_part_begins_anew(cache: BlobCache) -> None:
    path = cache.path_of(OID, TID)
    part = cache.part(path, 1.0)
    assert part is not None
    part.begin()
    part.write(b"what came over a connection that was lost")
    fill(part, b"whole")
    assert Path(path).read_bytes() == b"whole"


def test_a_large_blob_is_put_on_the_disk_while_it_comes(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else all of it would be at once, and whoever syncs anything on that disk would wait for it."""
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(
        blobs.system, "begin_writeback", lambda fd, start, length: begun.append((start, start + length))
    )
    part = cache.part(cache.path_of(OID, TID), 1.0)
    assert part is not None
    piece = b"x" * 59_000
    for tries in (1, 2):
        begun.clear()
        part.begin()
        while part.size_bytes < tries * 2.5 * limits.BLOB_WRITEBACK_BYTES:
            part.write(piece)
        assert [end for _, end in begun[:-1]] == [start for start, _ in begun[1:]]
        assert begun[0][0] == 0
        assert part.size_bytes - begun[-1][1] < limits.BLOB_WRITEBACK_BYTES
    part.close()


def test_only_one_fills_a_part_and_the_next_one_gets_what_is_left(cache: BlobCache) -> None:
    path = cache.path_of(OID, TID)
    first = cache.part(path, 1.0)
    assert first is not None
    first.begin()
    waits: list[float] = []

    def pause(pause_s: float) -> None:
        waits.append(pause_s)
        if len(waits) == 5:
            first.close()

    other = BlobCache(cache.directory, pause=pause)
    second = other.part(path, 1000.0)
    assert second is not None
    assert len(waits) == 5
    fill(second, b"second")
    assert Path(path).read_bytes() == b"second"


def test_whoever_waits_for_a_part_gets_the_blob(cache: BlobCache) -> None:
    path = cache.path_of(OID, TID)
    first = cache.part(path, 1.0)
    assert first is not None
    other = BlobCache(cache.directory, pause=lambda _: fill(first, b"first"))
    assert other.part(path, 1000.0) is None
    assert files(cache) == [os.path.relpath(path, cache.directory)]


def test_a_blob_is_not_taken_for_a_part_that_was_opened_before_it_was_placed(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.path_of(OID, TID)
    first = cache.part(path, 1.0)
    assert first is not None
    lock = blobs._lock

    def placed_in_between(fd: int, exclusive: bool) -> bool:
        monkeypatch.undo()
        fill(first, b"first")
        return lock(fd, exclusive)

    monkeypatch.setattr(blobs, "_lock", placed_in_between)
    assert cache.part(path, 1.0) is None
    assert Path(path).read_bytes() == b"first"
    assert len(files(cache)) == 1


def test_waiting_for_a_part_has_a_deadline_on_its_progress(cache: BlobCache) -> None:
    path = cache.path_of(OID, TID)
    part = cache.part(path, 1.0)
    assert part is not None
    part.begin()
    waited: list[float] = []
    stirs: list[int] = []

    def pause(pause_s: float) -> None:
        waited.append(pause_s)
        if len(waited) < 100:
            part.write(b"a byte or so")

    other = BlobCache(cache.directory, pause=pause)
    with pytest.raises(TimedOut, match="gets nowhere"):
        other.part(path, 1.0, lambda: stirs.append(1))
    assert sum(waited[:100]) > 2.0, "it went on while something came"
    assert sum(waited[100:]) < 2.0
    assert len(stirs) == 100
    part.close()


HOLD_A_PART = """
import sys
from zeoid.cache.blobs import BlobCache
cache = BlobCache(sys.argv[1])
part = cache.part(sys.argv[2], 1.0)
part.begin()
part.write(b"half of it")
print("holding", flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_killed_in_a_download_blocks_nobody(cache: BlobCache) -> None:
    path = cache.path_of(OID, TID)
    command = [sys.executable, "-c", HOLD_A_PART, cache.directory, path]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        waits: list[float] = []

        def pause(_: float) -> None:
            waits.append(1)
            process.send_signal(signal.SIGKILL)
            process.wait(10)

        other = BlobCache(cache.directory, pause=pause)
        part = other.part(path, 1000.0)
        assert len(waits) == 1
        assert Path(path + ".part").read_bytes() == b"half of it"
        assert part is not None
        fill(part, b"all of it")
    assert Path(path).read_bytes() == b"all of it"
    assert len(files(cache)) == 1


def test_a_full_disk_fails_the_download_by_the_name_of_the_directory(cache: BlobCache) -> None:
    part = cache.part(cache.path_of(OID, TID), 1.0)
    assert part is not None
    part.begin()
    with no_room_beyond(1000):
        part.write(bytes(600))
        part.write(bytes(600))
    part.write(b"this would fit, and must not be there without the rest")
    part.end()
    with pytest.raises(ClientError, match=FULL):
        part.place()
    part.close()
    assert files(cache) == []


def test_a_forked_child_gives_back_what_its_parent_has_locked(cache: BlobCache) -> None:
    path = cache.path_of(OID, TID)
    part = cache.part(path, 1.0)
    assert part is not None
    cache.after_fork()
    again = cache.part(path, 1.0)
    assert again is not None, "the lock is gone with the file"
    again.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(part._fd)
    part._open = False


def test_without_locks_everybody_downloads_for_himself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, exclusive: bool) -> bool:
        raise OSError("no locks here")

    monkeypatch.setattr(blobs, "_lock", refuse)
    cache = BlobCache(str(tmp_path), now_ns=lambda: NOW_NS, pause=never)
    assert "can't be locked" in caplog.text
    path = cache.path_of(OID, TID)
    first, second = cache.part(path, 1.0), cache.part(path, 1.0)
    assert first is not None
    assert second is not None
    fill(first, b"same")
    fill(second, b"same")
    held = cache.hold(path)
    assert held is not None
    cache.let_go(held)
    assert files(cache) == [os.path.relpath(path, cache.directory)]
    assert not cache.remove(path, NOW_NS, LONG_AGO_NS)


# Handing out and removing -----------------------------------------------------------------------------


def test_what_is_not_here_is_not_held(cache: BlobCache) -> None:
    assert cache.hold(cache.path_of(OID, TID)) is None
    assert not cache.remove(cache.path_of(OID, TID), LONG_AGO_NS, NOW_NS)


def test_holding_sets_the_time_of_access_and_only_that(cache: BlobCache) -> None:
    path = put(cache)
    held = cache.hold(path)
    assert held is not None
    cache.let_go(held)
    assert os.stat(path).st_atime_ns == NOW_NS
    assert os.stat(path).st_mtime_ns == LONG_AGO_NS


def test_an_old_blob_can_be_removed(cache: BlobCache) -> None:
    path = put(cache)
    assert cache.remove(path, LONG_AGO_NS, LONG_AGO_NS)
    assert files(cache) == []


def test_a_blob_that_is_held_is_not_removed(cache: BlobCache) -> None:
    path = put(cache)
    held = cache.hold(path)
    assert held is not None
    assert not cache.remove(path, NOW_NS, NOW_NS)
    cache.let_go(held)
    assert cache.remove(path, NOW_NS, NOW_NS)


def test_a_blob_that_was_handed_out_since_it_was_looked_at_is_not_removed(cache: BlobCache) -> None:
    path = put(cache)
    held = cache.hold(path)
    assert held is not None
    cache.let_go(held)
    assert not cache.remove(path, LONG_AGO_NS, NOW_NS), "it has another time than was seen"
    assert not cache.remove(path, NOW_NS, NOW_NS - 1), "it is too young"


def test_a_time_in_the_future_protects_nothing(cache: BlobCache) -> None:
    path = put(cache, atime_ns=NOW_NS + 3600 * NS)
    assert cache.remove(path, NOW_NS + 3600 * NS, LONG_AGO_NS)


def test_whoever_stops_while_removing_delays_others_only_for_a_while(tmp_path: Path) -> None:
    waits: list[float] = []
    cache = BlobCache(str(tmp_path / "cache"), pause=waits.append)
    path = put(cache)
    stopped = os.open(path, os.O_RDONLY)
    assert blobs._lock(stopped, exclusive=True)
    assert cache.hold(path) is None
    assert sum(waits) == pytest.approx(5.0)
    part = cache.part(path, 1.0)
    assert part is not None, "it is downloaded anew, beside the one that is about to be removed"
    fill(part, b"anew")
    held = cache.hold(path)
    assert held is not None
    assert os.read(held, 10) == b"anew"
    cache.let_go(held)
    os.close(stopped)


class Steps:
    """Two threads that take turns as a schedule says: each call to the system is a step."""

    def __init__(self, schedule: tuple[int, ...]) -> None:
        self._schedule = list(schedule)
        self._changed = threading.Condition()
        self._done: set[int] = set()
        self._numbers: dict[int, int] = {}
        #: How many steps each one took.
        self.taken = [0, 0]

    def step(self) -> None:
        number = self._numbers.get(threading.get_ident())
        if number is None:
            return
        with self._changed:
            assert self._changed.wait_for(lambda: self._next(number), 10)
            self.taken[number] += 1
            if self._schedule:
                self._schedule.pop(0)
            self._changed.notify_all()

    def _next(self, number: int) -> bool:
        while self._schedule and self._schedule[0] in self._done:
            self._schedule.pop(0)
        if self._schedule:
            return self._schedule[0] == number
        return True

    def run(self, *functions: Callable[[], Any]) -> list[Any]:
        results: list[Any] = [None] * len(functions)

        def each(number: int) -> None:
            self._numbers[threading.get_ident()] = number
            try:
                self.step()
                results[number] = functions[number]()
            except BaseException as problem:
                results[number] = problem
            finally:
                with self._changed:
                    self._done.add(number)
                    self._changed.notify_all()

        threads = [threading.Thread(target=each, args=(number,)) for number in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return results


def stepwise(steps: Steps, module: Any) -> SimpleNamespace:
    """*module*, whose functions of files are steps."""

    def step_by_step(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            steps.step()
            return function(*args, **keywords)

        return call

    names = "open", "stat", "fstat", "utime", "close"
    changed = {name: step_by_step(getattr(module, name)) for name in names}
    return SimpleNamespace(**{**vars(module), **changed})


MOST_STEPS = 6


@pytest.mark.parametrize("first", [0, 1])
def test_handing_out_and_removing_exclude_each_other_in_every_order(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was handed out is there. Either may have any number of steps before the other goes on."""
    cache = BlobCache(str(tmp_path), now_ns=lambda: NOW_NS, pause=lambda _: None)
    real_os, real_lock, real_unlink = os, blobs._lock, blobs.zodb_blob.remove_committed
    outcomes = set()
    for runs in itertools.product(range(MOST_STEPS), repeat=4):
        schedule = tuple(
            number for run, number in zip(runs, itertools.cycle((first, 1 - first))) for _ in range(run)
        )
        path = put(cache)
        steps = Steps(schedule)
        monkeypatch.setattr(blobs, "os", stepwise(steps, real_os))

        def lock(fd: int, exclusive: bool, steps: Steps = steps) -> bool:
            steps.step()
            return real_lock(fd, exclusive)

        def unlink(path: str, steps: Steps = steps) -> None:
            steps.step()
            real_unlink(path)

        cache._pause = lambda _, steps=steps: steps.step()
        monkeypatch.setattr(blobs, "_lock", lock)
        monkeypatch.setattr(blobs.zodb_blob, "remove_committed", unlink)
        held, removed = steps.run(
            lambda path=path: cache.hold(path),
            lambda path=path: cache.remove(path, LONG_AGO_NS, LONG_AGO_NS),
        )
        monkeypatch.undo()
        assert held is None or isinstance(held, int), held
        assert isinstance(removed, bool), removed
        there = os.path.exists(path)
        assert (held is not None) == there == (not removed), (schedule, held, removed)
        outcomes.add((there, removed))
        if held is not None:
            cache.let_go(held)
            os.unlink(path)
    assert outcomes == {(True, False), (False, True)}
