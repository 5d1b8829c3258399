"""The commit journal without power cuts: what it tells, what it refuses, what it does with its segments."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest

from tests.engines.journals import (
    NAME,
    REMEMBERED,
    SEGMENT_BYTES,
    START,
    Quick,
    base,
    batch,
    create,
    direct,
    expected,
    mark,
    read,
    reopen,
    tid,
    told,
    transaction,
)
from zeoid.engines.disk import Disk
from zeoid.engines.journal import (
    Base,
    Batch,
    Direct,
    Entry,
    Journal,
    JournalDamaged,
    LoggedTransaction,
    OidMark,
    Record,
    dump,
)
from zeoid.engines.journal_format import HEADER_BYTES, VERSION, Header, framed, marker, payload_of
from zeoid.engines.journal_reading import segment_path
from zeoid.errors import ConfigurationError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "Data.fs.journal"


def written(directory: Path, *appends: tuple[Entry, ...]) -> list[Entry]:
    """A new journal with these entries, closed."""
    journal = create(directory)
    for entries in appends:
        journal.append(*entries)
    journal.close()
    return [entry for entries in appends for entry in entries]


def segments(directory: Path) -> dict[str, list[int]]:
    contents = read(directory)
    assert contents is not None
    found: dict[str, list[int]] = {"in use": [], "spare": [], "obsolete": []}
    for segment in contents.segments:
        found[segment.state].append(segment.number)
    return found


#: Three segments, each with several appends; nothing of it is settled.
THREE_SEGMENTS: list[tuple[Entry, ...]] = [
    *((batch(number, size=400),) for number in range(1, 9)),
    (mark(7), batch(9), mark(8)),
    (batch(10),),
]

# What it tells -----------------------------------------------------------------------------------------


def test_no_directory_and_an_empty_one_are_no_journal(directory: Path) -> None:
    assert read(directory) is None
    directory.mkdir()
    assert read(directory) is None
    (directory / "torn-1-48").write_bytes(b"left")
    (directory / "123.log").write_bytes(b"")
    assert read(directory) is None


def test_a_new_journal_tells_what_it_was_given(directory: Path) -> None:
    outcomes = [(b"a", tid(1)), (b"b", tid(2))]
    journal = create(directory, last_tid=tid(9), oid_mark=tid(5), floor=tid(1), outcomes=outcomes)
    journal.close()
    contents = read(directory)
    assert contents is not None
    assert (contents.last_tid, contents.oid_mark, contents.floor) == (tid(9), tid(5), tid(1))
    assert (contents.outcomes, contents.base, contents.entries) == (outcomes, START, [])
    assert (contents.name, contents.tail, contents.unsettled_bytes) == (NAME, None, 0)


def test_names_of_journals_are_random(tmp_path: Path) -> None:
    made = [create(tmp_path / str(number), name=None) for number in range(2)]
    for journal in made:
        journal.close()
    assert made[0].name != made[1].name
    assert len(made[0].name) == 16


def test_a_journal_that_exists_is_not_made_again(directory: Path) -> None:
    entries = written(directory, (batch(1),))
    with pytest.raises(ConfigurationError, match="move it away"):
        create(directory)
    assert told(read(directory)) == expected(entries)


def test_an_open_journal_knows_what_a_reader_would_find(directory: Path) -> None:
    journal = create(directory)
    for entries in [*THREE_SEGMENTS, (base(10), batch(11)), (direct(12),), (base(12),)]:
        journal.append(*entries)
        contents = read(directory)
        assert contents is not None
        assert journal.last_tid == contents.last_tid
        assert (journal.outcomes, journal.floor) == (contents.outcomes, contents.floor)
        assert (journal.oid_mark, journal.base) == (contents.oid_mark, contents.base)
        assert journal.unsettled_bytes == contents.unsettled_bytes
    journal.close()


def test_reading_changes_nothing(directory: Path) -> None:
    written(directory, *THREE_SEGMENTS)
    shorten(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert read(directory) is not None
    assert list(dump(directory, Disk()))
    assert before == {path.name: path.read_bytes() for path in directory.iterdir()}


def test_outcomes_are_bounded_and_the_floor_tells_from_where_they_are_complete(directory: Path) -> None:
    appends: list[tuple[Entry, ...]] = [(batch(number),) for number in range(1, REMEMBERED + 3)]
    written(directory, *appends, (Batch((transaction(50, 1, id=b""),)),))
    contents = read(directory)
    assert contents is not None
    assert contents.outcomes == [(b"id-%d" % each, tid(each)) for each in range(3, REMEMBERED + 3)]
    assert contents.floor == tid(2)
    assert contents.last_tid == tid(50)


@pytest.mark.parametrize(
    ("after", "committed"),
    [
        ([], False),
        ([base(2)], True),
        ([base(1)], False),
        ([base(1), base(2)], True),
        ([base(1, 2)], True),
        ([base(3), base(2)], False),
        ([batch(2), base(2)], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("rolls", [0, 1, 2])
def test_a_large_transaction_is_committed_only_by_a_base_with_its_tid(
    directory: Path, after: list[Entry], committed: bool, rolls: int
) -> None:
    journal = create(directory)
    journal.append(batch(1), direct(2))
    ids = [b"id-1", b"id-2"] if committed or batch(2) in after else [b"id-1"]
    for entry in after:
        for number in range(rolls):  # into another segment, so that its head has to tell of it
            journal.append(*(mark(number) for _ in range(45)))
        journal.append(entry)
    assert [id for id, _ in journal.outcomes] == ids
    journal.close()
    contents = read(directory)
    assert contents is not None
    assert [id for id, _ in contents.outcomes] == ids
    assert (contents.last_tid == tid(1)) == (not committed and after in ([], [base(1)]))


def test_an_undecided_large_transaction_is_told_of_after_a_base_that_came_in_between(directory: Path) -> None:
    written(directory, (batch(1), direct(2)), (base(1),))
    contents = read(directory)
    assert contents is not None
    assert contents.entries == [direct(2)]


# Segments ----------------------------------------------------------------------------------------------


def test_segments_before_a_base_follow_the_newest_one(directory: Path) -> None:
    written(directory, *THREE_SEGMENTS)
    assert segments(directory) == {"in use": [1, 2, 3], "spare": [], "obsolete": []}
    journal = reopen(directory)
    journal.append(base(10))
    journal.close()
    assert segments(directory) == {"in use": [3], "spare": [4, 5], "obsolete": []}


def test_a_spare_is_made_once_and_used(directory: Path) -> None:
    journal = create(directory)
    journal.prepare_spare()
    journal.prepare_spare()
    assert sorted(os.listdir(directory)) == ["0000000000000001.log", "0000000000000002.log"]
    inode = (directory / "0000000000000002.log").stat().st_ino
    entries = [batch(number, size=1000) for number in (1, 2)]
    journal.append(entries[0])
    journal.append(entries[1])
    journal.close()
    assert told(read(directory)) == expected(entries)
    assert segments(directory)["in use"] == [1, 2]
    assert (directory / "0000000000000002.log").stat().st_ino == inode


def test_only_a_few_spares_are_kept(directory: Path) -> None:
    journal = create(directory)
    for number in range(1, 12):
        journal.append(batch(number, size=1200))
    assert len(os.listdir(directory)) == 11
    journal.append(base(11))
    journal.close()
    assert segments(directory) == {"in use": [11], "spare": [12, 13, 14, 15], "obsolete": []}


def test_what_is_larger_than_a_segment_gets_a_larger_one_which_is_not_kept(directory: Path) -> None:
    journal = create(directory)
    large = batch(1, 2, 3, size=SEGMENT_BYTES)
    journal.append(large)
    journal.append(batch(4))
    journal.close()
    assert told(read(directory)) == expected([large, batch(4)])
    journal = reopen(directory)
    journal.append(base(4), batch(5, size=1500))
    journal.append(batch(6, size=2 * SEGMENT_BYTES))
    journal.append(batch(7, size=1500))
    journal.append(base(7))
    journal.close()
    sizes = {path.stat().st_size for path in directory.iterdir()}
    assert sizes == {SEGMENT_BYTES}


def test_bytes_of_a_reused_segment_are_never_taken_for_records(directory: Path) -> None:
    """Each segment is reused, and written with records as long as those that are in it still."""
    journal = create(directory)
    entries: list[Entry] = []
    for number in range(1, 60):
        entries.append(batch(number, size=150))
        journal.append(entries[-1])
        if number % 11 == 0:
            entries.append(base(number))
            journal.append(entries[-1])
        contents = read(directory)
        assert told(contents) == expected(entries)
        assert contents is not None
        assert contents.tail is None
    journal.close()
    assert max(segments(directory)["in use"]) > 5


def test_opening_puts_spares_in_order_and_removes_what_a_crash_left(directory: Path) -> None:
    entries = written(directory, *THREE_SEGMENTS, (base(10), batch(11)))
    assert segments(directory) == {"in use": [3], "spare": [4, 5], "obsolete": []}
    files = {number: directory / f"{number:016}.log" for number in range(1, 9)}
    shutil.copy(files[4], files[8])
    shutil.copy(files[4], files[1])
    files[4].unlink()
    (directory / "new-segment").write_bytes(b"\0" * 100)
    files[7].write_bytes(b"\0" * 100)  # an incomplete one
    assert told(read(directory)) == expected(entries)
    reopen(directory).close()
    assert segments(directory) == {"in use": [3], "spare": [4, 5, 6], "obsolete": []}
    assert sorted(os.listdir(directory)) == [files[number].name for number in (3, 4, 5, 6)]
    assert told(read(directory)) == expected(entries)


def test_obsolete_segments_that_a_crash_left_are_used_again(directory: Path, tmp_path: Path) -> None:
    written(directory, *THREE_SEGMENTS)
    shutil.copytree(directory, tmp_path / "before")
    journal = reopen(directory)
    journal.append(base(10))
    journal.close()
    (directory / "0000000000000005.log").unlink()
    shutil.copy(tmp_path / "before" / "0000000000000001.log", directory)  # and the second one is lost
    assert segments(directory) == {"in use": [3], "spare": [4], "obsolete": [1]}
    reopen(directory).close()
    assert segments(directory) == {"in use": [3], "spare": [4, 5], "obsolete": []}


# What it refuses ---------------------------------------------------------------------------------------


def shorten(directory: Path) -> None:
    """Cut the last byte off the newest record, as a power cut may do."""
    contents = read(directory)
    assert contents is not None
    path = directory / f"{contents.end.segment:016}.log"
    data = bytearray(path.read_bytes())
    data[contents.end.offset - 1] ^= 0xFF
    path.write_bytes(data)


def test_a_torn_append_is_reported_kept_and_overwritten(directory: Path) -> None:
    entries = written(directory, (batch(1),), (batch(2),))
    sound = read(directory)
    assert sound is not None
    shorten(directory)
    torn = read(directory)
    assert torn is not None
    assert torn.tail is not None
    assert told(torn) == expected(entries[:1])
    assert torn.tail.offset + torn.tail.size == sound.end.offset
    journal = reopen(directory)
    kept = directory / f"torn-1-{torn.tail.offset}"
    assert kept.stat().st_size == torn.tail.size
    journal.append(batch(3))
    journal.close()
    assert told(read(directory)) == expected([batch(1), batch(3)])


def test_torn_appends_at_the_same_place_are_kept_apart(directory: Path) -> None:
    written(directory, (batch(1),))
    for number in (2, 3, 4):
        journal = reopen(directory)
        journal.append(batch(number, size=number))
        journal.close()
        shorten(directory)
    reopen(directory).close()
    kept = sorted(path.name for path in directory.iterdir() if path.name.startswith("torn-"))
    assert len(kept) == 3
    assert len({(directory / name).read_bytes() for name in kept}) == 3


def test_rests_of_a_torn_append_do_not_come_back(directory: Path) -> None:
    """Its second record is whole, and has the number that the next append will give to its second record."""
    written(directory, (batch(1),), (batch(2), batch(3)))
    contents = read(directory)
    assert contents is not None
    path = directory / "0000000000000001.log"
    data = bytearray(path.read_bytes())
    data[contents.end.last_append + 40] ^= 1
    path.write_bytes(data)
    torn = read(directory)
    assert torn is not None
    assert torn.tail is not None
    journal = reopen(directory)
    journal.append(batch(9))  # as long as the lost one
    journal.close()
    assert told(read(directory)) == expected([batch(1), batch(9)])


def test_a_flipped_bit_is_refused_wherever_it_would_lose_what_was_durable(directory: Path) -> None:
    entries = written(directory, *THREE_SEGMENTS)
    contents = read(directory)
    assert contents is not None
    sound = {number: (directory / f"{number:016}.log").read_bytes() for number in (1, 2, 3)}
    used = {1: None, 2: None, 3: contents.end.last_append}
    refused = 0
    for number, data in sound.items():
        path = directory / f"{number:016}.log"
        for offset in range(number % 2, used[number] or len(data.rstrip(b"\0")), 2):
            changed = bytearray(data)
            changed[offset] ^= 1 << offset % 8
            path.write_bytes(changed)
            with pytest.raises(JournalDamaged):
                read(directory)
            refused += 1
        path.write_bytes(data)
    assert refused > SEGMENT_BYTES
    assert told(read(directory)) == expected(entries)


def test_a_flipped_bit_in_the_newest_append_leaves_what_was_before(directory: Path) -> None:
    entries = written(directory, *THREE_SEGMENTS)
    contents = read(directory)
    assert contents is not None
    path = directory / "0000000000000003.log"
    data = path.read_bytes()
    for offset in range(contents.end.last_append, len(data)):
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        whole = offset >= contents.end.offset
        assert told(read(directory)) == expected(entries if whole else entries[:-1])


def test_damage_says_where_it_is(directory: Path) -> None:
    written(directory, (batch(1),), (batch(2),), (batch(3),))
    path = directory / "0000000000000001.log"
    data = bytearray(path.read_bytes())
    place = data.index(b"id-2")
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalDamaged, match="record 4 follows") as caught:
        read(directory)
    assert (caught.value.segment, caught.value.sequence) == (1, 3)
    assert place - 100 < caught.value.offset < place
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_segment_is_refused(directory: Path, missing: int) -> None:
    written(directory, *THREE_SEGMENTS)
    (directory / f"{missing:016}.log").unlink()
    with pytest.raises(JournalDamaged, match="no such segment"):
        read(directory)


def test_a_segment_of_another_journal_is_refused(directory: Path, tmp_path: Path) -> None:
    written(directory, *THREE_SEGMENTS)
    other = create(tmp_path / "other", name=b"x" * 16)
    for entries in THREE_SEGMENTS:
        other.append(*entries)
    other.close()
    shutil.copy(tmp_path / "other" / "0000000000000002.log", directory)
    with pytest.raises(JournalDamaged, match="another journal"):
        read(directory)


@pytest.mark.parametrize("content", [b"", bytes(SEGMENT_BYTES)], ids=["empty", "zeros"])
def test_a_first_segment_without_a_beginning_is_damage(directory: Path, content: bytes) -> None:
    """It gets its name when its beginning is durable."""
    directory.mkdir()
    (directory / "0000000000000001.log").write_bytes(content)
    with pytest.raises(JournalDamaged, match="header"):
        read(directory)


def test_a_damaged_header_of_the_newest_segment_does_not_hide_what_is_in_it(directory: Path) -> None:
    written(directory, *THREE_SEGMENTS)
    path = directory / "0000000000000003.log"
    data = path.read_bytes()
    path.write_bytes(bytes(HEADER_BYTES) + data[HEADER_BYTES:])
    with pytest.raises(JournalDamaged, match="follows"):
        read(directory)


def change(directory: Path, segment: int, offset: int, data: bytes) -> None:
    path = directory / f"{segment:016}.log"
    before = path.read_bytes()
    path.write_bytes(before[:offset] + data + before[offset + len(data) :])


def two_segments(directory: Path) -> tuple[list[Entry], int]:
    """The second one has been begun with one append; the entries, and where the first one ends."""
    journal = create(directory)
    first: Entry = batch(1, size=1000)
    journal.append(first)
    contents = read(directory)
    assert contents is not None
    journal.append(batch(2, size=1000))
    journal.close()
    assert segments(directory)["in use"] == [1, 2]
    return [first, batch(2, size=1000)], contents.end.offset


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, bytes(HEADER_BYTES)),
        (HEADER_BYTES, b"x" * 20),
        (HEADER_BYTES, bytes(SEGMENT_BYTES - HEADER_BYTES)),
    ],
    ids=["header", "head", "all but the header"],
)
def test_a_segment_whose_beginning_was_torn_was_not_begun(directory: Path, offset: int, data: bytes) -> None:
    entries, _ = two_segments(directory)
    change(directory, 2, offset, data)
    contents = read(directory)
    assert told(contents) == expected(entries[:1])
    assert contents is not None
    assert contents.tail is not None
    assert (contents.tail.segment, contents.tail.offset) == (2, 0)
    journal = reopen(directory)
    assert segments(directory) == {"in use": [1], "spare": [2], "obsolete": []}
    journal.append(batch(3, size=900))
    journal.close()
    assert told(read(directory)) == expected([entries[0], batch(3, size=900)])
    assert segments(directory)["in use"] == [1, 2]


@pytest.mark.parametrize(
    ("offsets", "segment"),
    [([0], 2), ([HEADER_BYTES], 1), ([0, HEADER_BYTES + 40, 400], 1)],
    ids=["header", "head", "every part"],
)
def test_a_torn_beginning_excuses_nothing_in_the_segment_before(
    directory: Path, offsets: list[int], segment: int
) -> None:
    _, end = two_segments(directory)
    for offset in offsets:
        change(directory, 2, offset, b"x")
    change(directory, 1, end - 1, b"x")
    with pytest.raises(JournalDamaged, match="follows") as caught:
        read(directory)
    assert caught.value.segment == segment


def newer_version(header: bytes) -> bytes:
    fixed = header[:8] + (VERSION + 1).to_bytes(4, "big") + header[12:-4]
    return fixed + zlib.crc32(fixed).to_bytes(4, "big")


def test_a_newer_version_is_no_damage(directory: Path) -> None:
    written(directory, (batch(1),))
    path = directory / "0000000000000001.log"
    data = path.read_bytes()
    path.write_bytes(newer_version(data[:HEADER_BYTES]) + data[HEADER_BYTES:])
    with pytest.raises(ConfigurationError, match="written by a newer Zeoid") as caught:
        read(directory)
    assert not isinstance(caught.value, JournalDamaged)
    assert any("newer Zeoid" in line for line in dump(directory, Disk()))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x91\xa5other",
        b"\x91\xa5batch",
        b"\x92\xa8oid-mark\xa8\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x92\xa8oid-mark\xc4\x07" + bytes(7),
        b"\x92\xa4base\x90",
        b"\x92\xa4base\x91\x92\xff\xc4\x08" + bytes(8),
        b"\x92\xa5batch\x91\x97" + b"\xc4\x08" * 7,
        b"\x91" * 5000,
        b"\x92\x80\x01",
    ],
)
def test_a_whole_record_with_a_payload_that_makes_no_sense_is_refused(
    directory: Path, payload: bytes
) -> None:
    create(directory).close()
    contents = read(directory)
    assert contents is not None
    path = directory / "0000000000000001.log"
    data = bytearray(path.read_bytes())
    record = b"".join(framed(marker(NAME, 1), contents.end.sequence, [payload]))
    data[contents.end.offset : contents.end.offset + len(record)] = record
    path.write_bytes(data)
    with pytest.raises(JournalDamaged) as caught:
        read(directory)
    assert caught.value.offset == contents.end.offset
    assert any("unreadable" in line for line in dump(directory, Disk()))


def test_a_head_in_the_middle_is_refused(directory: Path) -> None:
    create(directory).close()
    contents = read(directory)
    assert contents is not None
    path = directory / "0000000000000001.log"
    data = bytearray(path.read_bytes())
    payload = msgpack.packb(payload_of(contents.head))
    record = b"".join(framed(marker(NAME, 1), contents.end.sequence, [payload]))
    data[contents.end.offset : contents.end.offset + len(record)] = record
    path.write_bytes(data)
    with pytest.raises(JournalDamaged, match="head in the middle"):
        read(directory)


def test_a_whole_record_with_a_number_too_high_is_refused(directory: Path) -> None:
    create(directory).close()
    contents = read(directory)
    assert contents is not None
    path = directory / "0000000000000001.log"
    data = bytearray(path.read_bytes())
    payload = msgpack.packb(payload_of(mark(1)))
    record = b"".join(framed(marker(NAME, 1), contents.end.sequence + 1, [payload]))
    data[contents.end.offset : contents.end.offset + len(record)] = record
    path.write_bytes(data)
    with pytest.raises(JournalDamaged, match="record 3 follows"):
        read(directory)
    assert any("out of order" in line for line in dump(directory, Disk()))


def test_a_header_alone_is_no_journal_that_can_be_trusted(directory: Path) -> None:
    directory.mkdir()
    data = Header(NAME, 1, 1).encoded()
    Path(segment_path(str(directory), 1)).write_bytes(data + bytes(SEGMENT_BYTES - len(data)))
    with pytest.raises(JournalDamaged):
        read(directory)


# Errors ------------------------------------------------------------------------------------------------


class Failing(Quick):
    """A disk on which one method fails from a moment on."""

    def __init__(self) -> None:
        self.failing = ""

    def _fail(self, name: str) -> None:
        if self.failing == name:
            raise OSError(errno.ENOSPC, "no room")

    def sync(self, fd: int) -> None:
        self._fail("sync")

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        self._fail("pwrite")
        super().pwrite(fd, data, offset)

    def rename(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        self._fail("rename")
        super().rename(source, target)

    def reserve(self, fd: int, start: int, length: int) -> None:
        self._fail("reserve")
        super().reserve(fd, start, length)


CALLS: list[Callable[[Journal], None]] = [
    lambda journal: journal.append(batch(2)),
    lambda journal: journal.prepare_spare(),
    lambda journal: journal.reserve(1),
]


@pytest.mark.parametrize("failing", ["sync", "pwrite"])
def test_after_a_failed_append_everything_is_refused(directory: Path, failing: str) -> None:
    disk = Failing()
    journal = create(directory, disk)
    disk.failing = failing
    with pytest.raises(OSError, match="no room"):
        journal.append(batch(1))
    disk.failing = ""
    for call in CALLS:
        with pytest.raises(OSError, match=r"can't be used after OSError.*no room"):
            call(journal)
    assert journal.outcomes == []
    journal.close()


def test_after_close_everything_is_refused_but_another_close(directory: Path) -> None:
    journal = create(directory)
    journal.close()
    journal.close()
    for call in CALLS:
        with pytest.raises(OSError, match="closed"):
            call(journal)


@pytest.mark.parametrize(
    "entry",
    [
        Base(()),
        Batch((transaction(1), LoggedTransaction(b"7", b"", b"", b"", b"", " ", ()))),
        Batch((LoggedTransaction(tid(1), b"", b"", b"", b"", "", ()),)),
        Batch((LoggedTransaction(tid(1), b"", b"", b"", b"", " ", (Record(b"1", b""),)),)),
        Batch((LoggedTransaction(tid(1), b"", b"", b"", b"", " ", (Record(tid(1), b"", b"1"),)),)),
        OidMark(b"123"),
        Direct(b"123", b"", 0, 0),
    ],
)
def test_what_could_not_be_read_again_is_not_written_and_breaks_nothing(
    directory: Path, entry: Entry
) -> None:
    journal = create(directory)
    with pytest.raises(ValueError, match=r"8 bytes|character|place"):
        journal.append(batch(1), entry)
    journal.append(batch(2))
    journal.close()
    assert told(read(directory)) == expected([batch(2)])


def test_a_failure_to_name_a_spare_breaks_the_journal(directory: Path) -> None:
    disk = Failing()
    journal = create(directory, disk)
    disk.failing = "rename"
    with pytest.raises(OSError, match="no room"):
        journal.prepare_spare()
    disk.failing = ""
    with pytest.raises(OSError, match="can't be used"):
        journal.append(batch(1))
    journal.close()


# Room --------------------------------------------------------------------------------------------------


def test_room_for_what_fits_in_the_present_segment_costs_nothing(directory: Path) -> None:
    journal = create(directory)
    journal.reserve(500)
    assert os.listdir(directory) == ["0000000000000001.log"]
    journal.append(batch(1, size=400))
    journal.close()


def test_reserving_more_makes_a_spare(directory: Path) -> None:
    journal = create(directory)
    journal.reserve(SEGMENT_BYTES)
    assert sorted(os.listdir(directory)) == ["0000000000000001.log", "0000000000000002.log"]
    journal.close()


def test_what_was_reserved_goes_into_one_spare_whatever_its_pieces(directory: Path) -> None:
    """Nothing is made while it is appended: there might be no room for that."""
    disk = Failing()
    journal = create(directory, disk)
    entries = [batch(number, size=1500) for number in range(1, 20)]
    journal.reserve(sum(1600 for _ in entries))
    disk.failing = "rename"
    before = sorted(os.listdir(directory))
    for entry in entries:
        journal.append(entry)
    journal.close()
    assert sorted(os.listdir(directory)) == before
    assert told(read(directory)) == expected(entries)


def test_a_spare_has_to_hold_a_head_too(directory: Path) -> None:
    disk = Failing()
    journal = create(directory, disk)
    journal.prepare_spare()
    disk.failing = "reserve"
    with pytest.raises(OSError, match="no room"):
        journal.reserve(SEGMENT_BYTES - 100)
    journal.close()


@pytest.mark.parametrize("failing", ["pwrite", "reserve"])
def test_no_room_is_told_when_reserving_and_breaks_nothing(directory: Path, failing: str) -> None:
    disk = Failing()
    journal = create(directory, disk)
    disk.failing = failing
    with pytest.raises(OSError, match="no room"):
        journal.reserve(10 * SEGMENT_BYTES)
    disk.failing = ""
    journal.append(batch(1, size=100))
    journal.close()
    assert told(read(directory)) == expected([batch(1, size=100)])


LIMITED = """
import resource, sys
from pathlib import Path
from tests.engines.journals import batch, create, expected, read, told

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
directory = Path(sys.argv[1])
journal = create(directory)
journal.reserve(50_000)
journal.append(batch(1, size=50_000))
try:
    journal.reserve(200_000)
except OSError as problem:
    print(problem.errno)
journal.append(batch(2))
journal.close()
assert told(read(directory)) == expected([batch(1, size=50_000), batch(2)])
print("gone on")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_file_that_may_not_get_longer_is_told_when_reserving(directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(directory)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.split("\n")[:2], done.stderr) == ([str(errno.EFBIG), "gone on"], "")


# Threads -----------------------------------------------------------------------------------------------


def test_many_threads_append_while_others_make_room(directory: Path) -> None:
    journal = create(directory)
    begun = threading.Barrier(5)

    def append(first: int) -> None:
        begun.wait(10)
        for number in range(first, first + 40):
            journal.append(mark(number), mark(number + 1000))

    def make_room() -> None:
        begun.wait(10)
        for _ in range(40):
            journal.prepare_spare()
            journal.reserve(SEGMENT_BYTES)

    threads = [threading.Thread(target=append, args=(100 * index,)) for index in range(4)]
    threads.append(threading.Thread(target=make_room))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    journal.close()
    contents = read(directory)
    assert contents is not None
    assert len(contents.entries) == 320
    pairs = list(zip(contents.entries[::2], contents.entries[1::2], strict=True))
    assert sorted(pairs, key=str) == sorted(
        (
            (mark(100 * index + number), mark(100 * index + number + 1000))
            for index in range(4)
            for number in range(40)
        ),
        key=str,
    )


# Text --------------------------------------------------------------------------------------------------


def test_the_dump_tells_everything_there_is(directory: Path) -> None:
    written(directory, *THREE_SEGMENTS, (direct(11),), (base(11),), (batch(12, 13, size=3),))
    text = "\n".join(dump(directory, Disk()))
    for wanted in (
        "segment 3: 2,048 bytes, journal 000102", "segment 4: 2,048 bytes, not begun", "head: ", "oid mark",
        "direct 000000000000000b", "1,000 bytes at byte 10000", "durable up to 11,000 bytes",
        "batch of 2 transactions", "user 'someone' '\\xe4' status ' ': 1 objects, 3 bytes",
        "000000000000000d (1900-01-01 00:00:00.", f"id {b'id-13'.hex()}", "sound: 1 entries",
    ):  # fmt: skip
        assert wanted in text, text


def test_the_dump_shows_damage_and_what_follows_it(directory: Path) -> None:
    written(directory, (batch(1),), (batch(2),), (batch(3),))
    path = directory / "0000000000000001.log"
    data = bytearray(path.read_bytes())
    data[data.index(b"id-2")] ^= 1
    path.write_bytes(data)
    text = "\n".join(dump(directory, Disk()))
    assert "a record that is not whole" in text
    assert f"id {b'id-3'.hex()}" in text
    assert "can't be used: " in text


def test_the_dump_shows_an_interrupted_append(directory: Path) -> None:
    written(directory, (batch(1),))
    shorten(directory)
    assert any("interrupted append" in line for line in dump(directory, Disk()))


def test_the_dump_of_nothing(directory: Path) -> None:
    assert list(dump(directory, Disk())) == ["no journal"]
