"""Starts the worker, watches it, and turns what became of it into a report: also a hang, or a death.

Owns the deadlines: no run takes longer than it was given and the time to notice a hang.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import zeoid
from tests.fuzz.worker import SLOT_BYTES, Finding, Report, Slot

#: No input may keep the worker busy for this long. Generous: the machine may be busy with something else.
HANG_S = 15.0
#: How long it may take until the first input is tried.
START_S = 60.0


def run(seed: int, seconds: float, *, planted: str = "", hang_s: float = HANG_S) -> Report:
    """Try inputs of *seed* for *seconds* in a process of their own; *planted*: a fault that must be found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slot"
        path.write_bytes(bytes(SLOT_BYTES))
        slot = Slot(str(path))
        try:
            return _watch([str(path), str(seed), str(seconds), planted], slot, seconds, hang_s)
        finally:
            slot.close()


def _watch(arguments: list[str], slot: Slot, seconds: float, hang_s: float) -> Report:
    root = Path(__file__).resolve().parents[2]
    source = Path(zeoid.__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.worker", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{root}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    waited = 0.0
    try:
        while True:
            before = slot.read()[0]
            try:
                out, errors = process.communicate(timeout=hang_s)
            except subprocess.TimeoutExpired:
                waited += hang_s
                now, target, _ = slot.read()
                if now == before and (target or waited >= START_S):
                    return _finding(slot, waited, f"it took more than {hang_s:g} s")
            else:
                break
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    if process.returncode == 0:
        report = json.loads(out)
        finding = report.pop("finding")
        return Report(**report, finding=Finding(**finding) if finding else None)
    return _finding(slot, seconds, f"the process died, status {process.returncode}\n{errors}")


def _finding(slot: Slot, seconds: float, what: str) -> Report:
    executions, target, data = slot.read()
    return Report(executions, seconds, Finding(what, target, data.hex()))
