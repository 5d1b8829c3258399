"""The computers of the guide: zooserver, zoo1 to zoo3, and a stranger.

Owns how the guide's commands are carried out on them. Must not know what comes of it.
"""

from __future__ import annotations

import socket
import subprocess

from demo.processes import DemoError, Process

from tests.network import ssh
from tests.network.guide import Chapter, Command, chapter
from tests.network.house import START_S, House
from tests.peers import wait_until

CONNECT_S = 5.0

ZOPES = ("zoo1", "zoo2", "zoo3")
COMPUTERS = chapter("From nothing to three computers")
OLD_CLIENTS = chapter("Old clients, without TLS")
COMMANDS = ("sshd", "ssh", "scp", "ssh-keygen")
"""What must be installed for it."""


class Zoo(House):
    """A house with everybody's certificates on its computer, by the first chapter, and no storage server.

    With some of the Zopes' computers only, what the guide does for the others is left out.
    """

    def __init__(self, *zopes: str) -> None:
        self._zopes = zopes or ZOPES
        super().__init__("zooserver", *self._zopes, "stranger")

    def _build(self) -> None:
        super()._build()
        ssh.give(self, "zooserver", *self._zopes)
        for name in self._zopes:
            (self.disk(name) / "zope" / "etc").mkdir(parents=True)
        for name in ("zooserver", *self._zopes):
            ssh.serve(self, name)
        left_out = {"revoke", *ZOPES} - {*self._zopes}
        for command in (*COMPUTERS.commands_with("zeoid certs"), *COMPUTERS.commands_with("scp")):
            if not any(word in command.line for word in left_out):
                self.do(command)

    def write(self, guide: Chapter, computer: str, path: str) -> None:
        """Give a computer a file of the guide."""
        (self.disk(computer) / path.removeprefix("/srv/")).write_text(guide.file(computer, path))

    def do(self, command: Command) -> str:
        """Carry out a command that succeeds, and return what it says."""
        done = self.run(command.computer, *command.words)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def stay(self, command: Command) -> Process:
        """Carry out a command that stays; if it is a storage server, wait until it is ready."""
        process = self.start(command.computer, *command.words)
        if command.line.startswith("zeoid serve "):
            self.wait_for(process, "listening on ")
        return process

    def connects(self, computer: str, host: str, port: int) -> bool:
        """Whether somebody listens there, for a program on that computer."""
        with self.here(computer):
            try:
                socket.create_connection((self.addresses.get(host, host), port), CONNECT_S).close()
            except OSError:
                return False
        return True

    def wait_until_connects(self, process: Process, computer: str, host: str, port: int) -> None:
        """Wait until the process, which says nothing of it, has got so far."""

        def connects() -> bool:
            process.check_alive()
            return self.connects(computer, host, port)

        try:
            wait_until(connects, f"{host}:{port} can be reached", START_S)
        except DemoError as problem:
            raise AssertionError(f"{problem}\n{process.tail()}") from None

    def refused(self, computer: str, *command: str) -> str:
        """Carry out a command of Zeoid that has to fail, and return the one line that says why."""
        return refusal(self.run(computer, *command))


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("zeoid: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr
