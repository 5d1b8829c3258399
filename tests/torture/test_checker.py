"""The checker finds what it is there to find, each rule by itself, and has nothing against a good run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from tests.torture.checker import Found, problems, totals
from tests.torture.journal import Effect, Told
from tests.torture.objects import PAIRS, TWINS

ADDED = Told("1.1.0.0", (Effect("1", "plain-0", 3),), "done", conflicts=2)
INSERTED = Told("1.1.0.1", (Effect("1", "a key", 0),), "done")
PAIR = Told("1.1.0.2", (Effect("1", PAIRS[0], 5), Effect("2", PAIRS[0], 5)), "done", resolved=1)
FAILED = Told("1.1.1.0", (Effect("1", "plain-0", 7),), "failed")
GIVEN_UP = Told("1.1.1.1", (Effect("2", "another key", 0),), "given up")
TOLD = (ADDED, INSERTED, PAIR, FAILED, GIVEN_UP)
ZERO = dict.fromkeys(TWINS, 0)
GOOD = {
    "1": Found({**ZERO, "plain-0": 3, PAIRS[0]: 5}, ["a key"], [ADDED.id, INSERTED.id, PAIR.id]),
    "2": Found({**ZERO, PAIRS[0]: 5}, [], [PAIR.id]),
}


def found(storage: str, **changes: object) -> dict[str, Found]:
    """What is found in a good run, with something changed in one storage."""
    return {**GOOD, storage: dataclasses.replace(GOOD[storage], **changes)}  # type: ignore[arg-type]


def counters(**values: int) -> dict[str, int]:
    return {**GOOD["1"].counters, **{name.replace("_", "-"): value for name, value in values.items()}}


def ends_with(told: Sequence[Told], one: Told, end: str | None) -> list[Told]:
    """The same, with another end for one of them."""
    return [dataclasses.replace(each, end=end) if each is one else each for each in told]  # type: ignore[arg-type]


def assert_only(told: Sequence[Told], content: dict[str, Found], *texts: str) -> None:
    """Each text is in one problem, and there are no others."""
    told_problems = problems(told, content)
    assert len(told_problems) == len(texts), told_problems
    for text, problem in zip(sorted(texts), sorted(told_problems), strict=True):
        assert text in problem


def test_a_good_run_has_no_problems() -> None:
    assert problems(TOLD, GOOD) == []


@pytest.mark.parametrize("end", [None, "unknown"])
def test_what_is_unknown_may_be_there_or_not(end: str | None) -> None:
    assert problems(ends_with(TOLD, ADDED, end), GOOD) == []
    assert problems(ends_with(TOLD, FAILED, end), GOOD) == []
    assert problems(ends_with(TOLD, INSERTED, end), GOOD) == []
    assert problems(ends_with(TOLD, GIVEN_UP, end), GOOD) == []


def test_an_acknowledged_increment_is_lost() -> None:
    """The last transaction of the file is gone, with all that it did."""
    lost = found("1", counters=counters(pair_0=0), ids=[ADDED.id, INSERTED.id])
    assert_only(
        TOLD,
        lost,
        "storage 1: pair-0 is 0, acknowledged are 5, with unknown ones 5",
        "storage 1: transaction 1.1.0.2 was acknowledged and is not there",
    )


def test_an_increment_is_lost_although_its_transaction_is_there() -> None:
    assert_only(
        TOLD,
        found("1", counters=counters(plain_0=2)),
        "plain-0 is 2, acknowledged are 3",
        "plain-0 is 2, the transactions in the file make it 3",
    )


def test_an_increment_is_there_twice() -> None:
    assert_only(
        TOLD,
        found("1", counters=counters(plain_0=6), ids=[ADDED.id, INSERTED.id, PAIR.id, ADDED.id]),
        "plain-0 is 6, acknowledged are 3, with unknown ones 3",
        "plain-0 is 6, the transactions in the file make it 3",
        "transaction 1.1.0.0 (done) is there 2 times",
        "transaction 1.1.0.0 comes after 1.1.0.2",
    )


def test_an_unknown_increment_is_there_twice() -> None:
    told = ends_with(TOLD, ADDED, None)
    twice = found("1", ids=[ADDED.id, ADDED.id, INSERTED.id, PAIR.id])
    assert_only(told, twice, "transaction 1.1.0.0 (None) is there 2 times")


def test_a_counter_lost_what_is_unknown_but_in_the_file() -> None:
    """Within what the journals allow, and still wrong."""
    told = ends_with(TOLD, ADDED, "unknown")
    lost = found("1", counters=counters(plain_0=0))
    assert_only(told, lost, "plain-0 is 0, the transactions in the file make it 3")


def test_what_failed_is_there() -> None:
    there = found("1", counters=counters(plain_0=10), ids=[*GOOD["1"].ids, FAILED.id])
    assert_only(
        TOLD,
        there,
        "plain-0 is 10, acknowledged are 3, with unknown ones 3",
        "transaction 1.1.1.0 (failed) is there",
    )


def test_what_was_given_up_is_there() -> None:
    there = found("2", keys=["another key"], ids=[PAIR.id, GIVEN_UP.id])
    assert_only(
        TOLD,
        there,
        "the key another key is there, and should not be",
        "transaction 1.1.1.1 (given up) is there",
    )


def test_an_acknowledged_key_is_lost() -> None:
    assert_only(
        TOLD,
        found("1", keys=[]),
        "the key a key was acknowledged and is not there",
        "differ: ['a key']",
    )


def test_an_unknown_key_is_lost_although_its_transaction_is_there() -> None:
    assert_only(ends_with(TOLD, INSERTED, None), found("1", keys=[]), "differ: ['a key']")


def test_a_key_that_nobody_tried() -> None:
    assert_only(
        TOLD,
        found("1", keys=["a key", "stray"]),
        "the key stray is there, and should not be",
        "differ: ['stray']",
    )


def test_a_transaction_that_nobody_tried() -> None:
    strange = found("1", ids=[*GOOD["1"].ids, "a stranger"])
    assert_only(TOLD, strange, "transaction 'a stranger' is there, and nobody tried it")


def test_a_thread_is_overtaken_by_itself() -> None:
    swapped = found("1", ids=[INSERTED.id, ADDED.id, PAIR.id])
    assert_only(TOLD, swapped, "transaction 1.1.0.0 comes after 1.1.0.1")


def test_twins_differ() -> None:
    torn = Told("2.1.0.0", (Effect("1", TWINS[0], 4),), "done")
    content = found("1", counters={**GOOD["1"].counters, TWINS[0]: 4}, ids=[*GOOD["1"].ids, torn.id])
    assert_only([*TOLD, torn], content, "the twins differ: 4 and 0")


def test_an_acknowledged_pair_is_torn() -> None:
    content = found("2", counters=ZERO, ids=[])
    assert_only(
        TOLD,
        content,
        "storage 2: pair-0 is 0, acknowledged are 5",
        "storage 2: transaction 1.1.0.2 was acknowledged and is not there",
    )


def test_an_unknown_pair_may_be_torn_and_is_counted() -> None:
    told, content = ends_with(TOLD, PAIR, "unknown"), found("2", counters=ZERO, ids=[])
    assert problems(told, content) == []
    assert totals(told, content).torn == 1
    assert totals(told, GOOD).torn == 0


def test_a_storage_that_could_not_be_read_does_not_hide_the_rest() -> None:
    told = [*ends_with(TOLD, PAIR, "unknown"), Told("3.1.0.0", (Effect("1", "a lost key", 0),), "done")]
    only_one = {"1": GOOD["1"]}
    assert totals(told, only_one).tried == len(told)
    assert any("a lost key" in problem for problem in problems(told, only_one))


def test_the_totals() -> None:
    told = [*TOLD, Told("3.1.0.0", (Effect("1", "plain-0", 7),), None)]
    assert dataclasses.asdict(totals(ends_with(told, INSERTED, "unknown"), GOOD)) == {
        "tried": 6,
        "acknowledged": 2,
        "failed": 1,
        "given_up": 1,
        "unknown": 2,
        "unknown_committed": 1,
        "torn": 0,
        "conflicts": 2,
        "resolved": 1,
        "keys": 1,
    }


def test_many_problems_of_a_kind_are_told_in_short() -> None:
    content = found("1", ids=[*GOOD["1"].ids, *(f"stranger {number}" for number in range(20))])
    told_problems = problems(TOLD, content)
    assert len(told_problems) == 6
    assert told_problems[-1] == "storage 1: … and 15 more of the kind"
