"""Where what a client made of a conflict goes among the operations of its transaction."""

from __future__ import annotations

from dataclasses import replace

from ZODB.utils import p64

from tests.commit.desk import CONFLICT, INFO, A, B, C
from zeoid.commit import resolutions
from zeoid.commit.actions import Transaction
from zeoid.model import CheckCurrent, Conflict, Operation, Store, Undo

RESOLVED = Store(A, p64(7), b"resolved")


def resolve(operations: list[Operation], *answered: tuple[Conflict, Store]) -> list[Operation]:
    """The operations after these conflicts, of which the client answered each."""
    transaction = Transaction("us", b"us", INFO, operations=list(operations))
    transaction.conflicts = {conflict.oid: conflict for conflict, _ in answered}
    for _, store in answered:
        resolutions.note(transaction, store)
    assert transaction.conflicts == {}
    resolutions.apply(transaction)
    assert transaction.resolutions == []
    return transaction.operations


def test_it_takes_the_place_of_the_store_of_its_object() -> None:
    others = [CheckCurrent(A, p64(5)), Store(B, p64(5), b"else")]
    before = [others[0], Store(A, p64(5), b"mine"), others[1]]
    assert resolve(before, (CONFLICT, RESOLVED)) == [others[0], RESOLVED, others[1]]


def test_it_takes_the_place_of_the_very_store_that_met_the_conflict() -> None:
    first, second = Store(A, p64(5), b"first"), Store(A, p64(5), b"second")
    conflict = replace(CONFLICT, position=1)
    assert resolve([first, second], (conflict, RESOLVED)) == [first, RESOLVED]


def test_it_follows_the_undo_that_met_the_conflict_and_precedes_what_comes_next() -> None:
    first, second = Undo(b"first"), Undo(b"second")
    conflict = replace(CONFLICT, position=0)
    assert resolve([first, second], (conflict, RESOLVED)) == [first, RESOLVED, second]


def test_several_at_once_do_not_move_each_others_places() -> None:
    undo, store, check = Undo(b"x"), Store(C, p64(5), b"mine"), CheckCurrent(p64(9), p64(5))
    of_b, of_c = Store(B, p64(7), b"resolved"), Store(C, p64(7), b"resolved")
    after = resolve(
        [undo, check, store],
        (replace(CONFLICT, position=0), RESOLVED),
        (replace(CONFLICT, oid=B, position=0), of_b),
        (replace(CONFLICT, oid=C, position=2), of_c),
    )
    assert after[0] == undo
    assert {RESOLVED, of_b} == set(after[1:3])
    assert after[3:] == [check, of_c]


def test_it_is_a_change_of_the_current_revision_whichever_the_client_was_told() -> None:
    conflict = replace(CONFLICT, current=p64(9), position=0)
    assert resolve([Undo(b"x")], (conflict, RESOLVED))[1] == replace(RESOLVED, serial=p64(9))


def test_the_client_does_not_choose_the_serial() -> None:
    store = Store(A, p64(99), b"resolved")
    assert resolve([Store(A, p64(5), b"mine")], (CONFLICT, store)) == [RESOLVED]


def test_without_answers_nothing_changes() -> None:
    operations = [Store(A, p64(5), b"mine"), Undo(b"x")]
    assert resolve(operations) == operations
