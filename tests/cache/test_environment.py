"""The directory of a shared object cache: what is found there, and what becomes of it.

Whatever it is, the cache works without it, and says so in one line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from tests.cache.sharing import KEY, ROOT, SIZE_BYTES, Other, flush, oid, tid
from tests.peers import die_with_parent
from tests.peers import environment as variables
from tests.room import no_room_beyond
from zeoid import limits
from zeoid.cache import environment
from zeoid.cache.environment import Environment, Unusable
from zeoid.cache.records import VERSION
from zeoid.cache.shared import SharedCache
from zeoid.model import NO_TID

T3, T5, T6 = map(tid, (3, 5, 6))
COUNT = 100


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(limits, "SHARED_CACHE_OPEN_S", 0.2)
    monkeypatch.setattr(SharedCache, "_start_flusher", lambda _: None)
    yield
    assert not environment._all


@contextlib.contextmanager
def opened(cache_dir: Path, key: str = KEY) -> Iterator[SharedCache]:
    """A process's cache, which was told everything up to T5."""
    cache = SharedCache(cache_dir, key, SIZE_BYTES)
    try:
        cache.applied()
        cache.started_over(T5)
        yield cache
    finally:
        cache.close()


def fill(cache_dir: Path) -> Path:
    """Leave an environment there, with objects in it."""
    with opened(cache_dir) as cache:
        for number in range(COUNT):
            cache.store(oid(number), T3, None, b"%d" % number * 100)
        flush(cache)
        assert cache._here is not None
        return cache._here[0].path


def found(cache: SharedCache) -> int:
    """How many of these are still there. What is found must be right."""
    answers = [cache.load_before(oid(number), T6, T5) for number in range(COUNT)]
    for number, answer in enumerate(answers):
        assert answer in (None, (b"%d" % number * 100, T3, None))
    return COUNT - answers.count(None)


def works(cache: SharedCache) -> bool:
    """Whether it keeps what it is given, and ends what was overwritten."""
    cache.store(oid(500), T3, None, b"kept")
    with contextlib.suppress(TimeoutError):
        flush(cache)
    before = cache.load_before(oid(500), T6, T5)
    cache.invalidate(T6, [oid(500)])
    after = cache.load_before(oid(500), tid(7), T6)
    past = cache.load_before(oid(500), T6, T6)
    return (before, after, past) == ((b"kept", T3, None), None, (b"kept", T3, T6))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# Sound ones -------------------------------------------------------------------------------------------


def test_nothing_becomes_an_environment_that_only_its_owner_can_read(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        path = fill(tmp_path / "made" / "here")
    finally:
        os.umask(previous)
    assert mode(tmp_path / "made" / "here") == mode(path) == 0o700
    assert {each.name: mode(each) for each in path.iterdir() if each.name != "about.json"} == {
        "data.mdb": 0o600, "lock.mdb": 0o600, "users": 0o600, "write": 0o600,
    }  # fmt: skip
    (lock,) = [each for each in path.parent.iterdir() if each.is_file()]
    assert mode(lock) == 0o600
    assert lock.suffix == ".lock"
    assert mode(path / "about.json") == 0o600
    assert (path / "data.mdb").stat().st_size == SIZE_BYTES


def test_one_that_is_sound_is_joined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fill(tmp_path)
    with opened(tmp_path) as cache:
        assert found(cache) == COUNT
        assert environment.is_used(path)
        assert works(cache)
    assert not environment.is_used(path)
    assert caplog.records == []
    assert environment.environments(tmp_path) == [path]


def test_its_maker_decides_its_size(tmp_path: Path) -> None:
    path = fill(tmp_path)
    here = environment.join(tmp_path, KEY, 2 * SIZE_BYTES)
    assert here.size_bytes == SIZE_BYTES == (path / "data.mdb").stat().st_size
    environment.leave(here)


def test_each_storage_has_its_own(tmp_path: Path) -> None:
    fill(tmp_path)
    with opened(tmp_path, "another storage") as cache:
        assert found(cache) == 0
        assert works(cache)
    assert len(environment.environments(tmp_path)) == 2
    with opened(tmp_path) as cache:
        assert found(cache) == COUNT


def test_a_directory_that_is_a_link(tmp_path: Path) -> None:
    """The directory is chosen by whoever configures; it may be elsewhere."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link")
    with opened(tmp_path / "real") as cache:
        assert found(cache) == COUNT


# Unsound ones -----------------------------------------------------------------------------------------


def cut_in_half(path: Path) -> None:
    os.truncate(path / "data.mdb", SIZE_BYTES // 2)


def garble(path: Path) -> None:
    with (path / "data.mdb").open("r+b") as file:
        file.write(random.Random(1).randbytes(SIZE_BYTES))


def zero(path: Path) -> None:
    with (path / "data.mdb").open("r+b") as file:
        file.write(bytes(SIZE_BYTES))


def remove_data(path: Path) -> None:
    (path / "data.mdb").unlink()


def say(path: Path, **words: object) -> None:
    said = json.loads((path / "about.json").read_text())
    (path / "about.json").write_text(json.dumps({**said, **words}))


def garble_about(path: Path) -> None:
    (path / "about.json").write_bytes(b"\xff\0{")


def put_a_file_there(path: Path) -> None:
    environment._remove(path)
    path.write_text("mine")


UNSOUND = [
    (cut_in_half, "it was cut off"),
    (garble, "MDB_INVALID"),
    (zero, "MDB_INVALID"),
    (remove_data, "it has no data"),
    (garble_about, "it does not say what it is"),
    (lambda path: (path / "about.json").write_text("[]"), "it does not say what it is"),
    (lambda path: (path / "about.json").unlink(), "it does not say what it is"),
    (lambda path: say(path, version=VERSION + 1), f"it is of version {VERSION + 1}, not {VERSION}"),
    (lambda path: say(path, key="another"), "it is another storage's"),
    (lambda path: say(path, identity=None), "it has no identity"),
    (lambda path: path.chmod(0o770), "no directory that only its owner can read"),
]


@pytest.mark.parametrize(("spoil", "reason"), UNSOUND)
def test_one_that_is_unsound_is_made_anew(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(tmp_path)
    spoil(path)
    with opened(tmp_path) as cache:
        assert found(cache) == 0
        assert works(cache)
        assert cache._here is not None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{path} is made anew: ")
    assert reason in record.getMessage()
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([path.name, f"{path.name[:16]}.lock"])


@pytest.mark.parametrize(
    ("spoil", "reason"), [each for each in UNSOUND if each[0] not in (garble, zero, cut_in_half)]
)
def test_one_that_is_unsound_and_used_is_left_alone(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(tmp_path)
    with Other(tmp_path) as other:
        assert other.ask("cache.applied()[0]") == T5
        spoil(path)
        before = sorted(os.listdir(path))
        with opened(tmp_path) as cache:
            assert found(cache) == 0
            assert works(cache)
            assert cache._here is None
        (record,) = caplog.records
        assert record.getMessage().startswith("without a shared object cache: ")
        assert record.getMessage().endswith("other processes use it")
        assert sorted(os.listdir(path)) == before
        assert other.ask("cache.load_before(oid(7), tid(6), tid(5))") == (b"7" * 100, T3, None)


@pytest.mark.parametrize("seed", range(6))
def test_bytes_of_objects_that_have_changed_are_not_answered(tmp_path: Path, seed: int) -> None:
    """LMDB gives them out as they are."""
    path = fill(tmp_path)
    choices = random.Random(seed)
    data = bytearray((path / "data.mdb").read_bytes())
    damaged = choices.sample(range(COUNT), 10)
    for number in damaged:
        place = -1
        while (place := data.find(T3 + tid(1) + b"%d" % number * 100, place + 1)) >= 0:
            data[place + choices.randrange(8 + 8 + 100)] ^= 1 << choices.randrange(8)
    (path / "data.mdb").write_bytes(data)
    with opened(tmp_path) as cache:
        assert found(cache) <= COUNT - 10
        assert cache._here is not None
        assert cache._here[0].records.damaged() >= 10
        cache.invalidate(T6, map(oid, range(COUNT)))
        for number in range(COUNT):
            assert cache.load_before(oid(number), T6, T6) in (None, (b"%d" % number * 100, T3, T6))


@pytest.mark.parametrize("value", [b"", b"x", b"x" * 40, b"\0" * 33])
def test_a_state_that_is_damaged(tmp_path: Path, value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody may believe that it was told more than it was."""
    path = fill(tmp_path)
    with opened(tmp_path) as cache:
        assert cache._here is not None
        here = cache._here[0]
        with here._env.begin(write=True) as txn:
            txn.put(b"state", value, db=here.records._state)
    with opened(tmp_path) as cache:
        assert cache.applied() == (T5, None)
        assert found(cache) == 0
        assert works(cache)
        assert cache._here is not None
    (record,) = caplog.records
    assert record.getMessage() == f"the shared object cache {path} is set aside: its state is damaged"


def test_a_state_in_which_a_bit_has_changed(tmp_path: Path) -> None:
    fill(tmp_path)
    with opened(tmp_path) as cache:
        assert cache._here is not None
        here = cache._here[0]
        with here._env.begin(write=True) as txn:
            value = bytearray(txn.get(b"state", db=here.records._state))
            value[7] ^= 0x10
            txn.put(b"state", bytes(value), db=here.records._state)
    cache = SharedCache(tmp_path, KEY, SIZE_BYTES)
    assert cache.applied() == (NO_TID, None)
    cache.close()


@pytest.mark.parametrize("value", [b"", b"x", b"x" * 12, b"x" * 19])
def test_records_that_are_too_short(tmp_path: Path, value: bytes) -> None:
    fill(tmp_path)
    with opened(tmp_path) as cache:
        assert cache._here is not None
        here = cache._here[0]
        with here._env.begin(write=True) as txn:
            for number, database in enumerate(here.records._current):
                txn.put(oid(number), value, db=database)
            txn.put(oid(2) + T5, value, db=here.records._past[0])
        assert here.records.damaged() == 3
        assert cache.load_before(oid(2), T3, T5) is None
        assert found(cache) == COUNT - 1  # the other one is sound in the young generation
        here.records.used.update(map(oid, range(COUNT)))
        flush(cache)
        cache.invalidate(T6, map(oid, range(COUNT)))
        assert cache._here[0] is here
        assert cache.load_before(oid(3), T6, T6) == (b"3" * 100, T3, T6)


# Others -----------------------------------------------------------------------------------------------


def test_one_of_another_boot_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """LMDB's files were not synced: there may be anything."""
    path = fill(tmp_path)
    monkeypatch.setattr(environment, "_boot", lambda: "another")
    with opened(tmp_path) as cache:
        assert found(cache) == 0
        assert works(cache)
        assert not path.exists()
        (now,) = environment.environments(tmp_path)
        assert "-another-" in now.name
    assert caplog.records == []


def test_one_of_another_namespace_that_nobody_uses_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(tmp_path)
    monkeypatch.setattr(environment, "_namespace", lambda: "another")
    with opened(tmp_path) as cache:
        assert found(cache) == COUNT
        assert works(cache)
    (now,) = environment.environments(tmp_path)
    assert now != path
    assert now.name.endswith("-another")
    assert caplog.records == []


def test_one_of_another_namespace_that_is_used_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fill(tmp_path)
    with Other(tmp_path) as other:
        assert other.ask("cache.applied()[0]") == T5
        with monkeypatch.context() as patch:
            patch.setattr(environment, "_namespace", lambda: "another")
            with opened(tmp_path) as cache:
                assert found(cache) == 0
                assert works(cache)
        assert len(environment.environments(tmp_path)) == 2
        assert path.exists()
        assert other.ask("cache.load_before(oid(7), tid(6), tid(5))") == (b"7" * 100, T3, None)
    # Ours is there, so the other one is not taken over when it is used no more.
    with opened(tmp_path) as cache:
        assert found(cache) == COUNT
    assert environment.environments(tmp_path) == [path]


@pytest.mark.parametrize("name", ["new", "gone"])
def test_what_was_left_by_who_was_killed_is_removed(tmp_path: Path, name: str) -> None:
    path = fill(tmp_path)
    left = tmp_path / f".{name}-{path.name}"
    left.mkdir()
    (left / "data.mdb").write_bytes(b"half")
    foreign = tmp_path / f".{name}-{'0' * 16}-of-another-key"
    foreign.mkdir()
    with opened(tmp_path) as cache:
        assert found(cache) == COUNT
    assert not left.exists()
    assert foreign.exists()  # it may be just being made
    assert environment.environments(tmp_path) == [path]


def test_what_is_no_environment_though_it_has_the_name_of_one(tmp_path: Path) -> None:
    path = fill(tmp_path)
    half = tmp_path / f"{path.name[:16]}-what-isthis"
    half.mkdir()
    (half / "data.mdb").write_bytes(b"half")
    file = tmp_path / f"{path.name[:16]}-mine"
    file.write_text("mine")
    with opened(tmp_path) as cache:
        assert found(cache) == COUNT
    assert not half.exists()
    assert file.read_text() == "mine"


def test_all_are_removed(tmp_path: Path) -> None:
    path = fill(tmp_path)
    with opened(tmp_path, "another storage"):
        pass
    with opened(tmp_path) as cache:
        assert set(environment.clear(tmp_path)) > {path}
        assert found(cache) == COUNT  # it goes on with it
        assert environment.environments(tmp_path) == []
    with opened(tmp_path) as cache:
        assert found(cache) == 0


def test_one_that_says_nothing_is_set_aside_all_the_same(tmp_path: Path) -> None:
    """Whoever sets it aside may be reading the server's stream, and must get through."""
    with opened(tmp_path) as cache:
        assert cache._here is not None
        here = cache._here[0]
        garble_about(here.path)
        cache._leave(here, "the test says so")
        assert works(cache)


# Refusals ---------------------------------------------------------------------------------------------


def a_file(directory: Path) -> None:
    directory.write_text("mine")


def a_link_to_nothing(directory: Path) -> None:
    directory.symlink_to(directory.parent / "nothing" / "there")


def writable_by_others(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)


def writable_by_the_group(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o770)


def below_a_file(directory: Path) -> None:
    directory.symlink_to(directory.parent / "file" / "below")
    (directory.parent / "file").write_text("mine")


def with_a_lock_that_is_a_link(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory.parent / "precious").write_text("mine")
    (directory / f"{environment._name(KEY)}.lock").symlink_to(directory.parent / "precious")


def with_a_file_for_an_environment(directory: Path) -> None:
    put_a_file_there(fill(directory))


REFUSED = [
    (a_file, "File exists"),
    (a_link_to_nothing, "File exists"),
    (below_a_file, "Not a directory|File exists"),
    (writable_by_others, "others may write to"),
    (writable_by_the_group, "others may write to"),
    (with_a_lock_that_is_a_link, "Too many levels of symbolic links"),
    (with_a_file_for_an_environment, "Not a directory"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_a_directory_that_is_refused(
    tmp_path: Path, make: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    make(directory)
    check_refusal(directory, reason, caplog)


def check_refusal(directory: Path, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with opened(directory) as cache:
        assert found(cache) == 0
        assert works(cache)
        assert cache._here is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith("without a shared object cache: ")
    assert any(each in text for each in reason.split("|")), text
    assert str(directory) in text


def test_the_directory_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    check_refusal(tmp_path, "belongs to another user", caplog)
    assert list(tmp_path.iterdir()) == []


IN_NAMESPACE = """
import logging, pathlib, sys
from tests.cache import test_environment as tests
logging.basicConfig(format="%(message)s")
with tests.opened(pathlib.Path(sys.argv[1])) as cache:
    print(tests.works(cache), cache._here is None)
"""


def run_in_namespace(setup: str, directory: Path) -> tuple[str, list[str]]:
    """What a process says, and logs, that meets file systems of its own."""
    script = f"{setup} && exec {sys.executable} -c '{IN_NAMESPACE}' {directory}"
    done = subprocess.run(
        [*die_with_parent(), "unshare", "--mount", "--map-root-user", "sh", "-c", script],
        cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file systems of one's own here: {done.stderr}")
    return done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_that_cannot_be_written_to(tmp_path: Path, there: bool) -> None:
    if there:
        fill(tmp_path)
    said, logged = run_in_namespace(f"mount --bind -o ro {tmp_path} {tmp_path}", tmp_path)
    assert said == "True True\n"
    assert logged == [f"without a shared object cache: {tmp_path}: Read-only file system"]


@pytest.mark.parametrize("size", ["8k", "64k", "200k"])
def test_a_disk_that_is_full(tmp_path: Path, size: str) -> None:
    """Before there is an environment, or when it is filled."""
    setup = f"mount -t tmpfs -o size={size},mode=0700 tmpfs {tmp_path}"
    said, logged = run_in_namespace(setup, tmp_path)
    assert said in ("True True\n", "True False\n")
    assert all("Traceback" not in line for line in logged)
    assert len(logged) == (said == "True True\n"), logged


def test_no_room_to_make_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with no_room_beyond(SIZE_BYTES - 1):
        check_refusal(tmp_path, os.strerror(errno.EFBIG), caplog)
    assert [each.suffix for each in tmp_path.iterdir()] == [".lock"]


def test_a_disk_that_becomes_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fill(tmp_path)
    with opened(tmp_path) as cache:
        with no_room_beyond(8192):
            cache.invalidate(T6, [oid(1)])
            assert cache._here is None
            assert cache.load_before(oid(1), tid(7), T6) is None
            cache.store(oid(1), T6, None, b"new")
            assert cache.load_before(oid(1), tid(7), T6) == (b"new", T6, None)
        assert cache.load_before(oid(1), tid(7), T6) == (b"new", T6, None)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"the shared object cache {path} is set aside",
        "without a shared object cache",
    ]


def test_a_process_is_told_why(tmp_path: Path) -> None:
    a_file(tmp_path / "file")
    with pytest.raises(Unusable, match="file: File exists"):
        environment.join(tmp_path / "file", KEY, SIZE_BYTES)


def test_what_fails_halfway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise lmdb.Error("no")

    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    monkeypatch.setattr(environment.Records, "__init__", fail)
    with pytest.raises(Unusable, match="no"):
        environment.join(tmp_path, KEY, SIZE_BYTES)
    assert [each.suffix for each in tmp_path.iterdir()] == [".lock"]
    monkeypatch.undo()
    path = fill(tmp_path)
    monkeypatch.setattr(environment.Records, "__init__", fail)
    with pytest.raises(lmdb.Error, match="no"):
        Environment(path, SIZE_BYTES)
    assert not environment.is_used(path)
    if files:
        assert len(os.listdir("/proc/self/fd")) == files
