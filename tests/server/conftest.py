"""A server in memory, for the tests of one session or of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.inmemory import MemoryHouse
from tests.server.processes import refused, refused_here, serve
from zeoid.engines.opening import open_filestorage
from zeoid.ports import Engine

__all__ = ["file_house", "house", "make_house", "refused", "refused_here", "serve"]


@pytest.fixture
def house() -> Iterator[MemoryHouse]:
    """One storage, named 1, in memory."""
    house = MemoryHouse()
    yield house
    house.close()


@pytest.fixture
def make_house() -> Iterator[Callable[..., MemoryHouse]]:
    """Houses as the test wants them."""
    houses = []

    def make(engines: dict[str, Engine] | None = None, **options: Any) -> MemoryHouse:
        houses.append(MemoryHouse(engines, **options))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


@pytest.fixture
def file_house(make_house: Callable[..., MemoryHouse], tmp_path: Path) -> MemoryHouse:
    """One storage, named 1, in a data file: with undo, pack and iteration."""
    return make_house({"1": open_filestorage(tmp_path / "Data.fs")})
