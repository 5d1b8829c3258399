"""How a hosted storage keeps up with what others commit to its database.

    the thread that commits            on the loop, when that is done
    prepare, then poll                 announce the news, then answer the vote
    commit, then poll                  announce what came before it, publish it, announce what came after it
    poll, when it is time for it       announce the news

A poll that fails after a prepare fails that, too: what it met can't be told then. After a commit, which can't
be taken back, it is as if everything had changed. Owns when polls are made, and that there is one at a time.
Must not know what an announcement is made of (`commit.others`), nor clients.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zeoid import limits
from zeoid.commit import others
from zeoid.commit.actions import Action, Transaction
from zeoid.ports import News, Prepared

if TYPE_CHECKING:
    from zeoid.server.hosted import Hosted

log = logging.getLogger("zeoid.server")

#: Makes actions of the result of work in a thread, or of the exception.
Outcome = Callable[[Any, BaseException | None], list[Action]]


class Polling:
    """The polls of a storage whose engine is shared."""

    def __init__(self, hosted: "Hosted") -> None:
        self._hosted = hosted
        self._under_way = False
        self._due_s = 0.0
        self._fails = False

    def prepare(self, work: Callable[[], Prepared], done: Outcome) -> tuple[Callable[[], Any], Outcome]:
        engine = self._hosted.engine

        def prepare_and_poll() -> tuple[Prepared | None, Exception | None, News | None]:
            try:
                prepared = work()
            except Exception as problem:
                return None, problem, engine.poll()
            try:
                return prepared, None, engine.poll()
            except BaseException:
                if not prepared.conflicts:
                    engine.abandon(prepared)
                raise

        def landed(value: Any, problem: BaseException | None) -> list[Action]:
            if problem is not None:
                return done(None, problem)
            prepared, failure, news = value
            return [*others.announcements(self._hosted.visible.tid, news), *done(prepared, failure)]

        return prepare_and_poll, landed

    def commit(
        self, batch: Sequence[Transaction], work: Callable[[], Sequence[bytes] | None], done: Outcome
    ) -> tuple[Callable[[], Any], Outcome]:
        engine = self._hosted.engine
        (transaction,) = batch

        def commit_and_poll() -> tuple[bytes, News | None]:
            tids = work()
            assert tids is not None
            try:
                return tids[0], engine.poll()
            except Exception as problem:
                log.error("storage %r: what others committed can't be told: %s", self._hosted.name, problem)
                return tids[0], News(tids[0], None)

        def landed(value: Any, problem: BaseException | None) -> list[Action]:
            if problem is not None:
                return done(None, problem)
            transaction.tid, news = value
            assert transaction.prepared is not None
            before, after = others.around_own(
                self._hosted.visible.tid, news, transaction.tid, transaction.prepared.oids
            )
            return [*before, *done(None, None), *after]

        return commit_and_poll, landed

    def tick(self) -> None:
        """Time has passed: maybe for a poll."""
        if self._hosted.clock.monotonic() >= self._due_s:
            self.poll()

    def poll(self) -> None:
        """Look now, unless that is being done."""
        if self._under_way:
            return
        self._under_way = True
        self._hosted.in_commit_thread(self._hosted.engine.poll, self._polled)

    def _polled(self, news: News | None, problem: BaseException | None) -> list[Action]:
        self._under_way = False
        self._due_s = self._hosted.clock.monotonic() + limits.POLL_S
        if problem is not None:
            if not self._fails:
                log.error("storage %r can't be asked what others commit: %s", self._hosted.name, problem)
            self._fails = True
            return []
        if self._fails:
            log.info("storage %r can be asked again what others commit", self._hosted.name)
            self._fails = False
        return others.announcements(self._hosted.visible.tid, news)
