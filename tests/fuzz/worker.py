"""The process that may break: makes inputs and feeds them to the targets, within bounds on memory and time.

Writes every input into a slot (a mapped file) before it is used, so that the input is known even if this
process hangs or dies of it. Prints one line of JSON at the end. Must not know who reads it.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz import inputs, targets

SLOT_BYTES = inputs.MOST_BYTES + 4096
#: Inputs so far, length of the target's name, length of the input.
_HEAD = struct.Struct(">QII")

MEMORY_BYTES = 128 * 1024 * 1024
SLOWEST_S = 1.0


@dataclass(frozen=True)
class Finding:
    """An input that broke something."""

    what: str
    target: str
    input: str


@dataclass(frozen=True)
class Report:
    """How much was tried, and what came of it."""

    executions: int
    seconds: float
    finding: Finding | None


class Slot:
    """The input that is being tried, where another process can see it."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), SLOT_BYTES)

    def write(self, number: int, target: str, data: bytes) -> None:
        name = target.encode("ascii")
        self._map[: _HEAD.size + len(name) + len(data)] = (
            _HEAD.pack(number, len(name), len(data)) + name + data
        )

    def read(self) -> tuple[int, str, bytes]:
        """The number of executions before this one, the target and the input."""
        number, name_length, length = _HEAD.unpack_from(self._map)
        stop = _HEAD.size + name_length
        return number, self._map[_HEAD.size : stop].decode("ascii"), self._map[stop : stop + length]

    def close(self) -> None:
        self._map.close()


def try_one(target: Callable[[bytes], None], data: bytes) -> str | None:
    """What is wrong with what *target* does with *data*; None if nothing is."""
    start = time.thread_time()
    try:
        target(data)
    except targets.ALLOWED:
        pass
    except MemoryError:
        return f"it took more than {MEMORY_BYTES >> 20} MiB of memory"
    except BaseException:
        return traceback.format_exc()
    took = time.thread_time() - start
    return f"it took {took:.1f} s" if took > SLOWEST_S else None


def bound_memory() -> None:
    """No more than `MEMORY_BYTES` above what is in use now: more is a MemoryError."""
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def work(slot: Slot, seed: int, seconds: float, chosen: dict[str, Callable[[bytes], None]]) -> Report:
    executions = 0
    start = time.monotonic()
    for number in itertools.count():
        data = inputs.make(seed, number)
        for name, target in chosen.items():
            slot.write(executions, name, data)
            what = try_one(target, data)
            executions += 1
            if what is not None:
                return Report(executions, time.monotonic() - start, Finding(what, name, data.hex()))
        if time.monotonic() - start >= seconds:
            break
    return Report(executions, time.monotonic() - start, None)


def main(path: str, seed: str, seconds: str, planted: str) -> None:
    chosen = {planted: targets.PLANTED[planted]} if planted else targets.TARGETS
    slot = Slot(path)
    bound_memory()
    print(json.dumps(asdict(work(slot, int(seed), float(seconds), chosen))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
