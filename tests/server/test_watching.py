"""What is held in all, and who is silent, with connections that only say how much."""

from __future__ import annotations

from typing import Any

from zeoid import limits
from zeoid.server.watching import Watch


class Connection:
    def __init__(self, who: str, held: int = 0, silent_s: float | None = 0.0) -> None:
        self.who = who
        self.held = held
        self.silence_s = silent_s
        self.session = object()
        self.asked = 0
        self.reason = ""

    def held_bytes(self) -> int:
        return self.held

    def silent_s(self) -> float | None:
        self.asked += 1
        return self.silence_s

    def shed(self, reason: str) -> None:
        self.reason = reason


def watch(*connections: Connection, transactions: dict[Connection, int] | None = None) -> Watch:
    of = [(connection.session, size) for connection, size in (transactions or {}).items()]
    who: Any = lambda connection: connection.who  # noqa: E731
    made = Watch(set(connections), who, lambda: of, held_bytes=1000, idle_s=60.0)
    made.tick()
    return made


def dropped(*connections: Connection) -> list[bool]:
    return [bool(connection.reason) for connection in connections]


def test_nobody_goes_while_there_is_room() -> None:
    a, b = Connection("a", 500), Connection("b", 500)
    watch(a, b)
    assert dropped(a, b) == [False, False]


def test_whoever_holds_most_goes_and_not_more_than_has_to() -> None:
    a, b, c = Connection("a", 600), Connection("b", 300), Connection("c", 200)
    watch(a, b, c)
    assert dropped(a, b, c) == [True, False, False]
    assert a.reason == "600 bytes are held for it, and 1,100 for all: more than 1,000"


def test_many_small_ones_of_one_identity_are_more_than_a_large_one() -> None:
    large = Connection("zope", 500)
    small = [Connection("mallory", 30) for _ in range(20)]
    watch(large, *small)
    assert not large.reason
    assert sum(dropped(*small)) == 4


def test_transactions_count() -> None:
    a, b = Connection("a", 400), Connection("b", 300)
    watch(a, b, transactions={b: 350})
    assert dropped(a, b) == [False, True]


def test_a_look_comes_early_when_much_has_come() -> None:
    a = Connection("a")
    looking = watch(a)
    a.held = 2000
    looking.comes(100)
    assert not a.reason
    looking.comes(100)
    assert a.reason


def test_whoever_is_silent_for_long_is_closed() -> None:
    silent, speaking = Connection("a", silent_s=61), Connection("b", silent_s=59)
    unknown = Connection("c", silent_s=None)
    watch(silent, speaking, unknown)
    assert dropped(silent, speaking, unknown) == [True, False, False]
    assert silent.reason == "it has said nothing for 61 s"


def test_few_are_asked_at_a_time_and_all_in_turn() -> None:
    many = [Connection("a") for _ in range(3 * limits.IDLE_ASKED)]
    looking = watch(*many)
    assert sum(each.asked for each in many) == limits.IDLE_ASKED
    looking.tick()
    looking.tick()
    assert all(each.asked == 1 for each in many)
