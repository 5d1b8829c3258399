"""The command: torture for a time."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.torture_cache.run import Plan, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture_cache", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long to torture (300)")
    parser.add_argument("--seed", type=int, help="the seed of the random choices (default: a random one)")
    options = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="torture-cache-"))
    print(f"seed {seed}, in {folder}", flush=True)
    report = run(Plan(seed, options.seconds), folder)
    print(*report.lines(), sep="\n")
    if report.problems:
        print(f"what it left is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
