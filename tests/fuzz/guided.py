"""Fuzzing that is guided by coverage, with atheris (libFuzzer): what reaches new code is kept and varied.

    python -m tests.fuzz.guided TARGET [--seconds N]

What it keeps is in `corpus/TARGET.hex`, one input a line, and is tried again by the tests. An input that
breaks something is written to the current folder. Needs `atheris`, which is in the extra `fuzz`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import corpus, inputs

CHILD = "--libfuzzer"
#: Inputs of the unguided fuzzer to begin with.
SEEDS = 2000
BOUNDS = ("-timeout=10", "-rss_limit_mb=1024", "-max_len=8192", "-print_final_stats=1")


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == CHILD:
        fuzz(arguments[1], [sys.argv[0], *arguments[2:]])
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60, help="how long to try (60)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as seeds:
        write(kept, corpus.read(options.target))
        made = [inputs.make(0, number) for number in range(SEEDS)]
        write(seeds, [*first_inputs(options.target), *made])
        # libFuzzer ends the process that it runs in.
        command = [sys.executable, "-m", "tests.fuzz.guided", CHILD, options.target, kept, seeds]
        times = f"-max_total_time={options.seconds}"
        artifacts = f"-artifact_prefix=found-{options.target}-"
        # It ends without a word, so what targets leave in its folder for temporary files is removed here.
        env = {**os.environ, "TMPDIR": seeds}
        done = subprocess.run([*command, times, artifacts, *BOUNDS], env=env, check=False)
        corpus.write(options.target, [file.read_bytes() for file in Path(kept).iterdir()])
    return done.returncode


def first_inputs(target: str) -> list[bytes]:
    """Those that the target itself knows."""
    from tests.fuzz import ends, files, sessions

    return [seed for each in (ends, files, sessions) for seed in each.seeds(target)]


def write(folder: str, data: Sequence[bytes]) -> None:
    for number, each in enumerate(data):
        Path(folder, str(number)).write_bytes(each)


def fuzz(name: str, arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["zeoid"]):
        from tests.fuzz.targets import ALLOWED, TARGETS
    target = TARGETS[name]

    def one(data: bytes) -> None:
        with contextlib.suppress(*ALLOWED):
            target(data)

    atheris.Setup(arguments, one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["--help"]))
