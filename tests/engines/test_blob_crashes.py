"""Power cuts at every operation of an engine that keeps blobs: an acknowledged one is never lost, none is
half there, and nothing is left over."""

from __future__ import annotations

import errno
import itertools
import shutil
from base64 import encodebytes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ZODB.POSException import StorageError

from tests.engines.blobfiles import final_files, staged_files
from tests.engines.crashes import Run, blobs_of, check, interrupted_openings, record_file_operations, small
from tests.engines.datafiles import ROOT, A, B, C, Database, databases, tid
from tests.engines.test_crashes import every, some
from zeoid.engines.disk import StrPath
from zeoid.model import AttachBlob, Store, Undo
from zeoid.testing.disk import FaultyDisk

__all__ = ["every", "small"]

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.timeout(1200)]
BLOBS = "blobs"


def blob_commit(run: Run) -> None:
    """One that is committed, one that is given up, one that never comes to its vote."""
    run.open()
    run.store_blobs(A, other=C)
    given_up, _ = run.prepare_blobs(B)
    run.database.engine.abandon(given_up)
    run.database.engine.stage_blob().write(b"too late")
    run.store_blobs(A)
    run.database.close()


def two_blobs_one_batch(run: Run) -> None:
    run.open()
    run.commit(run.prepare_blobs(A), run.prepare_stores(C), run.prepare_blobs(B))
    run.store_blobs(A, B)
    run.database.close()


def blob_in_direct_transaction(run: Run) -> None:
    run.open()
    run.store_blobs(A, other=C, size=4000)
    run.store_blobs(A, B, other=C, size=4000)
    run.store_blobs(B)
    run.database.close()


def blob_checkpoint_between(run: Run) -> None:
    run.open()
    run.store_blobs(A)
    prepared = run.prepare_blobs(B)
    run.database.engine.checkpoint()
    run.commit(prepared)
    # One comes when the checkpoint has synced what it found, and has not stated its base yet.
    run.meanwhile = {("sync_directory", BLOBS): lambda: run.store_blobs(A)}
    run.database.engine.checkpoint()
    assert run.was_cut or not run.meanwhile
    run.database.engine.checkpoint()
    run.database.close()


def blob_restarts(run: Run) -> None:
    """A process that was killed is started again, on a machine that goes on."""
    run.open()
    run.store_blobs(A)
    run.database.kill()
    run.open()
    run.store_blobs(A, B)
    run.database.kill()
    run.open()
    run.database.close()


def blob_undo_and_redo(run: Run) -> None:
    run.open()
    run.store_blobs(A, B)
    second = run.store_blobs(A)
    undo = run.commit(run.prepare_undo(second))
    run.database.engine.checkpoint()
    run.commit(run.prepare_undo(undo))
    given_up = run.database.prepare(Undo(encodebytes(second).rstrip()))
    run.database.engine.abandon(given_up)
    run.database.close()


def pack(run: Run, keep_old: bool) -> None:
    """An object is garbage, another one has an old revision; blobs are committed meanwhile."""
    run.open()
    run.database.storage.pack_keep_old = keep_old
    run.store(ROOT, refers=[A])
    run.store_blobs(A, B)
    run.store_blobs(A)
    at = run.store(C)
    run.known.garbage = {B, C}
    run.meanwhile = {
        ("open", ".pack"): lambda: run.store_blobs(A),
        ("open", ".index_tmp"): lambda: run.store_blobs(A),
    }
    run.pack(at)
    assert run.was_cut or not run.meanwhile
    run.store_blobs(A)
    run.database.close()


def blob_pack_keep_old(run: Run) -> None:
    pack(run, True)


def blob_pack_without_old(run: Run) -> None:
    pack(run, False)


class NoLinks(FaultyDisk):
    """A file system that has no hard links."""

    def link(self, source: StrPath, target: StrPath) -> None:
        raise OSError(errno.EPERM, "no links here")


SCRIPTS = [
    blob_commit,
    two_blobs_one_batch,
    blob_in_direct_transaction,
    blob_checkpoint_between,
    blob_restarts,
    blob_undo_and_redo,
    blob_pack_keep_old,
    blob_pack_without_old,
]
#: Of these the short form tries one operation in three.
LONG = (blob_restarts, blob_undo_and_redo, blob_pack_keep_old, blob_pack_without_old)
Script = Callable[[Run], None]
Make = Callable[[Path], FaultyDisk]


def operations_of(script: Script, root: Path, disk: Make = FaultyDisk) -> int:
    with pytest.MonkeyPatch.context() as patch, Run(root, patch, blob_dir=BLOBS, disk=disk) as run:
        assert run.carry_out(script)
    assert len(staged_files(root / BLOBS)) == (script is blob_commit)  # an upload that nobody gave up
    blobs, kept = blobs_of(run.known, run.known.acknowledged)
    assert sorted(final_files(root / BLOBS).values()) == sorted(blobs[key] for key in kept)
    if script is blob_pack_keep_old:
        assert {blobs[key] for key in blobs} >= set(final_files(root / f"{BLOBS}.old").values())
        assert len(final_files(root / f"{BLOBS}.old")) == 4
    check(run.known, root)
    return run.disk.operations


@pytest.mark.parametrize(
    ("script", "disk"), [*((script, FaultyDisk) for script in SCRIPTS), (blob_commit, NoLinks)]
)
def test_a_power_cut_at_any_operation(tmp_path: Path, script: Script, disk: Make, every: bool) -> None:
    operations = operations_of(script, tmp_path / "whole", disk)
    states = there = 0
    # How a database is opened for the first time is the same in all of them.
    first = 0 if every or script is blob_commit else 25
    step = 3 if script in LONG and not every else 1
    for stop_at in range(operations, first - 1, -step):
        root = tmp_path / f"{stop_at}"
        with (
            pytest.MonkeyPatch.context() as patch,
            Run(root, patch, stop_at, blob_dir=BLOBS, disk=disk) as run,
        ):
            assert run.carry_out(script) == (stop_at == operations)
        for state in some(run.disk.crash_states(200 if every else 1, stop_at), stop_at, every):
            there += check(run.known, state)
            states += 1
        shutil.rmtree(root)
    assert states > operations // step
    assert there > 3  # a batch that was not acknowledged


@pytest.mark.parametrize("script", [two_blobs_one_batch, blob_in_direct_transaction])
def test_a_second_power_cut_while_it_is_opened(tmp_path: Path, script: Script, every: bool) -> None:
    operations = operations_of(script, tmp_path / "whole")
    step = 3 if every else operations // 3
    states = 0
    for stop_at in range(operations - 12, 30, -step):
        root = tmp_path / f"{stop_at}"
        with pytest.MonkeyPatch.context() as patch, Run(root, patch, stop_at, blob_dir=BLOBS) as run:
            assert not run.carry_out(script)
        first, last = (0, 5) if every else (stop_at % 2, stop_at % 2 + 1)
        for state in itertools.islice(run.disk.crash_states(1), first, last):
            for again in interrupted_openings(state, BLOBS):
                seed = again.disk.operations
                for twice in some(again.disk.crash_states(1, seed), seed, every):
                    check(run.known, twice)
                    states += 1
    assert states > 100


# What fails ----------------------------------------------------------------------------------------------


def fail_at(disk: FaultyDisk, name: str, ending: str, error: OSError) -> None:
    """The next operation with this name, on a path that ends so, fails."""

    def begins(operation: str, path: str) -> None:
        if operation == name and path.endswith(ending):
            disk.on_operation = None
            disk.fail_at(1, error)

    disk.on_operation = begins


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyDisk:
    return FaultyDisk(tmp_path)


@pytest.fixture
def database(tmp_path: Path, faulty: FaultyDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    record_file_operations(monkeypatch, faulty)
    opening = databases()
    yield next(opening)(tmp_path / "Data.fs", faulty, tmp_path / BLOBS)
    next(opening, None)


def test_a_sync_of_a_blob_that_fails_is_no_end(
    database: Database, faulty: FaultyDisk, tmp_path: Path
) -> None:
    fail_at(faulty, "sync", "", OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        database.stage(b"lost")
    assert staged_files(tmp_path / BLOBS) == []
    at = database.store_blobs((A, b"kept"))
    assert database.blob(A, at) == b"kept"
    database.close()


@pytest.mark.parametrize(("name", "ending"), [("sync_directory", ".staged"), ("mkdir", "0x01")])
def test_what_fails_fails_the_vote_and_the_blob_is_the_transactions_again(
    database: Database, faulty: FaultyDisk, tmp_path: Path, name: str, ending: str
) -> None:
    operations = database.blob_operations((A, b"content"))
    fail_at(faulty, name, ending, OSError(errno.ENOSPC, "full"))
    with pytest.raises(StorageError, match="full"):
        database.prepare(*operations)
    assert len(staged_files(tmp_path / BLOBS)) == 1
    assert not list((tmp_path / BLOBS).rglob("0x01"))
    assert not database.engine.failure
    if ending != ".staged":  # after that one nobody knows
        (at,) = database.commit(database.prepare(*operations))
        assert database.blob(A, at) == b"content"
    at = database.store(B)
    assert database.engine.last_tid() == at
    database.close()


def test_a_sync_of_final_names_that_fails_at_a_checkpoint_is_the_end(
    database: Database, faulty: FaultyDisk, tmp_path: Path
) -> None:
    at = database.store_blobs((A, b"content"))
    fail_at(faulty, "sync_directory", "0x01", OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        database.engine.checkpoint()
    assert "broken" in database.engine.failure
    with pytest.raises(OSError, match="broken"):
        database.store(B)
    database.kill()
    for state in faulty.crash_states(5):
        again = Database(state / "Data.fs", blob_dir=state / BLOBS)
        assert again.blob(A, at) == b"content"
        again.close()


def test_a_link_that_fails_is_the_end_and_is_made_when_it_is_opened(
    database: Database, faulty: FaultyDisk, tmp_path: Path
) -> None:
    prepared = database.prepare(*database.blob_operations((A, b"content")))
    fail_at(faulty, "link", ".blob", OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        database.commit(prepared)
    database.kill()
    again = Database(tmp_path / "Data.fs", blob_dir=tmp_path / BLOBS)
    assert again.blob(A, tid(1)) == b"content"
    again.close()


def test_who_sees_a_transaction_finds_its_blobs(database: Database, faulty: FaultyDisk) -> None:
    """Whatever is done to the disk meanwhile: as soon as the tid can be read, the blob is there."""
    seen: list[bool] = []

    def look(*given: str) -> None:
        revealed = database.engine.last_tid() == tid(1)
        seen.append(revealed)
        assert not revealed or database.blob(A, tid(1)) == b"content"

    prepared = database.prepare(
        *database.blob_operations((A, b"content")), Store(C, database.serial(C), b"x" * 4000)
    )
    faulty.on_operation = look
    database.commit(prepared)
    look()
    assert seen[-1]
    assert len(seen) > 5
    faulty.on_operation = None
    database.close()


def test_a_blob_that_cant_be_placed_for_want_of_a_record_is_refused(
    database: Database, tmp_path: Path
) -> None:
    blob = database.stage(b"content")
    with pytest.raises(StorageError, match="no record"):
        database.prepare(AttachBlob(A, blob))
    database.engine.discard_blobs([blob])
    assert staged_files(tmp_path / BLOBS) == []
    database.close()
