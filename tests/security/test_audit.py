"""The audit log: one line for each event, whatever is in it."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zeoid import limits
from zeoid.security import audit
from zeoid.security.audit import AuditFile, Event
from zeoid.security.identity import Peer
from zeoid.security.names import Role
from zeoid.security.roles import NOBODY, TRUSTED, How, Identity

PEER = Peer("192.0.2.7:5000", trusted=False, encrypted=True)
ZOPE1 = Identity("zope1", How.CERTIFICATE, {"1": Role.WRITE})


@pytest.fixture
def file(tmp_path: Path) -> Iterator[AuditFile]:
    file = audit.to_file(tmp_path / "audit.log")
    yield file
    file.close()


def entries(file: AuditFile) -> list[dict[str, Any]]:
    with open(file.baseFilename, encoding="ascii") as lines:
        return [json.loads(line) for line in lines]


def test_what_a_line_says(file: AuditFile) -> None:
    audit.tell(Event.CONNECTED, PEER, ZOPE1, storage="1", access="write")
    (entry,) = entries(file)
    time = entry.pop("time")
    assert entry == {
        "event": "connected", "where": "192.0.2.7:5000", "name": "zope1", "how": "certificate",
        "role": "write", "storage": "1", "access": "write",
    }  # fmt: skip
    assert time.endswith("Z")
    assert len(time) == len("2026-11-25T18:31:19.058Z")


def test_events_without_a_name(file: AuditFile) -> None:
    audit.tell(Event.REFUSED, PEER, reason="TLS")
    audit.tell(Event.REFUSED, PEER, NOBODY, reason="no")
    audit.tell(Event.PACKED, Peer("local client"), TRUSTED, storage="1", problem=None)
    without, nobody, trusted = entries(file)
    assert "name" not in without
    assert (nobody["name"], nobody["how"]) == ("", "not")
    assert (trusted["how"], trusted["problem"]) == ("trusted", None)
    assert "role" not in trusted


NASTY = [
    'x"}\n{"time": "0", "event": "connected", "name": "root"}\n',
    "a\r\nb", "\u2028line\u2029", "\x1b[2J\x1b[31mred", "\x00\x7f\x85\x0b\x0c", "\u202egnp.exe",
    "\ud800", "%s %d %(x)s", "\\n",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_text_can_forge_a_line(file: AuditFile, text: str) -> None:
    audit.tell(Event.REFUSED, Peer(text), Identity(text, How.CERTIFICATE, {}), reason=text, storage=text)
    content = Path(file.baseFilename).read_bytes()
    assert content.count(b"\n") == 1
    assert content.endswith(b"\n")
    assert all(32 <= byte < 127 for byte in content[:-1])
    (entry,) = entries(file)
    assert entry["name"] == entry["reason"] == entry["where"] == entry["storage"] == text
    assert entry["event"] == "refused"


def test_long_values_are_cut(file: AuditFile) -> None:
    audit.tell(Event.UNDID, PEER, ZOPE1, reason="x" * 10_000, undone=[b"12345678"] * 1000)
    (entry,) = entries(file)
    assert entry["reason"] == "x" * limits.AUDIT_CHARACTERS
    assert entry["undone"] == [b"12345678".hex()] * limits.AUDIT_ENTRIES


def test_a_file_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = audit.to_file(tmp_path / "audit.log")
        file.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "audit.log").stat().st_mode) == 0o600


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    for _ in range(2):
        file = audit.to_file(tmp_path / "audit.log")
        audit.tell(Event.CHECKPOINT, PEER)
        file.close()
    audit.tell(Event.CHECKPOINT, PEER)
    assert len(entries(file)) == 2


def test_a_rotation(file: AuditFile) -> None:
    path = Path(file.baseFilename)
    audit.tell(Event.CONNECTED, PEER)
    path.rename(path.with_suffix(".1"))
    audit.tell(Event.CHECKPOINT, PEER)
    file.reopen()
    audit.tell(Event.DISCONNECTED, PEER)
    assert [entry["event"] for entry in entries(file)] == ["disconnected"]
    assert path.with_suffix(".1").read_text().count("\n") == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_rotation_that_fails_keeps_the_old_file(file: AuditFile, tmp_path: Path) -> None:
    path = Path(file.baseFilename)
    path.rename(tmp_path / "old")
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        file.reopen()
    audit.tell(Event.CONNECTED, PEER)
    assert (tmp_path / "old").read_text().count("\n") == 1


def test_it_goes_nowhere_else() -> None:
    """Not to the handlers of the root logger: what is for a protected file is not for every log."""
    assert not audit.log.propagate
    assert audit.log.isEnabledFor(logging.INFO)
