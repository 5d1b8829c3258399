"""What a client that does no harm notices: how long its loads and commits take, as a process of its own."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass

from ZODB.utils import p64

from tests.hostile.attacks import Target
from tests.peers import die_with_parent, environment
from zeoid.model import MAX_TID, NO_TID

LOADS_PER_COMMIT = 20


@dataclass
class Noticed:
    """Milliseconds."""

    loads: int
    load_p50: float
    load_p99: float
    commit_p50: float
    commit_p99: float


def measure(target: Target, seconds: float) -> Noticed:
    """Load small records one by one, and commit one now and then."""
    loads: list[float] = []
    commits: list[float] = []
    with target.register() as client:
        oid = p64(50_000)
        try:
            serial = client.call("getTid", oid)
        except KeyError:
            serial = NO_TID
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            serial = client.commit(oid, b"x" * 300, serial)
            commits.append(time.perf_counter() - began)
            for _ in range(LOADS_PER_COMMIT):
                began = time.perf_counter()
                client.call("loadBefore", oid, MAX_TID)
                loads.append(time.perf_counter() - began)
    return Noticed(len(loads), *(_percentile(each, part) for each in (loads, commits) for part in (50, 99)))


def _percentile(values: list[float], part: int) -> float:
    return 1000 * sorted(values)[min(len(values) - 1, len(values) * part // 100)]


def measure_elsewhere(address: tuple[str, int], bundle: str, ca: str, seconds: float) -> Noticed:
    """In another process."""
    done = subprocess.run(
        [*die_with_parent(), sys.executable, "-m", "tests.hostile.measuring", address[0], str(address[1]),
         bundle, ca, str(seconds)],
        env=environment(), capture_output=True, text=True, check=True, timeout=seconds + 120,
    )  # fmt: skip
    return Noticed(**json.loads(done.stdout))


def main() -> None:
    host, port, bundle, ca, seconds = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(bundle)
    context.load_verify_locations(ca)
    print(json.dumps(vars(measure(Target((host, int(port)), context), float(seconds)))))


if __name__ == "__main__":
    main()
