"""Power cuts at every write, sync and rename of an engine at work: what was acknowledged is never lost."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.crashes import PowerCut, Run, check, interrupted_openings, small
from tests.engines.datafiles import ROOT, A, B, C, D, in_stock_storage, tid
from zeoid.model import Store

__all__ = ["small"]

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.timeout(1200)]


def commits(run: Run) -> None:
    """Batches, a large transaction, an undo, a deletion, marks of oids, an abandoned transaction."""
    run.open()
    run.store(ROOT, A, B, refers=[A, B, C, D])
    run.commit(run.prepare_stores(A), run.prepare_stores(B, C), run.prepare_stores(D))
    run.store(*run.new_oids(3))
    kept, abandoned = run.new_oids(30)[-2:]
    run.database.engine.abandon(run.prepare(Store(abandoned, bytes(8), b"abandoned")))
    run.store(kept)
    large = run.store(A, B, size=4000)
    run.commit(run.prepare_undo(large))
    run.delete(kept)
    run.database.engine.checkpoint()
    run.store(A)
    run.store(B, size=3500)
    run.store(C)
    run.database.close()


def segments(run: Run) -> None:
    """The journal goes through several segments, with a spare and without, which are used again."""
    run.open()
    for number in range(8):
        run.store(A, size=600 + number)
    run.database.engine.checkpoint()
    run.database.journal.prepare_spare()
    for number in range(6):
        run.store(B, size=900 + number)
    run.database.engine.checkpoint()
    run.store(C, size=2500)
    run.store(C, size=2500)
    run.database.close()


def packs(run: Run) -> None:
    """A pack, with commits in each moment in which that is possible; an undo that was prepared before."""
    run.open()
    run.store(ROOT, refers=[A, B, C, D])
    run.store(A, B, C, D, size=100)
    overwritten = run.store(A, size=200)
    undone = run.store(B, size=500)
    undo = run.prepare_undo(undone)
    run.store(C)
    run.meanwhile = {
        ("open", ".pack"): lambda: run.store(A, size=300),
        ("open", ".index_tmp"): lambda: (run.store(A), run.store(D, size=4000)),
    }
    run.pack(overwritten)
    assert run.was_cut or not run.meanwhile
    run.commit(undo)
    run.store(A)
    run.database.engine.checkpoint()
    last = run.store(D)
    run.pack(last)
    run.database.close()


def a_pack_and_a_checkpoint(run: Run) -> None:
    """The checkpoint comes when the files have their new names, and before the pack has ended."""
    run.open()
    run.store(ROOT, refers=[A])
    run.store(A)
    last = run.store(A)
    run.store(A)
    run.meanwhile = {("open", ".index_tmp"): lambda: (run.database.engine.checkpoint(), run.store(A))}
    run.pack(last)
    assert run.was_cut or not run.meanwhile
    run.database.close()


def restarts(run: Run) -> None:
    """A process that was killed is started again, on a machine that goes on; a stock server is used."""
    run.open()
    run.store(ROOT, A, refers=[A, B])
    run.store(A, size=4000)
    run.commit(run.prepare_stores(A), run.prepare_stores(B))
    run.database.kill()
    run.open()
    run.store(B)
    run.store(A)
    run.database.kill()
    run.open()
    run.database.close()
    run.open()
    run.store(B)
    run.database.close()


SCRIPTS = [commits, segments, packs, a_pack_and_a_checkpoint, restarts]
Script = Callable[[Run], None]


def operations_of(script: Script, root: Path) -> int:
    """How many there are. After the whole script a stock FileStorage has everything that was acknowledged."""
    with pytest.MonkeyPatch.context() as patch, Run(root, patch) as run:
        assert run.carry_out(script)
    found = {told[0]: dict(told[4]) for told in in_stock_storage(run.path)}
    for written in run.known.acknowledged:
        assert found.get(written.tid) == written.records or written.tid <= run.known.packed
    return run.disk.operations


@pytest.fixture
def every(request: pytest.FixtureRequest) -> bool:
    """Whether there is time for all states that are worth a try."""
    return bool(request.config.getoption("--every-combination"))


def some(states: Iterator[Path], seed: int, every: bool) -> Iterator[Path]:
    """Nothing of what was not durable is there, all of it is, and each twelfth state, or else all of them."""
    for number, state in enumerate(states):
        if every or number < 2 or number % 12 == seed % 12:
            yield state


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_power_cut_at_any_operation(tmp_path: Path, script: Script, every: bool) -> None:
    operations = operations_of(script, tmp_path / "whole")
    states = there = 0
    for stop_at in range(operations + 1):
        with pytest.MonkeyPatch.context() as patch, Run(tmp_path / f"{stop_at}", patch, stop_at) as run:
            assert run.carry_out(script) == (stop_at == operations)
        for state in some(run.disk.crash_states(200 if every else 1, stop_at), stop_at, every):
            there += check(run.known, state)
            states += 1
        shutil.rmtree(run.path.parent)
    assert states > 2 * operations
    assert there > 10  # a batch that was not acknowledged


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_power_cut_while_it_is_opened(tmp_path: Path, script: Script, every: bool) -> None:
    operations = operations_of(script, tmp_path / "whole")
    step = 3 if every else operations // 3
    states = 0
    for stop_at in range(operations - 5, 20, -step):
        with pytest.MonkeyPatch.context() as patch, Run(tmp_path / f"{stop_at}", patch, stop_at) as run:
            assert not run.carry_out(script)
        # The first state has nothing that was not durable, the second one has everything.
        first, last = (0, 5) if every else (stop_at % 2, stop_at % 2 + 1)
        for state in itertools.islice(run.disk.crash_states(1), first, last):
            for again in interrupted_openings(state):
                seed = again.disk.operations
                for twice in some(again.disk.crash_states(1, seed), seed, every):
                    check(run.known, twice)
                    states += 1
    assert states > 100


def test_an_index_that_comes_back_after_a_pack_does_not_count(tmp_path: Path) -> None:
    """It would fit: the file became as long as it was, and its last transactions wrote the same objects."""

    def script(run: Run) -> None:
        run.open()
        oids = [tid(0)[:-1] + bytes([number]) for number in range(1, 9)]
        run.store(ROOT, refers=oids)
        for oid in [*oids, *oids]:
            last = run.store(oid)
        run.database.close()
        run.open()
        run.meanwhile = {("open", ".index_tmp"): lambda: meanwhile(run, oids)}
        run.pack(last)

    def meanwhile(run: Run, oids: list[bytes]) -> None:
        for oid in [oids[3]] * 3 + oids[3:]:
            run.store(oid)
        run.database.engine.checkpoint()
        run.was_cut = True
        raise PowerCut

    with pytest.MonkeyPatch.context() as patch, Run(tmp_path / "root", patch) as run:
        assert not run.carry_out(script)
    for state in run.disk.crash_states(limit=1):
        check(run.known, state)
