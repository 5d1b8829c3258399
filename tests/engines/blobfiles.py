"""Blob directories for tests: what lies where, and blobs in few words."""

from __future__ import annotations

import os
from pathlib import Path

from tests.engines.journals import NAME
from zeoid.engines.blob_layout import make_layout
from zeoid.engines.blobs import STAGED, BlobDirectory
from zeoid.engines.disk import Disk
from zeoid.engines.journal_format import LoggedBlob
from zeoid.model import StagedBlob


def blob_directory(path: Path, disk: Disk, owner: bytes = NAME) -> BlobDirectory:
    """As it is when a storage was opened."""
    found = BlobDirectory(make_layout(str(path), disk), disk, owner)
    found.begin()
    found.sweep()
    return found


def stage(blobs: BlobDirectory, content: bytes, *, size_bytes: int | None = None) -> StagedBlob:
    file = blobs.stage(size_bytes)
    file.write(content)
    return file.complete()


def promised(blobs: BlobDirectory, oid: bytes, content: bytes) -> LoggedBlob:
    blob = LoggedBlob(oid, stage(blobs, content).name)
    blobs.promise([blob])
    return blob


def content(blobs: BlobDirectory, oid: bytes, tid: bytes) -> bytes:
    with blobs.open(oid, tid) as file:
        return file.read()


def staged_files(path: Path) -> list[str]:
    """What is in the directory of staged files."""
    folder = path / STAGED
    return sorted(os.listdir(folder)) if folder.exists() else []


def final_files(path: Path) -> dict[str, bytes]:
    """Every blob with a final name, by its path below the blob directory."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*.blob"))
        if file.is_file()
    }


def contents(path: Path) -> list[bytes]:
    """Of every blob with a final name, in the order of the contents."""
    return sorted(final_files(path).values())
