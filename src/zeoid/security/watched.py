"""A file of rules that may change while a server runs.

Owns when it is looked at, and what becomes of a fault in it:

    it is looked at and    becomes
    is as it was           –
    is another, and good   what it says holds from now on
    is another, and bad    what held before goes on to hold, and the log says so, once for each fault
    is not there           the same: a file that is replaced may be away for a moment

So a typing error lets nobody in, and locks nobody out. Must not know what the files say.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from zeoid import limits
from zeoid.errors import ConfigurationError

log = logging.getLogger("zeoid.server")
_Rules = TypeVar("_Rules")


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
        self._monotonic = monotonic
        self._every_s = every_s
        self._told = ""
        self._looked_s = monotonic()
        self._seen, self.rules = self._read()

    def look(self) -> bool:
        """Look at the file, if that was not done lately. Whether `rules` have become others."""
        now_s = self._monotonic()
        if now_s - self._looked_s < self._every_s:
            return False
        self._looked_s = now_s
        try:
            if _signature(os.stat(self.path)) == self._seen:
                return False
            before = self.rules
            self._seen, self.rules = self._read()
        except (OSError, ConfigurationError) as problem:
            self._complain(problem)
            return False
        self._told = ""
        log.info("%s was read again", self.path)
        return self.rules != before

    def _read(self) -> "tuple[tuple[int, ...], _Rules]":
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if self._private:
                    refuse_if_open_to_others(self.path, found)
                content = file.read(limits.RULES_BYTES + 1)
            if len(content) > limits.RULES_BYTES:
                raise ConfigurationError(f"{self.path} has more than {limits.RULES_BYTES:,} bytes")
            return _signature(found), self._parse(content.decode("utf-8"))
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


def _signature(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode
