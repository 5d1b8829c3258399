"""Whose a staged blob is: its transaction's, until the engine has it prepared.

    it leaves from                      who removes the files
    STORING, WAITING, RESOLVING         `Discard`
    PREPARING, and prepared later       the engine, by `Abandon`
    PREPARING, and failed later         `Discard`
    PREPARED                            the engine, by `Abandon`
    FINISHING                           nobody: they are committed

Owns the list of a transaction's blobs. Each blob that was attached is given to the engine or discarded, once;
those that came too late to be prepared, or to a transaction that is broken, are discarded when it is over.
"""

from collections.abc import Sequence

from zeoid.commit.actions import Action, Discard, Transaction
from zeoid.model import AttachBlob, Operation


def note(transaction: Transaction, operations: Sequence[Operation]) -> None:
    """They were attached, whether anything comes of it or not."""
    transaction.blobs += [each.blob for each in operations if isinstance(each, AttachBlob)]


def taken(transaction: Transaction) -> None:
    """The engine has what it was given to prepare."""
    given = {each.blob for each in transaction.operations if isinstance(each, AttachBlob)}
    transaction.blobs = [blob for blob in transaction.blobs if blob not in given]


def left(transaction: Transaction) -> list[Action]:
    """It is over: what is nobody's now."""
    blobs, transaction.blobs = transaction.blobs, []
    return [Discard(blobs)] if blobs else []
