"""`zeoid certs`: a certificate authority in a directory, for servers and clients that trust nobody else."""

import argparse
import json
import shlex
import socket
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zeoid import limits
from zeoid.errors import ConfigurationError

# What these import takes long, and other verbs do without it.
if TYPE_CHECKING:
    from zeoid.security.certificates import CertificateAuthority, Issued, Made

SUMMARY = "make, list and revoke the certificates of servers and clients"

DIRECTORY: Final = "certs"
_DAY: Final = "%Y-%m-%d"
_COLUMNS: Final = ("NAME", "KIND", "ROLE", "HOSTS", "VALID UNTIL", "STATE", "SERIAL")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        added = actions.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            add_help=False,
            allow_abbrev=False,
        )
        added.add_argument("--help", action="help", help="show this and exit")
        added.add_argument(
            "--directory", metavar="DIR", default=DIRECTORY, type=Path,
            help=f"where the certificate authority is (default: {DIRECTORY})",
        )  # fmt: skip
        return added

    action("init", "make a certificate authority")
    server = action("server", "make the file that a server needs")
    _add_issuing(server)
    server.add_argument(
        "hosts", metavar="HOST", nargs="*",
        help="host names and IP addresses that clients know it by (default: NAME)",
    )  # fmt: skip
    server.add_argument("--local", action="store_true", help="also as localhost, 127.0.0.1 and ::1")
    server.add_argument("--also-client", action="store_true", help="it is a client of other servers, too")
    _add_issuing(action("client", "make the file that a client needs"))
    listing = action("list", "show what was issued")
    listing.add_argument("--json", action="store_true", help="for programs")
    revoke = action("revoke", "take certificates back")
    which = revoke.add_mutually_exclusive_group(required=True)
    which.add_argument("name", metavar="NAME", nargs="?", help="all valid ones of this name")
    which.add_argument("--serial", metavar="HEX", help="only the one with this serial number")


def _add_issuing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose it is; also the file's name")
    parser.add_argument(
        "--role", metavar="ROLE", help="what a client may do: read, write (the default), admin or replica"
    )
    parser.add_argument(
        "--days", metavar="N", type=int, default=limits.CERTIFICATE_DAYS,
        help=f"how long it is valid (default: {limits.CERTIFICATE_DAYS})",
    )  # fmt: skip
    parser.add_argument(
        "--renew", action="store_true",
        help="beside one that is valid, which stays so; what isn't said is as in that one",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from zeoid.security.certificates import CertificateAuthority

    authority = CertificateAuthority(arguments.directory)
    try:
        _ACTIONS[arguments.action](authority, arguments)
    except OSError as problem:
        where = problem.filename or arguments.directory
        raise ConfigurationError(f"{where}: {problem.strerror or problem}") from None
    return 0


def _init(authority: "CertificateAuthority", arguments: argparse.Namespace) -> None:
    authority.create()
    print(f"made {authority.certificate_path}, valid until {authority.not_after():{_DAY}}")
    print(f"made {authority.key_path}: keep it secret, and a copy of the directory in a safe place")
    print(f"made {authority.revoked_path}, empty")
    host = _host_name()
    bundle = shlex.quote(f"{authority.directory}/servers/{host}.pem")
    revoked = shlex.quote(str(authority.revoked_path))
    print("Next: a file for the server, one for each client, and the server with its own:")
    print(f"  {_command(authority, 'server')} {host}")
    print(f"  {_command(authority, 'client')} app1")
    print(f"  zeoid serve --address :8100 --tls {bundle} --tls-revoked {revoked} Data.fs")


def _host_name() -> str:
    """This machine's name, where it can be a certificate's."""
    from zeoid.security.certificates import check_name, normal_host

    name = socket.gethostname()
    try:
        check_name(name)
        normal_host(name)
    except ConfigurationError:
        return "server1"
    return name


def _server(authority: "CertificateAuthority", arguments: argparse.Namespace) -> None:
    made = authority.issue_server(
        arguments.name,
        arguments.hosts,
        local=arguments.local,
        also_client=arguments.also_client,
        role=arguments.role,
        days=arguments.days,
        renew=arguments.renew,
    )
    role = f", also a client with the role {made.issued.role}" if made.issued.also_client else ""
    _tell(authority, made, f"for {', '.join(made.issued.hosts)}{role}")


def _client(authority: "CertificateAuthority", arguments: argparse.Namespace) -> None:
    made = authority.issue_client(
        arguments.name, role=arguments.role, days=arguments.days, renew=arguments.renew
    )
    _tell(authority, made, f"with the role {made.issued.role}")


def _tell(authority: "CertificateAuthority", made: "Made", what: str) -> None:
    cut = ", as the authority itself" if made.is_cut else ""
    print(f"made {made.path}, {what}, valid until {made.issued.not_after:{_DAY}}{cut}")
    for former in made.former:
        print(f"the former one stays valid until {former.not_after:{_DAY}}, unless it is revoked:")
        print(f"  {_command(authority, 'revoke')} --serial {former.serial}")


def _revoke(authority: "CertificateAuthority", arguments: argparse.Namespace) -> None:
    for entry in authority.revoke(arguments.name, arguments.serial):
        print(f"revoked {entry.kind} {entry.name}, serial {entry.serial}")
    print(f"made {authority.revoked_path}: copy it to where each server's --tls-revoked points")
    print("A server that reads this very file notices by itself.")


def _command(authority: "CertificateAuthority", action: str) -> str:
    there = (
        ""
        if str(authority.directory) == DIRECTORY
        else f" --directory {shlex.quote(str(authority.directory))}"
    )
    return f"zeoid certs {action}{there}"


def _list(authority: "CertificateAuthority", arguments: argparse.Namespace) -> None:
    from zeoid.security.certificates import validity

    now, not_after, issued = authority.now(), authority.not_after(), authority.issued()
    if arguments.json:
        ca = {
            "file": str(authority.certificate_path),
            "not_after": not_after,
            "state": validity(not_after, now),
        }
        said = {"authority": ca, "issued": [{**asdict(entry), "state": entry.state(now)} for entry in issued]}
        print(json.dumps(said, indent=2, default=datetime.isoformat))
        return
    rows = [_COLUMNS, *(_row(entry, now) for entry in issued)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if issued else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not issued:
        print("nothing was issued yet")
    state = _shown(validity(not_after, now), not_after, now)
    print(f"the authority {authority.certificate_path}: valid until {not_after:{_DAY}}, {state}")


def _row(entry: "Issued", now: datetime) -> tuple[str, ...]:
    kind = "server, client" if entry.also_client else entry.kind
    until = f"{entry.not_after:{_DAY}}"
    state = _shown(entry.state(now), entry.revoked or entry.not_after, now)
    return (entry.name, kind, entry.role or "-", ",".join(entry.hosts) or "-", until, state, entry.serial)


def _shown(state: str, when: datetime, now: datetime) -> str:
    """A state as people read it."""
    if state == "revoked":
        return f"revoked {when:{_DAY}}"
    if state == "soon":
        return f"EXPIRES in {(when - now).days} days"
    return "EXPIRED" if state == "expired" else state


_ACTIONS: Final[dict[str, Any]] = {
    "init": _init,
    "server": _server,
    "client": _client,
    "list": _list,
    "revoke": _revoke,
}
