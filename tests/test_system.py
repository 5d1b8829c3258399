"""What is asked of the system itself: how many files may be open."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from zeoid import limits, system


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def allow(files: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def test_some_descriptors_are_kept() -> None:
    allow(1000)
    assert not system.is_scarce(999 - limits.DESCRIPTORS_KEPT)
    assert system.is_scarce(1000 - limits.DESCRIPTORS_KEPT)


def test_where_there_are_few_half_of_them_are_kept() -> None:
    allow(limits.DESCRIPTORS_KEPT)
    assert not system.is_scarce(limits.DESCRIPTORS_KEPT // 2 - 1)
    assert system.is_scarce(limits.DESCRIPTORS_KEPT // 2)


def test_all_that_may_be_had_is_taken() -> None:
    allow(500)
    system.allow_more_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard
