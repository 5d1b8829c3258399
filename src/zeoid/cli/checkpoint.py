"""`zeoid checkpoint`: have a running server make its data file complete and durable by itself."""

import argparse

from zeoid import limits
from zeoid.client.storage import ClientStorage
from zeoid.errors import ClientError, ConfigurationError

SUMMARY = "have a running server make its data file complete by itself, for a back-up"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "address", metavar="ADDRESS", help="host:port, [ipv6]:port or the path of a unix socket of the server"
    )
    parser.add_argument(
        "-S", "--storage", metavar="NAME", default="1", help="the name of the storage there (default: 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        # Who waits at a command line wants to know soon that there is no server.
        storage = ClientStorage(
            arguments.address, arguments.storage,
            wait_timeout=limits.CONNECT_TIMEOUT_S, client_label="zeoid checkpoint",
        )  # fmt: skip
    except ClientError as problem:
        raise ConfigurationError(str(problem)) from None
    try:
        tid = storage.checkpoint()
    except ClientError as problem:
        raise ConfigurationError(f"no checkpoint was made: {problem}") from None
    finally:
        storage.close()
    print(f"the data file of storage {arguments.storage!r} is complete up to transaction {tid.hex()}")
    return 0
