"""One run: starts everybody, kills at random, stops cleanly, and has the outcome checked.

Owns who is killed and when. A server that can't be started again, a process that ends by itself, or does not
end when asked, is a problem like any other; so is a client that does not find its way back to the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.peers import wait_until
from tests.torture import aftermath, checker, journal
from tests.torture.objects import populate
from tests.torture.processes import Client, Server, free_port

WORK_S = 60.0
LOOK_S = 0.05
#: How much a life may differ from the mean one.
SPREAD = 0.8
#: So often the server is killed while it starts, before it listens or soon after.
KILLED_AT_START = 0.2
STARTING_S = 0.6


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to be. The kills are spread over the seconds; if these are over earlier, it goes on."""

    seed: int
    seconds: float
    server_kills: int
    client_kills: int
    clients: int = 8
    threads: int = 3


@dataclass(frozen=True, slots=True)
class Report:
    """What became of it."""

    problems: Sequence[str]
    totals: checker.Totals
    server_kills: int
    client_kills: int
    transport: str
    seconds: float

    def lines(self) -> Iterator[str]:
        kills = f"{self.server_kills} kills of the server, {self.client_kills} of clients"
        yield f"{kills}, {self.transport}, {self.seconds:.0f} s"
        yield ", ".join(
            f"{name.replace('_', ' ')} {count:,}" for name, count in dataclasses.asdict(self.totals).items()
        )
        yield from self.problems
        yield f"{len(self.problems)} problems" if self.problems else "nothing is wrong"


class Torture:
    """See the module."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        # One for each, or the order in which they happen to be killed would change the choices for both.
        self._of_server = random.Random(f"{plan.seed}/server")
        self._of_clients = random.Random(f"{plan.seed}/clients")
        self._problems: list[str] = []
        self.server_kills = self.client_kills = 0
        self.transport = self._of_server.choice(["TCP", "a unix socket"])
        on_tcp = self.transport == "TCP"
        address = f"127.0.0.1:{free_port(self._of_server)}" if on_tcp else str(folder / "socket")
        self._server = Server(folder, address)
        self._clients = [
            Client(folder, number, plan.threads, str(plan.seed), address) for number in range(plan.clients)
        ]

    def run(self) -> Report:
        began_s = time.monotonic()
        populate(self._folder, self._plan.clients, self._plan.threads)
        with contextlib.ExitStack() as ends:
            ends.callback(self._server.end)
            for client in self._clients:
                ends.callback(client.end)
            try:
                self._begin()
                self._rage()
                self._finish()
            except AssertionError as problem:
                self._problems.append(str(problem))
        self._problems += self._server.complaints[: checker.EXAMPLES]
        told = journal.read(sorted(self._folder.glob("client-*.journal")))
        found, unsound = aftermath.read(self._folder)
        wrong = checker.problems(told.transactions, found)
        return Report(
            [*self._problems, *told.violations[: checker.EXAMPLES], *unsound, *wrong],
            checker.totals(told.transactions, found),
            self.server_kills,
            self.client_kills,
            self.transport,
            time.monotonic() - began_s,
        )

    def _begin(self) -> None:
        self._server.start()
        for client in self._clients:
            client.start()
        self._wait_for_commits()

    def _wait_for_commits(self) -> None:
        """Every client must come back to work by itself."""
        waiting = {client: client.written_bytes() for client in self._clients}

        def all_commit() -> bool:
            for client in [client for client, length in waiting.items() if client.commits_after(length)]:
                del waiting[client]
            return not waiting

        try:
            wait_until(all_commit, "", WORK_S)
        except AssertionError:
            numbers = [client.number for client in waiting]
            raise AssertionError(f"no commits of the clients {numbers} within {WORK_S:g} s") from None

    def _rage(self) -> None:
        """Kill, until both the time is over and everybody was killed as often as planned."""
        plan, pause = self._plan, threading.Event()
        end_s = time.monotonic() + plan.seconds
        client_s = time.monotonic() + self._clients_life_s()
        server_s = time.monotonic() + self._servers_life_s()
        while (
            self.server_kills < plan.server_kills
            or self.client_kills < plan.client_kills
            or time.monotonic() < end_s
        ):
            self._look()
            now_s = time.monotonic()
            if now_s >= client_s:
                client = self._of_clients.choice(self._clients)
                client.kill()
                self.client_kills += 1
                client.start()
                client_s = time.monotonic() + self._clients_life_s()
            if now_s >= server_s:
                self._server.kill()
                self.server_kills += 1
                server_s = self._start_server_again()
            pause.wait(max(0.0, min(LOOK_S, client_s - now_s, server_s - now_s)))

    def _start_server_again(self) -> float:
        """When to kill it again."""
        if self._of_server.random() < KILLED_AT_START:
            self._server.launch()
            return time.monotonic() + self._of_server.uniform(0, STARTING_S)
        self._server.start()
        return time.monotonic() + self._servers_life_s()

    def _servers_life_s(self) -> float:
        plan = self._plan
        return plan.seconds / plan.server_kills * self._of_server.uniform(1 - SPREAD, 1 + SPREAD)

    def _clients_life_s(self) -> float:
        """Until the next one of them is killed."""
        plan = self._plan
        return plan.seconds / plan.client_kills * self._of_clients.uniform(1 - SPREAD, 1 + SPREAD)

    def _look(self) -> None:
        """Nobody may end without being killed."""
        written = self._server.died()
        assert written is None, f"the server ended by itself; it wrote:\n{written}"
        for client in self._clients:
            written = client.died()
            assert written is None, f"client {client.number} ended by itself: {written}"

    def _finish(self) -> None:
        """End everything in good order."""
        self._server.kill()  # it may just be starting
        self.server_kills += 1
        self._server.start()
        self._wait_for_commits()
        for client in self._clients:
            client.ask_to_end()
        ends = [client.wait_for_end() for client in self._clients]
        self._problems += [problem for problem in ends if problem]
        self._server.stop()


def run(plan: Plan, folder: Path) -> Report:
    """Torture in this folder, which is empty, and holds all there is to look at afterwards."""
    return Torture(plan, folder).run()
