"""What a transaction is made of, as its operations come in: its size, its blobs, the objects that it needs.

Owns what an operation counts for. Knows nothing of states, nor of locks.
"""

from collections.abc import Sequence
from typing import Any

from zeoid.commit.actions import Transaction
from zeoid.errors import TooLarge
from zeoid.model import AttachBlob, CheckCurrent, Operation, Restore, Store, Undo

#: What an operation takes in memory besides its data, so that many small ones count, too.
_OPERATION_BYTES = 200
#: … and any other value.
_VALUE_BYTES = 50


def size_of(value: Any) -> int:
    """How much memory a value of plain values takes, about."""
    size_bytes = 0
    stack = [value]
    while stack:
        part = stack.pop()
        size_bytes += _VALUE_BYTES
        if isinstance(part, (bytes, str)):
            size_bytes += len(part)
        elif isinstance(part, dict):
            stack += part.values()
            stack += part
        elif isinstance(part, (tuple, list, set, frozenset)):
            stack += part
    return size_bytes


def begun(transaction: Transaction) -> int:
    """What it takes before there is an operation."""
    info = transaction.info
    size_bytes = len(info.user) + len(info.description)
    return size_bytes + size_of(info.extension) if info.extension else size_bytes


def count(transaction: Transaction, operations: Sequence[Operation], most_bytes: int) -> bool:
    """Whether there is room for them; if not, the transaction is broken, and empty."""
    transaction.size_bytes += _OPERATION_BYTES * len(operations)
    for operation in operations:
        if isinstance(operation, (Store, Restore)):
            if operation.data is not None:
                transaction.size_bytes += len(operation.data)
        elif isinstance(operation, Undo):
            transaction.undoes = True
        elif isinstance(operation, AttachBlob):
            transaction.blobs.append(operation.blob)
    if transaction.size_bytes <= most_bytes:
        return True
    transaction.broken = TooLarge(f"the transaction is larger than {most_bytes:,} bytes")
    transaction.operations.clear()
    transaction.size_bytes = begun(transaction)
    return False


def needs(transaction: Transaction) -> tuple[list[bytes], list[bytes]]:
    """The objects that it writes, and those that must stay as they are. An undo's are not known yet."""
    written: list[bytes] = []
    checked: list[bytes] = []
    for operation in transaction.operations:
        if isinstance(operation, CheckCurrent):
            checked.append(operation.oid)
        elif not isinstance(operation, Undo):
            written.append(operation.oid)
    return written, checked
