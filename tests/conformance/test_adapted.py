"""ZODB's own storage tests on storages that are no files: what passes without a server passes behind it.

Owns the table of what these storages lack, and the classes that pytest collects: `MTStorage_demo_stock` is
`MTStorage` with a stock client and a DemoStorage behind a Zeoid server. By default all of them run with our
client, and a selection with the stock one.
"""

from __future__ import annotations

import itertools
import logging
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import ZODB
import ZODB.tests.util
from ZODB.DemoStorage import DemoStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.tests.StorageTestBase import StorageTestBase
from ZODB.tests.TransactionalUndoStorage import TransactionalUndoStorage

from tests.conformance.storage import ClientStorageCase, DatabaseCase, TwoStoragesCase
from tests.conformance.table import MIXINS, Mixin
from tests.conformance.test_mixins import RACE_TIMEOUT
from tests.peers import CODINGS, KINDS, MAPPING_SECTION, UNCLOSED_BUFFER, Kind

Adapted = Literal["mapping", "demo"]
SECTIONS: dict[Adapted, str] = {
    "mapping": MAPPING_SECTION,
    "demo": "<demostorage {name}>\n</demostorage>\n",
}
MAKE: dict[Adapted, Callable[[], Any]] = {"mapping": MappingStorage, "demo": DemoStorage}


@dataclass(frozen=True)
class Lacking:
    """What fails because these storages can't do it, server or not."""

    mixin: str
    why: str
    tests: frozenset[str] | None = None
    """None: all of them."""


LACKING = (
    Lacking("TransactionalUndoStorage", "undo"),
    Lacking("PackableUndoStorage", "undo"),
    Lacking("ConflictResolvingTransUndoStorage", "undo"),
    Lacking("RevisionStorage", "undo", frozenset({"testLoadBeforeUndo"})),
    Lacking("IteratorStorage", "undo", frozenset({"testUndoZombie"})),
    Lacking("ZODBTests", "undo", frozenset({"testMultipleUndoInOneTransaction"})),
    Lacking("RecoveryStorage", "restore"),
    Lacking("PersistentStorage", "a place to be kept in"),
)
TOTAL = 73
"""Of the 105."""


def lacking(mixin: Mixin) -> frozenset[str]:
    """The tests of a mixin that are left out."""
    out: frozenset[str] = frozenset()
    for each in LACKING:
        if each.mixin == mixin.tests.__name__:
            out |= frozenset(names_of(mixin)) if each.tests is None else each.tests
    return out


def names_of(mixin: Mixin) -> list[str]:
    case = type("All", (mixin.case, mixin.tests), {})
    return list(unittest.TestLoader().getTestCaseNames(case))


def applies(mixin: Mixin) -> bool:
    return len(lacking(mixin)) < mixin.count


def adapted_class(mixin: Mixin, adapted: Adapted, client: Kind) -> type[ClientStorageCase]:
    marks = [RACE_TIMEOUT]
    if client == "stock":
        marks.append(pytest.mark.filterwarnings(f"ignore:{UNCLOSED_BUFFER}:ResourceWarning"))
        if not mixin.selected:
            marks.append(pytest.mark.every_combination)
    return type(
        f"{mixin.tests.__name__}_{adapted}_{client}",
        (mixin.case, mixin.tests),
        {
            "__module__": __name__,
            "client_kind": client,
            "server_kind": "zeoid",
            "section": SECTIONS[adapted],
            "coding": CODINGS[(MIXINS.index(mixin) + KINDS.index(client)) % len(CODINGS)],
            "mixin": mixin,
            "pytestmark": marks,
            **dict.fromkeys(lacking(mixin)),
        },
    )


def adapted_classes() -> Iterator[type[ClientStorageCase]]:
    for mixin, adapted, client in itertools.product(filter(applies, MIXINS), SECTIONS, KINDS):
        yield adapted_class(mixin, adapted, client)


globals().update({case.__name__: case for case in adapted_classes()})


def test_every_pair_has_every_test_that_applies() -> None:
    found: dict[str, int] = {}
    for case in adapted_classes():
        _, pair = case.__name__.split("_", 1)
        names = unittest.TestLoader().getTestCaseNames(case)
        assert len(names) == case.mixin.count - len(lacking(case.mixin)), case.__name__
        found[pair] = found.get(pair, 0) + len(names)
    assert found == dict.fromkeys(["mapping_zeoid", "mapping_stock", "demo_zeoid", "demo_stock"], TOTAL)


def bare(mixin: Mixin, make: Callable[[], Any]) -> type[StorageTestBase]:
    """The mixin on a storage in this process."""

    class Bare(StorageTestBase):
        _begin_undos_vote = TransactionalUndoStorage._begin_undos_vote

        def setUp(self) -> None:
            if issubclass(mixin.case, DatabaseCase):
                ZODB.tests.util.TestCase.setUp(self)
            else:
                super().setUp()
            self.open()
            if issubclass(mixin.case, TwoStoragesCase):
                self._dst = make()
            if issubclass(mixin.case, DatabaseCase):
                self._db = ZODB.DB(self._storage)

        def tearDown(self) -> None:
            if issubclass(mixin.case, DatabaseCase):
                self._db.close()
            StorageTestBase.tearDown(self)

        def open(self, read_only: bool = False) -> None:
            self._storage = make()

    return type("Bare", (Bare, mixin.tests), {})


@pytest.mark.parametrize("adapted", SECTIONS)
def test_what_is_left_out_fails_without_a_server_too(
    adapted: Adapted, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    passed = []
    for mixin in MIXINS:
        for name in lacking(mixin):
            result = unittest.TestResult()
            bare(mixin, MAKE[adapted])(name).run(result)
            if result.wasSuccessful():
                passed.append(f"{mixin.tests.__name__}.{name}")
    assert not passed
