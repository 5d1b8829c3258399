"""A small process beside the demo that leaves nothing behind, however the demo ends.

Owns the demo's temporary folder and its process group: it makes both, and when its standard input ends,
which happens when the demo closes it and also when the demo is killed hard, it kills whatever is still in the
group and removes the folder. Must not know what the processes are, and imports nothing of the demo.

Why not prctl(PR_SET_PDEATHSIG): that ends processes only on Linux, and nobody would remove the folder. A pipe
that the kernel closes works on every Unix, and as every end of the demo takes this one way out, it is in use
each time and not only on a bad day.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

KILL_TIMEOUT_S = 5.0
KILL_INTERVAL_S = 0.02


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(mode=0o700)
    try:
        anchor = make_group()
        print(anchor, flush=True)
        sys.stdin.read()
        kill_group(anchor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def make_group() -> int:
    """Return the id of a process group that exists as long as this process wants it to.

    Its first member only waits: it keeps the number ours, so that no stranger is ever killed by it.
    """
    anchor = os.fork()
    if anchor == 0:
        sys.stdin.read()
        os._exit(0)
    os.setpgid(anchor, anchor)
    return anchor


def kill_group(anchor: int) -> None:
    """Kill every member, and see them gone: only then is the folder no longer written to."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(anchor, signal.SIGKILL)
        os.waitpid(anchor, 0)
        while time.monotonic() < deadline:
            os.killpg(anchor, signal.SIGKILL)
            time.sleep(KILL_INTERVAL_S)


if __name__ == "__main__":
    sys.exit(main())
