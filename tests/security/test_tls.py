"""TLS as bytes: two ends that are given each other's output, and what becomes of files."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.certificates import Authority, key_pem
from zeoid import limits
from zeoid.addresses import TcpAddress
from zeoid.errors import ConfigurationError, EncryptionError
from zeoid.security.end import End
from zeoid.security.tls import ClientContexts, ClientTls, ServerContexts, ServerTls, names_in

HERE = TcpAddress("localhost", 1)


class Now:
    """A clock that a test moves."""

    time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    (folder / "stranger").mkdir()
    return Authority(folder / "stranger", "a stranger")


@pytest.fixture(scope="module")
def server(authority: Authority) -> ServerContexts:
    return ServerContexts(ServerTls(authority.server("everyones-server")))


@pytest.fixture(scope="module")
def client(authority: Authority) -> ClientContexts:
    return ClientContexts(ClientTls(authority.client("everyones-client")))


class Meeting:
    """Two ends, and why each of them gave up."""

    def __init__(self, client: End, server: End, piece_bytes: int = 1 << 20) -> None:
        self.client, self.server = client, server
        self.client_problem = self.server_problem = ""
        self.heard_by_client = self.heard_by_server = b""
        self._piece_bytes = piece_bytes
        self.exchange()

    def exchange(self) -> None:
        moved = True
        while moved:
            to_server, to_client = self.client.output(), self.server.output()
            moved = bool(to_server or to_client)
            for piece in self._pieces(to_server):
                if not self.server_problem:
                    try:
                        self.heard_by_server += self.server.receive(piece)
                    except EncryptionError as problem:
                        self.server_problem = str(problem)
            for piece in self._pieces(to_client):
                if not self.client_problem:
                    try:
                        self.heard_by_client += self.client.receive(piece)
                    except EncryptionError as problem:
                        self.client_problem = str(problem)

    def _pieces(self, data: bytes) -> list[bytes]:
        return [data[at : at + self._piece_bytes] for at in range(0, len(data), self._piece_bytes)]


def meet(client: ClientContexts, server: ServerContexts, address: TcpAddress = HERE) -> Meeting:
    return Meeting(client.end(address), server.end())


# The end ----------------------------------------------------------------------------------------------


def test_what_one_says_the_other_hears(client: ClientContexts, server: ServerContexts) -> None:
    meeting = meet(client, server)
    assert meeting.client.ready
    assert meeting.server.ready
    assert meeting.client.version == "TLSv1.3"
    meeting.server.send(b"offer")
    meeting.client.send(b"")
    meeting.client.send(b"answer")
    assert not meeting.heard_by_client
    meeting.exchange()
    assert (meeting.heard_by_client, meeting.heard_by_server) == (b"offer", b"answer")


def test_each_has_the_others_certificate(client: ClientContexts, server: ServerContexts) -> None:
    meeting = meet(client, server)
    assert meeting.server.certificate == ssl.PEM_cert_to_DER_cert(_first_certificate(client.tls.certificate))
    assert meeting.client.certificate is not None
    assert names_in(meeting.client.certificate) == ["localhost", "127.0.0.1"]


def _first_certificate(file: str | None) -> str:
    assert file is not None
    text = Path(file).read_text()
    begin, end = text.index("-----BEGIN CERT"), text.index("-----END CERT")
    return text[begin : end + len("-----END CERTIFICATE-----\n")]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    piece_bytes=st.one_of(st.just(1), st.integers(2, 5000)),
    said=st.lists(st.integers(1, 40_000), max_size=4),
)
def test_in_whatever_pieces_it_comes(
    client: ClientContexts, server: ServerContexts, piece_bytes: int, said: list[int]
) -> None:
    meeting = Meeting(client.end(HERE), server.end(), piece_bytes)
    words = [os.urandom(size) for size in said]
    for word in words:
        meeting.client.send(word)
        meeting.server.send(word[::-1])
    meeting.exchange()
    assert meeting.heard_by_server == b"".join(words)
    assert meeting.heard_by_client == b"".join(word[::-1] for word in words)


def test_into_a_buffer(client: ClientContexts, server: ServerContexts) -> None:
    meeting = meet(client, server)
    said = os.urandom(100_000)
    meeting.client.send(said)
    ciphertext = memoryview(meeting.client.output())
    heard = bytearray()
    buffer = memoryview(bytearray(30_000))
    for at in range(0, len(ciphertext), 50_000):
        count = meeting.server.receive_into(ciphertext[at : at + 50_000], buffer)
        while count:
            heard += buffer[:count]
            count = meeting.server.receive_into(memoryview(b""), buffer)
    assert heard == said


def test_an_end_that_was_announced(client: ClientContexts, server: ServerContexts) -> None:
    meeting = meet(client, server)
    meeting.client.send(b"last words")
    meeting.client.close()
    assert not meeting.server.finished
    meeting.exchange()
    assert meeting.heard_by_server == b"last words"
    assert meeting.server.receive(b"") == b""
    assert meeting.server.finished


def test_a_change_on_the_way(client: ClientContexts, server: ServerContexts) -> None:
    meeting = meet(client, server)
    meeting.client.send(b"pay 1")
    ciphertext = bytearray(meeting.client.output())
    ciphertext[-20] ^= 1
    with pytest.raises(EncryptionError, match="what comes from the client was changed on the way"):
        meeting.server.receive(bytes(ciphertext))


def test_another_connection_is_cheaper(client: ClientContexts, server: ServerContexts) -> None:
    address = TcpAddress("localhost", 2)
    first = meet(client, server, address)
    assert not first.client.resumed
    first.server.send(b"offer")
    first.exchange()
    client.remember(address, first.client)
    second = meet(client, server, address)
    assert second.client.resumed
    assert second.server.certificate == first.server.certificate is not None
    assert not meet(client, server, TcpAddress("localhost", 3)).client.resumed


# Refusals ---------------------------------------------------------------------------------------------


def refused(meeting: Meeting, by_client: str, by_server: str) -> None:
    assert by_client in meeting.client_problem
    assert by_server in meeting.server_problem
    assert "\n" not in meeting.client_problem + meeting.server_problem
    assert meeting.heard_by_client == meeting.heard_by_server == b""


def test_a_server_of_another_authority(
    authority: Authority, stranger: Authority, client: ClientContexts
) -> None:
    server = ServerContexts(ServerTls(stranger.server(), ca=authority.file))
    refused(
        meet(client, server), "the server's certificate was signed by no authority",
        "does not trust the authority that signed this server's",
    )  # fmt: skip


def test_a_client_of_another_authority(
    authority: Authority, stranger: Authority, server: ServerContexts
) -> None:
    client = ClientContexts(ClientTls(stranger.client(), ca=authority.file))
    refused(
        meet(client, server), "does not trust the authority that signed this client's",
        "the client's certificate was signed by no authority",
    )  # fmt: skip


def test_a_server_whose_time_is_over(authority: Authority, client: ClientContexts) -> None:
    server = ServerContexts(ServerTls(authority.server("old-server", days=-1)))
    refused(meet(client, server), "the server's certificate has expired", "says that this server's")


def test_a_client_whose_time_is_over(authority: Authority, server: ServerContexts) -> None:
    client = ClientContexts(ClientTls(authority.client("old-client", days=-1)))
    refused(meet(client, server), "says that this client's certificate has expired", "has expired")


def test_a_client_that_was_revoked(authority: Authority, folder: Path) -> None:
    bad, good = authority.client("bad"), authority.client("good")
    server = ServerContexts(ServerTls(authority.server(), revoked=authority.revoke(bad)))
    meeting = meet(ClientContexts(ClientTls(bad)), server)
    refused(
        meeting, "says that this client's certificate was revoked", "the client's certificate was revoked"
    )
    assert meet(ClientContexts(ClientTls(good)), server).server.ready


@pytest.mark.parametrize("host", ["zoo.example", "127.0.0.2", "localhost.example"])
def test_a_server_of_another_name(client: ClientContexts, server: ServerContexts, host: str) -> None:
    meeting = meet(client, server, TcpAddress(host, 1))
    refused(meeting, f"the server's certificate is not for {host!r}", "or the name in it")
    assert meeting.client.met_other_name


@pytest.mark.parametrize("options", [{"server_hostname": "localhost"}, {"check_hostname": False}])
def test_a_server_that_is_reached_by_another_name(
    authority: Authority, server: ServerContexts, options: dict[str, object]
) -> None:
    client = ClientContexts(ClientTls(authority.client(), **options))  # type: ignore[arg-type]
    assert meet(client, server, TcpAddress("zoo.example", 1)).server.ready


def test_a_client_without_a_certificate(authority: Authority, server: ServerContexts) -> None:
    client = ClientContexts(ClientTls(ca=authority.file))
    refused(meet(client, server), "wants a certificate of this client", "the client shows no certificate")
    lenient = ServerContexts(ServerTls(authority.server(), certificate_required=False))
    meeting = meet(client, lenient)
    assert meeting.server.ready
    assert meeting.server.certificate is None


def test_a_bad_certificate_where_none_is_required(authority: Authority, stranger: Authority) -> None:
    lenient = ServerContexts(ServerTls(authority.server(), certificate_required=False))
    client = ClientContexts(ClientTls(stranger.client(), ca=authority.file))
    refused(meet(client, lenient), "does not trust", "signed by no authority")


def test_a_servers_certificate_is_no_clients(authority: Authority, server: ServerContexts) -> None:
    client = ClientContexts(ClientTls(authority.server("another-server")))
    refused(meet(client, server), "does not accept", "for another purpose")


def test_the_certificate_in_a_bundle_is_not_trusted_by_itself(
    authority: Authority, stranger: Authority
) -> None:
    """Only those that follow it are."""
    bundle = Path(stranger.server("in-between")).read_bytes().replace(stranger.pem, authority.pem)
    server = ServerContexts(ServerTls(authority.write("odd.pem", bundle)))
    client = ClientContexts(ClientTls(authority.write("odd-client.pem", bundle)))
    refused(meet(client, server), "signed by no authority", "does not trust")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_a_client_of_long_ago(authority: Authority, server: ServerContexts) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.file)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    refused(
        Meeting(End(context, server_hostname="localhost"), server.end()),
        "the server speaks another version of TLS", "the client speaks only TLS that is older than 1.2",
    )  # fmt: skip


def test_tls_1_2_will_do(authority: Authority, server: ServerContexts) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(authority.client())
    context.load_verify_locations(authority.file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    meeting = Meeting(End(context, server_hostname="localhost"), server.end())
    assert meeting.client.version == "TLSv1.2"
    meeting.client.send(b"said")
    meeting.exchange()
    assert meeting.heard_by_server == b"said"


@pytest.mark.parametrize(
    "start", [b"\0\0\0\x02M5", b"\0\0\0\x04ruok", b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n"]
)
def test_a_client_without_tls(server: ServerContexts, start: bytes) -> None:
    end = server.end()
    with pytest.raises(EncryptionError, match=r"the client speaks (HTTP, and )?no TLS"):
        end.receive(start)
    assert not end.ready


def test_a_server_without_tls(client: ClientContexts) -> None:
    with pytest.raises(EncryptionError, match="the server speaks no TLS"):
        client.end(HERE).receive(b"\0\0\0\x02M5")


@pytest.mark.parametrize(
    "record",
    [b"\x14\x03\x03\0\x01\x01", b"\x16\x03\x03\x3e\x80" + b"\x0b\xff\xff\xff".ljust(16_000, b"\0")],
    ids=["records that mean nothing", "a message of 16 MB"],
)
def test_a_handshake_without_an_end(client: ClientContexts, server: ServerContexts, record: bytes) -> None:
    """OpenSSL puts an end to it, before it has kept much."""
    end = server.end()
    end.receive(client.end(HERE).output())
    with pytest.raises(EncryptionError):
        [end.receive(record) for _ in range(200_000 // len(record))]


def test_a_name_that_is_none(client: ClientContexts) -> None:
    with pytest.raises(EncryptionError, match="is no name of a server"):
        client.end(TcpAddress("." * 300, 1))


# Files ------------------------------------------------------------------------------------------------


def _separate(authority: Authority, name: str) -> tuple[str, str]:
    key, certificate, _ = authority.issue(name, "localhost", server=True)
    return authority.write(f"{name}-key.pem", key), authority.write(f"{name}-certificate.pem", certificate)


def test_files_of_their_own(authority: Authority, client: ClientContexts) -> None:
    key, certificate = _separate(authority, "apart")
    assert meet(client, ServerContexts(ServerTls(certificate, key, authority.file))).server.ready


Make = Callable[[Authority], object]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda a: ServerTls(str(a.folder / "none.pem")), "none.pem: no such file"),
        (lambda a: ServerTls(str(a.folder)), "can't read"),
        (lambda a: ServerTls(a.write("empty.pem", b"")), "empty.pem has no certificate"),
        (lambda a: ServerTls(a.file), "ca.pem has no private key: name its file"),
        (lambda a: ServerTls(_separate(a, "lone")[1], _separate(a, "lone")[0]), "of an authority"),
        (lambda a: ServerTls(a.server(), _separate(a, "other")[0]), "is not that of the certificate"),
        (lambda a: ServerTls(a.server(), a.file), "ca.pem has no private key: it must be in PEM"),
        (lambda a: ServerTls(a.server(), a.write("p.pem", key_pem(a.key, "secret"))), "has a password"),
        (lambda a: ServerTls(a.server(), ca=a.write("empty.pem", b"")), "empty.pem has no certificate"),
        (lambda a: ServerTls(a.server(), revoked=a.file), "ca.pem has no list of revoked certificates"),
        (lambda a: ServerTls(a.server(), revoked=str(a.folder / "none.pem")), "no such file"),
        (lambda a: ClientTls(), "TLS has no certificate of an authority"),
        (lambda a: ClientTls(key=a.file, ca=a.file), "the key of a certificate that is not named"),
        (lambda a: ClientTls(ca=str(a.folder / "none.pem")), "no such file"),
        (lambda a: ClientTls(ca=a.write("odd.pem", a.pem.replace(b"\nM", b"\n\xe9"))), "no certificate"),
        (lambda a: ClientTls(ca=a.write("large.pem", a.pem + bytes(limits.TLS_FILE_BYTES))), "has more than"),
    ],
)  # fmt: skip
def test_files_that_will_not_do(tmp_path: Path, make: Make, words: str) -> None:
    made = make(Authority(tmp_path))
    with pytest.raises(ConfigurationError) as refusal:
        ServerContexts(made) if isinstance(made, ServerTls) else ClientContexts(made)  # type: ignore[arg-type]
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_authorities_of_the_system() -> None:
    assert ClientContexts(ClientTls(ca="system")).end(HERE).output()


def test_new_files_are_taken_into_use(tmp_path: Path) -> None:
    authority, now = Authority(tmp_path), Now()
    server = ServerContexts(ServerTls(authority.server()), now)
    client = ClientContexts(ClientTls(authority.client()))
    first = meet(client, server).client.certificate
    authority.server()
    assert not server.look()  # it is no time for that yet
    assert meet(client, server).client.certificate == first
    now.time_s = limits.TLS_RELOAD_S
    assert meet(client, server).client.certificate != first


def test_a_fault_in_a_new_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority, now = Authority(tmp_path), Now()
    server = ServerContexts(ServerTls(authority.server()), now)
    client = ClientContexts(ClientTls(authority.client()))
    Path(server.tls.certificate).write_text("a slip")
    for now.time_s in (1.0, 2.0, 3.0):
        assert not server.look()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        f"certificates can't be read again, the old ones stay in use: "
        f"{server.tls.certificate} has no certificate (in PEM)"
    ]
    assert meet(client, server).server.ready
    authority.server()
    now.time_s = 4.0
    assert server.look()


def test_a_clients_new_files_are_taken_into_use(tmp_path: Path) -> None:
    authority, now = Authority(tmp_path), Now()
    server = ServerContexts(ServerTls(authority.server()))
    client = ClientContexts(ClientTls(authority.client()), now)
    first = meet(client, server)
    first.server.send(b"offer")
    first.exchange()
    client.remember(HERE, first.client)
    authority.client()
    now.time_s = limits.TLS_RELOAD_S
    second = meet(client, server)
    assert not second.client.resumed
    assert second.server.certificate != first.server.certificate


def test_a_session_ends_with_its_certificate(tmp_path: Path) -> None:
    authority, now = Authority(tmp_path), Now()
    server = ServerContexts(ServerTls(authority.server(), revoked=authority.revoke()), now)
    client = ClientContexts(ClientTls(authority.client()))
    first = meet(client, server)
    certificate = first.server.certificate
    assert certificate is not None
    assert not server.is_revoked(certificate)
    assert server.refusal(certificate) == server.refusal(None) == ""
    first.server.send(b"offer")
    first.exchange()
    client.remember(HERE, first.client)
    authority.revoke(authority.folder / "client.pem")  # type: ignore[arg-type]
    now.time_s = limits.TLS_RELOAD_S
    assert server.look()
    assert server.is_revoked(certificate)
    assert "revoked" in server.refusal(certificate)
    refused(meet(client, server), "was revoked", "was revoked")


def test_a_session_that_outlives_a_certificate(authority: Authority) -> None:
    server = ServerContexts(ServerTls(authority.server()))
    _, _, certificate = authority.issue("late", server=False, days=-1)
    from cryptography.hazmat.primitives.serialization import Encoding

    assert server.refusal(certificate.public_bytes(Encoding.DER)) == "the client's certificate has expired"


def test_a_block_that_does_not_end_hides_none_behind_it(authority: Authority) -> None:
    file = authority.write("some.pem", b"-----BEGIN CERTIFICATE-----\n" * 3 + b"words\r\n" + authority.pem)
    ClientContexts(ClientTls(ca=file))
