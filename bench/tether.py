"""Run a command that dies with the process that started it: `tether.py PARENT_PID COMMAND ...`.

Owns one system call, made between fork and exec: even when a benchmark is killed with SIGKILL, and so cannot
stop its servers, none is left behind. Must not import anything that costs time: it precedes every server.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"tether: prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the call above could take effect
        sys.exit("tether: the process that started this one is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
