"""A small process beside a house that leaves nothing of it behind, however the tests end.

When its standard input ends, which also happens when the tests are killed hard, it kills what runs on the
house's computers, removes their namespaces and files, and the house's folder. Imports nothing of the tests.
Must not know what the computers are for.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ETC = Path("/etc/netns")
NAMESPACES = Path("/run/netns")
KILL_TIMEOUT_S = 10.0
KILL_INTERVAL_S = 0.02


def main() -> int:
    prefix, folder = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("here", flush=True)
    sys.stdin.read()
    clear(prefix)
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def clear(prefix: str) -> None:
    """Remove every namespace whose name begins so, with its processes and files."""
    namespaces = [each.name for each in NAMESPACES.glob(f"{prefix}*")]
    for namespace in namespaces:
        kill_all(namespace)
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "del", namespace], check=False)
    for files in ETC.glob(f"{prefix}*"):
        shutil.rmtree(files, ignore_errors=True)
    with contextlib.suppress(OSError):
        ETC.rmdir()  # it stays while somebody else has something there


def kill_all(namespace: str) -> None:
    """Kill what runs there until nothing does: a process may be about to start another one."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (found := processes(namespace)) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(KILL_INTERVAL_S)


def processes(namespace: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", namespace], check=False, capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


if __name__ == "__main__":
    sys.exit(main())
