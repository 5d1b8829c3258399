"""What a client made of the conflicts that it was told, as operations of its transaction.

Owns where a resolved store goes: in the place of the store that met the conflict, or behind the undo that did
it, so that what the transaction does next finds it.
"""

from collections.abc import Sequence
from typing import Any

from ZODB.POSException import ConflictError

from zeoid.commit.actions import Transaction
from zeoid.model import Conflict, Store


def ask(transaction: Transaction, conflicts: Sequence[Conflict]) -> list[dict[str, Any]]:
    """What its client is told."""
    transaction.conflicts = {conflict.oid: conflict for conflict in conflicts}
    return [{"oid": c.oid, "serials": (c.committed, c.read), "data": c.data} for c in conflicts]


def too_many(rounds: int, conflict: Conflict) -> ConflictError:
    """What its client is told in the end."""
    serials = conflict.committed, conflict.read
    return ConflictError(f"still in conflict after {rounds} rounds", oid=conflict.oid, serials=serials)


def note(transaction: Transaction, resolved: Store) -> None:
    """*resolved* answers the conflict of its object."""
    conflict = transaction.conflicts.pop(resolved.oid)
    serial = conflict.current or conflict.committed
    if resolved.serial == conflict.read:
        serial = conflict.read  # the old store again, which resolves nothing: it meets the conflict again
    transaction.resolutions.append((conflict, Store(resolved.oid, serial, resolved.data)))


def apply(transaction: Transaction) -> None:
    """Before it is prepared again."""
    operations = transaction.operations
    for conflict, resolved in sorted(transaction.resolutions, key=lambda each: -each[0].position):
        position = conflict.position
        if position < 0:
            stores = (isinstance(each, Store) and each.oid == resolved.oid for each in operations)
            position = list(stores).index(True)
        if isinstance(operations[position], Store):
            operations[position] = resolved
        else:
            operations.insert(position + 1, resolved)
    transaction.resolutions.clear()
