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


def find(channel: Channel, view: View, oid: bytes, tid: bytes) -> Waiter | None:
    """The call that has asked for this, if there is one and its reply is as good as another's."""
    if view.is_settled(tid):
        for waiter in _loads(channel, tid):
            asked = waiter.context[0]
            if asked == oid or (type(asked) is not bytes and oid in asked):
                return waiter
    return None


def follow(
    channel: Channel, view: View, waiter: Waiter, oid: bytes, tid: bytes, timeout_s: float
) -> tuple[Revision | None] | None:
    """What that call got: (the reply,). None: it must be asked for all the same. TimedOut."""
    if not channel.follow(waiter, timeout_s):
        return None
    if waiter.context[0] == oid:
        return (waiter.value,)
    found = view.lookup(oid, tid)
    return None if found is None else (found,)


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
