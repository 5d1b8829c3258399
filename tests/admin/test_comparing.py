"""Comparing two storages: every difference is found, and what is no difference isn't told as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.serialize import ObjectWriter
from ZODB.utils import p64

from zeoid.admin.comparing import differences
from zeoid.admin.reading import Reading
from zeoid.errors import CopyFailed

FIRST_TID = 0x0400_0000_0000_0000
BLOB = ObjectWriter().serialize(Blob())


@dataclass(frozen=True)
class Written:
    """A transaction as a test writes it; blobs are bytes in a file."""

    number: int
    records: dict[int, bytes | None]
    status: str = " "
    user: bytes = b"user"
    description: bytes = b"description"
    extension: Any = field(default_factory=dict)
    blobs: dict[int, bytes] = field(default_factory=dict)

    @property
    def tid(self) -> bytes:
        return p64(FIRST_TID + self.number)


Make = Callable[..., Reading]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes storages of the transactions that it is given."""
    with contextlib.ExitStack() as stack:

        def make_reading(name: str, written: list[Written], *, without_history: bool = False) -> Reading:
            storage = FileStorage(str(tmp_path / f"{name}.fs"), blob_dir=str(tmp_path / f"{name}-blobs"))
            stack.callback(storage.close)
            for one in written:
                meta = TransactionMetaData(one.user, one.description, one.extension)
                storage.tpc_begin(meta, one.tid, one.status)
                for oid, data in one.records.items():
                    if oid in one.blobs:
                        file = tmp_path / "blob"
                        file.write_bytes(one.blobs[oid])
                        storage.restoreBlob(p64(oid), one.tid, data, str(file), None, meta)
                    else:
                        storage.restore(p64(oid), one.tid, data, "", None, meta)
                storage.tpc_vote(meta)
                storage.tpc_finish(meta)
            if without_history:
                storage.keep_history = False
            return stack.enter_context(Reading(storage, name))

        yield make_reading


WRITTEN = [
    Written(0, {0: b"root", 1: b"one"}),
    Written(1, {1: b"one more", 2: BLOB}, blobs={2: b"of two"}, extension={"path": ["a", 1]}),
    Written(2, {0: None, 3: b"three"}, status="p"),
]


def differing(source: Reading, destination: Reading) -> list[str]:
    """What is told, and that everything is."""
    found = list(differences(source, destination, source.last_tid, lambda: None))
    assert len(found) >= len(list(source.storage.iterator()))
    return [what for what in found if what is not None]


def test_nothing_differs(make: Make) -> None:
    ticks: list[None] = []
    source, destination = make("source", WRITTEN), make("destination", WRITTEN)
    found = list(differences(source, destination, source.last_tid, lambda: ticks.append(None)))
    assert found == [None] * 3
    assert len(ticks) > 2 * 6


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"status": "p"}, "its status is ' ' in the source and 'p' in the destination"),
        ({"user": b"another"}, "its user is b'user' in the source and b'another' in the destination"),
        ({"description": b""}, "its description is b'description' in the source and b'' in the destination"),
        ({"extension": {"path": ["a", 2]}}, "its extension differs"),
        ({"extension": {}}, "its extension differs"),
        ({"records": {1: b"one mora", 2: BLOB}}, f"object {p64(1).hex()} differs"),
        ({"records": {1: None, 2: BLOB}}, f"object {p64(1).hex()} differs"),
        ({"records": {2: BLOB}}, f"object {p64(1).hex()} is missing in the destination"),
        (
            {"records": {1: b"one more", 2: BLOB, 9: b"nine"}},
            f"object {p64(9).hex()} is in the destination only",
        ),
        ({"blobs": {2: b"of twO"}}, f"object {p64(2).hex()} differs"),
        ({"blobs": {2: b""}}, f"object {p64(2).hex()} differs"),
        ({"blobs": {}}, f"object {p64(2).hex()} differs"),
    ],
    ids=lambda part: ",".join(part) if isinstance(part, dict) else "",
)
def test_a_difference_within_a_transaction(make: Make, changed: dict[str, Any], what: str) -> None:
    other = [WRITTEN[0], replace(WRITTEN[1], **changed), WRITTEN[2]]
    (told,) = differing(make("source", WRITTEN), make("destination", other))
    assert told.startswith(f"transaction {WRITTEN[1].tid.hex()} (")
    assert told.endswith(f"UTC): {what}")


def test_a_deletion_that_is_missing(make: Make) -> None:
    other = [*WRITTEN[:2], replace(WRITTEN[2], records={0: b"root", 3: b"three"})]
    (told,) = differing(make("source", WRITTEN), make("destination", other))
    assert told.endswith(f"object {p64(0).hex()} differs")


def test_a_blob_that_is_missing_in_both_is_no_difference(make: Make) -> None:
    written = [WRITTEN[0], replace(WRITTEN[1], blobs={}), WRITTEN[2]]
    assert differing(make("source", written), make("destination", written)) == []


@pytest.mark.parametrize("empty_in", ["source", "destination"])
def test_a_blob_that_is_missing_is_not_an_empty_one(make: Make, empty_in: str) -> None:
    written = {True: replace(WRITTEN[1], blobs={2: b""}), False: replace(WRITTEN[1], blobs={})}
    readings = [make(name, [WRITTEN[0], written[name == empty_in]]) for name in ("source", "destination")]
    (told,) = differing(*readings)
    assert told.endswith(f"object {p64(2).hex()} differs")


def test_the_order_of_records_is_no_difference(make: Make) -> None:
    other = [
        replace(one, records=dict(reversed(one.records.items()))) for one in WRITTEN
    ]
    assert differing(make("source", WRITTEN), make("destination", other)) == []


def test_a_list_that_became_a_tuple_is_no_difference(make: Make) -> None:
    """It does on the way through the coding M5."""
    other = [WRITTEN[0], replace(WRITTEN[1], extension={"path": ("a", 1)}), WRITTEN[2]]
    assert differing(make("source", WRITTEN), make("destination", other)) == []


@pytest.mark.parametrize("same", [True, False])
def test_an_extension_of_a_class_that_is_not_here(make: Make, same: bool) -> None:
    pickles = [b"\x80\x03cno.such.module\nThing\nq\x01.", b"\x80\x03cno.such.module\nThing\n."]
    source = [replace(WRITTEN[0], extension=pickles[0])]
    other = [replace(WRITTEN[0], extension=pickles[not same])]
    told = differing(make("source", source), make("destination", other))
    assert [what.rpartition(": ")[2] for what in told] == ([] if same else ["its extension differs"])


@pytest.mark.parametrize("missing", range(3))
def test_a_transaction_that_is_missing(make: Make, missing: int) -> None:
    other = [one for one in WRITTEN if one.number != missing]
    (told,) = differing(make("source", WRITTEN), make("destination", other))
    assert told.startswith(f"transaction {WRITTEN[missing].tid.hex()} (")
    assert told.endswith("it is missing in the destination")


@pytest.mark.parametrize("extra", range(3))
def test_a_transaction_that_is_not_in_the_source(make: Make, extra: int) -> None:
    other = [one for one in WRITTEN if one.number != extra]
    (told,) = differing(make("source", other), make("destination", WRITTEN))
    assert told.startswith(f"transaction {WRITTEN[extra].tid.hex()} (")
    assert told.endswith("is in the destination only")


def test_an_empty_destination(make: Make) -> None:
    assert len(differing(make("source", WRITTEN), make("destination", []))) == 3


def test_what_cannot_be_read_is_no_difference_but_an_error(make: Make, tmp_path: Path) -> None:
    source, destination = make("source", WRITTEN), make("destination", WRITTEN)
    with (tmp_path / "destination.fs").open("r+b") as file:
        file.seek(4 + 8)
        file.write(p64(1 << 40))
    with pytest.raises(CopyFailed, match="destination is damaged"):
        differing(source, destination)


# A destination without history ------------------------------------------------------------------------

# What of WRITTEN is left where each object has its newest revision only.
NEWEST = [
    replace(WRITTEN[1], user=b"", description=b"", extension={}),
    replace(WRITTEN[2], records={3: b"three"}, status=" ", user=b"", description=b""),
]


def test_what_is_superseded_may_be_missing(make: Make) -> None:
    destination = make("destination", NEWEST, without_history=True)
    assert differing(make("source", WRITTEN), destination) == []


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (NEWEST[1:], f"object {p64(1).hex()} is missing in the destination"),
        ([replace(NEWEST[0], records={2: BLOB}), NEWEST[1]], f"object {p64(1).hex()} is missing in the"),
        ([replace(NEWEST[0], records={1: b"no", 2: BLOB}), NEWEST[1]], f"object {p64(1).hex()} differs"),
        ([replace(NEWEST[0], blobs={2: b"no"}), NEWEST[1]], f"object {p64(2).hex()} differs"),
        ([replace(NEWEST[1], number=0, records={0: b"root"}), *NEWEST], f"object {p64(0).hex()} is missing"),
    ],
    ids=["transaction", "object", "data", "blob", "deletion"],
)
def test_what_is_newest_may_not(make: Make, other: list[Written], what: str) -> None:
    destination = make("destination", other, without_history=True)
    told = differing(make("source", WRITTEN), destination)
    assert told
    assert any(what in one for one in told)


def test_history_that_the_source_has_lost_is_told(make: Make) -> None:
    """It can't have been copied from there."""
    source = make("source", NEWEST, without_history=True)
    (told,) = differing(source, make("destination", [WRITTEN[0], *NEWEST]))
    assert told.endswith("is in the destination only")
