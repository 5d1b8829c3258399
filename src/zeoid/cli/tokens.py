"""`zeoid tokens`: make, list or revoke what clients show to a server instead of a certificate."""

import argparse
import contextlib
import time
from pathlib import Path

from zeoid.errors import ConfigurationError
from zeoid.security import tokens
from zeoid.security.names import ROLES
from zeoid.security.tokens import Token

SUMMARY = "make, list or revoke tokens, which clients show instead of a certificate"

_DEFAULT_ROLE = "write"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", metavar="ACTION", choices=("make", "list", "revoke"),
        help="make: a new token, which is printed once; list: what there is; revoke: one is no good any more",
    )  # fmt: skip
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="what logs and the access file call it, as token:NAME there"
    )
    parser.add_argument(
        "--file", metavar="FILE", default="tokens.json", help="the file of tokens (default: ./tokens.json)"
    )
    parser.add_argument(
        "--role", metavar="ROLE", choices=ROLES,
        help=f"{', '.join(ROLES[:-1])} or {ROLES[-1]} (default: {_DEFAULT_ROLE})",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="NAME", action="append",
        help="the storage that it is for; may be given several times (default: all of the server)",
    )  # fmt: skip
    parser.add_argument(
        "--days", metavar="DAYS", type=_days, help="how long it is good (default: until it is revoked)"
    )


def _days(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e6:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number of days")


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file)
    if arguments.action != "make" and (arguments.role or arguments.storage or arguments.days is not None):
        raise ConfigurationError("--role, --storage and --days are for `zeoid tokens make`")
    if arguments.action == "list":
        if arguments.name is not None:
            raise ConfigurationError("`zeoid tokens list` lists all of them: leave the name out")
        return _list(path)
    if arguments.name is None:
        raise ConfigurationError(f"which one? `zeoid tokens {arguments.action} NAME`")
    if arguments.action == "revoke":
        tokens.revoke(path, arguments.name, time.time())
        print(f"{arguments.name} is revoked")
        return 0
    role = arguments.role or _DEFAULT_ROLE
    print(tokens.make(path, arguments.name, role, arguments.storage or (), arguments.days, time.time()))
    return 0


def _list(path: Path) -> int:
    now = time.time()
    for token in tokens.read(path).values():
        storages = "all storages" if tokens.ALL in token.storages else ", ".join(token.storages)
        print(f"{token.name}: {token.role} in {storages}, made {_day(token.made)}, {_state(token, now)}")
    return 0


def _state(token: Token, now: float) -> str:
    if token.revoked is not None:
        return f"revoked {_day(token.revoked)}"
    if token.expires is None:
        return "good until it is revoked"
    return f"{'expired' if token.wrong(now) else 'good until'} {_day(token.expires)}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
