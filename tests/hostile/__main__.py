"""The command: attack a server with thousands of connections, one attack after the other, and tell what
another client notices and how much the server grows. Nothing is asserted but that it survives."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.hostile.attacks import MEMBERS, NEWCOMERS, WITH_TLS, Attack
from tests.hostile.houses import House
from tests.hostile.measuring import Noticed, measure_elsewhere
from tests.peers import wait_until
from tests.server.processes import Serving, serve_until
from zeoid.system import allow_more_files

MB = 1024 * 1024
#: How many of each attack; what floods has so many threads.
COUNTS = dict.fromkeys(NEWCOMERS, 3000) | dict.fromkeys((*MEMBERS, *WITH_TLS), 4)
COUNTS |= {"garbage": 4, "byte by byte": 900, "long messages": 60, "never voted": 50}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each attack is measured (5)")
    parser.add_argument("--only", metavar="ATTACK", help="one attack")
    options = parser.parse_args()
    allow_more_files()
    attacks = NEWCOMERS | WITH_TLS | MEMBERS
    if options.only:
        attacks = {options.only: attacks[options.only]}
    made: list[Serving] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            house = House(
                Path(folder), serve_until(Path(folder), made), "--max-memory", 256, "--max-blob", 64,
                tls=True,
            )  # fmt: skip
            run(house, attacks, options.seconds)
            status = house.serving.stop()
            print(f"the server has stopped with status {status}")
            return status
    finally:
        for serving in made:
            serving.end()


def run(house: House, attacks: dict[str, Attack], seconds: float) -> None:
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; the server may hold 256 MB\n")
    print(
        f"{'':20} {'count':>6} {'load p50':>9} {'p99':>8} {'commit p50':>11} {'p99':>8} {'growth':>8}  left"
    )
    idle = notice(house, seconds)
    tell("idle", 0, idle, 0, 0)
    for name, attack in attacks.items():
        files = house.serving.files()
        before = house.serving.forget_peak_memory()
        with attack(house.attacker, COUNTS[name]):
            noticed = notice(house, seconds)
        growth = house.serving.peak_memory_bytes() - before
        wait_until(lambda files=files: house.serving.files() <= files + 5, "all are gone", 60)  # type: ignore[misc]
        tell(name, COUNTS[name], noticed, growth, house.serving.files() - files)
    tell("idle", 0, notice(house, seconds), 0, 0)


def notice(house: House, seconds: float) -> Noticed:
    assert house.authority is not None
    assert isinstance(house.address, tuple)
    bundle = str(house.folder / "alice.pem")
    return measure_elsewhere(house.address, bundle, house.authority.file, seconds)


def tell(name: str, count: int, noticed: Noticed, growth_bytes: int, files: int) -> None:
    loads = f"{noticed.load_p50:6.2f} ms {noticed.load_p99:5.2f} ms"
    commits = f"{noticed.commit_p50:8.2f} ms {noticed.commit_p99:5.2f} ms"
    print(f"{name:20} {count:6} {loads} {commits} {growth_bytes / MB:5.0f} MB  {files}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
