"""Targets with a whole server session, and with a whole connection of a client, behind the wire.

The first byte of an input says who is there and how far it has come; the rest is what it sends. Nothing may
be logged as a fault, nothing may wait for ever, nobody gets what is not theirs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgpack

from tests.fuzz import inputs
from tests.fuzz.cutting import chunks, pieces
from tests.security import subjects
from tests.server.assertions import nothing_is_locked
from tests.server.inmemory import MemoryHouse, MemoryWire, Peer, Threads
from zeoid.addresses import UnixAddress
from zeoid.cache.memory import MemoryCache
from zeoid.client import link as linking
from zeoid.client.blobs import NoBlobs
from zeoid.client.link import Access, Link
from zeoid.client.view import View
from zeoid.engines.opening import open_memory
from zeoid.errors import ZeoidError
from zeoid.model import MAX_TID
from zeoid.security import identity
from zeoid.security.roles import Policy, parse_access
from zeoid.security.tokens import Token
from zeoid.server.session import Session
from zeoid.wire.frames import FrameReader, frame
from zeoid.wire.messages import CLIENT_METHODS, SERVER_METHODS
from zeoid.wire.streams import TOKEN_BYTES

MINE, OTHER = "fuzzed", "hidden"
RECORD = b"a-record-of-"
OID = inputs._OID
NOBODY, TRUSTED, CERTIFICATE, TOKEN = range(4)
_MOST_STEPS = 1000

# What can be sent --------------------------------------------------------------------------------------

_NAMES = [*SERVER_METHODS, *CLIENT_METHODS, ".reply", "nothing"]
_BEGIN = (b"user", b"description", {}, None, " ")
_STORE = (0, OID, None, b"data", None)
#: Arguments that are right, so that a program of few bytes goes far.
_ARGS = inputs._ARGS | {
    "register": (MINE, False),
    "loadSerial": (OID, inputs._TID),
    "getTid": (OID,),
    "record_iternext": (None,),
    "undoLog": (0, -20),
    "sendBlob": (OID, inputs._TID),
    "iterator_next": (1,),
    "iterator_record_start": (1, inputs._TID),
    "iterator_record_next": (1,),
    "deleteObject": (OID, inputs._TID, 7),
    "checkCurrentSerialInTransaction": (OID, inputs._TID, 7),
    "storeBlobChunk": (b"chunk",),
    "storeBlobEnd": (OID, bytes(8), b"data", 7),
    "storeBlobShared": (OID, bytes(8), b"data", "../../etc/passwd", 7),
    "tpc_finish": (7,),
    "tpc_abort": (7,),
    "tpc_prepare": (
        b"seven", _BEGIN, [_STORE, (3, OID, bytes(8), None, None), (5, OID, None, b"b" * 16, None)],
    ),
    "tpc_operate": (b"seven", _BEGIN, [_STORE]),
    "outcome": (b"seven", bytes(8)),
    "blob_load": (OID, inputs._TID, 100),
    "authenticate": ("zeoid_reports_" + "x" * 43,),
}  # fmt: skip


def _call(head: bytes, body: bytes, *, msgpacked: bool) -> bytes:
    """A frame with a call. *head*: which method, and the id and the flag; *body*: the arguments, encoded."""
    name = _NAMES[head[0] % len(_NAMES)]
    id, flag = head[1] >> 2, head[1] & 3
    if msgpacked:
        args = body or inputs._packed(_ARGS.get(name, ()))
        return frame(b"\x94" + msgpack.packb(id) + msgpack.packb(flag) + msgpack.packb(name) + args)
    args = body or inputs._without_memo(_ARGS.get(name, ()))[2:-1]
    text = name.encode()
    length = len(text).to_bytes(4, "little")
    return frame(b"\x80\x03(K%cK%cX%s%s%st." % (id, flag, length, text, args))


# A server ----------------------------------------------------------------------------------------------


def _policy() -> Policy:
    token = Token("reports", bytes(32), "read", (MINE,), 0.0)
    return Policy(
        access=_unchanging(parse_access(f"app write {MINE}\ntoken:reports read {MINE}")),
        known_tokens=_unchanging({"reports": token}),
    )


def _unchanging(rules: Any) -> Any:
    return SimpleNamespace(rules=rules, look=lambda: False)


@functools.cache
def _who() -> list[identity.Peer]:
    known = subjects.certificate("app")
    return [
        identity.Peer("nobody", trusted=False, encrypted=True),
        identity.Peer("trusted"),
        identity.Peer("known", trusted=False, encrypted=True, certificate=known),
        identity.Peer("token", trusted=False, encrypted=True),
    ]


class _Faults(logging.Handler):
    """What a log may not have."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.lines.append(self.format(record))


@contextlib.contextmanager
def _no_faults() -> Iterator[None]:
    """Nothing is logged with a traceback. What is logged is not printed."""
    faults = _Faults()
    logs = [logging.getLogger(name) for name in ("zeoid", "ZEO.StorageServer")]
    propagate = [log.propagate for log in logs]
    for log in logs:
        log.propagate = False
        log.addHandler(faults)
    try:
        yield
    finally:
        for log, propagates in zip(logs, propagate, strict=True):
            log.removeHandler(faults)
            log.propagate = propagates
    assert not faults.lines, faults.lines[0]


def session(data: bytes) -> None:
    """Whoever sends whatever to a server: it goes on, keeps its secrets, and no lock is left."""
    first, sent = (data[0], data[1:]) if data else (0, b"")
    with _no_faults():
        house = MemoryHouse({MINE: open_memory(), OTHER: open_memory()}, policy=_policy())
        try:
            _session(house, first, sent)
        finally:
            house.close()
        assert not house.fatal


def _session(house: MemoryHouse, first: int, sent: bytes) -> None:
    friends = {name: Peer(house).register(name) for name in (MINE, OTHER)}
    for name, friend in friends.items():
        _settle(house)
        friend.commit(OID, data=RECORD + name.encode())
    who = first & 3
    wire = MemoryWire()
    peer = Session(house, wire, _who()[who])
    written = bytearray()
    for piece in _conversation(first, who, sent, peer):
        if wire.closed:
            break
        peer.receive(piece)
        _settle(house, wire)
        written += wire.take()
    if not wire.closed:
        assert not wire.stopped, "it does not read on, with nothing left to do"
    house.later(100_000.0)  # transactions that were left lying are given up
    _settle(house, wire)
    friends[MINE].commit(b"\0" * 7 + b"\x02", data=b"at the end")
    friends[OTHER].commit(b"\0" * 7 + b"\x02", data=b"at the end")
    written += wire.take()
    _check_written(bytes(written), who, sent)
    peer.lost("")
    _settle(house, wire)
    for hosted in house.storages.values():
        nothing_is_locked(hosted)
        hosted.visible.load_before(b"\0" * 7 + b"\x02", MAX_TID)


def _conversation(first: int, who: int, sent: bytes, peer: Session) -> Iterator[bytes]:
    """What is received, piece by piece."""
    handshake = (b"", b"M5", b"Z5", b"M5")[first >> 2 & 3]
    if handshake:
        yield frame(handshake)
    if who == TOKEN:
        # As if the right one had been shown, which no input can contain.
        peer.authority.identity = peer.authority._admission.policy._of_token(
            Token("reports", bytes(32), "read", (MINE,), 0.0)
        )
        peer._handlers = peer.authority.handlers
    if handshake and first & 16 and who != NOBODY:
        with contextlib.suppress(ZeoidError):
            args = (MINE, who == TOKEN)
            coded = inputs._packed if handshake == b"M5" else inputs._without_memo
            yield frame(coded((1, 0, "register", args)))
    if first & 32 and handshake:
        for head, body in chunks(sent, 2):
            yield _call(head, body, msgpacked=handshake == b"M5")
    else:
        yield from pieces(sent)


def _settle(house: MemoryHouse, wire: MemoryWire | None = None) -> None:
    """Threads run and the loop turns until there is nothing left to do."""
    threads: tuple[Threads, ...] = (house.slow, house.packs, house.blobs, house.beside, house.commit)
    for _ in range(_MOST_STEPS):
        if wire is not None and wire.callbacks:
            wire.turn()
        elif any(map(len, threads)):
            for each in threads:
                each.run_all()
        else:
            return
    raise AssertionError("there is no end of work")


def _check_written(written: bytes, who: int, sent: bytes) -> None:
    """What is written is frames, and tells nobody what is not for them."""
    if who == TRUSTED:
        return
    hidden = {OTHER.encode(), RECORD + OTHER.encode()}
    if who == NOBODY:
        hidden |= {MINE.encode(), RECORD, b"invalidateTransaction"}
    for secret in hidden:
        assert secret in sent or secret not in written, secret
    FrameReader().feed(written)


# A client ----------------------------------------------------------------------------------------------

_INFO = {"interfaces": (), "length": 1, "size": 1, "name": "n", "supportsUndo": True, "extensions": ()}


def session_client(data: bytes) -> None:
    """Whatever a server says: a client has a connection that works, or has none, and knows why."""
    first, sent = (data[0], data[1:]) if data else (0, b"")
    ours, theirs = socket.socketpair()
    try:
        with _no_faults(), mock.patch.object(linking, "connect", return_value=ours):
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # the rest of a very long one is left out
                theirs.send(b"".join(_answers(first, sent)))
            theirs.shutdown(socket.SHUT_WR)
            _use(first)
    finally:
        ours.close()
        theirs.close()


def _answers(first: int, sent: bytes) -> Iterator[bytes]:
    if first & 4:
        yield frame(b"M5")
    opened = [inputs._TID, _INFO]
    if first & 8:
        opened.insert(0, "token:reports")
    if first & 32:
        for number, value in enumerate(opened, 1):
            yield frame(inputs._packed((number, 0, ".reply", value)))
    if first & 16:
        for head, body in chunks(sent, 2):
            yield _call(head, body, msgpacked=True)
    else:
        yield sent


def _use(first: int) -> None:
    view = View(MemoryCache())
    link = Link(
        [UnixAddress("/nowhere")], MINE, view,
        access=(Access.WRITE, Access.READ)[first & 1], timeout_s=5.0, coding=None, label="label",
        certificates=None, token="zeoid_x" if first & 8 else "", jitter=lambda: 0.0,
        on_connected=dict, on_info={}.update, on_blob=NoBlobs().receive,
    )  # fmt: skip
    channel = link._connect()
    if channel is not None:
        assert channel.alive
        with contextlib.suppress(ZeoidError, KeyError):
            for _ in range(5):
                asked = OID, view.mark, MAX_TID
                channel.call("loadBefore", (OID, MAX_TID), 5.0, hook=view.loaded, context=asked)
        if channel.alive:
            channel.attend(0.0)
    else:
        assert link._failure is not None
        assert "\n" not in str(link._failure)
    link.close()
    assert not channel or not channel.alive


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (session, session_client)
}


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with."""
    if target not in TARGETS:
        return []
    heads = [bytes([number]) for number in range(64)]
    every = b"".join(bytes([number, number << 2 & 255, 0]) for number in range(len(_NAMES)))
    transaction = [_NAMES.index(name) for name in ("tpc_begin", "storea", "vote", "tpc_finish")]
    commit = b"".join(bytes([number, 2 << 2, 0]) for number in transaction)
    token = frame(b"B5" + bytes(TOKEN_BYTES))
    return [head + body for head in heads for body in (every, commit, token, frame(b"ruok"))]
