"""Loads of what another thread has asked for already: they wait for its reply instead of asking again.

Owns how such a call is recognized among those that are under way: the context of a load is what was asked for
(see `View.loaded`). A thread that is alone with its connection never comes here, so merging costs it nothing.

A reply that was asked for earlier is as good only if a later one would say the same: if nothing will ever be
committed before the tid that both ask for.
"""

from collections.abc import Iterator

from zeoid.client.channel import Channel, Waiter
from zeoid.client.view import View
from zeoid.model import Revision


def follow(
    channel: Channel, view: View, oid: bytes, tid: bytes, timeout_s: float
) -> tuple[Revision | None] | None:
    """What another thread has asked for and got: (the reply,). None: it must be asked for. TimedOut."""
    if not view.is_settled(tid):
        return None
    for waiter in _loads(channel, tid):
        asked = waiter.context[0]
        if asked == oid:
            return (waiter.value,) if channel.follow(waiter, timeout_s) else None
        if type(asked) is not bytes and oid in asked:
            if not channel.follow(waiter, timeout_s):
                return None
            found = view.lookup(oid, tid)
            return None if found is None else (found,)
    return None


def all_loads(channel: Channel, view: View, tid: bytes) -> dict[bytes, Waiter]:
    """What is under way, and may be waited for: oid → the call that asked for it."""
    loads: dict[bytes, Waiter] = {}
    if view.is_settled(tid):
        for waiter in _loads(channel, tid):
            asked = waiter.context[0]
            loads.update(dict.fromkeys((asked,) if type(asked) is bytes else asked, waiter))
    return loads


def _loads(channel: Channel, tid: bytes) -> Iterator[Waiter]:
    for waiter in channel.under_way():
        context = waiter.context
        if type(context) is tuple and context[2] == tid:
            yield waiter
