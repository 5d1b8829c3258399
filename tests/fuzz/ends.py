"""Targets with TLS: whatever comes instead of a handshake, within one, or instead of what was encrypted.

The first byte of an input says which; the rest is what comes, or what is done to what should have come.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.certificates import Authority
from tests.fuzz.cutting import pieces
from zeoid.addresses import TcpAddress
from zeoid.errors import EncryptionError
from zeoid.security.end import End
from zeoid.security.roles import name_and_role
from zeoid.security.tls import ClientContexts, ClientTls, ServerContexts, ServerTls

_ADDRESS = TcpAddress("localhost", 1)
_MOST_BYTES = 100_000
_MESSAGES = (b"", b"first", b"second" * 100, b"third" * 5000)


@functools.cache
def _contexts() -> tuple[ServerContexts, ClientContexts]:
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        server = ServerContexts(ServerTls(authority.server()), lambda: 0.0)
        return server, ClientContexts(ClientTls(authority.client()), lambda: 0.0)


def tls(data: bytes) -> None:
    """Nobody gets in without a certificate, and what was changed on the way is never heard."""
    first, rest = (data[0], data[1:]) if data else (0, b"")
    kind = first % 4
    server, client = _contexts()
    if kind == 0:
        _nonsense(server.end(), rest)
    elif kind == 1:
        _nonsense(client.end(_ADDRESS), rest)
    elif kind == 2:
        _shake_hands(server.end(), client.end(_ADDRESS), first >> 2, rest)
    else:
        ends = server.end(), client.end(_ADDRESS)
        _shake_hands(*ends, 0, b"")
        listener, speaker = ends if first & 4 else ends[::-1]
        _say(speaker, listener, rest)


def _nonsense(end: End, data: bytes) -> None:
    """What is no handshake ends it, or is the beginning of one."""
    end.output()
    with contextlib.suppress(EncryptionError):
        for piece in pieces(data):
            assert end.receive(piece) == b""
            assert not end.ready
    end.output()
    assert not end.ready
    end.close()


def _shake_hands(server: End, client: End, changed: int, damage: bytes) -> None:
    """A handshake, of which one flight is changed: it ends in an error, or nothing was changed."""
    turns = 0
    ends, other = (client, server), (server, client)
    try:
        while not (server.ready and client.ready) and turns < 8:
            for speaker, listener in zip(ends, other, strict=True):
                flight = speaker.output()
                turns += 1
                flight = damaged(flight, damage) if turns == changed else flight
                assert not listener.receive(flight)
    except EncryptionError:
        assert damage
        return
    if server.ready:
        assert name_and_role(server.certificate or b"")[0] == "client"
    if client.ready:
        assert client.certificate is not None
    assert damage or (server.ready and client.ready)


def _say(speaker: End, listener: End, damage: bytes) -> None:
    """Whatever happens to it on the way, what is heard is the beginning of what was said."""
    said = b"".join(_MESSAGES)
    for message in _MESSAGES:
        speaker.send(message)
    heard = bytearray()
    with contextlib.suppress(EncryptionError):
        for piece in pieces(damaged(speaker.output(), damage)):
            heard += listener.receive(piece)
    assert said.startswith(bytes(heard))
    assert damage or bytes(heard) == said
    listener.output()


def damaged(data: bytes, damage: bytes) -> bytes:
    """*damage*: of three bytes each, what is done, and where in *data*."""
    changed = bytearray(data)
    for start in range(0, len(damage) - 2, 3):
        if not changed:
            break
        what, place = damage[start], int.from_bytes(damage[start + 1 : start + 3], "big") % len(changed)
        if what == 0:
            del changed[place:]
        elif what == 1:
            del changed[place : place + 5]
        elif what == 2 and len(changed) < _MOST_BYTES:
            changed[place:place] = changed[: len(changed) - place]
        else:
            changed[place] ^= what
    return bytes(changed)


TARGETS: dict[str, Callable[[bytes], None]] = {"tls": tls}


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with: true handshakes among them."""
    if target not in TARGETS:
        return []
    server, client = _contexts()
    hello = client.end(_ADDRESS).output()
    answering = server.end()
    answering.receive(hello)
    heads = [bytes([number]) for number in range(48)]
    return [
        b"\x00" + hello,
        b"\x01" + answering.output()[:1000],
        *(head + bytes([80, place >> 8, place & 255]) for head in heads for place in (0, 3, 6, 50, 700)),
    ]
