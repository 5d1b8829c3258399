"""What becomes of blobs whose records a pack has removed.

FileStorage's packer writes a list, `.removed` in the blob directory: lines with the oid and tid of a
revision, or with an oid alone, of an object that is garbage. It is worked off when the packed file is in its
place, or, after a crash, when the storage is opened next. Nothing is believed that the list says: each file
goes only if the storage has no such record any more. So it does not matter which of the two files a crash
left, whether the list is whole, or what was committed to an object that was garbage.

Owns the list and the copies of what a pack keeps (`.old`). Which names are durable is `blobs`'s business.
"""

import binascii
import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any, Final

from zeoid.engines.blob_layout import MARKER, SUFFIX, make_directories
from zeoid.engines.blobs import BlobDirectory
from zeoid.engines.disk import Disk
from zeoid.engines.records import DataFile
from zeoid.model import NO_TID

log = logging.getLogger("zeoid.server")
_LIST: Final = ".removed"
_OID_BYTES: Final = 8


def remove_packed(blobs: BlobDirectory, storage: Any, disk: Disk) -> None:
    """Work off the list, if there is one. The data file must be durable under its name.

    With `pack_keep_old` what goes is moved to the directory `.old` beside the blobs, and what stays gets a
    second name there, as FileStorage does it.
    """
    path = os.path.join(blobs.path, _LIST)
    if not disk.exists(path):
        return
    old = f"{blobs.path}.old" if storage.pack_keep_old else None
    file = DataFile(storage)
    # What is committed from now on may have its blob before it has its record.
    reached = storage.lastTransaction() or NO_TID

    def is_gone(oid: bytes, tid: bytes) -> bool:
        return tid <= reached and file.steadily(lambda: file.revision(oid, tid)) is None

    for oid, listed in _listed(path, disk):
        for tid in blobs.revisions(oid) if listed is None else [listed]:
            if is_gone(oid, tid):
                blobs.remove(oid, tid, old)
    if old is not None:
        _keep_others(blobs.path, old, disk)
    blobs.sync_names()
    if old is not None:
        disk.sync_all(blobs.path)
    disk.unlink(path)


def sync_list(root: str, disk: Disk) -> None:
    """Have the list durable before the file is replaced, or what it lists would stay after a crash."""
    path = os.path.join(root, _LIST)
    if disk.exists(path):
        file = disk.open(path)
        try:
            disk.sync(file)
        finally:
            disk.close(file)
        disk.sync_directory(root)


def _listed(path: str, disk: Disk) -> Iterator[tuple[bytes, bytes | None]]:
    file = disk.open(path, read_only=True)
    try:
        lines = disk.pread(file, disk.size(file), 0).split(b"\n")
    finally:
        disk.close(file)
    for line in lines[:-1]:  # what follows the last end of a line was not written completely
        with contextlib.suppress(binascii.Error):
            name = binascii.unhexlify(line.strip())
            if len(name) == _OID_BYTES:
                yield name, None
            elif len(name) == 2 * _OID_BYTES:
                yield name[:_OID_BYTES], name[_OID_BYTES:]


def _keep_others(root: str, old: str, disk: Disk) -> None:
    """Give every blob that stays a name in *old*, too, for who goes back to the old data file."""
    try:
        _keep(disk, os.path.join(root, MARKER), os.path.join(old, MARKER))
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if name.endswith(SUFFIX):
                    path = os.path.join(folder, name)
                    _keep(disk, path, old + path[len(root) :])
    except OSError as problem:
        log.warning("%s is not complete: %s", old, problem)


def _keep(disk: Disk, path: str, target: str) -> None:
    if disk.exists(target):
        return
    make_directories(disk, os.path.dirname(target))
    with contextlib.suppress(FileNotFoundError):  # an abandoned one, or one that was just removed
        disk.link(path, target)
