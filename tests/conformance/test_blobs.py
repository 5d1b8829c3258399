"""ZODB's tests of blob storages, for every combination of client, mode and layout; see `blobs`."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conformance.blobs import RECOVERY_TESTS, TESTS
from tests.peers import KINDS, Kind, Layout, environment

MODES = ("cache", "shared")
LAYOUTS: tuple[Layout, ...] = ("bushy", "lawn")
DEFAULT = {
    ("zeoid", "zeoid", "cache", "bushy"),
    ("zeoid", "zeoid", "shared", "lawn"),
    ("stock", "zeoid", "cache", "lawn"),
    ("stock", "zeoid", "shared", "bushy"),
    ("zeoid", "stock", "cache", "bushy"),
    ("zeoid", "stock", "shared", "lawn"),
}
COMBINATIONS = list(itertools.product(KINDS, KINDS, MODES, LAYOUTS))


def unprivileged() -> list[str]:
    """What goes before a command that must not be allowed to write to a file that is read-only."""
    setpriv = shutil.which("setpriv")
    if os.getuid() != 0:
        return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    assert setpriv, "setpriv is missing; these tests can't run as root without it"
    return [setpriv, "--pdeathsig", "KILL", "--bounding-set=-dac_override,-dac_read_search", "--"]


@pytest.mark.parametrize(
    ("client", "server", "mode", "layout"),
    [
        pytest.param(*each, marks=() if each in DEFAULT else pytest.mark.every_combination, id="-".join(each))
        for each in COMBINATIONS
    ],
)
def test_blob_storages(
    client: Kind, server: Kind, mode: str, layout: Layout, pytestconfig: pytest.Config
) -> None:
    command = [sys.executable, "-m", "tests.conformance.blobs", client, server, mode, layout]
    done = subprocess.run(
        [*unprivileged(), *command],
        cwd=pytestconfig.rootpath,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    output = done.stdout + done.stderr
    counts = re.search(r"^ran (\d+), skipped (\d+), failed (\d+), storages (\d+)$", done.stdout, re.MULTILINE)
    assert counts, output
    ran, skipped, failed, storages = map(int, counts.groups())
    expected = TESTS + (RECOVERY_TESTS if client == server == "zeoid" else 0)
    assert (ran, skipped, failed, done.returncode) == (expected, 0, 0, 0), output
    assert storages >= expected - 1, output  # one of the tests needs none


def test_the_default_are_combinations() -> None:
    assert set(COMBINATIONS) >= DEFAULT
