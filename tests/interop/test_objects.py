"""Applications that share objects: they load what others commit, see it change, and run into conflicts."""

from __future__ import annotations

import os

import pytest
from BTrees.Length import Length
from BTrees.OOBTree import OOBTree
from persistent.mapping import PersistentMapping
from ZODB.POSException import ConflictError, ReadConflictError

from tests.interop.conftest import Pair, Session


@pytest.fixture
def sessions(pair: Pair) -> tuple[Session, Session]:
    """Two clients of one server, which see the same root object."""
    server = pair.server()
    first = Session(pair.database(server.address))
    return first, Session(pair.database(server.address))


def test_another_client_loads_what_one_commits(pair: Pair) -> None:
    server = pair.server()
    with pair.database(server.address).transaction() as connection:
        connection.root()["site"] = PersistentMapping({"title": "Home", "tags": ("a", "b")})
    with pair.database(server.address).transaction() as connection:
        site = connection.root()["site"]
        assert dict(site) == {"title": "Home", "tags": ("a", "b")}
        assert site._p_serial == connection.root()._p_serial


def test_a_transaction_of_many_objects(sessions: tuple[Session, Session]) -> None:
    writer, reader = sessions
    writer.root.update({number: PersistentMapping(number=number) for number in range(2_000)})
    writer.commit()
    reader.wait_to_see(lambda: len(reader.root) == 2_000, "2,000 objects")
    assert [reader.root[number]["number"] for number in range(2_000)] == list(range(2_000))


def test_a_large_object(sessions: tuple[Session, Session]) -> None:
    writer, reader = sessions
    content = os.urandom(5_000_000)
    writer.root["file"] = PersistentMapping(content=content)
    writer.commit()
    reader.wait_to_see(lambda: "file" in reader.root, "the object")
    assert reader.root["file"]["content"] == content


def test_others_see_a_change(sessions: tuple[Session, Session]) -> None:
    writer, reader = sessions
    writer.root["counter"] = PersistentMapping(value=0)
    writer.commit()
    reader.wait_to_see(lambda: "counter" in reader.root, "the object")
    for value in range(1, 20):
        writer.root["counter"]["value"] = value
        writer.commit()
        reader.wait_to_see(lambda: reader.root["counter"]["value"] == value, f"value {value}")  # noqa: B023


def test_a_transaction_keeps_the_state_that_it_began_with(sessions: tuple[Session, Session]) -> None:
    writer, reader = sessions
    writer.root.update(first=PersistentMapping(value=0), second=PersistentMapping(value=0))
    writer.commit()
    reader.wait_to_see(lambda: "first" in reader.root, "the objects")
    assert reader.root["first"]["value"] == 0
    writer.root["first"]["value"] = writer.root["second"]["value"] = 1
    writer.commit()
    assert reader.root["second"]["value"] == 0, "loaded after the commit, in a transaction from before it"
    reader.wait_to_see(lambda: reader.root["second"]["value"] == 1, "the change")
    assert reader.root["first"]["value"] == 1


def test_a_counter_gets_both_changes(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    first.root["visits"] = Length(100)
    first.commit()
    second.wait_to_see(lambda: "visits" in second.root, "the counter")
    for _ in range(5):
        first.begin(), second.begin()
        first.root["visits"].change(1)
        second.root["visits"].change(10)
        first.commit()
        second.commit()
    second.begin()
    assert second.root["visits"].value == 155
    first.wait_to_see(lambda: first.root["visits"].value == 155, "what the conflict was resolved to")


def test_a_bucket_gets_both_changes(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    first.root["tree"] = OOBTree({f"key {number:03}": "old" for number in range(100)})
    first.commit()
    second.wait_to_see(lambda: "tree" in second.root, "the tree")
    key, neighbour = list(first.root["tree"]._firstbucket.keys())[:2]
    first.root["tree"][key] = "of first"
    second.root["tree"][neighbour] = "of second"
    first.commit()
    second.commit()
    expected = dict(second.root["tree"], **{key: "of first", neighbour: "of second"})
    for session in sessions:
        session.wait_to_see(lambda: dict(session.root["tree"]) == expected, "both changes")  # noqa: B023


def test_a_conflict_that_nobody_can_resolve(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    first.root["page"] = PersistentMapping(text="old")
    first.commit()
    second.wait_to_see(lambda: "page" in second.root, "the object")
    first.root["page"]["text"] = "of first"
    second.root["page"]["text"] = "of second"
    first.commit()
    with pytest.raises(ConflictError):
        second.commit()
    second.abort()
    second.wait_to_see(lambda: second.root["page"]["text"] == "of first", "what won")
    second.root["page"]["text"] = "again"
    second.commit()
    first.wait_to_see(lambda: first.root["page"]["text"] == "again", "the second attempt")


def test_one_unresolved_conflict_leaves_nothing_of_a_transaction(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    first.root.update(visits=Length(0), page=PersistentMapping(text="old"))
    first.commit()
    second.wait_to_see(lambda: "page" in second.root, "the objects")
    second.root["visits"].change(1)
    second.root["page"]["text"] = "of second"
    first.root["visits"].change(10)
    first.root["page"]["text"] = "of first"
    first.commit()
    with pytest.raises(ConflictError):
        second.commit()
    second.abort()
    second.wait_to_see(lambda: second.root["page"]["text"] == "of first", "what won")
    assert second.root["visits"].value == 10


def test_a_read_that_is_no_longer_current(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    first.root.update(stock=PersistentMapping(left=1), orders=PersistentMapping())
    first.commit()
    second.wait_to_see(lambda: "stock" in second.root, "the objects")
    assert second.root["stock"]["left"] == 1
    second.connection.readCurrent(second.root["stock"])
    second.root["orders"]["number"] = 1
    first.root["stock"]["left"] = 0
    first.commit()
    with pytest.raises(ReadConflictError):
        second.commit()
    second.abort()
