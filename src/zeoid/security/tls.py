"""Who is trusted with TLS: the files that an administrator names, made into contexts of OpenSSL.

A *bundle* is one file in PEM: a private key, its certificate, and after that the certificates of the
authorities that are trusted, in this order. Keys, authorities and lists of revoked certificates may be in
files of their own instead; then what follows a certificate only leads from it to its authority.

Files are looked at again while they are in use. A new context takes over for new connections when they have
changed; a fault in one of them leaves things as they are. Nothing here ever asks for a password.

Owns the files and the contexts. What goes over a connection is `end`'s business, what somebody may do is
`roles`'. The package `cryptography` is loaded where it is needed: that takes long, and few need it.
"""

import logging
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from zeoid import limits
from zeoid.addresses import TcpAddress
from zeoid.errors import ConfigurationError
from zeoid.model import frozen
from zeoid.security.end import End
from zeoid.security.watched import Changes

log = logging.getLogger("zeoid.security")

#: In the place of a file of authorities: those that the system trusts.
SYSTEM: Final = "system"

_BEGIN: Final = "-----BEGIN "
_DASHES: Final = "-----"
_CERTIFICATES = ("CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE")

#: The issuer's name in DER, and the number that it gave to a certificate.
_Serial = tuple[bytes, int]


@frozen
class ServerTls:
    """A server's options. Files are in PEM."""

    #: Its certificate, and what else is in the bundle.
    certificate: str
    #: The private key, if it is not in there.
    key: str | None = None
    #: The authorities whose clients are trusted, if they are not in there; or "system".
    ca: str | None = None
    #: Lists of certificates that are not good any more, one of each authority.
    revoked: str | None = None
    #: Whether a client without a certificate is refused. One with a bad one always is.
    certificate_required: bool = True


@frozen
class ClientTls:
    """A client's options. Files are in PEM."""

    #: Its certificate, and what else is in the bundle; None: it shows none.
    certificate: str | None = None
    key: str | None = None
    #: The authorities whose servers are trusted, if they are not in the bundle; or "system".
    ca: str | None = None
    revoked: str | None = None
    #: The name that a server's certificate must have, if it is not the one by which it is reached.
    server_hostname: str | None = None
    #: Whether a server must have that name. Without this every server that has a certificate of the
    #: authority, and every client too, may pass for every other one.
    check_hostname: bool = True


class _Following:
    """A context that follows its files."""

    def __init__(self, files: Sequence[str | None], monotonic: Callable[[], float]) -> None:
        named = [file for file in files if file and file != SYSTEM]
        self._changes = Changes(named, monotonic, limits.TLS_RELOAD_S)
        self._make()

    def _make(self) -> None:
        """Make what is made of the files, and take it into use only when all of it is there."""
        raise NotImplementedError

    def look(self) -> bool:
        """Make everything anew if a file has changed. True if something new is in use now."""
        return self._changes.found() and self.reload()

    def reload(self) -> bool:
        """Make everything anew. False, and a line in the log, if that can't be: it all stays as it was."""
        self._changes.note()
        try:
            self._make()
        except ConfigurationError as problem:
            log.error("certificates can't be read again, the old ones stay in use: %s", problem)
            return False
        log.info("certificates were read again")
        return True


class ServerContexts(_Following):
    """What a server's connections are made with. ConfigurationError if it can't be."""

    def __init__(self, tls: ServerTls, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.tls = tls
        self.context: ssl.SSLContext
        self._revoked: frozenset[_Serial]
        super().__init__((tls.certificate, tls.key, tls.ca, tls.revoked), monotonic)

    def _make(self) -> None:
        tls = self.tls
        context = _context(ssl.PROTOCOL_TLS_SERVER)
        trusted = _load_certificate(context, tls.certificate, tls.key)
        if _trust(context, tls.ca, trusted):
            context.verify_mode = ssl.CERT_REQUIRED if tls.certificate_required else ssl.CERT_OPTIONAL
        elif tls.certificate_required:
            raise ConfigurationError(
                f"{tls.certificate} has no certificate of an authority, whose clients to trust: name its file"
            )
        revoked = _refuse_revoked(context, tls.revoked)
        self.context, self._revoked = context, revoked

    def end(self) -> End:
        """For a connection that was accepted."""
        self.look()
        return End(self.context)

    def is_revoked(self, certificate: bytes) -> bool:
        """Whether a certificate, in DER, was revoked."""
        if not self._revoked:
            return False
        from cryptography import x509

        found = x509.load_der_x509_certificate(certificate)
        return (found.issuer.public_bytes(), found.serial_number) in self._revoked

    def refusal(self, certificate: bytes | None) -> str:
        """Why a client whose handshake went well is refused nevertheless; empty if it is not.

        A session that is taken up again is not verified again: what has ended since then is found here.
        """
        if certificate is None:
            return ""
        if self.is_revoked(certificate):
            return "the client's certificate was revoked"
        from cryptography import x509

        if x509.load_der_x509_certificate(certificate).not_valid_after_utc < datetime.now(UTC):
            return "the client's certificate has expired"
        return ""


class ClientContexts(_Following):
    """What a client's connections are made with. ConfigurationError if it can't be."""

    def __init__(self, tls: ClientTls, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.tls = tls
        self._context: ssl.SSLContext
        #: What makes another connection to a server cheaper. Of the context in use, by address.
        self._sessions: dict[TcpAddress, tuple[ssl.SSLContext, ssl.SSLSession]] = {}
        super().__init__((tls.certificate, tls.key, tls.ca, tls.revoked), monotonic)

    def _make(self) -> None:
        self._context = self._new_context(self.tls.check_hostname)

    def _new_context(self, check_hostname: bool) -> ssl.SSLContext:
        tls = self.tls
        context = _context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = check_hostname
        trusted: list[str] = []
        if tls.certificate:
            trusted = _load_certificate(context, tls.certificate, tls.key)
        elif tls.key:
            raise ConfigurationError(f"{tls.key} is the key of a certificate that is not named")
        if not _trust(context, tls.ca, trusted):
            raise ConfigurationError(
                f"{tls.certificate or 'TLS'} has no certificate of an authority, whose servers to trust: "
                f"name its file, or {SYSTEM!r} for those that this machine trusts"
            )
        _refuse_revoked(context, tls.revoked)
        return context

    def end(self, address: TcpAddress) -> End:
        """For a connection to a server. EncryptionError if it has no name that a certificate could have."""
        self.look()
        context, session = self._sessions.get(address, (None, None))
        if context is not self._context:
            session = None
        return End(self._context, server_hostname=self.tls.server_hostname or address.host, session=session)

    def end_for_any_name(self, address: TcpAddress) -> End:
        """For a connection that is to tell only what the server's certificate has."""
        context = self._new_context(False)
        return End(context, server_hostname=self.tls.server_hostname or address.host)

    def remember(self, address: TcpAddress, end: End) -> None:
        """Take up *end*'s session again when there is another connection to the same server."""
        session = end.session
        if session is not None and end.context is self._context:
            self._sessions[address] = self._context, session


def names_in(certificate: bytes) -> list[str]:
    """The hosts that a certificate, in DER, is for."""
    from cryptography import x509

    found = x509.load_der_x509_certificate(certificate)
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    hosts = names.get_values_for_type(x509.DNSName)
    return [*hosts, *map(str, names.get_values_for_type(x509.IPAddress))]


# Files ------------------------------------------------------------------------------------------------


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # An authority is trusted, and what it signed: no certificate in between, nor one of a peer, by itself.
    context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _blocks(file: str) -> list[tuple[str, str]]:
    """The kinds and the texts of all blocks in a file. Only those in ASCII, which all of PEM is."""
    try:
        with open(file, "rb") as opened:
            content = opened.read(limits.TLS_FILE_BYTES + 1)
    except OSError as problem:
        raise ConfigurationError(f"can't read {file}: {(problem.strerror or str(problem)).lower()}") from None
    if len(content) > limits.TLS_FILE_BYTES:
        raise ConfigurationError(f"{file} has more than {limits.TLS_FILE_BYTES:,} bytes")
    found: list[tuple[str, str]] = []
    kind, lines = "", list[str]()
    for line in content.decode("ascii", "replace").splitlines():
        line = line.rstrip()
        if line.startswith(_BEGIN) and line.endswith(_DASHES):
            kind, lines = line[len(_BEGIN) : -len(_DASHES)], []
        lines.append(line)
        if kind and line == f"-----END {kind}-----":
            text = "\n".join(lines)
            if text.isascii():
                found.append((kind, text))
            kind = ""
    return found


def _certificates(blocks: Sequence[tuple[str, str]]) -> list[str]:
    return [text for kind, text in blocks if kind in _CERTIFICATES]


def _load_certificate(context: ssl.SSLContext, file: str, key: str | None) -> list[str]:
    """Load a certificate and its key. What follows it in the file: the authorities of a bundle."""
    certificates = _certificates(_blocks(file))
    if not certificates:
        raise ConfigurationError(f"{file} has no certificate (in PEM)")
    key_file = key or file
    keys = [(kind, text) for kind, text in _blocks(key_file) if kind.endswith("PRIVATE KEY")]
    if not keys:
        where = "name its file" if key is None else "it must be in PEM"
        raise ConfigurationError(f"{key_file} has no private key: {where}")
    kind, text = keys[0]
    if kind.startswith("ENCRYPTED") or "Proc-Type: 4,ENCRYPTED" in text:
        raise ConfigurationError(f"the private key in {key_file} has a password: remove it, nobody is asked")
    try:
        context.load_cert_chain(file, key_file, password=lambda: "")
    except ssl.SSLError as problem:
        if problem.reason == "KEY_VALUES_MISMATCH":
            raise ConfigurationError(
                f"the private key in {key_file} is not that of the certificate in {file}"
            ) from None
        raise ConfigurationError(f"{file} can't be used: {_reason(problem)}") from None
    except OSError as problem:
        raise ConfigurationError(f"can't read {file} or {key_file}: {problem.strerror}") from None
    return certificates[1:]


def _trust(context: ssl.SSLContext, ca: str | None, bundled: Sequence[str]) -> bool:
    """Trust the authorities in the file *ca*, or else those of the bundle. Whether there are any."""
    if ca == SYSTEM:
        context.load_default_certs(
            ssl.Purpose.SERVER_AUTH
            if context.protocol == ssl.PROTOCOL_TLS_CLIENT
            else ssl.Purpose.CLIENT_AUTH
        )
        return True
    certificates = bundled
    if ca is not None:
        certificates = _certificates(_blocks(ca))
        if not certificates:
            raise ConfigurationError(f"{ca} has no certificate (in PEM)")
    if certificates:
        try:
            context.load_verify_locations(cadata="\n".join(certificates))
        except (ssl.SSLError, ValueError) as problem:
            where = f"{ca}" if ca else "the bundle"
            raise ConfigurationError(
                f"the authorities' certificates in {where} can't be used: {_reason(problem)}"
            ) from None
    return bool(certificates)


def _refuse_revoked(context: ssl.SSLContext, file: str | None) -> frozenset[_Serial]:
    """Refuse the certificates in the lists in *file*, which are returned."""
    if file is None:
        return frozenset()
    from cryptography import x509

    serials: set[_Serial] = set()
    lists = [text for kind, text in _blocks(file) if kind == "X509 CRL"]
    if not lists:
        raise ConfigurationError(f"{file} has no list of revoked certificates (in PEM)")
    try:
        for text in lists:
            revoked = x509.load_pem_x509_crl(text.encode("ascii"))
            issuer = revoked.issuer.public_bytes()
            serials.update((issuer, entry.serial_number) for entry in revoked)
        context.load_verify_locations(file)
    except (OSError, ValueError) as problem:  # SSLError is an OSError
        raise ConfigurationError(f"{file} can't be used: {_reason(problem)}") from None
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return frozenset(serials)


def _reason(problem: Exception) -> str:
    if isinstance(problem, ssl.SSLError) and problem.reason:
        return problem.reason.lower().replace("_", " ")
    return str(problem).splitlines()[0] if str(problem) else type(problem).__name__
