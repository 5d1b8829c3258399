"""What the tests share: the option for every combination, servers and clients, servers' logs in failures."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.peers import Peers

ROOT = Path(__file__).resolve().parent.parent
PEERS = pytest.StashKey[Peers]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="run the conformance and interoperability tests with every combination of client, server and"
        " coding (default: all tests with Zeoid on both sides, a selection with stock ZEO on one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_combination: a test that only --every-combination runs")
    config.addinivalue_line("markers", "stock_server_fails(reason): a test that ZEO's own server can't pass")


# Last, because others add markers.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--every-combination"):
        return
    left_out = [item for item in items if item.get_closest_marker("every_combination")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("every_combination")]


@pytest.fixture
def peers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Peers]:
    """Starts servers and opens clients for this test, and ends them with it."""
    with Peers(tmp_path) as peers:
        request.node.stash[PEERS] = peers
        yield peers


@pytest.fixture(scope="class")
def class_peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    """The same for all tests of a class."""
    with Peers(tmp_path_factory.mktemp("class")) as peers:
        request.node.stash[PEERS] = peers
        yield peers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        peers = [node.stash[PEERS] for node in item.listchain() if PEERS in node.stash]
        servers = [server for each in peers for server in each.servers]
        report.sections += [(f"log of {server!r}", server.log.text()) for server in servers]
    return report


@pytest.fixture(scope="session")
def zope_venv() -> Path:
    """The environment with Zope that `make` installs, or one named by ZOPE_VENV."""
    venv = Path(os.environ.get("ZOPE_VENV") or ROOT / ".venv-zope")
    if not (venv / "bin" / "runwsgi").is_file():
        pytest.fail(f"There is no Zope in {venv}: `make test` installs it, ZOPE_VENV names another place.")
    return venv
