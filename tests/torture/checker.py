"""What must hold between what clients wrote down and what is in the data files: a pure function.

Per storage:
 1. A counter's value is at least the sum of what was acknowledged, and at most that and what is unknown.
    Without unknown increments both are the same.
 2. The key of an acknowledged insert is there; a key that is there belongs to an acknowledged or unknown one.
 3. Each transaction names its writer's id in the file. An acknowledged one is there exactly once, one with an
    unknown outcome at most once, any other never, and nothing else is there.
 4. A counter's value is the sum of what the transactions in the file say that they added to it, and the keys
    are those that they say they inserted. This is exact, whatever is unknown.
 5. A thread's transactions are in the file in the order in which it made them.
 6. Twins are equal.

A transaction that spans both storages is judged in each of them by itself: acknowledged, it is in both;
failed or given up, in neither; unknown, it may be in one of them (see the package).
"""

from __future__ import annotations

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.torture.journal import Told
from tests.torture.objects import TWINS

#: No more of one kind are told; a broken server breaks everything.
EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Found:
    """What is in one storage."""

    counters: Mapping[str, int]
    keys: Collection[str]
    #: The ids of the transactions, in the order of the file, without those that made the database.
    ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run did."""

    tried: int
    acknowledged: int
    failed: int
    given_up: int
    unknown: int
    #: How many of the unknown ones are in the files.
    unknown_committed: int
    torn: int
    conflicts: int
    resolved: int
    keys: int


def problems(told: Sequence[Told], found: Mapping[str, Found]) -> list[str]:
    """Everything that is wrong; empty when nothing is."""
    all_problems: list[str] = []
    for storage, content in found.items():
        concerned = [one for one in told if any(effect.storage == storage for effect in one.effects)]
        for check in (_counters, _keys, _transactions, _sums, _order, _twins):
            some = list(check(storage, concerned, content))
            all_problems += [f"storage {storage}: {problem}" for problem in some[:EXAMPLES]]
            if len(some) > EXAMPLES:
                all_problems.append(f"storage {storage}: … and {len(some) - EXAMPLES} more of the kind")
    return all_problems


def totals(told: Sequence[Told], found: Mapping[str, Found]) -> Totals:
    ends = Tally("unknown" if one.end is None else one.end for one in told)
    present = {storage: set(content.ids) for storage, content in found.items()}
    copies = [
        [one.id in present.get(storage, ()) for storage in {effect.storage for effect in one.effects}]
        for one in told
        if _unknown(one)
    ]
    return Totals(
        tried=len(told),
        acknowledged=ends["done"],
        failed=ends["failed"],
        given_up=ends["given up"],
        unknown=ends["unknown"],
        unknown_committed=sum(map(any, copies)),
        torn=sum(any(copy) and not all(copy) for copy in copies),
        conflicts=sum(one.conflicts for one in told),
        resolved=sum(one.resolved for one in told),
        keys=sum(len(content.keys) for content in found.values()),
    )


def _unknown(one: Told) -> bool:
    return one.end is None or one.end == "unknown"


def _added(storage: str, told: Iterable[Told]) -> Tally[str]:
    """What these transactions add to each counter."""
    sums: Tally[str] = Tally()
    for one in told:
        for effect in one.effects:
            if effect.storage == storage and effect.amount:
                sums[effect.name] += effect.amount
    return sums


def _inserted(storage: str, told: Iterable[Told]) -> set[str]:
    return {
        effect.name
        for one in told
        for effect in one.effects
        if effect.storage == storage and not effect.amount
    }


def _counters(storage: str, told: Sequence[Told], found: Found) -> Iterator[str]:
    least = _added(storage, (one for one in told if one.end == "done"))
    unknown = _added(storage, filter(_unknown, told))
    for name in sorted({*found.counters, *least, *unknown}):
        value, low, high = found.counters.get(name, 0), least[name], least[name] + unknown[name]
        if not low <= value <= high:
            yield f"{name} is {value}, acknowledged are {low}, with unknown ones {high}"


def _keys(storage: str, told: Sequence[Told], found: Found) -> Iterator[str]:
    keys = set(found.keys)
    least = _inserted(storage, (one for one in told if one.end == "done"))
    most = least | _inserted(storage, filter(_unknown, told))
    yield from (f"the key {key} was acknowledged and is not there" for key in sorted(least - keys))
    yield from (f"the key {key} is there, and should not be" for key in sorted(keys - most))


def _transactions(storage: str, told: Sequence[Told], found: Found) -> Iterator[str]:
    times = Tally(found.ids)
    known = {one.id for one in told}
    for one in told:
        if times[one.id] > 1:
            yield f"transaction {one.id} ({one.end}) is there {times[one.id]} times"
        elif times[one.id] == 0 and one.end == "done":
            yield f"transaction {one.id} was acknowledged and is not there"
        elif times[one.id] and not _unknown(one) and one.end != "done":
            yield f"transaction {one.id} ({one.end}) is there"
    yield from (f"transaction {id!r} is there, and nobody tried it" for id in times if id not in known)


def _sums(storage: str, told: Sequence[Told], found: Found) -> Iterator[str]:
    ids = set(found.ids)
    there = [one for one in told if one.id in ids]
    sums = _added(storage, there)
    for name in sorted({*found.counters, *sums}):
        value = found.counters.get(name, 0)
        if value != sums[name]:
            yield f"{name} is {value}, the transactions in the file make it {sums[name]}"
    inserted = _inserted(storage, there)
    if inserted != set(found.keys):
        differing = sorted(inserted ^ set(found.keys))[:EXAMPLES]
        yield f"keys and the transactions in the file that inserted them differ: {differing}"


def _order(storage: str, told: Sequence[Told], found: Found) -> Iterator[str]:
    last: defaultdict[str, int] = defaultdict(lambda: -1)
    for id in found.ids:
        thread, _, number = id.rpartition(".")
        if number.isdigit():
            if int(number) < last[thread]:
                yield f"transaction {id} comes after {thread}.{last[thread]}"
            last[thread] = int(number)


def _twins(storage: str, told: Sequence[Told], found: Found) -> Iterator[str]:
    first, second = (found.counters.get(name, 0) for name in TWINS)
    if first != second:
        yield f"the twins differ: {first} and {second}"
