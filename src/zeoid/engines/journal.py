"""The commit journal: what is made durable when transactions are committed, with one write and one sync.

Beside a data file lies a directory of segments, files that were written full of zeros ahead of need, so that
a sync has no change of length or place to write. A `Base` says how far the data file is durable by itself;
the segments before it are then renamed to follow the newest one, and used again.

Owns when segments are begun, made and reused, and what a failure means. The layout is `journal_format`'s, and
described in docs/journal.md; `journal_reading` reads. Must not know what a data file looks like.
"""

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Final

import msgpack

from zeoid import limits
from zeoid.engines.disk import Disk, StrPath
from zeoid.engines.journal_dump import dump
from zeoid.engines.journal_format import (
    HEADER_BYTES,
    PAYLOAD_LIMIT_BYTES,
    RECORD_BYTES,
    VERSION,
    Base,
    Batch,
    Direct,
    Entry,
    Head,
    Header,
    LoggedBlob,
    LoggedTransaction,
    OidMark,
    Place,
    Record,
    framed,
    marker,
    payload_of,
)
from zeoid.engines.journal_reading import (
    Contents,
    End,
    JournalDamaged,
    Segment,
    State,
    Tail,
    read,
    segment_numbers,
    segment_path,
)
from zeoid.errors import ConfigurationError

__all__ = [
    "Base", "Batch", "Contents", "Direct", "Entry", "Journal", "JournalDamaged", "LoggedBlob",
    "LoggedTransaction", "OidMark", "Place", "Record", "Tail", "dump",
]  # fmt: skip

#: A segment while it is being made. What a crash leaves of it is removed.
_NEW: Final = "new-segment"
_ZEROS: Final = bytes(1024 * 1024)
#: A packer keeps the buffer of the largest payload it packed; one that has grown beyond this is given up.
_PACKER_BYTES: Final = 4 * 1024 * 1024
#: Room that a head takes besides its outcomes: a few numbers, places and undecided transactions.
_HEAD_BYTES: Final = 4096


class Journal:
    """A journal that is written to. Made by `create` or `open`, which see to what the last crash left.

    Its methods may be called by any thread. OSError from `append` means that nobody knows what is on the
    disk: nothing more is written, and every call but `close` is refused with OSError.
    """

    def __init__(
        self,
        directory: str,
        disk: Disk,
        name: bytes,
        head: Head,
        end: End,
        segment_bytes: int,
        remembered: int,
    ) -> None:
        self._directory = directory
        self._disk = disk
        self._name = name
        self._state = State(head, remembered)
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        #: Held by who makes a spare; taken before the other one.
        self._making = threading.Lock()
        self._packer = msgpack.Packer()
        self._refusal = ""
        #: What was written since the newest Base, and a recovery would have to read.
        self.unsettled_bytes = 0
        #: Segments in use, the newest one last, and those ready to be begun, in order: number and size.
        self._used: list[tuple[int, int]] = []
        self._spares: list[tuple[int, int]] = []
        self._sequence = end.sequence
        self._position = end.offset
        self._file = disk.open(segment_path(directory, end.segment))
        try:
            self._enter(end.segment, disk.size(self._file) if end.version == VERSION else end.offset)
        except BaseException:
            disk.close(self._file)
            raise

    # Making and opening -----------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        directory: StrPath,
        disk: Disk,
        base: Base,
        *,
        last_tid: bytes,
        oid_mark: bytes,
        floor: bytes,
        outcomes: Sequence[tuple[bytes, bytes]] = (),
        segment_bytes: int = limits.JOURNAL_SEGMENT_BYTES,
        remembered: int = limits.OUTCOMES,
        name: bytes | None = None,
    ) -> "Journal":
        """A new journal, durable when this returns. ConfigurationError if there is one already.

        *name* is sixteen random bytes; *remembered* is how many outcomes are kept.
        """
        directory = os.fspath(directory)
        if segment_numbers(directory, disk):
            raise ConfigurationError(f"{directory} has a commit journal; move it away to begin a new one")
        if not disk.exists(directory):
            disk.mkdir(directory)
        name = os.urandom(16) if name is None else name
        given = Head(tuple(outcomes), floor, oid_mark, last_tid, 1, base, ())
        head = State(given, remembered).head()
        record = b"".join(framed(marker(name, 1), 1, [msgpack.packb(payload_of(head))]))
        # It gets its name when it is complete: under that name there never is less than a whole beginning.
        new = os.path.join(directory, _NEW)
        if disk.exists(new):
            disk.unlink(new)
        _fill(disk, new, segment_bytes, Header(name, 1, 1).encoded() + record)
        disk.rename(new, segment_path(directory, 1))
        disk.sync_directory(directory)
        disk.sync_directory(os.path.dirname(os.path.abspath(directory)))
        end = End(1, HEADER_BYTES + len(record), 2, 0)
        return cls(directory, disk, name, head, end, segment_bytes, remembered)

    @staticmethod
    def read(directory: StrPath, disk: Disk, *, remembered: int = limits.OUTCOMES) -> Contents | None:
        """What the journal in *directory* says, without a change to it; None if there is none.

        JournalDamaged if it can't be trusted; ConfigurationError if a newer Zeoid wrote it.
        """
        return read(directory, disk, remembered)

    @classmethod
    def open(
        cls,
        directory: StrPath,
        disk: Disk,
        contents: Contents,
        *,
        segment_bytes: int = limits.JOURNAL_SEGMENT_BYTES,
        remembered: int = limits.OUTCOMES,
    ) -> "Journal":
        """Go on after *contents*, which were just read and are durable when this returns.

        What an interrupted append left is kept in a file `torn-<segment>-<offset>`, then overwritten.
        """
        directory = os.fspath(directory)
        if contents.tail is not None:
            _set_aside(directory, disk, contents.tail)
        journal = cls(directory, disk, contents.name, contents.head, contents.end, segment_bytes, remembered)
        try:
            journal._resume(contents)
        except BaseException:
            journal.close()
            raise
        return journal

    def _resume(self, contents: Contents) -> None:
        """Make durable what was read, and put the segments in order."""
        # The newest append may never have reached the disk: after a sync that failed, the system forgets that
        # it still has something to write. So it is written again.
        begins, end = contents.end.last_append, contents.end.offset
        self._disk.pwrite(self._file, self._disk.pread(self._file, end - begins, begins), begins)
        self._disk.sync(self._file)
        new = os.path.join(self._directory, _NEW)
        if self._disk.exists(new):
            self._disk.unlink(new)
        in_use = [segment for segment in contents.segments if segment.state == "in use"]
        self._used[:-1] = [(segment.number, segment.size) for segment in in_use[:-1]]
        # Spares first: each then gets its own number or a lower one, and no name is taken twice.
        for state in ("spare", "obsolete"):
            self._recycle([segment for segment in contents.segments if segment.state == state])
        self._disk.sync_directory(self._directory)
        self.unsettled_bytes = contents.unsettled_bytes

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                self._refusal = self._refusal or "the commit journal is closed"
                file, self._file = self._file, -1
                self._disk.close(file)

    # What is known ----------------------------------------------------------------------------------

    @property
    def name(self) -> bytes:
        return self._name

    @property
    def last_tid(self) -> bytes:
        """The newest tid of a committed transaction."""
        return self._state.last_tid

    @property
    def oid_mark(self) -> bytes:
        """Oids up to this one may have been handed out."""
        return self._state.oid_mark

    @property
    def floor(self) -> bytes:
        """After this tid every client-made id is in `outcomes`."""
        return self._state.floor

    @property
    def outcomes(self) -> list[tuple[bytes, bytes]]:
        """(client-made id, tid) of the latest committed transactions, oldest first."""
        with self._lock:
            return list(self._state.outcomes)

    @property
    def base(self) -> Base:
        """The newest one."""
        return self._state.base

    # Writing ----------------------------------------------------------------------------------------

    def append(self, *entries: Entry) -> None:
        """Make *entries* durable, with one write and one sync. ValueError if one can't be written, and then
        none is; any other error breaks the journal."""
        with self._lock:
            self._check()
            payloads = list(map(self._packed, entries))
            size = sum(map(len, payloads)) + RECORD_BYTES * len(payloads)
            try:
                if self._position + size > self._used[-1][1]:
                    self._roll(payloads)
                else:
                    mark = self._mark
                    self._write(b"".join(framed(mark, self._sequence, payloads)), len(payloads))
                first = self._sequence - len(entries)
                for sequence, (entry, payload) in enumerate(zip(entries, payloads, strict=True), first):
                    self._state.apply(entry, sequence)
                    self.unsettled_bytes += RECORD_BYTES + len(payload)
                    if isinstance(entry, Base):
                        self._settled()
            except BaseException as problem:
                self._break(problem)
                raise

    def _break(self, problem: BaseException) -> None:
        self._refusal = f"the commit journal can't be used after {type(problem).__name__}: {problem}"

    def _check(self) -> None:
        if self._refusal:
            raise OSError(errno.EIO, self._refusal)

    def _packed(self, entry: Entry | Head) -> bytes:
        payload: bytes = self._packer.pack(payload_of(entry))
        if len(payload) > _PACKER_BYTES:
            self._packer = msgpack.Packer()
        if len(payload) > PAYLOAD_LIMIT_BYTES:
            raise ValueError("more than a record of the journal can hold; write it to the data file itself")
        return payload

    def _write(self, data: bytes, count: int) -> None:
        """Put *data*, with *count* records, at the end of the newest segment, durably."""
        self._disk.pwrite(self._file, data, self._position)
        self._disk.sync(self._file)
        self._position += len(data)
        self._sequence += count

    def _roll(self, payloads: Sequence[bytes]) -> None:
        """Begin the next segment with a head and *payloads*."""
        number = self._used[-1][0] + 1
        head = self._packed(self._state.head())
        records = b"".join(framed(marker(self._name, number), self._sequence, [head, *payloads]))
        data = Header(self._name, number, self._sequence).encoded() + records
        if not self._spares:
            _fill(self._disk, segment_path(self._directory, number), self._segment_bytes)
            self._disk.sync_directory(self._directory)
            self._spares.append((number, self._segment_bytes))
        _, size = self._spares.pop(0)
        before, self._file = self._file, self._disk.open(segment_path(self._directory, number))
        self._disk.close(before)
        self._enter(number, max(size, len(data)))
        self._position = 0
        self._write(data, 1 + len(payloads))

    def _enter(self, number: int, size: int) -> None:
        self._used.append((number, size))
        self._mark = marker(self._name, number)

    def _settled(self) -> None:
        """The newest record is a Base: what lies in earlier segments is not needed any more."""
        self.unsettled_bytes = 0
        obsolete, self._used = self._used[:-1], self._used[-1:]
        if obsolete:
            self._recycle([Segment(number, size, "obsolete") for number, size in obsolete])
            self._disk.sync_directory(self._directory)

    def _recycle(self, segments: Sequence[Segment]) -> None:
        """Let *segments* follow the last one there is, by their names; remove what is too much, or not of the
        usual size. Durable once the directory is."""
        for segment in segments:
            path = segment_path(self._directory, segment.number)
            if segment.size != self._segment_bytes or len(self._spares) >= limits.JOURNAL_SPARES:
                self._disk.unlink(path)
                continue
            number = self._next_number()
            if number != segment.number:
                self._disk.rename(path, segment_path(self._directory, number))
            self._spares.append((number, segment.size))

    def _next_number(self) -> int:
        return (self._spares or self._used)[-1][0] + 1

    @property
    def has_spare(self) -> bool:
        """Whether there is a segment to go on with when the newest one is full."""
        return bool(self._spares)

    # Room -------------------------------------------------------------------------------------------

    def prepare_spare(self) -> None:
        """Make a segment ahead of need unless there is one, so that `append` need not.

        OSError: it can't be made now, for want of room, say; the journal can be used.
        """
        with self._making:
            self._check()
            if self._spares:
                return
            new = os.path.join(self._directory, _NEW)
            _fill(self._disk, new, self._segment_bytes)
            with self._lock:
                self._check()
                number = self._next_number()
                try:
                    self._disk.rename(new, segment_path(self._directory, number))
                    self._disk.sync_directory(self._directory)
                except BaseException as problem:  # the next segment may be there or not
                    self._break(problem)
                    raise
                self._spares.append((number, self._segment_bytes))

    def reserve(self, size_bytes: int) -> None:
        """See that entries of *size_bytes* can be appended: all that was promised so far and not appended.

        OSError (ENOSPC, EDQUOT, EFBIG) if they can't; the journal can be used.
        """
        while not self._has_room(size_bytes):
            self.prepare_spare()

    def _has_room(self, size_bytes: int) -> bool:
        """False: there must be a spare first."""
        with self._lock:
            self._check()
            if self._position + size_bytes <= self._used[-1][1]:
                return True
            if not self._spares:
                return False
            size_bytes += HEADER_BYTES + _HEAD_BYTES + self._state.outcomes_bytes
            number, size = self._spares[0]
            if size < size_bytes:
                file = self._disk.open(segment_path(self._directory, number))
                try:
                    self._disk.reserve(file, size, size_bytes - size)
                finally:
                    self._disk.close(file)
                self._spares[0] = number, size_bytes
            return True


def _fill(disk: Disk, path: str, size: int, beginning: bytes = b"") -> None:
    """Make a file of *size* zeros, overwritten by *beginning*, durable but for its name.

    OSError: there is none.
    """
    file = disk.open(path, create=True)
    try:
        for position in range(0, size, len(_ZEROS)):
            disk.pwrite(file, memoryview(_ZEROS)[: size - position], position)
        if beginning:
            disk.pwrite(file, beginning, 0)
        disk.sync(file)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.unlink(path)
        raise
    finally:
        disk.close(file)


def _set_aside(directory: str, disk: Disk, tail: Tail) -> None:
    """Copy what an interrupted append left to a file of its own, then overwrite it."""
    path = kept = os.path.join(directory, f"torn-{tail.segment}-{tail.offset}")
    for number in itertools.count(2):
        if not disk.exists(path):
            break
        path = f"{kept}-{number}"
    file = disk.open(segment_path(directory, tail.segment))
    try:
        _fill(disk, path, 0, disk.pread(file, tail.size, tail.offset))
        disk.sync_directory(directory)
        disk.pwrite(file, bytes(tail.size), tail.offset)
        disk.sync(file)
    finally:
        disk.close(file)
