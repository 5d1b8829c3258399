"""What was done to servers of ZODB's world before, and what one would try next, on processes and sockets.

| known as | what it was | here | elsewhere |
|---|---|---|---|
| CVE-2009-0668 | a client has a server run its code, by a pickle | `TestCode` | `wire/test_pickles.py` |
| CVE-2009-0669 | a client gets past authentication | `TestGettingIn` | `server/test_authority.py` |
| CVE-2009-2701 | a client reads, removes files, by blobs' names | `TestFiles` | `engines/test_blobs.py` |
| CVE-2010-3495 | who breaks off at once ends a server | `TestEndurance` | `server/test_bad_input.py` |
| – | a server has clients run its code, by replies | `TestCodeInClients` | `wire/test_faults.py` |
| – | lines of a log that others have made | `TestLogs` | `security/test_audit.py` |
| – | lengths, values larger than what is sent | `TestEndurance` | `wire/test_frames.py`, `fuzz` |

What a record has in it is the clients' business: SECURITY.md says what that means.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from ZODB.POSException import POSError
from ZODB.utils import p64

from tests.certificates import Authority
from tests.engines.datafiles import record
from tests.peers import wait_until
from tests.server.processes import Serving, serve_until
from tests.server.sockets import Bystander, RawClient
from zeoid.client.storage import ClientStorage
from zeoid.errors import Forbidden, ServerError
from zeoid.model import MAX_TID, NO_TID
from zeoid.security import tokens
from zeoid.wire import streams
from zeoid.wire.codec import FAULT, ONE_WAY, REPLY
from zeoid.wire.connection import ClientConnection
from zeoid.wire.frames import frame
from zeoid.wire.messages import SERVER_METHODS

ROOT, OID = bytes(8), p64(1)
FORGED = "\n2030-01-01 00:00:00,000 INFO forged \x1b[31m"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) ")


class Fortress:
    """A server with TLS, tokens and blobs, which is also served on a unix socket."""

    def __init__(self, folder: Path, made: list[Serving]) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.blobs = folder / "blobs"
        self.audit = folder / "audit.log"
        file = folder / "tokens.json"
        now = time.time()
        self.reader = tokens.make(file, "reader", "read", (), None, now)
        self.writer = tokens.make(file, "writer", "write", (), None, now)
        self.serving = serve_until(folder, made)(
            "-a", "127.0.0.1:0", "-a", folder / "socket", "--tls", self.authority.server(), "--tokens", file,
            "--audit-log", self.audit, "--blob-dir", self.blobs, "Data.fs", listeners=2,
        )  # fmt: skip
        self.path = str(folder / "socket")
        (self.address,) = (each for each in self.serving.addresses if isinstance(each, tuple))
        with self.local() as client:
            client.register().commit(ROOT, record(b"root"))

    def local(self) -> RawClient:
        """Whoever may do everything."""
        return RawClient(self.path)

    def remote(self, certificate: str = "") -> RawClient:
        """A client with TLS, by default one that shows nothing."""
        client = RawClient(self.address)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.authority.file)
        if certificate:
            context.load_cert_chain(certificate)
        client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
        return client

    def known(self, token: str, read_only: bool = False) -> RawClient:
        client = self.remote().shake_hands()
        client.call("authenticate", token)
        client.call("register", "1", read_only)
        return client


@pytest.fixture(scope="module")
def fortress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fortress]:
    made: list[Serving] = []
    try:
        fortress = Fortress(tmp_path_factory.mktemp("fortress"), made)
        with Bystander(fortress.path) as bystander:
            yield fortress
            bystander.goes_on()
        (serving,) = made
        assert serving.stop() == 0
        assert "Traceback" not in serving.log.text()
        # Whatever anybody has called anything: each line is one that the server has begun.
        for line in serving.lines:
            assert LINE.match(line), line
            assert line.isprintable(), line
        for line in fortress.audit.read_text().splitlines():
            assert line.isprintable()
            json.loads(line)
    finally:
        for serving in made:
            serving.end()


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What is there if somebody's code has run."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


class Makes:
    """Something that makes a directory when it is read from a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def evil(path: Path) -> bytes:
    return pickle.dumps(Makes(path), 3)


def test_what_is_evil_is(tmp_path: Path) -> None:
    pickle.loads(evil(tmp_path / "made"))
    assert (tmp_path / "made").exists()


def ends(client: RawClient) -> bytes:
    """The server closes the connection; what it had sent."""
    try:
        return client.read_to_end()
    except ssl.SSLError:
        return b""


class TestCode:
    """In a message."""

    @pytest.mark.parametrize("registered", [False, True])
    @pytest.mark.parametrize("method", SERVER_METHODS.values(), ids=lambda method: method.name)
    def test_in_every_argument(self, fortress: Fortress, mark: Path, method: Any, registered: bool) -> None:
        places = max(1, len(method.args))
        arguments = [
            tuple(Makes(mark) if n == place else 1 for n in range(places)) for place in range(places)
        ]
        messages = [(1, 0, method.name, each) for each in [*arguments, Makes(mark), {"x": [Makes(mark)]}]]
        for message in [*messages, (1, 1, method.name, arguments[0]), (Makes(mark), 0, method.name, ())]:
            with fortress.local() as client:
                client.connection = ClientConnection("Z5")
                client.shake_hands()
                if registered:
                    client.call("register", "1", False)
                client.send_frame(pickle.dumps(message, 3))
                ends(client)

    @pytest.mark.parametrize("payload", [
        b"cos\nsystem\n(X\x04\0\0\0truetR.",
        b"\x80\x03(K\x01K\x00X\x08\0\0\0registercbuiltins\neval\n(X\x01\0\0\x001tRt.",
        b"(i__main__\nthing\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"cZopeUndo.Prefix\nPrefix\n)\x81}X\x09\0\0\0__class__cos\nsystem\nsb.",
        b"Pa persistent id\n.",
        b"ccopyreg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
    ])  # fmt: skip
    def test_in_every_way_that_pickles_have(self, fortress: Fortress, payload: bytes) -> None:
        with fortress.local() as client:
            client.connection = ClientConnection("Z5")
            client.shake_hands()
            client.send_frame(payload)
            assert ends(client) == b""

    def test_in_extensions_of_msgpack(self, fortress: Fortress, mark: Path) -> None:
        for extension in (msgpack.ExtType(1, evil(mark)), msgpack.ExtType(80, evil(mark))):
            with fortress.local() as client:
                client.register()
                client.send_frame(msgpack.packb((2, 0, "loadBefore", (OID, extension))))
                ends(client)

    def test_in_a_record(self, fortress: Fortress, mark: Path) -> None:
        """The server keeps it, finds that it conflicts, undoes, packs and iterates, and reads none of it."""
        with fortress.local() as client:
            client.register()
            first = client.commit(OID, evil(mark) * 2)
            second = client.commit(OID, evil(mark) * 3, first)
            assert client.prepare(OID, evil(mark), first)  # which conflicts
            client.call("tpc_abort", 1)
            assert client.call("loadBefore", OID, MAX_TID)[0] == evil(mark) * 3
            client.call("history", OID, 5)
            client.one_way("tpc_begin", 2, b"", b"", {}, None, " ")
            client.one_way("undoa", base64.encodebytes(second).rstrip(), 2)
            assert list(client.call("vote", 2)) == [OID]
            client.call("tpc_finish", 2)
            iterator = client.call("iterator_start", None, None)
            while client.call("iterator_next", iterator):
                pass
            client.call("pack", time.time(), True)


class TestCodeInClients:
    """In a reply."""

    @pytest.mark.parametrize("answered", ["register", "get_info", "loadBefore"])
    @pytest.mark.parametrize("kind", ["value", "fault", "call"])
    def test_in_replies(self, mark: Path, answered: str, kind: str) -> None:
        answers = {
            "value": lambda id: (id, 0, REPLY, Makes(mark)),
            "fault": lambda id: (id, FAULT, REPLY, ("os.mkdir", (str(mark),))),
            "call": lambda id: (0, ONE_WAY, "invalidateTransaction", (Makes(mark), [])),
        }
        with LyingServer(answered, lambda id: pickle.dumps(answers[kind](id), 3)) as lying:
            with pytest.raises(Exception, match=r"."):
                self.load(lying.address)
            assert lying.lies


    def load(self, address: str) -> None:
        storage = ClientStorage(address, coding="Z5", wait_timeout=1.0, cache_size_bytes=0)
        try:
            storage.load(OID)
        finally:
            storage.close()


#: What a server says to whoever connects.
RIGHT = {"register": NO_TID, "get_info": {"interfaces": (), "name": "x", "length": 0, "size": 0}}


class LyingServer:
    """A server that says what is right up to one call, to which it says something else."""

    def __init__(self, until: str, lie: Callable[[int], bytes]) -> None:
        self._until, self._lie = until, lie
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.lies = 0

    def __enter__(self) -> LyingServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(10)
            with sock, sock.makefile("rb") as stream:
                try:
                    self._converse(sock, stream)
                except OSError:
                    continue

    def _converse(self, sock: socket.socket, stream: Any) -> None:
        sock.sendall(frame(b"Z5"))
        while head := stream.read(4):
            payload = stream.read(int.from_bytes(head, "big"))
            if payload == b"Z5":
                continue
            id, flag, name, _ = pickle.loads(payload)  # of our own client
            if name == self._until:
                self.lies += 1
                sock.sendall(frame(self._lie(id)))
            elif not flag:
                sock.sendall(frame(pickle.dumps((id, 0, REPLY, RIGHT.get(name)), 3)))


class TestGettingIn:
    """Without what is wanted."""

    def test_every_method_by_nobody(self, fortress: Fortress) -> None:
        for method in SERVER_METHODS.values():
            if method.access is None:
                continue
            with fortress.remote() as client:
                client.shake_hands()
                with pytest.raises(Forbidden, match="wants a certificate or a token first"):
                    client.call(method.name, *[OID for _ in method.args])
                assert ends(client) == b""

    def test_one_way_by_nobody(self, fortress: Fortress) -> None:
        for name, args in (("tpc_begin", (1, b"", b"", {}, None, " ")), ("iterator_gc", ([1],))):
            with fortress.remote() as client:
                client.shake_hands().one_way(name, *args)
                assert ends(client) == b""

    @pytest.mark.parametrize("said", [b"ruok", b"B5" + bytes(16), b"B5", b"B5" + b"x" * 15, b"B5" * 9])
    def test_instead_of_a_handshake(self, fortress: Fortress, said: bytes) -> None:
        with fortress.remote() as client:
            client.read_frame()
            client.send_frame(said)
            assert ends(client) == b""

    def test_guessing(self, fortress: Fortress) -> None:
        for _ in range(50):
            with fortress.local() as client:
                client.read_frame()
                client.send_frame(b"B5" + os.urandom(16))
                assert ends(client) == b""

    def test_register_twice(self, fortress: Fortress) -> None:
        """Whoever has registered to read can't go on to write."""
        with fortress.known(fortress.reader, read_only=True) as client:
            with pytest.raises(TypeError, match="can't be called after register"):
                client.call("register", "1", False)
            with pytest.raises(Forbidden, match="needs the role write"):
                client.call("new_oids", 1)

    def test_another_token_after_register(self, fortress: Fortress) -> None:
        with fortress.known(fortress.reader, read_only=True) as client:
            with pytest.raises((TypeError, Forbidden)):
                client.call("authenticate", fortress.writer)
            with pytest.raises(Forbidden, match="needs the role write"):
                client.call("new_oids", 1)

    @pytest.mark.parametrize("said", [b"M5", b"Z5", b"ruok", b"B5" + bytes(16)])
    def test_a_second_handshake(self, fortress: Fortress, said: bytes) -> None:
        with fortress.known(fortress.reader, read_only=True) as client:
            client.send_frame(said)
            ends(client)

    def test_a_good_token_after_a_bad_one(self, fortress: Fortress) -> None:
        """One bad one is the end of a connection; what was sent behind it is not heard."""
        with fortress.remote() as client:
            client.shake_hands()
            bad = client.start("authenticate", "zeoid_reader_" + "x" * 43)
            good = client.start("authenticate", fortress.reader)
            with pytest.raises(Forbidden, match="not known here"):
                client.answer(bad)
            ends(client)
            assert not good.answered

    def test_the_blob_connection_of_a_reader(self, fortress: Fortress) -> None:
        """It opens what its session may do, whoever has it, and only once."""
        with fortress.known(fortress.reader, read_only=True) as client:
            token = client.call("blob_token")
            with fortress.remote() as stream:
                stream.read_frame()
                stream.send_frame(b"B5" + token)
                stream.read_frame()
                stream.send(streams.request(streams.Put(b"id", b"n" * 16, 4)) + b"data")
                assert b"ReadOnlyError" in stream.read_frame()
            with fortress.remote() as again:
                again.read_frame()
                again.send_frame(b"B5" + token)
                assert ends(again) == b""
        assert not [file for file in fortress.blobs.rglob("*.blob") if not file.is_symlink()]

    def test_a_certificate_that_pretends_to_be_a_token(self, fortress: Fortress) -> None:
        with fortress.remote(fortress.authority.client("token:writer")) as client:
            client.shake_hands()
            with pytest.raises(Exception, match="unknown storage"):
                client.call("register", "1", True)


class TestFiles:
    """Through the names of blobs."""

    NAMES = (
        "../../../victim", "{victim}", "../victim", "..", ".", "", "/", "x\0y", "{victim}\0.blob",
        "link.blob", "a/b", "..\\victim", "x" * 5000, "victim\n", "\udcff",
    )  # fmt: skip

    @pytest.mark.parametrize("name", NAMES)
    def test_a_file_that_is_not_the_clients(self, fortress: Fortress, name: str) -> None:
        victim = fortress.folder / "victim"
        victim.write_text("a secret")
        folder = fortress.blobs / "tmp"
        folder.mkdir(exist_ok=True)
        link = fortress.blobs / "link.blob"
        if not link.is_symlink():
            link.symlink_to(victim)
        oid = p64(77)
        with fortress.local() as client:
            client.register()
            client.one_way("tpc_begin", 1, b"", b"", {}, None, " ")
            try:
                client.one_way(
                    "storeBlobShared", oid, NO_TID, record(b""), name.format(victim=victim), 1
                )
            except Exception:
                return  # it can't even be said
            with pytest.raises((Exception, EOFError)):
                client.call("vote", 1)
        assert victim.read_text() == "a secret"
        assert not victim.is_symlink()
        with fortress.local() as client, pytest.raises(KeyError):
            client.register().call("blob_load", oid, MAX_TID, 100)

    @pytest.mark.parametrize("oid", [b"../../..", b"\0/../../", b"victim\0\0", b"/etc/pas"])
    def test_oids_are_no_paths(self, fortress: Fortress, oid: bytes) -> None:
        with fortress.local() as client:
            client.register()
            for name, args in (("sendBlob", (oid, oid)), ("blob_load", (oid, oid, 100))):
                with pytest.raises(KeyError):
                    client.call(name, *args)


class TestLogs:
    """The fixture looks at every line, in the end."""

    def test_names(self, fortress: Fortress) -> None:
        for said in (("register", FORGED, False), (FORGED,), ("loadBefore", FORGED)):
            with fortress.local() as client:
                client.shake_hands()
                with pytest.raises(TypeError):
                    client.call(*said)
        with fortress.remote() as client:
            client.shake_hands()
            with pytest.raises(Forbidden):
                client.call("authenticate", FORGED)

    def test_of_a_client_that_is_known(self, fortress: Fortress) -> None:
        with fortress.local() as client:
            client.register().one_way("set_client_label", FORGED)
            client.one_way("tpc_begin", 1, FORGED.encode(), FORGED.encode(), {}, None, " ")
            client.one_way("undoa", FORGED.encode(), 1)
            with pytest.raises(Exception, match=r"."):
                client.call("vote", 1)
            with pytest.raises(TypeError):
                client.call(FORGED)
            client.one_way(FORGED)
            ends(client)

    def test_of_a_certificate(self, fortress: Fortress) -> None:
        name = f"app{FORGED}"[:60]
        (file := Path(fortress.folder, "forged.pem")).write_bytes(
            b"".join(fortress.authority.issue(name, server=False)[:2])
        )
        with fortress.remote(str(file)) as client:
            client.register(read_only=True).call("ping")
        wait_until(lambda: "forged" in fortress.audit.read_text(), "the audit log has it")
        told = [json.loads(line) for line in fortress.audit.read_text().splitlines()]
        assert name in [each.get("name") for each in told]


class TestEndurance:
    """Nothing that is sent costs much more than to send it."""

    @pytest.mark.parametrize("payload", [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1),
        b"\x80\x04\x8e" + struct.pack("<Q", 2**64 - 1),
        b"\x80\x03B" + struct.pack("<i", -1),
        b"\x80\x03X" + struct.pack("<I", 2**32 - 1),
        b"\x80\x03T" + struct.pack("<i", -5) + b"x.",
        b"\x80\x03\x8b" + struct.pack("<i", -1),
        b"\x80\x03\x8b" + struct.pack("<i", 2**31 - 1),
        b"\x80\x03r" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        b"I" + b"9" * 1_000_000 + b"\n.",
        b"L" + b"9" * 1_000_000 + b"L\n.",
        b"\x80\x03" + b"]" * 500_000 + b"a" * 499_999 + b".",
        # Each is a pair of the one before: 2**60 leaves, if they are followed.
        b"\x80\x03)q\0" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60)) + b".",
        b"\x80\x03K\x01" + b"2\x86" * 60 + b".",
    ])  # fmt: skip
    def test_pickles(self, fortress: Fortress, payload: bytes) -> None:
        with fortress.local() as client:
            client.connection = ClientConnection("Z5")
            client.register()
            client.send_frame(payload)
            ends(client)

    @pytest.mark.parametrize("payload", [
        b"\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
        b"\x91" * 500_000 + b"\xc0",
        b"\x94\x01\x00\xa4ping\xdd\x7f\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01",
    ])  # fmt: skip
    def test_msgpack(self, fortress: Fortress, payload: bytes) -> None:
        with fortress.local() as client:
            client.register().send_frame(payload)
            ends(client)

    @pytest.mark.parametrize(("name", "args"), [
        ("new_oids", (-1,)), ("new_oids", (2**62,)), ("history", (ROOT, -(2**63))),
        ("history", (ROOT, 2**62)), ("undoInfo", (-(2**62), 2**62, None)), ("undoLog", (2**62, -(2**62))),
        ("iterator_gc", ([-1] * 1000,)),
        ("iterator_next", (-1,)), ("blob_load", (ROOT, ROOT, -1)), ("pack", (-1e308, True)),
        ("pack", (float("nan"), True)), ("pack", (float("inf"), True)),
        ("loadBeforeMany", ([ROOT] * 20_000, MAX_TID)),
    ])  # fmt: skip
    def test_numbers(self, fortress: Fortress, name: str, args: tuple[Any, ...]) -> None:
        with fortress.local() as client:
            client.register()
            call = client.start(name, *args)
            with contextlib.suppress(POSError, TypeError, ValueError, ServerError):
                assert len(repr(client.answer(call))) < 1_000_000
            assert call.answered
            assert client.call("ping") is None

    def test_connections_that_break_off_at_once(self, fortress: Fortress) -> None:
        for address in (fortress.address, fortress.path):
            for _ in range(100):
                with RawClient(address) as client:
                    if not isinstance(address, str):
                        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with fortress.local() as client:
            client.register()

    def test_memory(self, fortress: Fortress) -> None:
        """Of the server, whatever of these tests came before this one."""
        assert fortress.serving.peak_memory_bytes() < 600 * 1024 * 1024
