"""A disk for crash tests: it remembers what was not synced, and makes what a power cut could leave of it.

`FaultyDisk` works on real files below a real directory, and records what isn't durable yet: writes and
changes of length since a file's last sync, names made, linked, renamed and removed since a directory's
last sync. The test does its work, stops anywhere, and asks for the directories that the machine could come
up with:

    disk = FaultyDisk(folder)                    # what is in there now is durable
    … use it as an engine's disk, or patch a module's `open`, `os.rename` and so on by
      disk.open_file, disk.rename, disk.unlink, disk.sync …
    for state in disk.crash_states(limit=50, seed=1):
        … open what is in the directory *state*, and look

`on_operation`, called with the name and the path of every operation that changes something or makes it
durable, before it is carried out, lets a test stop at each of them; `fail_at` makes one of them fail.

Owns the model of a disk: a sync covers a file's content and length, a directory's sync the names in it;
without them, each write, change of length or name may be there or not, in any combination; a write may be
torn, or leave only a longer file, of zeros. After a sync that failed, what it was to cover may be lost even
if a later one succeeds. Knows no format.
"""

import io
import itertools
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zeoid.engines.disk import Disk, StrPath
from zeoid.testing.unsynced import (
    Change,
    File,
    Names,
    Naming,
    always,
    content_after,
    files_of,
    halves,
    sampled,
    state_after,
    whole,
)


class FaultyDisk(Disk):
    """The disk below the directory *root*, which exists; everything in it counts as durable.

    Other paths are served, but neither recorded nor counted.
    """

    def __init__(self, root: StrPath) -> None:
        self._root = os.path.realpath(root)
        self._lock = threading.RLock()
        self._open: dict[int, tuple[File, str]] = {}
        self._durable = Names()
        known: dict[tuple[int, int], File] = {}
        for folder, folders, names in os.walk(self._root):
            self._durable.directories |= {self._relative(os.path.join(folder, name)) for name in folders}
            for name in names:
                path = Path(folder, name)
                told = path.stat()
                file = known.setdefault((told.st_dev, told.st_ino), File(path.read_bytes()))
                self._durable.files[self._relative(path)] = file
        self._now = self._durable.copy()
        self._pending: list[Change | Naming] = []
        self._failures: dict[int, OSError] = {}
        #: Operations so far that change something or make it durable.
        self.operations = 0
        #: Called with name and path before each of these. What it raises keeps the operation from happening.
        self.on_operation: Callable[[str, str], None] | None = None

    def fail_at(self, number: int, error: OSError) -> None:
        """The operation *number* from now raises *error*; the next one is 1. A write is half done then."""
        self._failures[self.operations + number] = error

    # Operations -------------------------------------------------------------------------------------

    def open(self, path: StrPath, *, create: bool = False, read_only: bool = False) -> int:
        inside = self._inside(path)
        with self._lock:
            if inside is not None and create and not os.path.exists(path):
                self._begin("open", path)
            fd = super().open(path, create=create, read_only=read_only)
            if inside is not None:
                self._opened(fd, inside)
            return fd

    def close(self, fd: int) -> None:
        with self._lock:
            self._open.pop(fd, None)
            super().close(fd)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        with self._lock:
            error = self._begin_on("pwrite", fd, halfway=True)
            written = bytes(data)[: len(data) // 2] if error else bytes(data)
            super().pwrite(fd, written, offset)
            self._changed(fd, offset, written)
            if error:
                raise error

    def truncate(self, fd: int, size: int) -> None:
        with self._lock:
            self._begin_on("truncate", fd)
            super().truncate(fd, size)
            self._changed(fd, size, None)

    def sync(self, fd: int) -> None:
        """Nothing is really synced: the process lives on, and syncing takes long."""
        with self._lock:
            file = self._open[fd][0] if fd in self._open else None
            try:
                self._begin_on("sync", fd)
            except OSError:
                self._doubt(file)
                raise
            self._make_durable(file)

    def sync_all(self, path: StrPath) -> None:
        with self._lock:
            files = {each.file for each in self._pending if isinstance(each, Change)}
            try:
                self._begin("sync_all", path)
            except OSError:
                for file in files:
                    self._doubt(file)
                raise
            for file in files:
                self._make_durable(file)
            for naming in [each for each in self._pending if isinstance(each, Naming)]:
                self._durable.apply(naming)
                self._pending.remove(naming)

    def start_writeback(self, fd: int, start: int, length: int) -> bool:
        with self._lock:
            self._begin_on("start_writeback", fd)
            return super().start_writeback(fd, start, length)

    def wait_for_writeback(self, fd: int, start: int, length: int) -> None:
        """What was written back is not durable: the file's new length may be lost."""
        with self._lock:
            self._begin_on("wait_for_writeback", fd)

    def reserve(self, fd: int, start: int, length: int) -> None:
        with self._lock:
            self._begin_on("reserve", fd)
            super().reserve(fd, start, length)

    def rename(self, source: StrPath, target: StrPath) -> None:
        with self._lock:
            self._begin("rename", target)
            self._adopt(source)
            same = os.path.exists(target) and os.path.samefile(source, target)
            super().rename(source, target)
            if not same:  # of two names of one file the system removes none
                name = self._relative(source)
                self._named(Naming(self._relative(target), self._now.files.get(name), name))

    def link(self, source: StrPath, target: StrPath) -> None:
        with self._lock:
            self._begin("link", target)
            self._adopt(source)
            super().link(source, target)
            self._named(Naming(self._relative(target), self._now.files[self._relative(source)]))

    def unlink(self, path: StrPath) -> None:
        with self._lock:
            self._begin("unlink", path)
            super().unlink(path)
            self._named(Naming(self._relative(path)))

    def mkdir(self, path: StrPath, mode: int = 0o777) -> None:
        with self._lock:
            self._begin("mkdir", path)
            super().mkdir(path, mode)
            self._named(Naming(self._relative(path), directory=True))

    def rmdir(self, path: StrPath) -> None:
        with self._lock:
            self._begin("rmdir", path)
            super().rmdir(path)
            folder = self._relative(path)
            named = dict(self._durable.files)
            named.update(
                (each.target, each.file)
                for each in self._pending
                if isinstance(each, Naming) and each.file is not None
            )
            taken = tuple(item for item in named.items() if os.path.dirname(item[0]) == folder)
            self._named(Naming(folder, directory=True, taken_along=taken))

    def sync_directory(self, path: StrPath) -> None:
        with self._lock:
            self._begin("sync_directory", path)
            folder = self._relative(path)
            folder = "" if folder == os.curdir else folder
            remaining: list[Change | Naming] = []
            for each in self._pending:
                now, later = halves(each, folder) if isinstance(each, Naming) else (None, each)
                if now is not None:
                    self._durable.apply(now)
                if later is not None:
                    remaining.append(later)
            self._pending = remaining

    def open_file(self, name: StrPath, mode: str = "r") -> Any:
        """As the built-in `open` does for binary files, but what is written and truncated is recorded."""
        inside = self._inside(name)
        if inside is None or "b" not in mode:
            return open(name, mode)
        with self._lock:
            existed = os.path.exists(name)
            if not existed or "w" in mode:
                self._begin("open", name)
            raw = _RecordedFile(os.fspath(name), mode.replace("b", ""), self)
            self._opened(raw.fileno(), inside)
            if existed and "w" in mode:
                self._changed(raw.fileno(), 0, None)
        if "+" in mode:
            return io.BufferedRandom(raw)
        return io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)

    # Recording --------------------------------------------------------------------------------------

    def _inside(self, path: StrPath) -> str | None:
        """*path* relative to the root, None if it isn't below it."""
        relative = self._relative(path)
        return None if relative == os.pardir or relative.startswith(os.pardir + os.sep) else relative

    def _relative(self, path: StrPath) -> str:
        folder, name = os.path.split(os.path.abspath(path))
        return os.path.relpath(os.path.join(os.path.realpath(folder), name), self._root)

    def _begin(self, name: str, path: StrPath, *, halfway: bool = False) -> OSError | None:
        """Count an operation, and have it fail if it is to; one that can be half done gets the error."""
        if self._inside(path) is None:
            return None
        if self.on_operation is not None:
            self.on_operation(name, os.fspath(path))
        self.operations += 1
        error = self._failures.pop(self.operations, None)
        if error is not None and not halfway:
            raise error
        return error

    def _begin_on(self, name: str, fd: int, *, halfway: bool = False) -> OSError | None:
        if fd not in self._open:
            return None
        return self._begin(name, os.path.join(self._root, self._open[fd][1]), halfway=halfway)

    def _opened(self, fd: int, path: str) -> None:
        if path not in self._now.files:
            self._adopt(os.path.join(self._root, path))
        self._open[fd] = self._now.files[path], path

    def _adopt(self, path: StrPath) -> None:
        """A file that another process made has been seen by no sync."""
        name = self._inside(path)
        if name is not None and name not in self._now.files and os.path.isfile(path):
            content = Path(path).read_bytes()
            self._named(Naming(name, File()))
            if content:
                self._pending.append(Change(self._now.files[name], 0, content))

    def _make_durable(self, file: File | None) -> None:
        """A sync of it succeeded."""
        changes = self._changes_of(file)
        if any(change.doubtful for change in changes):
            for change in changes:
                change.certain = not change.doubtful
        elif file is not None:
            file.durable = content_after(file.durable, [(change, whole(change)) for change in changes])
            self._pending = [each for each in self._pending if each not in changes]

    def _doubt(self, file: File | None) -> None:
        """A sync of it failed."""
        for change in self._changes_of(file):
            change.doubtful = not change.certain

    def _named(self, naming: Naming) -> None:
        self._now.apply(naming)
        self._pending.append(naming)

    def _changed(self, fd: int, offset: int, data: bytes | None) -> None:
        if fd in self._open:
            self._pending.append(Change(self._open[fd][0], offset, data))

    def _changes_of(self, file: File | None) -> list[Change]:
        return [each for each in self._pending if isinstance(each, Change) and each.file is file]

    # Crash states -----------------------------------------------------------------------------------

    def crash_states(self, limit: int = 50, seed: int = 0) -> Iterator[Path]:
        """Directories as a power cut now could leave them, each different, each removed after its turn.

        First what is always tried, then random combinations of it until there are *limit*: nothing unsynced
        survived; all of it did; each single write, change of length or name lost; the last write to each file
        torn, and lost but for the file's length; all names lost, all of them kept without the contents, only
        the latest of them kept.
        """
        with self._lock:
            pending = list(self._pending)
            durable = self._durable.copy()
            contents = {id(file): file.durable for file in {*durable.files.values(), *files_of(pending)}}
        seen: set[Any] = set()
        fates = itertools.chain(always(pending), sampled(pending, limit, random.Random(seed)))  # noqa: S311
        certain = sum(1 for _ in always(pending))
        for number, fate in enumerate(fates):
            if number >= certain and len(seen) >= limit:
                return
            directories, files = state_after(durable, contents, pending, fate)
            key = (*sorted(directories), *sorted((*sorted(paths), hash(content)) for content, paths in files))
            if key in seen:
                continue
            seen.add(key)
            with tempfile.TemporaryDirectory(prefix="crash-") as folder:
                for directory in sorted(directories):
                    (Path(folder) / directory).mkdir()
                for content, (first, *others) in files:
                    (Path(folder) / first).write_bytes(content)
                    for path in others:
                        (Path(folder) / path).hardlink_to(Path(folder) / first)
                yield Path(folder)


class _RecordedFile(io.FileIO):
    """A raw file whose writes a disk records."""

    def __init__(self, path: str, mode: str, disk: FaultyDisk) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        with self._disk._lock:
            end = os.fstat(self.fileno()).st_size
            position = end if "a" in self.mode else self.tell()
            self._disk.pwrite(self.fileno(), view, position)
            self.seek(position + len(view))
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        self._disk.truncate(self.fileno(), size)
        return size

    def close(self) -> None:
        if not self.closed:
            self._disk._open.pop(self.fileno(), None)
        super().close()
