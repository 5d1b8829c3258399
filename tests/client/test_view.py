"""What a client knows: invalidations, replies and own commits are applied in the order of the stream."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from ZODB.POSException import StorageError

from tests.client.interruptions import interrupt
from tests.client.scenes import OID, OTHER, T1, T2, T3, T4, T5, Held, Listener, Task, at, tid
from zeoid import limits
from zeoid.cache.memory import MemoryCache
from zeoid.client.view import View
from zeoid.model import MAX_TID, NO_TID

OTHERS = [number.to_bytes(8, "big") for number in (100, 101)]


@pytest.fixture
def view() -> View:
    view = View(MemoryCache())
    view.begin(T1)
    view.listener = Listener()
    return view


def heard(view: View) -> list[Any]:
    assert isinstance(view.listener, Listener)
    return view.listener.heard


# Interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "happens",
    [
        lambda view: view.loaded((OID, view.mark, MAX_TID), (b"data", T1, None)),
        lambda view: view.loaded((OID, view.mark - 1, MAX_TID), (b"data", T1, None)),
        lambda view: view.loaded_many(([OID], view.mark - 1, MAX_TID), [(b"data", T1, None)]),
        lambda view: view.invalidate(T3, [OID]),
        lambda view: view.finished(T3, {OID: b"data"}, view.mark - 1, None),
        lambda view: view.learned(T3, [OID], None),
        lambda view: view.catch_up(T1, T3, [OID]),
        lambda view: view.last_tid(),
    ],
    ids=["loaded", "loaded late", "several", "invalidate", "finished", "learned", "catch_up", "last_tid"],
)
def test_whoever_is_interrupted_leaves_no_lock_behind(happens: Callable[[View], Any]) -> None:
    for place in itertools.count(1):
        view = View(MemoryCache())
        view.begin(T1)
        view.invalidate(T2, [OTHER])
        _, where = interrupt(place, lambda view=view: happens(view))  # type: ignore[misc]
        assert Task(view.last_tid).outcome(5.0) >= T2, where
        if not where:
            break
    assert place > 1


# The last tid -----------------------------------------------------------------------------------------


def test_at_first_nothing_is_known() -> None:
    view = View(MemoryCache())
    assert view.last_tid() == NO_TID
    view.begin(T1)
    assert view.last_tid() == T1


def test_an_invalidation_is_told_and_then_shown(view: View) -> None:
    view.invalidate(T2, [OID])
    view.invalidate(T3, [])
    assert heard(view) == [(T2, [OID]), (T3, [])]
    assert view.last_tid() == T3


@pytest.mark.parametrize(
    "late",
    [
        lambda view: view.invalidate(T2, [OID]),
        lambda view: view.finished(T2, {OID: b"data"}, view.mark, None),
        lambda view: view.learned(T2, [OID], None),
        lambda view: view.catch_up(T1, T2, [OID]),
        lambda view: view.start_over(T2),
        lambda view: view.begin(T2),
    ],
    ids=["invalidate", "finished", "learned", "catch_up", "start_over", "begin"],
)
def test_the_last_tid_never_goes_back(view: View, late: Any) -> None:
    """A connection that was given up may still be delivering while the next one is verified."""
    view.invalidate(T4, [OTHER])
    late(view)
    assert view.last_tid() == T4


class Log:
    """A cache and a listener that write down what they are told, and what the last tid was then."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, bytes]] = []
        self.view = View(self)  # type: ignore[arg-type]
        self.view.listener = self.Told(self)
        self.view.begin(T1)
        self.entries.clear()

    def note(self, what: str) -> None:
        self.entries.append((what, self.view.last_tid()))

    class Told(Listener):
        def __init__(self, log: Log) -> None:
            self.log = log

        def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
            self.log.note("database")

        def invalidateCache(self) -> None:
            self.log.note("database")

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        self.note("cache")

    def caught_up(self, since: bytes, tid: bytes, oids: Iterable[bytes]) -> None:
        self.note("cache")

    def started_over(self, tid: bytes) -> None:
        self.note("cache")

    def store(self, *args: Any) -> None:
        self.note("store")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda log: log.view.invalidate(T2, [OID]), ["cache", "database"]),
        (
            lambda log: log.view.finished(T2, {OID: b"data"}, log.view.mark, lambda _: log.note("database")),
            ["cache", "store", "database"],
        ),
        (lambda log: log.view.learned(T2, [OID], lambda _: log.note("database")), ["cache", "database"]),
        (lambda log: log.view.catch_up(T1, T2, [OID]), ["cache", "database"]),
        (lambda log: log.view.start_over(T2), ["cache", "database"]),
    ],
    ids=["invalidate", "finished", "learned", "catch_up", "start_over"],
)
def test_the_cache_first_then_the_database_then_the_tid(change: Any, expected: list[str]) -> None:
    """All of it before the last tid advances; it may be asked for meanwhile, by the thread that applies."""
    log = Log()
    change(log)
    assert log.entries == [(what, T1) for what in expected]
    assert log.view.last_tid() == T2


@pytest.mark.parametrize("how", ["invalidate", "catch_up", "start_over", "finished", "learned"])
def test_nobody_sees_the_tid_before_everybody_was_told(view: View, how: str) -> None:
    held = Held()

    class Slow(Listener):
        def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
            held.stop_here()

        def invalidateCache(self) -> None:
            held.stop_here()

    view.listener = Slow()
    applying = Task(
        {
            "invalidate": lambda: view.invalidate(T2, [OID]),
            "catch_up": lambda: view.catch_up(T1, T2, [OID]),
            "start_over": lambda: view.start_over(T2),
            "finished": lambda: view.finished(T2, {}, view.mark, lambda tid: held.stop_here()),
            "learned": lambda: view.learned(T2, [], lambda tid: held.stop_here()),
        }[how]
    )
    held.wait_for_entry()
    asking = [Task(view.last_tid) for _ in range(3)]
    assert all(task.is_held_up() for task in asking)
    held.let_go()
    applying.result()
    assert [task.result() for task in asking] == [T2, T2, T2]


def test_a_database_that_fails_keeps_the_tid_where_it_was(view: View) -> None:
    """The change is applied again when the connection is made anew."""

    class Failing(Listener):
        def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
            raise RuntimeError("no room")

    view.listener = Failing()
    with pytest.raises(RuntimeError, match="no room"):
        view.invalidate(T2, [OID])
    assert Task(view.last_tid).result() == T1
    view.listener = Listener()
    view.catch_up(T1, T2, [OID])
    assert heard(view) == [(T2, [OID])]


# Loading ----------------------------------------------------------------------------------------------


def test_what_was_loaded_is_kept(view: View) -> None:
    assert view.lookup(OID, at(T1)) is None
    assert view.loaded((OID, view.mark, MAX_TID), (b"data", T1, None)) == (b"data", T1, None)
    assert view.lookup(OID, at(T1)) == (b"data", T1, None)
    assert view.loaded((OTHER, view.mark, MAX_TID), None) is None
    assert view.lookup(OTHER, at(T1)) is None


def test_a_current_revision_answers_only_for_what_was_applied(view: View) -> None:
    view.loaded((OID, view.mark, MAX_TID), (b"data", T1, None))
    assert view.lookup(OID, at(T2)) is None
    view.invalidate(T2, [OTHER])
    assert view.lookup(OID, at(T2)) == (b"data", T1, None)


def test_a_revision_whose_end_came_while_its_reply_was_under_way(view: View) -> None:
    """The invalidation overtook the reply: the revision is history, with the end that was told."""
    mark = view.mark
    view.invalidate(T2, [OTHER])
    view.invalidate(T3, [OID])
    view.invalidate(T4, [OID])
    assert view.loaded((OID, mark, MAX_TID), (b"old", T1, None)) == (b"old", T1, T3)
    assert view.lookup(OID, at(T2)) == (b"old", T1, T3)
    assert view.lookup(OID, at(T3)) is None


def test_a_revision_that_is_the_one_the_invalidation_told_of(view: View) -> None:
    mark = view.mark
    view.invalidate(T2, [OID])
    assert view.loaded((OID, mark, MAX_TID), (b"new", T2, None)) == (b"new", T2, None)
    assert view.lookup(OID, at(T2)) == (b"new", T2, None)


def test_a_revision_and_the_end_that_comes_after_it(view: View) -> None:
    view.loaded((OID, view.mark, MAX_TID), (b"old", T1, None))
    view.invalidate(T2, [OID])
    assert view.lookup(OID, T2) == (b"old", T1, T2)
    assert view.lookup(OID, at(T2)) is None


def test_history_that_was_loaded_is_kept_whatever_happens_meanwhile(view: View) -> None:
    mark = view.mark
    view.invalidate(T4, [OID])
    view.catch_up(T1, T5, [OID])
    assert view.loaded((OID, mark, MAX_TID), (b"old", T1, T2)) == (b"old", T1, T2)
    assert view.lookup(OID, T2) == (b"old", T1, T2)


def test_more_invalidations_than_are_remembered_while_a_reply_was_under_way(view: View) -> None:
    """Whether one of them ended the revision can't be known: it is not kept as current."""
    mark = view.mark
    numbers = itertools.count(1000)
    view.invalidate(tid(next(numbers)), [OID])
    for _ in range(limits.RECENT_INVALIDATIONS):
        view.invalidate(tid(next(numbers)), [OTHER])
    assert view.loaded((OID, mark, MAX_TID), (b"old", T1, None)) == (b"old", T1, None)
    assert view.lookup(OID, at(view.last_tid())) is None


def test_of_several_revisions_each_gets_the_end_that_came_while_they_were_under_way(view: View) -> None:
    mark = view.mark
    view.invalidate(T2, [OTHER])
    view.invalidate(T3, [OID])
    asked = [OID, OTHER, OTHERS[0], OTHERS[1]], mark, at(T1)
    history = (b"past", T1, T2)
    assert view.loaded_many(asked, [(b"a", T1, None), (b"b", T2, None), (b"c", T1, None), history]) == 4
    assert view.lookup(OID, at(T1)) == (b"a", T1, T3)
    assert view.lookup(OTHER, at(T3)) == (b"b", T2, None)
    assert view.lookup(OTHERS[0], at(T3)) == (b"c", T1, None)
    assert view.lookup(OTHERS[1], T2) == history


def test_of_several_revisions_none_is_kept_as_current_if_too_much_came_meanwhile(view: View) -> None:
    mark = view.mark
    for number in range(limits.RECENT_INVALIDATIONS + 1):
        view.invalidate(tid(1000 + number), [OTHER])
    asked = [OID, OTHER], mark, at(T1)
    assert view.loaded_many(asked, [(b"a", T1, None), (b"b", T1, T2)]) == 2
    assert view.lookup(OID, at(view.last_tid())) is None
    assert view.lookup(OID, at(T1)) is None
    assert view.lookup(OTHER, T2) == (b"b", T1, T2)


def test_exactly_as_many_as_are_remembered(view: View) -> None:
    mark = view.mark
    numbers = itertools.count(1000)
    for _ in range(limits.RECENT_INVALIDATIONS):
        view.invalidate(tid(next(numbers)), [OTHER])
    view.loaded((OID, mark, MAX_TID), (b"data", T1, None))
    assert view.lookup(OID, at(view.last_tid())) == (b"data", T1, None)


@pytest.mark.parametrize("how", ["catch_up", "start_over", "after_fork"])
def test_a_reply_from_before_a_reconnection_is_not_kept_as_current(view: View, how: str) -> None:
    mark = view.mark
    if how == "catch_up":
        view.catch_up(T1, T2, [OTHER])
    elif how == "start_over":
        view.start_over(T2)
    else:
        view.after_fork(lambda told: MemoryCache())
    assert view.loaded((OID, mark, MAX_TID), (b"data", T1, None)) == (b"data", T1, None)
    assert view.lookup(OID, at(view.last_tid())) is None


@pytest.mark.parametrize(
    "reply",
    [
        5, b"data", (), (b"data",), (b"data", T1), (b"data", T1, None, None), ("data", T1, None),
        (None, T1, None), (b"data", 7, None), (b"data", b"short", None), (b"data", None, None),
        (b"data", T1, 7), (b"data", T1, b"short"), (b"data", T2, T1), (b"data", T1, T1), {},
    ],
    ids=repr,
)  # fmt: skip
def test_a_reply_that_is_no_revision(view: View, reply: Any) -> None:
    """It is a StorageError for the caller, and nothing is kept of it."""
    with pytest.raises(StorageError, match="no revision"):
        view.loaded((OID, view.mark, MAX_TID), reply)
    assert view.lookup(OID, at(T1)) is None
    assert len(view.cache) == 0  # type: ignore[arg-type]


# Own commits ------------------------------------------------------------------------------------------


def test_an_own_commit_is_kept(view: View) -> None:
    told: list[bytes] = []
    view.loaded((OID, view.mark, MAX_TID), (b"old", T1, None))
    view.finished(T2, {OID: b"new"}, view.mark, told.append)
    assert told == [T2]
    assert heard(view) == [], "the database knows what it committed itself"
    assert view.lookup(OID, T2) == (b"old", T1, T2)
    assert view.lookup(OID, at(T2)) == (b"new", T2, None)


def test_what_the_server_knows_better_is_loaded_from_it(view: View) -> None:
    """Data that was resolved, undone or restored is not what this client sent."""
    view.loaded((OID, view.mark, MAX_TID), (b"old", T1, None))
    view.finished(T2, {OID: None}, view.mark, None)
    assert view.lookup(OID, at(T2)) is None


def test_an_own_commit_and_then_that_of_another(view: View) -> None:
    mark = view.mark
    view.finished(T2, {OID: b"mine"}, mark, None)
    view.invalidate(T3, [OID])
    assert view.lookup(OID, T3) == (b"mine", T2, T3)
    assert view.lookup(OID, at(T3)) is None
    assert view.last_tid() == T3


def test_the_commit_of_another_and_then_an_earlier_own_one(view: View) -> None:
    """The word of the own commit came late: what was current before it ended with it, and not later."""
    view.loaded((OID, view.mark, MAX_TID), (b"old", T1, None))
    mark = view.mark
    view.invalidate(T3, [OID])
    view.finished(T2, {OID: b"mine"}, mark, None)
    assert view.lookup(OID, T2) == (b"old", T1, T2)
    assert view.lookup(OID, T3) == (b"mine", T2, T3)
    assert view.lookup(OID, at(T3)) is None
    assert view.last_tid() == T3


def test_more_invalidations_than_are_remembered_while_a_commit_was_under_way(view: View) -> None:
    mark = view.mark
    numbers = itertools.count(1000)
    for _ in range(limits.RECENT_INVALIDATIONS + 1):
        view.invalidate(tid(next(numbers)), [OTHER])
    last = tid(next(numbers))
    view.finished(last, {OID: b"mine"}, mark, None)
    assert view.lookup(OID, at(last)) is None


def test_an_own_commit_that_a_later_connection_told_of(view: View) -> None:
    """What was current may have ended with it or before: that is forgotten. What had ended stays."""
    told: list[bytes] = []
    view.loaded((OID, view.mark, MAX_TID), (b"oldest", tid(1), T1))
    view.loaded((OID, view.mark, MAX_TID), (b"old", T1, None))
    view.loaded((OTHER, view.mark, MAX_TID), (b"other", T1, None))
    view.learned(T2, [OID], told.append)
    assert told == [T2]
    assert heard(view) == [], "the database is told by the callback"
    assert view.last_tid() == T2
    assert view.lookup(OID, T1) == (b"oldest", tid(1), T1)
    assert view.lookup(OID, T2) is None
    assert view.lookup(OID, at(T2)) is None
    assert view.lookup(OTHER, at(T2)) == (b"other", T1, None)


def test_a_commit_of_another_that_is_newer_than_the_own_one_learned_late(view: View) -> None:
    """No revision gets an end from it: that the other one was between is not known here."""
    view.catch_up(T1, T3, [OID])
    view.loaded((OID, view.mark, MAX_TID), (b"theirs", T3, None))
    view.learned(T2, [OID], None)
    assert view.last_tid() == T3
    for before in (T2, at(T2), T3):
        assert view.lookup(OID, before) is None
    view.loaded((OID, view.mark, MAX_TID), (b"theirs", T3, None))
    assert view.lookup(OID, at(T3)) == (b"theirs", T3, None)


def test_a_reply_that_was_under_way_when_an_own_commit_was_learned(view: View) -> None:
    mark = view.mark
    view.learned(T2, [OID], None)
    assert view.loaded((OID, mark, MAX_TID), (b"old", T1, None)) == (b"old", T1, T2)
    assert view.loaded((OID, mark, MAX_TID), (b"mine", T2, None)) == (b"mine", T2, None)
    assert view.lookup(OID, at(T2)) == (b"mine", T2, None)


# Verification -----------------------------------------------------------------------------------------


def test_catching_up_forgets_what_was_written_and_nothing_else(view: View) -> None:
    """The transactions that wrote are not told one by one: no end may be made up for what is forgotten."""
    view.loaded((OID, view.mark, MAX_TID), (b"a", T1, None))
    view.loaded((OTHER, view.mark, MAX_TID), (b"b", T1, None))
    view.catch_up(T1, T3, [OID])
    assert heard(view) == [(T3, [OID])]
    for before in (T2, at(T2), T3, at(T3)):
        assert view.lookup(OID, before) is None
    assert view.lookup(OTHER, at(T3)) == (b"b", T1, None)


def test_starting_over_keeps_history_only(view: View) -> None:
    view.loaded((OID, view.mark, MAX_TID), (b"old", tid(1), T1))
    view.loaded((OID, view.mark, MAX_TID), (b"a", T1, None))
    view.loaded((OTHER, view.mark, MAX_TID), (b"b", T1, None))
    view.start_over(T3)
    assert heard(view) == ["everything"]
    assert view.lookup(OID, T1) == (b"old", tid(1), T1)
    for oid in (OID, OTHER):
        assert view.lookup(oid, at(T1)) is None
        assert view.lookup(oid, at(T3)) is None


def test_without_a_database_the_cache_is_told_all_the_same(view: View) -> None:
    view.listener = None
    view.loaded((OID, view.mark, MAX_TID), (b"a", T1, None))
    view.invalidate(T2, [OID])
    assert view.lookup(OID, at(T2)) is None
    view.catch_up(T1, T3, [OID])
    view.start_over(T4)
    assert view.last_tid() == T4


def test_after_a_fork_a_lock_that_another_thread_held_is_no_obstacle(view: View) -> None:
    view.loaded((OID, view.mark, MAX_TID), (b"a", T1, None))
    held = Held()

    class Slow(Listener):
        def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
            held.stop_here()

    view.listener = Slow()
    applying = Task(view.invalidate, T2, [OID])
    held.wait_for_entry()
    view.after_fork(lambda told: MemoryCache())
    assert Task(view.last_tid).result() == T1
    assert view.lookup(OID, at(T1)) is None
    held.let_go()
    applying.outcome()


def test_many_threads_and_one_history(view: View) -> None:
    """What readers see of an object never gets older than the last tid that they saw before."""
    newest = threading.Event()
    last = 400

    def read() -> int:
        seen = 0
        while not newest.is_set():
            shown = view.last_tid()
            found = view.lookup(OID, at(shown))
            if found is not None:
                assert found[1] == shown
                seen += 1
        return seen

    readers = [Task(read) for _ in range(3)]
    try:
        for number in range(1, last):
            view.invalidate(tid(10 + 10 * number), [OID])
            view.loaded((OID, view.mark, MAX_TID), (b"%d" % number, tid(10 + 10 * number), None))
    finally:
        newest.set()
    assert all(isinstance(task.result(), int) for task in readers)
