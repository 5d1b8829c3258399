"""Child processes: started in one group, watched through their logs, stopped in order.

Owns the folder, the guard and every child. Must not know what the children are for.
"""

import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

GUARD = Path(__file__).with_name("guard.py")
GUARD_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.05
TAIL_LINES = 15


class DemoError(Exception):
    """Something that the user should read; no traceback is needed to understand it."""


class Process:
    """One child. What it says goes to its log, from which it is also seen to be ready."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, group: int, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=group,
            )

    def wait_for_line(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Return the first match in the log; raise DemoError when the process ends or says nothing."""
        deadline = time.monotonic() + timeout_s
        while True:
            alive = self._child.poll() is None  # asked first: what a dead process wrote is complete
            if match := re.search(pattern, self.log.read_text(errors="replace")):
                return match
            if not alive:
                raise self.ended()
            if time.monotonic() > deadline:
                raise DemoError(f"{self.name} was not ready after {timeout_s:.0f} s.")
            time.sleep(POLL_INTERVAL_S)

    def check_alive(self) -> None:
        if self._child.poll() is not None:
            raise self.ended()

    def ended(self) -> DemoError:
        return DemoError(f"{self.name} ended with exit status {self._child.returncode}.")

    def tail(self) -> str:
        """The end of the log, for somebody who wonders what went wrong."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"{self.name}, the end of its log:", *(f"  | {line}" for line in lines)])

    def terminate(self) -> None:
        self._child.terminate()  # does nothing to a child that has been reaped

    def wait(self) -> int | None:
        """Return the exit status, or None when it had to be killed."""
        try:
            return self._child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(STOP_TIMEOUT_S)
            return None


class Workspace:
    """A temporary folder and the processes that work in it; leaving the context ends and removes both."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.gettempdir()).resolve() / f"zeoid-demo-{secrets.token_hex(4)}"
        self._processes: list[Process] = []
        # A group of its own: Ctrl-C in the terminal is for the demo, which stops the others in order.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", str(GUARD), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        assert self._guard.stdout is not None
        select.select([self._guard.stdout], [], [], GUARD_TIMEOUT_S)
        os.set_blocking(self._guard.stdout.fileno(), False)
        answer = self._guard.stdout.readline()
        if not answer:
            raise DemoError(f"The demo could not make its folder {self.folder}.")
        self._group = int(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # everything from here on has a deadline
        self.stop(self._processes)
        self._guard.communicate(timeout=GUARD_TIMEOUT_S)

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] = os.environ
    ) -> Process:
        """Start a process; its temporary files go to the folder, too."""
        log = self.folder / f"{name.lower().replace(' ', '-')}.log"
        environment = {**environment, "TMPDIR": str(self.folder)}
        process = Process(name, command, log, self._group, environment)
        self._processes.append(process)
        return process

    def check_alive(self) -> None:
        """Raise DemoError when a process has ended."""
        for process in self._processes:
            process.check_alive()

    def tails(self) -> str:
        """The ends of all logs: one process often fails for what another one says."""
        return "\n\n".join(process.tail() for process in self._processes)

    def stop(self, processes: Sequence[Process]) -> list[int | None]:
        """Ask these to end, all at once; return their exit statuses, None for one that had to be killed."""
        for process in processes:
            process.terminate()
        return [process.wait() for process in processes]
