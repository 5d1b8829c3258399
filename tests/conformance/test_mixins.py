"""ZODB's own storage tests, for every combination of client, server and coding.

Owns the classes that pytest collects: `BasicStorage_stock_zeoid_M5` is `BasicStorage` with a stock client, a
Zeoid server and M5 between them. A class outside the default selection is marked `every_combination`.
"""

from __future__ import annotations

import collections
import itertools
import re
import subprocess
import sys
import unittest
from collections.abc import Iterator

import pytest

from tests.conformance.conftest import skip_is_failure
from tests.conformance.storage import ClientStorageCase
from tests.conformance.table import KNOWN_FAILURES, MIXINS, TOTAL, Mixin
from tests.peers import CODINGS, KINDS, UNCLOSED_BUFFER, Coding, Kind, environment

# The races give themselves 120 s.
RACE_TIMEOUT = pytest.mark.timeout(200)


def in_default_selection(mixin: Mixin, client: Kind, server: Kind, coding: Coding) -> bool:
    """Each test once with Zeoid on both sides, codings in turn; some of them with it on one side, in both."""
    if client == server == "zeoid":
        return coding == CODINGS[MIXINS.index(mixin) % len(CODINGS)]
    return mixin.selected and "zeoid" in (client, server)


def conformance_class(mixin: Mixin, client: Kind, server: Kind, coding: Coding) -> type[ClientStorageCase]:
    marks = [RACE_TIMEOUT]
    if client == "stock":
        marks.append(pytest.mark.filterwarnings(f"ignore:{UNCLOSED_BUFFER}:ResourceWarning"))
    if not in_default_selection(mixin, client, server, coding):
        marks.append(pytest.mark.every_combination)
    return type(
        f"{mixin.tests.__name__}_{client}_{server}_{coding}",
        (mixin.case, mixin.tests),
        {
            "__module__": __name__,
            "client_kind": client,
            "server_kind": server,
            "coding": coding,
            "mixin": mixin,
            "pytestmark": marks,
        },
    )


def conformance_classes() -> Iterator[type[ClientStorageCase]]:
    for mixin, client, server, coding in itertools.product(MIXINS, KINDS, KINDS, CODINGS):
        yield conformance_class(mixin, client, server, coding)


globals().update({case.__name__: case for case in conformance_classes()})


@pytest.mark.parametrize("mixin", MIXINS, ids=lambda mixin: mixin.tests.__name__)
def test_every_combination_has_every_test(mixin: Mixin) -> None:
    of_mixin = [case for case in conformance_classes() if case.mixin is mixin]
    assert len(of_mixin) == len(KINDS) ** 2 * len(CODINGS)
    for case in of_mixin:
        assert len(unittest.TestLoader().getTestCaseNames(case)) == mixin.count, case.__name__


def test_pytest_collects_every_test_once_for_zeoid(pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__]
    listing = subprocess.run(
        command,
        cwd=pytestconfig.rootpath,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = collections.Counter(re.findall(r"::(\w+)_zeoid_zeoid_\w\w::\w+$", listing.stdout, re.MULTILINE))
    assert found == {mixin.tests.__name__: mixin.count for mixin in MIXINS}, listing.stdout + listing.stderr
    assert found.total() == TOTAL


def test_a_skip_is_a_failure() -> None:
    report = pytest.TestReport("a test", ("file", 1, "a test"), {}, "skipped", "no server", "call")
    assert skip_is_failure(report).failed


def test_an_expected_failure_is_none() -> None:
    report = pytest.TestReport("a test", ("file", 1, "a test"), {}, "skipped", "", "call", wasxfail="why")
    assert skip_is_failure(report).skipped


def test_known_failures_name_tests_that_exist() -> None:
    names = {f"{mixin.tests.__name__}.{test}" for mixin in MIXINS for test in dir(mixin.tests)}
    assert names >= {known.test for known in KNOWN_FAILURES}
