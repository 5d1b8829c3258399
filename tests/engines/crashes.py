"""Power cuts while an engine works: the run that is cut, what it acknowledged, what must be found then."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
from base64 import encodebytes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ZODB.FileStorage
import ZODB.fsIndex  # noqa: F401
from zc.lockfile import LockFile

from tests.engines.blobfiles import final_files, staged_files
from tests.engines.datafiles import (
    BLOB_RECORD,
    Database,
    in_stock_storage,
    number_of,
    record,
    tid,
    use_no_keeper,
    use_small_segments,
)
from zeoid import limits
from zeoid.errors import ConfigurationError
from zeoid.model import Delete, Operation, Store, Undo
from zeoid.ports import Commit, Prepared
from zeoid.testing.disk import FaultyDisk

#: Where FileStorage opens, renames and removes files by itself.
_MODULES = ("ZODB.FileStorage.FileStorage", "ZODB.FileStorage.fspack", "ZODB.fsIndex")


class PowerCut(BaseException):
    """The machine stops here."""


@dataclass
class Written:
    """A transaction that was given to the engine to commit."""

    tid: bytes
    id: bytes
    records: dict[bytes, bytes | None]
    blobs: dict[bytes, bytes] = field(default_factory=dict)


@dataclass
class Known:
    """What the clients of a run know."""

    opened: bool = False
    acknowledged: list[Written] = field(default_factory=list)
    #: The batch that is being committed, if any.
    under_way: list[Written] = field(default_factory=list)
    #: Every object that was written, or would have been.
    oids: set[bytes] = field(default_factory=set)
    #: What the engine has handed out.
    handed_out: set[bytes] = field(default_factory=set)
    #: Before this tid the history may be lost, but not the state at it.
    packed: bytes = tid(0)
    #: What nothing refers to: a pack may have removed it.
    garbage: set[bytes] = field(default_factory=set)
    #: Where blobs are, if they are kept.
    blob_dir: str = ""


class Run:
    """An engine at work until the power is cut, and what its clients know then."""

    def __init__(
        self,
        root: Path,
        patch: pytest.MonkeyPatch,
        stop_at: int | None = None,
        *,
        blob_dir: str = "",
        disk: Callable[[Path], FaultyDisk] = FaultyDisk,
    ) -> None:
        root.mkdir(exist_ok=True)
        self.path = root / "Data.fs"
        self.blob_dir = root / blob_dir if blob_dir else None
        self.disk = disk(root)
        self.disk.on_operation = self._begins
        self.stop_at = stop_at
        self.known = Known(blob_dir=blob_dir)
        self._blobs: dict[int, dict[bytes, bytes]] = {}
        self.was_cut = False
        #: What else is to be done as soon as an operation with this name, on a file that ends so, begins.
        self.meanwhile: dict[tuple[str, str], Callable[[], Any]] = {}
        self.database: Database
        self._ids = 0
        self._files = record_file_operations(patch, self.disk)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *problem: object) -> None:
        """Close what a machine that stops does not."""
        self.disk.on_operation = None
        for file in self._files:
            file.close()
        for fd in list(self.disk._open):
            self.disk.close(fd)

    def _begins(self, name: str, path: str) -> None:
        if self.stop_at is not None and self.disk.operations >= self.stop_at:
            self.was_cut = True
            raise PowerCut
        for (operation, suffix), work in list(self.meanwhile.items()):
            if operation == name and path.endswith(suffix):
                del self.meanwhile[operation, suffix]
                work()

    def carry_out(self, script: Callable[[Run], None]) -> bool:
        """Whether it came to its end."""
        with contextlib.suppress(PowerCut):
            script(self)
        return not self.was_cut

    # What a script does ---------------------------------------------------------------------------

    def open(self) -> None:
        self.database = Database(self.path, self.disk, self.blob_dir)
        self.known.opened = self.known.opened or not self.was_cut

    def data(self, oid: bytes, at: bytes | None = None) -> bytes | None:
        """What it held when the transaction *at* had been committed, or holds now."""
        wrote = (each for each in reversed(self.known.acknowledged) if oid in each.records)
        return next((each.records[oid] for each in wrote if each.tid <= (at or each.tid)), None)

    def commit(self, *given: tuple[Prepared, dict[bytes, bytes | None]]) -> bytes:
        """Commit them in one batch; the tid of the last one."""
        number = number_of(self.database.next_tid())
        batch = []
        for offset, (prepared, records) in enumerate(given):
            self._ids += 1
            blobs = self._blobs.pop(id(prepared), {})
            batch.append((Written(tid(number + offset), b"id-%d" % self._ids, records, blobs), prepared))
        self.known.under_way = [written for written, _ in batch]
        self.database.engine.commit([Commit(each.tid, each.id, prepared) for each, prepared in batch])
        if not self.was_cut:
            self.known.acknowledged += self.known.under_way
            self.known.under_way = []
        return batch[-1][0].tid

    def prepare(self, *operations: Operation) -> Prepared:
        self.known.oids |= {each.oid for each in operations if isinstance(each, (Store, Delete))}
        return self.database.prepare(*operations)

    def prepare_stores(
        self, *oids: bytes, size: int = 20, refers: Sequence[bytes] = ()
    ) -> tuple[Prepared, dict[bytes, bytes | None]]:
        self._ids += 1
        state = (b"%d " % self._ids).ljust(size, b".")
        records: dict[bytes, bytes | None] = {oid: record(state, *refers) for oid in oids}
        stores = [Store(oid, self.database.serial(oid), data or b"") for oid, data in records.items()]
        return self.prepare(*stores), records

    def prepare_blobs(
        self, *oids: bytes, other: bytes = b"", size: int = 20
    ) -> tuple[Prepared, dict[bytes, bytes | None]]:
        """Each of these objects gets a new blob; *other* a record of this size."""
        blobs: dict[bytes, bytes] = {}
        for oid in oids:
            self._ids += 1
            blobs[oid] = b"blob %d" % self._ids
        operations = self.database.blob_operations(*blobs.items())
        records: dict[bytes, bytes | None] = dict.fromkeys(oids, BLOB_RECORD)
        if other:
            data = records[other] = record(b"%d".ljust(size, b"."))
            operations.append(Store(other, self.database.serial(other), data))
        prepared = self.prepare(*operations)
        self._blobs[id(prepared)] = blobs
        return prepared, records

    def store_blobs(self, *oids: bytes, other: bytes = b"", size: int = 20) -> bytes:
        return self.commit(self.prepare_blobs(*oids, other=other, size=size))

    def blob(self, oid: bytes, at: bytes) -> bytes | None:
        """What the blob was when the transaction *at* had been committed."""
        wrote = (each for each in reversed(self.known.acknowledged) if oid in each.records)
        return next((each.blobs.get(oid) for each in wrote if each.tid <= at), None)

    def store(self, *oids: bytes, size: int = 20, refers: Sequence[bytes] = ()) -> bytes:
        return self.commit(self.prepare_stores(*oids, size=size, refers=refers))

    def prepare_undo(self, undone: bytes) -> tuple[Prepared, dict[bytes, bytes | None]]:
        """Undo the newest transaction that wrote these objects."""
        (written,) = (each for each in self.known.acknowledged if each.tid == undone)
        records = {oid: self.data(oid, tid(number_of(undone) - 1)) for oid in written.records}
        prepared = self.prepare(Undo(encodebytes(undone).rstrip()))
        before = ((oid, self.blob(oid, tid(number_of(undone) - 1))) for oid in written.records)
        self._blobs[id(prepared)] = {oid: content for oid, content in before if content is not None}
        return prepared, records

    def delete(self, oid: bytes) -> bytes:
        return self.commit((self.prepare(Delete(oid, self.database.serial(oid))), {oid: None}))

    def new_oids(self, count: int) -> list[bytes]:
        given = self.database.engine.new_oids(count)
        assert not self.known.handed_out.intersection(given)
        if not self.was_cut:
            self.known.handed_out.update(given)
        return given

    def pack(self, at: bytes) -> None:
        self.known.packed = at
        self.database.pack(number_of(at))


def record_file_operations(patch: pytest.MonkeyPatch, disk: FaultyDisk) -> list[Any]:
    """Have *disk* see what FileStorage does to files by itself. The files that it opens."""
    files: list[Any] = []

    def opened(name: Any, mode: str = "r", *buffering: int) -> Any:
        # What ends so is there for FileStorage's own way to write.
        recorded = mode not in ("r", "rb") and not name.endswith(".tmp")
        file = disk.open_file(name, mode) if recorded else open(name, mode, *buffering)  # noqa: SIM115
        files.append(file)
        return file

    def locked(name: str) -> Any:
        files.append(LockFile(name))
        return files[-1]

    for name in _MODULES:
        module = sys.modules[name]
        patch.setattr(module, "open", opened, raising=False)
        if hasattr(module, "os"):
            given = {**vars(os), "rename": disk.rename, "remove": disk.unlink}
            patch.setattr(module, "os", SimpleNamespace(**given))
        if hasattr(module, "LockFile"):
            patch.setattr(module, "LockFile", locked)
    return files


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Everything that has a size is small, and nothing happens by itself."""
    use_small_segments(monkeypatch)
    use_no_keeper(monkeypatch)
    monkeypatch.setattr(limits, "BATCH_BYTES", 3000)
    monkeypatch.setattr(limits, "OID_BLOCK", 20)
    return monkeypatch


# What must be found ---------------------------------------------------------------------------------------


def check(known: Known, state: Path) -> bool:
    """What was acknowledged is in *state*, and it can be gone on with. Whether a batch under way is there."""
    path = state / "Data.fs"
    blob_dir = state / known.blob_dir if known.blob_dir else None
    try:
        database = Database(path, blob_dir=blob_dir)
    except ConfigurationError:
        if known.opened or path.stat().st_size > 4:
            raise
        return False  # its first bytes were being written
    try:
        there = check_transactions(known, database)
        check_objects(known, database, there)
        check_the_rest(known, database, there)
        if blob_dir is not None:
            check_blobs(known, database, there, blob_dir)
        database.store(max(known.oids, default=tid(0)))
        told = database.told()
    finally:
        database.close()
    assert in_stock_storage(path, blob_dir) == told
    return there


def check_transactions(known: Known, database: Database) -> bool:
    found = {each[0]: dict(each[4]) for each in database.told()}
    for written in known.acknowledged:
        if written.tid > known.packed:
            assert found.get(written.tid) == written.records, number_of(written.tid)
        found.pop(written.tid, None)
    present = [found.pop(written.tid) for written in known.under_way if written.tid in found]
    assert found == {}
    assert present in ([], [written.records for written in known.under_way])
    return bool(present)


def certain(known: Known, there: bool) -> list[Written]:
    return known.acknowledged + (known.under_way if there else [])


def check_objects(known: Known, database: Database, there: bool) -> None:
    now: dict[bytes, bytes | None] = {}
    for written in certain(known, there):
        now.update(written.records)
    for oid in known.oids - known.garbage:
        assert database.data(oid) == now.get(oid), oid


def blobs_of(known: Known, committed: Sequence[Written]) -> tuple[dict[tuple[bytes, bytes], bytes], set[Any]]:
    """All blobs of these transactions, by object and tid, and which of them no pack may have removed."""
    blobs = {(oid, each.tid): content for each in committed for oid, content in each.blobs.items()}
    at_pack = {oid: at for oid, at in sorted(blobs) if at <= known.packed}
    kept = {(oid, at) for oid, at in blobs if at > known.packed or at_pack[oid] == at}
    return blobs, {(oid, at) for oid, at in kept if oid not in known.garbage}


def check_blobs(known: Known, database: Database, there: bool, blob_dir: Path) -> None:
    """Each is whole, or absent with its transaction, and nothing is left over."""
    blobs, kept = blobs_of(known, certain(known, there))
    found = {
        (oid, each.tid): content
        for each in [*known.acknowledged, *known.under_way]
        for oid in known.oids
        if (content := database.blob(oid, each.tid)) is not None
    }
    assert kept <= set(found)
    assert found == {key: blobs[key] for key in found}
    for oid, at in found:
        assert database.engine.load_serial(oid, at) == BLOB_RECORD
    assert len(final_files(blob_dir)) == len(found)
    assert staged_files(blob_dir) == []
    assert not (blob_dir / ".removed").exists()


def check_the_rest(known: Known, database: Database, there: bool) -> None:
    committed = certain(known, there)
    outcomes = database.engine.outcomes()
    assert list(outcomes.committed) == [(each.id, each.tid) for each in committed]
    assert outcomes.floor == tid(0) or not committed or outcomes.floor < committed[0].tid
    assert database.engine.last_tid() >= max((each.tid for each in committed), default=b"")
    taken = known.handed_out.union(*(each.records for each in committed))
    assert not taken.intersection(database.engine.new_oids(30))


def copied_with_links(state: Path, copy: Path) -> None:
    """Names of one file stay names of one file."""
    known: dict[int, str] = {}

    def take(source: str, target: str) -> None:
        first = known.setdefault(os.stat(source).st_ino, target)
        if first is target:
            shutil.copy2(source, target)
        else:
            os.link(first, target)

    shutil.copytree(state, copy, copy_function=take)


def interrupted_openings(state: Path, blob_dir: str = "") -> Iterator[Run]:
    """The power is cut once more at each operation of opening and closing what is in *state*."""
    for stop_at in itertools.count():
        copy = state.parent / f"{state.name}-{stop_at}"
        copied_with_links(state, copy)
        try:
            with (
                pytest.MonkeyPatch.context() as patch,
                Run(copy, patch, stop_at, blob_dir=blob_dir) as again,
            ):
                if again.carry_out(open_and_close):
                    return
            yield again
        finally:
            shutil.rmtree(copy)


def open_and_close(run: Run) -> None:
    run.open()
    run.database.close()
