"""Places and what is told of those who are refused, with a clock that the test moves."""

from __future__ import annotations

import logging

import pytest
from ZODB.POSException import StorageError

from tests.server.inmemory import MemoryHouse
from zeoid import limits
from zeoid.errors import Crowded
from zeoid.server.admission import Places, Told, host_of


@pytest.mark.parametrize(
    ("where", "host"),
    [
        ("192.0.2.7:51234", "192.0.2.7"),
        ("[2001:db8:1:2:3:4:5:6]:51234", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::9]:1", "2001:db8:1:2::/64"),
        ("[::ffff:192.0.2.7]:51234", "192.0.2.7"),
        ("[::1]:7", "[::1]"),
        ("[fe80::1%eth0]:7", "fe80::/64"),
        ("local client", "local client"),
    ],
)
def test_what_counts_as_one_address(where: str, host: str) -> None:
    assert host_of(where) == host


# Places -----------------------------------------------------------------------------------------------


def test_the_oldest_newcomer_of_an_address_goes() -> None:
    places = Places(newcomers=100, newcomers_each=2)
    assert places.come("a", "192.0.2.1:1") is None
    assert places.come("b", "192.0.2.1:2") is None
    assert places.come("other", "192.0.2.2:1") is None
    assert places.come("c", "192.0.2.1:3") == "a"
    places.leave("a")
    assert places.come("d", "192.0.2.1:4") == "b"


def test_the_oldest_newcomer_of_all_goes() -> None:
    places = Places(newcomers=2, newcomers_each=100)
    places.come("a", "192.0.2.1:1")
    places.come("b", "192.0.2.2:1")
    assert places.come("c", "192.0.2.3:1") == "a"


def test_those_that_have_registered_are_no_newcomers() -> None:
    places = Places(newcomers=1, newcomers_each=1)
    for name in "abc":
        assert places.come(name, "192.0.2.1:1") is None
        places.settle(name, "zope")


def test_an_identity_has_so_many_places_whatever_its_addresses() -> None:
    places = Places(each=2)
    for number, name in enumerate("abc"):
        places.come(name, f"192.0.2.{number}:1")
    places.settle("a", "zope")
    places.settle("b", "zope")
    with pytest.raises(Crowded, match="zope has 2 connections, and may have no more"):
        places.settle("c", "zope")
    places.settle("c", "other")
    places.leave("a")
    places.leave("a")
    places.come("d", "192.0.2.9:1")
    places.settle("d", "zope")
    with pytest.raises(StorageError):
        places.settle("e", "zope")


def test_there_are_so_many_places_in_all() -> None:
    places = Places(most=2)
    places.settle("a", "1")
    places.settle("b", "2")
    with pytest.raises(Crowded, match="this server has 2 connections, and takes no more"):
        places.settle("c", "3")
    places.leave("b")
    places.settle("c", "3")


def test_nothing_stays_of_those_who_have_left() -> None:
    places = Places(newcomers=10, newcomers_each=3)
    for number in range(1000):
        gone = places.come(number, f"192.0.{number % 7}.1:1")
        if gone is not None:
            places.leave(gone)
        elif number % 2:
            places.settle(number, f"name {number % 5}")
    for number in range(1000):
        places.leave(number)
    assert not any(value for key, value in vars(places).items() if isinstance(value, dict))


# What is told -----------------------------------------------------------------------------------------


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_an_address_has_so_many_lines_a_minute() -> None:
    clock = Clock()
    told = Told(clock, per_address=3, of_all=100)
    assert [told.may(f"192.0.2.1:{port}") for port in range(5)] == [True, True, True, False, False]
    assert told.may("192.0.2.2:1")
    clock.now_s = 59
    assert told.more() is None
    clock.now_s = 60
    assert told.more() == (2, "192.0.2.1", 2)
    assert told.may("192.0.2.1:9")
    clock.now_s = 120
    assert told.more() is None, "all of them were told"


def test_all_together_have_so_many_lines_a_minute() -> None:
    told = Told(Clock(), per_address=3, of_all=5)
    assert sum(told.may(f"192.0.2.{number % 100}:1") for number in range(300)) == 5


def test_one_connection_does_not_use_up_what_its_address_has() -> None:
    told = Told(Clock(), per_address=30, of_all=100)
    assert sum(told.may("192.0.2.1:1", number) for number in range(1000)) == 20
    assert told.may("192.0.2.1:2")


def test_so_many_addresses_are_told_apart() -> None:
    clock = Clock()
    told = Told(clock, per_address=1, of_all=1, addresses=10)
    for number in range(1000):
        told.may(f"192.0.{number % 250}.{number // 250}:1")
    assert len(told._untold) <= 11
    clock.now_s = 60
    more = told.more()
    assert more is not None
    assert more[:2] == (999, "other addresses")


def test_a_session_that_calls_what_is_not_there_does_not_fill_the_log(
    house: MemoryHouse, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> int:
        return sum("there is no method" in record.getMessage() for record in caplog.records)

    peer = house.peer()
    for calls in (1, 2):
        for _ in range(100):
            with pytest.raises(TypeError):
                peer.ask("nosuch")
        assert lines() == calls * limits.REFUSALS_TOLD_PER_CONNECTION
        house.clock.now_s += limits.REFUSALS_MINUTE_S
        house.admission.tick(house.storages)
    untold = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING][-1]
    assert untold == "80 more refusals were not logged one by one; peer had most of all, 80"
