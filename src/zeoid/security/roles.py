"""Who may do what: roles, the file that gives them to names, and what follows for whoever is connected.

    who is at the other end                        is            may do
    trusted (a unix socket, …), whatever it shows  trusted       everything
    shows a token that is good                     token:NAME    what the access file says, else its own role
                                                                 where that holds
    has a certificate                              its CN        what the access file says, else its own role,
                                                                 else the server's default role
    neither                                        nobody        nothing but show a token

With an access file only who is named in it may do anything, and only that. So the file is the last word, over
what a certificate or a token says of itself, in both directions.

A certificate's role is in its subject: OU `zeoid role: write`. One with two of them, or with a role that is
not known here, may do nothing: it is not for this server to guess which was meant.

Owns these rules. Must not know connections. How a certificate was verified is `tls`' business.
"""

import functools
import logging
import shlex
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final

from zeoid import limits
from zeoid.errors import ConfigurationError, Forbidden
from zeoid.model import frozen
from zeoid.security import tokens
from zeoid.security.identity import Peer, printable
from zeoid.security.names import ROLE_PREFIX, ROLES, Role
from zeoid.security.watched import Watched
from zeoid.wire.messages import Access

log = logging.getLogger("zeoid.server")

TOKEN_PREFIX: Final = "token:"  # noqa: S105 - the beginning of a name
#: Every storage.
ALL: Final = tokens.ALL


GRANTS: Final[Mapping[Role, frozenset[Access]]] = {
    Role.READ: frozenset({Access.READ}),
    Role.WRITE: frozenset({Access.READ, Access.WRITE}),
    Role.ADMIN: frozenset({Access.READ, Access.WRITE, Access.ADMIN}),
    Role.REPLICA: frozenset({Access.READ, Access.REPLICA}),
}
EVERYTHING: Final = frozenset(Access)
NOTHING: Final[frozenset[Access]] = frozenset()


class How(Enum):
    """How a server knows who somebody is."""

    TRUSTED = "trusted"
    CERTIFICATE = "certificate"
    TOKEN = "token"  # noqa: S105 - a word for people
    NOT = "not"


@frozen
class Identity:
    """Who is connected, and what they may do."""

    #: As rules and logs have it: the CN of a certificate, `token:NAME`. Empty if nobody has one.
    name: str
    how: How
    #: By storage; `ALL` holds for the others. None: everything.
    roles: Mapping[str, Role] | None

    def role(self, storage: str) -> Role | None:
        if self.roles is None:
            return None
        return self.roles.get(storage) or self.roles.get(ALL)

    def may(self, storage: str) -> frozenset[Access]:
        """What may be done with a storage of this name, whether there is one or not."""
        if self.roles is None:
            return EVERYTHING
        role = self.role(storage)
        return NOTHING if role is None else GRANTS[role]

    def told(self, storage: str) -> str:
        """Its name and its role, for messages."""
        role = self.role(storage)
        return f"{printable(self.name) or 'it'} has {role.value if role else 'none'}"


TRUSTED: Final = Identity("", How.TRUSTED, None)
NOBODY: Final = Identity("", How.NOT, {})


# The access file --------------------------------------------------------------------------------------


@frozen
class AccessRules:
    """What an access file says."""

    roles: Mapping[str, Mapping[str, Role]]


def parse_access(text: str) -> AccessRules:
    """Lines `NAME ROLE [STORAGE…]`, quoted as in a shell; no storage, or `*`, is every one. ValueError.

    A name may have several lines. What they say of a storage by name counts more than what they say of all.
    """
    roles: dict[str, dict[str, Role]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
            if words:
                _add_rule(roles, words)
        except ValueError as problem:
            raise ValueError(f"line {number}: {problem}") from None
    return AccessRules(roles)


def _add_rule(roles: dict[str, dict[str, Role]], words: list[str]) -> None:
    if len(words) < 2:
        raise ValueError("a line has a name, a role, and storages if not all are meant")
    name, role, *storages = words
    if not name or name == ALL:
        raise ValueError("a rule is for one name; * is for storages only")
    try:
        known = Role(role)
    except ValueError:
        raise ValueError(f"there is no role {role!r}; there are {', '.join(ROLES)}") from None
    of_name = roles.setdefault(name, {})
    for storage in storages or [ALL]:
        if storage in of_name:
            where = "all storages" if storage == ALL else f"storage {storage!r}"
            raise ValueError(f"{name!r} has a role in {where} already")
        of_name[storage] = known


# Certificates -----------------------------------------------------------------------------------------


@functools.lru_cache(limits.CERTIFICATES_KNOWN)
def name_and_role(certificate: bytes) -> tuple[str, Role | None, str]:
    """Of a certificate in DER: its CN, its own role if it has one, and why it may do nothing, or nothing."""
    # What this imports takes time that servers without certificates need not wait.
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        subject = x509.load_der_x509_certificate(certificate).subject
        names = [str(each.value) for each in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        units = [str(each.value) for each in subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
    except Exception as problem:  # which ones, that library does not say
        return "", None, f"its certificate can't be read: {problem}"
    if len(names) != 1 or not names[0]:
        return "", None, "its certificate has no name, or several (CN)"
    name = names[0]
    if name.startswith(TOKEN_PREFIX):
        return name, None, f"its certificate is named {name!r}, as only tokens are"
    own = [unit.removeprefix(ROLE_PREFIX).strip() for unit in units if unit.startswith(ROLE_PREFIX)]
    if not own:
        return name, None, ""
    roles = {role.value: role for role in Role}
    if len(own) > 1 or own[0] not in roles:
        return (
            name,
            None,
            f"the role in its certificate is none, or there are several: {', '.join(own)[:100]!r}",
        )
    return name, roles[own[0]], ""


# All of it --------------------------------------------------------------------------------------------


class Policy:
    """What a server goes by. Without arguments: trusted peers do all, certificates what their role allows."""

    def __init__(
        self,
        *,
        default_role: Role = Role.WRITE,
        access: Watched[AccessRules] | None = None,
        known_tokens: Watched[tokens.Tokens] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """*default_role*: of certificates that have none. *now*: seconds since the epoch."""
        self._default_role = default_role
        self._access = access
        self._tokens = known_tokens
        self._now = now
        self._looked = now()

    def identify(self, peer: Peer, token: str | None = None) -> Identity:
        """Who that is; NOBODY if it shows nothing. Forbidden if *token* is no good."""
        if peer.trusted:
            return TRUSTED
        if token is not None:
            return self._by_token(token)
        if peer.certificate is None:
            return NOBODY
        name, own, wrong = name_and_role(peer.certificate)
        if wrong:
            log.warning("%s may do nothing: %s", peer.where, wrong)
            return Identity(name, How.CERTIFICATE, {})
        return Identity(name, How.CERTIFICATE, self._rules(name, {ALL: own or self._default_role}))

    def renew(self, peer: Peer, identity: Identity) -> Identity:
        """The same one by the rules that hold now; NOBODY if its token is no good any more."""
        if identity.how is not How.TOKEN:
            return self.identify(peer)
        name = identity.name.removeprefix(TOKEN_PREFIX)
        token = None if self._tokens is None else self._tokens.rules.get(name)
        if token is None or token.wrong(self._now()):
            return NOBODY
        return self._of_token(token)

    def look(self) -> bool:
        """Look at the files now and then. Whether somebody who is connected may have other rights by now."""
        changed = False
        for watched in (self._access, self._tokens):
            if watched is not None and watched.look():
                changed = True
        before, self._looked = self._looked, self._now()
        if self._tokens is not None:
            changed = changed or any(
                token.expires is not None and before < token.expires <= self._looked
                for token in self._tokens.rules.values()
            )
        return changed

    def _by_token(self, shown: str) -> Identity:
        if self._tokens is None:
            raise Forbidden("this server takes no tokens")
        token = tokens.find(self._tokens.rules, shown)
        if token is None:
            raise Forbidden("this token is not known here")
        wrong = token.wrong(self._now())
        if wrong:
            raise Forbidden(f"the token {token.name!r} {wrong}")
        return self._of_token(token)

    def _of_token(self, token: tokens.Token) -> Identity:
        name = TOKEN_PREFIX + token.name
        own = dict.fromkeys(token.storages, Role(token.role))
        return Identity(name, How.TOKEN, self._rules(name, own))

    def _rules(self, name: str, own: Mapping[str, Role]) -> Mapping[str, Role]:
        return own if self._access is None else self._access.rules.roles.get(name, {})


def read_access(path: str) -> Watched[AccessRules]:
    """The rules of an access file, which are followed while it changes. ConfigurationError."""
    return Watched(path, parse_access)


def policy(
    *, default_role: str = "write", access_file: str | None = None, tokens_file: str | None = None
) -> Policy:
    """From what people write. ConfigurationError."""
    try:
        role = Role(default_role)
    except ValueError:
        named = ", ".join(each.value for each in Role)
        raise ConfigurationError(f"the default role can't be {default_role!r}; there are {named}") from None
    return Policy(
        default_role=role,
        access=None if access_file is None else read_access(access_file),
        known_tokens=None if tokens_file is None else tokens.watched(tokens_file),
    )
