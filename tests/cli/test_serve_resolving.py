"""`zeoid serve` where the server resolves conflicts: what clients of either kind notice of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, UndoError
from ZODB.tests.ConflictResolution import PCounter, PCounter3
from ZODB.tests.StorageTestBase import zodb_pickle, zodb_unpickle
from ZODB.utils import load_current, z64

from tests.peers import KINDS, UNCLOSED_BUFFER, Kind, Peers
from tests.server.processes import Serving, on_loopback

Serve = Callable[..., Serving]
pytestmark = pytest.mark.filterwarnings(f"ignore:{UNCLOSED_BUFFER}:ResourceWarning")

CONFIGURATION = """
<zeo>
  address 127.0.0.1:0
  client-conflict-resolution false
</zeo>
<filestorage>
  path Data.fs
</filestorage>
"""


def counter(value: int, kind: type[Any]) -> bytes:
    made = kind()
    made.inc(value)
    data: bytes = zodb_pickle(made)
    return data


class Writer:
    """One object, and transactions that change it."""

    def __init__(self, storage: Any, kind: type[Any]) -> None:
        self.storage = storage
        self.oid = storage.new_oid()
        self.kind = kind

    def commit(self, value: int, serial: bytes) -> bytes:
        return self._commit(
            lambda meta: self.storage.store(self.oid, serial, counter(value, self.kind), "", meta)
        )

    def undo(self, place: int) -> bytes:
        """Undo the transaction at this place in the log, the newest first."""
        transaction_id = self.storage.undoInfo()[place]["id"]
        return self._commit(lambda meta: self.storage.undo(transaction_id, meta))

    def _commit(self, change: Callable[[TransactionMetaData], Any]) -> bytes:
        meta = TransactionMetaData()
        self.storage.tpc_begin(meta)
        try:
            change(meta)
            self.storage.tpc_vote(meta)
            tid: bytes = self.storage.tpc_finish(meta)
        except BaseException:
            self.storage.tpc_abort(meta)
            raise
        return tid

    @property
    def value(self) -> int:
        counted: int = zodb_unpickle(load_current(self.storage, self.oid)[0])._value
        return counted


@pytest.fixture(params=["option", "configuration"])
def serving(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Serving:
    if request.param == "option":
        return serve("--resolve-conflicts", *on_loopback("Data.fs"))
    (tmp_path / "server.conf").write_text(CONFIGURATION)
    return serve("-C", "server.conf")


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_resolves(
    serving: Serving, peers: Peers, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store and an undo; the clients have no part in it, and see what came of it."""
    writer = Writer(peers.client(kind, serving.address), PCounter)
    monkeypatch.delattr(PCounter, "_p_resolveConflict")  # here, not in the server
    first = writer.commit(1, z64)
    writer.commit(5, first)
    writer.commit(3, first)
    assert writer.value == 5 + 3 - 1
    writer.undo(1)
    assert writer.value == 5 + 3 - 1 - (5 - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_not_be_resolved(serving: Serving, peers: Peers, kind: Kind) -> None:
    """A conflict is a ConflictError, an undo an UndoError, also to stock clients."""
    writer = Writer(peers.client(kind, serving.address), PCounter3)
    first = writer.commit(1, z64)
    writer.commit(5, first)
    with pytest.raises(ConflictError):
        writer.commit(3, first)
    writer.commit(7, writer.storage.getTid(writer.oid))
    with pytest.raises(UndoError):
        writer.undo(1)
    assert writer.value == 7
