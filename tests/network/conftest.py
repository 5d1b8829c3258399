"""Houses for the tests of this folder, and why there are none."""

from __future__ import annotations

import pytest

from tests.network.house import missing


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skips where there can't be network namespaces."""
    if reason := missing():
        pytest.skip(reason)
