"""Pack very many objects, and see whether the bar tells the truth.

Exit status: 0 it did, 1 it did not, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.pack_million.run import MILLION, SHORT, Plan, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pack_million", description=__doc__)
    add = parser.add_argument
    add("--objects", type=int, default=MILLION.objects, help="how many (%(default)s)")
    add("--folder", type=Path, default=Path("/var/tmp"), help="where the file goes (%(default)s)")
    options = parser.parse_args()
    if options.objects < SHORT.objects:
        parser.error(f"at least {SHORT.objects:,} objects")
    plan = Plan(options.objects, MILLION.commits_before, long=options.objects >= MILLION.objects // 10)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="pack-") as folder:
        report = run(plan, Path(folder))
    print("\n".join(report.lines))
    print("\n".join(f"WRONG: {problem}" for problem in report.problems) or "the bar told the truth")
    return 1 if report.problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
