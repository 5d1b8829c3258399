"""What a commit journal says: finding its segments, and telling an interrupted write from damage.

Only reads. Owns the rule that nothing that was made durable is passed over: an append is one write and one
sync, and the next one begins only after that, so after a power cut any part of the last append may be
missing, and nothing else. A bad record followed by a whole one of a later append is damage, and is refused.
"""

import os
from collections import deque
from typing import Final

from zeoid import limits
from zeoid.engines.disk import Disk, StrPath
from zeoid.engines.journal_format import (
    HEADER_BYTES,
    VERSION,
    Base,
    Batch,
    Direct,
    Entry,
    Framed,
    Head,
    Header,
    Malformed,
    OidMark,
    claimed_end,
    entry_of,
    header_of,
    marker,
    record_at,
    records_after,
)
from zeoid.errors import ConfigurationError
from zeoid.model import frozen

SUFFIX: Final = ".log"
_DIGITS: Final = 16


class JournalDamaged(ConfigurationError):
    """What was durable once can't be read: *segment*, *offset* in it, and the *sequence* of the record."""

    def __init__(self, directory: str, segment: int, offset: int, sequence: int, why: str) -> None:
        super().__init__(
            f"{directory}: the commit journal is damaged in segment {segment} at byte {offset} "
            f"(record {sequence}): {why}. `zeoid journal` shows what is there; restore a back-up, or go on "
            "without what only the journal has, by `zeoid recover --trust-data-file`"
        )
        self.segment = segment
        self.offset = offset
        self.sequence = sequence


@frozen
class Tail:
    """What an interrupted append left: *size* bytes at *offset* of *segment*."""

    segment: int
    offset: int
    size: int


@frozen
class Segment:
    """One file of the journal. *state* is "in use", "obsolete" (before the newest Base) or "spare"."""

    number: int
    size: int
    state: str


@frozen
class End:
    """Where the next record goes, and its number. *last_append* is where the newest append begins. Nothing is
    added to a segment of another *version*."""

    segment: int
    offset: int
    sequence: int
    last_append: int
    version: int = VERSION


@frozen
class Contents:
    """A journal as it was found.

    *entries* are those after the newest Base, in order, led by large transactions that were announced before
    it and that it leaves undecided. *head* is what a segment begun now would begin with.
    """

    name: bytes
    entries: list[Batch | OidMark | Direct]
    tail: Tail | None
    segments: list[Segment]
    head: Head
    end: End
    unsettled_bytes: int

    @property
    def base(self) -> Base:
        """The newest one."""
        return self.head.base

    @property
    def outcomes(self) -> list[tuple[bytes, bytes]]:
        """(client-made id, tid) of committed transactions, oldest first."""
        return list(self.head.outcomes)

    @property
    def floor(self) -> bytes:
        """After this tid every client-made id is in `outcomes`."""
        return self.head.floor

    @property
    def oid_mark(self) -> bytes:
        return self.head.oid_mark

    @property
    def last_tid(self) -> bytes:
        """The newest tid of a committed transaction."""
        return self.head.last_tid


#: What an outcome takes in a head besides its id: a tid, and the lengths of list, id and tid.
_OUTCOME_BYTES = 16


class State:
    """What the entries so far amount to."""

    def __init__(self, head: Head, remembered: int) -> None:
        self.outcomes = deque(head.outcomes)
        self.floor = head.floor
        self.oid_mark = head.oid_mark
        self.last_tid = head.last_tid
        self.base_sequence = head.base_sequence
        self.base = head.base
        self.undecided = list(head.undecided)
        #: An upper bound of what the outcomes take in a head.
        self.outcomes_bytes = sum(len(id) + _OUTCOME_BYTES for id, _ in head.outcomes)
        self._remembered = remembered
        self._forget()

    def head(self) -> Head:
        return Head(
            tuple(self.outcomes),
            self.floor,
            self.oid_mark,
            self.last_tid,
            self.base_sequence,
            self.base,
            tuple(self.undecided),
        )

    def apply(self, entry: Entry, sequence: int) -> None:
        """*entry* is durable, in the record *sequence*."""
        if isinstance(entry, Batch):
            for transaction in entry.transactions:
                self._committed(transaction.id, transaction.tid)
            if self.undecided:  # nothing is committed while one is being written: it came to nothing
                self.undecided = [direct for direct in self.undecided if direct.tid > self.last_tid]
        elif isinstance(entry, OidMark):
            self.oid_mark = max(self.oid_mark, entry.oid)
        elif isinstance(entry, Direct):
            self.undecided.append(entry)
        else:
            self._settle(entry, sequence)

    def _settle(self, base: Base, sequence: int) -> None:
        self.base, self.base_sequence = base, sequence
        reached = {place.tid for place in base.places}
        for direct in self.undecided:
            if direct.tid in reached:
                self._committed(direct.id, direct.tid)
        self.last_tid = max(self.last_tid, *reached)
        self.undecided = [direct for direct in self.undecided if direct.tid > self.last_tid]

    def _committed(self, id: bytes, tid: bytes) -> None:
        if tid > self.last_tid:
            self.last_tid = tid
        if id:
            self.outcomes.append((id, tid))
            self.outcomes_bytes += len(id) + _OUTCOME_BYTES
            if len(self.outcomes) > self._remembered:
                self._forget()

    def _forget(self) -> None:
        while len(self.outcomes) > self._remembered:
            id, tid = self.outcomes.popleft()
            self.outcomes_bytes -= len(id) + _OUTCOME_BYTES
            self.floor = max(self.floor, tid)


# Segments ----------------------------------------------------------------------------------------------


def segment_path(directory: str, number: int) -> str:
    return os.path.join(directory, f"{number:0{_DIGITS}}{SUFFIX}")


def segment_numbers(directory: StrPath, disk: Disk) -> list[int]:
    """The segments that there are, begun or not, in order; none where there is no such directory."""
    if not disk.exists(directory):
        return []
    stems = [name.removesuffix(SUFFIX) for name in disk.listdir(directory) if name.endswith(SUFFIX)]
    return sorted(int(stem) for stem in stems if len(stem) == _DIGITS and stem.isascii() and stem.isdigit())


@frozen
class Scan:
    """A begun segment's records, up to the first that isn't whole and the next one in order."""

    header: Header
    mark: bytes
    data: bytes
    records: list[Framed]

    @property
    def end(self) -> int:
        return self.records[-1].end if self.records else HEADER_BYTES

    @property
    def end_sequence(self) -> int:
        return self.header.first_sequence + len(self.records)


def scan(data: bytes, header: Header) -> Scan:
    found = Scan(header, marker(header.name, header.segment), data, [])
    while (record := record_at(data, found.end, found.mark)) and record.sequence == found.end_sequence:
        found.records.append(record)
    return found


class Segments:
    """The segments of a directory, read when asked for."""

    def __init__(self, directory: StrPath, disk: Disk) -> None:
        self.directory = os.fspath(directory)
        self._disk = disk
        self.numbers = segment_numbers(directory, disk)
        self.sizes: dict[int, int] = {}
        self.headers: dict[int, Header] = {}
        for number in self.numbers:
            header = header_of(self._read(number, HEADER_BYTES), number)
            if header is not None:
                self.headers[number] = header

    def _read(self, number: int, size: int | None = None) -> bytes:
        fd = self._disk.open(segment_path(self.directory, number), read_only=True)
        try:
            self.sizes[number] = self._disk.size(fd)
            return self._disk.pread(fd, self.sizes[number] if size is None else size, 0)
        finally:
            self._disk.close(fd)

    def damaged(self, number: int, offset: int, sequence: int, why: str) -> JournalDamaged:
        return JournalDamaged(self.directory, number, offset, sequence, why)

    def header(self, number: int, name: bytes, sequence: int) -> Header:
        """The header of a segment that must be there, for it has or is followed by the record *sequence*."""
        header = self.headers.get(number)
        if header is None:
            why = "it has no header" if number in self.numbers else "there is no such segment"
            raise self.damaged(number, 0, sequence, why)
        if header.name != name:
            raise self.damaged(number, 0, sequence, "it belongs to another journal")
        return header

    def scan(self, number: int) -> Scan:
        return scan(self._read(number), self.headers[number])

    def tail(self, number: int, name: bytes, offset: int, sequence: int) -> Tail | None:
        """What an interrupted append that began with *sequence* or before left at *offset*, if anything.

        JournalDamaged if more was written after that append, which therefore was not interrupted.
        """
        data, mark = self._read(number), marker(name, number)
        end = offset
        for found, record in records_after(data, offset, mark):
            if record is not None and record.append > sequence:
                raise self.damaged(number, offset, sequence, f"record {record.sequence} follows it")
            end = max(end, record.end if record else claimed_end(data, found, mark))
        return Tail(number, offset, end - offset) if end > offset else None

    def entry(self, number: int, record: Framed) -> Entry | Head:
        try:
            return entry_of(record.payload)
        except Malformed as problem:
            raise self.damaged(number, record.offset, record.sequence, str(problem)) from None

    def head(self, found: Scan) -> Head:
        number = found.header.segment
        head = self.entry(number, found.records[0]) if found.records else None
        if not isinstance(head, Head):
            raise self.damaged(number, HEADER_BYTES, found.header.first_sequence, "it begins without a head")
        return head


# Reading -----------------------------------------------------------------------------------------------


def read(directory: StrPath, disk: Disk, remembered: int = limits.OUTCOMES) -> Contents | None:
    """What the journal in *directory* says; None if there is none. JournalDamaged; ConfigurationError if a
    newer Zeoid wrote it. *remembered* bounds the outcomes."""
    segments = Segments(directory, disk)
    if not segments.numbers:
        return None
    last, tail = _last(segments)
    start = _start(segments, last)
    state: State | None = None
    entries: list[Batch | OidMark | Direct] = []
    unsettled_bytes = 0
    for number in range(start, last.header.segment + 1):
        found = _complete(segments, number, last)
        if state is None:
            state = State(segments.head(found), remembered)
        for record in found.records[1:]:
            entry = segments.entry(number, record)
            if isinstance(entry, Head):
                raise segments.damaged(number, record.offset, record.sequence, "a head in the middle")
            state.apply(entry, record.sequence)
            unsettled_bytes += record.end - record.offset
            if isinstance(entry, Base):
                entries, unsettled_bytes = list(state.undecided), 0
            else:
                entries.append(entry)
    assert state is not None
    return Contents(
        last.header.name,
        entries,
        tail,
        _states(segments, start, last.header.segment),
        state.head(),
        _end(last),
        unsettled_bytes,
    )


def name_in(directory: StrPath, disk: Disk) -> bytes | None:
    """The name of the journal in *directory*, in whatever state it is; None if that isn't known."""
    headers = Segments(directory, disk).headers
    return headers[max(headers)].name if headers else None


def _last(segments: Segments) -> tuple[Scan, Tail | None]:
    """The newest segment that has anything, and what an interrupted append left in it or in the next one."""
    if not segments.headers:
        # The first segment gets its name when it is complete, so this one isn't just being made.
        raise segments.damaged(segments.numbers[0], 0, 0, "no segment has a header")
    top = max(segments.headers)
    header = segments.headers[top]
    last = segments.scan(top)
    if not last.records:
        # It was being begun when the machine stopped: all there is must be of that one append.
        before = segments.header(top - 1, header.name, header.first_sequence - 1)
        tail = segments.tail(top, header.name, 0, header.first_sequence)
        last = segments.scan(before.segment)
        if last.end_sequence != header.first_sequence:
            raise segments.damaged(top - 1, last.end, last.end_sequence, f"segment {top} follows it")
        return last, tail or Tail(top, 0, HEADER_BYTES)
    tail = segments.tail(top, header.name, last.end, last.end_sequence)
    if top + 1 in segments.numbers:
        begun = segments.tail(top + 1, header.name, 0, last.end_sequence)
        if begun is not None and tail is not None:
            raise segments.damaged(top, last.end, last.end_sequence, f"segment {top + 1} follows it")
        tail = tail or begun
    return last, tail


def _start(segments: Segments, last: Scan) -> int:
    """The segment that has the newest Base: reading begins there."""
    number, name = last.header.segment, last.header.name
    sequence = segments.head(last).base_sequence
    if any(isinstance(segments.entry(number, record), Base) for record in last.records[1:]):
        return number
    while segments.header(number, name, sequence).first_sequence > sequence:
        number -= 1
    return number


def _complete(segments: Segments, number: int, last: Scan) -> Scan:
    """A segment's records; all of them, unless it is the last one."""
    if number == last.header.segment:
        return last
    found = segments.scan(number)
    following = segments.header(number + 1, last.header.name, found.end_sequence)
    if following.first_sequence != found.end_sequence:
        why = f"segment {number + 1} begins with record {following.first_sequence}"
        raise segments.damaged(number, found.end, found.end_sequence, why)
    return found


def _end(last: Scan) -> End:
    index = last.records[-1].append - last.header.first_sequence
    begins = last.records[index].offset if index > 0 else 0  # with the segment's header
    return End(last.header.segment, last.end, last.end_sequence, begins, last.header.version)


def _states(segments: Segments, start: int, last: int) -> list[Segment]:
    return [
        Segment(
            number,
            segments.sizes[number],
            "spare" if number > last else "in use" if number >= start else "obsolete",
        )
        for number in segments.numbers
    ]
