"""One peer's part in one round: `python -m bench.once BENCHMARK PEER FOLDER CPUS [--quick]`.

It is a process of its own, so that nothing of one peer's client (threads, caches, garbage) is left when the
next one is measured. It pins itself, and with it all that it starts, and prints the figures as JSON: those of
the benchmark, and how much of the CPUs' time others took meanwhile, without which no figure can be judged.
"""

import json
import signal
import sys
import time
from pathlib import Path

from bench.measure import OTHERS
from bench.peers import PEERS
from bench.processes import busy_cpu_s, own_cpu_s, pin
from bench.works import BENCHMARKS


def main() -> None:
    name, peer, folder, cpus, *options = sys.argv[1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped on the way out
    pinned = [int(cpu) for cpu in cpus.split(",")]
    pin(pinned)
    began, busy_s, own_s = time.monotonic(), busy_cpu_s(pinned), own_cpu_s()
    figures = BENCHMARKS[name].run(PEERS[peer](), Path(folder), "--quick" in options)
    others_s = (busy_cpu_s(pinned) - busy_s) - (own_cpu_s() - own_s)
    figures[OTHERS.key] = max(0.0, others_s / len(pinned) / (time.monotonic() - began) * 100)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
