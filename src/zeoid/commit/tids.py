"""Transaction ids: time stamps that only grow. Owns how a new one is made."""

import math
from datetime import UTC, datetime

from persistent.TimeStamp import TimeStamp

from zeoid.model import Tid


def next_tid(last: bytes, now: float) -> Tid:
    """A tid for the time *now* (seconds since the epoch, UTC), but later than *last* in any case."""
    seconds = math.floor(now)
    moment = datetime.fromtimestamp(seconds, UTC)
    stamp = TimeStamp(
        moment.year, moment.month, moment.day, moment.hour, moment.minute, moment.second + (now - seconds)
    )
    raw: bytes = stamp.raw()
    if raw <= last:
        raw = TimeStamp(last).laterThan(TimeStamp(last)).raw()
    return Tid(raw)
