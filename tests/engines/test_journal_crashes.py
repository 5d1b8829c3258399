"""Power cuts at every write and sync of a journal: what was acknowledged is there, the rest whole or not."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.journals import (
    base,
    batch,
    create,
    direct,
    expected,
    mark,
    read,
    reopen,
    told,
    transaction,
)
from zeoid.engines.journal import Batch, Entry, Journal, Tail
from zeoid.testing.disk import FaultyDisk


class PowerCut(BaseException):
    """The machine stops here."""


class Run:
    """A journal that is written to until the power is cut; knows what it acknowledged."""

    def __init__(self, root: Path, stop_at: int | None) -> None:
        root.mkdir()
        self.disk = FaultyDisk(root)
        self.directory = root / "Data.fs.journal"
        self.stop_at = stop_at
        self.created = False
        self.acknowledged: list[Entry] = []
        self.under_way: tuple[Entry, ...] = ()
        self.disk.on_operation = self._count

    def _count(self, name: str, path: str) -> None:
        if self.stop_at is not None and self.disk.operations >= self.stop_at:
            raise PowerCut

    def carry_out(self, script: Callable[[Run], None]) -> bool:
        """Whether it came to its end."""
        try:
            script(self)
        except PowerCut:
            return False
        return True

    def append(self, journal: Journal, *entries: Entry) -> None:
        self.under_way = entries
        journal.append(*entries)
        self.acknowledged += entries
        self.under_way = ()

    def possible(self) -> list[list[Entry]]:
        """What may have been appended."""
        return [[*self.acknowledged, *self.under_way[:count]] for count in range(len(self.under_way) + 1)]


def everything(run: Run) -> None:
    """Small and large appends, full segments with and without a spare, checkpoints, reuse, a new start."""
    journal = create(run.directory, run.disk)
    run.created = True
    journal.prepare_spare()
    run.append(journal, batch(1))
    run.append(journal, mark(100), batch(2, 3), mark(200))
    for number in range(4, 9):
        run.append(journal, batch(number, size=500))  # runs into the spare, and then into one made at once
    run.append(journal, base(8))  # the first one is to be used again
    run.append(journal, direct(9))
    run.append(journal, base(9))
    journal.prepare_spare()
    for number in range(10, 16):
        run.append(journal, batch(number, size=700), mark(200 + number))
    run.append(journal, base(15), batch(16))
    run.append(journal, Batch((transaction(17, 1500, 1500),)))  # larger than a segment
    run.append(journal, direct(18))
    run.append(journal, batch(18))  # that one came to nothing
    run.append(journal, base(18, 17))
    journal.prepare_spare()
    journal.close()
    journal = reopen(run.directory, run.disk)
    for number in range(19, 25):
        run.append(journal, batch(number, size=600))
    run.append(journal, base(24))
    run.append(journal, batch(25))
    journal.close()


def operations_of(script: Callable[[Run], None], root: Path) -> int:
    run = Run(root, None)
    assert run.carry_out(script)
    assert told(read(run.directory)) == expected(run.acknowledged)
    return run.disk.operations


def check(run: Run, state: Path) -> bool:
    """What is found after the power cut is right, and can be gone on with. Whether an append was torn."""
    directory = state / run.directory.name
    contents = read(directory)
    if contents is None:
        assert not run.created
        return False
    possible = [entries for entries in run.possible() if expected(entries) == told(contents)]
    if not possible:  # in few words: comparing all that is in them takes pytest very long
        pytest.fail(f"after {len(run.acknowledged)} entries: {contents.head}, {len(contents.entries)}")
    journal = reopen(directory)
    journal.append(batch(99), mark(999))
    journal.close()
    after = read(directory)
    assert after is not None
    assert after.tail is None
    assert told(after) == expected([*possible[0], batch(99), mark(999)])
    if contents.tail is not None:
        kept = [path for path in directory.iterdir() if path.name.startswith("torn-")]
        assert [path.stat().st_size for path in kept] == [contents.tail.size]
    return contents.tail is not None


def test_a_power_cut_at_any_operation_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    operations = operations_of(everything, tmp_path / "whole")
    states = torn = 0
    for stop_at in range(operations + 1):
        run = Run(tmp_path / f"{stop_at}", stop_at)
        assert run.carry_out(everything) == (stop_at == operations)
        for state in run.disk.crash_states(limit=30, seed=stop_at):
            torn += check(run, state)
            states += 1
        shutil.rmtree(run.directory.parent)
    assert states > 5 * operations
    assert torn > operations


def interrupted_recoveries(run: Run, state: Path) -> Iterator[tuple[Path, FaultyDisk]]:
    """The power is cut once more at each operation of opening the journal in *state*."""
    for stop_at in range(100):
        copy = state.parent / f"{state.name}-{stop_at}"
        shutil.copytree(state, copy)
        disk = FaultyDisk(copy)

        def count(name: str, path: str, disk: FaultyDisk = disk, stop_at: int = stop_at) -> None:
            if disk.operations >= stop_at:
                raise PowerCut

        disk.on_operation = count
        try:
            reopen(copy / run.directory.name, disk).close()
            return
        except PowerCut:
            yield copy, disk
        finally:
            shutil.rmtree(copy)
    raise AssertionError("opening takes too many operations")


def torn_bytes(directory: Path, tail: Tail) -> bytes:
    data = (directory / f"{tail.segment:016}.log").read_bytes()
    return data[tail.offset : tail.offset + tail.size]


def kept(directory: Path) -> set[bytes]:
    return {path.read_bytes() for path in directory.iterdir() if path.name.startswith("torn-")}


@pytest.mark.parametrize("seed", range(4))
def test_a_second_power_cut_while_the_journal_is_opened_does_no_harm(tmp_path: Path, seed: int) -> None:
    operations = operations_of(everything, tmp_path / "whole")
    again = 0
    for stop_at in range(10 + seed, operations, 13):
        run = Run(tmp_path / f"{stop_at}", stop_at)
        assert not run.carry_out(everything)
        for number, state in enumerate(run.disk.crash_states(limit=8, seed=seed)):
            if number % 4 != seed or read(state / run.directory.name) is None:
                continue
            before = read(state / run.directory.name)
            assert before is not None
            tail = before.tail
            torn = {torn_bytes(state / run.directory.name, tail)} if tail else set()
            for _, disk in interrupted_recoveries(run, state):
                for twice in disk.crash_states(limit=6, seed=seed):
                    found = read(twice / run.directory.name)
                    contents = told(found)
                    assert contents in [expected(each) for each in run.possible()]
                    assert found is not None
                    assert found.tail == tail or torn <= kept(twice / run.directory.name)
                    reopen(twice / run.directory.name).close()
                    assert told(read(twice / run.directory.name)) == contents
                    again += 1
    assert again > 50


def failing(error: int) -> Callable[[Run], None]:
    def script(run: Run) -> None:
        journal = create(run.directory, run.disk)
        run.created = True
        run.append(journal, batch(1, size=500))
        run.append(journal, batch(2, size=500))
        run.disk.fail_at(error, OSError(errno.EIO, "broken"))
        try:
            for number in range(3, 7):
                run.append(journal, batch(number, size=500), mark(number))
        finally:
            journal.close()

    return script


@pytest.mark.parametrize("error", range(1, 14))
def test_after_an_error_what_is_read_again_is_durable_whatever_the_system_has_forgotten(
    tmp_path: Path, error: int
) -> None:
    """A sync that failed leaves data that can be read, and that no later sync brings to the disk."""
    run = Run(tmp_path / "root", None)
    with pytest.raises(OSError, match="broken"):
        run.carry_out(failing(error))
    # The process is started again, on the same machine.
    found = told(read(run.directory, run.disk))
    assert found in [expected(each) for each in run.possible()]
    reopen(run.directory, run.disk).close()
    for state in run.disk.crash_states(limit=40, seed=error):
        assert told(read(state / run.directory.name)) == found


def test_an_error_while_a_spare_is_made_does_not_break_the_journal(tmp_path: Path) -> None:
    run = Run(tmp_path / "root", None)
    journal = create(run.directory, run.disk)
    run.disk.fail_at(2, OSError(errno.ENOSPC, "full"))
    with pytest.raises(OSError, match="full"):
        journal.prepare_spare()
    assert [path.name for path in run.directory.iterdir()] == ["0000000000000001.log"]
    run.append(journal, batch(1))
    journal.prepare_spare()
    journal.close()
    assert told(read(run.directory)) == expected(run.acknowledged)


def test_a_journal_that_was_not_made_completely_is_no_journal_and_can_be_made_again(tmp_path: Path) -> None:
    operations = operations_of(lambda run: create(run.directory, run.disk).close(), tmp_path / "whole")
    found = []
    for stop_at in range(operations):
        run = Run(tmp_path / f"{stop_at}", stop_at)
        assert not run.carry_out(lambda run: create(run.directory, run.disk).close())
        for state in run.disk.crash_states(limit=20, seed=1):
            directory = state / run.directory.name
            contents = read(directory)
            found.append(contents is None)
            if contents is None:
                create(directory).close()
            assert told(read(directory)) == expected([])
    assert set(found) == {True, False}


def test_segments_that_opening_puts_in_order_can_be_relied_on(tmp_path: Path) -> None:
    """Those that it renames are written to next: their names must be durable by then."""
    root = tmp_path / "root"
    root.mkdir()
    directory = root / "Data.fs.journal"
    journal = create(directory)
    written: list[Entry] = [batch(number, size=1200) for number in range(1, 5)]
    written.append(base(4))
    for entry in written:
        journal.append(entry)
    journal.close()
    (directory / "0000000000000005.log").unlink()
    disk = FaultyDisk(root)
    journal = reopen(directory, disk)
    for number in (5, 6):
        written.append(batch(number, size=1200))
        journal.append(written[-1])
        for state in disk.crash_states(limit=20, seed=number):
            assert told(read(state / directory.name)) == expected(written)
    journal.close()
