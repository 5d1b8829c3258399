"""Files that may change while they are in use: rules, and certificates.

Owns when it is looked at, and what becomes of a fault in it:

    it is looked at and    becomes
    is as it was           –
    is another, and good   what it says holds from now on
    is another, and bad    what held before goes on to hold, and the log says so, once for each fault
    is not there           the same: a file that is replaced may be away for a moment

So a typing error lets nobody in, and locks nobody out. What is made of certificates is `tls`'
business, which goes by `Changes` as well. Must not know what the files say.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from zeoid import limits
from zeoid.errors import ConfigurationError

log = logging.getLogger("zeoid.server")
_Rules = TypeVar("_Rules")


class Changes:
    """Whether files have become others since they were looked at the last time."""

    def __init__(
        self, files: Sequence[str | os.PathLike[str]], monotonic: Callable[[], float], every_s: float
    ) -> None:
        self._files = files
        self._monotonic = monotonic
        self._every_s = every_s
        self.note()

    def note(self) -> None:
        """They are about to be read. To be called first: what changes meanwhile is found the next time."""
        self._looked_s = self._monotonic()
        self._seen = [_signature(file) for file in self._files]

    def found(self) -> bool:
        """Whether there are any. They are not looked for if that was done lately."""
        if self._monotonic() - self._looked_s < self._every_s:
            return False
        before = self._seen
        self.note()
        return self._seen != before


class Watched(Generic[_Rules]):
    """What *parse* makes of a file. ConfigurationError, with the file's name, if there is none at first."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        parse: Callable[[str], _Rules],
        *,
        private: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
        every_s: float = limits.RULES_RELOAD_S,
    ) -> None:
        """*private*: nobody but the owner of the file may read it. *parse* raises ValueError."""
        self.path = Path(path)
        self._parse = parse
        self._private = private
        self._told = ""
        self._changes = Changes([path], monotonic, every_s)
        self.rules = self._read()

    def look(self) -> bool:
        """Look at the file, if that was not done lately. Whether `rules` have become others."""
        if not self._changes.found():
            return False
        before = self.rules
        try:
            self.rules = self._read()
        except ConfigurationError as problem:
            self._complain(problem)
            return False
        self._told = ""
        log.info("%s was read again", self.path)
        return self.rules != before

    def _read(self) -> _Rules:
        try:
            with open(self.path, "rb") as file:
                if self._private:
                    refuse_if_open_to_others(self.path, os.fstat(file.fileno()))
                content = file.read(limits.RULES_BYTES + 1)
            if len(content) > limits.RULES_BYTES:
                raise ConfigurationError(f"{self.path} has more than {limits.RULES_BYTES:,} bytes")
            return self._parse(content.decode("utf-8"))
        except OSError as problem:
            raise ConfigurationError(f"{self.path} can't be read: {problem.strerror}") from None
        except UnicodeError:
            raise ConfigurationError(f"{self.path} is no text in UTF-8") from None
        except ValueError as problem:
            raise ConfigurationError(f"{self.path}: {problem}") from None

    def _complain(self, problem: Exception) -> None:
        text = str(problem)
        if text != self._told:
            self._told = text
            log.error("%s. What it said before goes on to hold", text)


def refuse_if_open_to_others(path: Path, found: os.stat_result) -> None:
    """ConfigurationError if others than its owner can read it."""
    if os.name == "posix" and found.st_mode & 0o077:
        raise ConfigurationError(f"others can read {path}: chmod 600 {path}")


def _signature(file: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What is another one when a file is; None if there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode
