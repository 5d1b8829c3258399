"""Client and server with TLS between them: what works, and who is refused with which words on either side."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ZODB
from ZODB.tests.BasicStorage import BasicStorage
from ZODB.tests.MTStorage import MTStorage
from ZODB.tests.StorageTestBase import StorageTestBase

from tests.blobserver import BlobServer
from tests.certificates import Authority
from tests.client.test_streams import load, store
from tests.peers import wait_until
from tests.server.sockets import RawClient
from zeoid import ClientStorage, limits
from zeoid.addresses import TcpAddress, UnixAddress
from zeoid.client.tls_stream import TlsStream
from zeoid.errors import ClientError, ConfigurationError, Disconnected, TimedOut
from zeoid.security.tls import ClientTls, ServerTls
from zeoid.server.embedded import RunningServer
from zeoid.server.transports import TlsTransport

LARGE = os.urandom(3_000_000)
Open = Callable[..., ClientStorage]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Iterator[BlobServer]:
    (tmp_path / "server").mkdir()
    options = ServerTls(authority.server(), revoked=authority.revoked_file)
    server = BlobServer(tmp_path / "server", tls=options, handshake_timeout_s=1.0)
    yield server
    server.stop()


@pytest.fixture
def open_client(server: BlobServer, authority: Authority, tmp_path: Path) -> Iterator[Open]:
    made: list[ClientStorage] = []

    def open_client(address: Any = None, **options: Any) -> ClientStorage:
        options = {"tls": authority.client(), "wait_timeout": 10} | options
        made.append(ClientStorage(address or server.address, **options))
        return made[-1]

    yield open_client
    for client in made:
        client.close()


def lines(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == logger and record.levelno >= logging.WARNING
    ]


def refused(server: BlobServer, caplog: pytest.LogCaptureFixture, by_client: str, by_server: str) -> None:
    """Each side has said so in one line."""
    wait_until(lambda: not server.server.connections, "the connections are closed")
    told = lines(caplog, "zeoid.client")
    assert len(told) == 1
    assert by_client in told[0]
    told = lines(caplog, "zeoid.server")
    assert len(told) == 1
    assert by_server in told[0]


# What works -------------------------------------------------------------------------------------------


def test_objects_and_blobs(server: BlobServer, open_client: Open, tmp_path: Path) -> None:
    storage = open_client(blob_dir=tmp_path / "one")
    store(storage, small=b"little", large=LARGE)
    assert server.streams == 1
    reader = open_client(blob_dir=tmp_path / "two")
    assert load(reader, "small") == b"little"
    assert load(reader, "large") == LARGE
    for connection in server.server.connections:
        assert isinstance(connection, TlsTransport)


def test_what_openssl_has_is_given_back_with_a_connection(server: BlobServer, open_client: Open) -> None:
    storage = open_client()
    (connection,) = server.server.connections
    assert isinstance(connection, TlsTransport)
    assert hasattr(connection._end, "_tls")
    storage.close()
    wait_until(lambda: not hasattr(connection._end, "_tls"), "it is given back")


def test_a_blob_connection_takes_up_the_session(
    server: BlobServer, open_client: Open, tmp_path: Path
) -> None:
    storage = open_client(blob_dir=tmp_path / "one")
    store(storage, large=LARGE)
    (line,) = storage._blobs.streams._idle  # type: ignore[union-attr]
    assert line._pipe._end.resumed  # type: ignore[union-attr]


def test_a_blob_connection_in_the_clear_is_refused(
    server: BlobServer, open_client: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever has a token that was given on an encrypted connection can't use it on another one."""
    plain = server.on_loop(lambda: _listen(server, UnixAddress(str(tmp_path / "socket"))))
    assert plain is None
    wait_until((tmp_path / "socket").exists, "it listens")
    token = open_client()._link.channel(10).call("blob_token", (), 10)
    with RawClient(str(tmp_path / "socket")) as raw:
        raw.read_frame()
        raw.send_frame(b"B5" + token)
        assert raw.read_to_end() == b""
    assert "is not encrypted" in lines(caplog, "zeoid.server")[0]


def _listen(server: BlobServer, address: UnixAddress) -> None:
    server.listening = server.loop.create_task(server.server.listen(address))  # type: ignore[attr-defined]


def test_a_unix_socket_stays_plain(authority: Authority, tmp_path: Path) -> None:
    path = str(tmp_path / "plain")
    with RunningServer({"1": None}, UnixAddress(path), tls=ServerTls(authority.server())) as running:
        assert running.address == UnixAddress(path)
        storage = ClientStorage(path, tls=authority.client(), wait_timeout=10)
        try:
            storage.ping()
            assert not isinstance(storage._link.channel(1)._stream, TlsStream)
        finally:
            storage.close()


def test_many_threads(open_client: Open) -> None:
    storage = open_client()
    database = ZODB.DB(storage)  # which makes the object that is loaded
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(300):
                storage.ping()
                storage.loadBefore(bytes(8), b"\x7f" + b"\xff" * 7)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems
    database.close()


class Locked:
    """An end that minds who uses it, and when."""

    ready = True
    finished = met_other_name = False
    session = None

    def __init__(self) -> None:
        self.stream: Any = None
        self.uses: list[bytes] = []

    def _use(self, data: bytes) -> bytes:
        assert self.stream._lock.locked()
        self.uses.append(data)
        return data

    def receive(self, data: bytes) -> bytes:
        return self._use(data)

    def send(self, data: bytes) -> None:
        self._use(data)

    def output(self) -> bytes:
        return self._use(b"encrypted")


class OneEnd:
    def __init__(self, end: Locked) -> None:
        self._end = end

    def end(self, address: TcpAddress) -> Locked:
        return self._end

    def remember(self, address: TcpAddress, end: Locked) -> None:
        assert end is self._end


def test_openssl_is_used_by_one_thread_at_a_time() -> None:
    end = Locked()
    ours, theirs = socket.socketpair()
    with theirs:
        stream = TlsStream(ours, "the peer", TcpAddress("zoo", 1), OneEnd(end))  # type: ignore[arg-type]
        end.stream = stream
        try:
            for data in (b"first", b"second"):
                theirs.sendall(data)
                assert stream.receive(time.monotonic() + 10) == data
            stream.send(b"said", time.monotonic() + 10)
            assert theirs.recv(100) == b"encrypted"
        finally:
            stream.close()
    assert end.uses == [b"", b"first", b"second", b"said", b"encrypted"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_connects_anew(server: BlobServer, open_client: Open) -> None:
    storage = open_client()
    storage.ping()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            storage.ping()
            storage.close()
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    generation = storage._link.generation
    storage.ping()
    assert storage._link.generation == generation  # the child said nothing on the parent's connection


class OverTls(StorageTestBase):
    """Some of what ZODB asks of a storage."""

    @pytest.fixture(autouse=True)
    def _serve(self, tmp_path: Path) -> Iterator[None]:
        authority = Authority(tmp_path)
        self.tls = authority.client()
        with RunningServer(
            {"1": str(tmp_path / "Data.fs")},
            TcpAddress("127.0.0.1", 0),
            tls=ServerTls(authority.server()),
        ) as running:
            self.port = running.address.port  # type: ignore[union-attr]
            yield

    def setUp(self) -> None:
        super().setUp()
        self.open()

    def open(self, read_only: bool = False) -> None:
        self._storage = ClientStorage(
            ("127.0.0.1", self.port), tls=self.tls, wait_timeout=10, read_only=read_only
        )

    def _new_storage_client(self) -> ClientStorage:
        return ClientStorage(("127.0.0.1", self.port), tls=self.tls, wait_timeout=10)


class TestBasic(OverTls, BasicStorage):
    # The competitor of this one is to be another client: see `conformance`.
    test_checkCurrentSerialInTransaction = None
    # 45 threads, which would share an interpreter with the server here.
    test_race_external_invalidate_vs_disconnect = None


class TestThreads(OverTls, MTStorage):
    pass


# Refusals ---------------------------------------------------------------------------------------------


def test_another_authority(
    server: BlobServer, open_client: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stranger").mkdir()
    stranger = Authority(tmp_path / "stranger", "a stranger")
    with pytest.raises(ClientError, match="was signed by no authority that this client trusts"):
        open_client(tls=stranger.client())
    refused(server, caplog, "signed by no authority that this client trusts", "does not trust the authority")


def test_a_revoked_certificate(
    server: BlobServer, open_client: Open, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    bad = authority.client("bad")
    authority.revoke(bad)
    assert server.on_loop(server.server.reload_certificates) is None
    with pytest.raises(ClientError, match="says that this client's certificate was revoked"):
        open_client(tls=bad)
    refused(server, caplog, "certificate was revoked", "refused: the client's certificate was revoked")


def test_an_expired_certificate(
    server: BlobServer, open_client: Open, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ClientError, match="says that this client's certificate has expired"):
        open_client(tls=authority.client("old", days=-1))
    refused(server, caplog, "has expired", "refused: the client's certificate has expired")


def test_no_certificate(
    server: BlobServer, open_client: Open, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ClientError, match="the server wants a certificate of this client"):
        open_client(tls=None, tls_ca=authority.file)
    refused(server, caplog, "wants a certificate", "refused: the client shows no certificate")


def test_another_name(server: BlobServer, open_client: Open, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ClientError, match=r"is not for 'zoo\.example': it is for localhost, 127\.0\.0\.1"):
        open_client(tls_server_hostname="zoo.example")
    refused(server, caplog, "it is for localhost, 127.0.0.1", "or the name in it")


def test_a_client_without_tls(
    server: BlobServer, open_client: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ClientError, match="the server wants TLS: this client has none") as caught:
        open_client(tls=None, wait_timeout=60)
    assert not isinstance(caught.value, TimedOut)  # it is told at once
    wait_until(lambda: not server.server.connections, "it is closed")
    assert "refused: it says nothing, as a client without TLS does" in lines(caplog, "zeoid.server")[0]


@pytest.mark.parametrize(("said", "words"), [
    (b"\0\0\0\x02M5", "the client speaks no TLS"),
    (b"GET / HTTP/1.1\r\n\r\n", "the client speaks HTTP, and no TLS"),
    (b"\x16\x03\x01", "no TLS handshake within 1 s"),
])  # fmt: skip
def test_something_else(
    server: BlobServer, caplog: pytest.LogCaptureFixture, said: bytes, words: str
) -> None:
    with RawClient(server.address) as raw:
        raw.send(said)
        raw.read_to_end()
        assert lines(caplog, "zeoid.server") == [f"{raw.name} refused: {words}"]


def test_a_server_without_tls(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    with RunningServer({"1": None}, TcpAddress("127.0.0.1", 0)) as running:
        with pytest.raises(ClientError, match="the server speaks no TLS"):
            ClientStorage(str(running.address), tls=authority.client(), wait_timeout=10)
        wait_until(lambda: lines(caplog, "zeoid.server"), "the server has said so")
    (told,) = lines(caplog, "zeoid.server")
    assert "it wants TLS, which this server does not have" in told


def test_a_server_that_says_nothing(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()[:2]
        with pytest.raises(TimedOut, match="no connection to a storage server within"):
            ClientStorage(address, tls=authority.client(), wait_timeout=0.3)


def test_tls_of_long_ago(server: BlobServer, authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.file)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with RawClient(server.address) as raw, pytest.raises(ssl.SSLError, match=r"(?i)version"):
        context.wrap_socket(raw.socket, server_hostname="localhost")
    wait_until(lambda: lines(caplog, "zeoid.server"), "the server has said so")
    assert "the client speaks only TLS that is older than 1.2" in lines(caplog, "zeoid.server")[0]


def test_options_that_will_not_do(authority: Authority) -> None:
    for options, words in [
        ({"tls_server_hostname": "zoo"}, "is nothing without tls"),
        ({"tls": 5}, "tls must be the path of a file"),
        ({"tls": ClientTls(ca="system"), "tls_ca": "x"}, "it has them all"),
        ({"tls": authority.client(), "tls_server_hostname": 7}, "must be a name"),
        ({"tls": "/nowhere.pem"}, "can't read /nowhere.pem: no such file"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            ClientStorage(("127.0.0.1", 1), wait=False, **options)  # type: ignore[arg-type]


# While it runs ----------------------------------------------------------------------------------------


def test_revoked_while_connected(
    server: BlobServer, open_client: Open, authority: Authority, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Nobody has to say that there is a new list: the server looks."""
    monkeypatch.setattr(limits, "TLS_RELOAD_S", 0.01)
    bad, good = open_client(tls=authority.client("bad")), open_client()
    bad.ping()
    authority.revoke(str(authority.folder / "bad.pem"))
    wait_until(lambda: not bad.is_connected(), "it is cut")
    good.ping()
    assert good._link.generation == 2
    assert "dropped: its certificate was revoked" in lines(caplog, "zeoid.server")[0]
    with pytest.raises(Disconnected):
        bad._link.channel(0.2).call("ping", (), 5)


def test_a_new_certificate(server: BlobServer, open_client: Open, authority: Authority) -> None:
    first = open_client()._link.channel(5)._stream._end.certificate  # type: ignore[attr-defined]
    authority.server()
    server.on_loop(server.server.reload_certificates)
    second = open_client()._link.channel(5)._stream._end.certificate  # type: ignore[attr-defined]
    assert first != second


def test_a_stream_of_nonsense(
    server: BlobServer, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a handshake that went well."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.file)
    context.load_cert_chain(authority.client())
    with (
        RawClient(server.address) as raw,
        context.wrap_socket(raw.socket, server_hostname="localhost") as encrypted,
    ):
        assert encrypted.recv(100)
        os.write(encrypted.fileno(), b"\x17\x03\x03\x01\0" + os.urandom(256))
        with contextlib.suppress(OSError):
            while encrypted.recv(1000):
                pass
    wait_until(lambda: not server.server.connections, "it is closed")
    assert "what comes from the client was changed on the way" in lines(caplog, "zeoid.server")[0]


def test_a_client_that_reads_nothing(
    server: BlobServer, open_client: Open, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it counts as it is sent: encrypted."""
    monkeypatch.setattr(limits, "OUTPUT_LIMIT_BYTES", 2_000_000)
    writer = open_client()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.file)
    context.load_cert_chain(authority.client())
    with RawClient(server.address) as raw:
        raw.socket = context.wrap_socket(raw.socket, server_hostname="localhost")
        raw.register()
        wait_until(lambda: len(server.server.connections) == 2, "both are there")

        def flood() -> bool:
            def write() -> None:
                for connection in server.server.connections:
                    if connection.session is not None and raw.name in connection.session.grant.label:
                        connection.write(bytes(200_000))

            server.on_loop(write)
            return len(server.server.connections) == 1

        wait_until(flood, "it is given up")
    writer.ping()
