"""The torture, in short, and proofs that it hurts: with a fault put in, it finds something."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.FileStorage import FileStorage

import zeoid
from tests.torture import aftermath, checker, journal
from tests.torture.deeds import Deed, GivenUp, deeds
from tests.torture.journal import Effect, Journal
from tests.torture.objects import PLAIN, POPULATING, STORAGES, TWINS, Counter, blob_dir, data_file, populate
from tests.torture.run import Plan, run
from tests.torture.worker import Floors, Worker

DEEDS = 60


@pytest.mark.timeout(240)
def test_nothing_acknowledged_is_lost_whoever_is_killed(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    report = run(Plan(seed, 12, server_kills=6, client_kills=4), tmp_path)
    print(*report.lines(), sep="\n")
    assert report.problems == []
    assert report.server_kills >= 6
    assert report.client_kills >= 4
    # It was no walk in the park: everything that can happen did.
    assert report.totals.acknowledged > 200
    assert report.totals.keys > 20
    assert report.totals.conflicts > 0
    assert report.totals.resolved > 0
    assert report.totals.given_up > 0
    assert report.totals.unknown > 0


def test_a_seed_gives_the_same_deeds_again() -> None:
    def first(seed: int) -> list[Deed]:
        return list(itertools.islice(deeds(random.Random(seed), 1, 1, 1), 500))

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert {deed.given_up for deed in first(1)} == set(GivenUp)
    assert {len({effect.storage for effect in deed.effects}) for deed in first(1)} == {1, 2}


class EarlyJournal(Journal):
    """That of a client which says that it is done before it is."""

    def trying(self, id: str, effects: tuple[Effect, ...]) -> None:
        super().trying(id, effects)
        super().ended(id, "done", 0, 0)

    def ended(self, id: str, end: journal.End, conflicts: int, resolved: int) -> None: ...


@contextmanager
def worker_on(folder: Path, book: Journal) -> Iterator[tuple[Worker, dict[str, Any]]]:
    """A worker without a process of its own, on a server that has none either; and its databases."""
    populate(folder, 1, 1)
    served = {
        storage: FileStorage(str(data_file(folder, storage)), blob_dir=str(blob_dir(folder, storage)))
        for storage in STORAGES
    }
    with zeoid.serve(served) as server:
        shared: dict[str, Any] = {}
        for storage in STORAGES:
            cache = str(folder / f"{storage}-cache")
            client = zeoid.ClientStorage(server.address, storage, blob_dir=cache)
            ZODB.DB(client, database_name=storage, databases=shared)
        worker = Worker(shared, book, Floors(), random.Random(1))
        yield worker, shared
        worker.close()
        for database in shared.values():
            database.close()
    book.close()


def work(folder: Path, kind: type[Journal] = Journal) -> None:
    book = kind(folder / "client-0-1.journal")
    with worker_on(folder, book) as (worker, _):
        for deed in itertools.islice(deeds(random.Random(3), 0, 1, 0), DEEDS):
            worker.make(deed)


def problems(folder: Path) -> list[str]:
    told = journal.read(sorted(folder.glob("client-*.journal")))
    found, unsound = aftermath.read(folder)
    return [*told.violations, *unsound, *checker.problems(told.transactions, found)]


def test_a_good_client_and_good_files_have_no_problems(tmp_path: Path) -> None:
    work(tmp_path)
    assert problems(tmp_path) == []


def test_a_client_that_says_done_too_early_is_found(tmp_path: Path) -> None:
    """Those of its transactions that are given up are not there."""
    work(tmp_path, EarlyJournal)
    assert any("was acknowledged and is not there" in problem for problem in problems(tmp_path))


def positions(path: Path) -> list[int]:
    """Where the transactions of a data file begin."""
    storage = FileStorage(str(path), read_only=True)
    found = [each._tpos for each in storage.iterator()]
    storage.close()
    return found


def forget_index(path: Path) -> None:
    Path(f"{path}.index").unlink()


def cut_off(path: Path) -> None:
    """The last transaction, as if it had never been written; the index that was made with it, too."""
    with path.open("r+b") as file:
        file.truncate(positions(path)[-1])
    forget_index(path)


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)
    forget_index(path)


def cut_out(path: Path) -> None:
    """A transaction from the middle of the file."""
    whole, starts = path.read_bytes(), positions(path)
    middle = len(starts) // 2
    path.write_bytes(whole[: starts[middle]] + whole[starts[middle + 1] :])
    forget_index(path)


def spoil_an_entry(path: Path) -> None:
    """A byte of some object's data."""
    whole = bytearray(path.read_bytes())
    place = whole.index(b"-0.1.0.", whole.index(b"tests.torture.objects\nEntry"))
    whole[place] ^= 1
    path.write_bytes(whole)
    forget_index(path)


def a_blob(path: Path) -> Path:
    return next(each for each in sorted(blob_dir(path.parent, "1").rglob("*.blob")) if each.stat().st_size)


def spoil_a_blob(path: Path) -> None:
    blob = a_blob(path)
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1])


def lose_a_blob(path: Path) -> None:
    a_blob(path).unlink()


def leave_a_blob(path: Path) -> None:
    (blob_dir(path.parent, "1") / ".staged" / "left").touch()


def point_the_index_elsewhere(path: Path) -> None:
    storage = FileStorage(str(path))
    storage._index[b"\0" * 8] -= 1
    storage._save_index()
    storage._save_index = lambda: None
    storage.close()


FAULTS = [
    (cut_off, "was acknowledged and is not there"),
    (cut_short, "truncated possibly because of damaged records"),
    (cut_out, "FormatError"),
    (spoil_an_entry, "has another's data or blob, or none"),
    (spoil_a_blob, "has another's data or blob, or none"),
    (lose_a_blob, "POSKeyError"),
    (leave_a_blob, "files of blobs are left"),
    (point_the_index_elsewhere, "the index that the server left is not that of the file"),
]


@pytest.mark.parametrize(("spoil", "text"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_data_file_with_a_fault_is_found(tmp_path: Path, spoil: Callable[[Path], None], text: str) -> None:
    work(tmp_path)
    spoil(data_file(tmp_path, "1"))
    assert any(text in problem for problem in problems(tmp_path)), problems(tmp_path)


UNLOADABLE = [
    (b"tests.torture.objects\nNobody_", "its class is not there"),
    (b"tests.torture.objects Counter", "UnicodeDecodeError"),
]


@pytest.mark.parametrize(("name", "text"), UNLOADABLE)
def test_an_object_that_cannot_be_loaded_is_found(tmp_path: Path, name: bytes, text: str) -> None:
    """Even if nothing looks at it but the check of all objects."""
    populate(tmp_path, 1, 1)
    path = data_file(tmp_path, "1")
    database = ZODB.DB(FileStorage(str(path)))
    with database.transaction() as connection:
        connection.root()["stray"] = Counter()
        connection.transaction_manager.get().note(POPULATING[1])
    database.close()
    assert problems(tmp_path) == []
    right, whole = b"tests.torture.objects\nCounter", path.read_bytes()
    place = whole.rindex(right)
    path.write_bytes(whole[:place] + name + whole[place + len(right) :])
    (problem,) = problems(tmp_path)
    assert "storage 1: object " in problem
    assert text in problem


def change(databases: dict[str, Any], name: str, amount: int) -> None:
    """Behind the worker's back."""
    manager = transaction.TransactionManager()
    connection = databases["1"].open(manager)
    connection.root()["counters"][name].value += amount
    manager.commit()
    connection.close()


def test_a_counter_that_goes_back_is_found(tmp_path: Path) -> None:
    book = Journal(tmp_path / "client-0-1.journal")
    with worker_on(tmp_path, book) as (worker, databases):
        worker.make(Deed("0.1.0.0", (Effect("1", PLAIN[0], 5),)))
        change(databases, PLAIN[0], -1)
        worker.make(Deed("0.1.0.1", (Effect("1", PLAIN[0], 5),)))
    assert any("plain-0 in 1 went back from 5 to 4" in problem for problem in problems(tmp_path))


def test_twins_that_differ_are_found(tmp_path: Path) -> None:
    book = Journal(tmp_path / "client-0-1.journal")
    with worker_on(tmp_path, book) as (worker, databases):
        change(databases, TWINS[0], 1)
        worker.make(Deed("0.1.0.0", (Effect("1", PLAIN[0], 5),)))
    assert any("0.1.0.0: the twins in 1 differ: 1 and 0" in problem for problem in problems(tmp_path))


def test_a_last_transaction_that_goes_back_is_found(tmp_path: Path) -> None:
    book = Journal(tmp_path / "client-0-1.journal")
    with worker_on(tmp_path, book) as (worker, databases):
        worker.make(Deed("0.1.0.0", (Effect("1", PLAIN[0], 5),)))
        databases["1"].storage.lastTransaction = lambda: bytes(8)
        worker.make(Deed("0.1.0.1", (Effect("1", PLAIN[0], 5),)))
    assert any("lastTransaction of 1 went back from" in problem for problem in problems(tmp_path))
