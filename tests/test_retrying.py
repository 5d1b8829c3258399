"""`zeoid.retry`: what is tried again, how long it waits, and what is left behind by each try.

Nothing here waits: time, sleep and randomness are arguments.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import transaction
from persistent.mapping import PersistentMapping
from transaction.interfaces import AlreadyInTransaction, DoomedTransaction, TransientError
from ZODB.DB import DB
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError, ReadConflictError, StorageError

import zeoid
from zeoid import limits
from zeoid.errors import ConfigurationError, Disconnected, OutcomeUnknown, TimedOut
from zeoid.retrying import Retry


class Time:
    """A clock that only sleeping and `pass_s` advance."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, wait_s: float) -> None:
        self.slept_s.append(wait_s)
        self.pass_s(wait_s)

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


class Member:
    """A data manager that writes down what the transaction does with it, and fails where it is told to."""

    def __init__(self, manager: Any, history: list[str], **failures: BaseException) -> None:
        self.transaction_manager = manager
        self._history = history
        self._failures = failures
        manager.get().join(self)

    def sortKey(self) -> str:
        return "member"

    def _enter(self, what: str) -> None:
        self._history.append(what)
        if what in self._failures:
            raise self._failures[what]

    def tpc_begin(self, _: Any) -> None:
        pass

    def commit(self, _: Any) -> None:
        pass

    def tpc_vote(self, _: Any) -> None:
        self._enter("vote")

    def tpc_finish(self, _: Any) -> None:
        self._enter("finish")

    def tpc_abort(self, _: Any) -> None:
        pass

    def abort(self, _: Any) -> None:
        self._enter("abort")


class Synchronizer:
    """Called by a transaction manager around each transaction, as a ZODB connection is."""

    def __init__(self, *, new: Iterable[BaseException | None] = (), after: BaseException | None = None):
        self._new = iter(new)
        self._after = after

    def fail(self, new: Iterable[BaseException | None]) -> None:
        self._new = iter(new)

    def newTransaction(self, _: Any) -> None:
        failure = next(self._new, None)
        if failure is not None:
            raise failure

    def beforeCompletion(self, _: Any) -> None:
        pass

    def afterCompletion(self, ended: Any) -> None:
        if self._after is not None and ended.status == "Committed":
            raise self._after


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture(params=[False, True], ids=["implicit", "explicit"])
def manager(request: pytest.FixtureRequest) -> Any:
    return transaction.TransactionManager(explicit=request.param)


@pytest.fixture
def retry(manager: Any, time: Time) -> Retry:
    """Three tries, in either mode of the transaction manager; every wait is as long as it may be."""
    return Retry(manager=manager, sleep=time.sleep, random=lambda: 1.0, monotonic=time.monotonic)


@pytest.fixture
def db() -> Iterator[DB]:
    db = DB(MappingStorage())
    with db.transaction() as connection:
        connection.root()["visits"] = 0
    yield db
    db.close()


#: Runs a function of no arguments with a Retry, as one form of it or the other does.
Form = Callable[[Retry, Callable[[], Any]], Any]


def decorated(retry: Retry, body: Callable[[], Any]) -> Any:
    return retry(body)()


def looped(retry: Retry, body: Callable[[], Any]) -> Any:
    result = None
    for attempt in retry.attempts():
        with attempt:
            result = body()
    return result


both_forms = pytest.mark.parametrize("form", [decorated, looped])


def failing(*failures: BaseException, calls: list[int] | None = None) -> Callable[[], Any]:
    """A function that raises each of *failures* once, then returns "done". It counts its calls."""
    remaining = list(failures)

    def body() -> Any:
        if calls is not None:
            calls.append(1)
        if remaining:
            raise remaining.pop(0)
        return "done"

    return body


def name(error: type[BaseException]) -> str:
    return error.__name__


def in_progress(manager: Any) -> bool:
    return manager._txn is not None


# What is tried again ----------------------------------------------------------------------------------


def test_zeoid_retry_is_the_one_with_the_defaults() -> None:
    assert isinstance(zeoid.retry, Retry)
    assert zeoid.retry.tries == limits.RETRY_TRIES == 3
    assert zeoid.retry.manager is transaction.manager
    assert "retry" in zeoid.__all__


@both_forms
def test_one_try_is_enough_when_nothing_fails(form: Form, retry: Retry, time: Time) -> None:
    history: list[str] = []

    def body() -> str:
        Member(retry.manager, history)
        return "done"

    assert form(retry, body) == "done"
    assert history == ["vote", "finish"]
    assert time.slept_s == []
    assert not in_progress(retry.manager)


@both_forms
@pytest.mark.parametrize(
    "failure", [ConflictError, ReadConflictError, Disconnected, TimedOut, TransientError], ids=name
)
def test_what_the_body_meets_is_tried_again(form: Form, failure: Any, retry: Retry) -> None:
    calls: list[int] = []
    assert form(retry, failing(failure(), failure(), calls=calls)) == "done"
    assert len(calls) == 3


@both_forms
@pytest.mark.parametrize("failure", [ConflictError, ReadConflictError, Disconnected], ids=name)
def test_what_the_commit_meets_is_tried_again(form: Form, failure: Any, retry: Retry, time: Time) -> None:
    histories: list[list[str]] = []

    def body() -> int:
        histories.append([])
        Member(retry.manager, histories[-1], **({"vote": failure()} if len(histories) < 3 else {}))
        return len(histories)

    assert form(retry, body) == 3
    assert [history[0] for history in histories] == ["vote"] * 3
    assert [history[-1] for history in histories] == ["abort", "abort", "finish"]
    assert len(time.slept_s) == 2


@both_forms
def test_the_last_error_is_raised_after_three_tries(form: Form, retry: Retry, time: Time) -> None:
    errors = [ConflictError("first"), Disconnected("second"), ReadConflictError("third")]
    calls: list[int] = []
    with pytest.raises(ReadConflictError) as raised:
        form(retry, failing(*errors, calls=calls))
    assert raised.value is errors[2]
    assert len(calls) == 3
    assert len(time.slept_s) == 2, "there is no wait after the last try"
    assert not in_progress(retry.manager)


@both_forms
def test_the_last_error_of_a_commit_is_raised(form: Form, retry: Retry) -> None:
    errors = [ConflictError(str(number)) for number in range(3)]
    votes: list[str] = []
    remaining = list(errors)
    with pytest.raises(ConflictError) as raised:
        form(retry, lambda: Member(retry.manager, votes, vote=remaining.pop(0)))
    assert raised.value is errors[2]
    assert votes.count("vote") == 3
    assert not in_progress(retry.manager)


@both_forms
@pytest.mark.parametrize(
    "failure", [ValueError, StorageError, KeyboardInterrupt, SystemExit, GeneratorExit], ids=name
)
def test_any_other_error_aborts_and_is_raised_at_once(
    form: Form, failure: Any, retry: Retry, time: Time
) -> None:
    error = failure()
    history: list[str] = []

    def body() -> None:
        Member(retry.manager, history)
        raise error

    with pytest.raises(failure) as raised:
        form(retry, body)
    assert raised.value is error
    assert history == ["abort"]
    assert time.slept_s == []
    assert not in_progress(retry.manager)


@both_forms
def test_an_interrupt_during_the_commit_aborts_and_is_raised(form: Form, retry: Retry) -> None:
    history: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        form(retry, lambda: Member(retry.manager, history, vote=KeyboardInterrupt()))
    assert history.count("vote") == 1
    assert not in_progress(retry.manager)


@both_forms
def test_a_doomed_transaction_is_not_tried_again(form: Form, retry: Retry, time: Time) -> None:
    with pytest.raises(DoomedTransaction):
        form(retry, retry.manager.doom)
    assert time.slept_s == []
    assert not in_progress(retry.manager)


@both_forms
def test_a_data_manager_may_ask_for_another_try(form: Form, retry: Retry) -> None:
    class Asking(Member):
        def should_retry(self, error: BaseException) -> bool:
            return isinstance(error, ZeroDivisionError)

    calls: list[int] = []
    body = failing(ZeroDivisionError(), calls=calls)

    def joined() -> Any:
        Asking(retry.manager, [])
        return body()

    assert form(retry, joined) == "done"
    assert len(calls) == 2


@both_forms
def test_on_takes_the_place_of_the_default(form: Form, retry: Retry) -> None:
    picky = retry(on=(LookupError, ZeroDivisionError))
    assert form(picky, failing(KeyError(), ZeroDivisionError())) == "done"
    assert form(retry(on=LookupError), failing(KeyError())) == "done"
    for never in picky, retry(on=()):
        calls: list[int] = []
        with pytest.raises(ConflictError):
            form(never, failing(ConflictError(), calls=calls))
        assert len(calls) == 1


@both_forms
def test_beginning_is_a_part_of_the_try(form: Form, retry: Retry, time: Time) -> None:
    connection = Synchronizer(new=[Disconnected("one"), Disconnected("two"), None])
    retry.manager.registerSynch(connection)
    calls: list[int] = []
    assert form(retry, failing(calls=calls)) == "done"
    assert len(calls) == 1
    assert len(time.slept_s) == 2

    connection.fail([Disconnected(), Disconnected(), Disconnected("last"), None])
    with pytest.raises(Disconnected, match="last"):
        form(retry, failing(calls=calls))
    assert len(calls) == 1
    assert not in_progress(retry.manager)


@both_forms
def test_beginning_and_the_body_share_the_tries(form: Form, retry: Retry, time: Time) -> None:
    connection = Synchronizer(new=[Disconnected(), None, None])
    retry.manager.registerSynch(connection)
    calls: list[int] = []
    with pytest.raises(ConflictError, match="third"):
        form(retry, failing(ConflictError("second"), ConflictError("third"), calls=calls))
    assert len(calls) == 2
    assert len(time.slept_s) == 2


# What may be committed is never tried again -----------------------------------------------------------


@both_forms
@pytest.mark.parametrize("on", [None, StorageError, Exception, (ConflictError, StorageError)])
def test_an_unknown_outcome_is_not_tried_again(form: Form, on: Any, retry: Retry, time: Time) -> None:
    error = OutcomeUnknown("perhaps")
    history: list[str] = []
    with pytest.raises(OutcomeUnknown) as raised:
        form(retry(on=on), lambda: Member(retry.manager, history, finish=error))
    assert raised.value is error
    assert history.count("finish") == 1
    assert time.slept_s == []
    assert not in_progress(retry.manager)


@pytest.mark.parametrize("failure", [OutcomeUnknown, KeyboardInterrupt, SystemExit], ids=name)
def test_a_data_manager_cannot_ask_for_another_try_after_these(failure: Any, retry: Retry) -> None:
    class Asking(Member):
        def should_retry(self, error: BaseException) -> bool:
            return True

    calls: list[int] = []

    @retry
    def body() -> None:
        Asking(retry.manager, [])
        calls.append(1)
        raise failure

    with pytest.raises(failure):
        body()
    assert len(calls) == 1


@both_forms
@pytest.mark.parametrize("explicitly", [False, True], ids=["context", "cause"])
def test_what_follows_from_an_unknown_outcome_is_not_tried_again(
    form: Form, explicitly: bool, retry: Retry
) -> None:
    calls: list[int] = []

    def body() -> None:
        calls.append(1)
        if explicitly:
            raise Disconnected("while cleaning up") from OutcomeUnknown()
        try:
            raise OutcomeUnknown
        except OutcomeUnknown:
            raise Disconnected("while cleaning up") from None

    with pytest.raises(Disconnected, match="while cleaning up"):
        form(retry, body)
    assert len(calls) == 1


@both_forms
def test_an_unknown_outcome_that_the_caller_handles_is_none_of_ours(form: Form, retry: Retry) -> None:
    calls: list[int] = []
    try:
        raise OutcomeUnknown
    except OutcomeUnknown:
        assert form(retry, failing(ConflictError(), ConflictError(), calls=calls)) == "done"
    assert len(calls) == 3


def test_a_circle_of_errors_ends(retry: Retry) -> None:
    first, second = ConflictError(), ConflictError()
    first.__cause__, second.__cause__ = second, first
    assert decorated(retry, failing(first)) == "done"


def test_an_unknown_outcome_is_tried_again_when_it_is_named(retry: Retry) -> None:
    assert decorated(retry(on=OutcomeUnknown), failing(OutcomeUnknown())) == "done"
    assert decorated(retry(on=(ConflictError, OutcomeUnknown)), failing(OutcomeUnknown())) == "done"


@both_forms
@pytest.mark.parametrize("on", [None, TransientError])
def test_an_error_after_the_commit_is_not_tried_again(form: Form, on: Any, retry: Retry) -> None:
    connection = Synchronizer(after=Disconnected("while looking for invalidations"))
    retry.manager.registerSynch(connection)
    history: list[str] = []
    with pytest.raises(Disconnected) as raised:
        form(retry(on=on), lambda: Member(retry.manager, history))
    assert history.count("finish") == 1
    assert any("was committed" in note for note in raised.value.__notes__)
    assert not in_progress(retry.manager)


@both_forms
def test_so_it_is_when_the_body_committed(form: Form, retry: Retry) -> None:
    connection = Synchronizer(after=Disconnected())
    retry.manager.registerSynch(connection)
    history: list[str] = []

    def body() -> None:
        Member(retry.manager, history)
        retry.manager.commit()

    with pytest.raises(Disconnected):
        form(retry, body)
    assert history.count("finish") == 1
    assert not in_progress(retry.manager)


# The transaction --------------------------------------------------------------------------------------


@both_forms
def test_each_try_is_a_transaction_of_its_own(form: Form, retry: Retry) -> None:
    seen = []
    failures = [ConflictError(), ConflictError()]

    def body() -> None:
        seen.append(retry.manager.get())
        if failures:
            raise failures.pop()

    form(retry, body)
    assert len({id(one) for one in seen}) == 3


def test_the_loop_gives_the_transaction(retry: Retry) -> None:
    for attempt in retry.attempts():
        with attempt as current:
            assert current is retry.manager.get()


@both_forms
def test_waiting_comes_after_the_abort(form: Form, retry: Retry) -> None:
    history: list[str] = []

    def sleep(_: float) -> None:
        assert not in_progress(retry.manager)
        history.append("sleep")

    remaining = [ConflictError(), ConflictError()]

    def body() -> None:
        Member(retry.manager, history)
        if remaining:
            raise remaining.pop()

    form(retry(sleep=sleep), body)
    assert history == ["abort", "sleep", "abort", "sleep", "vote", "finish"]


@both_forms
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_the_body_may_end_its_transaction(form: Form, end: str, retry: Retry, time: Time) -> None:
    def body() -> str:
        getattr(retry.manager, end)()
        return "ended"

    assert form(retry, body) == "ended"
    assert not in_progress(retry.manager)
    assert time.slept_s == []


@both_forms
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_an_error_after_the_body_ended_its_transaction(form: Form, end: str, retry: Retry) -> None:
    body = failing(ConflictError(), ReadConflictError())

    def ended() -> Any:
        getattr(retry.manager, end)()
        return body()

    assert form(retry, ended) == "done"
    body = failing(ValueError("not again"))
    with pytest.raises(ValueError, match="not again"):
        form(retry, ended)
    assert not in_progress(retry.manager)


@both_forms
def test_what_the_body_began_after_its_commit_is_committed_as_well(form: Form, retry: Retry) -> None:
    first: list[str] = []
    second: list[str] = []

    def body() -> None:
        Member(retry.manager, first)
        retry.manager.commit()
        retry.manager.begin()
        Member(retry.manager, second)

    form(retry, body)
    assert first == second == ["vote", "finish"]


@both_forms
def test_an_explicit_manager_keeps_the_transaction_that_is_under_way(form: Form, time: Time) -> None:
    manager = transaction.TransactionManager(explicit=True)
    callers = manager.begin()
    history: list[str] = []
    Member(manager, history)
    calls: list[int] = []
    with pytest.raises(AlreadyInTransaction):
        form(Retry(manager=manager, sleep=time.sleep), failing(calls=calls))
    assert calls == []
    assert manager.get() is callers
    manager.commit()
    assert history == ["vote", "finish"]


@both_forms
@pytest.mark.parametrize("failure", [ConflictError, ValueError, KeyboardInterrupt], ids=name)
def test_an_abort_that_fails_does_not_hide_the_error(form: Form, failure: Any, retry: Retry) -> None:
    calls: list[int] = []

    def body() -> None:
        calls.append(1)
        Member(retry.manager, [], abort=OSError("no space left"))
        raise failure("what went wrong")

    with pytest.raises(failure, match="what went wrong") as raised:
        form(retry, body)
    assert any("no space left" in note for note in raised.value.__notes__)
    assert len(calls) == 1, "nobody knows what another try would meet"
    assert not in_progress(retry.manager)


@both_forms
def test_an_interrupted_abort_has_the_error_as_its_context(form: Form, retry: Retry) -> None:
    error = ConflictError("what went wrong")

    def body() -> None:
        Member(retry.manager, [], abort=KeyboardInterrupt())
        raise error

    with pytest.raises(KeyboardInterrupt) as raised:
        form(retry, body)
    assert raised.value.__context__ is error


def test_an_interrupted_wait_leaves_nothing_behind(retry: Retry) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        decorated(retry(sleep=interrupt), failing(ConflictError(), calls=calls))
    assert len(calls) == 1
    assert not in_progress(retry.manager)


# The loop ---------------------------------------------------------------------------------------------


def test_leaving_the_loop_from_inside_commits(retry: Retry) -> None:
    history: list[str] = []

    def returning() -> str:
        for attempt in retry.attempts():
            with attempt:
                Member(retry.manager, history)
                return "from inside"
        return "from behind"

    assert returning() == "from inside"
    for attempt in retry.attempts():
        with attempt:
            Member(retry.manager, history)
            break
    for attempt in retry.attempts():
        with attempt:
            Member(retry.manager, history)
            continue
    assert history == ["vote", "finish"] * 3


def test_the_loop_is_over_after_an_error_that_somebody_caught(retry: Retry) -> None:
    rounds = 0
    for attempt in retry.attempts():
        rounds += 1
        try:
            with attempt:
                raise ValueError
        except ValueError:
            pass
    assert rounds == 1


def test_a_loop_without_its_with_statement_ends(retry: Retry) -> None:
    assert len(list(retry.attempts(tries=2))) == 2
    assert not in_progress(retry.manager)


def test_the_loop_takes_options(retry: Retry, time: Time) -> None:
    body = failing(*[ConflictError() for _ in range(6)])
    for attempt in retry.attempts(tries=7, first_wait_s=1, last_wait_s=2):
        with attempt:
            assert body() == "done"
    assert time.slept_s == [1, 2, 2, 2, 2, 2]


# The decorator ----------------------------------------------------------------------------------------


def test_arguments_and_name_are_the_functions(retry: Retry) -> None:
    @retry
    def add(first: int, *, second: int) -> list[int]:
        """Adds."""
        return [first, second]

    assert add(1, second=2) == [1, 2]
    assert (add.__name__, add.__doc__) == ("add", "Adds.")


def test_with_options_and_with_none(retry: Retry) -> None:
    calls: list[int] = []

    @retry(tries=5)
    def patient() -> Any:
        return body()

    @retry()
    def usual() -> Any:
        return body()

    body = failing(*[ConflictError() for _ in range(4)], calls=calls)
    assert patient() == "done"
    assert len(calls) == 5
    body = failing(*[ConflictError() for _ in range(4)], calls=calls)
    with pytest.raises(ConflictError):
        usual()
    assert len(calls) == 5 + 3


def test_methods_and_nested_functions(retry: Retry) -> None:
    class Counter:
        visits = 0

        @retry
        def visit(self, by: int = 1) -> Callable[[], int]:
            self.visits += by

            @retry
            def inner() -> int:
                return self.visits

            return inner

    counter = Counter()
    assert counter.visit(by=2)() == 2
    assert counter.visit()() == 3


def test_each_call_has_all_the_tries_and_the_first_wait(retry: Retry, time: Time) -> None:
    remaining = iter([ConflictError(), ConflictError(), None, ConflictError(), ConflictError(), None])

    @retry
    def tried() -> None:
        failure = next(remaining)
        if failure is not None:
            raise failure

    tried()
    tried()
    assert len(time.slept_s) == 4
    assert time.slept_s[:2] == time.slept_s[2:]


def test_one_with_other_options_keeps_the_rest(retry: Retry) -> None:
    other = retry(tries=5)
    assert (other.tries, other.manager, other.sleep) == (5, retry.manager, retry.sleep)
    assert retry.tries == 3


# Waiting ----------------------------------------------------------------------------------------------


@both_forms
def test_the_bound_of_the_wait_doubles_up_to_the_last(form: Form, retry: Retry, time: Time) -> None:
    waiting = retry(tries=6, first_wait_s=0.5, last_wait_s=3)
    form(waiting, failing(ConflictError(), *[Disconnected() for _ in range(4)]))
    assert time.slept_s == [0.5, 1, 2, 3, 3]


@pytest.mark.parametrize("chosen", [0.0, 0.25, 0.999])
def test_jitter_spreads_the_wait_from_nothing_to_the_bound(chosen: float, retry: Retry, time: Time) -> None:
    waiting = retry(tries=4, first_wait_s=1, last_wait_s=100, random=lambda: chosen)
    decorated(waiting, failing(ConflictError(), ConflictError(), ConflictError()))
    assert time.slept_s == [chosen, 2 * chosen, 4 * chosen]


def test_the_defaults_keep_within_the_limits(time: Time) -> None:
    real = zeoid.retry(
        tries=20, manager=transaction.TransactionManager(), sleep=time.sleep, monotonic=time.monotonic
    )
    decorated(real, failing(*[ConflictError() for _ in range(19)]))
    bounds = [limits.RETRY_FIRST_WAIT_S * 2**number for number in range(19)]
    assert len(time.slept_s) == 19
    assert all(
        0 <= wait_s < min(bound_s, limits.RETRY_LAST_WAIT_S)
        for wait_s, bound_s in zip(time.slept_s, bounds, strict=True)
    )


def test_thousands_of_tries_do_not_overflow(retry: Retry, time: Time) -> None:
    decorated(retry(tries=3000), failing(*[ConflictError() for _ in range(2999)]))
    assert time.slept_s[-1] == limits.RETRY_LAST_WAIT_S


@both_forms
def test_no_try_begins_after_the_deadline(form: Form, retry: Retry, time: Time) -> None:
    errors = [ConflictError(str(number)) for number in range(9)]
    bounded = retry(tries=9, first_wait_s=1, last_wait_s=1, deadline_s=4)
    with pytest.raises(ConflictError) as raised:
        form(bounded, failing(*errors))
    assert raised.value is errors[3], "after 0, 1, 2 and 3 seconds"
    assert time.slept_s == [1, 1, 1], "it does not wait for a try that will not be"


@both_forms
def test_the_time_of_the_body_counts(form: Form, retry: Retry, time: Time) -> None:
    calls: list[int] = []

    def slow() -> None:
        calls.append(1)
        time.pass_s(10)
        raise ConflictError

    with pytest.raises(ConflictError):
        form(retry(deadline_s=15), slow)
    assert len(calls) == 2


def test_a_try_that_runs_at_the_deadline_may_commit(retry: Retry, time: Time) -> None:
    def slow() -> str:
        time.pass_s(100)
        return "done"

    assert decorated(retry(deadline_s=0), slow) == "done"


def test_each_new_try_is_logged(retry: Retry, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "zeoid.retry"):
        decorated(retry, failing(ConflictError("who was faster")))
    (message,) = caplog.messages
    assert message.startswith("try 1 of 3 failed, the next one follows in 0.050 s: ConflictError: ")
    assert "who was faster" in message


# Bad arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tries": 0},
        {"tries": -1},
        {"first_wait_s": -0.1},
        {"last_wait_s": -1},
        {"deadline_s": -1},
        {"first_wait_s": float("nan")},
        {"last_wait_s": float("inf")},
        {"first_wait_s": 3, "last_wait_s": 2},
    ],
    ids=str,
)
def test_numbers_out_of_their_range(options: Any) -> None:
    for use in zeoid.retry, zeoid.retry.attempts, Retry:
        with pytest.raises(ConfigurationError) as failure:
            use(**options)
        assert next(iter(options)) in str(failure.value)
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "options",
    [
        {"tries": 2.5},
        {"tries": "3"},
        {"tries": True},
        {"tries": None},
        {"first_wait_s": "1"},
        {"last_wait_s": None},
        {"deadline_s": False},
        {"on": "ConflictError"},
        {"on": ConflictError()},
        {"on": (ConflictError, 3)},
        {"on": [ConflictError]},
        {"on": BaseException},
        {"on": (ConflictError, KeyboardInterrupt)},
        {"times": 3},
    ],
    ids=str,
)
def test_values_of_the_wrong_type(options: Any) -> None:
    for use in zeoid.retry, zeoid.retry.attempts, Retry:
        with pytest.raises(TypeError) as failure:
            use(**options)
        assert next(iter(options)) in str(failure.value)
        assert "\n" not in str(failure.value)


def test_a_number_instead_of_a_function_is_told_its_name() -> None:
    with pytest.raises(TypeError, match="tries=5"):
        zeoid.retry(5)  # type: ignore[call-overload]


def test_functions_whose_body_runs_later_are_refused() -> None:
    async def coroutine() -> None:
        await asyncio.sleep(0)

    def generator() -> Iterator[int]:
        yield 1

    async def both() -> Any:
        yield 1

    for later in coroutine, generator, both:
        with pytest.raises(TypeError, match="after the commit"):
            zeoid.retry(later)


# A real database --------------------------------------------------------------------------------------


def write_elsewhere(db: DB, value: int) -> None:
    with db.transaction() as connection:
        connection.root()["visits"] = value


@both_forms
def test_a_real_conflict_is_tried_again_on_what_the_winner_left(
    form: Form, db: DB, retry: Retry, time: Time
) -> None:
    connection = db.open(retry.manager)
    winners = [10, 20]

    def visit() -> int:
        root = connection.root()
        root["visits"] += 1
        if winners:
            write_elsewhere(db, winners.pop(0))
        return int(root["visits"])

    try:
        assert form(retry, visit) == 21
    finally:
        connection.close()
    with db.transaction() as later:
        assert later.root()["visits"] == 21
    assert len(time.slept_s) == 2


@both_forms
def test_the_loser_of_every_try_leaves_nothing(form: Form, db: DB, retry: Retry) -> None:
    connection = db.open(retry.manager)
    written = iter(range(100, 200))

    def visit() -> None:
        connection.root()["visits"] += 1
        write_elsewhere(db, next(written))

    try:
        with pytest.raises(ConflictError):
            form(retry, visit)
        with retry.manager:
            assert connection.root()["visits"] == 102
    finally:
        connection.close()


@both_forms
def test_a_read_conflict_at_the_commit_is_tried_again(form: Form, db: DB, retry: Retry) -> None:
    with db.transaction() as setting_up:
        setting_up.root()["copy"] = PersistentMapping()
    connection = db.open(retry.manager)
    winners = [7]
    seen: list[int] = []

    def copy() -> None:
        root = connection.root()
        seen.append(root["visits"])
        connection.readCurrent(root)
        root["copy"]["visits"] = root["visits"]
        if winners:
            write_elsewhere(db, winners.pop())

    try:
        form(retry(on=ReadConflictError), copy)
        assert seen == [0, 7]
        with retry.manager:
            assert connection.root()["copy"]["visits"] == 7
    finally:
        connection.close()


def test_a_connection_that_is_opened_in_the_body(db: DB, retry: Retry) -> None:
    winners = [5]

    @retry
    def visit() -> int:
        connection = db.open(retry.manager)
        retry.manager.get().addAfterCommitHook(lambda _: connection.close())
        connection.root()["visits"] += 1
        if winners:
            write_elsewhere(db, winners.pop())
        return int(connection.root()["visits"])

    assert visit() == 6


def test_threads_have_transactions_of_their_own(db: DB, time: Time) -> None:
    """Four threads share one decorated function and the default manager; nobody's visit is lost."""
    together = threading.Barrier(4)

    @zeoid.retry(tries=1000, sleep=lambda _: None)
    def visit(connection: Any) -> None:
        connection.root()["visits"] += 1

    failures: list[BaseException] = []

    def run() -> None:
        connection = db.open()
        try:
            together.wait(30)
            for _ in range(25):
                visit(connection)
        except BaseException as failure:
            failures.append(failure)
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    with db.transaction() as connection:
        assert connection.root()["visits"] == 100
