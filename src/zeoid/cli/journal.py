"""`zeoid journal`: print what is in the commit journal of a data file."""

import argparse

from zeoid.engines.disk import Disk
from zeoid.engines.journal import dump
from zeoid.engines.recovery import journal_directory
from zeoid.errors import ConfigurationError

SUMMARY = "print the commit journal of a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="the data file, or the directory of its journal")


def run(arguments: argparse.Namespace) -> int:
    disk = Disk()
    path: str = arguments.path.rstrip("/")
    directory = path if path.endswith(".journal") else journal_directory(path)
    if not disk.exists(directory):
        raise ConfigurationError(f"there is no journal: {directory} does not exist")
    for line in dump(directory, disk):
        print(line)
    return 0
