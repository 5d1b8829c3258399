"""The command: fuzz for a time, or try one input again."""

from __future__ import annotations

import argparse
import random
import sys

from tests.fuzz.run import run
from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import bound_memory, try_one


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to try (60)")
    parser.add_argument("--seed", type=int, help="the seed of a run to repeat (default: a random one)")
    parser.add_argument(
        "--again", nargs=2, metavar=("TARGET", "HEX"), help=f"try one input again: {', '.join(TARGETS)}"
    )
    options = parser.parse_args()
    if options.again:
        return again(*options.again)
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else abs(options.seed)
    print(f"seed {seed}", flush=True)
    report = run(seed, options.seconds)
    rate = report.executions / max(report.seconds, 0.001)
    print(f"{report.executions:,} executions in {report.seconds:.1f} s, {rate:,.0f} per second")
    if report.finding is None:
        print("nothing found")
        return 0
    finding = report.finding
    print(f"FOUND, target {finding.target}: {finding.what.rstrip()}")
    print(f"try it again: python -m tests.fuzz --again {finding.target} {finding.input}")
    return 1


def again(target: str, data: str) -> int:
    if target not in TARGETS:
        print(f"no target {target!r}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    try:
        raw = bytes.fromhex(data)
    except ValueError:
        print("the input must be given in hexadecimal digits", file=sys.stderr)
        return 2
    bound_memory()
    what = try_one(TARGETS[target], raw)
    print(what.rstrip() if what else "nothing wrong")
    return 1 if what else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
