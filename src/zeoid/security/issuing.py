"""What is in a certificate, in a certificate authority's own, and in a list of revoked ones.

Owns the contents: keys, extensions, times. Must not know files or directories. Expensive to import, because
of `cryptography`: whoever may do without it imports this when it is needed.

Keys are ECDSA on P-256, not Ed25519: every OpenSSL that a stock ZEO on an old Python may have, and every
hardware module, understands it.

| | authority | server | client |
|---|---|---|---|
| subject | CN=zeoid CA *key* | CN=*name* | CN=*name*, OU=zeoid role: *role* |
| basicConstraints | CA, path length 0 | no CA | no CA |
| keyUsage | keyCertSign, cRLSign | digitalSignature | digitalSignature |
| extendedKeyUsage | | serverAuth | clientAuth |
| subjectAltName | | its DNS names and IP addresses | |

A server that is also a client has what both columns say. All have key identifiers.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from zeoid import limits
from zeoid.model import frozen
from zeoid.security.names import ROLE_PREFIX

Key = ec.EllipticCurvePrivateKey


@frozen
class Authority:
    """A certificate authority: who signs."""

    certificate: x509.Certificate
    key: Key


@frozen
class Request:
    """What a certificate is to say."""

    name: str
    #: DNS names and IP addresses of a server; empty for a client.
    hosts: Sequence[str]
    is_server: bool
    is_client: bool
    #: What a client may do; empty if it is none.
    role: str


@frozen
class Revoked:
    """An entry of a list of revoked certificates."""

    serial: int
    at: datetime


def moment(seconds: float) -> datetime:
    """A time in the form that certificates have, which know no parts of a second."""
    return datetime.fromtimestamp(int(seconds), UTC)


def new_authority(now: datetime) -> Authority:
    """A new one, that issues certificates for what is at the end of a connection, and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # A part of the key in the name tells several authorities apart, for people and for OpenSSL.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"zeoid CA {identifier.digest[:4].hex()}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_backdated(now))
        .not_valid_after(now + timedelta(days=limits.AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(_authority_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def issue(
    authority: Authority, request: Request, now: datetime, not_after: datetime
) -> tuple[x509.Certificate, Key]:
    """A certificate, with a key of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, request.name)]
    purposes = []
    if request.is_server:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    if request.is_client:
        purposes.append(ExtendedKeyUsageOID.CLIENT_AUTH)
        subject.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, ROLE_PREFIX + request.role))
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_backdated(now))
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_authority_identifier(_identifier_of(authority.certificate)), critical=False)
    )
    if request.hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in request.hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority.key, hashes.SHA256()), key


def revocation_list(authority: Authority, revoked: Sequence[Revoked], number: int, now: datetime) -> bytes:
    """A list of revoked certificates, in PEM.

    It is made anew when something is revoked, and not otherwise: no daemon of ours issues it every day. So it
    is valid for as long as the authority: OpenSSL, asked to look at such a list, refuses everybody once the
    list is older than it says, and then nobody at all could connect. It begins a little in the past, too.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(_backdated(now))
        .next_update(now + timedelta(days=limits.REVOCATION_LIST_DAYS))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_identifier(_identifier_of(authority.certificate)), critical=False)
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(entry.serial).revocation_date(entry.at).build()
        )
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def read_revocation_list(data: bytes) -> tuple[int, list[Revoked]]:
    """Its number, and what is on it. ValueError."""
    read = x509.load_pem_x509_crl(data)
    try:
        number = read.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        number = 0
    return number, [Revoked(entry.serial_number, entry.revocation_date_utc) for entry in read]


def read_certificate(data: bytes) -> x509.Certificate:
    """ValueError."""
    return x509.load_pem_x509_certificate(data)


def read_authority(certificate: bytes, key: bytes) -> Authority:
    """ValueError, also if the two do not belong together."""
    read = read_certificate(certificate)
    try:
        opened = load_pem_private_key(key, password=None)
    except TypeError:
        raise ValueError("the key has a password") from None
    if not isinstance(opened, ec.EllipticCurvePrivateKey) or opened.public_key() != read.public_key():
        raise ValueError("the key is not that of the certificate")
    return Authority(read, opened)


def serial_of(certificate: x509.Certificate) -> str:
    """Its serial number in hexadecimal, in whole bytes, as OpenSSL shows it."""
    number = certificate.serial_number
    return number.to_bytes((number.bit_length() + 7) // 8, "big").hex().upper()


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _backdated(now: datetime) -> datetime:
    return now - timedelta(seconds=limits.CERTIFICATE_BACKDATED_S)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _identifier_of(certificate: x509.Certificate) -> x509.SubjectKeyIdentifier:
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value


def _authority_identifier(identifier: x509.SubjectKeyIdentifier) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
