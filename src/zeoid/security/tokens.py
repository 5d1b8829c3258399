"""Tokens: what a client shows that has no certificate. The file of them, and which one is good.

A token is `zeoid_NAME_SECRET`: a word that people and scanners for secrets recognize, the name that it has in
logs and rules, and 32 random bytes in base64url, 43 characters. The file has hashes only, so whoever reads
it, or a back-up of it, can't log in. A plain SHA-256 is enough for that: salts and slow hashes are for
passwords, which people choose and others guess; nobody goes through 2²⁵⁶ secrets, however fast.

Owns the format of the file, which is JSON:

    {"version": 1, "tokens": {NAME: {"sha256": …, "role": …, "storages": [… or "*"],
                                     "made": …, "expires": … or null, "revoked": … or null}}}

with times in seconds since the epoch. A version that is not known is refused. Must not know what a role
allows.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from zeoid import limits
from zeoid.errors import ConfigurationError
from zeoid.model import frozen
from zeoid.security import files
from zeoid.security.names import ROLES
from zeoid.security.watched import Watched

VERSION: Final = 1
ALL: Final = "*"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_TOKEN: Final = re.compile(rf"zeoid_({_NAME.pattern})_[A-Za-z0-9_-]{{43}}", re.ASCII)
_SECRET_BYTES: Final = 32
#: No time is as late as this. (JSON may have numbers that are none, which are not before it, either.)
_LAST_TIME: Final = 1e12


@frozen
class Token:
    """What is known of one. Not the token itself."""

    name: str
    sha256: bytes
    role: str
    #: Where the role holds; `ALL` for every one.
    storages: tuple[str, ...]
    made: float
    expires: float | None = None
    revoked: float | None = None

    def wrong(self, now: float) -> str:
        """Why it is no good, or nothing."""
        if self.revoked is not None:
            return "was revoked"
        if self.expires is not None and self.expires <= now:
            return "has expired"
        return ""


Tokens = Mapping[str, Token]


def find(tokens: Tokens, shown: str) -> Token | None:
    """Which one was shown, be it good or not. How long that takes tells nothing of any secret."""
    if len(shown) > limits.TOKEN_CHARACTERS or not (parts := _TOKEN.fullmatch(shown)):
        return None
    known = tokens.get(parts[1])
    # Names are no secrets. The hash of what was shown is compared, which nobody can choose bit by bit.
    same = hmac.compare_digest(_hash(shown), b"" if known is None else known.sha256)
    return known if same else None


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def watched(path: str | os.PathLike[str], **options: Any) -> "Watched[Tokens]":
    """The tokens of a file, for a server. ConfigurationError, also if others than its owner can read it."""
    return Watched(path, parse, private=True, **options)


# The format -------------------------------------------------------------------------------------------


def parse(text: str) -> Tokens:
    """ValueError if it is no such file."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as problem:
        raise ValueError(f"it is no JSON: {problem}") from None
    if not isinstance(content, dict) or "version" not in content:
        raise ValueError("it is no file of tokens")
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']!r} is not known here; this program knows {VERSION}")
    tokens = content.get("tokens")
    if not isinstance(tokens, dict):
        raise ValueError("it has no tokens")
    return {name: _parse_token(name, fields) for name, fields in tokens.items()}


def _parse_token(name: str, fields: Any) -> Token:
    try:
        token = Token(
            name,
            bytes.fromhex(fields["sha256"]),
            fields["role"],
            tuple(fields["storages"]),
            fields["made"],
            fields["expires"],
            fields["revoked"],
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the token {name!r} is not complete") from None
    times = [token.made, *(time for time in (token.expires, token.revoked) if time is not None)]
    if (
        not _NAME.fullmatch(name)
        or len(token.sha256) != hashlib.sha256().digest_size
        or token.role not in ROLES
        or not token.storages
        or isinstance(fields["storages"], str)
        or not all(isinstance(storage, str) for storage in token.storages)
        or not all(type(time) in (int, float) and 0 <= time < _LAST_TIME for time in times)
    ):
        raise ValueError(f"the token {name!r} is not as a token must be")
    return token


def told(tokens: Tokens) -> str:
    """As the text of a file."""
    entries = {
        token.name: {
            "sha256": token.sha256.hex(),
            "role": token.role,
            "storages": list(token.storages),
            "made": token.made,
            "expires": token.expires,
            "revoked": token.revoked,
        }
        for token in tokens.values()
    }
    return json.dumps({"version": VERSION, "tokens": entries}, indent=1) + "\n"


# What is done to a file -------------------------------------------------------------------------------


def read(path: Path) -> Tokens:
    """ConfigurationError if there is none, or it is none."""
    return watched(path).rules


def make(path: Path, name: str, role: str, storages: Sequence[str], days: float | None, now: float) -> str:
    """A new token, which nobody can be told again. ConfigurationError if there is a good one of this name."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} can't be a name: up to 64 letters, digits, dots, dashes and underscores"
        )
    secret = urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).rstrip(b"=").decode("ascii")
    token = f"zeoid_{name}_{secret}"
    with files.locked(path.parent):
        tokens = dict(read(path)) if path.exists() else {}
        if name in tokens and not tokens[name].wrong(now):
            raise ConfigurationError(
                f"there is a token {name!r} already; revoke it first, or choose another name"
            )
        expires = None if days is None else now + days * 24 * 3600
        tokens[name] = Token(name, _hash(token), role, tuple(storages) or (ALL,), now, expires)
        _write(path, tokens)
    return token


def revoke(path: Path, name: str, now: float) -> None:
    """ConfigurationError if there is none, or it was revoked before."""
    with files.locked(path.parent):
        tokens = dict(read(path))
        token = tokens.get(name)
        if token is None:
            raise ConfigurationError(f"there is no token {name!r} in {path}")
        if token.revoked is not None:
            raise ConfigurationError(f"the token {name!r} was revoked before")
        tokens[name] = Token(
            name, token.sha256, token.role, token.storages, token.made, token.expires, revoked=now
        )
        _write(path, tokens)


def _write(path: Path, tokens: Tokens) -> None:
    """Put it in place of the old one, whole or not at all."""
    try:
        files.write_whole(path, told(tokens).encode("utf-8"), files.SECRET)
    except OSError as problem:
        raise ConfigurationError(f"{path} can't be written: {problem.strerror}") from None
