"""Which of ZODB's storage tests a client storage has to pass: all of them.

Owns the table of the mixins, with the number of tests of each, and the list of what a pair with stock ZEO in
it is known to fail. Must not know how they are run.
"""

from __future__ import annotations

from dataclasses import dataclass

from ZODB.POSException import ConflictError
from ZODB.tests.BasicStorage import BasicStorage
from ZODB.tests.ConflictResolution import ConflictResolvingStorage, ConflictResolvingTransUndoStorage
from ZODB.tests.HistoryStorage import HistoryStorage
from ZODB.tests.IteratorStorage import ExtendedIteratorStorage, IteratorStorage
from ZODB.tests.MTStorage import MTStorage
from ZODB.tests.PackableStorage import PackableStorage, PackableUndoStorage
from ZODB.tests.PersistentStorage import PersistentStorage
from ZODB.tests.ReadOnlyStorage import ReadOnlyStorage
from ZODB.tests.RecoveryStorage import RecoveryStorage
from ZODB.tests.RevisionStorage import RevisionStorage
from ZODB.tests.Synchronization import SynchronizedStorage
from ZODB.tests.testZODB import ZODBTests
from ZODB.tests.TransactionalUndoStorage import TransactionalUndoStorage

from tests.conformance.storage import (
    ClientStorageCase,
    DatabaseCase,
    RealTimeCase,
    ResolvedConflictCase,
    RestartedServerCase,
    TwoStoragesCase,
    UndoVoteCase,
)
from tests.peers import Kind


@dataclass(frozen=True)
class Mixin:
    tests: type
    count: int
    case: type[ClientStorageCase] = ClientStorageCase
    selected: bool = False
    """Runs by default, not only with Zeoid on both sides but also with stock ZEO on one."""


MIXINS = (
    Mixin(BasicStorage, 19, selected=True),
    Mixin(TransactionalUndoStorage, 18),
    Mixin(PackableStorage, 10),
    Mixin(PackableUndoStorage, 3, RealTimeCase, selected=True),
    Mixin(SynchronizedStorage, 7, selected=True),
    Mixin(RevisionStorage, 7),
    Mixin(IteratorStorage, 8, selected=True),
    Mixin(ExtendedIteratorStorage, 1),
    Mixin(MTStorage, 5),
    Mixin(RecoveryStorage, 5, TwoStoragesCase),
    Mixin(ConflictResolvingStorage, 5, ResolvedConflictCase, selected=True),
    Mixin(ConflictResolvingTransUndoStorage, 2, UndoVoteCase, selected=True),
    Mixin(ReadOnlyStorage, 2, selected=True),
    Mixin(HistoryStorage, 1, selected=True),
    Mixin(PersistentStorage, 1, RestartedServerCase),
    Mixin(ZODBTests, 11, DatabaseCase, selected=True),
)
TOTAL = 105


@dataclass(frozen=True)
class KnownFailure:
    test: str
    """Mixin and method."""
    client: Kind | None
    server: Kind | None
    """Where it fails; None stands for either kind."""
    reason: str
    error: type[Exception]
    """What it ends with: anything else is a failure that nobody knows."""

    def concerns(self, mixin: Mixin, test: str, client: Kind, server: Kind) -> bool:
        return (
            self.test == f"{mixin.tests.__name__}.{test}"
            and self.client in (None, client)
            and self.server in (None, server)
        )


_UNDO_CONFLICT = (
    "an undo that can't be resolved is a ConflictError to stock clients, where the test wants an UndoError:"
    " they can't tell the conflicts of an undo from others"
)
KNOWN_FAILURES = (
    KnownFailure(
        "ConflictResolvingTransUndoStorage.testUndoUnresolvable",
        "stock",
        "zeoid",
        _UNDO_CONFLICT,
        ConflictError,
    ),
    KnownFailure("TransactionalUndoStorage.testNotUndoable", "stock", "zeoid", _UNDO_CONFLICT, ConflictError),
)
