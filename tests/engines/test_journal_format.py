"""The journal's bytes: whatever is written can be read again, what was written once can be read for ever."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines.journals import (
    NAME,
    SEGMENT_BYTES,
    START,
    Quick,
    base,
    batch,
    create,
    expected,
    mark,
    read,
    told,
    transaction,
)
from zeoid.engines.journal import (
    Base,
    Batch,
    Direct,
    Entry,
    Journal,
    LoggedBlob,
    LoggedTransaction,
    OidMark,
    Place,
    Record,
)
from zeoid.engines.journal_format import (
    Head,
    Header,
    Malformed,
    claimed_end,
    entry_of,
    framed,
    header_of,
    marker,
    payload_of,
    record_at,
    records_after,
)
from zeoid.errors import ConfigurationError

GOLDEN = Path(__file__).parent / "golden" / "journal-2"
#: As it was before there were blobs.
GOLDEN_1 = Path(__file__).parent / "golden" / "journal-1"

names = st.binary(min_size=8, max_size=8)
numbers = st.integers(0, 2**63)
ids = st.binary(max_size=40)
records = st.builds(Record, names, st.none() | st.binary(max_size=300), st.none() | names)
blobs = st.lists(st.builds(LoggedBlob, names, st.binary(min_size=16, max_size=16)), max_size=3).map(tuple)
transactions = st.builds(
    LoggedTransaction,
    names, ids, st.binary(max_size=20), st.binary(max_size=20), st.binary(max_size=20),
    st.characters(codec="ascii"), st.lists(records, max_size=5).map(tuple), blobs,
)  # fmt: skip
batches = st.builds(Batch, st.lists(transactions, max_size=4).map(tuple))
bases = st.builds(Base, st.lists(st.builds(Place, numbers, names), min_size=1, max_size=3).map(tuple))
marks = st.builds(OidMark, names)
directs = st.builds(Direct, names, ids, numbers, numbers, blobs)
heads = st.builds(
    Head,
    st.lists(st.tuples(ids, names), max_size=5).map(tuple), names, names, names, numbers, bases,
    st.lists(directs, max_size=3).map(tuple),
)  # fmt: skip


@given(batches | bases | marks | directs | heads)
def test_every_entry_is_read_as_it_was_written(entry: Entry | Head) -> None:
    assert entry_of(msgpack.packb(payload_of(entry))) == entry


@given(st.binary(max_size=200))
def test_any_bytes_are_an_entry_or_malformed(payload: bytes) -> None:
    try:
        entry_of(payload)
    except Malformed:
        return
    assert msgpack.packb(payload_of(entry_of(payload)))


@given(st.recursive(st.none() | st.integers() | st.binary(max_size=9) | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner)),
       st.sampled_from(["batch", "base", "oid-mark", "direct", "head"]))  # fmt: skip
def test_any_value_is_an_entry_or_malformed(value: object, kind: str) -> None:
    arguments = value if isinstance(value, list) else [value]
    try:
        payload = msgpack.packb([kind, *arguments])
    except OverflowError:
        return
    try:
        entry = entry_of(payload)
    except Malformed:
        return
    assert entry_of(msgpack.packb(payload_of(entry))) == entry


@given(
    st.lists(st.binary(max_size=100), min_size=1, max_size=5), st.integers(0, 2**40), st.binary(max_size=50)
)
def test_records_are_found_where_they_are_and_nowhere_else(
    payloads: list[bytes], sequence: int, before: bytes
) -> None:
    mark = marker(NAME, 1)
    data = before + b"".join(framed(mark, sequence, payloads)) + bytes(10)
    offset = len(before)
    for index, payload in enumerate(payloads):
        record = record_at(data, offset, mark)
        assert record is not None
        assert (record.sequence, record.before, record.payload) == (sequence + index, index, payload)
        assert record.append == sequence
        offset = record.end
    assert record_at(data, offset, mark) is None
    assert [found.payload for _, found in records_after(data, 0, mark) if found] == payloads


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_record_with_one_byte_changed_or_cut_short_is_none(payload: bytes, data: st.DataObject) -> None:
    mark = marker(NAME, 1)
    record = bytearray(b"".join(framed(mark, 7, [payload])))
    assert record_at(bytes(record[:-1]), 0, mark) is None
    position = data.draw(st.integers(0, len(record) - 1))
    record[position] ^= data.draw(st.integers(1, 255))
    assert record_at(bytes(record), 0, mark) is None
    assert 0 < claimed_end(bytes(record), 0, mark) <= len(record)


def test_a_record_of_one_segment_is_none_of_another() -> None:
    marks = {marker(NAME, number) for number in range(5000)}
    assert len(marks) == 5000
    assert marker(b"x" * 16, 1) not in marks


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_header_is_read_for_its_own_segment_only(name: bytes, segment: int, first: int) -> None:
    header = Header(name, segment, first)
    assert header_of(header.encoded() + b"rest", segment) == header
    assert header_of(header.encoded(), segment ^ 1) is None
    assert header_of(header.encoded()[:-1], segment) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(batches | bases | marks | directs, min_size=1, max_size=4), max_size=12))
def test_a_journal_tells_every_entry_after_the_newest_base(
    tmp_path_factory: pytest.TempPathFactory, appends: list[list[Entry]]
) -> None:
    directory = tmp_path_factory.mktemp("any") / "Data.fs.journal"
    journal = create(directory, last_tid=bytes(8))
    for entries in appends:
        journal.append(*entries)
    known = journal.outcomes, journal.floor, journal.oid_mark, journal.last_tid, journal.unsettled_bytes
    journal.close()
    written = [entry for entries in appends for entry in entries]
    contents = read(directory)
    assert contents is not None
    assert contents.tail is None
    wanted = expected(written)
    found = [entry for entry in contents.entries if not isinstance(entry, Direct)]
    assert found == [entry for entry in wanted.entries if not isinstance(entry, Direct)]
    assert contents.entries[len(contents.entries) - len(wanted.entries) :] == wanted.entries
    assert (contents.base, contents.oid_mark) == (wanted.base, wanted.oid_mark)
    assert known == (
        contents.outcomes, contents.floor, contents.oid_mark, contents.last_tid, contents.unsettled_bytes
    )  # fmt: skip


# What was written once -----------------------------------------------------------------------------------


def golden_entries(version: int = 2) -> list[tuple[Entry, ...]]:
    """What is in the golden journal: every kind of entry, more than one segment, several in one append."""
    blobs = tuple(LoggedBlob(bytes(7) + bytes([number]), bytes([number]) * 16) for number in (1, 3))
    blobs = blobs if version > 1 else ()
    everything = LoggedTransaction(
        b"\x03\xf0\x00\x00\x00\x00\x00\x01", b"an id", "ä user".encode(), b"a description",
        b"\x80\x04}\x94.", "p",
        (
            Record(b"\0" * 7 + b"\1", b"some data" * 20),
            Record(b"\0" * 7 + b"\2", None),
            Record(b"\0" * 7 + b"\3", b"as before", b"\x03\xef" + bytes(6)),
        ),
        blobs,
    )  # fmt: skip
    return [
        (batch(1),),
        (base(1),),
        (mark(500), Batch((everything, transaction(2**62, id=b""))), mark(600)),
        (batch(2**62 + 1, size=1500),),
        (Base((Place(2**33, (2**62 + 1).to_bytes(8, "big")), Place(77, bytes(8)))),),
        (batch(2**62 + 2, 2**62 + 3),),
        (Direct((2**62 + 4).to_bytes(8, "big"), b"large", 2**33, 2**31, blobs),),
        (mark(2**40),),
    ]


def write_golden(directory: Path) -> Journal:
    journal = create(directory)
    for entries in golden_entries():
        journal.append(*entries)
    journal.prepare_spare()
    return journal


def contents_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def flat(appends: Iterable[tuple[Entry, ...]]) -> list[Entry]:
    return [entry for entries in appends for entry in entries]


@pytest.mark.parametrize(("golden", "version"), [(GOLDEN_1, 1), (GOLDEN, 2)])
def test_every_version_is_read_for_ever(golden: Path, version: int) -> None:
    assert told(read(golden)) == expected(flat(golden_entries(version)))
    contents = read(golden)
    assert contents is not None
    assert contents.name == NAME
    assert contents.tail is None
    assert [(segment.number, segment.state) for segment in contents.segments] == [
        (2, "in use"),
        (3, "in use"),
        (4, "spare"),
    ]


def test_it_is_written_byte_for_byte_as_it_was(tmp_path: Path) -> None:
    write_golden(tmp_path / "journal").close()
    assert contents_of(tmp_path / "journal") == contents_of(GOLDEN)


@pytest.mark.parametrize("golden", [GOLDEN_1, GOLDEN])
def test_it_can_be_gone_on_with(tmp_path: Path, golden: Path) -> None:
    directory = tmp_path / "journal"
    directory.mkdir()
    for name, data in contents_of(golden).items():
        (directory / name).write_bytes(data)
    contents = Journal.read(directory, Quick())
    assert contents is not None
    journal = Journal.open(directory, Quick(), contents)
    journal.append(START)
    journal.close()
    after = Journal.read(directory, Quick())
    assert after is not None
    assert (after.base, after.entries[1:]) == (START, [])


def test_nothing_is_added_to_a_segment_of_another_version(tmp_path: Path) -> None:
    """A Zeoid that knows that one only shall say that a newer one was here, not that there is damage."""
    directory = tmp_path / "journal"
    directory.mkdir()
    for name, data in contents_of(GOLDEN_1).items():
        (directory / name).write_bytes(data)
    contents = Journal.read(directory, Quick())
    assert contents is not None
    journal = Journal.open(directory, Quick(), contents, segment_bytes=SEGMENT_BYTES)
    journal.reserve(100)
    journal.append(batch(2**62 + 5))
    journal.append(batch(2**62 + 6))
    journal.close()
    versions = {}
    for path in directory.glob("*.log"):
        header = header_of(path.read_bytes(), int(path.stem))
        versions[int(path.stem)] = header and header.version
    assert versions == {2: 1, 3: 1, 4: 2}
    assert contents_of(directory)[f"{3:016}.log"] == contents_of(GOLDEN_1)[f"{3:016}.log"]
    again = Journal.read(directory, Quick())
    assert again is not None
    assert again.entries == [*contents.entries, batch(2**62 + 5), batch(2**62 + 6)]
    journal = Journal.open(directory, Quick(), again, segment_bytes=SEGMENT_BYTES)
    journal.append(START)
    journal.close()
    assert Journal.read(directory, Quick()) is not None


@pytest.mark.parametrize("version", [0, 3])
def test_a_version_that_is_not_known_is_refused(version: int) -> None:
    with pytest.raises(ConfigurationError, match="newer Zeoid"):
        header_of(Header(NAME, 1, 1, version).encoded(), 1)


@pytest.mark.parametrize("blob", [LoggedBlob(b"7 bytes", bytes(16)), LoggedBlob(bytes(8), bytes(15))])
def test_a_blob_that_could_not_be_read_again_is_refused(blob: LoggedBlob) -> None:
    for entry in (
        Direct(bytes(8), b"", 0, 0, (blob,)),
        Batch((LoggedTransaction(bytes(8), b"", b"", b"", b"", " ", (), (blob,)),)),
    ):
        with pytest.raises(ValueError, match="bytes"):
            payload_of(entry)
    for payload in (
        ["direct", bytes(8), b"", 0, 0, [[blob.oid, blob.name]]],
        ["batch", [[bytes(8), b"", b"", b"", b"", " ", [], [[blob.oid, blob.name]]]]],
    ):
        with pytest.raises(Malformed):
            entry_of(msgpack.packb(payload))


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_number_that_could_not_be_read_again_is_refused(number: int) -> None:
    for entry in (
        Base((Place(number, bytes(8)),)),
        Direct(bytes(8), b"", number, 0),
        Direct(bytes(8), b"", 0, number),
    ):
        with pytest.raises(ValueError, match="64 bits"):
            payload_of(entry)
