"""Zeoid's server with TLS, with all else as it comes: `tls_server.py DATA_FILE BUNDLE`."""

import logging
import sys

from zeoid.addresses import TcpAddress
from zeoid.engines.opening import open_filestorage
from zeoid.security.tls import ServerTls
from zeoid.server.server import StorageServer, serve_forever


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    engines = {"1": open_filestorage(sys.argv[1])}
    server = StorageServer(engines, offer="M5", tls=ServerTls(sys.argv[2]))
    serve_forever(
        server,
        [TcpAddress("127.0.0.1", 0)],
        on_loop=lambda loop: loop.add_signal_handler(15, server.stop),
    )


if __name__ == "__main__":
    main()
