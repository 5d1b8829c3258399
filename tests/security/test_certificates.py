"""The certificate authority in a directory: what it issues is what OpenSSL and Python accept, what it revoked
is refused, and neither a crash nor two commands at once make it forget anything."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from zeoid import limits
from zeoid.errors import ConfigurationError
from zeoid.security import files
from zeoid.security.certificates import CertificateAuthority, Issued, Made, normal_host

DAY_S = 24 * 3600.0
NAMES_AT_ONCE = 8


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    made = CertificateAuthority(tmp_path / "certs")
    made.create()
    return made


def at(authority: CertificateAuthority, days: float) -> CertificateAuthority:
    """The same directory, so many days from now."""
    return CertificateAuthority(authority.directory, lambda: time.time() + days * DAY_S)


def pems(path: Path) -> list[str]:
    """The parts of a bundle."""
    return [f"{part}-----END{end}" for part, end in _parts(path.read_text())]


def _parts(text: str) -> list[tuple[str, str]]:
    found = []
    for block in text.split("-----BEGIN")[1:]:
        body, _, end = f"-----BEGIN{block}".partition("-----END")
        found.append((body, end))
    return found


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pems(path)[1].encode())


def openssl(*arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=30
    )
    return done.returncode, done.stdout + done.stderr


# Handshakes -------------------------------------------------------------------------------------------


def contexts(
    authority: CertificateAuthority, server: Path, client: Path, *, crl: bool = False
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server and a client that want each other's certificates, and take all strictly."""
    made = []
    for protocol, bundle in ((ssl.PROTOCOL_TLS_SERVER, server), (ssl.PROTOCOL_TLS_CLIENT, client)):
        context = ssl.SSLContext(protocol)
        context.load_cert_chain(bundle)
        context.load_verify_locations(cadata=pems(bundle)[2])
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        made.append(context)
    if crl:
        made[0].load_verify_locations(authority.revoked_path)
        made[0].verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return made[0], made[1]


def shake(ends: tuple[ssl.SSLContext, ssl.SSLContext], host: str) -> dict[str, object]:
    """A handshake without sockets; the client's certificate as the server sees it. SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = ends[0].wrap_bio(up, down, server_side=True)
    client = ends[1].wrap_bio(down, up, server_hostname=host)
    waiting = {client, server}
    for _ in range(10):
        for end in (client, server):
            try:
                end.do_handshake()
                waiting.discard(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    said = server.getpeercert()
    assert said is not None
    return said


@pytest.fixture
def server(authority: CertificateAuthority) -> Path:
    return authority.issue_server("zoo", ["zoo.example.org", "10.0.0.7"], local=True).path


@pytest.fixture
def client(authority: CertificateAuthority) -> Path:
    return authority.issue_client("app1", role="read").path


@pytest.mark.parametrize("host", ["zoo.example.org", "10.0.0.7", "localhost", "127.0.0.1", "::1"])
def test_a_server_and_a_client_accept_each_other(
    authority: CertificateAuthority, server: Path, client: Path, host: str
) -> None:
    said = shake(contexts(authority, server, client, crl=True), host)
    assert said["subject"] == (
        (("commonName", "app1"),),
        (("organizationalUnitName", "zeoid role: read"),),
    )


@pytest.mark.parametrize("host", ["zoo", "other.example.org", "10.0.0.8"])
def test_another_host_is_refused(
    authority: CertificateAuthority, server: Path, client: Path, host: str
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(contexts(authority, server, client), host)


def test_a_client_can_not_be_a_server_nor_a_server_a_client(
    authority: CertificateAuthority, server: Path, client: Path
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        shake(contexts(authority, client, client), "app1")
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        shake(contexts(authority, server, server), "localhost")


def test_a_server_that_is_a_client_too(authority: CertificateAuthority, server: Path) -> None:
    tier = authority.issue_server("tier", also_client=True, role="replica")
    said = shake(contexts(authority, server, tier.path), "localhost")
    assert said["subject"][1] == (("organizationalUnitName", "zeoid role: replica"),)  # type: ignore[index]
    shake(contexts(authority, tier.path, tier.path), "tier")


def test_one_of_another_authority_is_refused(
    authority: CertificateAuthority, server: Path, tmp_path: Path
) -> None:
    other = CertificateAuthority(tmp_path / "other")
    other.create()
    stranger = other.issue_client("app1").path
    server_end, client_end = contexts(authority, server, stranger)
    client_end.load_verify_locations(authority.certificate_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake((server_end, client_end), "localhost")


def test_a_revoked_one_is_refused_and_the_others_are_not(
    authority: CertificateAuthority, server: Path, client: Path
) -> None:
    other = authority.issue_client("app2").path
    authority.revoke("app1")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate revoked"):
        shake(contexts(authority, server, client, crl=True), "localhost")
    shake(contexts(authority, server, other, crl=True), "localhost")


def test_an_expired_one_is_refused(authority: CertificateAuthority, server: Path) -> None:
    expired = at(authority, -10).issue_client("app1", days=9).path
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        shake(contexts(authority, server, expired), "localhost")


def test_a_clock_that_is_a_little_slow_does_not_matter(tmp_path: Path) -> None:
    ahead = CertificateAuthority(tmp_path / "certs", lambda: time.time() + limits.CERTIFICATE_BACKDATED_S / 2)
    ahead.create()
    server, client = ahead.issue_server("zoo").path, ahead.issue_client("app1").path
    shake(contexts(ahead, server, client, crl=True), "zoo")


def test_the_list_of_revoked_ones_is_good_for_ten_years(authority: CertificateAuthority) -> None:
    crl = x509.load_pem_x509_crl(authority.revoked_path.read_bytes())
    assert crl.next_update_utc is not None
    assert crl.next_update_utc - authority.now() > timedelta(days=3650)


def test_openssl_accepts_what_is_issued_until_it_is_revoked(
    authority: CertificateAuthority, server: Path, client: Path, tmp_path: Path
) -> None:
    def verify(path: Path, purpose: str) -> tuple[int, str]:
        leaf = tmp_path / "leaf.pem"
        leaf.write_text(pems(path)[1])
        ca, crl = authority.certificate_path, authority.revoked_path
        strict = ("-x509_strict", "-crl_check", "-CAfile", ca, "-CRLfile", crl)
        return openssl("verify", *strict, "-purpose", purpose, leaf)

    assert verify(server, "sslserver")[0] == 0
    assert verify(client, "sslclient")[0] == 0
    assert "revoked" not in verify(client, "sslclient")[1]
    authority.revoke("app1")
    status, said = verify(client, "sslclient")
    assert status != 0
    assert "certificate revoked" in said
    assert verify(server, "sslserver")[0] == 0


# What is in them --------------------------------------------------------------------------------------


def test_what_a_bundle_has(authority: CertificateAuthority, client: Path) -> None:
    key, _, ca = pems(client)
    assert key.startswith("-----BEGIN PRIVATE KEY-----")
    assert ca == authority.certificate_path.read_text()
    assert len(pems(client)) == 3


def test_the_authority_issues_for_ends_only(authority: CertificateAuthority, client: Path) -> None:
    ca = x509.load_pem_x509_certificate(authority.certificate_path.read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(
        True, 0
    )
    leaf = certificate(client).extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not leaf.ca


def test_how_long_one_is_valid(authority: CertificateAuthority) -> None:
    by_default = authority.issue_client("app1").issued
    short = authority.issue_client("app2", days=3).issued
    assert (by_default.not_after - authority.now()).days in (396, 397)
    assert (short.not_after - authority.now()).days in (2, 3)


def test_none_outlives_its_authority(authority: CertificateAuthority) -> None:
    made = at(authority, limits.AUTHORITY_DAYS - 5).issue_client("app1")
    assert made.is_cut
    assert made.issued.not_after == authority.not_after()
    with pytest.raises(ConfigurationError, match="has expired"):
        at(authority, limits.AUTHORITY_DAYS + 1).issue_client("app2")


@pytest.mark.parametrize("umask", [0, 0o077])
def test_modes_whatever_the_umask_is(tmp_path: Path, umask: int) -> None:
    authority = CertificateAuthority(tmp_path / "certs")
    before = os.umask(umask)
    try:
        authority.create()
        made = [authority.issue_server("zoo").path, authority.issue_client("app1").path]
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in authority.directory.rglob("*")}
    directory = authority.directory
    assert {path.name for path, mode in modes.items() if mode == 0o644} == {"ca.pem", "revoked.pem"}
    assert {modes[path] for path in (*made, directory / "ca-key.pem", directory / "issued.json")} == {0o600}
    assert {modes[directory / "servers"], modes[directory / "clients"]} == {0o700}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_secret_file_is_secret_before_anything_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chmod, seen = os.chmod, []

    def watched(path: Path, mode: int) -> None:
        seen.append((path.stat().st_size, stat.S_IMODE(path.stat().st_mode)))
        chmod(path, mode)

    monkeypatch.setattr(files.os, "chmod", watched)
    before = os.umask(0)
    try:
        files.write_whole(tmp_path / "key", b"secret", files.SECRET)
    finally:
        os.umask(before)
    assert seen == [(0, 0o600)]


# Names, hosts, roles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "Zoo-1_b.example", "x" * 64, "1"])
def test_names(authority: CertificateAuthority, name: str) -> None:
    assert authority.issue_client(name).path == authority.directory / "clients" / f"{name}.pem"


@pytest.mark.parametrize("name", ["", "..", ".a", "-a", "a/b", "a b", "a\n", "zoö", "x" * 65, "a\0"])
def test_what_is_no_name(authority: CertificateAuthority, name: str) -> None:
    with pytest.raises(ConfigurationError, match="can't be a certificate's name"):
        authority.issue_client(name)
    with pytest.raises(ConfigurationError, match="can't be a certificate's name"):
        authority.issue_server(name, ["localhost"])
    assert authority.issued() == []


@pytest.mark.parametrize(
    ("host", "normal"),
    [
        ("Zoo.Example.org", "zoo.example.org"),
        ("*.example.org", "*.example.org"),
        ("my_host", "my_host"),
        ("[::1]", "::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
    ],
)
def test_hosts(host: str, normal: str) -> None:
    assert normal_host(host) == normal


@pytest.mark.parametrize(
    "host", ["", "zoo:8100", "a..b", "a.*", "-a", "zoö", "10.0.0.256", "1.2.3", "a b", "x" * 64, "a.b."]
)
def test_what_is_no_host(authority: CertificateAuthority, host: str) -> None:
    with pytest.raises(ConfigurationError, match="neither a host name nor an IP address"):
        authority.issue_server("zoo", [host])
    assert authority.issued() == []


def test_a_server_is_known_by_its_name_if_nothing_else_is_said(authority: CertificateAuthority) -> None:
    assert authority.issue_server("zoo").issued.hosts == ("zoo",)
    assert authority.issue_server("10.1.1.1", local=True).issued.hosts == ("10.1.1.1", *LOCAL)
    assert authority.issue_server("b", ["a", "a", "localhost"], local=True).issued.hosts == ("a", *LOCAL)


LOCAL = ("localhost", "127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("attempt", "why"),
    [
        (lambda a: a.issue_client("x", role="owner"), "no role; there are read, write, admin, replica"),
        (lambda a: a.issue_client("x", days=0), "1 to 3650 days, not 0"),
        (lambda a: a.issue_client("x", days=3651), "1 to 3650 days"),
        (lambda a: a.issue_client("x", renew=True), "no certificate of a client x to be renewed"),
        (lambda a: a.issue_server("x", role="read"), "only if it is also a client"),
        (lambda a: a.issue_server("x", [f"h{n}" for n in range(101)]), "100 names and addresses"),
        (lambda a: a.revoke("x"), "x has no valid certificate"),
        (lambda a: a.revoke(serial="0x12"), "no certificate with the serial number 0x12"),
        (lambda a: a.revoke(serial="zz"), "no serial number in hexadecimal"),
        (lambda a: a.create(), "has a certificate authority already"),
    ],
)
def test_what_can_not_be_done(
    authority: CertificateAuthority, attempt: Callable[[CertificateAuthority], object], why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        attempt(authority)
    assert authority.issued() == []


# Renewing and revoking --------------------------------------------------------------------------------


def test_a_name_has_one_certificate_unless_it_is_renewed(authority: CertificateAuthority) -> None:
    first = authority.issue_client("app1", role="admin")
    with pytest.raises(ConfigurationError, match="--renew makes a new one beside it"):
        authority.issue_client("app1")
    second = authority.issue_client("app1", renew=True)
    assert second.former == (first.issued,)
    assert second.issued.role == "admin"
    assert certificate(second.path).serial_number == int(second.issued.serial, 16)
    assert [entry.state(authority.now()) for entry in authority.issued()] == ["valid", "valid"]


def test_what_is_not_said_at_a_renewal_stays(authority: CertificateAuthority) -> None:
    authority.issue_server("zoo", ["a", "b"], also_client=True, role="read")
    again = authority.issue_server("zoo", renew=True).issued
    assert (again.hosts, again.also_client, again.role) == (("a", "b"), True, "read")
    other = authority.issue_server("zoo", ["c"], role="admin", renew=True).issued
    assert (other.hosts, other.also_client, other.role) == (("c",), True, "admin")


def test_a_name_is_a_clients_or_a_servers(authority: CertificateAuthority) -> None:
    authority.issue_server("zoo")
    for renew in (False, True):
        with pytest.raises(ConfigurationError, match="zoo is the name of a server"):
            authority.issue_client("zoo", renew=renew)
    authority.revoke("zoo")
    authority.issue_client("zoo")


def test_an_expired_or_revoked_one_is_no_hindrance(authority: CertificateAuthority) -> None:
    at(authority, -10).issue_client("app1", days=9)
    authority.issue_client("app1")
    authority.revoke("app1")
    authority.issue_client("app1")
    assert states(authority) == ["expired", "revoked", "valid"]


def states(authority: CertificateAuthority) -> list[str]:
    return [entry.state(authority.now()) for entry in authority.issued()]


def test_what_expires_soon(authority: CertificateAuthority) -> None:
    authority.issue_client("app1", days=limits.CERTIFICATE_SOON_DAYS)
    authority.issue_client("app2", days=limits.CERTIFICATE_SOON_DAYS + 1)
    assert states(authority) == ["soon", "valid"]
    assert states(at(authority, 2)) == ["soon", "soon"]


def on_list(authority: CertificateAuthority) -> set[int]:
    return {entry.serial_number for entry in x509.load_pem_x509_crl(authority.revoked_path.read_bytes())}


def numbers(issued: list[Issued] | list[Made]) -> set[int]:
    return {int((each.issued if isinstance(each, Made) else each).serial, 16) for each in issued}


def test_revoking_all_of_a_name_or_one(authority: CertificateAuthority) -> None:
    made = [authority.issue_client("app1")]
    made += [authority.issue_client("app1", renew=True) for _ in range(3)]
    authority.issue_client("app2")
    first = made[0].issued.serial
    colons = ":".join(first[i : i + 2].lower() for i in range(0, len(first), 2))
    assert numbers(authority.revoke(serial=colons)) == numbers(made[:1])
    assert on_list(authority) == numbers(made[:1])
    with pytest.raises(ConfigurationError, match="already"):
        authority.revoke(serial=first)
    assert numbers(authority.revoke("app1")) == numbers(made[1:])
    assert on_list(authority) == numbers(made)
    assert states(authority) == ["revoked"] * 4 + ["valid"]


def test_the_number_of_the_list_grows(authority: CertificateAuthority) -> None:
    def number() -> int:
        crl = x509.load_pem_x509_crl(authority.revoked_path.read_bytes())
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number

    seen = [number()]
    for name in ("a", "b"):
        authority.issue_client(name)
        authority.revoke(name)
        seen.append(number())
    assert seen == [1, 2, 3]


def test_a_list_that_was_lost_is_made_anew_with_all_that_was_on_it(authority: CertificateAuthority) -> None:
    made = [authority.issue_client(name) for name in ("app1", "app2")]
    authority.revoke("app1")
    authority.revoked_path.unlink()
    authority.revoke("app2")
    assert on_list(authority) == numbers(made)


def test_what_was_revoked_stays_so_when_an_old_list_of_the_issued_comes_back(
    authority: CertificateAuthority,
) -> None:
    made = [authority.issue_client("app1")]
    issued = authority.directory / "issued.json"
    old = issued.read_bytes()
    made.append(authority.issue_client("app2"))
    authority.revoke("app2")
    issued.write_bytes(old)
    authority.revoke("app1")
    assert on_list(authority) == numbers(made)


# Crashes, damage, others ------------------------------------------------------------------------------


def renames_fail_from(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had been killed at its *number*th rename."""
    rename, done = os.replace, []

    def replace(source: Path, target: Path) -> None:
        done.append(target)
        if len(done) >= number:
            raise OSError(5, "killed", str(target))
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_authority_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    authority = CertificateAuthority(tmp_path / "certs")
    with monkeypatch.context() as patched:
        renames_fail_from(number, patched)
        with pytest.raises(OSError, match="killed"):
            authority.create()
    assert not list(authority.directory.rglob("*.part"))
    with pytest.raises(ConfigurationError, match="no certificate authority"):
        authority.issue_client("app1")
    files.part_of(authority.key_path).write_text("what a crash leaves")
    authority.create()
    shake(contexts(authority, authority.issue_server("a").path, authority.issue_client("b").path), "a")
    assert not list(authority.directory.rglob("*.part"))


@pytest.mark.parametrize("number", [1, 2])
def test_no_certificate_is_there_that_is_not_listed(
    authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patched:
        renames_fail_from(number, patched)
        with pytest.raises(OSError, match="killed"):
            authority.issue_client("app1", role="read")
    assert [entry.name for entry in authority.issued()] == ["app1"] * (number - 1)
    assert not list((authority.directory / "clients").iterdir())
    made = authority.issue_client("app1", renew=number == 2)
    assert len(authority.issued()) == number
    assert made.path.exists()


def test_a_renewal_that_is_cut_off_leaves_the_former_bundle(
    authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = authority.issue_client("app1")
    before = made.path.read_bytes()
    with monkeypatch.context() as patched:
        renames_fail_from(2, patched)
        with pytest.raises(OSError, match="killed"):
            authority.issue_client("app1", renew=True)
    assert made.path.read_bytes() == before


@pytest.mark.parametrize("number", [1, 2])
def test_what_was_on_the_list_of_revoked_ones_stays_there(
    authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    made = [authority.issue_client(name) for name in ("app1", "app2")]
    with monkeypatch.context() as patched:
        renames_fail_from(number, patched)
        with pytest.raises(OSError, match="killed"):
            authority.revoke("app1")
    # It is never said to be revoked while servers still accept it.
    assert states(authority) == ["valid" if number == 1 else "revoked", "valid"]
    assert on_list(authority) == (set() if number == 1 else numbers(made[:1]))
    authority.revoke("app2")
    assert on_list(authority) == numbers(made[number % 2 :])
    if number == 1:
        authority.revoke("app1")
    assert states(authority) == ["revoked"] * 2
    assert on_list(authority) == numbers(made)


def test_many_at_once_lose_nothing(authority: CertificateAuthority) -> None:
    ready = threading.Barrier(NAMES_AT_ONCE)

    def issue(name: str) -> None:
        ready.wait(30)
        CertificateAuthority(authority.directory).issue_client(name)

    names = [f"app{number}" for number in range(NAMES_AT_ONCE)]
    threads = [threading.Thread(target=issue, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.name for entry in authority.issued()) == names
    on_disk = {certificate(authority.directory / "clients" / f"{name}.pem").serial_number for name in names}
    assert on_disk == numbers(authority.issued())


def test_whoever_waits_too_long_for_another_command_is_told(tmp_path: Path) -> None:
    with (
        files.locked(tmp_path),
        pytest.raises(ConfigurationError, match="another command is changing"),
        files.locked(tmp_path, timeout_s=0),
    ):
        pass


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigurationError, match=r"other files \(thesis.tex\)"):
        CertificateAuthority(tmp_path).create()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_an_authority_that_lost_its_certificate_is_not_replaced(authority: CertificateAuthority) -> None:
    authority.issue_client("app1")
    key = authority.key_path.read_bytes()
    authority.certificate_path.unlink()
    with pytest.raises(ConfigurationError, match="put it back"):
        authority.create()
    shutil.rmtree(authority.directory / "clients")
    with pytest.raises(ConfigurationError, match="put it back"):
        authority.create()
    assert authority.key_path.read_bytes() == key


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("ca-key.pem", None, "without it nothing can be issued or revoked"),
        ("ca-key.pem", "x", "can't be used"),
        ("ca.pem", None, "no certificate authority in .*; `zeoid certs init` makes one"),
        ("ca.pem", "x", "can't be read"),
        ("revoked.pem", "x", "can't be read"),
        ("issued.json", None, "restore it from a back-up"),
        ("issued.json", "{", "can't be read"),
        ("issued.json", "[]", "another version"),
        ("issued.json", '{"format": 2, "issued": []}', "another version"),
        ("issued.json", '{"format": 1, "issued": [{"serial": "a"}]}', "an entry is damaged"),
        ("issued.json", '{"format": 1, "issued": 3}', "an entry is damaged"),
    ],
)
def test_damage_is_told_in_one_line(
    authority: CertificateAuthority, name: str, content: str | None, why: str
) -> None:
    path = authority.directory / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=why) as caught:
        authority.issue_client("app1")
    assert "\n" not in str(caught.value)
    assert not list((authority.directory / "clients").iterdir())


def test_the_key_of_another_authority_is_not_used(authority: CertificateAuthority, tmp_path: Path) -> None:
    other = CertificateAuthority(tmp_path / "other")
    other.create()
    shutil.copy(other.key_path, authority.key_path)
    with pytest.raises(ConfigurationError, match="not that of the certificate"):
        authority.issue_client("app1")


def test_the_list_of_what_was_issued(authority: CertificateAuthority) -> None:
    made = authority.issue_server("zoo", ["a"])
    (entry,) = json.loads((authority.directory / "issued.json").read_text())["issued"]
    assert entry == {
        "serial": made.issued.serial,
        "name": "zoo",
        "kind": "server",
        "also_client": False,
        "role": "",
        "hosts": ["a"],
        "not_before": made.issued.not_before.isoformat(),
        "not_after": made.issued.not_after.isoformat(),
        "file": "servers/zoo.pem",
        "revoked": None,
    }
    assert authority.issued() == [made.issued]
