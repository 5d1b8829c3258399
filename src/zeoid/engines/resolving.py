"""Resolving conflicts in the server, which runs the application's code there: off unless asked for.

Owns nothing but the way from a conflict to ZODB's own resolution.
"""

from collections.abc import Callable

from ZODB.ConflictResolution import ConflictResolvingStorage

from zeoid.model import Conflict


class Resolver(ConflictResolvingStorage):  # type: ignore[misc]
    """Resolves with the classes that this process can import. *load_serial*: as a storage's loadSerial."""

    def __init__(self, load_serial: Callable[[bytes, bytes], bytes]) -> None:
        super().__init__()
        self.loadSerial = load_serial

    def resolve(self, conflict: Conflict) -> bytes:
        """The data that both changes make. ConflictError when they exclude each other."""
        data: bytes = self.tryToResolveConflict(
            conflict.oid, conflict.committed, conflict.read, conflict.data
        )
        return data
