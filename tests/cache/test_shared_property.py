"""The shared object cache: whatever its processes do, and however far each has got, what it answers is true.

The server is modelled by all revisions there ever were, and by what it sends to each process: a queue of
invalidations and replies in the order of its stream, which each process hears at its own pace. A process is a
`View` on a `SharedCache`. All of them share one opening of the environment, as LMDB wants that; their
flushers' turns are taken by the test.

EXAMPLES=2000 in the environment makes it long.
"""

from __future__ import annotations

import contextlib
import enum
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.cache.test_memory import OIDS, Database, oids, some_oids, tid
from zeoid import limits
from zeoid.cache import environment
from zeoid.cache.locks import lock, open_file
from zeoid.cache.shared import SharedCache
from zeoid.client.view import View
from zeoid.model import NO_TID

#: Processes at the same time.
MOST = 4
EXAMPLES = int(os.environ.get("EXAMPLES", "150"))
processes = st.integers(0, MOST - 1)
some_processes = st.sets(processes)
#: How far back what is answered is looked at.
BACK = 20
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
sizes = st.sampled_from([0, 40, 1500, 5000])
SMALL, LARGE = 256 * 1024, 1024 * 1024


class Trouble(enum.Enum):
    """What happens now and then."""

    START = enum.auto()
    FORK = enum.auto()
    KILL = enum.auto()
    END = enum.auto()
    LEAVE = enum.auto()
    EMPTY = enum.auto()
    STOPPED_WHILE_HEARING = enum.auto()
    STOPPED_WHILE_FLUSHING = enum.auto()


class Process:
    """One of those that share the cache. It is connected while it has a queue."""

    def __init__(self, cache_dir: str, size_bytes: int, told: bytes = NO_TID) -> None:
        self.cache = SharedCache(cache_dir, "key", size_bytes, told)
        self.view = View(self.cache)
        self.queue: deque[Callable[[], Any]] | None = None
        #: oid, tid and mark of loads that the server has not looked at.
        self.asked: list[tuple[bytes, bytes, int]] = []
        #: Own commits that it was not told of.
        self.unheard: dict[bytes, set[bytes]] = {}
        #: The server's tid when it was registered, until it is verified; and what was known, if it looked.
        self.verifying: int | None = None
        self.known: bytes | None = None

    def send(self, step: Callable[[], Any]) -> None:
        if self.queue is not None:
            self.queue.append(step)


class SharedCacheMachine(RuleBasedStateMachine):
    """See the module."""

    @initialize(size=st.sampled_from([SMALL, LARGE]), count=st.integers(2, 3))
    def begin(self, size: int, count: int) -> None:
        self.size_bytes = size
        self.ends = contextlib.ExitStack()
        for name, value in {
            "SHARED_CACHE_READERS": 64, "SHARED_CACHE_TRIES": 10**6, "SHARED_CACHE_PUT_S": 0.002,
            "SHARED_CACHE_LOCK_S": 0.004, "SHARED_CACHE_LOCK_POLL_S": 0.001,
            "SHARED_CACHE_WAITING_BYTES": 60_000,
        }.items():  # fmt: skip
            self.ends.enter_context(patch.object(limits, name, value))
        self.ends.enter_context(patch.object(SharedCache, "_start_flusher"))
        self.cache_dir = self.ends.enter_context(tempfile.TemporaryDirectory(dir=MEMORY))
        self.database = Database()
        self.commits: list[tuple[int, set[bytes]]] = [(1, set(OIDS))]
        self.processes: list[Process] = []
        self.dead: list[Process] = []
        for _ in range(count):
            self.a_process_starts()
        self.processes_load_everything({0}, {0}, False)

    def process(self, number: int) -> Process:
        return self.processes[number % len(self.processes)]

    # Processes come and go

    @rule(what=st.sampled_from(Trouble), number=processes)
    def there_is_trouble(self, what: Trouble, number: int) -> None:
        """Each kind seldom, or there would be nothing to be troubled."""
        match what:
            case Trouble.START if len(self.processes) < MOST:
                self.a_process_starts()
            case Trouble.FORK if len(self.processes) < MOST:
                self.a_process_forks(number)
            case Trouble.KILL if len(self.processes) > 1:
                self.a_process_is_killed(number)
            case Trouble.END if len(self.processes) > 1:
                self.a_process_ends(number)
            case Trouble.LEAVE:
                self.a_process_leaves_its_environment(number)
            case Trouble.EMPTY:
                self.a_generation_is_emptied(number)
            case Trouble.STOPPED_WHILE_HEARING:
                with self.locked():
                    self.a_process_hears(number, 2)
            case Trouble.STOPPED_WHILE_FLUSHING:
                with self.locked():
                    self.a_flusher_has_its_turn(number)

    def a_process_starts(self) -> None:
        process = Process(self.cache_dir, self.size_bytes)
        self.processes.append(process)
        self.register(process)
        self.verify(process)

    def a_process_forks(self, number: int) -> None:
        parent = self.process(number)
        self.processes.append(Process(self.cache_dir, self.size_bytes))
        child = self.processes[-1]
        child.view.after_fork(lambda told: SharedCache(self.cache_dir, "key", self.size_bytes, told))
        child.view._last = parent.view.last_tid()
        child.view.after_fork(lambda told: SharedCache(self.cache_dir, "key", self.size_bytes, told))
        assert isinstance(child.view.cache, SharedCache)
        child.cache = child.view.cache

    def a_process_is_killed(self, number: int) -> None:
        """It says goodbye to nobody."""
        process = self.process(number)
        self.processes.remove(process)
        self.dead.append(process)

    def a_process_ends(self, number: int) -> None:
        process = self.process(number)
        self.processes.remove(process)
        process.cache.close()

    # Connections

    @rule(number=processes, whole=st.booleans())
    def a_process_connects_again(self, number: int, whole: bool) -> None:
        process = self.process(number)
        process.known = None
        process.asked.clear()
        self.register(process)
        if whole:
            self.verify(process)

    @rule(
        commits=st.lists(some_oids, min_size=1, max_size=3), size=sizes, warm=st.booleans(),
        flushers=some_processes, back=some_processes, too_much=st.booleans(),
    )  # fmt: skip
    def everybody_misses_commits(
        self,
        commits: list[set[bytes]],
        size: int,
        warm: bool,
        flushers: set[int],
        back: set[int],
        too_much: bool,
    ) -> None:
        """Some of them come back."""
        if warm:
            self.processes_load_everything(back, flushers, False)
        for process in self.processes:
            process.queue = process.verifying = process.known = None
            process.asked.clear()
        for written in commits:
            self.somebody_commits(0, written, size, 1, False, set(), set())
        for number in back:
            process = self.process(number)
            self.register(process)
            self.verify(process, too_much)

    def register(self, process: Process) -> None:
        """From now on the server tells it everything."""
        process.queue = deque()
        process.verifying = self.database.last

    @rule(number=processes)
    def a_process_looks_what_it_knows(self, number: int) -> None:
        process = self.process(number)
        if process.verifying is not None and process.known is None:
            process.known = process.view.known()[0]

    @rule(number=processes, too_much=st.booleans())
    def a_process_verifies(self, number: int, too_much: bool) -> None:
        process = self.process(number)
        if process.verifying is not None:
            self.verify(process, too_much)

    def verify(self, process: Process, too_much: bool = False) -> None:
        assert process.verifying is not None
        server, view = process.verifying, process.view
        known = view.known()[0] if process.known is None else process.known
        process.verifying = process.known = None
        if known == NO_TID:
            view.begin(tid(server))
        elif tid(server) < known:
            server = self.database.last  # it asks again
            assert tid(server) >= known
        if tid(server) > known != NO_TID:
            if too_much:
                view.start_over(tid(server))
            else:  # what the server says now
                missed = [written for number, written in self.commits if tid(number) > known]
                view.catch_up(known, tid(self.database.last), set().union(*missed))
        elif view.last_tid() == NO_TID:
            view.begin(tid(server))
        for number, written in process.unheard.items():  # the server is asked what became of them
            process.send(lambda number=number, written=written: view.learned(number, written, None))
        process.unheard.clear()

    # Commits and loads

    @rule(
        author=processes, written=some_oids, size=sizes, step=st.integers(1, 3), resolved=st.booleans(),
        hearers=some_processes, flushers=some_processes,
    )  # fmt: skip
    def somebody_commits(
        self,
        author: int,
        written: set[bytes],
        size: int,
        step: int,
        resolved: bool,
        hearers: set[int],
        flushers: set[int],
    ) -> None:
        number = self.database.commit(written, size, step)
        self.commits.append((number, written))
        data = {oid: None if resolved else self.database.revisions[oid][-1][1] for oid in written}
        process = self.process(author)
        for each in self.processes:
            view = each.view
            if each is process and each.queue is not None and each.verifying is None:
                each.unheard[tid(number)] = written
                mark = view.mark

                def heard(each: Process = each, mark: int = mark) -> None:
                    del each.unheard[tid(number)]
                    each.view.finished(tid(number), data, mark, None)

                each.send(heard)
            else:
                each.send(lambda view=view: view.invalidate(tid(number), written))
        for hearer in hearers:
            self.a_process_hears(hearer, 10**6)
        for flusher in flushers:
            self.a_flusher_has_its_turn(flusher)

    @rule(number=processes, wanted=oids, back=st.integers(0, 4))
    def a_process_asks_the_server(self, number: int, wanted: bytes, back: int) -> None:
        process = self.process(number)
        if process.queue is not None and process.verifying is None:
            last = int.from_bytes(process.view.last_tid(), "big")
            process.asked.append((wanted, tid(max(0, last - back) + 1), process.view.mark))

    @rule(number=processes)
    def the_server_answers(self, number: int) -> None:
        process = self.process(number)
        for oid, before, mark in process.asked:
            reply = self.database.load_before(oid, before)
            process.send(lambda asked=(oid, mark, before), reply=reply: process.view.loaded(asked, reply))
        process.asked.clear()

    @rule(loaders=some_processes, flushers=some_processes, empty=st.booleans())
    def processes_load_everything(self, loaders: set[int], flushers: set[int], empty: bool) -> None:
        for loader in loaders:
            self.a_process_loads_everything(loader)
        for flusher in flushers:
            self.a_flusher_has_its_turn(flusher)
        if empty:
            self.a_generation_is_emptied(0)

    def a_process_loads_everything(self, number: int) -> None:
        """And hears of it, as soon as it has heard what was sent before."""
        process = self.process(number)
        if process.queue is not None and process.verifying is not None:
            self.verify(process)
        for oid in OIDS:
            self.a_process_asks_the_server(number, oid, 0)
        self.the_server_answers(number)
        self.a_process_hears(number, 10**6)

    @rule(number=processes, count=st.sampled_from([1, 2, 10**6]))
    def a_process_hears(self, number: int, count: int) -> None:
        process = self.process(number)
        if process.verifying is None:
            while process.queue and count:
                process.queue.popleft()()
                count -= 1

    # The cache

    @rule(number=processes)
    def a_flusher_has_its_turn(self, number: int) -> None:
        with contextlib.suppress(TimeoutError):
            while self.process(number).cache.flush():
                pass

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Somebody who was stopped has the locks of all environments."""
        with contextlib.ExitStack() as locks:
            for path in environment.environments(environment.Path(self.cache_dir)):
                file = open_file(path / "write")
                locks.callback(os.close, file)
                lock(file, shared=False, timeout_s=0)
            yield

    @rule(number=processes, wanted=oids)
    def a_process_forgets(self, number: int, wanted: bytes) -> None:
        process = self.process(number)
        process.view.forget(wanted)
        assert process.view.lookup(wanted, tid(self.database.last + 1)) is None

    def a_process_leaves_its_environment(self, number: int) -> None:
        cache = self.process(number).cache
        if cache._here is not None:
            cache._leave(cache._here[0], "that is what the test wants")

    def a_generation_is_emptied(self, number: int) -> None:
        here = self.process(number).cache._here
        if here is not None:
            with here[0].writing(1.0) as (txn, state):
                here[0].records.empty_old(txn, state)

    # What is always true

    @invariant()
    def what_it_answers_is_true(self) -> None:
        for process in getattr(self, "processes", ()):
            for oid in OIDS:
                for before in range(max(0, self.database.last - BACK), self.database.last + 4):
                    found = process.view.lookup(oid, tid(before))
                    if found is None:
                        continue
                    right = self.database.load_before(oid, tid(before))
                    assert right is not None
                    assert found[:2] == right[:2], (oid, before)
                    assert found[2] in (None, right[2]), (oid, before)

    @invariant()
    def it_is_told_no_less_than_any_process(self) -> None:
        written = dict(getattr(self, "commits", ()))
        for process in getattr(self, "processes", ()):
            if process.cache._here is not None:
                applied, witness = process.cache.applied()
                assert applied >= process.view.last_tid()
                assert witness is None or witness in written[int.from_bytes(applied, "big")]

    def teardown(self) -> None:
        if not hasattr(self, "processes"):
            return
        for process in self.processes + self.dead:
            process.cache.close()
        assert not environment._all
        assert not environment._joined
        self.ends.close()


SharedCacheMachine.TestCase.settings = settings(
    deadline=None, max_examples=EXAMPLES, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestSharedCacheMachine = SharedCacheMachine.TestCase
