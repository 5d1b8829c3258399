"""What every input is fed to, and what must hold whatever it is.

A target takes bytes. It may raise the project's own errors for what a peer or a caller did wrong; anything
else that escapes from it is a finding, an AssertionError of its own among them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

from tests.fuzz import ends, files, sessions
from tests.fuzz.cutting import pieces
from zeoid.cache.memory import MemoryCache
from zeoid.client.view import View
from zeoid.errors import (
    FrameTooLarge,
    InvalidCall,
    PeerError,
    ServerError,
    UndecodableMessage,
    UnsendableValue,
)
from zeoid.model import UndoPrefix, tid_after
from zeoid.wire import faults
from zeoid.wire.codec import FAULT, PROTOCOLS, codec_for
from zeoid.wire.connection import ClientConnection, ServerConnection, State
from zeoid.wire.frames import FrameReader, frame
from zeoid.wire.messages import CLIENT_METHODS, SERVER_METHODS, Method
from zeoid.wire.pickles import Instance

#: What the project may raise because of what a peer sent, or of what it was asked to send.
ALLOWED = (PeerError, InvalidCall, UnsendableValue)

_SCALARS = (str, bytes, int, float, bool, type(None))
_METHODS = [*SERVER_METHODS.values(), *CLIENT_METHODS.values()]
_LIMIT = 70_000
_OIDS = [number.to_bytes(8, "big") for number in range(20)]
_NOW = b"\x7f" + bytes(7)


def _check_plain(value: Any, depth: int = 70) -> None:
    assert depth, "nested too deep"
    if type(value) is dict:
        for key, part in value.items():
            assert type(key) in _SCALARS, type(key)
            _check_plain(part, depth - 1)
    elif type(value) in (tuple, list, set):
        for part in value:
            _check_plain(part, depth - 1)
    elif type(value) is Instance:
        _check_plain(value.args, depth - 1)
        _check_plain(value.state, depth - 1)
    else:
        assert type(value) is UndoPrefix or type(value) in _SCALARS, type(value)


def _check_method(method: Method, args: Any) -> None:
    refusal = _refusal(method, args)
    if refusal is not None:
        assert refusal.startswith(method.name)
        assert len(refusal) < 1000


def _refusal(method: Method, args: Any) -> str | None:
    try:
        checked = method.check(args)
    except InvalidCall as problem:
        return str(problem)
    assert type(checked) is tuple
    assert len(method.args) - method.optional <= len(checked) <= len(method.args)
    return None


# The targets ------------------------------------------------------------------------------------------


def frames(data: bytes) -> None:
    """Wherever a stream is cut, the same messages come out of it, and little is held."""

    def read(parts: list[bytes]) -> list[bytes] | None:
        reader = FrameReader(_LIMIT)
        found: list[bytes] = []
        try:
            for piece in parts:
                found += reader.feed(piece)
                assert reader.pending_bytes < 4 + _LIMIT
        except FrameTooLarge:
            return None
        return found

    whole = read([data])
    assert whole == read(pieces(data))
    if whole is not None:
        assert data.startswith(b"".join(map(frame, whole)))


def messages(data: bytes) -> None:
    """What is decoded is plain, is the same when it is sent on, and is judged by the message table."""
    for protocol in PROTOCOLS:
        codec = codec_for(protocol.encode())
        with contextlib.suppress(UndecodableMessage):
            message = codec.decode(data)
            hash(message[0])
            _check_plain(message[3])
            for method in _METHODS:
                _check_method(method, message[3])
            str(faults.rebuild(message[3]))
            repr(faults.rebuild(("ZODB.POSException.MultipleUndoErrors", message[3])))
            with contextlib.suppress(UnsendableValue):
                again = codec.encode(*message)
                assert codec.encode(*codec.decode(again)) == again


def server(data: bytes) -> None:
    """The server's end: every call is answered or refused; what is no call closes the connection."""
    connection = ServerConnection("Z5", frame_limit=_LIMIT)
    with _closes(connection):
        for piece in pieces(data):
            for message_id, _, name, args in connection.receive(piece):
                method = SERVER_METHODS.get(name)
                try:
                    if method is None:
                        raise InvalidCall(f"there is no method {name[:100]!r}")
                    connection.reply(message_id, method.check(args))
                except (InvalidCall, UnsendableValue) as problem:
                    connection.fault(message_id, problem)
                if name == "register":
                    connection.registered()


def client(data: bytes) -> None:
    """The client's end, with calls under way: replies find their slots, faults become errors."""
    for coding in PROTOCOLS:
        connection = ClientConnection(coding, frame_limit=_LIMIT)
        waiting: set[int] = set()
        with _closes(connection):
            for piece in pieces(data):
                if connection.state is State.OPEN and len(waiting) < 3:
                    waiting.add(number := len(waiting) + 1)
                    connection.call(number, "lastTransaction", ())
                for slot, flag, name, args in connection.receive(piece):
                    if slot is not None:
                        assert slot in waiting
                        if flag == FAULT:
                            str(faults.rebuild(args))
                    elif name in CLIENT_METHODS:
                        _check_method(CLIENT_METHODS[name], args)


def bulk_replies(data: bytes) -> None:
    """Whatever a server answers a bulk load with: nothing of it is kept, or all of it is as it must be."""
    for protocol in PROTOCOLS:
        with contextlib.suppress(UndecodableMessage):
            reply = codec_for(protocol.encode()).decode(data)[3]
            for answer in (reply, [reply], [None, reply]):
                _check_bulk_reply(answer)


def _check_bulk_reply(reply: Any) -> None:
    view = View(MemoryCache())
    view.begin(_NOW)
    try:
        count = view.loaded_many((_OIDS, view.mark, tid_after(_NOW)), reply)
    except ServerError:
        assert not len(view.cache)  # type: ignore[arg-type]
        return
    assert 0 < count == len(reply) <= len(_OIDS)
    for oid in _OIDS:
        revision = view.lookup(oid, tid_after(_NOW))
        if revision is not None:
            kept, start, end = revision
            assert type(kept) is type(start) is bytes
            assert start <= _NOW
            assert end is None or start < end


@contextlib.contextmanager
def _closes(connection: ServerConnection | ClientConnection) -> Any:
    """A PeerError leaves the connection closed, and nothing gets in any more."""
    try:
        yield
    except PeerError:
        assert connection.state is State.CLOSED
        with contextlib.suppress(PeerError):
            assert not connection.receive(frame(codec_for(b"M5").encode(1, 0, "ping", ())))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (frames, messages, server, client, bulk_replies)
}
TARGETS |= sessions.TARGETS | ends.TARGETS | files.TARGETS


# What the fuzzer must notice --------------------------------------------------------------------------


def planted_escape(data: bytes) -> None:
    if b"\xff" in data:
        raise RuntimeError("planted")


def planted_slowness(data: bytes) -> None:
    if b"\xff" in data:
        sum(range(10**8))


def planted_hang(data: bytes) -> None:
    while b"\xff" in data:
        pass


def planted_memory(data: bytes) -> None:
    if b"\xff" in data:
        bytes(10**9)


def planted_death(data: bytes) -> None:
    if b"\xff" in data:
        os.kill(os.getpid(), signal.SIGKILL)


PLANTED: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (planted_escape, planted_slowness, planted_hang, planted_memory, planted_death)
}
