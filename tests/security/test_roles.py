"""Who may do what: roles, the access file, what certificates and tokens say of themselves."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.subjects import certificate, with_role
from zeoid import limits
from zeoid.errors import ConfigurationError, Forbidden
from zeoid.security import roles, tokens
from zeoid.security.identity import LOCAL, Peer
from zeoid.security.names import Role
from zeoid.security.roles import EVERYTHING, NOBODY, How, Policy, name_and_role, parse_access
from zeoid.security.watched import Watched
from zeoid.wire.messages import Access

READ, WRITE, ADMIN, REPLICA = Access.READ, Access.WRITE, Access.ADMIN, Access.REPLICA
NOW = 1_700_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def of_certificate(der: bytes) -> Peer:
    return Peer("192.0.2.7:5000", trusted=False, encrypted=True, certificate=der)


STRANGER = Peer("192.0.2.7:5000", trusted=False, encrypted=True)


def access(text: str) -> Policy:
    return Policy(access=_Fixed(parse_access(text)))  # type: ignore[arg-type]


class _Fixed:
    def __init__(self, rules: object) -> None:
        self.rules = rules

    def look(self) -> bool:
        return False


# Roles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "granted"),
    [
        ("read", {READ}),
        ("write", {READ, WRITE}),
        ("admin", {READ, WRITE, ADMIN}),
        ("replica", {READ, REPLICA}),
    ],
)
def test_what_a_role_allows(role: str, granted: set[Access]) -> None:
    identity = Policy().identify(of_certificate(with_role("zope1", role)))
    assert (identity.name, identity.how) == ("zope1", How.CERTIFICATE)
    assert identity.may("1") == granted
    assert identity.told("1") == f"zope1 has {role}"


def test_whoever_is_trusted_may_do_everything() -> None:
    for policy in (Policy(), access("somebody read")):
        identity = policy.identify(Peer(LOCAL))
        assert identity.how is How.TRUSTED
        assert identity.may("1") == EVERYTHING == set(Access)


def test_whoever_shows_nothing_may_do_nothing() -> None:
    assert Policy().identify(STRANGER) is NOBODY
    assert NOBODY.may("1") == set()


# Certificates -----------------------------------------------------------------------------------------


def test_a_certificate_without_a_role_has_the_default() -> None:
    peer = of_certificate(certificate("zope1", units=("Web", "role: admin")))
    assert Policy().identify(peer).may("1") == {READ, WRITE}
    assert Policy(default_role=Role.READ).identify(peer).may("1") == {READ}


@pytest.mark.parametrize(
    "der",
    [
        with_role("zope1", "superuser"),
        with_role("zope1", ""),
        with_role("zope1", "Admin"),
        certificate("zope1", units=("zeoid role: read", "zeoid role: admin")),
        certificate("zope1", units=("zeoid role: read", "zeoid role: read")),
        certificate("zope1", "zope2"),
        certificate(units=("zeoid role: admin",)),
        certificate("token:reports", units=("zeoid role: admin",)),
        b"no certificate",
        b"",
    ],
    ids=["unknown role", "empty role", "upper case", "two roles", "twice", "two names", "no name",
         "as a token", "junk", "empty"],
)  # fmt: skip
def test_a_certificate_that_is_not_clear_may_do_nothing(der: bytes, caplog: pytest.LogCaptureFixture) -> None:
    identity = Policy(default_role=Role.ADMIN).identify(of_certificate(der))
    assert identity.may("1") == set()
    assert "192.0.2.7:5000 may do nothing: " in caplog.text


def test_a_certificate_can_not_take_the_name_of_a_token() -> None:
    policy = access("token:reports admin")
    assert policy.identify(of_certificate(certificate("token:reports"))).may("1") == set()


def test_a_certificate_is_read_once() -> None:
    der = with_role("read once", "read")
    name_and_role(der)
    before = name_and_role.cache_info()
    name_and_role(der)
    after = name_and_role.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
    assert after.maxsize == limits.CERTIFICATES_KNOWN


def test_cryptography_is_imported_when_it_is_needed() -> None:
    code = "import sys, zeoid.security.roles; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The access file --------------------------------------------------------------------------------------

FILE = """
# who may do what
zope1         write
zope1         read   archive   # more than all
backup        replica 1 archive
"Jane Doe"    admin  *
token:reports read   "odd name"

zope2 write temp
zope2 read 1
"""


@pytest.mark.parametrize(
    ("name", "storage", "role"),
    [
        ("zope1", "1", "write"), ("zope1", "archive", "read"), ("zope1", "new", "write"),
        ("backup", "1", "replica"), ("backup", "archive", "replica"), ("backup", "temp", None),
        ("Jane Doe", "1", "admin"), ("token:reports", "odd name", "read"), ("token:reports", "1", None),
        ("zope2", "temp", "write"), ("zope2", "1", "read"), ("zope2", "archive", None),
        ("Zope1", "1", None), ("zope", "1", None), ("*", "1", None), ("#", "1", None),
    ],
)  # fmt: skip
def test_what_a_file_says(name: str, storage: str, role: str | None) -> None:
    policy = access(FILE)
    identity = policy.identify(of_certificate(with_role(name, "admin"))) if ":" not in name else None
    if identity is None:
        identity = roles.Identity(name, How.TOKEN, parse_access(FILE).roles[name])
    found = identity.role(storage)
    assert (found and found.value) == role
    assert bool(identity.may(storage)) == (role is not None)


def test_the_file_says_more_and_less_than_a_certificate() -> None:
    policy = access("zope1 admin\nzope2 read")
    assert ADMIN in policy.identify(of_certificate(with_role("zope1", "read"))).may("1")
    assert policy.identify(of_certificate(with_role("zope2", "admin"))).may("1") == {READ}
    assert policy.identify(of_certificate(with_role("zope3", "admin"))).may("1") == set()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("zope1", "a line has a name, a role"),
        ("zope1 writer", "there is no role 'writer'; there are read, write, admin, replica"),
        ("zope1 Write", "no role 'Write'"),
        ("* read", "a rule is for one name"),
        ("'' read", "a rule is for one name"),
        ("zope1 read 'a", "quotation"),
        ("ok admin", "'ok' has a role in all storages already"),
        ("zope1 read 1 1", "'zope1' has a role in storage '1' already"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "access"
    path.write_text(f"# a comment\nok read\n{line}\n")
    with pytest.raises(ConfigurationError) as caught:
        roles.read_access(str(path))
    text = str(caught.value)
    assert text.startswith(f"{path}: line 3: ")
    assert words.lower() in text.lower()
    assert "\n" not in text


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (limits.RULES_BYTES + 1)], ids=["not text", "large"])
def test_what_is_no_file_of_rules(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "access"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=str(path)):
        roles.read_access(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be read"):
        roles.read_access(str(tmp_path / "nowhere"))


# A file that changes ----------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


def change(path: Path, text: str) -> None:
    """As editors and we do it: another file in its place."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def watch(path: Path, clock: Clock) -> Watched[roles.AccessRules]:
    return Watched(path, parse_access, monotonic=clock)


def test_a_change_is_noticed_after_a_second(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "access"
    path.write_text("zope1 read")
    watched = watch(path, clock)
    policy = Policy(access=watched)
    zope1 = of_certificate(certificate("zope1"))
    change(path, "zope1 write")
    clock.now += 0.9 * limits.RULES_RELOAD_S
    assert not policy.look()
    assert policy.identify(zope1).may("1") == {READ}
    clock.now += 0.2 * limits.RULES_RELOAD_S
    assert policy.look()
    assert policy.identify(zope1).may("1") == {READ, WRITE}
    clock.now += 2 * limits.RULES_RELOAD_S
    assert not policy.look()


def test_a_file_that_says_the_same_changes_nothing(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "access"
    path.write_text("zope1 read")
    watched = watch(path, clock)
    change(path, "# a comment\nzope1 read")
    clock.now += 2
    assert not watched.look()


@pytest.mark.parametrize("fault", ["zope1 nonsense", None], ids=["mistake", "gone"])
def test_a_fault_in_a_new_file_keeps_the_old_rules(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, fault: str | None
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "access"
    path.write_text("zope1 read")
    watched = watch(path, clock)
    if fault is None:
        path.unlink()
    else:
        change(path, fault)
    for _ in range(5):
        clock.now += 2
        assert not watched.look()
    assert watched.rules == parse_access("zope1 read")
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert record.exc_info is None
    change(path, "zope1 admin")
    clock.now += 2
    assert watched.look()
    assert watched.rules == parse_access("zope1 admin")


# Tokens -----------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def test_a_token_and_its_role(path: Path) -> None:
    token = tokens.make(path, "reports", "read", ["1"], None, NOW)
    policy = Policy(known_tokens=tokens.watched(path))
    identity = policy.identify(STRANGER, token)
    assert (identity.name, identity.how) == ("token:reports", How.TOKEN)
    assert identity.may("1") == {READ}
    assert identity.may("2") == set()


def test_a_token_counts_more_than_a_certificate(path: Path) -> None:
    token = tokens.make(path, "reports", "read", [], None, NOW)
    policy = Policy(known_tokens=tokens.watched(path))
    assert policy.identify(of_certificate(with_role("zope1", "admin")), token).may("1") == {READ}


def test_the_file_says_what_a_token_may_do(path: Path) -> None:
    token = tokens.make(path, "reports", "read", ["1"], None, NOW)
    known = tokens.watched(path)
    for text, granted in [("token:reports write 2", {READ, WRITE}), ("reports write 2", set())]:
        policy = Policy(access=_Fixed(parse_access(text)), known_tokens=known)  # type: ignore[arg-type]
        assert policy.identify(STRANGER, token).may("2") == granted
        assert policy.identify(STRANGER, token).may("1") == set()


def test_a_server_without_tokens_takes_none(path: Path) -> None:
    token = tokens.make(path, "reports", "read", [], None, NOW)
    with pytest.raises(Forbidden, match="takes no tokens"):
        Policy().identify(STRANGER, token)


def test_a_token_that_expires(path: Path, clock: Clock) -> None:
    token = tokens.make(path, "reports", "read", [], 2, NOW)
    policy = Policy(known_tokens=tokens.watched(path), now=clock)
    identity = policy.identify(STRANGER, token)
    clock.now = NOW + 2 * 24 * 3600 - 1
    assert not policy.look()
    assert policy.renew(STRANGER, identity) == identity
    clock.now += 1
    assert policy.look(), "who came in with it may not stay"
    assert not policy.look()
    assert policy.renew(STRANGER, identity) is NOBODY
    with pytest.raises(Forbidden, match="the token 'reports' has expired"):
        policy.identify(STRANGER, token)


def test_a_token_that_is_revoked(path: Path, clock: Clock) -> None:
    token = tokens.make(path, "reports", "read", [], None, NOW)
    policy = Policy(known_tokens=tokens.watched(path, monotonic=clock))
    identity = policy.identify(STRANGER, token)
    tokens.revoke(path, "reports", NOW)
    clock.now += 2
    assert policy.look()
    assert policy.renew(STRANGER, identity) is NOBODY
    with pytest.raises(Forbidden, match="the token 'reports' was revoked"):
        policy.identify(STRANGER, token)


def test_renewing_follows_the_rules(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "access"
    path.write_text("zope1 read")
    policy = Policy(access=watch(path, clock))
    zope1 = of_certificate(certificate("zope1"))
    identity = policy.identify(zope1)
    change(path, "zope1 admin")
    clock.now += 2
    policy.look()
    assert ADMIN in policy.renew(zope1, identity).may("1")
    assert policy.renew(Peer(LOCAL), policy.identify(Peer(LOCAL))).may("1") == EVERYTHING


def test_a_policy_from_what_people_write(tmp_path: Path, path: Path) -> None:
    rules = tmp_path / "access"
    rules.write_text("token:reports admin")
    token = tokens.make(path, "reports", "read", [], None, NOW)
    policy = roles.policy(default_role="read", access_file=str(rules), tokens_file=str(path))
    assert ADMIN in policy.identify(STRANGER, token).may("1")
    assert roles.policy(default_role="read").identify(of_certificate(certificate("a"))).may("1") == {READ}
    with pytest.raises(ConfigurationError, match="can't be 'root'"):
        roles.policy(default_role="root")
