"""Opening a data file together with the journal beside it, after a clean stop or a crash.

    journal                          data file                              then
    none                             any                                    a new journal for it
    nothing after the newest Base    that far, or longer (a stock server    taken as it is
                                     was used meanwhile)
    transactions after it            that far, then some of them, or        cut off at the Base, and they are
                                     half-written ones                      written again from the journal
    transactions after it            that far, then others                  refused
    two places (a pack was under     like either                            as above
    way)                             absent, the packed one is there        that is put in place, and as above
    any                              not that far, or another transaction   refused
                                     there (a back-up was restored)
    damaged                          any                                    refused

    a blob in the journal            its staged name, its final name        then
    of a transaction after the Base  only the staged one                    the final one is made
                                     both, of the same content              taken as it is
                                     both, of another content, or neither   refused
                                     only the final one                     taken as it is
    of a very large one, undecided   any                                    both are removed
    any of those                     the blob directory isn't given         refused

What is refused names the command that settles it, and then nothing is changed. Owns the comparison of these,
and what is cut off: nothing is thrown away that could be of use, it goes to a file in the journal's
directory.
"""

import logging
import os
from collections.abc import Sequence

from persistent.TimeStamp import TimeStamp

from zeoid.engines.blob_layout import find_layout
from zeoid.engines.blobs import BlobDirectory, set_staged_aside
from zeoid.engines.datafile import LENGTH, RECORD_HEADER, TRANSACTION_HEADER, tid_that_ends_at
from zeoid.engines.disk import Disk
from zeoid.engines.journal import Batch, Contents, Direct, Journal, LoggedTransaction, Place
from zeoid.engines.journal_reading import name_in
from zeoid.errors import ConfigurationError
from zeoid.model import NO_TID, frozen

log = logging.getLogger("zeoid.server")
_COPY_BYTES = 1024 * 1024


def journal_directory(path: str) -> str:
    """Where the journal of the data file *path* is."""
    return f"{path}.journal"


@frozen
class Settled:
    """What there is to do once the data file is open."""

    #: What the journal held; None if there was none.
    contents: Contents | None
    #: What must be written to the data file again.
    replay: tuple[LoggedTransaction, ...] = ()
    #: Not committed, so that their blobs are to be taken back.
    withdrawn: tuple[Direct, ...] = ()


def settle(path: str, disk: Disk, blob_dir: str | None = None) -> Settled:
    """Make the data file *path*, which nobody has open, one that can be opened and continued.

    ConfigurationError when it, its journal and its blobs don't belong together.
    """
    contents = Journal.read(journal_directory(path), disk)
    if contents is None:
        return Settled(None)
    if not disk.exists(path):
        _complete_pack(path, contents, disk)
    file = disk.open(path, create=False, read_only=False)
    try:
        return _Comparison(path, contents, disk, file, blob_dir).settle()
    finally:
        disk.close(file)


def check_complete(path: str, disk: Disk) -> Contents | None:
    """What the journal of *path* says; ConfigurationError if *path* has to be settled first."""
    contents = Journal.read(journal_directory(path), disk)
    if contents is not None and any(isinstance(entry, Batch | Direct) for entry in contents.entries):
        raise ConfigurationError(
            f"{path} was not closed, and its journal has to be written to it: run `zeoid recover {path}`, or "
            "stop the server that uses it"
        )
    return contents


def check_belonging(path: str, disk: Disk) -> Contents | None:
    """As `check_complete`, and ConfigurationError if the journal was written for another file."""
    contents = check_complete(path, disk)
    if contents is not None:
        file = disk.open(path, create=False, read_only=True)
        try:
            _Comparison(path, contents, disk, file).settle()
        finally:
            disk.close(file)
    return contents


def set_aside(path: str, disk: Disk, suffix: str, blob_dir: str | None = None) -> str | None:
    """Move the journal of *path* out of the way, with what was staged for it in *blob_dir*; where it is now,
    None if there is none."""
    directory = journal_directory(path)
    if not disk.exists(directory):
        return None
    if blob_dir is not None and (name := name_in(directory, disk)):
        set_staged_aside(blob_dir, disk, name, suffix)
    aside = f"{directory}.{suffix}"
    disk.rename(directory, aside)
    disk.sync_directory(os.path.dirname(os.path.abspath(path)))
    return aside


def _transactions(contents: Contents) -> list[LoggedTransaction]:
    """Those that the journal has and the data file may not have."""
    return [t for entry in contents.entries if isinstance(entry, Batch) for t in entry.transactions]


def _complete_pack(path: str, contents: Contents, disk: Disk) -> None:
    """A crash between the two renames of a pack left no data file, but the packed one."""
    packed = f"{path}.pack"
    if len(contents.base.places) > 1 and disk.exists(packed):
        file = disk.open(packed, create=False, read_only=True)
        try:
            fits = any(_is_at(disk, file, place) for place in contents.base.places)
        finally:
            disk.close(file)
        if fits:
            log.warning("%s: a pack was interrupted as it put the packed file in place; it is done now", path)
            disk.rename(packed, path)
            disk.sync_directory(os.path.dirname(os.path.abspath(path)))
            return
    left = next((name for name in (f"{path}.old", packed) if disk.exists(name)), "its journal")
    raise ConfigurationError(
        f"{path} does not exist, but {left} does: a pack was interrupted, or the file was moved. Put the "
        f"data file back, or move {journal_directory(path)} away to begin a new database"
    )


def _is_at(disk: Disk, file: int, place: Place) -> bool:
    """Whether the file has this transaction at this place."""
    if disk.size(file) < place.length:
        return False
    return (
        tid_that_ends_at(lambda position, size: disk.pread(file, size, position), place.length) == place.tid
    )


class _Comparison:
    """A data file, and what its journal says of it."""

    def __init__(
        self, path: str, contents: Contents, disk: Disk, file: int, blob_dir: str | None = None
    ) -> None:
        self._path = path
        self._blob_dir = blob_dir
        self._contents = contents
        self._disk = disk
        self._file = file
        self._size = disk.size(file)

    def settle(self) -> Settled:
        contents = self._contents
        place = next((p for p in contents.base.places if _is_at(self._disk, self._file, p)), None)
        if place is None:
            raise self._foreign("is not the file that its journal was written for")
        missing = _transactions(contents)
        direct = [entry for entry in contents.entries if isinstance(entry, Direct)]
        if not missing and not direct:
            return Settled(contents)
        ours, end = self._follow(place, missing, {entry.tid for entry in direct})
        if not ours:
            raise self._foreign("was written to by another server after a crash")
        withdrawn = [entry for entry in direct if entry.blobs]
        with_blobs = [transaction for transaction in missing if transaction.blobs]
        if with_blobs or withdrawn:
            self._check_blobs(with_blobs)
        if self._size > place.length:
            self._cut(place.length, end)
        if missing:
            log.warning(
                "%s was not closed: %d transactions are written to it again from its journal",
                self._path, len(missing),
            )  # fmt: skip
        return Settled(contents, tuple(missing), tuple(withdrawn))

    def _check_blobs(self, transactions: Sequence[LoggedTransaction]) -> None:
        if self._blob_dir is None:
            raise ConfigurationError(
                f"{self._path} was not closed, and its journal has transactions with blobs: give the "
                f"directory of its blobs, too (`zeoid recover --blob-dir DIRECTORY {self._path}`)"
            )
        layout = find_layout(self._blob_dir, self._disk)
        blobs = BlobDirectory(layout, self._disk, self._contents.name)
        for transaction in transactions:
            missing = blobs.missing(transaction.tid, transaction.blobs)
            if missing:
                raise ConfigurationError(
                    f"{self._path} was not closed, and a blob of transaction {_shown(transaction.tid)} is "
                    f"not in {self._blob_dir}: {missing}. Is it the right directory? `zeoid recover "
                    f"--trust-data-file {self._path}` goes on with the data file as it is, without "
                    f"{len(_transactions(self._contents))} transactions that only the journal has"
                )

    def _follow(
        self, place: Place, missing: Sequence[LoggedTransaction], direct: set[bytes]
    ) -> tuple[bool, int]:
        """Whether all that is whole beyond *place* is ours, and where that ends."""
        known = {transaction.tid for transaction in missing} | direct
        position, last = place.length, place.tid
        while True:
            tid, end = self._whole_transaction(position)
            if tid is None:
                return True, position
            if tid not in known:
                return tid <= last, position  # none that anybody wrote there in earnest
            position, last = end, tid

    def _whole_transaction(self, position: int) -> tuple[bytes | None, int]:
        """The tid of the transaction that begins at *position*, and its end; None if it isn't all there."""
        size = TRANSACTION_HEADER.size
        header = self._disk.pread(self._file, size, position)
        if len(header) < size:
            return None, position
        tid, length, status, *meta = TRANSACTION_HEADER.unpack(header)
        end = position + length + LENGTH.size
        if status not in (b" ", b"p", b"u") or length < size + sum(meta) or end > self._size or tid == NO_TID:
            return None, position
        if self._disk.pread(self._file, LENGTH.size, end - LENGTH.size) != LENGTH.pack(length):
            return None, position
        first = position + size + sum(meta)
        if first < end - LENGTH.size:  # its records name it, too: what is torn is not taken for another one
            record = self._disk.pread(self._file, RECORD_HEADER.size, first)
            if record[8:16] != tid:
                return None, position
        return tid, end

    def _cut(self, length: int, known_end: int) -> None:
        """Remove what lies beyond *length*; what isn't in the journal, too, is kept in a file of its own."""
        disk = self._disk
        if known_end < self._size:
            kept = f"{journal_directory(self._path)}/cut-off-{known_end}"
            copy = disk.open(kept, create=True, read_only=False)
            try:
                disk.truncate(copy, 0)
                for position in range(known_end, self._size, _COPY_BYTES):
                    piece = disk.pread(self._file, min(_COPY_BYTES, self._size - position), position)
                    disk.pwrite(copy, piece, position - known_end)
                disk.sync(copy)
            finally:
                disk.close(copy)
            log.warning(
                "%s: %d bytes of a transaction that was not committed are cut off, and kept in %s",
                self._path, self._size - known_end, kept,
            )  # fmt: skip
        disk.truncate(self._file, length)
        disk.sync(self._file)

    def _foreign(self, what: str) -> ConfigurationError:
        place = self._contents.base.places[-1]
        wanted = f"{place.length:,} bytes, of which the last transaction is {_shown(place.tid)}"
        count = len(_transactions(self._contents))
        return ConfigurationError(
            f"{self._path} {what} (it should begin with {wanted}). Was a back-up restored? "
            f"`zeoid recover --trust-data-file {self._path}` goes on with the data file as it is and sets "
            f"the journal aside, with {count} transactions that only it has"
        )


def _shown(tid: bytes) -> str:
    return "none" if tid == NO_TID else f"{tid.hex()} of {TimeStamp(tid)} UTC"
