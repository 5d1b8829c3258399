"""An authority, and the certificates that it signs: made in memory, written as bundles into a folder.

Owns what is in them. Keys are of the kind that is made in no time.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = timedelta(days=1)
PEM = serialization.Encoding.PEM


def _name(common_name: str, unit: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if unit:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return x509.Name(parts)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def key_pem(key: ec.EllipticCurvePrivateKey, password: str = "") -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password.encode())
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption)


class Authority:
    """Signs certificates, and takes them back."""

    def __init__(self, folder: Path, name: str = "the authority") -> None:
        self.folder = folder
        self.name = _name(name)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._revoked: list[int] = []
        key_usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip
        self.certificate = (
            self._builder(self.name, self.key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(key_usage, critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(PEM)
        self.file = self.write("ca.pem", self.pem)
        self.revoked_file = ""
        self.revoke()

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int = 1
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )

    def write(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def issue(
        self, name: str, *hosts: str, server: bool, days: int = 1, unit: str = ""
    ) -> tuple[bytes, bytes, x509.Certificate]:
        """A key and a certificate in PEM, and the latter itself. With less than 0 days it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            self._builder(_name(name, unit), key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        return key_pem(key), certificate.public_bytes(PEM), certificate

    def server(self, name: str = "server", *hosts: str, days: int = 1) -> str:
        """The bundle of a server, by default of one at 127.0.0.1 and localhost."""
        key, certificate, _ = self.issue(name, *(hosts or ("localhost", "127.0.0.1")), server=True, days=days)
        return self.write(f"{name}.pem", key + certificate + self.pem)

    def client(self, name: str = "client", *, days: int = 1, unit: str = "zeoid role: write") -> str:
        """The bundle of a client."""
        key, certificate, _ = self.issue(name, server=False, days=days, unit=unit)
        return self.write(f"{name}.pem", key + certificate + self.pem)

    def revoke(self, *bundles: str, next_update_days: int = 1) -> str:
        """The file of what was revoked so far, and now."""
        for bundle in bundles:
            pem = Path(bundle).read_bytes()
            self._revoked.append(x509.load_pem_x509_certificates(pem)[0].serial_number)
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(now - 10 * DAY)
            .next_update(now + next_update_days * DAY)
        )
        for serial in self._revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - DAY)
            builder = builder.add_revoked_certificate(entry.build())
        revoked = builder.sign(self.key, hashes.SHA256())
        self.revoked_file = self.write("revoked.pem", revoked.public_bytes(PEM))
        return self.revoked_file
