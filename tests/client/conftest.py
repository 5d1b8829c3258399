"""The scene of a test of the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.scenes import Scene


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Scene() as scene:
        yield scene
