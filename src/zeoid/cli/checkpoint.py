"""`zeoid checkpoint`: have a running server make its data file complete and durable by itself."""

import argparse

from zeoid.cli.connecting import add_server, connected
from zeoid.errors import ClientError, ConfigurationError

SUMMARY = "have a running server make its data file complete by itself, for a back-up"


add_arguments = add_server


def run(arguments: argparse.Namespace) -> int:
    with connected(arguments) as storage:
        try:
            tid = storage.checkpoint()
        except ClientError as problem:
            raise ConfigurationError(f"no checkpoint was made: {problem}") from None
    print(f"the data file of storage {arguments.storage!r} is complete up to transaction {tid.hex()}")
    return 0
