"""Server processes: started, waited for, accounted for and stopped.

Owns everything that is asked of the operating system about a process. Must not know which server it is.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PROJECT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
STOP_ATTEMPTS = 4
POLL_INTERVAL_S = 0.01


class PeerError(Exception):
    """A peer did not do what it was asked to: the figures of this round would be worthless."""


def tethered(command: list[str]) -> list[str]:
    """`command`, changed so that it cannot outlive this process."""
    tether = str(PROJECT / "bench" / "tether.py")
    return [sys.executable, "-I", "-S", tether, str(os.getpid()), *command]


class ServerProcess:
    """A server that runs in a process of its own, on the CPUs of its parent, from here until `stop`."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                tethered(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=PROJECT
            )
        self.pid = self._process.pid

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match in what the server prints, within START_TIMEOUT_S."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None  # asked first: what it printed last is then in the log
            if match := re.search(pattern, self._log.read_text(errors="replace")):
                return match
            if ended:
                raise self._error(f"ended with status {self._process.returncode} before it was ready")
            time.sleep(POLL_INTERVAL_S)
        raise self._error(f"was not ready after {START_TIMEOUT_S:.0f} s")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that is not heeded; the process is gone when this returns or raises.

        ZEO's server takes the SystemExit of its signal handler for the failure of whatever connection it is
        serving when the signal comes, such as one that was just closed, and stays: so it is asked again.
        """
        died = self._process.poll()
        try:
            status = self._ask_to_stop()
        finally:
            self._process.kill()
            self._process.wait()
        if died is not None or status not in (0, -signal.SIGTERM):
            raise self._error(f"ended with status {status}{'' if died is None else ' before it was stopped'}")

    def _ask_to_stop(self) -> int:
        for _ in range(STOP_ATTEMPTS):
            self._process.terminate()
            try:
                return self._process.wait(STOP_TIMEOUT_S / STOP_ATTEMPTS)
            except subprocess.TimeoutExpired:
                continue
        raise self._error(f"did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM")

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _error(self, what: str) -> PeerError:
        return PeerError(f"the server {what}: {' '.join(self._command)}\n{self.log_tail()}")


class Stopwatch:
    """Measures its `with` block: time on the wall, and CPU time of this process and of the server's.

    CPU time is user and system time of all threads, also those that have ended, in nanoseconds. (The fields
    utime and stime of /proc/PID/stat hold the same sum in hundredths of a second: too coarse here.)
    """

    wall_s: float
    client_cpu_s: float
    server_cpu_s: float | None = None

    def __init__(self, server_pid: int | None) -> None:
        self._server_pid = server_pid

    def __enter__(self) -> Self:
        if self._server_pid is not None:
            self._server_began = cpu_s(self._server_pid)
        self._client_began = time.process_time()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall_s = time.perf_counter() - self._began
        self.client_cpu_s = time.process_time() - self._client_began
        if self._server_pid is not None and error is None:
            self.server_cpu_s = cpu_s(self._server_pid) - self._server_began

    def figures(self, count: int) -> dict[str, float]:
        """Microseconds for each of `count` operations, and operations a second.

        `waiting_us` is the time in which neither of the two was running: they waited for the disk or a timer,
        or somebody else had the CPU. It means something only when both are pinned to the same CPU.
        """
        server_cpu_s = self.server_cpu_s or 0.0
        figures = {
            "us": self.wall_s / count * 1e6,
            "rate": count / self.wall_s,
            "client_cpu_us": self.client_cpu_s / count * 1e6,
            "waiting_us": (self.wall_s - self.client_cpu_s - server_cpu_s) / count * 1e6,
        }
        if self.server_cpu_s is not None:
            figures["server_cpu_us"] = server_cpu_s / count * 1e6
        return figures


def cpu_s(pid: int) -> float:
    """CPU time that a process has used, by its own clock: what clock_getcpuclockid(3) names."""
    return time.clock_gettime(~pid << 3 | 2)


def own_cpu_s() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def busy_cpu_s(cpus: list[int]) -> float:
    """Time that these CPUs have spent on anybody, or that the host took away: all but idle and iowait."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in {f"cpu{cpu}" for cpu in cpus}:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a process ever had resident: VmHWM."""
    return _status_bytes(pid, "VmHWM")


def rss_bytes(pid: int) -> int:
    return _status_bytes(pid, "VmRSS")


def _status_bytes(pid: int, field: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise PeerError(f"/proc/{pid}/status has no {field}: is the process gone?")
    return int(match[1]) * 1024


def listening_port(pid: int) -> int:
    """The port of the only TCP socket on 127.0.0.1 that a process listens on."""
    sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    ports = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, _, _, _, _, _, inode = line.split()[:10]
        if state == "0A" and local.startswith("0100007F:") and f"socket:[{inode}]" in sockets:
            ports.append(int(local.partition(":")[2], 16))
    if len(ports) != 1:
        raise PeerError(f"process {pid} listens on {len(ports)} ports of 127.0.0.1, not on one")
    return ports[0]


def usable_cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def pin(cpus: list[int]) -> None:
    """This thread, and every thread and process that it starts from now on, runs on these CPUs only."""
    os.sched_setaffinity(0, cpus)
