"""What others commit to a database that is not the server's alone, as one order of transactions for clients.

A poll tells a tid that the database has reached, and which objects changed since the last poll; not when each
of them did, nor how many transactions there were. Clients need to know more: a revision that they keep ends
with the transaction that overwrote it, and a view is the state at one tid. So for news that leads from the
visible tid V to T two announcements are made, both with all the objects:

    tid    what it means to a client
    V + 1  their current revisions may end here. No client keeps one for a later time, and for a time between
           the two it asks the server, which knows the real revisions.
    T      the state at T; whoever read one of the objects at V + 1 must read it again

A transaction of our own, at O, takes its place between them:

    V + 1, O - 1   what others committed before it
    O              the transaction, as it is always published
    O + 1, T       what others committed after it. Which of the objects changed before and which after can't
                   be told, so all of them are announced on both sides.

Nothing but O is announced where only our own objects changed, up to O: they were locked by the database, and
a poll came after that. Where it can't be told what changed, clients must start over, the one that commits
included; so they must where something changed at a tid that they were told already, which a database may come
up with that was behind for a while. Pure: news come in, actions go out.
"""

from collections.abc import Iterable, Sequence

from zeoid.commit.actions import Action, Announce, StartOver
from zeoid.model import tid_after, tid_before
from zeoid.ports import News


def announcements(visible: bytes, news: News | None) -> list[Action]:
    """What is to be done about *news* where *visible* is the tid that clients have been told."""
    if news is None:
        return []
    if news.tid <= visible:
        return [] if news.oids is not None and not news.oids else [StartOver(tid_after(visible))]
    if news.oids is None:
        return [StartOver(news.tid)]
    return _steps(visible, news.tid, news.oids)


def around_own(
    visible: bytes, news: News | None, own: bytes, written: Iterable[bytes]
) -> tuple[list[Action], list[Action]]:
    """What is to be done before and after our own transaction is published, which *news* tells of as well.

    *own* is its tid, *written* are its objects.
    """
    if news is None:
        return [], []
    if news.oids is None:
        return [StartOver(tid_before(own))], _steps(own, news.tid, ())
    if news.tid <= own and set(news.oids) <= set(written):
        return [], []
    return _steps(visible, tid_before(own), news.oids), _steps(own, news.tid, news.oids)


def _steps(visible: bytes, tid: bytes, oids: Sequence[bytes]) -> list[Action]:
    return [
        Announce(step, oids) for step in dict.fromkeys((tid_after(visible), tid)) if visible < step <= tid
    ]
