"""Transaction ids: time stamps that only grow. Owns how a new one is made.

A time stamp has minutes in its first four bytes, by the calendar, and in its last four the 2**32nd parts of a
minute. Source: persistent.TimeStamp, which makes the first half, and any that follows another closely.
"""

import functools
from datetime import UTC, datetime

from persistent.TimeStamp import TimeStamp

from zeoid.model import Tid

_MINUTE_S = 60
_PARTS = 2**32


def next_tid(last: bytes, now: float) -> Tid:
    """A tid for the time *now* (seconds since the epoch, UTC), but later than *last* in any case."""
    minute, second = divmod(now, _MINUTE_S)
    raw = _of_minute(int(minute)) + int(second * _PARTS / _MINUTE_S).to_bytes(4, "big")
    if raw <= last:
        raw = TimeStamp(last).laterThan(TimeStamp(last)).raw()
    return Tid(raw)


@functools.lru_cache(maxsize=2)
def _of_minute(minute: int) -> bytes:
    """The first half of a time stamp in this *minute* since the epoch."""
    moment = datetime.fromtimestamp(minute * _MINUTE_S, UTC)
    raw: bytes = TimeStamp(moment.year, moment.month, moment.day, moment.hour, moment.minute, 0.0).raw()
    return raw[:4]
