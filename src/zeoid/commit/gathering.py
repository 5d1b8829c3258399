"""What a transaction is made of, as its operations come in: its size, its blobs, the objects that it needs.

Owns what an operation counts for. Knows nothing of states, nor of locks.
"""

from collections.abc import Sequence

from ZODB.POSException import StorageError

from zeoid.commit.actions import Transaction
from zeoid.model import AttachBlob, CheckCurrent, Operation, Restore, Store, Undo

#: What an operation takes in memory besides its data, so that many small ones count, too.
_OPERATION_BYTES = 200


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
    transaction.broken = StorageError(f"the transaction is larger than {most_bytes:,} bytes")
    transaction.operations.clear()
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
