"""What the tests of sessions have to say of logs, of refusals and of locks."""

from __future__ import annotations

import logging

import pytest

from tests.server.inmemory import Call
from zeoid.server.hosted import Hosted


def log_lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """Without the audit log's, which has tests of its own."""
    for record in caplog.records:
        assert record.exc_info is None, "an expected error leaves no traceback"
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= level and record.name != "zeoid.audit"
    ]


def refuses(call: Call, *words: str) -> None:
    """The call was answered with a TypeError, which is what stock clients know, saying *words*."""
    with pytest.raises(TypeError) as caught:
        _ = call.result
    for word in words:
        assert word in str(caught.value)


def nothing_is_locked(hosted: Hosted) -> None:
    """No transaction is under way, and no object is held or waited for."""
    transactions = hosted.transactions
    assert (transactions.active, transactions.waiting, transactions.locked_at) == (0, 0, None)
    assert len(transactions._locks) == 0
