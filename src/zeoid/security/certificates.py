"""A directory that is a certificate authority: it is made, it issues, it lists and revokes.

Owns the files, their order and the rules for names. What is in a certificate is `issuing`'s; whoever checks
one in a connection is `tls`.

| file | what | mode |
|---|---|---|
| `ca.pem` | the authority's certificate. Written last: where it is, the authority is whole | 0644 |
| `ca-key.pem` | its private key | 0600 |
| `revoked.pem` | the list of revoked certificates (CRL) | 0644 |
| `issued.json` | `{"format": 1, "issued": […]}`, the fields of `Issued`, times in ISO 8601 | 0600 |
| `servers/NAME.pem`, `clients/NAME.pem` | bundles: private key, certificate, `ca.pem` | 0600 |

Whoever changes anything locks the directory. Every file is replaced by a rename. What a crash between two
of them leaves:

| between | it leaves | so |
|---|---|---|
| parts of an authority | files, but no `ca.pem` | it is made anew: nothing was issued |
| `issued.json`, then a bundle | a certificate that is listed, whose key nobody has | renew or revoke it |
| `revoked.pem`, then `issued.json` | a revoked one, not listed as such | reading unites both |

So what was issued is always listed, and what was once on a list of revoked ones stays there.
"""

import contextlib
import ipaddress
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from zeoid import limits
from zeoid.errors import ConfigurationError
from zeoid.model import frozen
from zeoid.security import files, issuing
from zeoid.security.names import ROLES

SERVER, CLIENT = "server", "client"
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
FORMAT: Final = 1

#: States in which a certificate is accepted.
_COUNTS: Final = ("valid", "soon")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_DNS_LENGTH: Final = 253

_Read = TypeVar("_Read")


@frozen
class Issued:
    """A certificate that was issued, as it is listed."""

    #: Hexadecimal, as OpenSSL shows it.
    serial: str
    name: str
    #: SERVER or CLIENT; a server may be a client, too.
    kind: str
    also_client: bool
    #: What it may do as a client; empty if it is none.
    role: str
    hosts: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    #: Its bundle, below the authority's directory. That of a newer one of the same name has the same place.
    file: str
    revoked: datetime | None = None

    def state(self, now: datetime) -> str:
        """revoked, expired, soon (to expire) or valid."""
        if self.revoked is not None:
            return "revoked"
        return validity(self.not_after, now)


@frozen
class Made:
    """What came of issuing."""

    issued: Issued
    path: Path
    #: Certificates of the same name that stay valid.
    former: tuple[Issued, ...]
    #: Whether it ends earlier than was asked for, with its authority.
    is_cut: bool


def validity(not_after: datetime, now: datetime) -> str:
    """expired, soon or valid."""
    if not_after <= now:
        return "expired"
    return "soon" if not_after - now <= timedelta(days=limits.CERTIFICATE_SOON_DAYS) else "valid"


def check_name(name: str) -> None:
    """ConfigurationError if it is no name for a certificate, which is a file's name as well."""
    if not _NAME.fullmatch(name) or len(name) > limits.CERTIFICATE_NAME_LENGTH:
        raise ConfigurationError(
            f"{name!r} can't be a certificate's name: it takes 1 to {limits.CERTIFICATE_NAME_LENGTH} letters "
            "(a-z), digits and . - _, and begins with a letter or a digit"
        )


def normal_host(host: str) -> str:
    """A DNS name or an IP address as a certificate has it. ConfigurationError."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    # Digits and dots only was meant to be an address.
    if len(host) > _DNS_LENGTH or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ConfigurationError(
            f"{host!r} is neither a host name nor an IP address (without a port; a name that is not ASCII in "
            "its xn-- form)"
        )
    return host.lower()


class CertificateAuthority:
    """An authority in a directory. Any number of processes may use it at once.

    Its methods raise ConfigurationError for what its user must mend, and OSError.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory
        self.certificate_path = directory / "ca.pem"
        self.key_path = directory / "ca-key.pem"
        self.revoked_path = directory / "revoked.pem"
        self._issued_path = directory / "issued.json"
        self._clock = clock

    def now(self) -> datetime:
        return issuing.moment(self._clock())

    def create(self) -> None:
        """Make it, in a directory that is empty or not there."""
        self._refuse_to_replace()
        files.make_directory(self.directory)
        with files.locked(self.directory):
            self._refuse_to_replace()
            self.directory.chmod(files.PRIVATE_DIRECTORY)
            now = self.now()
            new = issuing.new_authority(now)
            files.write_whole(self.key_path, issuing.key_pem(new.key), files.SECRET)
            self._write_issued(())
            files.write_whole(self.revoked_path, issuing.revocation_list(new, (), 1, now), files.PUBLIC)
            for kind in (SERVER, CLIENT):
                files.make_directory(self.directory / f"{kind}s")
            files.write_whole(self.certificate_path, issuing.certificate_pem(new.certificate), files.PUBLIC)

    def not_after(self) -> datetime:
        """When the authority itself expires, and everything that it issued."""
        read = self._reading(self.certificate_path, issuing.read_certificate)
        return read.not_valid_after_utc

    def issued(self) -> list[Issued]:
        """Every certificate that was ever issued, oldest first."""
        self.not_after()  # or it is no authority
        _, revoked = self._read_revoked()
        at = {entry.serial: entry.at for entry in revoked}
        listed = self._reading(self._issued_path, _parse)
        return [replace(entry, revoked=entry.revoked or at.get(int(entry.serial, 16))) for entry in listed]

    def issue_server(
        self,
        name: str,
        hosts: Sequence[str] = (),
        *,
        local: bool = False,
        also_client: bool = False,
        role: str | None = None,
        days: int = limits.CERTIFICATE_DAYS,
        renew: bool = False,
    ) -> Made:
        """A server's certificate, for *hosts* (for its name, if there are none; `local`: for loopback, too).

        *renew*: beside one of the same name that is valid; what isn't given is as in that one.
        """
        given = [normal_host(host) for host in hosts]

        def request(former: Issued | None) -> issuing.Request:
            names = given or (former.hosts if former else [normal_host(name)])
            names = [*names, *(LOOPBACK if local else ())]
            is_client = also_client or (former is not None and former.also_client)
            if role is not None and not is_client:
                raise ConfigurationError("a server has a role only if it is also a client")
            said = role or (former.role if former else "") or "write"
            unique = list(dict.fromkeys(names))
            return issuing.Request(name, unique, True, is_client, said if is_client else "")

        return self._issue(SERVER, name, request, role, days, renew)

    def issue_client(
        self,
        name: str,
        *,
        role: str | None = None,
        days: int = limits.CERTIFICATE_DAYS,
        renew: bool = False,
    ) -> Made:
        """A client's certificate. *renew*: as above."""

        def request(former: Issued | None) -> issuing.Request:
            return issuing.Request(name, (), False, True, role or (former.role if former else "write"))

        return self._issue(CLIENT, name, request, role, days, renew)

    def revoke(self, name: str | None = None, serial: str | None = None) -> list[Issued]:
        """Revoke all valid certificates of a name, or the one with this serial number."""
        with self._changing() as (authority, listed):
            now = self.now()
            if serial is not None:
                chosen = _with_serial(listed, serial)
            else:
                chosen = [entry for entry in listed if entry.name == name and entry.state(now) in _COUNTS]
                if not chosen:
                    raise ConfigurationError(f"{name} has no valid certificate in {self.directory}")
            serials = {entry.serial for entry in chosen}
            after = [replace(entry, revoked=now) if entry.serial in serials else entry for entry in listed]
            number, on_list = self._read_revoked()
            # What is on the list stays there, whatever else was lost.
            at = {entry.serial: entry.at for entry in on_list}
            at |= {int(entry.serial, 16): entry.revoked for entry in after if entry.revoked is not None}
            revoked = [issuing.Revoked(*pair) for pair in at.items()]
            crl = issuing.revocation_list(authority, revoked, number + 1, now)
            files.write_whole(self.revoked_path, crl, files.PUBLIC)
            self._write_issued(after)
            return [entry for entry in after if entry.serial in serials]

    # Issuing --------------------------------------------------------------------------------------

    def _issue(
        self,
        kind: str,
        name: str,
        request: Callable[[Issued | None], issuing.Request],
        role: str | None,
        days: int,
        renew: bool,
    ) -> Made:
        check_name(name)
        if role is not None and role not in ROLES:
            raise ConfigurationError(f"{role!r} is no role; there are {', '.join(ROLES)}")
        if not 1 <= days <= limits.CERTIFICATE_DAYS_MOST:
            raise ConfigurationError(
                f"a certificate can be valid for 1 to {limits.CERTIFICATE_DAYS_MOST} days, not {days}"
            )
        with self._changing() as (authority, listed):
            now = self.now()
            valid = [entry for entry in listed if entry.name == name and entry.state(now) in _COUNTS]
            former = self._former(kind, name, listed, valid, renew)
            asked = request(former)
            if len(asked.hosts) > limits.CERTIFICATE_HOSTS:
                raise ConfigurationError(f"a server can have {limits.CERTIFICATE_HOSTS} names and addresses")
            return self._make(authority, kind, asked, listed, valid, days)

    def _former(
        self, kind: str, name: str, listed: Sequence[Issued], valid: Sequence[Issued], renew: bool
    ) -> Issued | None:
        """The certificate that is renewed, if one is."""
        if any(entry.kind != kind for entry in valid):
            raise ConfigurationError(
                f"{name} is the name of a {valid[0].kind}; roles and `revoke` go by names: take another one"
            )
        if valid and not renew:
            raise ConfigurationError(
                f"{name} has a certificate that is valid until {valid[-1].not_after:%Y-%m-%d}; --renew makes "
                "a new one beside it"
            )
        known = [e for e in listed if (e.name, e.kind) == (name, kind) and e.revoked is None]
        if renew and not known:
            raise ConfigurationError(
                f"there is no certificate of a {kind} {name} to be renewed; without --renew it gets one"
            )
        return known[-1] if renew else None

    def _make(
        self,
        authority: issuing.Authority,
        kind: str,
        request: issuing.Request,
        listed: Sequence[Issued],
        valid: Sequence[Issued],
        days: int,
    ) -> Made:
        now = self.now()
        last = authority.certificate.not_valid_after_utc
        if last <= now:
            raise ConfigurationError(f"{self.certificate_path} has expired: make another directory with init")
        wanted = now + timedelta(days=days)
        # What outlived its authority would be refused all the same, only less clearly.
        certificate, key = issuing.issue(authority, request, now, min(wanted, last))
        file = f"{kind}s/{request.name}.pem"
        entry = Issued(
            serial=issuing.serial_of(certificate),
            name=request.name,
            kind=kind,
            also_client=request.is_server and request.is_client,
            role=request.role,
            hosts=tuple(request.hosts),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            file=file,
        )
        bundle = issuing.key_pem(key)
        bundle += issuing.certificate_pem(certificate) + issuing.certificate_pem(authority.certificate)
        path = self.directory / file
        files.make_directory(path.parent)
        self._write_issued([*listed, entry])
        files.write_whole(path, bundle, files.SECRET)
        return Made(entry, path, tuple(valid), wanted > last)

    # Files ----------------------------------------------------------------------------------------

    def _refuse_to_replace(self) -> None:
        """ConfigurationError if there is an authority, what is left of one that was used, or other files."""
        if self.certificate_path.exists():
            raise ConfigurationError(f"{self.directory} has a certificate authority already")
        if not self.directory.exists():
            return
        ours = {path.name for path in (self.key_path, self.revoked_path, self._issued_path)}
        ours |= {files.part_of(self.directory / name).name for name in {*ours, "ca.pem"}}
        ours |= {"servers", "clients"}
        if other := sorted({path.name for path in self.directory.iterdir()} - ours):
            raise ConfigurationError(f"{self.directory} has other files ({other[0]}); choose a new directory")
        used = [path for kind in (SERVER, CLIENT) for path in (self.directory / f"{kind}s").glob("*")]
        if used or (self._issued_path.exists() and self._reading(self._issued_path, _parse)):
            raise ConfigurationError(f"{self.certificate_path} is missing, but was used: put it back")

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[issuing.Authority, list[Issued]]]:
        """The authority and what it has issued, which nobody else changes meanwhile."""
        self.not_after()  # or it is no authority, and gets no file for a lock
        with files.locked(self.directory):
            certificate = self.certificate_path.read_bytes()
            try:
                key = self.key_path.read_bytes()
            except FileNotFoundError:
                raise ConfigurationError(
                    f"{self.key_path} is missing: without it nothing can be issued or revoked"
                ) from None
            try:
                authority = issuing.read_authority(certificate, key)
            except ValueError as problem:
                raise ConfigurationError(f"{self.key_path} can't be used: {problem}") from None
            yield authority, self.issued()

    def _reading(self, path: Path, read: Callable[[bytes], _Read]) -> _Read:
        try:
            return read(path.read_bytes())
        except FileNotFoundError:
            if path == self.certificate_path:
                raise ConfigurationError(
                    f"there is no certificate authority in {self.directory}; `zeoid certs init` makes one"
                ) from None
            raise ConfigurationError(f"{path} is missing: restore it from a back-up") from None
        except ValueError as problem:
            raise ConfigurationError(f"{path} can't be read: {problem}") from None

    def _read_revoked(self) -> tuple[int, list[issuing.Revoked]]:
        if not self.revoked_path.exists():
            return 0, []  # it is made anew from what is listed
        return self._reading(self.revoked_path, issuing.read_revocation_list)

    def _write_issued(self, listed: Sequence[Issued]) -> None:
        value = {"format": FORMAT, "issued": [asdict(entry) for entry in listed]}
        text = json.dumps(value, indent=1, default=datetime.isoformat)
        files.write_whole(self._issued_path, text.encode() + b"\n", files.SECRET)


def _with_serial(listed: Sequence[Issued], serial: str) -> list[Issued]:
    plain = serial.replace(":", "").removeprefix("0x")
    try:
        number = int(plain, 16)
    except ValueError:
        raise ConfigurationError(f"{serial!r} is no serial number in hexadecimal") from None
    for entry in listed:
        if int(entry.serial, 16) == number:
            if entry.revoked is not None:
                raise ConfigurationError(f"{serial} was revoked on {entry.revoked:%Y-%m-%d} already")
            return [entry]
    raise ConfigurationError(f"no certificate with the serial number {serial} was issued here")


def _parse(data: bytes) -> list[Issued]:
    """ValueError."""
    value = json.loads(data)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"it does not have format {FORMAT}; another version of zeoid wrote it")
    try:
        return [_parse_entry(entry) for entry in value["issued"]]
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"an entry is damaged ({problem})") from None


def _parse_entry(entry: dict[str, Any]) -> Issued:
    int(entry["serial"], 16)
    revoked = entry["revoked"]
    times = {field: datetime.fromisoformat(entry[field]) for field in ("not_before", "not_after")}
    rest = {
        "hosts": tuple(entry["hosts"]),
        "revoked": None if revoked is None else datetime.fromisoformat(revoked),
    }
    return Issued(**{**entry, **times, **rest})
