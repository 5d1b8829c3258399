"""Locks on objects: examples, and a comparison with a model that does it the slow and obvious way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.utils import p64

from zeoid.commit.locks import Claim, Locks

A, B, C = p64(1), p64(2), p64(3)


def names(claims: list[Claim]) -> list[str]:
    return sorted(claim.who for claim in claims)


def is_granted(claim: Claim) -> bool:
    return claim.missing == 0


# Examples -------------------------------------------------------------------------------------------------


def test_a_free_object_is_granted_at_once() -> None:
    locks = Locks()
    assert is_granted(locks.claim("us", [A], [B]))


def test_nothing_is_left_when_all_is_given_back() -> None:
    locks = Locks()
    claims = [locks.claim("one", [A], [B]), locks.claim("two", [A, C]), locks.claim("three", [], [B])]
    assert len(locks) == 4  # three objects and the storage
    for claim in claims:
        locks.release(claim)
    assert len(locks) == 0


def test_who_writes_an_object_has_it_alone() -> None:
    locks = Locks()
    writer = locks.claim("writer", [A])
    another, reader = locks.claim("another", [A]), locks.claim("reader", [], [A])
    assert not is_granted(another)
    assert not is_granted(reader)
    assert names(locks.release(writer)) == ["another"]
    assert names(locks.release(another)) == ["reader"]


def test_readers_share() -> None:
    locks = Locks()
    readers = [locks.claim(f"reader{number}", [], [A]) for number in range(3)]
    assert all(map(is_granted, readers))
    writer = locks.claim("writer", [A])
    for reader in readers:
        assert not is_granted(writer)
        granted = locks.release(reader)
    assert names(granted) == ["writer"]


def test_nobody_overtakes_a_writer_that_waits() -> None:
    locks = Locks()
    reader = locks.claim("reader", [], [A])
    writer = locks.claim("writer", [A])
    late = [locks.claim(f"late{number}", [], [A]) for number in range(2)]
    assert not any(map(is_granted, late))
    assert names(locks.release(reader)) == ["writer"]
    assert names(locks.release(writer)) == ["late0", "late1"]


def test_when_a_waiting_writer_leaves_the_readers_behind_it_join_those_before_it() -> None:
    locks = Locks()
    locks.claim("reader", [], [A])
    writer = locks.claim("writer", [A])
    for name in ("late", "later"):
        locks.claim(name, [], [A])
    locks.claim("another writer", [A])
    locks.claim("last", [], [A])
    assert names(locks.release(writer)) == ["late", "later"]


def test_who_leaves_from_the_midst_of_a_queue_leaves_the_others_in_their_order() -> None:
    locks = Locks()
    first, second, third, fourth = (locks.claim(str(number), [A]) for number in range(4))
    assert locks.release(third) == []
    assert names(locks.release(first)) == ["1"]
    assert names(locks.release(second)) == ["3"]
    assert locks.release(fourth) == []


def test_all_is_granted_in_one_step() -> None:
    locks = Locks()
    one, two = locks.claim("one", [A]), locks.claim("two", [B])
    both = locks.claim("both", [A, B])
    assert locks.release(one) == []
    assert not is_granted(both)
    assert names(locks.release(two)) == ["both"]
    assert is_granted(both)


def test_what_is_waited_for_is_kept_from_those_who_come_later() -> None:
    locks = Locks()
    holder = locks.claim("holder", [A])
    waits = locks.claim("waits", [A, B])
    assert not is_granted(locks.claim("late", [B]))
    assert names(locks.release(waits)) == ["late"]
    assert locks.release(holder) == []


def test_objects_named_twice_and_in_both_ways_are_written() -> None:
    locks = Locks()
    claim = locks.claim("us", [A, A], [A, B, B])
    assert is_granted(claim)
    assert sorted(claim.oids) == [A, B]
    assert is_granted(locks.claim("reader of b", [], [B]))
    assert not is_granted(locks.claim("reader of a", [], [A]))
    assert names(locks.release(claim)) == ["reader of a"]


def test_who_has_the_whole_storage_has_it_alone() -> None:
    locks = Locks()
    before = [locks.claim("one", [A]), locks.claim("nothing", [])]
    whole = locks.claim("whole", [], whole=True)
    after = [locks.claim("two", [B]), locks.claim("three", [], [C]), locks.claim("empty", [])]
    assert all(map(is_granted, before))
    assert not any(map(is_granted, [whole, *after]))
    assert locks.release(before[0]) == []
    assert names(locks.release(before[1])) == ["whole"]
    assert names(locks.release(whole)) == ["empty", "three", "two"]


def test_one_whole_storage_after_the_other() -> None:
    locks = Locks()
    first, second = (locks.claim(name, [A], whole=True) for name in ("first", "second"))
    assert is_granted(first)
    assert not is_granted(second)
    assert names(locks.release(first)) == ["second"]


def test_the_whole_storage_is_not_told_as_an_object() -> None:
    assert sorted(Locks().claim("us", [B], [C], whole=True).oids) == [B, C]


def test_a_claim_is_reported_once() -> None:
    locks = Locks()
    holder = locks.claim("holder", [A, B, C])
    locks.claim("us", [A, B, C])
    assert names(locks.release(holder)) == ["us"]


# The model ------------------------------------------------------------------------------------------------

OIDS = [p64(number) for number in range(1, 5)]


@dataclass(frozen=True)
class Wish:
    """What one claim asks for."""

    number: int
    written: frozenset[bytes]
    depended_on: frozenset[bytes]
    whole: bool

    def excludes(self, other: Wish) -> bool:
        return (
            self.whole
            or other.whole
            or bool(self.written & (other.written | other.depended_on))
            or bool(other.written & self.depended_on)
        )


class NaiveLocks:
    """A list of wishes in the order in which they came; each is granted when no earlier one excludes it."""

    def __init__(self) -> None:
        self.wishes: list[Wish] = []

    def granted(self) -> set[int]:
        return {
            wish.number
            for index, wish in enumerate(self.wishes)
            if not any(wish.excludes(earlier) for earlier in self.wishes[:index])
        }


oids = st.frozensets(st.sampled_from(OIDS), max_size=3)
claims = st.tuples(oids, oids, st.integers(0, 9).map(lambda number: number == 0))
#: A claim, or the place (in the list of those not released) of one that is released, holding or waiting.
steps = st.lists(st.one_of(claims, claims, st.integers(0, 7)), max_size=40)


def check_against_the_model(locks: Locks, model: NaiveLocks, held: dict[int, Claim], told: set[int]) -> None:
    expected = model.granted()
    assert {number for number, claim in held.items() if is_granted(claim)} == expected
    assert told == expected, "each is told when it is granted"
    for one in model.wishes:
        for other in model.wishes:
            if one is not other and one.number in expected and other.number in expected:
                assert not one.excludes(other)
    if model.wishes:
        assert model.wishes[0].number in expected, "the earliest of all waits for nobody"
    wanted = {oid for wish in model.wishes for oid in wish.written | wish.depended_on}
    assert len(locks) == len(wanted) + bool(model.wishes)


@settings(max_examples=500, deadline=None)
@given(steps)
def test_locks_do_as_the_model_does(steps: list[Any]) -> None:
    locks, model = Locks(), NaiveLocks()
    held: dict[int, Claim] = {}
    #: Whom the locks said that it is granted, and who has not been released.
    told: set[int] = set()

    def release(place: int) -> None:
        number = model.wishes.pop(place).number
        for granted in locks.release(held.pop(number)):
            assert granted.who not in told, "and only once"
            told.add(granted.who)
        told.discard(number)

    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            written, depended_on, whole = step
            model.wishes.append(Wish(number, written, depended_on - written, whole))
            held[number] = locks.claim(number, written, depended_on, whole=whole)
            if is_granted(held[number]):
                told.add(number)
        elif step < len(model.wishes):
            release(step)
        check_against_the_model(locks, model, held, told)
    while model.wishes:  # whoever holds gives back, and in the end all have had their turn
        release(0)
        check_against_the_model(locks, model, held, told)
    assert len(locks) == 0


@pytest.mark.parametrize("number", range(2))
def test_the_model_finds_who_excludes_whom(number: int) -> None:
    writer = Wish(0, frozenset([A]), frozenset(), False)
    reader = Wish(1, frozenset(), frozenset([A]), False)
    another = Wish(2, frozenset([B]), frozenset([A]), False)
    whole = Wish(3, frozenset(), frozenset(), True)
    for one, other, excluded in [
        (writer, reader, True), (reader, another, False), (writer, another, True), (whole, reader, True),
    ]:  # fmt: skip
        pair = (one, other) if number == 0 else (other, one)
        assert pair[0].excludes(pair[1]) is excluded
