"""What a client does next, chosen at random: pure, so that a seed gives the same deeds again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from tests.torture.journal import Effect
from tests.torture.objects import PAIRS, PLAIN, RESOLVING, STORAGES, TWINS, own

T = TypeVar("T")


class GivenUp(Enum):
    """At which point a transaction is aborted."""

    NEVER = 0
    BEFORE_COMMIT = 1
    #: By a data manager that votes last, when every storage has voted already.
    AFTER_VOTES = 2


@dataclass(frozen=True, slots=True)
class Deed:
    """One transaction to be made.

    *size_bytes*, *blob_bytes*: of the data and the blob of each entry that it inserts; 0: without a blob.
    """

    id: str
    effects: tuple[Effect, ...]
    given_up: GivenUp = GivenUp.NEVER
    size_bytes: int = 0
    blob_bytes: int = 0


KINDS = {"resolving": 5, "plain": 3, "twins": 3, "insert": 5, "own": 4, "pair": 4, "mixed": 2}
GIVING_UP = {GivenUp.NEVER: 90, GivenUp.BEFORE_COMMIT: 5, GivenUp.AFTER_VOTES: 5}
#: The largest exceeds what a client gathers before it sends.
SIZES_BYTES = {60: 900, 5_000: 95, 200_000: 5}
BLOBS_BYTES = {0: 700, 10: 200, 50_000: 90, 1_000_000: 10}


def deeds(choices: random.Random, client: int, incarnation: int, thread: int) -> Iterator[Deed]:
    """The transactions of one thread, without end."""
    number = 0
    while True:
        id = f"{client}.{incarnation}.{thread}.{number}"
        kind = _one_of(choices, KINDS)
        yield Deed(
            id,
            tuple(_effects(choices, kind, id, own(client, thread))),
            _one_of(choices, GIVING_UP),
            _one_of(choices, SIZES_BYTES),
            _one_of(choices, BLOBS_BYTES),
        )
        number += 1


def _one_of(choices: random.Random, weights: dict[T, int]) -> T:
    return choices.choices(list(weights), list(weights.values()))[0]


def _effects(choices: random.Random, kind: str, id: str, owned: str) -> Iterator[Effect]:
    storage = choices.choice(STORAGES)
    amount = choices.randint(1, 9)
    if kind == "pair":
        name = choices.choice(PAIRS)
        yield from (Effect(each, name, amount) for each in STORAGES)
    elif kind == "twins":
        yield from (Effect(storage, name, amount) for name in TWINS)
    elif kind == "insert":
        yield Effect(storage, _key(choices, id), 0)
    elif kind == "mixed":
        for each in STORAGES:
            yield Effect(each, choices.choice(RESOLVING), amount)
            yield Effect(each, owned, choices.randint(1, 9))
            yield Effect(each, _key(choices, id), 0)
    else:
        names = {"resolving": RESOLVING, "plain": PLAIN, "own": (owned,)}[kind]
        yield Effect(storage, choices.choice(names), amount)


def _key(choices: random.Random, id: str) -> str:
    """A key that nobody else inserts, anywhere in the tree."""
    return f"{choices.getrandbits(32):08x}-{id}"
