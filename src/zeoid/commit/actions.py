"""The words of a commit: a transaction with its state, and the actions that are to be carried out.

Owns no decision: `transactions` has the table of the states and says when which action follows.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from zeoid.commit.locks import Claim
from zeoid.model import Conflict, Operation, StagedBlob, Store, TransactionInfo, frozen
from zeoid.ports import Prepared


class State(Enum):
    """See the table in `transactions`."""

    STORING = "storing"
    WAITING = "waiting"
    PREPARING = "preparing"
    RESOLVING = "resolving conflicts"
    PREPARED = "prepared"
    FINISHING = "finishing"
    DOOMED = "doomed"


@dataclass(slots=True, eq=False)
class Transaction:
    """One transaction of one client, from its begin to its end."""

    owner: Any
    id: Hashable
    info: TransactionInfo
    state: State = State.STORING
    operations: list[Operation] = field(default_factory=list)
    #: Whether an undo is among them.
    undoes: bool = False
    #: What was staged for it and is nobody else's: see `blobs`.
    blobs: list[StagedBlob] = field(default_factory=list)
    #: What of it is in memory, about.
    size_bytes: int = 0
    broken: Exception | None = None
    rounds: int = 0
    conflicts: dict[bytes, Conflict] = field(default_factory=dict)
    #: What the client made of them so far.
    resolutions: list[tuple[Conflict, Store]] = field(default_factory=list)
    #: What it holds or waits for, from its vote on; what it held, once it is over.
    claim: Claim | None = None
    #: When it got its locks (seconds since the epoch), 0 before.
    locked_at: float = 0.0
    deadline_s: float = 0.0
    #: What the engine made of it.
    prepared: Prepared | None = None
    tid: bytes = b""
    #: Who asked for its outcome while it was finishing.
    askers: list[Any] = field(default_factory=list)


@frozen
class Prepare:
    """Have the engine prepare it; report `prepared`, `conflicted` or `failed`."""

    transaction: Transaction


@frozen
class Commit:
    """Have the engine make these durable; report `committed`. If that fails, the storage can't go on."""

    batch: Sequence[Transaction]


@frozen
class Abandon:
    """Have the engine forget what it prepared."""

    transaction: Transaction


@frozen
class Discard:
    """Have the engine remove blobs that nothing came of."""

    blobs: Sequence[StagedBlob]


@frozen
class Publish:
    """The transaction is durable: show its tid to readers and tell every client but its owner."""

    transaction: Transaction


@frozen
class Reply:
    """Answer the owner's vote or finish."""

    transaction: Transaction
    value: Any


@frozen
class Fail:
    """Answer the owner's vote or finish with an error."""

    transaction: Transaction
    problem: Exception


@frozen
class Expire:
    """The owner kept its locks for too long: log it and drop its connection."""

    transaction: Transaction
    state: State


@frozen
class Decide:
    """Answer who asked for an outcome: the tid, or None for what is not committed and never will be."""

    asker: Any
    tid: bytes | None


@frozen
class Announce:
    """Others wrote to the database: up to *tid* these objects may have changed. Tell every client."""

    tid: bytes
    oids: Sequence[bytes]


@frozen
class StartOver:
    """Others wrote to the database, up to *tid*, and what can't be told: no client may go on as it is."""

    tid: bytes


Action = (
    Prepare | Commit | Abandon | Discard | Publish | Reply | Fail | Expire | Decide | Announce | StartOver
)
