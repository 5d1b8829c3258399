"""What clients write down: a line before a transaction and one after it, each with one write.

Owns the format of these files. A file belongs to one process, so that what a killed one left unfinished in
its last line can't spoil another's. Must not know what transactions mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: done: its commit returned. failed: it is not committed, said an error. given up: its client aborted it.
#: unknown: OutcomeUnknown was raised, or it failed while it was being finished in two storages.
End = Literal["done", "failed", "given up", "unknown"]


@dataclass(frozen=True, slots=True)
class Effect:
    """What a transaction changes in one storage: it adds to a counter, or (amount 0) inserts a key."""

    storage: str
    name: str
    amount: int


@dataclass(frozen=True, slots=True)
class Told:
    """One transaction, as its client tells it. No end: the client was killed meanwhile."""

    id: str
    effects: tuple[Effect, ...]
    end: End | None
    conflicts: int = 0
    resolved: int = 0


@dataclass(frozen=True, slots=True)
class Journals:
    """All that was written down in one run."""

    transactions: tuple[Told, ...]
    #: What clients saw while they ran that must never be.
    violations: tuple[str, ...]


class Journal:
    """The file of one process. Its threads may write at the same time."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def trying(self, id: str, effects: tuple[Effect, ...]) -> None:
        self._write("try", id, [(effect.storage, effect.name, effect.amount) for effect in effects])

    def ended(self, id: str, end: End, conflicts: int, resolved: int) -> None:
        self._write("end", id, end, conflicts, resolved)

    def violation(self, text: str) -> None:
        self._write("violation", text)

    def _write(self, *values: object) -> None:
        line = json.dumps(values).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError("a journal could not be written")

    def close(self) -> None:
        os.close(self._file)


def read(paths: list[Path]) -> Journals:
    """What these files tell. An incomplete last line tells nothing: whoever wrote it went no further."""
    transactions: list[Told] = []
    violations: list[str] = []
    for path in paths:
        open_: dict[str, tuple[Effect, ...]] = {}
        for kind, *values in _lines(path):
            if kind == "violation":
                violations.append(f"{path.name}: {values[0]}")
            elif kind == "try":
                open_[values[0]] = tuple(Effect(*each) for each in values[1])
            else:
                id, end, conflicts, resolved = values
                transactions.append(Told(id, open_.pop(id), end, conflicts, resolved))
        transactions += [Told(id, effects, None) for id, effects in open_.items()]
    return Journals(tuple(transactions), tuple(violations))


def _lines(path: Path) -> Iterator[list[Any]]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
