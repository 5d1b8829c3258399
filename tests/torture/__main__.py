"""The command: torture for a time."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.torture.run import Plan, run

#: The mean lives in the long form. A server's grows no longer, so that ten minutes have sixty kills.
SERVER_LIFE_S = 10.0
CLIENT_LIFE_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to torture (600)")
    parser.add_argument("--seed", type=int, help="the seed of the random choices (default: a random one)")
    options = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    print(f"seed {seed}, in {folder}", flush=True)
    plan = Plan(
        seed,
        options.seconds,
        server_kills=max(1, round(options.seconds / SERVER_LIFE_S)),
        client_kills=max(1, round(options.seconds / CLIENT_LIFE_S)),
    )
    report = run(plan, folder)
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
