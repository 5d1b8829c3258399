"""What transactions are called in the log. Owns no behaviour."""

from collections.abc import Sequence

from zeoid.commit.actions import Transaction


def told(transaction: Transaction) -> str:
    """What a transaction is doing, as far as its client said."""
    info = transaction.info
    user, description = (_printable(text) for text in (info.user, info.description))
    return f"a transaction of {user or 'nobody'}: {description or 'no description'}"


def _printable(text: bytes) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:200].decode("utf-8", "replace")).strip()


def told_oids(oids: Sequence[bytes]) -> str:
    if not oids:
        return "the whole storage"
    shown = ", ".join(oid.hex() for oid in oids[:5])
    return f"{len(oids)} objects: {shown}" + (" …" if len(oids) > 5 else "")
