"""Targets with the files that decide who is let in: good ones have a meaning, others a line that says why."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.certificates import Authority, key_pem
from tests.fuzz.ends import damaged
from tests.security import subjects
from zeoid.config.securing import read_token
from zeoid.errors import ConfigurationError
from zeoid.security import tokens as token_files
from zeoid.security.names import Role
from zeoid.security.roles import name_and_role, parse_access
from zeoid.security.tls import ClientContexts, ClientTls, ServerContexts, ServerTls
from zeoid.security.watched import Watched

_ACCESS = b"""# names
app  write
app  read archive "Jane's"
token:reports read
"Jane Doe" admin *
"""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zeoid-fuzz-")


def _file(data: bytes) -> str:
    path = Path(_folder().name, "file")
    path.write_bytes(data)
    path.chmod(0o600)
    return str(path)


def _told(problem: Exception) -> None:
    """What is said of it is a line that can be read."""
    text = str(problem)
    assert text
    assert "\n" not in text
    assert len(text) < 1000, text


def access(data: bytes) -> None:
    """An access file."""
    try:
        rules = Watched(_file(data), parse_access).rules
    except ConfigurationError as problem:
        _told(problem)
        return
    for name, roles in rules.roles.items():
        assert name not in ("", "*")
        assert roles
        for role in roles.values():
            assert type(role) is Role


def tokens(data: bytes) -> None:
    """A file of tokens, and one with a single one."""
    file = _file(data)
    with contextlib.suppress(ConfigurationError):
        token = read_token(file)
        assert token
        assert not any(c.isspace() for c in token)
    try:
        found = token_files.watched(file).rules
    except ConfigurationError as problem:
        _told(problem)
        return
    for name, token in found.items():
        assert name == token.name
        assert token.wrong(1e9) in ("", "was revoked", "has expired")
        assert token.storages
    assert token_files.parse(token_files.told(found)) == found
    assert token_files.find(found, data.decode("latin-1")) is None


@functools.cache
def _pems() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        bundle = Path(authority.server()).read_bytes()
        key, certificate, _ = authority.issue("client", server=False)
        locked = key_pem(authority.key, "password")
        revoked = Path(authority.revoke(authority.client())).read_bytes()
        return [b"", bundle, authority.pem, revoked, key + certificate, locked + certificate]


def bundle(data: bytes) -> None:
    """Certificates, keys, lists of revoked certificates. The first byte says which one is damaged."""
    first, rest = (data[0], data[1:]) if data else (0, b"")
    good = _pems()
    pem = good[first % len(good)]
    file = _file(damaged(pem, rest) if pem else rest)
    whole = Path(_folder().name, "whole")
    if not whole.exists():
        whole.write_bytes(good[1])
    try:
        _load(first // len(good) % 6, file, str(whole))
    except ConfigurationError as problem:
        _told(problem)
    certificate(first, rest)


def _load(use: int, file: str, whole: str) -> object:
    if use == 0:
        return ServerContexts(ServerTls(file))
    if use == 1:
        return ServerContexts(ServerTls(file, certificate_required=False))
    if use == 2:
        return ServerContexts(ServerTls(whole, revoked=file))
    if use == 3:
        return ServerContexts(ServerTls(whole, ca=file))
    if use == 4:
        return ServerContexts(ServerTls(whole, key=file))
    return ClientContexts(ClientTls(ca=file))


def certificate(first: int, rest: bytes) -> None:
    """Whatever it is, there is a name and a role, or a reason."""
    der = damaged(subjects.certificate("app", "other", units=("zeoid role: admin",)), rest)
    for each in (der, rest):
        name, role, wrong = name_and_role.__wrapped__(each)
        assert type(name) is str
        assert role is None or not wrong
        assert name or wrong


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (access, tokens, bundle)
}


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with."""
    if target == "access":
        return [_ACCESS, *_ACCESS.splitlines(keepends=True)]
    if target == "tokens":
        token = token_files.Token("reports", bytes(32), "read", ("1",), 1.0, 2.0)
        return [token_files.told({"reports": token}).encode(), b"zeoid_reports_" + b"x" * 43 + b"\n"]
    if target == "bundle":
        heads = [bytes([number]) for number in range(36)]
        return heads + [head + bytes([32, 0, place]) for head in heads for place in (0, 20, 250)]
    return []
