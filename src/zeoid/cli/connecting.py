"""What the verbs share that talk to a running server: how it is named, and the connection to it."""

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from zeoid import limits
from zeoid.client.storage import ClientStorage
from zeoid.config.securing import client_options
from zeoid.errors import ClientError, ConfigurationError


def add_server(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a storage of a server."""
    parser.add_argument(
        "address", metavar="ADDRESS", help="host:port, [ipv6]:port or the path of a unix socket of the server"
    )
    parser.add_argument(
        "-S", "--storage", metavar="NAME", default="1", help="the name of the storage there (default: 1)"
    )
    add_security(parser)


def add_security(parser: argparse.ArgumentParser) -> None:
    """What is shown to a server; environment variables say it where options don't."""
    parser.add_argument(
        "--tls", metavar="FILE",
        help="TLS: a private key, its certificate, and the authority whose servers are trusted, as "
        "`zeoid certs client` makes it (or $ZEOID_TLS)",
    )  # fmt: skip
    parser.add_argument(
        "--tls-key", metavar="FILE", help="the private key, if it is not in there (or $ZEOID_TLS_KEY)"
    )
    parser.add_argument(
        "--tls-ca", metavar="FILE",
        help="the authorities, if they are not in there, or `system`; alone: TLS without a certificate of "
        "one's own (or $ZEOID_TLS_CA)",
    )  # fmt: skip
    parser.add_argument(
        "--tls-server-hostname", metavar="NAME",
        help="the name in the server's certificate, if it is not that of its address "
        "(or $ZEOID_TLS_SERVER_HOSTNAME)",
    )  # fmt: skip
    parser.add_argument(
        "--token-file", metavar="FILE",
        help="a file with the token to show (or $ZEOID_TOKEN_FILE; $ZEOID_TOKEN is the token itself)",
    )  # fmt: skip


def security(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a ClientStorage, from those options and the environment. ConfigurationError."""
    names = ("tls", "tls_key", "tls_ca", "tls_server_hostname", "token_file")
    return client_options({name: getattr(arguments, name) for name in names}, os.environ)


@contextlib.contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[ClientStorage]:
    """That storage, closed in the end. ConfigurationError if the server can't be reached."""
    try:
        with said_once():
            # Who waits at a command line wants to know soon that there is no server.
            storage = ClientStorage(
                arguments.address, arguments.storage,
                wait_timeout=limits.CONNECT_TIMEOUT_S, client_label=f"zeoid {arguments.verb}",
                **security(arguments),
            )  # fmt: skip
    except ClientError as problem:
        raise ConfigurationError(str(problem)) from None
    with contextlib.closing(storage):
        yield storage


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Why there is no connection is what the command ends with: no line of the log says it before that."""
    log = logging.getLogger("zeoid.client")
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
