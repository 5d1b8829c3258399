"""Transaction ids: time stamps that only grow, whatever the clock does."""

from __future__ import annotations

import math
from calendar import timegm
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent.TimeStamp import TimeStamp

from zeoid.commit.tids import next_tid
from zeoid.model import NO_TID, tid_after, tid_before

unhurried = settings(deadline=None)

YEAR_1970 = 0.0
YEAR_2100 = float(timegm((2100, 1, 1, 0, 0, 0)))
#: A tid counts 2**32 steps in a minute, and a float of this size has steps of some 0.2 µs.
PRECISION_S = 1e-6

moments = st.floats(YEAR_1970, YEAR_2100, allow_nan=False)


def time_of(tid: bytes) -> float:
    return float(TimeStamp(tid).timeTime())


@unhurried
@given(moments)
def test_a_tid_tells_the_time_at_which_it_was_made(now: float) -> None:
    assert math.isclose(time_of(next_tid(NO_TID, now)), now, rel_tol=0, abs_tol=PRECISION_S)


@unhurried
@given(moments, moments)
def test_later_moments_have_greater_tids(one: float, other: float) -> None:
    before, after = sorted((one, other))
    assert next_tid(NO_TID, before) <= next_tid(NO_TID, after)


@unhurried
@given(st.lists(moments, min_size=1, max_size=30))
def test_each_tid_is_greater_than_the_last_even_if_the_clock_goes_back(times: list[float]) -> None:
    last: bytes = NO_TID
    for now in times:
        tid = next_tid(last, now)
        assert len(tid) == 8
        assert tid > last
        last = tid


@unhurried
@given(moments, moments)
def test_a_clock_that_went_back_costs_the_smallest_step(one: float, other: float) -> None:
    before, after = sorted((one, other))
    last = next_tid(NO_TID, after)
    tid = next_tid(last, before)
    assert tid > last
    assert tid_before(tid) == last


def test_a_clock_that_stands_still_gives_consecutive_tids() -> None:
    first = next_tid(NO_TID, 1_700_000_000.25)
    second = next_tid(first, 1_700_000_000.25)
    third = next_tid(second, 1_700_000_000.25)
    assert (second, third) == (tid_after(first), tid_after(tid_after(first)))


def test_a_clock_that_is_right_again_is_followed_again() -> None:
    wrong = next_tid(NO_TID, 1_700_000_100.0)
    stuck = next_tid(wrong, 1_700_000_050.0)
    assert time_of(next_tid(stuck, 1_700_000_101.0)) == pytest.approx(1_700_000_101.0, abs=PRECISION_S)


@pytest.mark.parametrize(
    "moment",
    [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2000, 2, 29, 12, tzinfo=UTC),
        datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2038, 1, 19, 3, 14, 8, tzinfo=UTC),
        datetime(2100, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2100, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    ],
    ids=str,
)
def test_dates_on_which_clocks_have_been_wrong(moment: datetime) -> None:
    now = moment.timestamp()
    tid = next_tid(NO_TID, now)
    stamp = TimeStamp(tid)
    assert (stamp.year(), stamp.month(), stamp.day(), stamp.hour(), stamp.minute()) == (
        moment.year, moment.month, moment.day, moment.hour, moment.minute,
    )  # fmt: skip
    assert time_of(tid) == pytest.approx(now, abs=PRECISION_S)


@pytest.mark.parametrize(
    "moment", [datetime(2023, 12, 31, 23, 59, tzinfo=UTC), datetime(2024, 2, 28, 23, 59, tzinfo=UTC)], ids=str
)
def test_the_last_tid_of_a_minute_is_followed_by_the_first_of_the_next(moment: datetime) -> None:
    minute = next_tid(NO_TID, moment.timestamp())
    last_of_minute = minute[:4] + b"\xff" * 4
    following = next_tid(last_of_minute, moment.timestamp())
    assert following == next_tid(NO_TID, moment.timestamp() + 60)


def test_a_tid_like_those_that_a_storage_makes_itself() -> None:
    """The bytes are those of ZODB's own time stamps: the same data file can be used without a server."""
    now = 1_700_000_000.5
    assert next_tid(NO_TID, now) == TimeStamp(2023, 11, 14, 22, 13, 20.5).raw()
