"""A RelStorage behind a server, with another process that writes to its database: nothing is ever stale."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
from persistent import Persistent
from ZODB.POSException import ConflictError

from tests.engines.relstorages import SECTION
from tests.interop.conftest import Session, marks
from tests.peers import KINDS, Kind, Peers, Server, die_with_parent, environment, wait_until

ROOT = Path(__file__).parents[2]


class Twin(Persistent):
    """Always has the same value as the other one."""

    value = 0


class Writer:
    """The other process."""

    def __init__(self, folder: Path) -> None:
        env = environment()
        env["PYTHONPATH"] += f":{ROOT}"
        self._process = subprocess.Popen(
            [*die_with_parent(), sys.executable, "-m", "tests.interop.relstorage_writer", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def start(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, *command: Any) -> Any:
        self.start(*command)
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(15) == 0
        self._process.stdout.close()


@pytest.fixture(params=[pytest.param(kind, marks=list(marks(kind, "zeoid"))) for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Of the clients."""
    kind: Kind = request.param
    return kind


@pytest.fixture
def server(peers: Peers) -> Server:
    return peers.server("zeoid", section=SECTION)


@pytest.fixture
def session(peers: Peers, kind: Kind, server: Server) -> Session:
    session = Session(peers.database(kind, server.address))
    session.root.update({"key": "ours", "counter": 0, "one": Twin(), "other": Twin()})
    session.commit()
    return session


@pytest.fixture
def writer(server: Server, session: Session) -> Iterator[Writer]:
    writer = Writer(server.folder / "1")
    yield writer
    writer.close()


def wait_for(session: Session, tid: str) -> None:
    storage = session.database.storage
    wait_until(lambda: storage.lastTransaction() >= bytes.fromhex(tid), "the server's poll")


def test_what_another_process_commits_is_seen_whole(session: Session, writer: Writer) -> None:
    assert session.root["key"] == "ours"
    tid = writer.ask("put", {"key": "others'", "counter": 7})
    wait_for(session, tid)
    session.begin()
    assert (session.root["key"], session.root["counter"]) == ("others'", 7)
    session.root["key"] = "ours again"
    session.commit()
    assert writer.ask("get", "key") == "ours again"


def test_a_conflict_with_another_process_is_found(session: Session, writer: Writer) -> None:
    """Though the server was not told of it: it looks when it is to commit."""
    session.begin()
    session.root["counter"] += 1
    writer.ask("add", 1)
    with pytest.raises(ConflictError):
        session.commit()
    session.abort()
    session.begin()
    session.root["counter"] += 1
    session.commit()
    assert writer.ask("get", "counter") == 2


def test_no_change_is_lost_between_two_processes(session: Session, writer: Writer) -> None:
    writer.start("add", 25)
    done = 0
    while done < 25:
        session.begin()
        session.root["counter"] += 1
        try:
            session.commit()
        except ConflictError:
            session.abort()
        else:
            done += 1
    writer.answer()
    assert writer.ask("get", "counter") == 50


def test_every_view_is_one_state_of_the_database(
    peers: Peers, kind: Kind, server: Server, session: Session, writer: Writer
) -> None:
    """While another process and a client write, no reader sees a state that never was, nor goes back."""
    failures: list[Any] = []
    stop = threading.Event()

    def read(reader: Session) -> None:
        newest = 0
        while not stop.is_set():
            reader.begin()
            one, other = reader.root["one"].value, reader.root["other"].value
            if one != other or one < newest:
                failures.append((newest, one, other))
            newest = one
            reader.connection.cacheMinimize()

    readers = [Session(peers.database(kind, server.address)) for _ in range(2)]
    threads = [threading.Thread(target=read, args=(reader,), daemon=True) for reader in readers]
    for thread in threads:
        thread.start()
    for first in range(1, 60, 20):
        writer.start("twins", first, first + 20)
        for number in range(10):
            session.begin()
            session.root["key"] = number  # of another object, so that tids of ours are between theirs
            session.commit()
        tid = writer.answer()
    wait_for(session, tid)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    session.begin()
    assert session.root["one"].value == session.root["other"].value == 60


def test_a_commit_that_was_missed_is_seen_after_the_server_comes_back(
    server: Server, session: Session, writer: Writer
) -> None:
    assert session.root["key"] == "ours"
    server.stop()
    tid = writer.ask("put", {"key": "others'"})
    server.start()
    wait_for(session, tid)
    session.wait_to_see(lambda: session.root["key"] == "others'", "what was missed")


def test_two_servers_on_one_database(peers: Peers, kind: Kind, server: Server, session: Session) -> None:
    """Each is the other's second writer."""
    second = peers.server("zeoid", section=SECTION.replace("{folder}", str(server.folder)))
    other = Session(peers.database(kind, second.address))
    other.root["key"] = "by the second"
    other.commit()
    wait_for(session, other.database.lastTransaction().hex())
    session.begin()
    assert session.root["key"] == "by the second"
    session.root["key"] = "by the first"
    session.commit()
    other.wait_to_see(lambda: other.root["key"] == "by the first", "what the first committed")


def test_history_undo_and_pack(session: Session, writer: Writer) -> None:
    database = session.database
    for value in ("one", "two"):
        session.begin()
        session.root["key"] = value
        session.commit()
    tids = [entry["tid"] for entry in database.history(b"\0" * 8, size=10)]
    assert len(tids) == len(set(tids)) == len(list(database.storage.iterator()))
    assert tids == sorted(tids, reverse=True)
    database.undo(database.undoLog(0, 1)[0]["id"], transaction.get())
    transaction.commit()
    session.begin()
    assert session.root["key"] == "one"
    assert writer.ask("get", "key") == "one"
    database.pack()
    session.begin()
    assert (session.root["key"], session.root["one"].value) == ("one", 0)
    assert len(list(database.storage.iterator())) < len(tids)
