"""Transactions that are tried again: `zeoid.retry`, a decorator and a loop.

Owns which errors are worth another try, how long to wait before it, and what state a transaction is left in
between. Must not know what is stored, nor where: it sees transaction managers and errors only.

One try, whatever its end:

    end of the body        what is done                      what follows
    -------------------------------------------------------------------------------------------
    no error               commit                            the loop ends
    (begin, commit too)    abort, then wait                  another try, while there are tries
      retryable error                                        and time left; else the error
    any other error        abort                             the error, at once
    begin: there is one    nothing: it is the caller's       AlreadyInTransaction, at once

An error is not retryable, whatever its class, when the transaction is committed in spite of it, or when an
unknown outcome led to it.
"""

import inspect
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypedDict, TypeVar, Unpack, overload

import transaction
from transaction.interfaces import AlreadyInTransaction, NoTransaction, TransientError

from zeoid import limits
from zeoid.errors import ConfigurationError, OutcomeUnknown

P = ParamSpec("P")
R = TypeVar("R")

#: What the package `transaction` writes into `status`: nothing has failed; every data manager has finished.
ACTIVE = "Active"
COMMITTED = "Committed"

log = logging.getLogger("zeoid.retry")


class Options(TypedDict, total=False):
    """The arguments of `Retry`, for those who pass them on."""

    tries: int
    on: type[Exception] | tuple[type[Exception], ...] | None
    first_wait_s: float
    last_wait_s: float
    deadline_s: float | None
    manager: Any
    sleep: Callable[[float], object]
    random: Callable[[], float]
    monotonic: Callable[[], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Retry:
    """Runs code in a transaction, and again in a new one when an error says that this may help.

        @zeoid.retry                                  # or @zeoid.retry(tries=5)
        def count(connection):
            connection.root()["visits"] += 1

        for attempt in zeoid.retry.attempts():        # or attempts(tries=5)
            with attempt:
                connection.root()["visits"] += 1

    `zeoid.retry` has the defaults. Calling it with arguments makes another one, which can be kept and used in
    both ways. It has no state that changes: any number of threads may use one.

    tries: how often the code runs at most. After the last try, its error is raised.
    on: the exception class, or a tuple of these, that is worth another try. None: what the transaction's
        `isRetryableError` says, which is every TransientError (ConflictError, `Disconnected`, `TimedOut`) and
        what a data manager asks for. `OutcomeUnknown` is retried only if it is named here itself; a base
        class of it is not enough.
    first_wait_s, last_wait_s: seconds. Before a new try comes a wait, chosen at random between 0 and a bound,
        which is the first at first, then doubles up to the last.
    deadline_s: seconds from the first try on, after which no other begins; None for no such bound. A try
        that runs is not interrupted.
    manager: the transaction manager; the default is `transaction.manager`, each thread's own.
    sleep, random, monotonic: what to use instead of `time.sleep`, `random.random` and `time.monotonic`.

    ConfigurationError for a number out of its range, TypeError for what is no number or no exception class.
    """

    tries: int = limits.RETRY_TRIES
    on: type[Exception] | tuple[type[Exception], ...] | None = None
    first_wait_s: float = limits.RETRY_FIRST_WAIT_S
    last_wait_s: float = limits.RETRY_LAST_WAIT_S
    deadline_s: float | None = None
    manager: Any = transaction.manager
    sleep: Callable[[float], object] = time.sleep
    random: Callable[[], float] = random.random
    monotonic: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if not isinstance(self.tries, int) or isinstance(self.tries, bool):
            raise TypeError(f"tries is a whole number, not {self.tries!r}")
        if self.tries < 1:
            raise ConfigurationError(f"tries must be 1 or more, not {self.tries}")
        _check_seconds("first_wait_s", self.first_wait_s)
        _check_seconds("last_wait_s", self.last_wait_s)
        if self.first_wait_s > self.last_wait_s:
            raise ConfigurationError(
                f"first_wait_s ({self.first_wait_s}) must not exceed last_wait_s ({self.last_wait_s})"
            )
        if self.deadline_s is not None:
            _check_seconds("deadline_s", self.deadline_s)
        for named in () if self.on is None else self.on if isinstance(self.on, tuple) else (self.on,):
            if not isinstance(named, type) or not issubclass(named, Exception):
                raise TypeError(f"on is a subclass of Exception or a tuple of these, but has {named!r}")

    @overload
    def __call__(self, function: Callable[P, R], /, **options: Unpack[Options]) -> Callable[P, R]: ...

    @overload
    def __call__(self, /, **options: Unpack[Options]) -> "Retry": ...

    def __call__(self, function: Any = None, /, **options: Unpack[Options]) -> Any:
        """Decorate *function*; without one, the same as this with other *options*.

        Each call of the decorated function is a transaction of its own, and gives what the function returned
        in the try that was committed. TypeError for what is no function, and for a coroutine or generator
        function: its body would run after the commit.
        """
        retry = replace(self, **options)
        if function is None:
            return retry
        if not callable(function):
            raise TypeError(
                f"retry decorates a function, not {function!r}; its options have names, as tries=5"
            )
        if (
            inspect.iscoroutinefunction(function)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(f"retry can't decorate {function!r}: its body would run after the commit")

        @wraps(function)
        def tried(*args: Any, **keywords: Any) -> Any:
            for attempt in retry.attempts():
                with attempt:
                    result = function(*args, **keywords)
            return result

        return tried

    def attempts(self, **options: Unpack[Options]) -> Iterator["Attempt"]:
        """A loop over the tries: its body is `with attempt:`, or `with attempt as t:` for the transaction.

        The loop ends after the try that was committed; an error that is not tried again leaves it. *options*
        are those of `Retry`. (A `with` statement can't run its body again, hence a loop around it.)
        """
        return _loop(replace(self, **options))


class Attempt:
    """What the loop yields: a context manager that is one transaction; the same one for every try."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._first_try_s = retry.monotonic()
        self._bound_s = retry.first_wait_s
        self._wait_s = 0.0
        self._failures = 0
        self._handled: BaseException | None = None
        self._witness: _Witness | None = None
        #: Whether the last try that began was the last one.
        self.over = False

    def __enter__(self) -> Any:
        self.over = True
        # What the caller is handling has nothing to do with the errors of the tries that follow.
        self._handled = sys.exception()
        while True:
            try:
                return self._retry.manager.begin()
            except AlreadyInTransaction:
                raise
            except BaseException as error:
                if not self._failed(error):
                    raise
            self.wait()
            self.over = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            return self._failed(error)
        try:
            current = self._current()
            if current is not None:
                if current.status == ACTIVE:
                    self._witness = _Witness()
                    current.join(self._witness)
                self._retry.manager.commit()
        except BaseException as failure:
            if not self._failed(failure):
                raise
        return False

    def wait(self) -> None:
        """Wait as long as the last failure asks for. The transaction is aborted by then."""
        self._retry.sleep(self._wait_s)

    def _current(self) -> Any:
        """The current transaction; None in explicit mode when the body has ended it."""
        try:
            return self._retry.manager.get()
        except NoTransaction:
            return None

    def _failed(self, error: BaseException) -> bool:
        """End the transaction after *error*; whether another try follows."""
        self._failures += 1
        witness, self._witness = self._witness, None
        try:
            # First: it asks those who joined the transaction.
            retryable = self._is_retryable(error) and not _is_half_committed(witness, error)
        finally:
            aborted = self._abort(error)
        if not retryable or not aborted or self._failures >= self._retry.tries:
            return False
        self._wait_s = self._bound_s * self._retry.random()
        self._bound_s = min(2 * self._bound_s, self._retry.last_wait_s)
        deadline_s = self._retry.deadline_s
        if deadline_s is not None:
            elapsed_s = self._retry.monotonic() - self._first_try_s
            if elapsed_s + self._wait_s >= deadline_s:
                return False
        log.info(
            "try %d of %d failed, the next one follows in %.3f s: %s: %s",
            self._failures, self._retry.tries, self._wait_s, type(error).__name__, error,
        )  # fmt: skip
        self.over = False
        return True

    def _is_retryable(self, error: BaseException) -> bool:
        if not isinstance(error, Exception):
            return False
        current = self._current()
        if current is not None and current.status == COMMITTED:
            # What came after it failed, such as a round trip to the server.
            error.add_note("The transaction was committed before this error; it is not tried again.")
            return False
        on = self._retry.on
        if _follows_unknown_outcome(error, self._handled) and not _names_unknown_outcome(on):
            return False
        if on is not None:
            return isinstance(error, on)
        return isinstance(error, TransientError) or (
            current is not None and bool(current.isRetryableError(error))
        )

    def _abort(self, error: BaseException) -> bool:
        """Whether it could be aborted. If not, *error* says so: nobody knows what a new try would meet."""
        try:
            if self._current() is not None:
                self._retry.manager.abort()
        except Exception as failure:
            error.add_note(f"Aborting the transaction failed as well: {failure!r}")
            return False
        return True


class _Witness:
    """Takes part in a transaction before everybody else, to know whether finishing it has begun."""

    #: How many others take part, from that moment on.
    finishing = 0

    def sortKey(self) -> str:
        return ""

    def abort(self, transaction: Any) -> None:
        """Nothing is to be done, here as in the others."""

    tpc_begin = commit = tpc_vote = tpc_abort = abort

    def tpc_finish(self, transaction: Any) -> None:
        self.finishing = len(transaction._resources) - 1


def _is_half_committed(witness: _Witness | None, error: BaseException) -> bool:
    """Whether one of several storages may have committed, and another has failed to."""
    if witness is None or witness.finishing < 2:
        return False
    error.add_note("Part of the transaction may be committed in another storage; it is not tried again.")
    return True


def _loop(retry: Retry) -> Iterator[Attempt]:
    attempt = Attempt(retry)
    for _ in range(retry.tries):
        yield attempt
        if attempt.over:
            return
        attempt.wait()


def _follows_unknown_outcome(error: BaseException, handled: BaseException | None) -> bool:
    """Whether *error* is an OutcomeUnknown or was raised because of one, or while one was handled.

    Cleaning up after it may raise what looks harmless. *handled* and what is behind it are older.
    """
    seen: set[int] = {id(handled)}
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, OutcomeUnknown):
            return True
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
    return False


def _names_unknown_outcome(on: type[Exception] | tuple[type[Exception], ...] | None) -> bool:
    named = () if on is None else on if isinstance(on, tuple) else (on,)
    return any(issubclass(one, OutcomeUnknown) for one in named)


def _check_seconds(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is a number of seconds, not {value!r}")
    if not 0 <= value < math.inf:
        raise ConfigurationError(f"{name} must be 0 seconds or more, and finite, not {value}")


#: With the defaults, as `zeoid.retry`.
retry = Retry()
