"""The way in: what a client shows and asks for on a connection that has just shaken hands.

Owns which refusals a server may answer with, and in which words they are told. Errors are one line that says
who refused what: Forbidden, ClientError, ReadOnlyError; Disconnected and TimedOut.
"""

from zeoid.client.channel import Channel
from zeoid.client.verifying import tid_of
from zeoid.errors import ClientError, Disconnected, Forbidden, TimedOut
from zeoid.model import NO_TID


def authenticate(channel: Channel, token: str, timeout_s: float) -> None:
    """Show the token. It never leaves in the clear."""
    peer = channel.peer
    if not channel.encrypted:
        raise ClientError(f"the token is not sent to {peer}: this connection is not encrypted")
    try:
        channel.call("authenticate", (token,), timeout_s)
    except TimedOut:
        raise
    except Disconnected:
        raise Disconnected(f"{peer} closed the connection when it was shown a token") from None
    except Forbidden as refusal:
        raise Forbidden(f"{peer} refused the token: {refusal}") from None
    except (ValueError, TypeError):
        raise ClientError(f"{peer} knows no tokens: leave the token out, or use a newer server") from None


def register(channel: Channel, storage: str, read_only: bool, timeout_s: float) -> bytes:
    """Choose a storage; its last tid."""
    try:
        tid = channel.call("register", (storage, read_only), timeout_s)
    except Forbidden as refusal:
        raise Forbidden(f"{channel.peer} refused: {refusal}") from None
    except (ValueError, TypeError) as refusal:
        raise ClientError(f"{channel.peer} refused: {refusal}") from None
    return NO_TID if tid is None or tid == b"" else tid_of(tid)
