"""What may become of writes and names that were not synced when the power is cut: the model of `FaultyDisk`.

Owns which combinations are tried, and what each of them leaves. Touches no disk.
"""

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SECTOR_BYTES: Final = 512
#: Tears of one write that are tried at most, at sector boundaries and elsewhere each.
_TEARS: Final = 8

#: Parts (start, end) of a write that reached the disk, and whether the file is as long as if all had.
Fate = tuple[tuple[tuple[int, int], ...], bool]


@dataclass(slots=True, eq=False)
class File:
    """One file, whatever its names: what of it is durable."""

    durable: bytes = b""


@dataclass(slots=True, eq=False)
class Change:
    """Something that isn't durable: a write (data, at offset), or a change of length (data None)."""

    file: File
    offset: int
    data: bytes | None
    #: A sync of it failed: no later one makes it durable. Others may be known to be.
    doubtful: bool = False
    certain: bool = False


@dataclass(slots=True, eq=False)
class Naming:
    """A name that isn't durable: it was given to *file*, moved from *source* (a directory's, if there is no
    file), or else removed."""

    target: str
    file: File | None = None
    source: str | None = None
    directory: bool = False
    #: Of a directory that was removed: names in it whose own removal may not be durable, with their files.
    taken_along: tuple[tuple[str, File], ...] | None = None


@dataclass(slots=True)
class Names:
    """Directories, and which names lead to which files. Paths are relative."""

    files: dict[str, File] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)

    def apply(self, naming: Naming) -> None:
        if naming.source is not None:
            self.files.pop(naming.source, None)
            if naming.file is not None:
                self.files[naming.target] = naming.file
            elif naming.source in self.directories:
                self._move_directory(naming.source, naming.target)
        elif naming.taken_along is not None:
            self.directories.discard(naming.target)
            for path, file in naming.taken_along:
                if self.files.get(path) is file:  # not one that got the name in a new directory
                    del self.files[path]
        elif naming.directory:
            self.directories.add(naming.target)
        elif naming.file is None:
            self.files.pop(naming.target, None)
        else:
            self.files[naming.target] = naming.file

    def _move_directory(self, source: str, target: str) -> None:
        def moved(path: str) -> str:
            inside = path == source or path.startswith(source + os.sep)
            return target + path[len(source) :] if inside else path

        self.files = {moved(path): file for path, file in self.files.items()}
        self.directories = {moved(path) for path in self.directories}

    def copy(self) -> "Names":
        return Names(dict(self.files), set(self.directories))


def halves(naming: Naming, folder: str) -> tuple[Naming | None, Naming | None]:
    """What of it a sync of the directory *folder* makes durable, and what it does not.

    Of a file that was moved from one directory to another, each has its own part.
    """
    source, target = naming.source, naming.target
    if source is not None and naming.file is not None and os.path.dirname(source) != os.path.dirname(target):
        arrives, leaves = Naming(target, naming.file), Naming(source)
        if os.path.dirname(target) == folder:
            return arrives, leaves
        if os.path.dirname(source) == folder:
            return leaves, arrives
        return None, naming
    return (naming, None) if os.path.dirname(target) == folder else (None, naming)


# What may become of it ---------------------------------------------------------------------------------


def files_of(pending: Sequence[Change | Naming]) -> set[File]:
    """The files that are written to or named."""
    return {each.file for each in pending if each.file is not None}


def whole(change: Change) -> Fate:
    """It reached the disk."""
    return ((0, len(change.data or b"")),), True


_LOST: Final[Fate] = (), False
#: The file got longer, or got its name, but nothing was written.
_EMPTY: Final[Fate] = (), True


def always(pending: Sequence[Change | Naming]) -> Iterator[list[Fate]]:
    """What is tried every time, as `FaultyDisk.crash_states` lists it: a fate for each that is pending."""
    everything = [_fate_kept(each) for each in pending]
    yield [_LOST] * len(pending)
    yield everything
    names = [index for index, each in enumerate(pending) if isinstance(each, Naming)]
    for index in range(len(pending)):
        yield [*everything[:index], _LOST, *everything[index + 1 :]]
    yield [_EMPTY if index in names else _LOST for index in range(len(pending))]
    yield [_LOST if index in names else fate for index, fate in enumerate(everything)]
    for index in names:
        yield [_LOST if other in names and other != index else fate for other, fate in enumerate(everything)]
    last = {
        id(each.file): index
        for index, each in enumerate(pending)
        if isinstance(each, Change) and each.data and not each.certain
    }
    for index in last.values():
        change = pending[index]
        assert isinstance(change, Change)
        for fate in (_EMPTY, *_torn(change)):
            yield [*everything[:index], fate, *everything[index + 1 :]]


def _fate_kept(each: Change | Naming) -> Fate:
    return whole(each) if isinstance(each, Change) else _EMPTY


def _torn(change: Change) -> Iterator[Fate]:
    """Its beginning or its end only, cut at sectors and within one."""
    size = len(change.data or b"")
    sectors = range(SECTOR_BYTES - change.offset % SECTOR_BYTES, size, SECTOR_BYTES)
    odd = {1, size // 3, size // 2 | 1, size - 1}
    for cut in [*_spread(sectors), *sorted(cut for cut in odd if 0 < cut < size)]:
        yield ((0, cut),), False
        yield ((0, cut),), True
        yield ((cut, size),), True


def _spread(cuts: Sequence[int]) -> Sequence[int]:
    return cuts if len(cuts) <= _TEARS else [*cuts[:: -(-len(cuts) // (_TEARS - 1))], cuts[-1]]


def sampled(pending: Sequence[Change | Naming], limit: int, chance: random.Random) -> Iterator[list[Fate]]:
    """Random combinations, more than *limit*."""
    # Many are found to be the same state again, so there are more tries than states wanted.
    for _ in range(4 * limit if pending else 0):
        kept = chance.random()
        yield [_random_fate(each, kept, chance) for each in pending]


def _random_fate(each: Change | Naming, kept: float, chance: random.Random) -> Fate:
    if isinstance(each, Naming) or each.data is None:
        return _EMPTY if chance.random() < kept else _LOST
    if chance.random() < kept:
        return whole(each)
    size = len(each.data)
    if chance.random() < 0.5:
        return _EMPTY if chance.random() < 0.5 else _LOST
    begins = [0, *range(SECTOR_BYTES - each.offset % SECTOR_BYTES, size, SECTOR_BYTES), size]
    return tuple(part for part in itertools.pairwise(begins) if chance.random() < 0.5), chance.random() < 0.5


def state_after(
    durable: Names, contents: dict[int, bytes], pending: Sequence[Change | Naming], fates: Sequence[Fate]
) -> tuple[set[str], list[tuple[bytes, list[str]]]]:
    """The directories, and content and paths of each file, if this became of what was pending."""
    names = durable.copy()
    changes: dict[int, list[tuple[Change, Fate]]] = {}
    for each, fate in zip(pending, fates, strict=True):
        if isinstance(each, Change):
            changes.setdefault(id(each.file), []).append((each, whole(each) if each.certain else fate))
        elif fate != _LOST:
            names.apply(each)
    directories = {path for path in names.directories if _reachable(path, names.directories)}
    named: dict[int, list[str]] = {}
    for path, file in names.files.items():
        if _reachable(path, directories):
            named.setdefault(id(file), []).append(path)
    return directories, [
        (content_after(contents[file], changes.get(file, ())), paths) for file, paths in named.items()
    ]


def _reachable(path: str, directories: set[str]) -> bool:
    return all(str(parent) in directories for parent in list(Path(path).parents)[:-1])


def content_after(content: bytes, changes: Sequence[tuple[Change, Fate]]) -> bytes:
    """*content* with each change carried out as far as its fate says."""
    if not changes:
        return content
    result = bytearray(content)
    for change, (parts, full_length) in changes:
        if change.data is None:
            if full_length:
                del result[change.offset :]
                result.extend(bytes(change.offset - len(result)))
            continue
        reached = len(change.data) if full_length else max((end for _, end in parts), default=0)
        if reached:
            result.extend(bytes(max(0, change.offset + reached - len(result))))
        for start, end in parts:
            result[change.offset + start : change.offset + end] = change.data[start:end]
    return bytes(result)
