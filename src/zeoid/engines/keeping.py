"""What is done for a data file in the background: checkpoints, and room in the journal ahead of need.

Owns the thread, and when what is due. How either is done is the appender's and the journal's business.
"""

import logging
import threading

from zeoid import limits
from zeoid.engines.appending import Appender

log = logging.getLogger("zeoid.server")


class Keeper:
    """A thread that makes a checkpoint now and then, and room in the journal ahead of need."""

    def __init__(self, appender: Appender, name: str) -> None:
        self._appender = appender
        self._journal = appender.journal
        self._name = name
        self._wake = threading.Event()
        self._closed = False
        #: A spare segment could not be made: not before the next checkpoint is it tried again.
        self._no_room = False
        self._thread = threading.Thread(target=self._run, name=f"zeoid checkpoints {name}", daemon=True)
        self._thread.start()

    def committed(self) -> None:
        """Something was committed; is there something to do?"""
        journal = self._journal
        if journal.unsettled_bytes > limits.CHECKPOINT_BYTES or not (journal.has_spare or self._no_room):
            self._wake.set()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._make_spare()
                timely = not self._wake.wait(limits.CHECKPOINT_S)
                self._wake.clear()
                if self._closed:
                    break
                unsettled_bytes = self._journal.unsettled_bytes
                if unsettled_bytes > limits.CHECKPOINT_BYTES or (timely and unsettled_bytes):
                    self._appender.checkpoint()
                    self._no_room = False
        except Exception as problem:  # the appender remembers it, and the server asks
            log.error("%s: the checkpoint failed: %s", self._name, problem)

    def _make_spare(self) -> None:
        try:
            if not self._no_room:
                self._journal.prepare_spare()
        except OSError as problem:
            self._no_room = True
            log.warning("%s: no room for the journal to grow: %s", self._name, problem)

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()
