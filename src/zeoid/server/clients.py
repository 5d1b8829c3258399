"""What hosted storages, sessions and the server around them know of each other. Owns no behaviour."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from zeoid.commit.actions import Transaction

if TYPE_CHECKING:
    from zeoid.server.admission import Admission
    from zeoid.server.hosted import Hosted
    from zeoid.server.streams import Grant, Streams

#: What is called with the result of work in a thread, or with the exception.
Done = Callable[[Any, BaseException | None], None]
#: Runs the first function in a thread, then calls the second on the loop.
RunInThread = Callable[[Callable[[], Any], Done], None]


class Client(Protocol):
    """What a hosted storage needs of a session."""

    label: str

    def answer(self, transaction: Transaction, value: Any) -> None: ...

    def refuse(self, transaction: Transaction, problem: Exception) -> None: ...

    def tell(self, announcement: "Announcement") -> None: ...

    def hold(self) -> None: ...

    def let_go(self) -> None: ...

    def drop(self, reason: str) -> None: ...

    def recheck(self) -> None: ...


class Announcement:
    """A one-way call that many clients get: encoded once for each coding."""

    __slots__ = ("args", "encoded", "name")

    def __init__(self, name: str, *args: Any) -> None:
        self.name = name
        self.args = args
        #: The bytes for each coding that was needed.
        self.encoded: dict[str, bytes] = {}


class Wire(Protocol):
    """Where a session's bytes go, and where they come from."""

    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...

    def stop_reading(self) -> None: ...

    def read_on(self) -> None: ...

    def soon(self, callback: Callable[[], None]) -> None:
        """Have *callback* called when the loop has looked at its other connections."""

    def hand_over(self, grant: "Grant") -> None:
        """It is a blob connection from now on, and no business of the session's any more."""


class House(Protocol):
    """What a session needs of the server around it."""

    storages: dict[str, "Hosted"]
    streams: "Streams"
    admission: "Admission"

    def pack(self, hosted: "Hosted", time: float, done: Callable[[BaseException | None], None]) -> None: ...
