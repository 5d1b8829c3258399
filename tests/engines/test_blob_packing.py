"""Blobs and packs: what goes, what stays, whatever is committed meanwhile and whatever the list says."""

from __future__ import annotations

import errno
import os
from base64 import encodebytes
from collections.abc import Iterator
from pathlib import Path

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.POSException import MultipleUndoErrors

from tests.engines.blobfiles import contents, final_files, staged_files
from tests.engines.crashes import record_file_operations
from tests.engines.datafiles import (
    INFO,
    ROOT,
    A,
    B,
    C,
    Database,
    databases,
    number_of,
    record,
    tid,
    use_no_keeper,
    use_small_segments,
)
from zeoid.engines.blob_layout import tid_of
from zeoid.engines.blobs import BlobDirectory
from zeoid.engines.disk import StrPath
from zeoid.engines.journal_format import LoggedBlob
from zeoid.model import Store, Undo
from zeoid.testing.disk import FaultyDisk


@pytest.fixture
def blob_dir(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def disk(tmp_path: Path) -> FaultyDisk:
    return FaultyDisk(tmp_path)


@pytest.fixture
def database(
    tmp_path: Path, blob_dir: Path, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Database]:
    use_small_segments(monkeypatch, 64 * 1024)
    use_no_keeper(monkeypatch)
    record_file_operations(monkeypatch, disk)
    opening = databases()
    made = next(opening)(tmp_path / "Data.fs", disk, blob_dir)
    made.write(Store(ROOT, made.serial(ROOT), record(b"root", A)))
    yield made
    next(opening, None)


def undo_of(at: bytes) -> Undo:
    return Undo(encodebytes(at).rstrip())


def garbage_and_history(database: Database) -> bytes:
    """A has an old revision, B is garbage. The tid of the last transaction."""
    database.store_blobs((A, b"a old"), (B, b"b"))
    return database.store_blobs((A, b"a"))


def meanwhile(disk: FaultyDisk, name: str, ending: str, work: object) -> list[str]:
    """Do it as soon as an operation with this name, on a path that ends so, begins."""
    done: list[str] = []

    def begins(operation: str, path: str) -> None:
        if operation == name and path.endswith(ending) and not done:
            done.append(path)
            work()  # type: ignore[operator]

    disk.on_operation = begins
    return done


@pytest.mark.parametrize("keep_old", [True, False])
def test_what_a_pack_removes_goes_and_the_rest_stays(
    database: Database, blob_dir: Path, keep_old: bool
) -> None:
    database.storage.pack_keep_old = keep_old
    at = garbage_and_history(database)
    database.pack(number_of(at))
    assert contents(blob_dir) == [b"a"]
    assert database.blob(A, at) == b"a"
    assert not list(blob_dir.rglob("0x02"))  # B's directory
    assert not (blob_dir / ".removed").exists()
    old = blob_dir.with_name("blobs.old")
    assert old.exists() == keep_old
    if keep_old:
        assert contents(old) == [b"a", b"a old", b"b"]
        assert (old / ".layout").read_text() == "bushy"
    database.pack(number_of(database.store_blobs((A, b"a new"))))
    assert contents(blob_dir) == [b"a new"]


def test_with_the_old_file_and_the_old_blobs_one_can_go_back(
    database: Database, blob_dir: Path, tmp_path: Path
) -> None:
    garbage_and_history(database)
    before = database.told()
    database.pack(number_of(database.engine.last_tid()))
    database.close()
    storage = FileStorage(str(tmp_path / "Data.fs.old"), blob_dir=f"{blob_dir}.old", read_only=True)
    try:
        for transaction in before[1:]:
            for oid, _ in transaction[4]:
                assert Path(storage.loadBlob(oid, transaction[0])).exists()
    finally:
        storage.close()


@pytest.mark.parametrize(
    ("name", "ending"), [("open", ".removed"), ("open", ".pack"), ("unlink", ".blob"), ("unlink", ".removed")]
)
def test_a_new_revision_of_an_object_that_was_garbage_stays(
    database: Database, disk: FaultyDisk, blob_dir: Path, name: str, ending: str
) -> None:
    database.storage.pack_keep_old = False
    at = garbage_and_history(database)
    written: list[bytes] = []
    done = meanwhile(disk, name, ending, lambda: written.append(database.store_blobs((B, b"b again"))))
    database.pack(number_of(at))
    disk.on_operation = None
    assert done
    assert database.blob(B, written[0]) == b"b again"
    assert contents(blob_dir) == [b"a", b"b again"]


def test_a_blob_that_is_placed_and_not_yet_revealed_stays(
    database: Database, disk: FaultyDisk, blob_dir: Path
) -> None:
    """A commit stands between the link and the data file while the pack removes what it has to."""
    database.storage.pack_keep_old = False
    at = garbage_and_history(database)
    blobs: BlobDirectory = database.appender.blobs
    under_way = tid(number_of(at) + 1)

    def place() -> None:
        blob = LoggedBlob(B, database.stage(b"b again").name)
        blobs.promise([blob])
        blobs.place(under_way, [blob])

    done = meanwhile(disk, "open", ".removed", lambda: None)
    disk.on_operation = None
    removing = database.engine._remove_packed_blobs
    database.storage._remove_blob_files_tagged_for_removal_during_pack = lambda: (place(), removing())
    database.pack(number_of(at) + 100)  # its clock is ahead
    assert not done
    assert database.blob(B, under_way) == b"b again"
    assert contents(blob_dir) == [b"a", b"b again"]


def test_a_list_that_a_crash_left_is_worked_off(
    database: Database, blob_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = garbage_and_history(database)

    class Killed(Exception):
        pass

    def killed() -> None:
        raise Killed

    database.storage._remove_blob_files_tagged_for_removal_during_pack = killed
    with pytest.raises(Killed):
        database.pack(number_of(at))
    assert contents(blob_dir) == [b"a", b"a old", b"b"]
    database.restart()
    assert contents(blob_dir) == [b"a"]
    assert not (blob_dir / ".removed").exists()


def test_a_list_is_not_believed(database: Database, blob_dir: Path) -> None:
    """A pack may have been interrupted before its file was in place; a line may be torn."""
    at = garbage_and_history(database)
    first = tid(number_of(at) - 1)
    database.close()
    lines = [B, B + first, A + first, A + at, C, C + at, b"short", b""]
    text = b"".join(line.hex().encode() + b"\n" for line in lines) + b"no hex\n" + A.hex().encode()
    (blob_dir / ".removed").write_bytes(text)
    database.reopen()
    assert contents(blob_dir) == [b"a", b"a old", b"b"]
    assert not (blob_dir / ".removed").exists()


def test_nothing_but_blobs_is_removed(database: Database, blob_dir: Path) -> None:
    at = garbage_and_history(database)
    folder = Path(database.appender.blobs._layout.directory(B))
    (folder / "0x00x.tmp-").write_bytes(b"of a client that shares the directory")
    database.pack(number_of(at))
    assert [file.name for file in folder.iterdir()] == ["0x00x.tmp-"]


def test_an_undo_that_is_prepared_survives_a_pack(database: Database, blob_dir: Path) -> None:
    database.store_blobs((A, b"old"))
    changed = database.store_blobs((A, b"new"))
    undo = database.prepare(undo_of(changed))
    database.pack(number_of(changed))
    assert b"old" not in contents(blob_dir)
    (at,) = database.commit(undo)
    assert database.blob(A, at) == b"old"
    assert database.blob(A, changed) == b"new"


def test_a_file_system_without_links_keeps_no_old_blobs(
    database: Database, disk: FaultyDisk, blob_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: StrPath, target: StrPath) -> None:
        raise OSError(errno.EPERM, "no links here")

    at = garbage_and_history(database)
    monkeypatch.setattr(disk, "link", refused)
    database.pack(number_of(at))
    assert contents(blob_dir) == [b"a"]
    assert contents(blob_dir.with_name("blobs.old")) == [b"a old", b"b"]
    assert database.engine.failure == ""


def test_a_name_that_is_in_the_old_directory_already(database: Database, blob_dir: Path) -> None:
    """A rename of one of two names of a file onto the other one does nothing."""
    at = garbage_and_history(database)
    blobs: BlobDirectory = database.appender.blobs
    old = blob_dir.with_name("elsewhere")
    final = Path(blobs._layout.file(A, at))
    target = old / final.relative_to(blob_dir)
    target.parent.mkdir(parents=True)
    os.link(final, target)
    blobs.remove(A, at, str(old))
    blobs.remove(A, at, str(old))
    assert not final.exists()
    assert target.read_bytes() == b"a"


@pytest.mark.parametrize(
    ("name", "at"),
    [("0x03c0000001000000.blob", tid(1)), ("0x2a.blob", bytes(7) + b"*"), ("0x00.blob", bytes(8)),
     ("0x03c0000001000000", None), ("x.blob", None), ("0xzz.blob", None), ("0x" + "00" * 9 + ".blob", None)],
)  # fmt: skip
def test_the_tid_in_a_files_name(name: str, at: bytes | None) -> None:
    assert tid_of(name) == at


# Undo --------------------------------------------------------------------------------------------------


def test_undoing_a_change_brings_the_earlier_blob_back(database: Database, blob_dir: Path) -> None:
    database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"))
    undone = database.write(undo_of(second))
    assert database.blob(A, undone) == b"one"
    redone = database.write(undo_of(undone))
    assert database.blob(A, redone) == b"two"
    database.engine.checkpoint()
    assert staged_files(blob_dir) == []


def test_undoing_a_creation_makes_no_blob(database: Database, blob_dir: Path) -> None:
    first = database.store_blobs((A, b"one"))
    undone = database.write(undo_of(first))
    assert database.blob(A, undone) is None
    assert database.data(A) is None
    redone = database.write(undo_of(undone))
    assert database.blob(A, redone) == b"one"


def test_undoing_in_turn(database: Database) -> None:
    database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"))
    third = database.store_blobs((A, b"three"))
    at = database.write(undo_of(third), undo_of(second))
    assert database.blob(A, at) == b"one"


def test_undoing_an_older_revision_is_a_conflict(database: Database, blob_dir: Path) -> None:
    """Their records are all the same, and it would overwrite the newest one."""
    database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"))
    third = database.store_blobs((A, b"three"))
    prepared = database.engine.prepare(None, INFO, [undo_of(second)])
    assert [conflict.oid for conflict in prepared.conflicts] == [A]
    assert database.blob(A, third) == b"three"
    database.engine.resolve_conflicts()
    with pytest.raises(MultipleUndoErrors):
        database.engine.prepare(None, INFO, [undo_of(second)])
    database.engine.checkpoint()
    assert staged_files(blob_dir) == []


def test_undoing_under_a_new_blob_of_the_same_transaction_is_a_conflict(database: Database) -> None:
    database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"))
    operations = [*database.blob_operations((A, b"three")), undo_of(second)]
    prepared = database.engine.prepare(None, INFO, operations)
    assert [conflict.oid for conflict in prepared.conflicts] == [A]


def test_an_undo_of_what_others_undid_is_none_of_an_older_revision(database: Database) -> None:
    database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"))
    third = database.store_blobs((A, b"three"))
    database.write(undo_of(third))
    at = database.write(undo_of(second))
    assert database.blob(A, at) == b"one"


def test_a_blob_that_is_gone_fails_the_undo(database: Database, blob_dir: Path) -> None:
    first = database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"))
    (lost,) = (name for name in final_files(blob_dir) if first.hex() in name)
    (blob_dir / lost).unlink()
    with pytest.raises(MultipleUndoErrors):
        database.prepare(undo_of(second))
    assert database.blob(A, second) == b"two"


def test_a_record_of_an_undo_without_its_own_file_is_found_by_what_it_refers_to(
    database: Database, blob_dir: Path
) -> None:
    database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"))
    third = database.write(undo_of(second))
    fourth = database.store_blobs((A, b"four"))
    (lost,) = (name for name in final_files(blob_dir) if third.hex() in name)
    (blob_dir / lost).unlink()
    at = database.write(undo_of(fourth))
    assert database.blob(A, at) == b"one"


def test_other_objects_are_undone_as_ever(database: Database) -> None:
    database.store(B, data=b"one")
    second = database.store(B, data=b"two")
    database.write(undo_of(second))
    assert database.data(B) == record(b"one")


@pytest.mark.parametrize("name", ["link", "sync_directory"])
def test_an_undo_that_fails_gives_its_links_back(
    database: Database, disk: FaultyDisk, blob_dir: Path, name: str
) -> None:
    database.store_blobs((A, b"one"), (B, b"b"))
    second = database.store_blobs((A, b"two"), (B, b"b two"))
    database.engine.checkpoint()
    count = 0

    def fail(operation: str, path: str) -> None:
        nonlocal count
        count += operation == name
        if operation == name and count == (2 if name == "link" else 1):
            raise OSError(errno.ENOSPC, "full")

    disk.on_operation = fail
    with pytest.raises(Exception, match="full"):
        database.prepare(undo_of(second))
    disk.on_operation = None
    assert staged_files(blob_dir) == []
