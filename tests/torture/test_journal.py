"""What a client writes down can be read, whenever it was killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture.journal import Effect, Journal, Journals, Told, read

EFFECTS = (Effect("1", "plain-0", 3), Effect("2", "a key", 0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "client.journal"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


def test_what_was_written_is_read(journal: Journal, path: Path) -> None:
    journal.trying("1", EFFECTS)
    journal.trying("2", EFFECTS[:1])
    journal.ended("1", "done", 4, 5)
    journal.violation("the twins differ")
    assert read([path]) == Journals(
        (Told("1", EFFECTS, "done", 4, 5), Told("2", EFFECTS[:1], None)),
        ("client.journal: the twins differ",),
    )


def test_a_line_is_there_as_soon_as_it_is_written(journal: Journal, path: Path) -> None:
    journal.trying("1", EFFECTS)
    assert path.read_bytes().endswith(b"\n")


def test_an_incomplete_last_line_tells_nothing(journal: Journal, path: Path) -> None:
    journal.trying("1", EFFECTS)
    journal.ended("1", "done", 0, 0)
    journal.trying("2", EFFECTS)
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(ends[1], ends[2]):
        path.write_bytes(whole[:length])
        assert read([path]).transactions == (Told("1", EFFECTS, "done"),)
    for length in range(ends[0], ends[1]):
        path.write_bytes(whole[:length])
        assert read([path]).transactions == (Told("1", EFFECTS, None),)
