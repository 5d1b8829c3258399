"""Blobs as files: when they are durable, by which name they are found, what may be handed over."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.POSException import POSKeyError, StorageError

from tests.engines.blobfiles import (
    blob_directory,
    content,
    final_files,
    promised,
    stage,
    staged_files,
)
from tests.engines.datafiles import A, B, C, in_thread, tid
from tests.engines.journals import Quick
from zeoid import limits
from zeoid.engines import blobs as module
from zeoid.engines.blobs import BlobDirectory, set_staged_aside
from zeoid.engines.disk import StrPath
from zeoid.engines.journal_format import LoggedBlob
from zeoid.errors import ConfigurationError
from zeoid.testing.disk import FaultyDisk

T1, T2 = tid(1), tid(2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def path(root: Path) -> Path:
    return root / "blobs"


@pytest.fixture
def disk(root: Path) -> FaultyDisk:
    return FaultyDisk(root)


@pytest.fixture
def blobs(path: Path, disk: FaultyDisk) -> BlobDirectory:
    return blob_directory(path, disk)


@pytest.fixture
def done(disk: FaultyDisk, blobs: BlobDirectory, root: Path) -> list[tuple[str, str]]:
    """What is done from now on: operation, and the name of the file or directory."""
    found: list[tuple[str, str]] = []
    disk.on_operation = lambda name, path: found.append((name, os.path.basename(path)))
    return found


class NoLinks(FaultyDisk):
    """A file system that has no hard links."""

    def link(self, source: StrPath, target: StrPath) -> None:
        raise OSError(errno.EPERM, "no links here")


# Arriving ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 900), max_size=12), told=st.sampled_from([None, 0, 1, 5000]))
def test_what_arrives_in_pieces_is_one_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], told: int | None
) -> None:
    root = tmp_path_factory.mktemp("any")
    blobs = blob_directory(root / "blobs", Quick())
    buffer = bytearray(900)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "BLOB_PIECE_BYTES", 500)
        patch.setattr(limits, "BLOB_WRITEBACK_BYTES", 700)
        file = blobs.stage(told)
        wanted = b""
        for number, size in enumerate(sizes):
            buffer[:] = bytes([number + 1]) * 900  # the same memory each time, as from a socket
            file.write(memoryview(buffer)[:size])
            wanted += bytes(buffer[:size])
        staged = file.complete()
    assert staged.size_bytes == len(wanted)
    blob = LoggedBlob(A, staged.name)
    blobs.promise([blob])
    blobs.place(T1, [blob])
    assert content(blobs, A, T1) == wanted


def test_a_complete_blob_is_durable_and_read_only(blobs: BlobDirectory, disk: FaultyDisk, path: Path) -> None:
    path.chmod(0o750)
    stage(blobs, b"content")
    (name,) = staged_files(path)
    for state in disk.crash_states(1):
        file = state / "blobs" / ".staged" / name
        assert not file.exists() or file.read_bytes() == b"content"
    mode = (path / ".staged" / name).stat().st_mode
    assert not mode & 0o222
    assert mode & 0o440 == 0o440
    assert stat.S_IMODE((path / ".staged").stat().st_mode) == 0o700


def test_writing_begins_early_and_little_is_under_way(
    blobs: BlobDirectory, disk: FaultyDisk, done: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_PIECE_BYTES", 100)
    monkeypatch.setattr(limits, "BLOB_WRITEBACK_BYTES", 1000)
    file = blobs.stage()
    for _ in range(35):
        file.write(bytes(100))
    names = [name for name, _ in done if name != "pwrite"]
    assert names == ["open", *["start_writeback"], *["start_writeback", "wait_for_writeback"] * 2]
    assert sum(name == "pwrite" for name, _ in done) == 35
    file.complete()
    assert [name for name, _ in done[-1:]] == ["sync"]


def test_of_a_large_blob_only_the_beginning_stays_in_memory(
    blobs: BlobDirectory, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_PIECE_BYTES", 100)
    monkeypatch.setattr(limits, "BLOB_WRITEBACK_BYTES", 1000)
    monkeypatch.setattr(limits, "BLOB_CACHED_BYTES", 2000)
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(disk, "wait_for_writeback", lambda fd, *where: told.append(("waited", *where)))
    monkeypatch.setattr(disk, "forget_cached", lambda fd, *where: told.append(("forgot", *where)))
    file = blobs.stage()
    for _ in range(50):
        file.write(bytes(100))
    assert [where for what, *where in told if what == "forgot"] == [[2000, 1000], [3000, 1000]]
    assert told[-2:] == [("waited", 3000, 1000), ("forgot", 3000, 1000)]  # on the disk before that
    file.complete()


def test_where_the_system_writes_back_by_itself_only_there_are_syncs(
    blobs: BlobDirectory, disk: FaultyDisk, done: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_PIECE_BYTES", 100)
    monkeypatch.setattr(limits, "BLOB_WRITEBACK_BYTES", 100)
    monkeypatch.setattr(disk, "start_writeback", lambda *given: False)
    file = blobs.stage()
    for _ in range(16):
        file.write(bytes(100))
    assert [name for name, _ in done].count("sync") == 4
    file.abandon()


def test_a_blob_that_would_fill_the_disk_is_refused(
    blobs: BlobDirectory, disk: FaultyDisk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda fd: limits.BLOB_FREE_BYTES + 1999)
    reserved: list[int] = []
    monkeypatch.setattr(disk, "reserve", lambda fd, start, length: reserved.append(length))
    with pytest.raises(OSError, match="No space"):
        blobs.stage(2000)
    assert not reserved, "not even for a moment: a transaction may need that room just then"
    assert staged_files(path) == []
    blobs.stage(1999).abandon()
    assert reserved == [1999]


def test_a_disk_that_somebody_else_fills_meanwhile(
    blobs: BlobDirectory, disk: FaultyDisk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes = [2 * limits.BLOB_FREE_BYTES]
    monkeypatch.setattr(disk, "free_bytes", lambda fd: free_bytes[0])
    monkeypatch.setattr(disk, "reserve", lambda *given: free_bytes.append(free_bytes.pop() // 4))
    with pytest.raises(OSError, match="No space"):
        blobs.stage(2000)
    assert staged_files(path) == []


def test_a_disk_that_fills_while_a_blob_arrives(
    blobs: BlobDirectory, disk: FaultyDisk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_WRITEBACK_BYTES", 1000)
    monkeypatch.setattr(limits, "BLOB_PIECE_BYTES", 1000)
    file = blobs.stage()
    monkeypatch.setattr(disk, "free_bytes", lambda fd: limits.BLOB_FREE_BYTES - 1)
    file.write(bytes(999))
    with pytest.raises(OSError, match="No space"):
        file.write(bytes(1))
    file.abandon()
    file.abandon()
    assert staged_files(path) == []


def upload(blobs: BlobDirectory) -> None:
    file = blobs.stage(4)
    try:
        file.write(b"data")
        file.complete()
    except OSError:
        file.abandon()
        raise


@pytest.mark.parametrize("number", range(1, 5))
def test_whatever_fails_while_it_arrives_nothing_is_left_after_giving_up(
    blobs: BlobDirectory, disk: FaultyDisk, path: Path, number: int
) -> None:
    """Making the file, reserving room, writing, syncing."""
    disk.fail_at(number, OSError(errno.ENOSPC, "full"))
    opened = set(disk._open)
    with pytest.raises(OSError, match="full"):
        upload(blobs)
    assert staged_files(path) == []
    assert set(disk._open) == opened


def test_giving_up_does_not_take_a_complete_blob_away(blobs: BlobDirectory, path: Path) -> None:
    file = blobs.stage()
    file.write(b"x")
    staged = file.complete()
    file.abandon()
    assert len(staged_files(path)) == 1
    blobs.discard([staged.name, b"missing" * 2])
    assert staged_files(path) == []


# Promises ------------------------------------------------------------------------------------------------


def test_a_promise_is_one_sync_for_all_blobs_and_makes_their_names_durable(
    blobs: BlobDirectory, disk: FaultyDisk, done: list[tuple[str, str]], path: Path
) -> None:
    given = [LoggedBlob(oid, stage(blobs, oid).name) for oid in (A, B, C)]
    done.clear()
    blobs.promise(given)
    assert [each for each in done if each[0] != "mkdir"] == [("sync_directory", ".staged")]
    for state in disk.crash_states(5):
        assert len(staged_files(state / "blobs")) == 3
    assert all((path / "0x00" / ("0x00/" * 6) / f"0x0{number}").is_dir() for number in (1, 2, 3))


def test_who_votes_at_the_same_time_shares_a_sync(blobs: BlobDirectory, disk: FaultyDisk) -> None:
    given = [LoggedBlob(oid, stage(blobs, oid).name) for oid in (A, B, C)]
    under_way, go_on = threading.Event(), threading.Event()
    syncs: list[int] = []

    class Held(Exception):
        pass

    real = disk.sync_directory

    def held(folder: StrPath) -> None:
        syncs.append(1)
        if len(syncs) == 1:
            under_way.set()
            assert go_on.wait(30)
        real(folder)

    disk.sync_directory = held  # type: ignore[method-assign]
    with in_thread(lambda: blobs.promise(given[:1])):
        assert under_way.wait(30)
        with in_thread(lambda: blobs.promise(given[1:2])), in_thread(lambda: blobs.promise(given[2:])):
            while blobs._promises < 3:  # both stand in line
                pass
            go_on.set()
    assert len(syncs) == 2
    for state in disk.crash_states(5):
        assert len(staged_files(state / "blobs")) == 3


def test_after_a_sync_of_names_that_failed_no_promise_is_made_but_what_was_promised_is_placed(
    blobs: BlobDirectory, disk: FaultyDisk
) -> None:
    before = promised(blobs, A, b"a")
    blob = LoggedBlob(A, stage(blobs, b"x").name)
    disk.fail_at(1, OSError(errno.EIO, "broken"))
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            blobs.promise([blob])
    blobs.place(T1, [before])
    blobs.sync_names()
    assert content(blobs, A, T1) == b"a"


def test_discarding_leaves_nothing(blobs: BlobDirectory, path: Path) -> None:
    blob = promised(blobs, A, b"a")
    kept = promised(blobs, B, b"b")
    blobs.place(T1, [kept])
    blobs.discard([blob.name], [A])
    blobs.discard([], [B])
    assert not os.path.exists(blobs._layout.directory(A))
    assert content(blobs, B, T1) == b"b"
    assert len(staged_files(path)) == 1


# Placing and settling --------------------------------------------------------------------------------------


def test_placing_is_a_link_and_no_sync(blobs: BlobDirectory, done: list[tuple[str, str]]) -> None:
    blob = promised(blobs, A, b"a")
    done.clear()
    blobs.place(T1, [blob])
    assert done == [("link", "0x03c0000001000000.blob")]
    with pytest.raises(POSKeyError):
        blobs.open(A, T2)
    with pytest.raises(POSKeyError):
        blobs.open(B, T1)


@pytest.mark.parametrize("kind", [FaultyDisk, NoLinks])
def test_from_the_promise_on_there_is_always_a_durable_name(
    root: Path, path: Path, kind: Callable[[Path], FaultyDisk]
) -> None:
    disk = kind(root)
    blobs = blob_directory(path, disk)
    blob = promised(blobs, A, b"content")
    states: list[int] = []

    def look(*given: object) -> None:
        for state in disk.crash_states(20):
            found = [*staged_files(state / "blobs"), *final_files(state / "blobs")]
            assert found
            files = [
                path for path in (state / "blobs").rglob("*") if path.name in {*map(os.path.basename, found)}
            ]
            assert {file.read_bytes() for file in files} == {b"content"}
            states.append(1)

    disk.on_operation = look
    blobs.place(T1, [blob])
    blobs.sync_names()
    blobs.settle()
    blobs.remove_settled()
    look()
    disk.on_operation = None
    for state in disk.crash_states(20):
        assert list(final_files(state / "blobs").values()) == [b"content"]
    assert staged_files(path) == []
    assert len(states) > 20


def test_a_directory_that_somebody_removed_is_made_again(blobs: BlobDirectory) -> None:
    blob = promised(blobs, A, b"a")
    folder = blobs._layout.directory(A)
    os.rmdir(folder)
    os.rmdir(os.path.dirname(folder))
    blobs.place(T1, [blob])
    assert content(blobs, A, T1) == b"a"


def test_a_file_that_was_never_staged_is_an_error(blobs: BlobDirectory) -> None:
    with pytest.raises(FileNotFoundError):
        blobs.place(T1, [LoggedBlob(A, bytes(16))])


def test_a_left_over_of_a_transaction_that_nobody_knows_is_replaced(blobs: BlobDirectory) -> None:
    blobs.place(T1, [promised(blobs, A, b"old")])
    blobs.place(T1, [promised(blobs, A, b"new")])
    assert content(blobs, A, T1) == b"new"


def test_directories_that_others_made_become_durable_too(
    blobs: BlobDirectory, disk: FaultyDisk, root: Path
) -> None:
    """Clients that share the directory make some, and processes that were killed did."""
    os.makedirs(blobs._layout.directory(A))
    blobs.place(T1, [promised(blobs, A, b"a")])
    synced: list[str] = []
    disk.on_operation = lambda name, path: synced.append(path) if name == "sync_directory" else None
    blobs.sync_names()
    assert synced == blobs._layout.above(blobs._layout.directory(A))
    blobs.sync_names()
    assert len(synced) == 9


def test_many_directories_are_synced_all_at_once(
    blobs: BlobDirectory, done: list[tuple[str, str]], disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_SYNCS", 9)
    blobs.place(T1, [promised(blobs, A, b"a")])
    blobs.sync_names()
    assert "sync_all" not in [name for name, _ in done]
    blobs.place(T2, [promised(blobs, A, b"a"), promised(blobs, B, b"b")])
    done.clear()
    blobs.sync_names()
    assert done == [("sync_all", "blobs")]
    for state in disk.crash_states(5):
        assert len(final_files(state / "blobs")) == 3


def test_after_a_sync_of_final_names_that_failed_no_other_one_helps(
    blobs: BlobDirectory, disk: FaultyDisk
) -> None:
    blobs.place(T1, [promised(blobs, A, b"a")])
    disk.fail_at(3, OSError(errno.EIO, "broken"))
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            blobs.sync_names()


def test_who_comes_while_names_are_synced_waits_for_that(blobs: BlobDirectory, disk: FaultyDisk) -> None:
    """Or its Base would say that they are durable before they are."""
    blobs.place(T1, [promised(blobs, A, b"a")])
    under_way, go_on = threading.Event(), threading.Event()
    ended: list[str] = []

    def hold(name: str, path: str) -> None:
        if not under_way.is_set():
            under_way.set()
            assert go_on.wait(30)

    disk.on_operation = hold
    lock, disk._lock = disk._lock, _NoLock()  # type: ignore[assignment]
    with in_thread(lambda: (blobs.sync_names(), ended.append("first"))):
        assert under_way.wait(30)
        with in_thread(lambda: (blobs.sync_names(), ended.append("second"))):
            assert not ended
            go_on.set()
    disk._lock = lock
    assert ended == ["first", "second"]


class _NoLock:
    def __enter__(self) -> None: ...

    def __exit__(self, *problem: object) -> None: ...


# Undo --------------------------------------------------------------------------------------------------


def test_a_revision_is_staged_again_as_a_link(blobs: BlobDirectory, done: list[tuple[str, str]]) -> None:
    blobs.place(T1, [promised(blobs, A, b"once")])
    done.clear()
    staged = blobs.stage_revision(A, T1)
    assert staged.size_bytes == 4
    assert [name for name, _ in done] == ["link"]
    blob = LoggedBlob(A, staged.name)
    blobs.promise([blob])
    blobs.place(T2, [blob])
    assert content(blobs, A, T2) == content(blobs, A, T1) == b"once"
    with pytest.raises(POSKeyError):
        blobs.stage_revision(B, T1)


@pytest.mark.parametrize("why", ["no links", "too many links"])
def test_where_it_cant_be_linked_it_is_copied_and_durable(
    root: Path, path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    disk = NoLinks(root) if why == "no links" else FaultyDisk(root)
    if why != "no links":
        monkeypatch.setattr(module, "_MOST_LINKS", 1)
    monkeypatch.setattr(module, "_COPY_BYTES", 1000)
    blobs = blob_directory(path, disk)
    blobs.place(T1, [promised(blobs, A, bytes(range(250)) * 10)])
    blob = LoggedBlob(A, blobs.stage_revision(A, T1).name)
    blobs.promise([blob])
    blobs.place(T2, [blob])
    files = [blobs._layout.file(A, at) for at in (T1, T2)]
    assert not os.path.samefile(*files)
    assert content(blobs, A, T2) == bytes(range(250)) * 10
    blobs.sync_names()
    for state in disk.crash_states(20):
        assert list(final_files(state / "blobs").values()) == [bytes(range(250)) * 10] * 2


def test_a_copy_that_fails_leaves_nothing(root: Path, path: Path) -> None:
    disk = NoLinks(root)
    blobs = blob_directory(path, disk)
    blobs.place(T1, [promised(blobs, A, b"once")])
    before = staged_files(path)
    disk.fail_at(3, OSError(errno.ENOSPC, "full"))
    with pytest.raises(OSError, match="full"):
        blobs.stage_revision(A, T1)
    assert staged_files(path) == before


# Handed over by clients that share the directory ---------------------------------------------------------


@pytest.fixture
def theirs(blobs: BlobDirectory) -> Path:
    folder = Path(blobs._layout.directory(A))
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["0x00abc.tmp-", "x.tmp", "x.tmp~"])
def test_a_file_of_a_client_is_taken_over_and_durable(
    blobs: BlobDirectory, theirs: Path, disk: FaultyDisk, name: str
) -> None:
    (theirs / name).write_bytes(b"theirs")
    staged = blobs.take_shared(A, name)
    assert staged.size_bytes == 6
    assert list(theirs.iterdir()) == []
    blob = LoggedBlob(A, staged.name)
    blobs.promise([blob])
    for state in disk.crash_states(10):
        (found,) = staged_files(state / "blobs")
        assert (state / "blobs" / ".staged" / found).read_bytes() == b"theirs"
    blobs.place(T1, [blob])
    assert content(blobs, A, T1) == b"theirs"


BAD_NAMES = [
    "", ".tmp", "..", "../x.tmp", "x/y.tmp", "/x.tmp", "x.tmp/", "x\0.tmp", "x.tmp\0", "x.tmpab", "x.blob",
    "x", "0x03c0000001000000.blob", "x.tm", "\udc80.tmp", "é.tmp",
]  # fmt: skip


def refused(blobs: BlobDirectory, name: str) -> None:
    with pytest.raises(StorageError) as caught:
        blobs.take_shared(A, name)
    assert not isinstance(caught.value, POSKeyError)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused(blobs: BlobDirectory, theirs: Path, path: Path, name: str) -> None:
    (theirs / "x.blob").write_bytes(b"a revision")
    refused(blobs, name)
    assert staged_files(path) == []


@given(name=st.text(max_size=12) | st.text("./x\0~-", max_size=6).map(lambda text: text + ".tmp"))
@settings(deadline=None, max_examples=60)
def test_whatever_the_name_nothing_outside_of_the_objects_directory_is_taken(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        blobs = blob_directory(Path(folder) / "blobs", Quick())
        os.makedirs(blobs._layout.directory(A))
        everywhere = [Path(folder) / "blobs", Path(folder), *Path(blobs._layout.directory(A)).parents[:3]]
        for where in everywhere:
            (where / "x.tmp").write_bytes(b"not to be taken")
        refused(blobs, name)
        assert all((where / "x.tmp").exists() for where in everywhere)
        assert staged_files(Path(blobs.path)) == []


@pytest.mark.parametrize("kind", ["symlink", "hard link", "directory", "fifo", "nothing"])
def test_what_is_no_plain_file_is_refused(
    blobs: BlobDirectory, theirs: Path, path: Path, tmp_path: Path, kind: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    file = theirs / "x.tmp-"
    if kind == "symlink":
        file.symlink_to(secret)
    elif kind == "hard link":
        file.hardlink_to(secret)
    elif kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    refused(blobs, "x.tmp-")
    assert staged_files(path) == []
    assert file.exists() == (kind != "nothing")
    assert secret.read_bytes() == b"secret"


def test_what_is_exchanged_at_the_last_moment_is_refused_too(
    blobs: BlobDirectory, theirs: Path, path: Path, disk: FaultyDisk, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (theirs / "x.tmp-").write_bytes(b"harmless")

    def exchange(name: str, path: str) -> None:
        if name == "rename":
            (theirs / "x.tmp-").unlink()
            (theirs / "x.tmp-").symlink_to(tmp_path / "secret")

    disk.on_operation = exchange
    refused(blobs, "x.tmp-")
    assert staged_files(path) == []
    assert (tmp_path / "secret").read_bytes() == b"secret"


# After a crash -----------------------------------------------------------------------------------------


def in_place(blobs: BlobDirectory, blob: LoggedBlob, tid: bytes) -> tuple[Path, Path]:
    """Where its two names are."""
    final = Path(blobs._layout.file(blob.oid, tid))
    final.parent.mkdir(parents=True, exist_ok=True)
    return Path(blobs._staged_path(blob.name)), final


@pytest.mark.parametrize(
    ("left", "wrong"),
    [
        ("staged", ""), ("both", ""), ("final", ""), ("copies", ""),
        ("neither", "neither"), ("another", "not what was committed"), ("longer", "not what was committed"),
    ],
)  # fmt: skip
def test_what_a_crash_left_of_a_committed_blob(
    blobs: BlobDirectory, disk: FaultyDisk, left: str, wrong: str
) -> None:
    blob = promised(blobs, A, b"content")
    staged, final = in_place(blobs, blob, T1)
    if left in ("both", "final"):
        disk.link(staged, final)
    if left in ("final", "neither"):
        disk.unlink(staged)
    if left in ("copies", "another", "longer"):
        final.write_bytes({"copies": b"content", "another": b"CONTENT", "longer": b"content."}[left])
    before = disk.operations
    assert wrong in blobs.missing(T1, [blob])
    assert bool(wrong) == bool(blobs.missing(T1, [blob]))
    assert disk.operations == before
    if not wrong:
        blobs.place_again(T1, [blob])
        blobs.sync_names()
        assert content(blobs, A, T1) == b"content"
        blobs.sweep()
        if left != "copies":  # that one was made by somebody who synced it or not
            for state in disk.crash_states(10):
                assert list(final_files(state / "blobs").values()) == [b"content"]


@pytest.mark.parametrize("left", ["staged", "both", "final", "neither", "no directory"])
def test_what_is_not_committed_is_taken_back(
    blobs: BlobDirectory, disk: FaultyDisk, path: Path, left: str
) -> None:
    blob = promised(blobs, A, b"content")
    staged, final = in_place(blobs, blob, T1)
    if left in ("both", "final"):
        disk.link(staged, final)
    if left in ("final", "neither", "no directory"):
        disk.unlink(staged)
    if left == "no directory":
        final.parent.rmdir()
    blobs.withdraw(T1, [blob])
    blobs.sync_names()
    assert staged_files(path) == []
    assert final_files(path) == {}
    for state in disk.crash_states(10):
        assert final_files(state / "blobs") == {}


def test_sweeping_leaves_other_journals_files_alone(path: Path, disk: FaultyDisk) -> None:
    other = blob_directory(path, disk, owner=b"another journal.")
    kept = promised(other, A, b"theirs")
    blobs = blob_directory(path, disk)
    promised(blobs, A, b"ours")
    assert len(staged_files(path)) == 2
    blobs.sweep()
    assert len(staged_files(path)) == 1
    other.place(T1, [kept])
    assert content(blobs, A, T1) == b"theirs"


def test_a_journals_staged_files_can_be_set_aside(path: Path, disk: FaultyDisk) -> None:
    blobs = blob_directory(path, disk)
    promised(blobs, A, b"ours")
    other = blob_directory(path, disk, owner=b"another journal.")
    promised(other, B, b"theirs")
    aside = set_staged_aside(str(path), disk, b"another journal.", "aside")
    assert aside is not None
    assert [(Path(aside) / name).read_bytes() for name in os.listdir(aside)] == [b"theirs"]
    assert len(staged_files(path)) == 1
    assert set_staged_aside(str(path), disk, b"another journal.", "again") is None
    for state in disk.crash_states(5):
        assert len(os.listdir(state / "blobs" / ".staged.aside")) == 1


def test_a_directory_of_staged_files_on_another_file_system_is_refused(
    path: Path, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob_directory(path, disk)
    told = os.stat

    def another(given: Any, *rest: Any, **options: Any) -> Any:
        found = told(given, *rest, **options)
        if str(given).endswith(".staged"):
            return os.stat_result([*found[:2], found.st_dev + 1, *found[3:]])
        return found

    monkeypatch.setattr(module.os, "stat", another)
    with pytest.raises(ConfigurationError, match="another file system"):
        blob_directory(path, disk)


@pytest.mark.parametrize("layout", ["bushy", "lawn"])
def test_both_layouts(path: Path, disk: FaultyDisk, layout: str) -> None:
    path.mkdir()
    (path / ".layout").write_text(layout)
    blobs = blob_directory(path, disk)
    blobs.place(T1, [promised(blobs, A, b"a")])
    where = "0x00/" * 7 + "0x01" if layout == "bushy" else "0x01"
    assert final_files(path) == {f"{where}/0x03c0000001000000.blob": b"a"}


def test_an_open_blob_survives_that_it_is_removed(blobs: BlobDirectory) -> None:
    blobs.place(T1, [promised(blobs, A, b"a")])
    with blobs.open(A, T1) as file:
        os.unlink(blobs._layout.file(A, T1))
        assert file.read() == b"a"
