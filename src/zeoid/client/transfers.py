"""Blobs on their way over a connection, both ways, as ZEO's protocol has it.

Owns the messages: an upload is `storeBlobStart`, chunks, `storeBlobEnd`, all one-way; a download is the call
`sendBlob`, before whose reply `receiveBlobStart`, chunks and `receiveBlobStop` come. Must not know
transactions, nor where the files are.

Nothing says where an upload or a download ends but its last message. So one that breaks off in the middle
ends its connection: what comes after it would be taken for its rest.
"""

import os
from typing import Any

from ZODB.POSException import POSError

from zeoid import limits
from zeoid.cache.blobs import Part
from zeoid.client.channel import Channel
from zeoid.errors import ClientError, Disconnected, PeerError, ServerError, TimedOut, ZeoidError


def upload(channel: Channel, path: str, end: tuple[Any, ...], timeout_s: float, before: bytes) -> None:
    """Send the file at *path*, and *end* as the arguments of its last message; *before* goes in front.

    Disconnected if the connection is lost, TimedOut if the server reads nothing for *timeout_s*.
    """
    taken = begun = False
    try:
        _take_turn(channel, timeout_s)
        taken = True
        with open(path, "rb", buffering=0) as file:
            begun = True
            messages = before + channel.encode_one_way("storeBlobStart", ())
            while chunk := file.read(limits.BLOB_CHUNK_BYTES):
                messages += channel.encode_one_way("storeBlobChunk", (chunk,))
                if len(messages) >= limits.BLOB_CHUNK_BYTES:
                    channel.send(messages, timeout_s)
                    messages = b""
                    # If nobody else reads, a server that can't get rid of its invalidations stops, too.
                    channel.drain()
            channel.send(messages + channel.encode_one_way("storeBlobEnd", end), timeout_s)
    except BaseException as problem:
        if begun or not isinstance(problem, (ZeoidError, OSError)):
            # An interruption may leave the turn to nobody.
            channel.close(Disconnected("a blob could not be sent completely"))
        if isinstance(problem, OSError):
            raise ClientError(f"the blob {os.path.basename(path)} can't be read: {problem}") from problem
        raise
    finally:
        if taken:
            channel.blob_lock.release()


def _take_turn(channel: Channel, timeout_s: float) -> None:
    """Wait until no other thread sends a blob. As long as anything is sent there is hope."""
    sends = -1
    while not channel.blob_lock.acquire(timeout=timeout_s):
        if channel.sends == sends:
            problem = TimedOut(f"{channel.peer} takes no blobs")
            channel.close(problem)
            raise problem
        sends = channel.sends


class Downloads:
    """The downloads that are under way, on any connection."""

    def __init__(self) -> None:
        self._parts: dict[tuple[Channel, bytes, bytes], Part] = {}

    def fetch(self, channel: Channel, oid: bytes, serial: bytes, part: Part, timeout_s: float) -> None:
        """Have the server send a blob into *part*.

        Raises what the server answered; TimedOut when no blob moved for *timeout_s*; Disconnected.
        """
        key = channel, oid, serial
        self._parts[key] = part
        try:
            channel.call("sendBlob", (oid, serial), timeout_s)
            if not part.complete:
                raise ServerError("the server said that it had sent a blob, and did not")
        except TimedOut as problem:
            channel.close(problem)
            raise
        except POSError:
            raise  # the server's answer, or the connection is lost
        except BaseException:
            # Interrupted: if somebody else asks for this blob, the rest of it must not come into the new one.
            channel.close(Disconnected("a thread was interrupted while it downloaded a blob"))
            raise
        finally:
            self._parts.pop(key, None)

    def receive(self, channel: Channel, name: str, args: tuple[Any, ...]) -> None:
        """A message of a download; in stream order. What nobody waits for any more is dropped."""
        if len(args) == 3:
            channel.blob_bytes += len(args[2])
        part = self._parts.get((channel, args[0], args[1]))
        if part is None:
            return
        if name == "receiveBlobStart":
            part.begin()
        elif name == "receiveBlobChunk":
            part.write(args[2])
        elif name == "receiveBlobStop":
            part.end()
        else:
            raise PeerError(f"the server called {name!r}, which is none of a download")
