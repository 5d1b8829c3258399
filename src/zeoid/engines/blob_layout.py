"""Where the files of a blob directory are: its two layouts, and the marker that tells which one it has.

    bushy   0x00/0x00/0x00/0x00/0x00/0x00/0x01/0x2a/0x03f0a1b2c3d4e5f6.blob   a level for each byte of the oid
    lawn    0x012a/0x03f0a1b2c3d4e5f6.blob

The directory of an object has a file for each revision, named by its tid. Names and marker are those of
ZODB's own blob directories: any ZODB can go on with them.

    `.layout` says      and there is                          the layout is
    bushy, lawn         anything                              what it says
    anything else       anything                              none: it isn't a server's, and is refused
    nothing, or it      directories 0x.. in directories 0x..  bushy
    isn't there         other names, without `tmp` and dots   lawn, as ZODB takes it
                        nothing                               bushy

Owns names only: opens no blob, and knows neither transactions nor a journal.
"""

import contextlib
import os
import re
from typing import Final

from ZODB.utils import oid_repr, tid_repr

from zeoid.engines.disk import Disk
from zeoid.errors import ConfigurationError

MARKER: Final = ".layout"
SUFFIX: Final = ".blob"
_NEW_MARKER: Final = ".layout.new"
#: ZODB's directory for uncommitted data. It is made before the marker is.
_TEMPORARY: Final = "tmp"
_LAYOUTS: Final = ("bushy", "lawn")
_BYTE: Final = re.compile("0x[0-9a-f]{2}")
#: No marker is longer, whoever wrote it.
_MARKER_BYTES: Final = 64


class BlobLayout:
    """The paths in the blob directory *root*, which has the layout *name*."""

    def __init__(self, root: str, name: str) -> None:
        self.root = root
        self.name = name

    def directory(self, oid: bytes) -> str:
        """Where the object's revisions are."""
        levels = [f"0x{byte:02x}" for byte in oid] if self.name == "bushy" else [oid_repr(oid)]
        return os.path.join(self.root, *levels)

    def file(self, oid: bytes, tid: bytes) -> str:
        """Where the revision *tid* of the object is, or will be."""
        return os.path.join(self.directory(oid), tid_repr(tid) + SUFFIX)

    def above(self, directory: str) -> list[str]:
        """*directory* and every one that it is in, up to the root."""
        found = [directory]
        while found[-1] != self.root:
            found.append(os.path.dirname(found[-1]))
        return found


def find_layout(root: str, disk: Disk) -> BlobLayout:
    """The layout of a directory that is there. ConfigurationError if no storage has its blobs there."""
    if not os.path.isdir(root):
        raise ConfigurationError(f"the blob directory {root} does not exist")
    found = _marked(root, disk) or _guessed(root, disk)
    if found not in _LAYOUTS:
        hint = ": it is a client's cache" if found == "zeocache" else ""
        raise ConfigurationError(
            f"{root} has the layout {found!r}, which no storage's blob directory has{hint}"
        )
    return BlobLayout(root, found)


def make_layout(root: str, disk: Disk) -> BlobLayout:
    """As `find_layout`, but the directory is made where there is none, and what is found is durably marked.

    ZODB makes `tmp` first and the marker then, without a sync: after a crash in between it would take a new
    directory for a lawn.
    """
    parent = os.path.dirname(root)
    if not os.path.isdir(parent):
        raise ConfigurationError(f"the directory {parent} does not exist; make it first")
    if not disk.exists(root):
        disk.mkdir(root)
        disk.sync_directory(parent)
    layout = find_layout(root, disk)
    if not _marked(root, disk):
        new = os.path.join(root, _NEW_MARKER)
        file = disk.open(new, create=True)
        try:
            disk.truncate(file, 0)
            disk.pwrite(file, layout.name.encode("ascii"), 0)
            disk.sync(file)
        finally:
            disk.close(file)
        disk.rename(new, os.path.join(root, MARKER))
        disk.sync_directory(root)
    return layout


def tid_of(name: str) -> bytes | None:
    """The tid in the name of a revision's file; None if it is something else."""
    if not name.startswith("0x") or not name.endswith(SUFFIX):
        return None
    try:
        tid = bytes.fromhex(name[2 : -len(SUFFIX)])
    except ValueError:
        return None
    return tid.rjust(8, b"\0") if len(tid) <= 8 else None


def make_directories(disk: Disk, path: str) -> None:
    """*path* and those above it that are missing."""
    if not disk.exists(path):
        make_directories(disk, os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # clients that share the directory make some, too
            disk.mkdir(path)


def _marked(root: str, disk: Disk) -> str:
    """What the marker says; empty if nothing."""
    with contextlib.suppress(FileNotFoundError):
        file = disk.open(os.path.join(root, MARKER), read_only=True)
        try:
            return disk.pread(file, _MARKER_BYTES, 0).decode("ascii", "replace").strip("\0 \r\n\t")
        finally:
            disk.close(file)
    return ""


def _guessed(root: str, disk: Disk) -> str:
    names = [name for name in disk.listdir(root) if not name.startswith(".") and name != _TEMPORARY]
    for name in filter(_BYTE.fullmatch, names):
        inner = os.path.join(root, name)
        if os.path.isdir(inner) and any(map(_BYTE.fullmatch, disk.listdir(inner))):
            return "bushy"
    return "lawn" if names else "bushy"
