"""A process with an open storage forks, with a call under way in another thread; both go on.

Says on its output what has happened, line by line, and ends with status 0 if all went well.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any

from zeoid import ClientStorage
from zeoid.errors import Disconnected

DEADLINE_S = 20.0
#: The objects that they ask for.
PARENTS, CHILDS = b"PARENTS ", b"CHILDREN"


class Losses(logging.Handler):
    """Counts what the client says of connections that it lost."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def say(text: str) -> None:
    sys.stdout.write(text + "\n")  # in one piece: threads say something at the same time
    sys.stdout.flush()


def main(address: str) -> int:
    losses = Losses()
    logging.getLogger("zeoid.client").addHandler(losses)
    storage = ClientStorage(address, wait_timeout=DEADLINE_S)
    replies: list[Any] = []
    waiting = threading.Thread(target=lambda: replies.append(storage.getTid(PARENTS)))
    waiting.start()
    if sys.stdin.readline() != "fork\n":  # once the server has the call
        return 2
    child = os.fork()
    if child == 0:
        os._exit(in_child(storage))
    _, status = os.waitpid(child, 0)
    say(f"child ended with {os.waitstatus_to_exitcode(status)}")
    waiting.join(DEADLINE_S)
    say(f"parent's thread got {replies}")
    storage.ping()
    say(f"parent lost {losses.messages}")
    storage.close()
    return os.waitstatus_to_exitcode(status)


def in_child(storage: ClientStorage) -> int:
    try:
        say(f"child knows {storage.lastTransaction().hex()}")
        say(f"child got {storage.getTid(CHILDS)!r}")
        storage.close()
        try:
            storage.ping()
        except Disconnected:
            return 0
        return 1
    except BaseException as problem:
        say(f"child failed: {problem!r}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
