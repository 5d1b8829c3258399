"""How conformance tests are judged: a skip is a failure, and what stock ZEO is known to fail is expected."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.conformance.storage import ClientStorageCase
from tests.conformance.table import KNOWN_FAILURES
from tests.peers import Peers, Server


def skip_is_failure(report: pytest.TestReport) -> pytest.TestReport:
    """Turn the report of a skipped test into that of a failed one; an expected failure stays what it is."""
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which no conformance test may be: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = getattr(item, "cls", None)
        if case is not None and issubclass(case, ClientStorageCase):
            if (
                "stock" in (case.client_kind, case.server_kind)
                and getattr(getattr(case, item.name), "level", 1) > 1
            ):
                # ZODB calls it a long one.
                item.add_marker(pytest.mark.every_combination)
            for known in KNOWN_FAILURES:
                if known.concerns(case.mixin, item.name, case.client_kind, case.server_kind):
                    item.add_marker(pytest.mark.xfail(reason=known.reason, raises=known.error, strict=True))


@pytest.fixture(scope="class")
def class_server(request: pytest.FixtureRequest, class_peers: Peers) -> Server:
    """A server for the tests of a class; starting one takes longer than most of the tests."""
    case = request.cls
    names = [str(number + 1) for number in range(case.mixin.count * case.storages_per_test)]
    return class_peers.server(
        case.server_kind, coding=case.coding, storages=names, section=case.section
    )


@pytest.fixture(scope="class")
def unused_storages(class_server: Server) -> Iterator[str]:
    """The names of the server's storages, from which each test takes what it needs."""
    return iter(class_server.storages)


# First, so that it is the outermost and sees what pytest's own plugins make of a skip and of an xfail mark.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return skip_is_failure(report)
