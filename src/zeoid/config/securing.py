"""Who is let in, as options: what a server is told of TLS, tokens and roles, and what a client shows.

Owns these options, and the environment variables of clients. What they mean is `security`'s business.
"""

import os
from collections.abc import Mapping
from typing import Any

from zeoid.errors import ConfigurationError
from zeoid.model import frozen


@frozen
class Securing:
    """Of a server. Each is the path of a file, but for the last three."""

    #: A private key, its certificate, and the authorities whose clients are trusted; or less of that.
    tls: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    tls_revoked: str | None = None
    tokens: str | None = None
    access: str | None = None
    audit_log: str | None = None
    #: That of certificates that have none.
    default_role: str = "write"
    #: Listen on any address without TLS.
    insecure: bool = False

    def server_options(self) -> dict[str, Any]:
        """Arguments of a StorageServer. ConfigurationError if a file is not what it should be."""
        from zeoid.security import roles, tokens
        from zeoid.security.names import ROLES, Role
        from zeoid.security.tls import ServerContexts, ServerTls

        if self.tls is None:
            for option, file in (
                ("tls-key", self.tls_key), ("tls-ca", self.tls_ca), ("tls-revoked", self.tls_revoked),
            ):  # fmt: skip
                if file is not None:
                    raise ConfigurationError(f"{option} is nothing without a certificate (tls)")
        contexts = None
        if self.tls is not None:
            contexts = ServerContexts(
                ServerTls(
                    self.tls, self.tls_key, self.tls_ca, self.tls_revoked,
                    certificate_required=self.tokens is None,
                )
            )  # fmt: skip
        try:
            default_role = Role(self.default_role)
        except ValueError:
            raise ConfigurationError(
                f"the default role can't be {self.default_role!r}; there are {', '.join(ROLES)}"
            ) from None
        policy = roles.Policy(
            default_role=default_role,
            access=roles.read_access(self.access) if self.access else None,
            known_tokens=tokens.watched(self.tokens) if self.tokens else None,
        )
        return {"tls": contexts, "policy": policy, "insecure": self.insecure}


#: The environment variables that say what a client shows, and which argument of `ClientStorage` each is; the
#: last one is the path of a file with a token in it.
ENVIRONMENT: dict[str, str] = {
    "ZEOID_TLS": "tls",
    "ZEOID_TLS_KEY": "tls_key",
    "ZEOID_TLS_CA": "tls_ca",
    "ZEOID_TLS_SERVER_HOSTNAME": "tls_server_hostname",
    "ZEOID_TOKEN": "token",
    "ZEOID_TOKEN_FILE": "token_file",
}


def client_options(given: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of a ClientStorage: what is *given*, by their names, and for what isn't the environment's.

    ConfigurationError if there is no token in a file that is named.
    """
    options: dict[str, Any] = {
        name: environ[variable] for variable, name in ENVIRONMENT.items() if environ.get(variable)
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if "token" in chosen or "token_file" in chosen:
        options.pop("token", None)
        options.pop("token_file", None)
    options |= chosen
    file = options.pop("token_file", None)
    if file is not None:
        if "token" in options:
            raise ConfigurationError("give a token, or the file that it is in, not both")
        options["token"] = read_token(file)
    return options


def read_token(path: str) -> str:
    """The token in a file, which has nothing else. ConfigurationError."""
    try:
        with open(path, encoding="ascii") as file:
            token = file.read(os.stat(path).st_size + 1).strip()
    except OSError as problem:
        raise ConfigurationError(f"can't read {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    if not token or len(token.split()) != 1:
        raise ConfigurationError(f"there is no token in {path}, or more than that")
    return token
