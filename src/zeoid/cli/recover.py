"""`zeoid recover`: make a data file complete by itself after a crash, without serving it."""

import argparse
import logging
import os
import sys
from datetime import UTC, datetime

from zeoid.engines.disk import Disk
from zeoid.engines.opening import locked, open_filestorage
from zeoid.engines.recovery import journal_directory, set_aside
from zeoid.errors import ConfigurationError

SUMMARY = "write what a crash left in the journal to the data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="the data file, which no server may be using")
    parser.add_argument(
        "--trust-data-file", action="store_true",
        help="if data file and journal don't belong together (a back-up was restored): go on with the data "
        "file as it is, and move the journal away",
    )  # fmt: skip
    parser.add_argument(
        "--blob-dir", metavar="DIRECTORY",
        help="where its blobs are: needed if the journal has transactions with blobs",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    path: str = arguments.path
    disk = Disk()
    if not disk.exists(path) and not disk.exists(journal_directory(path)):
        raise ConfigurationError(f"{path} does not exist")
    if arguments.trust_data_file:
        if not disk.exists(path):
            raise ConfigurationError(f"{path} does not exist: put a data file there first")
        with locked(path):
            suffix = f"{datetime.now(UTC):aside-%Y%m%d-%H%M%S}"
            aside = set_aside(os.path.abspath(path), disk, suffix, arguments.blob_dir)
        print(f"{path}: there is no journal" if aside is None else f"the journal was moved to {aside}")
    blob_dir: str | None = arguments.blob_dir
    if blob_dir is not None and not os.path.isdir(blob_dir):
        raise ConfigurationError(f"the blob directory {blob_dir} does not exist")
    engine = open_filestorage(path, blob_dir=blob_dir)
    try:
        tid = engine.checkpoint()
    finally:
        engine.close()
    print(f"{path} is complete: its last transaction is {tid.hex()}")
    return 0
