"""`zeoid pack`: have a running server remove what nobody needs any more, and watch it."""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from ZODB.POSException import StorageError

from zeoid import limits
from zeoid.cli.connecting import add_server, connected
from zeoid.client.storage import ClientStorage
from zeoid.errors import ConfigurationError

SUMMARY = "have a running server remove old revisions and garbage from a storage"
_BAR_WIDTH = 30

Status = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser)
    parser.add_argument(
        "-d", "--days", metavar="N", type=_days, default=0.0,
        help="keep what is needed to see the last N days (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--cancel",
        action="store_true",
        help="give up the pack that is under way",
    )
    parser.add_argument("--no-wait", action="store_true", help="don't wait until it is done")


def _days(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < 1e5:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number of days")


def run(arguments: argparse.Namespace) -> int:
    with connected(arguments) as storage:
        command = _Command(storage, arguments, Display(sys.stderr))
        return command.cancel() if arguments.cancel else command.pack()


class Display:
    """The progress on a stream: on a terminal a line that is written over, elsewhere a line now and then."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._terminal = stream.isatty()
        self._told_s = clock()

    def show(self, status: Status) -> None:
        if self._terminal:
            print(f"\r\x1b[K{_fitting(bar(status))}", end="", file=self._stream, flush=True)
        elif self._clock() - self._told_s >= limits.PACK_TELL_S:
            self._told_s = self._clock()
            print(told(status), file=self._stream, flush=True)

    def say(self, line: str) -> None:
        """One line, in the place of the bar if there is one."""
        print(f"\r\x1b[K{line}" if self._terminal else line, file=self._stream, flush=True)

    def finish(self, status: Status) -> None:
        """The pack is done: a terminal keeps the full bar, elsewhere there is nothing to add."""
        if self._terminal:
            self.say(_fitting(bar(status)))

    def clear(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=self._stream, flush=True)


def _fitting(line: str) -> str:
    """What is longer than the terminal is wide could not be written over."""
    return line[: shutil.get_terminal_size().columns - 1]


def bar(status: Status) -> str:
    percent = status["percent"]
    if percent is None:
        return told(status)
    full = int(_BAR_WIDTH * percent / 100)
    return f"[{'#' * full}{'.' * (_BAR_WIDTH - full)}] {told(status)}"


def told(status: Status) -> str:
    """How far a pack is, in words."""
    parts = [] if status["percent"] is None else [f"{int(status['percent']):3} %"]
    done = status["state"] == "done"
    parts.append("done" if done else "cancelling" if status["cancelling"] else status["phase"])
    if done:
        if status["objects"]:  # none: the storage can't tell, or there was nothing to do
            parts.append(f"{status['objects']:,} of {status['objects_total']:,} objects stay")
    elif status["phase"] == "tracing":
        parts.append(f"{status['objects']:,} of {status['objects_total']:,} objects")
    elif status["bytes_total"]:
        parts.append(f"{status['bytes'] / 1e6:,.0f} of {status['bytes_total'] / 1e6:,.0f} MB")
    return "  ".join([*parts, f"{status['seconds']:,.0f} s"])


class _Command:
    def __init__(self, storage: ClientStorage, arguments: argparse.Namespace, display: Display) -> None:
        self._storage = storage
        self._address = arguments.address
        self._name = arguments.storage
        self._days = arguments.days
        self._waits = not arguments.no_wait
        self._display = display

    def pack(self) -> int:
        watched = self._storage.pack_status() is not None
        try:
            return self._watched() if watched else self._unwatched()
        except KeyboardInterrupt:
            how = "it can't be told to stop"
            if watched:
                named = "" if self._name == "1" else f" -S {self._name}"
                how = f"to stop that: zeoid pack --cancel{named} {self._address}"
            self._display.say(f"the server goes on packing; {how}")
            return 130

    def _watched(self) -> int:
        try:
            self._storage.pack(days=self._days, wait=False)
        except StorageError as problem:
            raise ConfigurationError(f"no pack was begun: {problem}") from None
        if not self._waits:
            print(f"the server packs storage {self._name!r}")
            return 0
        ended = self._follow()
        if ended is None:
            return 1
        if ended["state"] == "done":
            self._display.finish(ended)
            self._packed(ended["size_before"], ended["size_after"], ended["seconds"])
            return 0
        if ended["state"] == "cancelled":
            self._display.say("zeoid: the pack was cancelled; the storage is as it was before")
        else:
            self._display.say(f"zeoid: the pack failed: {ended['error']}")
        return 1

    def _unwatched(self) -> int:
        """On a server that tells nothing, as ZEO's."""
        storage, before = self._storage, self._storage.getSize()
        began_s = time.monotonic()
        if self._waits:
            self._display.say("packing; this server does not tell how far it is …")
        try:
            storage.pack(days=self._days, wait=self._waits)
            if self._waits:
                len(storage)  # has the size told anew
                self._packed(before, storage.getSize(), time.monotonic() - began_s)
            else:
                print(f"the server packs storage {self._name!r}")
        except StorageError as problem:
            self._display.say(f"zeoid: the pack failed: {problem}")
            return 1
        return 0

    def cancel(self) -> int:
        try:
            self._storage.cancel_pack()
        except StorageError as problem:
            self._display.say(f"zeoid: {problem}")
            return 1
        if not self._waits:
            print(f"the server gives up the pack of storage {self._name!r}")
            return 0
        ended = self._follow()
        if ended is None:
            return 1
        if ended["state"] != "cancelled":
            self._display.say("zeoid: the pack had ended before it could be cancelled")
            return 1
        print(f"the pack of storage {self._name!r} was cancelled; the storage is as it was before")
        return 0

    def _follow(self) -> Status | None:
        """Show the pack that is under way until it has ended; how it did, None if that can't be known."""
        number = None
        try:
            while status := self._storage.pack_status():
                number = number or status["number"]
                if status["number"] != number:
                    break
                if status["state"] != "running":
                    return status
                self._display.show(status)
                time.sleep(limits.PACK_POLL_S)
            self._display.say("zeoid: the server was started anew, and does not know how the pack ended")
        except StorageError as problem:
            self._display.say(f"zeoid: it is not known how the pack ended: {problem}")
        finally:
            self._display.clear()
        return None

    def _packed(self, before: int, after: int, seconds: float) -> None:
        print(
            f"storage {self._name!r} is packed: {before:,} bytes before, {after:,} after, in {seconds:,.1f} s"
        )
