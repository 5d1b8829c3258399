"""`zeoid cache`: show, verify or clear a directory of object caches that processes share."""

import argparse
from pathlib import Path

import lmdb

from zeoid.cache import environment
from zeoid.cache.environment import Environment, Unusable
from zeoid.errors import ConfigurationError
from zeoid.model import NO_TID

SUMMARY = "show, verify or clear a directory of shared object caches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        metavar="ACTION",
        choices=("show", "verify", "clear"),
        help="show: what there is; verify: read every record; clear: remove everything",
    )
    parser.add_argument("directory", metavar="DIRECTORY", help="what clients have as cache_dir")


def run(arguments: argparse.Namespace) -> int:
    directory = Path(arguments.directory)
    try:
        if arguments.action == "clear":
            return _clear(directory)
        return _show(directory, verify=arguments.action == "verify")
    except OSError as problem:
        raise ConfigurationError(f"{problem.filename or directory}: {problem.strerror or problem}") from None


def _clear(directory: Path) -> int:
    removed = environment.clear(directory)
    for path in removed:
        print(f"removed {path}")
    print(f"{len(removed)} caches were removed")
    return 0


def _show(directory: Path, *, verify: bool) -> int:
    """1 if a record is damaged."""
    damaged = 0
    found = environment.environments(directory)
    for path in found:
        print(path)
        try:
            said = environment.about(path)
        except (OSError, ValueError):
            said = {}
        print(f"  storage {said.get('key', 'unknown')}")
        print(f"  {'in use' if environment.is_used(path) else 'not in use'}")
        try:
            with environment.look_into(path) as here:
                _describe(here)
                if verify:
                    wrong = here.records.damaged()
                    damaged += wrong
                    print(f"  {wrong:,} damaged revisions, which are never used" if wrong else "  sound")
        except (Unusable, lmdb.Error) as problem:
            print(f"  can't be opened: {problem}")
    if not found:
        print(f"there are no caches in {directory}")
    return 1 if damaged else 0


def _describe(here: Environment) -> None:
    records = here.records
    state = records.look()
    current, past = records.count()
    print(f"  {records.used_bytes():,} of {here.size_bytes:,} bytes used")
    print(f"  {current:,} current revisions, {past:,} past ones, {state.evicted:,} evicted so far")
    print(f"  up to transaction {'none' if state.applied == NO_TID else state.applied.hex()}")
