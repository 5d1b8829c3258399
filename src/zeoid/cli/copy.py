"""`zeoid copy`: copy all of a database into another storage, and compare the two."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from zeoid import limits
from zeoid.admin.comparing import differences
from zeoid.admin.copying import Copying, Stopped, Tally
from zeoid.admin.reading import Reading, shown
from zeoid.cli.connecting import add_security, said_once, security
from zeoid.config.storages import NamedStorage, named_storage
from zeoid.errors import ConfigurationError, CopyFailed
from zeoid.model import NO_TID

SUMMARY = "copy a database into another storage, with its history"

_AGAIN = "the same command goes on from there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a data file, a URI (zeoid://, zeo://, file:// …), a ZConfig file, or the address of a server"
    parser.add_argument("source", metavar="SOURCE", help=f"{what}; it is only read")
    parser.add_argument("destination", metavar="DESTINATION", help="the same; empty, or an unfinished copy")
    parser.add_argument(
        "--source-blobs", metavar="DIR", help="the blob directory of a source that is a data file"
    )
    parser.add_argument(
        "--destination-blobs", metavar="DIR",
        help="the blob directory of a destination that is a data file; made if it does not exist",
    )  # fmt: skip
    parser.add_argument(
        "--allow-missing-blobs", action="store_true",
        help="copy the record of a blob whose file is missing in the source, instead of stopping there",
    )  # fmt: skip
    parser.add_argument(
        "--no-verify", action="store_true", help="don't read both again afterwards to compare them"
    )
    add_security(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    if _same(arguments.source, arguments.destination):
        raise ConfigurationError("source and destination are the same")
    shown_to_servers = security(arguments)
    source = named_storage(
        arguments.source, blob_directory=arguments.source_blobs, client_options=shown_to_servers
    )
    destination = named_storage(
        arguments.destination,
        blob_directory=arguments.destination_blobs,
        writing=True,
        client_options=shown_to_servers,
    )
    progress = Progress(sys.stderr, time.monotonic, quiet=arguments.quiet)
    with (
        _closing(_open(source)) as opened,
        Reading(opened, source.name) as reading,
        progress,
        _stopping(progress),
    ):
        status, last_tid = _copy(reading, destination, progress, arguments.allow_missing_blobs)
        if status or arguments.no_verify:
            return status
        return _verify(reading, destination, last_tid, progress)


def _same(source: str, destination: str) -> bool:
    if os.path.exists(source) and os.path.exists(destination):
        return os.path.samefile(source, destination)
    return source == destination


def _copy(
    source: Reading, destination: NamedStorage, progress: "Progress", allow_missing_blobs: bool
) -> tuple[int, bytes]:
    """The exit status so far, and the last transaction that the destination has."""
    with _closing(_open(destination)) as opened:
        copying = Copying(
            source, opened, destination.name, progress.copying, allow_missing_blobs=allow_missing_blobs
        )
        tally = copying.tally
        try:
            after = copying.prepare()
            if after != NO_TID:
                progress.say(
                    f"going on after transaction {shown(after)}, which {destination.name} has already"
                )
            progress.restart()
            copying.run()
        except CopyFailed as problem:
            progress.end_line()
            print(f"zeoid: {problem}", file=sys.stderr)
            print(f"zeoid: {_state(destination, tally)}", file=sys.stderr)
            return 1, tally.last_tid
        except (Stopped, KeyboardInterrupt):
            progress.end_line()
            print(f"zeoid: interrupted; {_state(destination, tally)}, {_AGAIN}", file=sys.stderr)
            return 130, tally.last_tid
    progress.end_line()
    if tally.transactions or tally.last_tid == NO_TID:
        print(f"copied {_figures(tally, progress.elapsed_s)}")
    else:
        print(f"nothing to copy: {_state(destination, tally)}")
    if tally.missing_blobs:
        print(f"{tally.missing_blobs:,} blobs are missing in the source: {'; '.join(tally.missing)}")
    return 0, tally.last_tid


def _verify(source: Reading, destination: NamedStorage, last_tid: bytes, progress: "Progress") -> int:
    """Compare the two, the destination opened anew: as the next one who opens it will see it."""
    progress.restart()
    equal = differing = 0
    with _closing(_open(destination)) as opened, Reading(opened, destination.name) as reading:
        try:
            for what in differences(source, reading, last_tid, progress.comparing):
                if what is None:
                    equal += 1
                else:
                    differing += 1
                    if differing <= limits.COPY_TOLD:
                        progress.end_line()
                        print(f"zeoid: {what}", file=sys.stderr)
                progress.compared = equal + differing
        except CopyFailed as problem:
            progress.end_line()
            print(f"zeoid: not verified: {problem}", file=sys.stderr)
            return 1
        except (Stopped, KeyboardInterrupt):
            progress.end_line()
            print("zeoid: interrupted; the copy is whole, but not verified", file=sys.stderr)
            return 130
    progress.end_line()
    if differing:
        print(f"zeoid: {differing:,} transactions differ, {equal:,} are equal", file=sys.stderr)
        return 1
    if source.keeps_history and reading.keeps_history:
        print(f"verified: {equal:,} transactions are equal in both")
    else:
        print("verified: the newest revision of each object is equal in both; not both keep history")
    return 0


def _state(destination: NamedStorage, tally: Tally) -> str:
    if tally.last_tid == NO_TID:
        return f"{destination.name} has no transaction"
    return f"{destination.name} has all transactions up to {shown(tally.last_tid)}"


def _figures(tally: Tally, elapsed_s: float) -> str:
    blobs = f", {tally.blobs:,} blobs" if tally.blobs else ""
    mb = tally.size_bytes / 1e6
    per_s = max(elapsed_s, 1e-3)
    return (
        f"{tally.transactions:,} transactions, {tally.records:,} records{blobs}, {mb:,.1f} MB in "
        f"{elapsed_s:,.1f} s ({tally.records / per_s:,.0f} records/s, {mb / per_s:,.1f} MB/s)"
    )


def _open(storage: NamedStorage) -> Any:
    with said_once():
        return storage.open()


@contextlib.contextmanager
def _closing(storage: Any) -> Iterator[Any]:
    try:
        yield storage
    finally:
        storage.close()


class Progress:
    """How far it is, now and then: on a terminal one line that is written again and again, or else a line
    each.

    Its `copying` and `comparing` are called all the time; they also end the work when `stop` was called.
    """

    def __init__(self, output: Any, clock: Callable[[], float], *, quiet: bool = False) -> None:
        self._output = output
        self._clock = clock
        self._quiet = quiet
        self._terminal = bool(output.isatty())
        self._every_s = limits.COPY_TERMINAL_S if self._terminal else limits.COPY_LINE_S
        self._stopped = False
        self._width = 0
        self.compared = 0
        self.restart()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.end_line()

    def restart(self) -> None:
        """Count the time from now on."""
        self._began_s = self._clock()
        self._next_s = self._began_s + self._every_s

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began_s

    def stop(self) -> None:
        """Have the next call end the work. May be called in a signal handler."""
        self._stopped = True

    def copying(self, tally: Tally) -> None:
        if self._due():
            self._show(f"{tally.share:4.0%}  {_figures(tally, self.elapsed_s)}")

    def comparing(self) -> None:
        if self._due():
            self._show(f"verifying: {self.compared:,} transactions compared")

    def _due(self) -> bool:
        if self._stopped:
            raise Stopped
        now_s = self._clock()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._every_s
        return not self._quiet

    def _show(self, text: str) -> None:
        if self._terminal:
            # Over what was there, to its end.
            self._output.write(f"\r{text:<{self._width}}")
            self._width = len(text)
        else:
            self._output.write(f"{text}\n")
        self._output.flush()

    def say(self, text: str) -> None:
        """A line of its own, unless it is to be quiet."""
        if not self._quiet:
            self.end_line()
            print(text, file=self._output)

    def end_line(self) -> None:
        if self._width:
            self._output.write("\n")
            self._output.flush()
            self._width = 0


@contextlib.contextmanager
def _stopping(progress: Progress) -> Iterator[None]:
    """SIGINT and SIGTERM end the work between two records, so that a storage isn't torn out of a commit.

    A second SIGINT does not wait for that.
    """

    def stop(number: int, frame: Any) -> None:
        progress.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
