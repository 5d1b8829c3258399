"""Which transactions are made durable together. Owns the bounds of a batch."""

from collections import deque

from zeoid import limits
from zeoid.commit.actions import Transaction
from zeoid.commit.tids import next_tid


def take(
    gathering: deque[Transaction], last_tid: bytes, time_s: float, *, gives_tids: bool
) -> list[Transaction]:
    """The next batch, in the order in which they came, with tids unless the engine *gives_tids*."""
    batch: list[Transaction] = []
    tid, size_bytes = last_tid, 0
    while gathering and len(batch) < limits.BATCH_TRANSACTIONS:
        transaction = gathering[0]
        size_bytes += transaction.size_bytes
        if batch and size_bytes > limits.BATCH_BYTES:
            break
        gathering.popleft()
        if not gives_tids:
            transaction.tid = tid = transaction.tid or transaction.info.tid or next_tid(tid, time_s)
        batch.append(transaction)
    return batch
