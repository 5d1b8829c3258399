"""Clients and a server without sockets, threads or time: what a test says happens, and nothing else does.

A `MemoryHouse` has storages, a clock that the test moves and threads that the test runs. A `Peer` is a client
at the other end of a session: it keeps what the server wrote, in order. Must not know what the tests expect.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ReadConflictError

from zeoid.engines.opening import open_memory
from zeoid.engines.storage import StorageEngine
from zeoid.model import MAX_TID, NO_TID, CheckCurrent, Conflict, Operation, Store, TransactionInfo
from zeoid.ports import Commit, Engine, Prepared
from zeoid.security import identity
from zeoid.security.roles import Policy
from zeoid.server.admission import Admission
from zeoid.server.clients import Done
from zeoid.server.hosted import Hosted
from zeoid.server.methods import ANSWERED_LATER
from zeoid.server.session import Session
from zeoid.server.streams import Streams
from zeoid.wire import faults
from zeoid.wire.codec import FAULT
from zeoid.wire.connection import ClientConnection

NOON = 1_700_000_000.0


class FakeClock:
    """Time as the test wants it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def time(self) -> float:
        return NOON + self.now_s

    def monotonic(self) -> float:
        return self.now_s


class Threads:
    """Work that would be done in a thread: begun and landed when the test says so."""

    def __init__(self) -> None:
        self._begun: deque[Done] = deque()
        self._results: deque[tuple[Any, BaseException | None]] = deque()
        self._waiting: deque[tuple[Callable[[], Any], Done]] = deque()

    def submit(self, work: Callable[[], Any], done: Done) -> None:
        self._waiting.append((work, done))

    def work(self) -> None:
        """Do the next work; what is to happen on the loop afterwards does not happen yet."""
        work, done = self._waiting.popleft()
        try:
            self._results.append((work(), None))
        except Exception as problem:
            self._results.append((None, problem))
        self._begun.append(done)

    def land(self) -> None:
        """Hand the oldest result to whom it is for."""
        self._begun.popleft()(*self._results.popleft())

    def run(self) -> None:
        """Do the next work, and hand over its result."""
        self.work()
        self.land()

    def run_all(self) -> None:
        """Do all work, also what follows from it, and hand over the results."""
        while self._waiting or self._begun:
            if self._waiting:
                self.work()
            self.land()

    def __len__(self) -> int:
        return len(self._waiting)


class ParallelEngine(StorageEngine):
    """In memory, and prepares any number of transactions at once, as the engine for data files does."""

    exclusive = False

    def __init__(self) -> None:
        super().__init__(MappingStorage("parallel"))
        #: The tids of each batch that was committed.
        self.batches: list[list[bytes]] = []
        self.abandoned = 0
        #: Raised by the method of this name.
        self.failing = ""
        #: What went wrong in the background.
        self.problem = ""

    @property
    def failure(self) -> str:
        return self.problem

    def _check(self, where: str) -> None:
        if self.failing == where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def prepare(self, tid: bytes | None, info: TransactionInfo, operations: Iterable[Operation]) -> Prepared:
        assert tid is None, "tids are given at the commit"
        self._check("prepare")
        gathered = list(operations)
        conflicts = [
            Conflict(store.oid, newest, store.serial, store.data)
            for store in gathered
            if isinstance(store, Store) and (newest := self.newest_tid(store.oid)) not in (None, store.serial)
        ]
        if conflicts:
            return Prepared(conflicts)
        for check in gathered:
            if isinstance(check, CheckCurrent) and (newest := self.current_tid(check.oid)) != check.serial:
                raise ReadConflictError(oid=check.oid, serials=(newest, check.serial))
        return _Kept(info, gathered)

    def commit(self, batch: Sequence[Commit]) -> None:
        self._check("commit")
        self.batches.append([one.tid for one in batch])
        for one in batch:
            assert isinstance(one.prepared, _Kept)
            kept = super().prepare(one.tid, one.prepared.info, one.prepared.operations)
            super().commit([Commit(one.tid, one.id, kept)])

    def abandon(self, prepared: Prepared) -> None:
        self._check("abandon")
        self.abandoned += 1


class _Kept(Prepared):
    """What a transaction is going to do."""

    __slots__ = ("info", "operations")

    def __init__(self, info: TransactionInfo, operations: Sequence[Operation]) -> None:
        self.info = info
        self.operations = operations
        oids = [operation.oid for operation in operations if isinstance(operation, Store)]
        super().__init__((), oids)


class MemoryWire:
    """Where a session writes: keeps it until the peer reads."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        #: What is to be called when the loop has looked at its other connections.
        self.callbacks: list[Callable[[], None]] = []
        self.closed = False
        #: Whether nothing is read of what the peer sends.
        self.stopped = False
        #: Raised by the next write, as by a connection that has just broken.
        self.problem: Exception | None = None
        #: Called by the next write: a connection may break at that moment.
        self.on_write: Callable[[], None] | None = None

    def write(self, data: bytes) -> None:
        assert not self.closed, "nothing is written to a connection that is closed"
        if self.problem is not None:
            raise self.problem
        self.writes.append(data)
        if self.on_write is not None:
            on_write, self.on_write = self.on_write, None
            on_write()

    def close(self) -> None:
        self.closed = True

    def stop_reading(self) -> None:
        self.stopped = True

    def read_on(self) -> None:
        self.stopped = False

    def soon(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def turn(self) -> None:
        """The loop has looked at its other connections."""
        self.callbacks.pop(0)()

    def take(self) -> bytes:
        data = b"".join(self.writes)
        self.writes.clear()
        return data


class MemoryHouse:
    """A server without a network."""

    def __init__(
        self, engines: Mapping[str, Engine] | None = None, *, policy: Policy | None = None, **options: Any
    ) -> None:
        self.clock = FakeClock()
        self.admission = Admission(policy or Policy(), self.clock.monotonic)
        self.slow = Threads()
        #: Where batches are made durable, and where what may take its time is done meanwhile.
        self.commit = Threads()
        self.beside = Threads()
        self.packs = Threads()
        #: Where files of blobs are written and read.
        self.blobs = Threads()
        #: Blob connections have sockets, and there are none here; but tokens can be had.
        self.streams = Streams(lambda run: None, self.clock)
        self.fatal: list[str] = []
        self.peers: list[Peer] = []
        self.engines = dict(engines or {"1": open_memory()})
        self.storages = {
            name: Hosted(
                name, engine, self.clock, self.commit.submit, self.beside.submit, self.is_alone,
                self.fatal.append,
                run_reading=(self.slow if engine.inline else self.beside).submit,
                run_with_blobs=self.blobs.submit, **options,
            )
            for name, engine in self.engines.items()
        }  # fmt: skip

    def is_alone(self) -> bool:
        return sum(len(hosted.clients) for hosted in self.storages.values()) <= 1

    def pack(self, hosted: Hosted, time: float, done: Callable[[BaseException | None], None]) -> None:
        progress = hosted.pack_begins(time)

        def landed(_: Any, problem: BaseException | None) -> None:
            hosted.pack_ended(problem)
            done(problem)

        self.packs.submit(lambda: hosted.packs.run(progress), landed)

    def work(self) -> None:
        """Have the threads do what votes and finishes wait for."""
        while len(self.beside) or len(self.commit):
            self.beside.run_all()
            self.commit.run_all()

    def later(self, seconds: float) -> None:
        self.clock.now_s += seconds
        for hosted in self.storages.values():
            hosted.tick()

    @property
    def hosted(self) -> Hosted:
        return self.storages["1"]

    def peer(self, **options: Any) -> Peer:
        """A client that is registered."""
        return Peer(self, **options).register()

    def close(self) -> None:
        """Once it is closed, and its engines are, closing it again does nothing."""
        for peer in self.peers:
            peer.disconnect()
        while self.engines:
            self.engines.popitem()[1].close()


@dataclass(eq=False)
class Call:
    """A call and its answer, once it is there."""

    name: str
    args: tuple[Any, ...] = ()
    answered: bool = False
    value: Any = None
    problem: Exception | None = None

    @property
    def result(self) -> Any:
        assert self.answered, f"{self.name} has no answer yet"
        if self.problem is not None:
            raise self.problem
        return self.value


@dataclass(frozen=True)
class Event:
    """What the server said: the answer to a call with these args, or a one-way call of its own."""

    kind: str
    name: str
    value: Any = None
    args: tuple[Any, ...] = ()


class Peer:
    """A client of the server in memory."""

    def __init__(
        self, house: MemoryHouse, *, name: str = "peer", coding: str = "M5", offer: str = "Z5",
        at: identity.Peer | None = None,
    ) -> None:
        self.house = house
        house.peers.append(self)
        self.wire = MemoryWire()
        self.connection = ClientConnection(coding)
        self.events: list[Event] = []
        self.session = Session(house, self.wire, at or identity.Peer(name), offer=offer)
        self.read()
        self.send(self.connection.take_answer())

    # What it says ---------------------------------------------------------------------------------

    def register(self, storage: str = "1", read_only: bool = False) -> Peer:
        self.ask("register", storage, read_only)
        return self

    def send(self, data: bytes) -> None:
        self.session.receive(data)

    def start(self, name: str, *args: Any) -> Call:
        """Call the server; the answer may come later."""
        call = Call(name, args)
        self.send(self.connection.call(call, name, args))
        self.read()
        return call

    def ask(self, name: str, *args: Any) -> Any:
        """Call the server and return its answer, which comes at once or after what a commit waits for."""
        return self._settled(self.start(name, *args)).result

    def _settled(self, call: Call) -> Call:
        if not call.answered and call.name in ANSWERED_LATER:
            self.house.work()
            self.read()
        return call

    def one_way(self, name: str, *args: Any) -> None:
        self.send(self.connection.one_way(name, args))

    def calls(self, *named: tuple[Any, ...]) -> list[Call]:
        """Several calls in one segment."""
        calls = [Call(name, tuple(args)) for name, *args in named]
        self.send(b"".join(self.connection.call(call, call.name, call.args) for call in calls))
        self.read()
        return calls

    # What it hears --------------------------------------------------------------------------------

    def read(self) -> list[Event]:
        """What the server has written since the last time."""
        new = [
            self._event(slot, flag, name, args)
            for slot, flag, name, args in self.connection.receive(self.wire.take())
        ]
        self.events += new
        return new

    @staticmethod
    def _event(call: Call | None, flag: int, name: str, args: Any) -> Event:
        if call is None:
            return Event("call", name, args)
        assert not call.answered, f"{call.name} was answered twice"
        call.answered = True
        if flag == FAULT:
            call.problem = faults.rebuild(args)
            return Event("error", call.name, call.problem, call.args)
        call.value = args
        return Event("reply", call.name, args, call.args)

    def told(self) -> list[tuple[bytes, tuple[bytes, ...]]]:
        """All invalidations so far: (tid, oids)."""
        self.read()
        return [
            (event.value[0], tuple(event.value[1]))
            for event in self.events
            if event.name == "invalidateTransaction"
        ]

    # Transactions ---------------------------------------------------------------------------------

    def begin(self, id: Any = 1, *, tid: bytes | None = None) -> None:
        self.one_way("tpc_begin", id, b"user", b"description", {}, tid, " ")

    def store(self, oid: bytes, data: bytes = b"data", *, serial: bytes | None = None, id: Any = 1) -> None:
        """Write *oid*, by default as the successor of what is current."""
        self.one_way("storea", oid, self.serial(oid) if serial is None else serial, data, id)

    def serial(self, oid: bytes) -> bytes:
        try:
            revision = self.session.hosted.engine.load_before(oid, MAX_TID)
        except KeyError:
            return NO_TID
        return NO_TID if revision is None else revision[1]

    def prepare(self, *oids: bytes, data: bytes = b"data", id: Any = 1) -> Call:
        """Begin, store and vote."""
        self.begin(id)
        for oid in oids:
            self.store(oid, data, id=id)
        return self.start("vote", id)

    def commit(self, *oids: bytes, data: bytes = b"data", id: Any = 1) -> bytes:
        assert not self._settled(self.prepare(*oids, data=data, id=id)).result
        tid: bytes = self.ask("tpc_finish", id)
        return tid

    # The end --------------------------------------------------------------------------------------

    @property
    def dropped(self) -> bool:
        """The server has closed the connection."""
        return self.wire.closed

    def disconnect(self) -> None:
        self.session.lost("")


def in_order(events: list[Event]) -> Iterator[str]:
    """Events as words, without the sizes that servers tell now and then."""
    for event in events:
        if event.name != "info":
            yield f"{event.kind} {event.name}"
