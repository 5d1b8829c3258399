"""The disk for crash tests, and the real one that it stands for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zeoid.engines import disk as real
from zeoid.engines.disk import Disk
from zeoid.testing.disk import FaultyDisk

A, B, C = b"a" * 1024, b"b" * 1024, b"c" * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: a file's content, None for a directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def states(disk: FaultyDisk, limit: int = 1, seed: int = 0) -> list[dict[str, bytes | None]]:
    """What a power cut may leave: those states that are always tried, unless *limit* asks for more."""
    return [tree(state) for state in disk.crash_states(limit, seed)]


def contents(disk: FaultyDisk, name: str = "file") -> list[bytes | None]:
    """What a file may have, each once; None for no file."""
    return list(dict.fromkeys(state.get(name) for state in states(disk)))


def put(disk: Disk, path: Path, *writes: tuple[int, bytes], sync: bool = False) -> None:
    fd = disk.open(path, create=True)
    for offset, data in writes:
        disk.pwrite(fd, data, offset)
    if sync:
        disk.sync(fd)
    disk.close(fd)


# The real one ------------------------------------------------------------------------------------------


def test_what_is_written_is_read(root: Path) -> None:
    disk = Disk()
    put(disk, root / "file", (0, A), (4096, B))
    fd = disk.open(root / "file", read_only=True)
    assert disk.size(fd) == 5120
    assert disk.pread(fd, 10_000, 4096) == B
    assert disk.pread(fd, 10, 10_000) == b""
    assert not os.get_inheritable(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.pwrite(fd, A, 0)
    disk.close(fd)


def test_opening_makes_a_file_only_if_asked_to_and_never_empties_one(root: Path) -> None:
    disk = Disk()
    with pytest.raises(FileNotFoundError):
        disk.open(root / "file")
    put(disk, root / "file", (0, A))
    put(disk, root / "file", (1024, B))
    assert (root / "file").read_bytes() == A + B


def test_writes_and_reads_that_the_system_cuts_short_are_gone_on_with(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pread, os.pwrite
    monkeypatch.setattr(real.os, "pwrite", lambda fd, data, offset: write(fd, bytes(data)[:100], offset))
    monkeypatch.setattr(real.os, "pread", lambda fd, size, offset: read(fd, min(size, 77), offset))
    disk = Disk()
    put(disk, root / "file", (7, A + B))
    fd = disk.open(root / "file")
    assert disk.pread(fd, 5000, 0) == bytes(7) + A + B
    disk.close(fd)


def test_names(root: Path) -> None:
    disk = Disk()
    disk.mkdir(root / "folder")
    put(disk, root / "folder" / "a", (0, A), sync=True)
    put(disk, root / "folder" / "b", (0, B))
    disk.rename(root / "folder" / "b", root / "folder" / "a")
    disk.sync_directory(root / "folder")
    assert disk.listdir(root / "folder") == ["a"]
    assert (root / "folder" / "a").read_bytes() == B
    assert disk.exists(root / "folder" / "a")
    disk.unlink(root / "folder" / "a")
    assert not disk.exists(root / "folder" / "a")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems can only look")
def test_reserving_takes_room_and_leaves_the_length(root: Path) -> None:
    disk = Disk()
    fd = disk.open(root / "file", create=True)
    disk.pwrite(fd, A, 0)
    try:
        disk.reserve(fd, 1024, 1024 * 1024)
        assert disk.size(fd) == 1024
        assert os.fstat(fd).st_blocks * 512 >= 1024 * 1024
        disk.reserve(fd, 0, 0)
    finally:
        disk.close(fd)


@pytest.mark.skipif(not hasattr(os, "fstatvfs"), reason="the system can't tell")
@pytest.mark.parametrize("without", ["no such function", errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_nothing_can_be_reserved_the_free_room_counts(
    root: Path, monkeypatch: pytest.MonkeyPatch, without: str | int
) -> None:
    answer: Callable[..., int] | None = None if isinstance(without, str) else lambda *_: without
    monkeypatch.setattr(real, "_fallocate", lambda: answer)
    disk = Disk()
    fd = disk.open(root / "file", create=True)
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    try:
        disk.reserve(fd, 0, 1)
        with pytest.raises(OSError, match="No space") as caught:
            disk.reserve(fd, 0, 2 * free + 1)
        assert caught.value.errno == errno.ENOSPC
    finally:
        disk.close(fd)


def test_reserving_goes_on_after_a_signal_and_passes_other_errors_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [errno.EINTR, errno.EINTR, 0, errno.ENOSPC]
    monkeypatch.setattr(real, "_fallocate", lambda: lambda *_: answers.pop(0))
    disk = Disk()
    fd = disk.open(root / "file", create=True)
    try:
        disk.reserve(fd, 0, 100)
        with pytest.raises(OSError, match="No space"):
            disk.reserve(fd, 0, 100)
    finally:
        disk.close(fd)


LIMITED = """
import errno, resource, sys
from zeoid.engines import disk as real

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
disk = real.Disk()
fd = disk.open(sys.argv[1], create=True)
for looked_up in (real._fallocate(), None):
    real._fallocate = lambda: looked_up
    disk.reserve(fd, 0, 10_000)
    for call in (lambda: disk.reserve(fd, 9_000, 1_001), lambda: disk.pwrite(fd, bytes(20_000), 0)):
        try:
            call()
        except OSError as problem:
            print(errno.errorcode[problem.errno])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_file_that_may_not_get_so_long_is_an_error(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(root / "file")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["EFBIG"] * 4, "")


# What a power cut leaves -------------------------------------------------------------------------------


def test_what_was_there_is_durable(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "folder" / "file").write_bytes(A)
    assert states(FaultyDisk(root)) == [{"folder": None, "folder/file": A}]


def test_what_was_synced_is_durable(root: Path) -> None:
    disk = FaultyDisk(root)
    disk.mkdir(root / "folder")
    put(disk, root / "folder" / "file", (0, A), (500, B), sync=True)
    disk.sync_directory(root / "folder")
    disk.sync_directory(root)
    assert states(disk) == [{"folder": None, "folder/file": A[:500] + B}]


def test_a_synced_file_may_have_no_name_and_a_named_file_no_content(root: Path) -> None:
    disk = FaultyDisk(root)
    put(disk, root / "file", (0, A), sync=True)
    assert contents(disk) == [None, A]
    put(disk, root / "other", (0, B))
    disk.sync_directory(root)
    assert {b"", B} < set(contents(disk, "other"))


def test_a_folder_that_is_not_durable_takes_everything_in_it_along(root: Path) -> None:
    disk = FaultyDisk(root)
    disk.mkdir(root / "folder")
    put(disk, root / "folder" / "file", (0, A), sync=True)
    disk.sync_directory(root / "folder")
    assert states(disk) == [{}, {"folder": None, "folder/file": A}]


def test_each_write_may_be_lost_while_later_ones_survive(root: Path) -> None:
    (root / "file").write_bytes(A + A)
    disk = FaultyDisk(root)
    put(disk, root / "file", (0, B), (1024, C), (4096, B))
    found = set(contents(disk))
    assert {A + A, B + C + bytes(2048) + B} < found  # nothing, everything
    assert {A + C + bytes(2048) + B, B + A + bytes(2048) + B, B + C} < found  # all but one
    assert B + C + bytes(3072) in found  # the file is longer, but has zeros there


def test_the_last_write_may_be_torn_anywhere(root: Path) -> None:
    (root / "file").write_bytes(A)
    disk = FaultyDisk(root)
    put(disk, root / "file", (256, B))
    found = set(contents(disk))
    grown = bytes(256)
    for cut in (256, 768):  # where sectors begin
        assert {A[:256] + B[:cut] + A[256 + cut :], A[:256] + B[:cut] + A[256 + cut :] + grown} <= found
        assert A[: 256 + cut] + B[cut:] in found
    odd = {content.count(b"b") % 512 for content in found if content}
    assert {1, 1023 % 512} < odd


def test_a_change_of_length_may_be_lost(root: Path) -> None:
    (root / "file").write_bytes(A)
    disk = FaultyDisk(root)
    fd = disk.open(root / "file")
    disk.truncate(fd, 10)
    assert contents(disk) == [A, A[:10]]
    disk.truncate(fd, 100)
    disk.sync(fd)
    disk.close(fd)
    assert contents(disk) == [A[:10] + bytes(90)]


def test_of_two_renames_any_may_survive(root: Path) -> None:
    (root / "old").write_bytes(A)
    (root / "new").write_bytes(B)
    disk = FaultyDisk(root)
    disk.rename(root / "old", root / "older")
    disk.rename(root / "new", root / "old")
    found = states(disk)
    assert len(found) == 4
    for state in (
        {"old": A, "new": B}, {"older": A, "old": B}, {"older": A, "new": B}, {"old": B},
    ):  # fmt: skip
        assert state in found
    disk.sync_directory(root)
    assert states(disk) == [{"older": A, "old": B}]


def test_a_removed_file_may_be_back(root: Path) -> None:
    (root / "file").write_bytes(A)
    disk = FaultyDisk(root)
    disk.unlink(root / "file")
    assert contents(disk) == [A, None] or contents(disk) == [None, A]
    assert set(contents(disk)) == {A, None}
    put(disk, root / "file", (0, B), sync=True)
    assert set(contents(disk)) == {A, B, None}


def test_a_file_keeps_what_is_recorded_of_it_when_it_is_renamed(root: Path) -> None:
    disk = FaultyDisk(root)
    fd = disk.open(root / "a", create=True)
    disk.sync_directory(root)
    disk.pwrite(fd, A, 0)
    disk.rename(root / "a", root / "b")
    disk.sync_directory(root)
    assert {b"", A} < set(contents(disk, "b"))
    disk.sync(fd)
    disk.close(fd)
    assert states(disk) == [{"b": A}]


def test_a_moved_folder_keeps_its_files(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "folder" / "file").write_bytes(A)
    disk = FaultyDisk(root)
    disk.rename(root / "folder", root / "aside")
    assert states(disk) == [{"folder": None, "folder/file": A}, {"aside": None, "aside/file": A}]


def test_states_are_chosen_by_the_seed_are_different_and_go_away(root: Path) -> None:
    disk = FaultyDisk(root)
    disk.sync_directory(root)
    put(disk, root / "file", *((1024 * index, A) for index in range(20)))
    first, again, other = (states(disk, 120, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first) == 120
    assert all(first.count(state) == 1 for state in first)
    seen = list(disk.crash_states(5))
    assert not any(path.exists() for path in seen)


def test_the_process_sees_what_it_wrote_all_the_time(root: Path) -> None:
    disk = FaultyDisk(root)
    put(disk, root / "file", (0, A))
    assert (root / "file").read_bytes() == A


# Stopping and failing ----------------------------------------------------------------------------------


def test_every_operation_that_counts_is_told_before_it_happens(root: Path) -> None:
    disk = FaultyDisk(root)
    told: list[tuple[str, str, bool]] = []
    disk.on_operation = lambda name, path: told.append((name, os.path.basename(path), os.path.exists(path)))
    put(disk, root / "a", (0, A), sync=True)
    disk.rename(root / "a", root / "b")
    fd = disk.open(root / "b")
    disk.truncate(fd, 3)
    disk.reserve(fd, 0, 10)
    disk.pread(fd, 3, 0)
    disk.close(fd)
    disk.sync_directory(root)
    disk.mkdir(root / "folder")
    disk.unlink(root / "b")
    assert told == [
        ("open", "a", False), ("pwrite", "a", True), ("sync", "a", True), ("rename", "b", False),
        ("truncate", "b", True), ("reserve", "b", True), ("sync_directory", "root", True),
        ("mkdir", "folder", False), ("unlink", "b", True),
    ]  # fmt: skip
    assert disk.operations == len(told)


def test_what_the_hook_raises_keeps_an_operation_from_happening(root: Path) -> None:
    disk = FaultyDisk(root)

    def stop(name: str, path: str) -> None:
        raise KeyboardInterrupt

    disk.on_operation = stop
    with pytest.raises(KeyboardInterrupt):
        disk.open(root / "file", create=True)
    assert states(disk) == [{}]


def test_an_operation_fails_where_the_test_says(root: Path) -> None:
    disk = FaultyDisk(root)
    put(disk, root / "file", (0, A))
    disk.fail_at(2, OSError(errno.ENOSPC, "full"))
    with pytest.raises(OSError, match="full"):
        put(disk, root / "file", (0, B), (1024, C))
    assert (root / "file").read_bytes() == B + C[:512]
    put(disk, root / "file", (1024, C))
    disk.fail_at(1, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        disk.rename(root / "file", root / "other")
    assert list(tree(root)) == ["file"]


def test_after_a_sync_that_failed_no_other_one_helps(root: Path) -> None:
    (root / "file").write_bytes(A)
    disk = FaultyDisk(root)
    fd = disk.open(root / "file")
    disk.pwrite(fd, B, 0)
    disk.fail_at(1, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        disk.sync(fd)
    disk.pwrite(fd, C, 1024)
    disk.sync(fd)
    assert {A + C, B + C} < set(contents(disk))
    assert all(content and content.endswith(C) for content in contents(disk))
    disk.pwrite(fd, B, 0)  # writing it again does help
    disk.sync(fd)
    disk.close(fd)
    assert contents(disk) == [B + C]


# Files -------------------------------------------------------------------------------------------------


def test_writes_of_a_buffered_file_are_recorded_when_they_leave_the_buffer(root: Path) -> None:
    disk = FaultyDisk(root)
    with disk.open_file(root / "file", "w+b") as file:
        disk.sync_directory(root)
        file.write(A)
        assert contents(disk) == [b""]
        file.flush()
        assert {b"", A} < set(contents(disk))
        disk.sync(file.fileno())
        assert contents(disk) == [A]
        file.seek(10)
        file.write(B)
        file.seek(0)
        assert file.read() == A[:10] + B
        file.truncate(5)
        assert {A, A[:5]} < set(contents(disk))
    with disk.open_file(root / "file", "rb") as file:
        assert file.read() == A[:5]
        with pytest.raises(OSError, match="write"):
            file.write(b"x")


def test_opening_to_write_empties_a_file_which_may_be_lost(root: Path) -> None:
    (root / "file").write_bytes(A)
    disk = FaultyDisk(root)
    with disk.open_file(root / "file", "wb") as file:
        assert contents(disk) == [A, b""]
        file.write(B)
    assert {A, b"", B} < set(contents(disk))


def test_a_file_can_be_appended_to_and_changed(root: Path) -> None:
    (root / "file").write_bytes(A)
    disk = FaultyDisk(root)
    with disk.open_file(root / "file", "ab") as file:
        file.write(B)
    with disk.open_file(root / "file", "r+b") as file:
        file.seek(100)
        file.write(C[:100])
        file.flush()
        disk.sync(file.fileno())
    assert contents(disk) == [A[:100] + C[:100] + A[200:] + B]


def test_names_and_contents_survive_apart(root: Path) -> None:
    (root / "a").write_bytes(A)
    disk = FaultyDisk(root)
    put(disk, root / "a", (0, B))
    put(disk, root / "b", (0, C))
    put(disk, root / "c", (0, C))
    found = states(disk)
    assert {"a": B} in found  # no name
    assert {"a": A, "b": b"", "c": b""} in found  # no content


@pytest.mark.parametrize("buffered", [True, False])
def test_a_file_that_was_closed_is_not_mixed_up_with_the_next_one(root: Path, buffered: bool) -> None:
    disk = FaultyDisk(root)
    if buffered:
        with disk.open_file(root / "a", "wb") as file:
            number = file.fileno()
    else:
        number = disk.open(root / "a", create=True)
        disk.close(number)
    outside = os.open(os.devnull, os.O_RDWR)
    try:
        assert outside == number
        before = disk.operations
        disk.pwrite(outside, A, 0)
        disk.sync(outside)
        assert disk.operations == before
    finally:
        os.close(outside)


def test_other_files_are_opened_as_ever(root: Path, tmp_path: Path) -> None:
    disk = FaultyDisk(root)
    with disk.open_file(tmp_path / "elsewhere", "w+b") as file:
        file.write(A)
    with disk.open_file(root / "text", "w") as file:
        file.write("text")
    put(disk, tmp_path / "another", (0, A))
    assert (tmp_path / "elsewhere").read_bytes() == (tmp_path / "another").read_bytes() == A
    assert disk.operations == 0
    assert states(disk) == [{}]


# Links, directories, whole file systems ----------------------------------------------------------------


def test_a_link_is_one_more_name_of_a_file(root: Path) -> None:
    disk = FaultyDisk(root)
    put(disk, root / "a", (0, A), sync=True)
    disk.sync_directory(root)
    disk.link(root / "a", root / "b")
    assert states(disk) == [{"a": A}, {"a": A, "b": A}]
    disk.unlink(root / "a")
    assert {"b": A} in states(disk)
    assert {} in states(disk)  # the removal reached the disk, and the new name did not
    disk.sync_directory(root)
    assert states(disk) == [{"b": A}]
    with pytest.raises(FileExistsError):
        disk.link(root / "b", root / "b")


def test_a_link_is_durable_with_the_directory_that_it_is_in(root: Path) -> None:
    disk = FaultyDisk(root)
    for name in ("x", "y"):
        disk.mkdir(root / name)
    disk.sync_directory(root)
    put(disk, root / "x" / "a", (0, A), sync=True)
    disk.link(root / "x" / "a", root / "y" / "b")
    disk.sync_directory(root / "y")
    assert {"x": None, "y": None, "y/b": A} in states(disk)
    assert all(state.get("y/b") == A for state in states(disk))


def test_what_a_power_cut_leaves_of_two_names_is_one_file(root: Path) -> None:
    disk = FaultyDisk(root)
    put(disk, root / "a", (0, A), sync=True)
    disk.link(root / "a", root / "b")
    disk.sync_directory(root)
    (state,) = disk.crash_states(1)
    again = FaultyDisk(root)  # finds both names, too
    put(again, root / "a", (0, B))
    assert os.path.samefile(root / "a", root / "b")
    assert {"a": B, "b": B} in states(again)
    assert {"a": B, "b": A} not in states(again)
    assert not state.exists()


def test_the_names_in_a_crash_state_are_links(root: Path) -> None:
    disk = FaultyDisk(root)
    put(disk, root / "a", (0, A), sync=True)
    disk.link(root / "a", root / "b")
    disk.sync_directory(root)
    for state in disk.crash_states(1):
        assert os.path.samefile(state / "a", state / "b")


def test_of_two_names_of_a_file_a_rename_removes_none(root: Path) -> None:
    disk = FaultyDisk(root)
    put(disk, root / "a", (0, A), sync=True)
    disk.link(root / "a", root / "b")
    disk.sync_directory(root)
    disk.rename(root / "a", root / "b")
    assert states(disk) == [{"a": A, "b": A}] == [tree(root)]


def test_a_removed_folder_may_be_back_with_what_was_in_it(root: Path) -> None:
    disk = FaultyDisk(root)
    disk.mkdir(root / "folder")
    put(disk, root / "folder" / "old", (0, A), sync=True)
    disk.sync_directory(root)
    disk.sync_directory(root / "folder")
    disk.unlink(root / "folder" / "old")
    with pytest.raises(OSError, match="not empty"):
        disk.rmdir(root)
    disk.rmdir(root / "folder")
    assert {"folder": None, "folder/old": A} in states(disk)
    disk.mkdir(root / "folder")
    put(disk, root / "folder" / "new", (0, B), sync=True)
    disk.sync_directory(root / "folder")
    disk.sync_directory(root)
    assert states(disk) == [{"folder": None, "folder/new": B}]


def test_a_name_in_a_new_folder_is_not_taken_along_with_the_old_one(root: Path) -> None:
    disk = FaultyDisk(root)
    disk.mkdir(root / "folder")
    put(disk, root / "folder" / "name", (0, A), sync=True)
    disk.sync_directory(root / "folder")
    disk.unlink(root / "folder" / "name")
    disk.rmdir(root / "folder")
    disk.mkdir(root / "folder")
    put(disk, root / "folder" / "name", (0, B), sync=True)
    disk.sync_directory(root / "folder")
    disk.sync_directory(root)
    assert states(disk) == [{"folder": None, "folder/name": B}]


def test_a_whole_file_system_is_synced_at_once(root: Path) -> None:
    disk = FaultyDisk(root)
    disk.mkdir(root / "folder")
    put(disk, root / "folder" / "a", (0, A))
    disk.link(root / "folder" / "a", root / "b")
    disk.unlink(root / "folder" / "a")
    disk.sync_all(root)
    assert states(disk) == [{"folder": None, "b": A}]
    put(disk, root / "b", (0, B))
    disk.fail_at(1, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        disk.sync_all(root)
    disk.sync_all(root)
    assert set(contents(disk, "b")) > {A, B}


def test_a_file_of_another_process_is_not_durable_when_it_is_taken(root: Path) -> None:
    disk = FaultyDisk(root)
    (root / "theirs").write_bytes(A)
    disk.rename(root / "theirs", root / "ours")
    assert {b"", A, None} <= set(contents(disk, "ours"))
    fd = disk.open(root / "ours", read_only=True)
    disk.sync(fd)
    disk.close(fd)
    disk.sync_directory(root)
    assert states(disk) == [{"ours": A}]


def test_writing_back_makes_nothing_durable(root: Path) -> None:
    disk = FaultyDisk(root)
    told: list[str] = []
    disk.on_operation = lambda name, path: told.append(name)
    fd = disk.open(root / "file", create=True)
    disk.sync_directory(root)
    disk.pwrite(fd, A, 0)
    disk.start_writeback(fd, 0, 1024)
    disk.wait_for_writeback(fd, 0, 1024)
    assert {b"", A} < set(contents(disk))
    disk.fail_at(1, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        disk.wait_for_writeback(fd, 0, 1024)
    disk.close(fd)
    assert told[-3:] == ["start_writeback", "wait_for_writeback", "wait_for_writeback"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems can't be told to")
def test_the_real_disk_links_writes_back_and_syncs_everything(root: Path) -> None:
    disk = Disk()
    disk.mkdir(root / "folder", 0o700)
    assert (root / "folder").stat().st_mode & 0o777 == 0o700
    fd = disk.open(root / "folder" / "a", create=True)
    disk.pwrite(fd, A, 0)
    assert disk.start_writeback(fd, 0, 1024)
    disk.wait_for_writeback(fd, 0, 1024)
    disk.forget_cached(fd, 0, 1024)
    read, write = os.pipe()
    disk.forget_cached(write, 0, 10)  # which can't be: it is advice
    os.close(read)
    os.close(write)
    disk.make_read_only(fd, 0o004)
    assert disk.free_bytes(fd) > 0
    disk.close(fd)
    disk.link(root / "folder" / "a", root / "b")
    assert os.path.samefile(root / "folder" / "a", root / "b")
    assert (root / "b").stat().st_mode & 0o222 == 0
    assert (root / "b").stat().st_mode & 0o004
    disk.unlink(root / "folder" / "a")
    disk.rmdir(root / "folder")
    disk.sync_all(root)
    assert tree(root) == {"b": A}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems can't be told to")
def test_what_the_system_says_of_a_sync_of_everything_is_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    fd = disk.open(root / "file", create=True)
    disk.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.start_writeback(fd, 0, 10)
    read, write = os.pipe()
    assert not disk.start_writeback(write, 0, 10)  # no file that is written back
    os.close(read)
    os.close(write)
    monkeypatch.setattr(real.system, "function", lambda *names: None)
    fd = disk.open(root / "file")
    assert not disk.start_writeback(fd, 0, 10)
    disk.wait_for_writeback(fd, 0, 10)
    disk.close(fd)
    synced: list[int] = []
    monkeypatch.setattr(real.os, "sync", lambda: synced.append(1))
    disk.sync_all(root)
    assert synced == [1]


def test_of_a_file_that_was_moved_each_directory_has_its_part(root: Path) -> None:
    disk = FaultyDisk(root)
    for name in ("x", "y"):
        disk.mkdir(root / name)
    put(disk, root / "x" / "a", (0, A), sync=True)
    put(disk, root / "x" / "b", (0, B), sync=True)
    for folder in (root, root / "x"):
        disk.sync_directory(folder)
    disk.rename(root / "x" / "a", root / "y" / "a")
    disk.sync_directory(root / "y")
    assert {tuple(path for path in state if path.endswith("a")) for state in states(disk)} == {
        ("x/a", "y/a"), ("y/a",),
    }  # fmt: skip
    disk.rename(root / "x" / "b", root / "y" / "b")
    disk.sync_directory(root / "x")
    assert {tuple(path for path in state if path.endswith("b")) for state in states(disk)} == {(), ("y/b",)}
    disk.sync_directory(root / "y")
    assert states(disk) == [{"x": None, "y": None, "y/a": A, "y/b": B}]
