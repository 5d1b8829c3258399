"""A short run of the fuzzer, and proof that it notices what it is there for."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import inputs
from tests.fuzz.run import run
from tests.fuzz.targets import PLANTED
from tests.fuzz.worker import SLOT_BYTES, Slot

SECONDS = 3.0


def check(seed: int) -> None:
    print(f"seed {seed}")
    report = run(seed, SECONDS)
    assert report.executions > 0
    if report.finding is not None:
        finding = report.finding
        pytest.fail(f"seed {seed}, target {finding.target}: {finding.what}\n{finding.input}")


def test_nothing_is_found_with_the_seed_of_every_run() -> None:
    check(1)


def test_nothing_is_found_with_a_seed_of_this_run() -> None:
    # The operating system's own numbers: those of `random` are the same whenever a test run is repeated.
    check(random.SystemRandom().getrandbits(32))


def test_the_same_seed_makes_the_same_inputs() -> None:
    first = [inputs.make(7, number) for number in range(200)]
    assert first == [inputs.make(7, number) for number in range(200)]
    assert first != [inputs.make(8, number) for number in range(200)]
    assert max(map(len, first)) <= inputs.MOST_BYTES


@pytest.mark.parametrize(
    ("planted", "what"),
    [
        ("planted_escape", "RuntimeError: planted"),
        ("planted_slowness", "it took "),
        ("planted_hang", "it took more than 3 s"),
        ("planted_memory", "MiB of memory"),
        ("planted_death", "the process died, status -9"),
    ],
)
def test_what_is_planted_is_found_with_its_input(planted: str, what: str) -> None:
    report = run(5, 60, planted=planted, hang_s=3 if planted == "planted_hang" else 30)
    assert report.finding is not None
    assert report.finding.target == planted
    assert what in report.finding.what
    assert b"\xff" in bytes.fromhex(report.finding.input)


def test_every_planted_fault_is_looked_for() -> None:
    marks = test_what_is_planted_is_found_with_its_input.pytestmark  # type: ignore[attr-defined]
    assert {planted for planted, _ in marks[0].args[1]} == set(PLANTED)


def test_a_slot_is_read_where_it_was_not_written(tmp_path: Path) -> None:
    path = tmp_path / "slot"
    path.write_bytes(bytes(SLOT_BYTES))
    here, there = Slot(str(path)), Slot(str(path))
    assert there.read() == (0, "", b"")
    here.write(7, "frames", b"x" * inputs.MOST_BYTES)
    here.write(8, "server", b"short")
    assert there.read() == (8, "server", b"short")
    here.close()
    there.close()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_command() -> None:
    done = command("--seconds", "0.2", "--seed", "3")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == "seed 3"
    assert "executions in" in second
    assert "per second" in second
    assert third == "nothing found"


def test_the_command_tries_one_input_again() -> None:
    assert command("--again", "frames", "000000014d").stdout == "nothing wrong\n"
    assert command("--again", "nobody", "00").returncode == 2
    assert command("--again", "frames", "xy").returncode == 2
