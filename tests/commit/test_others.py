"""What others commit becomes announcements under which no client keeps anything stale, whatever it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.utils import p64, u64

from zeoid.commit.actions import Action, Announce, StartOver
from zeoid.commit.others import announcements, around_own
from zeoid.model import NO_TID
from zeoid.ports import News

A, B, C = p64(1), p64(2), p64(3)


def tid(number: int) -> bytes:
    return bytes(p64(number))


def test_nothing_new_is_nothing_to_announce() -> None:
    assert announcements(tid(5), None) == []
    assert announcements(tid(5), News(tid(5), [])) == []
    assert around_own(tid(5), None, tid(6), [A]) == ([], [])


def test_revisions_end_at_the_first_tid_and_the_state_is_that_of_the_last() -> None:
    assert announcements(tid(5), News(tid(9), [A, B])) == [Announce(tid(6), [A, B]), Announce(tid(9), [A, B])]


def test_a_transaction_that_follows_at_once_is_announced_once() -> None:
    assert announcements(tid(5), News(tid(6), [A])) == [Announce(tid(6), [A])]


def test_what_cant_be_told_makes_clients_start_over() -> None:
    assert announcements(tid(5), News(tid(9), None)) == [StartOver(tid(9))]


@pytest.mark.parametrize("oids", [[A], None])
def test_what_changed_at_a_tid_that_was_told_already_makes_clients_start_over(
    oids: list[bytes] | None,
) -> None:
    """Under a tid of its own: who has seen this one is out of date, too."""
    assert announcements(tid(5), News(tid(4), oids)) == [StartOver(tid(6))]
    assert announcements(tid(5), News(tid(5), oids)) == [StartOver(tid(6))]


def test_our_own_transaction_alone_needs_no_more() -> None:
    assert around_own(tid(5), News(tid(9), [A]), tid(9), [A, B]) == ([], [])


def test_what_others_did_comes_before_our_own_transaction_and_after_it() -> None:
    before, after = around_own(tid(5), News(tid(12), [A, C]), tid(9), [A])
    assert before == [Announce(tid(6), [A, C]), Announce(tid(8), [A, C])]
    assert after == [Announce(tid(10), [A, C]), Announce(tid(12), [A, C])]


def test_our_own_objects_may_have_been_written_again() -> None:
    """The news are beyond our tid, though no other object changed."""
    before, after = around_own(tid(5), News(tid(12), [A]), tid(6), [A])
    assert before == []
    assert after == [Announce(tid(7), [A]), Announce(tid(12), [A])]


def test_clients_start_over_before_our_own_transaction_is_published() -> None:
    before, after = around_own(tid(5), News(tid(9), None), tid(9), [A])
    assert before == [StartOver(tid(8))]
    assert after == []


# Clients that keep what they can --------------------------------------------------------------------------


@dataclass
class Database:
    """The truth: which objects each transaction wrote, in the order of their tids."""

    writes: list[tuple[int, frozenset[bytes]]] = field(default_factory=list)
    polled: int = 0

    def commit(self, gap: int, oids: frozenset[bytes]) -> int:
        self.writes.append((self.last + gap, oids))
        return self.last

    @property
    def last(self) -> int:
        return self.writes[-1][0] if self.writes else 1

    def revision(self, oid: bytes, at: int) -> int:
        """The tid of the newest revision at *at*; 0: it does not exist."""
        return max((when for when, oids in self.writes if oid in oids and when <= at), default=0)

    def end(self, oid: bytes, start: int, at: int) -> int | None:
        return min((when for when, oids in self.writes if oid in oids and start < when <= at), default=None)

    def poll(self) -> News | None:
        new = [(when, oids) for when, oids in self.writes if when > self.polled]
        if not new:
            return None
        self.polled = new[-1][0]
        return News(tid(self.polled), sorted(frozenset().union(*(oids for _, oids in new))))


@dataclass
class Keeper:
    """A client that keeps every revision for as long as it may, and objects from one view to the next."""

    database: Database
    view: int = 1
    revisions: dict[bytes, list[tuple[int, int | None]]] = field(default_factory=dict)
    objects: dict[bytes, int] = field(default_factory=dict)

    def hear(self, number: int, oids: frozenset[bytes], visible: int) -> None:
        """An invalidation. *visible* is what the server answers up to by the time it is asked."""
        assert number > self.view, "the stream of tids only grows"
        for oid in oids:
            self.objects.pop(oid, None)
            kept = self.revisions.get(oid, [])
            self.revisions[oid] = [(start, number if end is None else end) for start, end in kept]
        self.view = number
        self.read_everything(visible)

    def read_everything(self, visible: int) -> None:
        for oid in (A, B, C):
            for at in range(1, self.view + 1):
                assert self._load(oid, at, visible) == self.database.revision(oid, at), (oid, at)
            if oid not in self.objects:
                self.objects[oid] = self._load(oid, self.view, visible)
            assert self.objects[oid] == self.database.revision(oid, self.view), "a stale object"

    def _load(self, oid: bytes, at: int, visible: int) -> int:
        for start, end in self.revisions.setdefault(oid, []):
            if start <= at and (at < end if end is not None else at <= self.view):
                return start
        start = self.database.revision(oid, at)
        end = self.database.end(oid, start, visible)
        if start:
            self.revisions[oid].append((start, end))
        return start


def carry_out(actions: list[Action], heard: list[tuple[int, frozenset[bytes]]]) -> None:
    for action in actions:
        assert isinstance(action, Announce)
        heard.append((u64(action.tid), frozenset(action.oids)))


some_oids = st.frozensets(st.sampled_from([A, B, C]), min_size=1)
commits = st.lists(st.tuples(st.integers(1, 3), some_oids), max_size=3)
own = st.tuples(some_oids, commits, commits, commits, st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(st.lists(commits | own, max_size=6))
def test_no_client_ever_has_anything_stale(story: list[object]) -> None:
    database = Database([(1, frozenset({A, B, C}))], polled=1)
    keeper = Keeper(database)
    keeper.read_everything(1)
    for step in story:
        heard: list[tuple[int, frozenset[bytes]]] = []
        visible = keeper.view
        if isinstance(step, list):
            for gap, oids in step:
                database.commit(gap, oids)
            carry_out(announcements(tid(visible), database.poll()), heard)
        else:
            written, earlier, between, later, gap = step  # type: ignore[misc]
            for each in earlier:
                database.commit(*each)
            carry_out(announcements(tid(visible), database.poll()), heard)  # as at every prepare
            visible = max([visible, *(number for number, _ in heard)])
            for distance, oids in between:
                if not oids & written:  # these are locked
                    database.commit(distance, oids)
            ours = database.commit(gap, written)
            for each in later:
                database.commit(*each)
            before, after = around_own(tid(visible), database.poll(), tid(ours), written)
            carry_out(before, heard)
            heard.append((ours, written))
            carry_out(after, heard)
        for number, oids in heard:
            keeper.hear(number, oids, heard[-1][0])


def test_an_empty_database_can_be_told_of() -> None:
    assert announcements(NO_TID, News(tid(9), [])) == [Announce(tid(1), []), Announce(tid(9), [])]
