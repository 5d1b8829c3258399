"""What the verbs share that talk to a running server: how it is named, and the connection to it."""

import argparse
import contextlib
from collections.abc import Iterator

from zeoid import limits
from zeoid.client.storage import ClientStorage
from zeoid.errors import ClientError, ConfigurationError


def add_server(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a storage of a server."""
    parser.add_argument(
        "address", metavar="ADDRESS", help="host:port, [ipv6]:port or the path of a unix socket of the server"
    )
    parser.add_argument(
        "-S", "--storage", metavar="NAME", default="1", help="the name of the storage there (default: 1)"
    )


@contextlib.contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[ClientStorage]:
    """That storage, closed in the end. ConfigurationError if the server can't be reached."""
    try:
        # Who waits at a command line wants to know soon that there is no server.
        storage = ClientStorage(
            arguments.address, arguments.storage,
            wait_timeout=limits.CONNECT_TIMEOUT_S, client_label=f"zeoid {arguments.verb}",
        )  # fmt: skip
    except ClientError as problem:
        raise ConfigurationError(str(problem)) from None
    with contextlib.closing(storage):
        yield storage
